#!/usr/bin/env bash
# The flags of earlier studies again, after the training code was written anew for fewer launches.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/again_breakout \
    --title "Breakout-MinAtar, again" --num-seeds 5 \
    --curve "PQN=pqn_minatar --env-id Breakout-MinAtar --total-timesteps 1e6 --eval-interval 12 --eval-episodes 32"

python benchmarks/studies/curves.py --out benchmarks/results/again_memory \
    --title "MemoryChain-bsuite, again" --num-seeds 16 \
    --flags="--env-id MemoryChain-bsuite --env-params memory_length=100 --num-envs 32 --num-minibatches 16 --learning-rate 1e-3 --td-lambda 1 --epsilon-finish 0.01 --max-grad-norm 0.1 --hidden-size 128 --forget-bias 5 --total-timesteps 2e5 --eval-interval 4 --seed 3000" \
    --curve "PQN with LSTM=pqn_rnn_craftax"

python benchmarks/studies/curves.py --out benchmarks/results/again_pendulum \
    --title "Pendulum-v1, again" --num-seeds 10 \
    --flags="--env-id Pendulum-v1 --num-envs 64 --num-minibatches 16 --num-critics 1 --actor-hidden-sizes 128 128 --critic-hidden-sizes 128 128 --learning-rate 3e-4 --gamma 0.97 --reward-scale 0.1 --eval-interval 25 --total-timesteps 5e5 --seed 1000" \
    --curve "PQN=pqn_continuous_action"

python benchmarks/studies/curves.py --out benchmarks/results/again_ant_ppo \
    --title "ant, again" --num-seeds 5 \
    --flags="--env-id ant --num-envs 256 --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 12 --eval-episodes 16 --total-timesteps 1e6" \
    --curve "PPO=ppo_continuous_action"

python benchmarks/studies/curves.py --out benchmarks/results/again_ant_pqn \
    --title "ant, again" --num-seeds 5 \
    --flags="--env-id ant --eval-episodes 16" \
    --curve "PQN=pqn_continuous_action --num-envs 256 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 2e-3 --gamma 0.97 --norm-reward --stddev-start 0.5 --eval-interval 12 --total-timesteps 1e6"

python benchmarks/studies/curves.py --out benchmarks/results/again_humanoid_ppo \
    --title "humanoid, again" --num-seeds 5 \
    --flags="--env-id humanoid --num-envs 128 --eval-episodes 16" \
    --curve "PPO=ppo_continuous_action --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 6 --total-timesteps 4e5"

python benchmarks/studies/curves.py --out benchmarks/results/again_pendulum_ppo \
    --title "Pendulum-v1, again" --num-seeds 10 \
    --flags="--env-id Pendulum-v1 --num-envs 64 --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 25 --total-timesteps 5e5 --seed 1000" \
    --curve "PPO=ppo_continuous_action"

python benchmarks/studies/curves.py --out benchmarks/results/again_humanoid_pqn \
    --title "humanoid, again" --num-seeds 5 \
    --flags="--env-id humanoid --eval-episodes 16" \
    --curve "PQN=pqn_continuous_action --num-envs 256 --num-minibatches 16 --actor-hidden-sizes 128 128 --critic-hidden-sizes 256 128 --learning-rate 2e-3 --gamma 0.97 --norm-reward --stddev-start 0.5 --eval-interval 12 --total-timesteps 4e5"
