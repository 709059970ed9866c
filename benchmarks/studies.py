"""Every study of this folder as a command; runs those that are named, or all of them.

    python benchmarks/studies.py                      # all
    python benchmarks/studies.py pqn_norm throughput  # these
    python benchmarks/studies.py --dry-run            # only print the commands

Other implementations run with the Python of their own environments, which these variables tell; a study whose variable
is not set runs without its peer.

    PUREJAXQL   env PYTHONPATH=<checkout of mttga/purejaxql> <python>
    PUREJAXRL   env PYTHONPATH=<checkout of luchris429/purejaxrl>/purejaxrl <python>
    MYRIAD      <python>, of an environment with myriad-jax
    CLEANRL     <python>, of an environment with torch, gymnasium, tyro and tensorboard
    CLEANRL_PPO <checkout of vwxyzjn/cleanrl>/cleanrl/ppo.py
"""

import os
import re
import shlex
import subprocess
import sys
import time

import tyro

from machine import ROOT

MYRIAD_DQN = (
    "dqn_cartpole --num-envs 1 --total-timesteps 50000 --learning-rate 1e-3 --batch-size 32 --hidden-sizes 64 64 "
    "--epsilon-decay 0.4 --target-interval 100 --learning-starts 100"
)
PUREJAXRL_MINATAR = (
    "--env-id Breakout-MinAtar --num-envs 64 --num-minibatches 8 --learning-rate 5e-3 --activation relu "
    "--total-timesteps 1e7 --eval-interval 0"
)
GAMES = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
SAME_GAMES = ("Asterix", "Breakout", "Freeway")  # in the gymnax that PureJaxQL takes and in ours
PUREJAXQL_MINATAR = "benchmarks/peer_purejaxql.py --num-seeds 3 --evaluate --total-timesteps 1000000"
NUM_ENVS = (1, 32, 128, 512, 1024, 2048)

STUDIES = {
    "pqn_truncation": 'curves.py --line 500 --title CartPole-v1 --curves "bootstrapped=pqn_cartpole" '
    '"taken for a termination=pqn_cartpole --no-bootstrap-on-truncation" '
    '--peer "PureJaxQL=$PUREJAXQL benchmarks/peer_purejaxql.py --num-seeds 10 --evaluate"',
    "pqn_norm": 'curves.py --line 500 --title CartPole-v1 --curves "layer norm=pqn_cartpole" '
    '"batch norm=pqn_cartpole --norm batch_norm" "none=pqn_cartpole --norm none"',
    "pqn_tutorial": "curves.py --line 500 --title CartPole-v1 --curves "
    '"PQN, 32 environments=pqn_cartpole --total-timesteps 96000 --eval-interval 10" '
    '--peer "PureJaxQL=$PUREJAXQL benchmarks/peer_purejaxql.py --num-seeds 10 --evaluate --total-timesteps 96000"',
    "pqn_acrobot": 'curves.py --line=-100 --title Acrobot-v1 --curves "PQN=pqn_cartpole --env-id Acrobot-v1"',
    "pqn_and_dqn": "curves.py --line 500 --title CartPole-v1 --x steps_per_env --curves "
    '"PQN, 32 environments=pqn_cartpole --total-timesteps 96000 --eval-interval 4" '
    f'"DQN, 1 environment={MYRIAD_DQN}"',
    "pqn_num_envs": "curves.py --line 500 --title CartPole-v1 --x steps_per_env --num-seeds 3 --curves "
    + " ".join(
        f'"{n} environments=pqn_cartpole --num-envs {n} --total-timesteps {3000 * n} --eval-interval 4"'
        for n in NUM_ENVS
    ),
    "algorithms": "curves.py --line 500 --title CartPole-v1 --x steps seconds "
    "--curves PQN=pqn_cartpole DQN=dqn_cartpole PPO=ppo_cartpole",
    "ppo_breakout": "curves.py --metric charts/episodic_return --title Breakout-MinAtar --num-seeds 3 "
    f'--curves "PPO=ppo_cartpole {PUREJAXRL_MINATAR}" '
    '--peer "PureJaxRL=$PUREJAXRL benchmarks/peer_purejaxrl.py ppo --curve --num-seeds 3 --total-timesteps 10000000 '
    '--env-id Breakout-MinAtar --set LR=5e-3 NUM_ENVS=64 NUM_MINIBATCHES=8 ACTIVATION=relu"',
    "dqn_double_q": "curves.py --line 500 --title CartPole-v1 --curves DQN=dqn_cartpole "
    '"double DQN=dqn_cartpole --double-q"',
    **{
        f"minatar_{game.lower()}": f"curves.py --num-seeds 3 --title {game}-MinAtar "
        f'--curves "PQN=pqn_minatar --env-id {game}-MinAtar --total-timesteps 1e7"'
        for game in GAMES
    },
    **{
        f"minatar_{game.lower()}_1e6": f"curves.py --num-seeds 3 --title {game}-MinAtar "
        f'--curves "PQN=pqn_minatar --env-id {game}-MinAtar --total-timesteps 1e6 --eval-interval 12"'
        + (f' --peer "PureJaxQL=$PUREJAXQL {PUREJAXQL_MINATAR} --env-id {game}-MinAtar"' if game in SAME_GAMES else "")
        for game in GAMES
    },
    "minatar_freeway_truncation": "curves.py --num-seeds 3 --title Freeway-MinAtar --curves "
    '"bootstrapped=pqn_minatar --env-id Freeway-MinAtar --total-timesteps 1e6 --eval-interval 12" '
    '"taken for a termination=pqn_minatar --env-id Freeway-MinAtar --total-timesteps 1e6 --eval-interval 12 '
    '--no-bootstrap-on-truncation"',
    "minatar_divided": "curves.py --num-seeds 3 --title Breakout-MinAtar --curves "
    '"planes of 0 and 1=pqn_minatar --total-timesteps 1e6 --eval-interval 12" '
    '--peer "planes of 0 and 1/255=python benchmarks/divided_planes.py --num-seeds 3 --total-timesteps 1e6 '
    '--eval-interval 12"',
    "throughput": "throughput.py pqn_cartpole ppo_cartpole",
    "ppo_seeds": "seeds.py ppo_cartpole "
    '--peer "CleanRL=$CLEANRL benchmarks/peer_cleanrl.py $CLEANRL_PPO --total-timesteps 100000"',
    "pqn_speed_1_seed": 'speed.py pqn_cartpole --repeats 5 --flags="--eval-interval 0" '
    '--peer "PureJaxQL=$PUREJAXQL benchmarks/peer_purejaxql.py"',
    "pqn_speed_8_seeds": 'speed.py pqn_cartpole --flags="--num-seeds 8 --total-timesteps 2e5 --eval-interval 0" '
    '--peer "PureJaxQL=$PUREJAXQL benchmarks/peer_purejaxql.py --num-seeds 8 --total-timesteps 200000"',
    "pqn_speed_1000_seeds": "speed.py pqn_cartpole --repeats 1 "
    '--flags="--num-seeds 1000 --total-timesteps 8192 --eval-interval 0"',
    **{
        f"pqn_speed_{n}_envs": "speed.py pqn_cartpole "
        f'--flags="--num-envs {n} --total-timesteps {n * steps} --eval-interval 0" '
        f'--peer "Myriad=$MYRIAD benchmarks/peer_myriad.py --num-envs {n} --steps-per-env {steps}"'
        for n, steps in ((32, 12_800), (128, 3200), (512, 3200))
    },
    "minatar_speed_1_seed": 'speed.py pqn_minatar --flags="--total-timesteps 3e5 --eval-interval 0" '
    '--peer "PureJaxQL=$PUREJAXQL benchmarks/peer_purejaxql.py --env-id Breakout-MinAtar --total-timesteps 300000"',
    "minatar_speed_4_seeds": 'speed.py pqn_minatar --flags="--num-seeds 4 --total-timesteps 1e5 --eval-interval 0" '
    '--peer "PureJaxQL=$PUREJAXQL benchmarks/peer_purejaxql.py --env-id Breakout-MinAtar --num-seeds 4 '
    '--total-timesteps 100000"',
    "ppo_speed_1_seed": 'speed.py ppo_cartpole --repeats 5 --flags="--eval-interval 0" '
    '--peer "PureJaxRL=$PUREJAXRL benchmarks/peer_purejaxrl.py ppo"',
    "ppo_speed_8_seeds": 'speed.py ppo_cartpole --flags="--num-seeds 8 --eval-interval 0" '
    '--peer "PureJaxRL=$PUREJAXRL benchmarks/peer_purejaxrl.py ppo --num-seeds 8"',
    "ppo_speed_cleanrl": 'speed.py ppo_cartpole --flags="--eval-interval 0" '
    '--peer "CleanRL=$CLEANRL benchmarks/peer_cleanrl.py $CLEANRL_PPO --total-timesteps 100000"',
    "dqn_speed_1_seed": 'speed.py dqn_cartpole --repeats 5 --flags="--eval-interval 0" '
    '--peer "PureJaxRL=$PUREJAXRL benchmarks/peer_purejaxrl.py dqn"',
    "dqn_speed_8_seeds": 'speed.py dqn_cartpole --flags="--num-seeds 8 --total-timesteps 2e5 --eval-interval 0" '
    '--peer "PureJaxRL=$PUREJAXRL benchmarks/peer_purejaxrl.py dqn --num-seeds 8 --total-timesteps 200000"',
}


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), /, dry_run: bool = False) -> int:
    """Run studies one after the other; each writes results/<name>.json.

    Args:
        names: Studies to run; all, if none is named.
        dry_run: Print the commands and run none.
    """
    if unknown := set(names) - set(STUDIES):
        print(f"no such study: {', '.join(unknown)}; there are {', '.join(STUDIES)}", file=sys.stderr)
        return 2
    for name in names or STUDIES:
        tool, _, rest = STUDIES[name].partition(" ")
        if missing := [variable for variable in re.findall(r"\$(\w+)", rest) if variable not in os.environ]:
            print(f"{name}: without its peer, as {' and '.join(missing)} is not set")
            rest = re.sub(r' ?--peer "[^"]*"', "", rest)
        command = [sys.executable, f"benchmarks/{tool}", *shlex.split(os.path.expandvars(rest)), "--name", name]
        print(f"python {shlex.join(command[1:])}", flush=True)
        if not dry_run:
            started = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
