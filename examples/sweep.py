"""Sweeps two float hyperparameters of a script, with many seeds each, in one XLA program.

    python examples/sweep.py ppo_cartpole learning_rate=1e-4,3e-4,1e-3 gae_lambda=0,0.5,0.95

Every agent is a whole training run; all devices train agents at once. The best of many noisy means
looks better than it is, so the winner and the values of --flags are trained again on fresh seeds.
"""

import dataclasses
import functools
import importlib
import itertools
import os
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from jax.sharding import Mesh, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def start_devices(max_per_device: int) -> tuple[Mesh, int]:
    """All devices, on a CPU one per core, and how many agents each trains in one call."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("NPROC", "1")
    jax.config.update("jax_num_cpu_devices", cores)
    # On a CPU one agent at a time is faster than a vmap over several, and the bar moves more often.
    return Mesh(jax.devices(), ("agents",)), 1 if jax.default_backend() == "cpu" else max_per_device


def make_program(script, config, names: list[str], metric: str, mesh: Mesh):
    """Jitted training: values [agents, len(names)] and seeds [agents] to returns [agents]."""

    def returns(agent):
        values, seed = agent
        own = dataclasses.replace(config, **dict(zip(names, values, strict=True)))
        _, metrics = script.make_train(own)(jax.random.key(seed))
        return jnp.nanmean(metrics[metric][-max(config.num_updates // 10, 1) :])

    def on_device(values, seeds):
        on_cpu = jax.default_backend() == "cpu"
        over_agents = functools.partial(jax.lax.map, returns) if on_cpu else jax.vmap(returns)
        return over_agents((values, seeds))

    spec = PartitionSpec("agents")
    specs = {"mesh": mesh, "in_specs": (spec, spec), "out_specs": spec, "check_vma": False}
    return jax.jit(jax.shard_map(on_device, **specs))


def train_all(program, values: np.ndarray, seeds: np.ndarray, agents_per_call: int) -> np.ndarray:
    """Returns [agents] of agents with values [agents, ...] and seeds [agents], with a bar."""
    results, told_at = [], time.monotonic()
    with tqdm(total=len(seeds), unit=" agents", disable=None) as bar:
        for first in range(0, len(seeds), agents_per_call):
            # The last call is filled up with the first agents, so that all have one shape.
            index = np.arange(first, first + agents_per_call) % len(seeds)
            results.append(np.asarray(program(values[index], seeds[index])))
            bar.update(min(agents_per_call, len(seeds) - first))
            if bar.disable and time.monotonic() - told_at >= 30:  # no terminal: a line now and then
                told_at = time.monotonic()
                told = f"{len(seeds[: first + agents_per_call])} of {len(seeds)} agents"
                print(told, file=sys.stderr)
    return np.concatenate(results)[: len(seeds)]


def draw(means: np.ndarray, names: list[str], grid: list[list[float]], metric: str) -> Figure:
    """A heat map of the mean metric [values of the first field, values of the second]."""
    size = 2.5 + 0.8 * means.shape[1], 1.5 + 0.6 * means.shape[0]
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=names[1], ylabel=names[0])
    figure.colorbar(axes.imshow(means, aspect="auto", origin="lower"), label=metric)
    for set_ticks, values in ((axes.set_yticks, grid[0]), (axes.set_xticks, grid[1])):
        set_ticks(range(len(values)), [f"{value:g}" for value in values])
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), mean in np.ndenumerate(means):
        color = "white" if mean < middle else "black"
        axes.text(column, row, f"{mean:.3g}", ha="center", va="center", color=color)
    return figure


def mean_and_error(returns: np.ndarray) -> str:
    """The mean over seeds [num_seeds] and its standard error."""
    return f"{returns.mean():.4g} ± {returns.std(ddof=1) / len(returns) ** 0.5:.2g}"


def main(
    script: tyro.conf.Positional[str],
    grid: tyro.conf.Positional[tuple[str, str]],
    flags: str = "",
    num_seeds: int = 8,
    metric: str = "charts/episodic_return",
    max_per_device: int = 1024,
    out: Path = Path("runs/sweep"),
) -> None:
    """Write <out>.csv with every agent and <out>.png with a heat map, and print the ranking.

    Args:
        script: Name of a script, such as pqn_cartpole.
        grid: Two fields of its Config with the values to try, as learning_rate=1e-4,1e-3.
        flags: Flags of the script for all agents, such as "--total-timesteps 1e5".
        num_seeds: Seeds per setting, the same for all; at least 2.
        metric: Column whose mean over the last tenth of training ranks the settings. Where
            exploring costs return, as with PQL, take eval/episodic_return.
        max_per_device: At most this many agents at once on a GPU or TPU.
        out: Where the table and the picture go, without suffix.
    """
    try:
        module = importlib.import_module(script)
    except ModuleNotFoundError as error:
        sys.exit(f"{script} is no script: {error}")
    if hasattr(module, "Games"):
        sys.exit(f"{script} trains one seed per process: its emulators are outside JAX")
    mesh, agents_per_device = start_devices(max_per_device)
    config = module.parse_args(shlex.split(flags))
    names = [text.partition("=")[0].replace("-", "_") for text in grid]
    if num_seeds < 2 or names[0] == names[1]:
        sys.exit("it takes two fields and, for a standard error, two seeds or more")
    for name in names:
        if not isinstance(getattr(config, name, None), float):
            sys.exit(f"{name} is not a float field of {script}.Config: only those can be traced")
    try:
        values = [[float(value) for value in text.partition("=")[2].split(",")] for text in grid]
        settings = np.array(list(itertools.product(*values)), np.float32)
        for setting in settings.tolist():
            dataclasses.replace(config, **dict(zip(names, setting, strict=True)))
        columns = jax.eval_shape(module.make_train(config), jax.random.key(0))[1]
    except ValueError as error:
        sys.exit(str(error))
    if metric not in columns:
        sys.exit(f"--metric is {metric}; it takes one of {', '.join(columns)}")

    program = make_program(module, config, names, metric, mesh)
    agents_per_call = mesh.size * min(agents_per_device, -(-len(settings) * num_seeds // mesh.size))
    seeds = config.seed + np.arange(num_seeds)
    title = f"{script}, {config.env_id}: {len(settings)} settings, {num_seeds} seeds each"
    print(f"{title}, {agents_per_call} at once; compiling takes seconds to a minute")
    started = time.monotonic()
    pairs = np.repeat(settings, num_seeds, axis=0), np.tile(seeds, len(settings))
    returns = train_all(program, *pairs, agents_per_call)
    seconds = time.monotonic() - started
    table = pd.DataFrame(pairs[0], columns=names).assign(seed=pairs[1], episodic_return=returns)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(f"{out}.csv", index=False)

    returns = returns.reshape(len(settings), num_seeds)
    means = returns.mean(axis=1)
    figure = draw(means.reshape(*map(len, values)), names, values, metric)
    figure.savefig(f"{out}.png", dpi=150, facecolor="white")
    ranking = np.argsort(np.nan_to_num(-means, nan=np.inf))
    for rank, index in enumerate(ranking[:10]):
        setting = ", ".join(f"{n}={v:g}" for n, v in zip(names, settings[index], strict=True))
        print(f"{rank + 1:2}. {setting}: {mean_and_error(returns[index])}")
    steps = len(pairs[1]) * config.num_updates * config.steps_per_update
    print(
        f"{len(pairs[1])} agents in {seconds:.0f} s, {steps / seconds:,.0f} steps/s, compiling too"
    )

    default = np.array([getattr(config, name) for name in names], np.float32)
    fresh = np.stack([settings[ranking[0]], default]).repeat(num_seeds, axis=0)
    again = train_all(program, fresh, np.tile(seeds + num_seeds, 2), agents_per_call)
    best, unchanged = again.reshape(2, num_seeds)
    print(f"on fresh seeds: winner {mean_and_error(best)}, --flags {mean_and_error(unchanged)}")
    print(f"{out}.csv {out}.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
