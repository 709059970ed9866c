#!/usr/bin/env bash
# PQN on the five MinAtar games.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/minatar_asterix_1e6 \
    --title Asterix-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Asterix-MinAtar --total-timesteps 1e6 --eval-interval 12" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Asterix-MinAtar --num-seeds 3 --total-timesteps 1000000 --evaluate --set TEST_NUM_ENVS=32 TEST_INTERVAL=0.25'

python benchmarks/studies/curves.py --out benchmarks/results/minatar_breakout_1e6 \
    --title Breakout-MinAtar --num-seeds 5 \
    --curve "PQN=pqn_minatar --env-id Breakout-MinAtar --total-timesteps 1e6 --eval-interval 12 --eval-episodes 32" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Breakout-MinAtar --num-seeds 5 --total-timesteps 1000000 --evaluate --set TEST_NUM_ENVS=32 TEST_INTERVAL=0.05'

python benchmarks/studies/curves.py --out benchmarks/results/minatar_freeway_1e6 \
    --title Freeway-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Freeway-MinAtar --total-timesteps 1e6 --eval-interval 12" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Freeway-MinAtar --num-seeds 3 --total-timesteps 1000000 --evaluate --set TEST_NUM_ENVS=32 TEST_INTERVAL=0.25'

python benchmarks/studies/curves.py --out benchmarks/results/minatar_seaquest_1e6 \
    --title Seaquest-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Seaquest-MinAtar --total-timesteps 1e6 --eval-interval 12"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_spaceinvaders_1e6 \
    --title SpaceInvaders-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id SpaceInvaders-MinAtar --total-timesteps 1e6 --eval-interval 12"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_freeway_truncation \
    --title Freeway-MinAtar --num-seeds 3 \
    --flags="--env-id Freeway-MinAtar --total-timesteps 1e6 --eval-interval 12" \
    --curve "bootstrapped=pqn_minatar" \
    --curve "treated as terminal=pqn_minatar --no-bootstrap-on-truncation"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_breakout \
    --title Breakout-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Breakout-MinAtar --total-timesteps 1e7"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_asterix \
    --title Asterix-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Asterix-MinAtar --total-timesteps 1e7"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_freeway \
    --title Freeway-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Freeway-MinAtar --total-timesteps 1e7"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_seaquest \
    --title Seaquest-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id Seaquest-MinAtar --total-timesteps 1e7"

python benchmarks/studies/curves.py --out benchmarks/results/minatar_spaceinvaders \
    --title SpaceInvaders-MinAtar --num-seeds 3 \
    --curve "PQN=pqn_minatar --env-id SpaceInvaders-MinAtar --total-timesteps 1e7"
