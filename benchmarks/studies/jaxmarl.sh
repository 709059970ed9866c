#!/usr/bin/env bash
# PQN with value decomposition on JaxMARL, at sizes for two CPU cores.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Seeds that no setting was chosen on.
python benchmarks/studies/curves.py --out benchmarks/results/vdn_smax_3m \
    --title "SMAX 3m" --metric eval/win_rate --line 0.9 --num-seeds 5 \
    --flags="--env-id smax_3m --num-envs 64 --num-steps 32 --hidden-size 128 --num-layers 1 --num-minibatches 8 --learning-rate 5e-4 --epsilon-finish 0.05 --eval-episodes 256 --total-timesteps 1.5e6 --eval-interval 61 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_smax_3m_mixer \
    --title "SMAX 3m, smaller network" --metric eval/win_rate --num-seeds 5 \
    --flags="--env-id smax_3m --num-envs 64 --num-steps 32 --hidden-size 64 --num-layers 1 --num-minibatches 8 --learning-rate 5e-4 --epsilon-finish 0.05 --eval-episodes 256 --total-timesteps 5e5 --eval-interval 30 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "VDN, limit as terminal=pqn_vdn_jaxmarl --no-bootstrap-on-truncation" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_smax_2s3z \
    --title "SMAX 2s3z" --metric eval/win_rate --num-seeds 3 \
    --flags="--env-id smax_2s3z --num-envs 64 --num-steps 32 --hidden-size 128 --num-layers 1 --num-minibatches 8 --learning-rate 5e-4 --epsilon-finish 0.05 --eval-episodes 256 --total-timesteps 2e6 --eval-interval 81 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_cramped_room \
    --title "Overcooked, cramped room" --line 200 --num-seeds 5 \
    --flags="--env-id overcooked_cramped_room --network mlp --hidden-size 128 --num-minibatches 8 --learning-rate 3e-4 --epsilon-finish 0.05 --shaping-decay 0.6 --eval-episodes 32 --total-timesteps 1.2e6 --eval-interval 73 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "VDN, limit as terminal=pqn_vdn_jaxmarl --no-bootstrap-on-truncation" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_asymm_advantages \
    --title "Overcooked, asymmetric advantages" --num-seeds 5 \
    --flags="--env-id overcooked_asymm_advantages --network mlp --hidden-size 128 --num-minibatches 8 --learning-rate 3e-4 --epsilon-finish 0.05 --shaping-decay 0.6 --eval-episodes 32 --total-timesteps 1.2e6 --eval-interval 73 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none"

# The reference at these sizes, and ours without its batch normalisation and window.
python benchmarks/studies/curves.py --out benchmarks/results/vdn_smax_3m_peer \
    --title "SMAX 3m" --metric eval/win_rate --num-seeds 5 \
    --flags="--env-id smax_3m --num-envs 64 --num-steps 32 --hidden-size 64 --num-layers 1 --num-minibatches 8 --learning-rate 5e-4 --epsilon-finish 0.05 --eval-episodes 256 --total-timesteps 1e6 --eval-interval 24 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "VDN, layer norm, no window=pqn_vdn_jaxmarl --norm layer_norm --norm-input none --memory-window 0" \
    --peer 'PureJaxQL=$PUREJAXQL_JAXMARL benchmarks/studies/peers/purejaxql_vdn.py --num-seeds 5 --total-timesteps 1000000 --set NUM_ENVS=64 NUM_STEPS=32 HIDDEN_SIZE=64 NUM_LAYERS=1 NUM_MINIBATCHES=8 NUM_EPOCHS=4 LR=0.0005 EPS_FINISH=0.05 TEST_NUM_ENVS=256'

python benchmarks/studies/speed.py pqn_vdn_jaxmarl --out benchmarks/results/vdn_speed --repeats 2 \
    --flags="--env-id smax_3m --num-envs 64 --num-steps 32 --hidden-size 64 --num-layers 1 --num-minibatches 8 --learning-rate 5e-4 --epsilon-finish 0.05 --eval-interval 0 --total-timesteps 1e5" \
    --peer 'PureJaxQL=$PUREJAXQL_JAXMARL benchmarks/studies/peers/purejaxql_vdn.py --total-timesteps 100000 --set NUM_ENVS=64 NUM_STEPS=32 HIDDEN_SIZE=64 NUM_LAYERS=1 NUM_MINIBATCHES=8 NUM_EPOCHS=4 LR=0.0005 EPS_FINISH=0.05 TEST_DURING_TRAINING=False'
