#!/usr/bin/env bash
# PQN with an LSTM on Craftax-Classic.
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
