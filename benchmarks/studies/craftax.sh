#!/usr/bin/env bash
# PQN with an LSTM on Craftax-Classic; PQN and DQN on it at equal seconds.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/craftax_classic \
    --title Craftax-Classic-Symbolic-v1 --num-seeds 2 --metric charts/episodic_return \
    --flags="--env-id Craftax-Classic-Symbolic-v1 --num-envs 64 --num-steps 32 --hidden-size 128 --reset-ratio 16" \
    --curve "PQN with LSTM=pqn_rnn_craftax --total-timesteps 1e6"

python benchmarks/studies/curves.py --out benchmarks/results/craftax_achievements \
    --title Craftax-Classic-Symbolic-v1 --num-seeds 1 --metric charts/episodic_return \
    --flags="--env-id Craftax-Classic-Symbolic-v1 --num-envs 64 --num-steps 32 --hidden-size 128 --reset-ratio 16" \
    --curve "PQN with LSTM=pqn_rnn_craftax --total-timesteps 5e5" \
    --curve "random actions=pqn_rnn_craftax --total-timesteps 1e5 --epsilon-finish 1"

python benchmarks/studies/speed.py pqn_rnn_craftax --out benchmarks/results/craftax_speed --repeats 2 \
    --flags="--env-id Craftax-Classic-Symbolic-v1 --num-envs 64 --num-steps 32 --hidden-size 128 --reset-ratio 16 --total-timesteps 65536" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Craftax-Classic-Symbolic-v1 --total-timesteps 65536 --set NUM_ENVS=64 NUM_STEPS=32 HIDDEN_SIZE=128'

# Each setting is the best of four on seeds 0 and 1, 25 seconds each: learning rates 3e-4 and 1e-3;
# PQN with 2 and 4 epochs, DQN with batches of 128 and 512. On one core: taskset -c 0 before it.
python benchmarks/studies/equal_seconds.py craftax_in_gymnax \
    --out benchmarks/results/craftax_replay --title "Craftax-Classic, one core" --seconds 100 \
    --flags="--env-id Craftax-Classic --num-envs 64 --total-timesteps 1e6 --epsilon-finish 0.05 --epsilon-decay 0.05 --eval-interval 0" \
    --curve "PQN=pqn_cartpole --num-steps 32 --num-epochs 4 --num-minibatches 8 --hidden-size 128 --td-lambda 0.65 --reward-scale 1 --learning-rate 1e-3 --no-anneal-lr" \
    --curve "DQN=dqn_cartpole --buffer-size 100000 --batch-size 512 --hidden-sizes 128 128 --learning-rate 3e-4"
