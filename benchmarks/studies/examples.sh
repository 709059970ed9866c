#!/usr/bin/env bash
# The programs of examples/.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/studies/example.py --out benchmarks/results/example_sweep \
    "examples/sweep.py ppo_cartpole learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2 gae_lambda=0,0.5,0.8,0.95,1 --num-seeds 8 --flags='--total-timesteps 1e5 --eval-interval 0'"

# Some of the same agents as processes, each compiling anew.
python benchmarks/studies/example.py --out benchmarks/results/example_sweep_processes \
    "benchmarks/studies/peers/processes.py ppo_cartpole learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2 gae_lambda=0,0.5,0.8,0.95,1 --num-seeds 8 --flags='--total-timesteps 1e5 --eval-interval 0'"

python benchmarks/studies/example.py --out benchmarks/results/example_baird examples/baird.py

python benchmarks/studies/example.py --out benchmarks/results/example_evolve_value_loss \
    "examples/evolve_value_loss.py --generations 60"
