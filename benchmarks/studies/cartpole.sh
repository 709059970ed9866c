#!/usr/bin/env bash
# PQN, DQN and PPO on CartPole, Acrobot and, PPO alone, MinAtar.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/pqn_truncation \
    --title CartPole-v1 --line 500 \
    --curve "bootstrapped=pqn_cartpole" \
    --curve "treated as terminal=pqn_cartpole --no-bootstrap-on-truncation" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --num-seeds 10 --evaluate'

python benchmarks/studies/curves.py --out benchmarks/results/pqn_norm \
    --title CartPole-v1 --line 500 \
    --curve "layer norm=pqn_cartpole" \
    --curve "batch norm=pqn_cartpole --norm batch_norm" \
    --curve "no norm=pqn_cartpole --norm none"

python benchmarks/studies/curves.py --out benchmarks/results/pqn_tutorial \
    --title CartPole-v1 --line 500 \
    --curve "PQN, 32 environments=pqn_cartpole --total-timesteps 96000 --eval-interval 10" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --num-seeds 10 --evaluate --total-timesteps 96000' \
    --peer 'Myriad=$MYRIAD benchmarks/studies/peers/myriad_pqn.py --curve --num-seeds 10'

python benchmarks/studies/curves.py --out benchmarks/results/pqn_acrobot \
    --title Acrobot-v1 --line=-100 \
    --curve "PQN=pqn_cartpole --env-id Acrobot-v1"

python benchmarks/studies/curves.py --out benchmarks/results/pqn_and_dqn \
    --title CartPole-v1 --line 500 --x steps_per_env \
    --curve "PQN, 32 environments=pqn_cartpole --total-timesteps 96000 --eval-interval 4" \
    --curve "DQN, 1 environment=dqn_cartpole --num-envs 1 --total-timesteps 50000 --learning-rate 1e-3 --batch-size 32 --hidden-sizes 64 64 --epsilon-decay 0.4 --target-interval 100 --learning-starts 100"

python benchmarks/studies/curves.py --out benchmarks/results/pqn_num_envs \
    --title CartPole-v1 --line 500 --x steps_per_env --num-seeds 3 \
    --curve "1 environment=pqn_cartpole --num-envs 1 --total-timesteps 3000 --eval-interval 4" \
    --curve "32 environments=pqn_cartpole --num-envs 32 --total-timesteps 96000 --eval-interval 4" \
    --curve "128 environments=pqn_cartpole --num-envs 128 --total-timesteps 384000 --eval-interval 4" \
    --curve "512 environments=pqn_cartpole --num-envs 512 --total-timesteps 1536000 --eval-interval 4" \
    --curve "1024 environments=pqn_cartpole --num-envs 1024 --total-timesteps 3072000 --eval-interval 4" \
    --curve "2048 environments=pqn_cartpole --num-envs 2048 --total-timesteps 6144000 --eval-interval 4"

python benchmarks/studies/curves.py --out benchmarks/results/algorithms \
    --title CartPole-v1 --line 500 --x steps seconds \
    --curve "PQN=pqn_cartpole" \
    --curve "DQN=dqn_cartpole" \
    --curve "PPO=ppo_cartpole"

python benchmarks/studies/curves.py --out benchmarks/results/dqn_double_q \
    --title CartPole-v1 --line 500 \
    --curve "DQN=dqn_cartpole" \
    --curve "double DQN=dqn_cartpole --double-q"

python benchmarks/studies/curves.py --out benchmarks/results/ppo \
    --title CartPole-v1 --line 500 --metric charts/episodic_return \
    --curve "PPO=ppo_cartpole --eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo --curve --num-seeds 10'

python benchmarks/studies/curves.py --out benchmarks/results/ppo_breakout \
    --title Breakout-MinAtar --metric charts/episodic_return \
    --curve "PPO=ppo_cartpole --env-id Breakout-MinAtar --num-envs 64 --num-minibatches 8 --learning-rate 5e-3 --activation relu --total-timesteps 1e7 --eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo --curve --num-seeds 10 --total-timesteps 10000000 --env-id Breakout-MinAtar --set LR=5e-3 NUM_ENVS=64 NUM_MINIBATCHES=8 ACTIVATION=relu'
