#!/usr/bin/env bash
# PQN on Atari, at sizes for two CPU cores.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/curves.py --out benchmarks/results/atari_road_runner \
    --title "Road Runner" --num-seeds 1 --metric charts/episodic_return \
    --flags="--env-id road_runner --num-envs 16 --num-minibatches 16 --total-timesteps 4e5 --eval-interval 78" \
    --curve "seed 0=pqn_atari" \
    --curve "seed 1=pqn_atari --seed 1"

# The same runs, and their greedy evaluations.
python benchmarks/studies/curves.py --out benchmarks/results/atari_road_runner_greedy \
    --title "Road Runner" --num-seeds 1 \
    --flags="--env-id road_runner --num-envs 16 --num-minibatches 16 --total-timesteps 4e5 --eval-interval 78" \
    --curve "seed 0=pqn_atari" \
    --curve "seed 1=pqn_atari --seed 1"

# The reference with an envpool of today; its convolutions are slow inside a scan on a CPU.
python benchmarks/studies/speed.py pqn_atari --out benchmarks/results/atari_speed --repeats 2 \
    --flags="--num-envs 8 --num-minibatches 4 --total-timesteps 4096 --eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL_ATARI benchmarks/studies/peers/purejaxql_atari.py --total-timesteps 1024 --set NUM_ENVS=8 NUM_MINIBATCHES=4'

# The emulators alone, with random actions, in a jitted scan; $ENVPOOL has both.
${ENVPOOL:-python} benchmarks/studies/example.py --out benchmarks/results/atari_emulators \
    "benchmarks/studies/peers/atari_emulators.py --num-envs 8 32 128"
