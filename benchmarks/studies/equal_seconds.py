"""Scripts on a user's own gymnax environment, each seed for the same seconds of one core.

    taskset -c 0 python benchmarks/studies/equal_seconds.py craftax_in_gymnax --seconds 60 \\
        --curve "PQN=pqn_cartpole --env-id Craftax-Classic"

The module of examples/ registers the environment. A curve is a script and its flags; of its
--total-timesteps only schedules depend. Seconds are processor time of this process, so that other
load does not count, without compiling. Curves take turns, seed by seed.
"""

import dataclasses
import functools
import importlib
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

import common
import pictures

sys.path[:0] = [str(common.ROOT), str(common.ROOT / "examples")]
STEPS_PER_CALL = 8192  # between two looks at the clock


def make_program(command: str):
    """Compiled init(key) and chunk(state, floats), floats, and what the file keeps of a curve."""
    script, *flags = shlex.split(command)
    module = importlib.import_module(script)
    config = module.parse_args(flags)
    train = module.make_train(config)
    num_updates = max(1, STEPS_PER_CALL // config.steps_per_update)
    # Float hyperparameters are arguments: another learning rate is the same compiled program.
    names = [name for name, kind in config.__annotations__.items() if kind is float]
    floats = {name: np.float32(getattr(config, name)) for name in names}

    def chunk(state, floats):
        own = dataclasses.replace(config, **floats)
        return module.make_train(own)(state=state, num_updates=num_updates)

    started = time.process_time()
    shapes = jax.eval_shape(train.init, jax.random.key(0))
    init = jax.jit(train.init).lower(jax.random.key(0)).compile()
    chunk = jax.jit(chunk, donate_argnums=0).lower(shapes, floats=floats).compile()
    replay = jax.tree.leaves(getattr(shapes, "replay", ()))
    curve = {"command": command, "num_envs": config.num_envs}
    curve["replay_bytes"] = sum(x.size * x.dtype.itemsize for x in replay)
    curve["compile_seconds"] = time.process_time() - started
    return init, functools.partial(chunk, floats=floats), curve


def run_seed(init, chunk, seed: int, seconds: float, points: int) -> tuple[list, list]:
    """Steps at the end of each part of the seconds, and the mean return of its updates."""
    state = jax.block_until_ready(init(jax.random.key(seed)))
    started, steps, returns = time.process_time(), [0] * points, [[] for _ in range(points)]
    while (spent := time.process_time() - started) < seconds:
        state, metrics = jax.block_until_ready(chunk(state))
        part = min(int(spent / seconds * points), points - 1)
        returns[part] += np.asarray(metrics["charts/episodic_return"]).tolist()
        steps[part] = int(metrics["global_step"][-1])
    return steps, [float(np.nanmean(own)) for own in returns]


Labelled = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def main(
    module: tyro.conf.Positional[str],
    curve: Labelled,
    num_seeds: int = 5,
    first_seed: int = 1000,
    seconds: float = 120,
    points: int = 20,
    title: str = "",
    flags: str = "",
    out: Path = common.OUT / "equal_seconds",
) -> None:
    """Train every curve, and plot its returns over seconds and over steps.

    Args:
        module: Of examples/; importing it registers the environment.
        curve: "label=script flags"; give it once for each curve.
        num_seeds: Seeds of every curve.
        first_seed: The first of them.
        seconds: Processor seconds of each seed.
        points: Parts of the seconds; returns are means over one.
        title: Of the picture.
        flags: Flags of every script, before its own.
        out: Where the JSON file and the pictures go, without suffix.
    """
    importlib.import_module(module)
    commands = {}
    for label, _, command in (text.partition("=") for text in curve):
        script, *own = command.split(maxsplit=1)
        commands[label] = " ".join(filter(None, [script, flags, *own]))
    programs = {label: make_program(command) for label, command in commands.items()}
    curves = {label: own | {"returns": []} for label, (*_, own) in programs.items()}
    steps = {label: [] for label in curves}
    for seed in range(first_seed, first_seed + num_seeds):
        for label, (init, chunk, _) in programs.items():
            own_steps, returns = run_seed(init, chunk, seed, seconds, points)
            steps[label].append(own_steps)
            curves[label]["returns"].append(returns)
            print(f"{label}, seed {seed}: {returns[-1]:.2f} after {own_steps[-1]:,} steps")
    for label, own in curves.items():
        own["global_step"] = np.mean(steps[label], axis=0).astype(int).tolist()
        own["seconds"] = np.linspace(0, seconds, points + 1)[1:].tolist()
        own["steps_per_second"] = own["global_step"][-1] / seconds
    study = {"metric": "charts/episodic_return", "title": title, "line": None}
    common.write(out, study | {"x": ("seconds of a seed", "steps"), "curves": curves})
    pictures.draw(out)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
