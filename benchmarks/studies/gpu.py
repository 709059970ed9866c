"""The studies of one GPU, in one command: benchmarks/results/gpu/*.json.

    python benchmarks/studies/gpu.py                     # all of them
    python benchmarks/studies/gpu.py minatar pql_ant     # these
    python benchmarks/studies/gpu.py --tiny --out runs/benchmarks/gpu    # does it run?

Made for one GPU of the class of an H100 and eight minutes, peers not counted; no study begins after
--minutes. README.md here explains how PureJaxQL and PureJaxRL run beside the scripts.
"""

import shlex
import sys
import time
from pathlib import Path

import tyro

import curves
import speed
import throughput

TOOLS = {
    "benchmarks/throughput.py": throughput.main,
    "benchmarks/studies/curves.py": curves.main,
    "benchmarks/studies/speed.py": speed.main,
}
# Name, command, and what --tiny puts behind it.
STUDIES = [
    (
        "minatar",  # ten seeds of Breakout for ten million steps
        """benchmarks/studies/curves.py --title Breakout-MinAtar --x steps seconds --num-seeds 10
        --curve "PQN=pqn_minatar" --flags="--total-timesteps 1e7 --checkpoint-interval 600" """,
        """--num-seeds 2 --flags="--num-envs 4 --num-steps 8 --num-minibatches 2 --num-channels 2
        --hidden-size 8 --total-timesteps 64 --eval-interval 1 --eval-episodes 2" """,
    ),
    (
        "cartpole_seeds",
        """benchmarks/throughput.py pqn_cartpole --num-envs 32 --num-seeds 1 64 512 4096
        --steps-per-env 1920 --repeats 2 --no-evaluate""",
        """--num-envs 4 --num-seeds 1 2 --steps-per-env 128 --flags="--hidden-size 8" """,
    ),
    (
        "pql_ant",  # 4,096 environments are the defaults
        """benchmarks/studies/curves.py --title ant --x steps seconds --num-seeds 1
        --curve "PQL=pql_isaac_style" --flags="--total-timesteps 2e7 --checkpoint-interval 600" """,
        """--flags="--env-id Pendulum-v1 --num-envs 4 --num-steps 4 --batch-size 8 --buffer-size 200
        --hidden-sizes 8 --total-timesteps 160 --eval-episodes 2 --eval-interval 1" """,
    ),
    (
        "craftax",  # Craftax-Symbolic, 1,024 environments, LSTM of 512 units: the defaults
        """benchmarks/studies/speed.py pqn_rnn_craftax --repeats 1
        --flags="--total-timesteps 2621440 --checkpoint-interval 600"
        --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py
        --env-id Craftax-Symbolic-v1 --total-timesteps 2621440' """,
        """--flags="--env-id MemoryChain-bsuite --num-envs 4 --num-steps 8 --hidden-size 8
        --total-timesteps 64" """,
    ),
    (
        "envs",
        """benchmarks/throughput.py pqn_cartpole ppo_cartpole dqn_cartpole pqn_minatar
        --num-envs 2048 --num-seeds 1 8 --steps-per-env 256 --repeats 2 --no-evaluate""",
        """--num-envs 4 --num-seeds 1 --steps-per-env 2560""",
    ),
    (
        "pqn_speed",
        """benchmarks/studies/speed.py pqn_cartpole --repeats 1
        --flags="--num-seeds 64 --eval-interval 0"
        --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --num-seeds 64' """,
        """--flags="--num-envs 4 --num-steps 32 --total-timesteps 256 --eval-interval 0" """,
    ),
    (
        "ppo_speed",
        """benchmarks/studies/speed.py ppo_cartpole --repeats 1
        --flags="--num-seeds 64 --eval-interval 0"
        --peer 'PureJaxRL=$PUREJAXRL benchmarks/studies/peers/purejaxrl.py ppo --num-seeds 64' """,
        """--flags="--total-timesteps 1024 --eval-interval 0" """,
    ),
    (
        "minatar_speed",
        """benchmarks/studies/speed.py pqn_minatar --repeats 1
        --flags="--num-seeds 10 --total-timesteps 1e6 --eval-interval 0"
        --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py
        --env-id Breakout-MinAtar --num-seeds 10 --total-timesteps 1000000' """,
        """--flags="--num-envs 4 --num-steps 32 --total-timesteps 256 --eval-interval 0" """,
    ),
]


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    minutes: float = 8,
    tiny: bool = False,
    out: Path = Path("benchmarks/results/gpu"),
) -> None:
    """Run the studies one after the other; those that are named, or all of them.

    Args:
        names: Names of studies.
        minutes: After these no further study begins.
        tiny: Sizes that take seconds, to see that everything runs.
        out: Folder of the JSON files.
    """
    known = [name for name, *_ in STUDIES]
    if unknown := set(names) - set(known):
        sys.exit(f"no study {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    started = time.monotonic()
    for name, command, smaller in STUDIES:
        if names and name not in names:
            continue
        if time.monotonic() - started > 60 * minutes:
            print(f"{name}: not run, {minutes:g} minutes are over")
            continue
        tool, *flags = shlex.split(" ".join([*command.split(), *(smaller.split() if tiny else [])]))
        flags += ["--out", str(out / name)]
        began = time.monotonic()
        print(f"{name}: {shlex.join([tool, *flags])}", flush=True)
        typed, sys.argv = sys.argv, [str(throughput.ROOT / tool), *flags]  # what the file records
        try:
            tyro.cli(TOOLS[tool], args=flags)
        finally:
            sys.argv = typed
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
