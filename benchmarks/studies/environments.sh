#!/usr/bin/env bash
# PQN, PPO and DQN on environments of other suites, by the adapters of examples/environments.
# Run it whole, or copy a command: each works from the root of the repository. It needs Navix, too:
# pip install "navix>=0.7.4,<0.8". The hyperparameters were chosen on seeds from 100 on.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/environments_snake \
    --title "Snake-v1 of Jumanji" --num-seeds 5 --metric charts/episodic_return \
    --curve "PQN=examples/environments/jumanji_env pqn_cartpole --env-id Snake-v1 --seed 10 --total-timesteps 3e5 --eval-interval 0 --num-steps 32 --num-minibatches 8 --hidden-size 128 --learning-rate 5e-4 --gamma 0.97 --td-lambda 0.65 --epsilon-finish 0.05 --epsilon-decay 0.5 --reward-scale 1" \
    --curve "PPO=examples/environments/jumanji_env ppo_cartpole --env-id Snake-v1 --seed 10 --total-timesteps 3e5 --eval-interval 0 --num-envs 16 --learning-rate 1e-3" \
    --curve "DQN=examples/environments/jumanji_env dqn_cartpole --env-id Snake-v1 --seed 10 --total-timesteps 3e5 --eval-interval 0 --learning-rate 5e-4"

python benchmarks/studies/curves.py --out benchmarks/results/environments_empty \
    --title "Navix-Empty-8x8-v0" --num-seeds 5 --metric charts/episodic_return \
    --curve "PQN=examples/environments/navix_env pqn_cartpole --env-id Navix-Empty-8x8-v0 --seed 10 --total-timesteps 3e5 --eval-interval 0 --num-steps 32 --num-minibatches 8 --hidden-size 128 --learning-rate 5e-4 --gamma 0.97 --td-lambda 0.65 --epsilon-finish 0.05 --epsilon-decay 0.5 --reward-scale 1" \
    --curve "PPO=examples/environments/navix_env ppo_cartpole --env-id Navix-Empty-8x8-v0 --seed 10 --total-timesteps 3e5 --eval-interval 0 --num-envs 16 --learning-rate 1e-3" \
    --curve "DQN=examples/environments/navix_env dqn_cartpole --env-id Navix-Empty-8x8-v0 --seed 10 --total-timesteps 3e5 --eval-interval 0 --learning-rate 5e-4"

python benchmarks/studies/curves.py --out benchmarks/results/environments_door_key \
    --title "Navix-DoorKey-5x5-v0" --num-seeds 5 --metric charts/episodic_return \
    --curve "PQN=examples/environments/navix_env pqn_cartpole --env-id Navix-DoorKey-5x5-v0 --seed 10 --total-timesteps 3e5 --eval-interval 0 --num-steps 32 --num-minibatches 8 --hidden-size 128 --learning-rate 5e-4 --gamma 0.97 --td-lambda 0.65 --epsilon-finish 0.05 --epsilon-decay 0.5 --reward-scale 1" \
    --curve "PPO=examples/environments/navix_env ppo_cartpole --env-id Navix-DoorKey-5x5-v0 --seed 10 --total-timesteps 3e5 --eval-interval 0 --num-envs 16 --learning-rate 1e-3" \
    --curve "DQN=examples/environments/navix_env dqn_cartpole --env-id Navix-DoorKey-5x5-v0 --seed 10 --total-timesteps 3e5 --eval-interval 0 --learning-rate 5e-4"
