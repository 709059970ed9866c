#!/usr/bin/env bash
# Speed of the scripts, alone and beside their peers.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python benchmarks/throughput.py pqn_cartpole ppo_cartpole --out benchmarks/results/throughput

python benchmarks/throughput.py ppo_cartpole --out benchmarks/results/ppo_seeds \
    --num-envs 4 --num-seeds 1 8 64 512 2048 --steps-per-env 2560 --no-evaluate \
    --peer 'CleanRL=$CLEANRL benchmarks/studies/peers/cleanrl.py $CLEANRL_PPO --total-timesteps 100000'

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_1_seed --repeats 5 \
    --flags="--eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py'

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_8_seeds \
    --flags="--num-seeds 8 --total-timesteps 2e5 --eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --num-seeds 8 --total-timesteps 200000'

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_1000_seeds --repeats 1 \
    --flags="--num-seeds 1000 --total-timesteps 8192 --eval-interval 0"

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_32_envs \
    --flags="--num-envs 32 --total-timesteps 409600 --eval-interval 0" \
    --peer 'Myriad=$MYRIAD benchmarks/studies/peers/myriad_pqn.py --num-envs 32 --steps-per-env 12800'

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_128_envs \
    --flags="--num-envs 128 --total-timesteps 409600 --eval-interval 0" \
    --peer 'Myriad=$MYRIAD benchmarks/studies/peers/myriad_pqn.py --num-envs 128 --steps-per-env 3200'

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_512_envs \
    --flags="--num-envs 512 --total-timesteps 1638400 --eval-interval 0" \
    --peer 'Myriad=$MYRIAD benchmarks/studies/peers/myriad_pqn.py --num-envs 512 --steps-per-env 3200'

python benchmarks/studies/speed.py pqn_minatar --out benchmarks/results/minatar_speed_1_seed \
    --flags="--total-timesteps 3e5 --eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Breakout-MinAtar --total-timesteps 300000'

python benchmarks/studies/speed.py pqn_minatar --out benchmarks/results/minatar_speed_4_seeds \
    --flags="--num-seeds 4 --total-timesteps 1e5 --eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Breakout-MinAtar --num-seeds 4 --total-timesteps 100000'

python benchmarks/studies/speed.py ppo_cartpole --out benchmarks/results/ppo_speed_1_seed --repeats 5 \
    --flags="--eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo'

python benchmarks/studies/speed.py ppo_cartpole --out benchmarks/results/ppo_speed_8_seeds \
    --flags="--num-seeds 8 --eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo --num-seeds 8'

python benchmarks/studies/speed.py ppo_cartpole --out benchmarks/results/ppo_speed_cleanrl \
    --flags="--eval-interval 0" \
    --peer 'CleanRL=$CLEANRL benchmarks/studies/peers/cleanrl.py $CLEANRL_PPO --total-timesteps 100000'

python benchmarks/studies/speed.py dqn_cartpole --out benchmarks/results/dqn_speed_1_seed --repeats 5 \
    --flags="--eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py dqn'

python benchmarks/studies/speed.py dqn_cartpole --out benchmarks/results/dqn_speed_8_seeds \
    --flags="--num-seeds 8 --total-timesteps 2e5 --eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py dqn --num-seeds 8 --total-timesteps 200000'

# The same later, on another machine.
python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_1_seed_epyc --repeats 3 \
    --flags="--eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py'

python benchmarks/studies/speed.py pqn_minatar --out benchmarks/results/minatar_speed_1_seed_epyc --repeats 2 \
    --flags="--total-timesteps 2e5 --eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --env-id Breakout-MinAtar --total-timesteps 200000'

python benchmarks/studies/speed.py ppo_cartpole --out benchmarks/results/ppo_speed_1_seed_epyc --repeats 3 \
    --flags="--eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo'

python benchmarks/studies/speed.py dqn_cartpole --out benchmarks/results/dqn_speed_1_seed_epyc --repeats 3 \
    --flags="--eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py dqn'

python benchmarks/studies/speed.py pqn_cartpole --out benchmarks/results/pqn_speed_8_seeds_epyc --repeats 2 \
    --flags="--num-seeds 8 --total-timesteps 2e5 --eval-interval 0" \
    --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --num-seeds 8 --total-timesteps 200000'

python benchmarks/studies/speed.py ppo_cartpole --out benchmarks/results/ppo_speed_8_seeds_epyc --repeats 2 \
    --flags="--num-seeds 8 --eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo --num-seeds 8'

python benchmarks/studies/speed.py dqn_cartpole --out benchmarks/results/dqn_speed_8_seeds_epyc --repeats 2 \
    --flags="--num-seeds 8 --total-timesteps 2e5 --eval-interval 0" \
    --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py dqn --num-seeds 8 --total-timesteps 200000'
