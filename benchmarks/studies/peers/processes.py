"""The agents of examples/sweep.py as processes, one after the other: the other way to sweep.

    python benchmarks/studies/peers/processes.py ppo_cartpole learning_rate=1e-4,1e-3 gae_lambda=0,1

Runs num_agents of them, evenly spread over the grid, each as its command line would be typed.
"""

import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[3]


def main(
    script: tyro.conf.Positional[str],
    grid: tyro.conf.Positional[tuple[str, str]],
    flags: str = "",
    num_seeds: int = 8,
    num_agents: int = 10,
    out: Path | None = None,
) -> None:
    """Print the seconds of each agent and what all would take.

    Args:
        script: Name of a script, such as ppo_cartpole.
        grid: Two fields of its Config with their values, as learning_rate=1e-4,1e-3.
        flags: Flags of the script for all agents.
        num_seeds: Seeds per setting.
        num_agents: How many of the agents to run.
        out: Ignored; example.py passes it.
    """
    names = [f"--{text.partition('=')[0].replace('_', '-')}" for text in grid]
    values = [text.partition("=")[2].split(",") for text in grid]
    agents = list(itertools.product(*values, range(num_seeds)))
    seconds = []
    with tempfile.TemporaryDirectory() as runs_dir:
        for first, second, seed in agents[:: len(agents) // num_agents][:num_agents]:
            own = [names[0], first, names[1], second, "--seed", str(seed), "--runs-dir", runs_dir]
            command = [sys.executable, ROOT / f"{script}.py", *shlex.split(flags), *own]
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - started)
            print(f"{' '.join(own[:6])}: {seconds[-1]:.1f} s", flush=True)
    mean = sum(seconds) / len(seconds)
    print(f"{mean:.1f} s an agent; all {len(agents)} would take {mean * len(agents):,.0f} s")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
