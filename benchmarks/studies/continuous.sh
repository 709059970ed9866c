#!/usr/bin/env bash
# PQL, its baselines and PPO on continuous control.
# Run it whole, or copy a command: each works from the root of the repository. See README.md here.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Seeds that no setting was chosen on.
python benchmarks/studies/curves.py --out benchmarks/results/pql_pendulum \
    --title Pendulum-v1 --line=-200 --num-seeds 16 \
    --flags="--env-id Pendulum-v1 --num-envs 128 --num-steps 32 --batch-size 512 --hidden-sizes 128 128 --learning-rate 1e-3 --reward-scale 0.1 --buffer-size 200000 --eval-interval 2 --total-timesteps 1e5 --seed 1000" \
    --curve "PQL=pql_isaac_style" \
    --curve "PQL-D=pql_isaac_style --algorithm pql_d --reward-scale 0.01" \
    --curve "DDPG(n)=pql_isaac_style --algorithm ddpg_n"

python benchmarks/studies/curves.py --out benchmarks/results/pql_ant \
    --title ant --num-seeds 5 --in-turns \
    --flags="--env-id ant --num-envs 128 --eval-episodes 16" \
    --curve "PQL=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 1.5e5" \
    --curve "PQL-D=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.3 --eval-interval 3 --total-timesteps 1.5e5 --algorithm pql_d" \
    --curve "DDPG(n)=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 1.5e5 --algorithm ddpg_n" \
    --curve "SAC(n)=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 1.5e5 --algorithm sac_n" \
    --curve "PPO=ppo_continuous_action --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 6 --total-timesteps 3e5"

# Which support and scale of rewards PQL-D needs on ant.
python benchmarks/studies/example.py --out benchmarks/results/pql_d_ant \
    "examples/sweep.py pql_isaac_style value_bound=2,5,10,20,50 reward_scale=0.01,0.03,0.1,0.3 --num-seeds 2 --metric eval/episodic_return --flags='--algorithm pql_d --env-id ant --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --eval-interval 100 --eval-episodes 16 --total-timesteps 1.5e5 --seed 300'"

python benchmarks/studies/curves.py --out benchmarks/results/pql_humanoid \
    --title humanoid --num-seeds 5 --in-turns \
    --flags="--env-id humanoid --num-envs 128 --eval-episodes 16" \
    --curve "PQL=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 2e5" \
    --curve "PQL-D=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 2e5 --algorithm pql_d --value-bound 20" \
    --curve "DDPG(n)=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 2e5 --algorithm ddpg_n" \
    --curve "SAC(n)=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 2e5 --algorithm sac_n" \
    --curve "PPO=ppo_continuous_action --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 6 --total-timesteps 4e5"

# PQL-D with its default support, which is half as wide as above.
python benchmarks/studies/curves.py --out benchmarks/results/pql_d_humanoid \
    --title humanoid --num-seeds 3 --in-turns \
    --flags="--env-id humanoid --num-envs 128 --eval-episodes 16" \
    --curve "PQL-D=pql_isaac_style --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --total-timesteps 2e5 --algorithm pql_d"

python benchmarks/studies/curves.py --out benchmarks/results/pql_exploration \
    --title "ant, exploration noise" --num-seeds 5 \
    --flags="--env-id ant --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --eval-episodes 16 --total-timesteps 1.5e5" \
    --curve "mixed=pql_isaac_style" \
    --curve "0.2=pql_isaac_style --stddev-min 0.2 --stddev-max 0.2" \
    --curve "0.4=pql_isaac_style --stddev-min 0.4 --stddev-max 0.4" \
    --curve "0.6=pql_isaac_style --stddev-min 0.6 --stddev-max 0.6" \
    --curve "0.8=pql_isaac_style --stddev-min 0.8 --stddev-max 0.8"

python benchmarks/studies/curves.py --out benchmarks/results/pql_beta_pv \
    --title "ant, policy : value updates" --num-seeds 5 \
    --flags="--env-id ant --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --eval-episodes 16 --total-timesteps 1.5e5" \
    --curve "1:1=pql_isaac_style --policy-updates 8" \
    --curve "1:2=pql_isaac_style" \
    --curve "1:4=pql_isaac_style --policy-updates 2"

python benchmarks/studies/curves.py --out benchmarks/results/pql_beta_av \
    --title "ant, steps : value updates" --num-seeds 5 --x steps seconds \
    --flags="--env-id ant --num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --eval-episodes 16 --total-timesteps 1.5e5" \
    --curve "1:4=pql_isaac_style --critic-updates 4 --policy-updates 2" \
    --curve "1:8=pql_isaac_style" \
    --curve "1:12=pql_isaac_style --critic-updates 12 --policy-updates 6"

python benchmarks/studies/curves.py --out benchmarks/results/pql_num_envs \
    --title ant --num-seeds 5 --in-turns --x steps seconds \
    --flags="--env-id ant --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 3 --eval-episodes 16 --total-timesteps 1.5e5" \
    --curve "64 environments=pql_isaac_style --num-envs 64 --num-steps 128 --eval-interval 2" \
    --curve "128 environments=pql_isaac_style --num-envs 128 --num-steps 64 --eval-interval 2" \
    --curve "512 environments=pql_isaac_style --num-envs 512 --num-steps 16 --eval-interval 2 --warmup-steps 8" \
    --curve "4096 environments=pql_isaac_style --num-envs 4096 --num-steps 2 --eval-interval 2 --warmup-steps 4"

# Stand-ins for the paper's six tasks of Isaac Gym, of which the last two need MuJoCo Playground.
python benchmarks/studies/curves.py --out benchmarks/results/pql_stand_ins \
    --title "stand-ins for Isaac Gym" --num-seeds 1 --x \
    --flags="--num-envs 128 --num-steps 64 --batch-size 256 --hidden-sizes 128 128 --buffer-size 500000 --reward-scale 0.1 --eval-interval 2 --eval-episodes 16 --total-timesteps 4e4" \
    --curve "ant=pql_isaac_style --env-id ant" \
    --curve "humanoid=pql_isaac_style --env-id humanoid" \
    --curve "walker2d (ANYmal)=pql_isaac_style --env-id walker2d" \
    --curve "pusher (Franka cube stacking)=pql_isaac_style --env-id pusher" \
    --curve "FingerSpin (Allegro hand)=pql_isaac_style --env-id FingerSpin" \
    --curve "FingerTurnHard (Shadow hand)=pql_isaac_style --env-id FingerTurnHard"

python benchmarks/studies/curves.py --out benchmarks/results/ppo_ant \
    --title ant --num-seeds 5 --x steps seconds \
    --flags="--env-id ant --num-envs 256 --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 12 --eval-episodes 16 --total-timesteps 1e6" \
    --curve "PPO=ppo_continuous_action" \
    --peer 'PPO of brax=$BRAX benchmarks/studies/peers/brax_ppo.py --env-id ant --num-seeds 5 --total-timesteps 1000000'

python benchmarks/studies/curves.py --out benchmarks/results/ppo_inverted_double_pendulum \
    --title inverted_double_pendulum --num-seeds 5 --x steps seconds \
    --flags="--env-id inverted_double_pendulum --num-envs 256 --num-steps 32 --num-minibatches 16 --gamma 0.97 --initial-stddev 0.5 --eval-interval 12 --eval-episodes 16 --total-timesteps 1e6" \
    --curve "PPO=ppo_continuous_action" \
    --peer 'PPO of brax=$BRAX benchmarks/studies/peers/brax_ppo.py --env-id inverted_double_pendulum --num-seeds 5 --total-timesteps 1000000'

python benchmarks/throughput.py pql_isaac_style --out benchmarks/results/pql_throughput \
    --num-envs 64 512 4096 --steps-per-env 160 \
    --flags="--env-id Pendulum-v1 --num-steps 32 --batch-size 512 --hidden-sizes 128 128 --buffer-size 200000 --eval-episodes 16"

python benchmarks/throughput.py pql_isaac_style --out benchmarks/results/pql_throughput_ddpg_n \
    --num-envs 64 512 4096 --steps-per-env 160 \
    --flags="--env-id Pendulum-v1 --num-steps 32 --batch-size 512 --hidden-sizes 128 128 --buffer-size 200000 --eval-episodes 16 --algorithm ddpg_n"
