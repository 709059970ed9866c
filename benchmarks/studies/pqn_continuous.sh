#!/usr/bin/env bash
# PQN for continuous actions, beside PQL and PPO.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/pqnc_pendulum \
    --title Pendulum-v1 --line=-170 --num-seeds 10 \
    --flags="--env-id Pendulum-v1 --num-envs 64 --num-minibatches 16 --num-critics 1 --actor-hidden-sizes 128 128 --critic-hidden-sizes 128 128 --learning-rate 3e-4 --gamma 0.97 --reward-scale 0.1 --eval-interval 25 --total-timesteps 5e5 --seed 1000" \
    --curve "PQN=pqn_continuous_action"

# Step counts such that each takes about as long.
python benchmarks/studies/curves.py --out benchmarks/results/pqnc_ant \
    --title ant --num-seeds 3 --in-turns --x steps seconds \
    --flags="--env-id ant --eval-episodes 16" \
    --curve "PQN=pqn_continuous_action --num-envs 256 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 2e-3 --gamma 0.97 --norm-reward --stddev-start 0.5 --eval-interval 12 --total-timesteps 1e6" \
    --curve "PQL=pql_isaac_style --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 600000 --reward-scale 0.1 --eval-interval 8 --total-timesteps 5.5e5" \
    --curve "PPO=ppo_continuous_action --num-envs 256 --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 12 --total-timesteps 1e6"

python benchmarks/studies/curves.py --out benchmarks/results/pqnc_halfcheetah \
    --title halfcheetah --num-seeds 3 --in-turns --x steps seconds \
    --flags="--env-id halfcheetah --eval-episodes 16" \
    --curve "PQN=pqn_continuous_action --num-envs 256 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 2e-3 --gamma 0.97 --norm-reward --stddev-start 0.5 --eval-interval 12 --total-timesteps 1e6" \
    --curve "PQL=pql_isaac_style --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 600000 --reward-scale 0.1 --eval-interval 8 --total-timesteps 5.5e5" \
    --curve "PPO=ppo_continuous_action --num-envs 256 --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 12 --total-timesteps 1e6"

# Two tasks of dm_control, where MuJoCo Playground is installed: pip install "playground>=0.2,<0.3".
python benchmarks/studies/curves.py --out benchmarks/results/pqnc_cartpole_swingup \
    --title "dm_control, CartpoleSwingup" --num-seeds 3 --in-turns --x steps seconds \
    --flags="--env-id CartpoleSwingup --eval-episodes 16" \
    --curve "PQN=pqn_continuous_action --num-envs 128 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 1e-3 --eval-interval 12 --total-timesteps 5e5" \
    --curve "PQL=pql_isaac_style --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 600000 --reward-scale 0.1 --eval-interval 8 --total-timesteps 3e5" \
    --curve "PPO=ppo_continuous_action --num-envs 128 --num-steps 32 --num-minibatches 16 --initial-stddev 0.5 --eval-interval 24 --total-timesteps 5e5" \
    --peer 'PureJaxQL=$PUREJAXQL_PLAYGROUND benchmarks/studies/peers/purejaxql_playground.py --env-id CartpoleSwingup --num-seeds 3 --total-timesteps 500000 --set NUM_ENVS=128 NUM_MINIBATCHES=16 ACTOR_HIDDEN_SIZES=[128,128] CRITIC_HIDDEN_SIZES=[256,128] LR_START=0.001 LR_END=0.000005 TEST_NUM_ENVS=16'

python benchmarks/studies/speed.py pqn_continuous_action --out benchmarks/results/pqnc_speed \
    --flags="--env-id CartpoleSwingup --num-envs 128 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 1e-3 --eval-interval 0 --total-timesteps 2e5" \
    --peer 'PureJaxQL=$PUREJAXQL_PLAYGROUND benchmarks/studies/peers/purejaxql_playground.py --env-id CartpoleSwingup --total-timesteps 200000 --set NUM_ENVS=128 NUM_MINIBATCHES=16 ACTOR_HIDDEN_SIZES=[128,128] CRITIC_HIDDEN_SIZES=[256,128] LR_START=0.001 LR_END=0.000005 TEST_DURING_TRAINING=False'

python benchmarks/studies/curves.py --out benchmarks/results/pqnc_reacher_hard \
    --title "dm_control, ReacherHard" --num-seeds 3 --in-turns --x steps seconds \
    --flags="--env-id ReacherHard --eval-episodes 16" \
    --curve "PQN=pqn_continuous_action --num-envs 128 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 1e-3 --eval-interval 24 --total-timesteps 5e5" \
    --curve "PQL=pql_isaac_style --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 600000 --reward-scale 0.1 --eval-interval 8 --total-timesteps 3e5" \
    --curve "PPO=ppo_continuous_action --num-envs 128 --num-steps 32 --num-minibatches 16 --initial-stddev 0.5 --eval-interval 24 --total-timesteps 5e5"

# What each of the parts does.
python benchmarks/studies/curves.py --out benchmarks/results/pqnc_parts \
    --title "ant, without a part of PQN" --num-seeds 5 \
    --flags="--env-id ant --num-envs 256 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 2e-3 --gamma 0.97 --norm-reward --stddev-start 0.5 --eval-interval 12 --eval-episodes 16 --total-timesteps 3e5" \
    --curve "PQN=pqn_continuous_action" \
    --curve "no penalty=pqn_continuous_action --penalty-coef 0" \
    --curve "no layer norm=pqn_continuous_action --norm none" \
    --curve "lambda 0=pqn_continuous_action --td-lambda 0"
