#!/usr/bin/env bash
# PQN with an LSTM on a task that needs memory.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Seeds that no setting was chosen on.
python benchmarks/studies/curves.py --out benchmarks/results/memory \
    --title "MemoryChain-bsuite, 100 steps" --line 1 --num-seeds 16 \
    --flags="--env-id MemoryChain-bsuite --env-params memory_length=100 --num-envs 32 --num-minibatches 16 --learning-rate 1e-3 --td-lambda 1 --epsilon-finish 0.01 --max-grad-norm 0.1 --hidden-size 128 --forget-bias 5 --total-timesteps 2e5 --eval-interval 4 --seed 3000" \
    --curve "PQN with LSTM=pqn_rnn_craftax" \
    --curve "no memory=pqn_rnn_craftax --no-memory" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id MemoryChain-bsuite --num-seeds 16 --total-timesteps 100000 --evaluate --set TEST_NUM_STEPS=101'
