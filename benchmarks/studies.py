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
    BRAX        <python>, of an environment with brax and an older jax, as its PPO needs
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
PUREJAXQL_MINATAR = (
    "benchmarks/peer_purejaxql.py --num-seeds 3 --evaluate --total-timesteps 1000000 --set TEST_NUM_ENVS=32 "
    "TEST_INTERVAL=0.25"
)
NUM_ENVS = (1, 32, 128, 512, 1024, 2048)
MEMORY = (
    "pqn_rnn_craftax --env-id MemoryChain-bsuite --env-params memory_length=100 --num-envs 32 --num-minibatches 16 "
    "--learning-rate 1e-3 --td-lambda 1 --epsilon-finish 0.01 --max-grad-norm 0.1 --hidden-size 128 --no-norm-input "
    "--forget-bias 5 --total-timesteps 2e5 --eval-interval 4"
)
SMALL_CRAFTAX = "--env-id Craftax-Classic-Symbolic-v1 --num-envs 64 --num-steps 32 --hidden-size 128 --reset-ratio 16 "
PURE_CRAFTAX = (
    "benchmarks/peer_purejaxql.py --env-id Craftax-Classic-Symbolic-v1 --total-timesteps 65536 "
    "--set NUM_ENVS=64 NUM_STEPS=32 HIDDEN_SIZE=128"
)
PENDULUM = (
    "pql_isaac_style --env-id Pendulum-v1 --num-envs 128 --num-steps 32 --batch-size 512 --hidden-sizes 128 128 "
    "--learning-rate 1e-3 --reward-scale 0.1 --buffer-size 200000 --eval-interval 2 --total-timesteps 1e5"
)
SHORT_PENDULUM = f"{PENDULUM} --total-timesteps 5e4 --eval-interval 1"
ANT = (
    "pql_isaac_style --env-id ant --num-envs 128 --num-steps 64 --batch-size 512 --hidden-sizes 256 128 "
    "--buffer-size 1000000 --reward-scale 0.1 --eval-interval 5 --eval-episodes 16 --total-timesteps 250000"
)

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
        + (
            f' --peer "PureJaxQL=$PUREJAXQL {PUREJAXQL_MINATAR} --env-id {game}-MinAtar"'
            if game in SAME_GAMES
            else ""
        )
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
    "craftax_memory": "curves.py --line 1 --title MemoryChain-bsuite "
    f'--curves "LSTM={MEMORY}" "without its memory={MEMORY} --no-memory"',
    "craftax_classic": "curves.py --num-seeds 2 --metric charts/episodic_return --title Craftax-Classic-Symbolic-v1 "
    f'--curves "PQN with LSTM=pqn_rnn_craftax {SMALL_CRAFTAX}--total-timesteps 1e6"',
    "craftax_achievements": "curves.py --num-seeds 1 --metric charts/episodic_return "
    f'--title Craftax-Classic-Symbolic-v1 --curves "PQN with LSTM=pqn_rnn_craftax {SMALL_CRAFTAX} '
    f'--total-timesteps 5e5" "random actions=pqn_rnn_craftax {SMALL_CRAFTAX}--total-timesteps 1e5 --epsilon-finish 1"',
    "craftax_shares": "shares.py pqn_rnn_craftax --rows "
    + " ".join(
        f"""'{label}={{"env_id": "Craftax-Classic-Symbolic-v1", "num_envs": 64, "num_steps": 32, "hidden_size": 128, """
        f""""reset_ratio": {ratio}}}'"""
        for label, ratio in (("a world for 16 environments", 16), ("a world for each", 1))
    ),
    "craftax_speed": f'speed.py pqn_rnn_craftax --repeats 2 --flags="{SMALL_CRAFTAX}--total-timesteps 65536" '
    f'--peer "PureJaxQL=$PUREJAXQL {PURE_CRAFTAX}"',
    "pql_pendulum": f'curves.py --line=-200 --title Pendulum-v1 --curves "PQL={PENDULUM}" '
    f'"PQL-D={PENDULUM} --algorithm pql_d --reward-scale 0.01" "DDPG(n)={PENDULUM} --algorithm ddpg_n"',
    "pql_exploration": f'curves.py --num-seeds 4 --line=-200 --title Pendulum-v1 --curves "mixed={SHORT_PENDULUM}" '
    + " ".join(
        f'"{s}={SHORT_PENDULUM} --stddev-min {s} --stddev-max {s}"' for s in (0.2, 0.4, 0.6, 0.8)
    ),
    "pql_beta_pv": f'curves.py --num-seeds 4 --line=-200 --title Pendulum-v1 --curves "1:1={SHORT_PENDULUM} '
    f'--policy-updates 8" "1:2={SHORT_PENDULUM}" "1:4={SHORT_PENDULUM} --policy-updates 2"',
    "pql_beta_av": f'curves.py --num-seeds 4 --line=-200 --title Pendulum-v1 --curves "1:4={SHORT_PENDULUM} '
    f'--critic-updates 4 --policy-updates 2" "1:8={SHORT_PENDULUM}" '
    f'"1:12={SHORT_PENDULUM} --critic-updates 12 --policy-updates 6"',
    "pql_num_envs": "curves.py --num-seeds 4 --line=-200 --x steps seconds --title Pendulum-v1 --curves "
    + " ".join(
        f'"{n} environments={PENDULUM} --num-envs {n} --num-steps {4096 // n} --warmup-steps {4096 // n}"'
        for n in (64, 128, 512, 1024)
    ),
    "pql_ant": f'curves.py --num-seeds 3 --x steps seconds --title ant --curves "PQL={ANT}" '
    f'"DDPG(n)={ANT} --algorithm ddpg_n" --peer "PPO of brax=$BRAX benchmarks/peer_brax_ppo.py --num-seeds 3 '
    '--total-timesteps 1000000"',
    "pql_shares": "shares.py pql_isaac_style --learner critic_updates policy_updates --rows "
    """'ant={"env_id": "ant", "num_envs": 128, "batch_size": 512, "hidden_sizes": [256, 128], """
    """"buffer_size": 1000000}'""",
    **{
        f"pql_throughput{suffix}": "throughput.py pql_isaac_style --num-envs 64 512 4096 --steps-per-env 160 --flags "
        """'{"env_id": "Pendulum-v1", "num_steps": 32, "batch_size": 512, "hidden_sizes": [128, 128], """
        f""""buffer_size": 200000, "eval_episodes": 16{algorithm}}}'"""
        for suffix, algorithm in (("", ""), ("_ddpg_n", ', "algorithm": "ddpg_n"'))
    },
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
        print(
            f"no such study: {', '.join(unknown)}; there are {', '.join(STUDIES)}", file=sys.stderr
        )
        return 2
    for name in names or STUDIES:
        tool, _, rest = STUDIES[name].partition(" ")
        if missing := [
            variable for variable in re.findall(r"\$(\w+)", rest) if variable not in os.environ
        ]:
            print(f"{name}: without its peer, as {' and '.join(missing)} is not set")
            rest = re.sub(r' ?--peer "[^"]*"', "", rest)
        command = [
            sys.executable,
            f"benchmarks/{tool}",
            *shlex.split(os.path.expandvars(rest)),
            "--name",
            name,
        ]
        print(f"python {shlex.join(command[1:])}", flush=True)
        if not dry_run:
            started = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
