#!/usr/bin/env bash
# PQN with value decomposition on JaxMARL, at sizes for two CPU cores.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Seeds that no setting was chosen on.
python benchmarks/studies/curves.py --out benchmarks/results/vdn_smax_3m \
    --title "SMAX 3m" --metric eval/win_rate --line 0.9 --num-seeds 5 \
    --flags="--env-id smax_3m @SMAX@ --total-timesteps 3e6 --eval-interval 73 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "VDN, limit as terminal=pqn_vdn_jaxmarl --no-bootstrap-on-truncation" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none" \
    --curve "independent, limit as terminal=pqn_vdn_jaxmarl --mixer none --no-bootstrap-on-truncation"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_smax_2s3z \
    --title "SMAX 2s3z" --metric eval/win_rate --num-seeds 5 \
    --flags="--env-id smax_2s3z @SMAX@ --total-timesteps 3e6 --eval-interval 73 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_cramped_room \
    --title "Overcooked, cramped room" --line 200 --num-seeds 5 \
    --flags="--env-id overcooked_cramped_room @OVER@ --total-timesteps 1.5e6 --eval-interval 73 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "VDN, limit as terminal=pqn_vdn_jaxmarl --no-bootstrap-on-truncation" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none" \
    --curve "independent, limit as terminal=pqn_vdn_jaxmarl --mixer none --no-bootstrap-on-truncation"

python benchmarks/studies/curves.py --out benchmarks/results/vdn_asymm_advantages \
    --title "Overcooked, asymmetric advantages" --num-seeds 5 \
    --flags="--env-id overcooked_asymm_advantages @OVER@ --total-timesteps 1.5e6 --eval-interval 73 --seed 1000" \
    --curve "VDN=pqn_vdn_jaxmarl" \
    --curve "independent=pqn_vdn_jaxmarl --mixer none"
