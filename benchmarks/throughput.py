"""Throughput of scripts over the number of environments or seeds: a table, a picture, a JSON file.

    python benchmarks/throughput.py pqn_cartpole ppo_cartpole              # 1 to 2048 environments
    python benchmarks/throughput.py ppo_cartpole --num-envs 4 --num-seeds 1 64 1024
    python benchmarks/throughput.py pqn_minatar --num-envs 128 --flags="--env-id Asterix-MinAtar"

Takes any script of the repository. Every combination of numbers is a row, measured in a process of
its own, so that its peak memory is its own: one run with a greedy evaluation at its end gives the
return, then whole runs without evaluation are timed. Seeds share all devices, as in the scripts.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "pqn_cartpole": "#0072B2",
    "pqn_minatar": "#56B4E9",
    "pqn_atari": "#882255",
    "pqn_rnn_craftax": "#003F6B",
    "pqn_vdn_jaxmarl": "#CC79A7",
    "dqn_cartpole": "#E69F00",
    "ppo_cartpole": "#009E73",
    "ppo_continuous_action": "#66C2A5",
    "pqn_continuous_action": "#332288",
    "pql_isaac_style": "#AA3377",
}
# The columns of the table: title, width, and the cell of a row.
COLUMNS = [
    ("script", 15, lambda row: row["script"]),
    ("envs", 6, lambda row: f"{row['num_envs']:,}"),
    ("seeds", 6, lambda row: f"{row['num_seeds']:,}"),
    ("steps/s", 11, lambda row: f"{row['env_steps_per_second']:,.0f}"),
    ("gradient steps/s", 16, lambda row: f"{row['gradient_steps_per_second']:,.0f}"),
    ("run, s", 8, lambda row: f"{np.median(row['run_seconds']):.2f}"),
    ("compile, s", 10, lambda row: f"{row['compile_seconds']:.1f}"),
    ("memory, GiB", 11, lambda row: f"{row['peak_memory_gib']:.2f}"),
    ("return", 8, lambda row: f"{row['final_return'][0]:.1f}" if row["final_return"] else "-"),
]


def describe_run() -> dict:
    """The command as typed, processor, cores it may use, Python and the versions that matter."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    versions = {name: version(name) for name in ("jax", "flax", "optax", "gymnax", "numpy")}
    command = [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    machine = {"cpu": model, "cores": count_cores(), "python": platform.python_version()}
    return {"command": command} | machine | {"versions": versions}


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_devices(num_seeds: int, is_threaded: bool) -> int:
    """Number of devices for the seeds; a CPU is divided into several before JAX starts."""
    import jax  # only now, as it takes its number of threads from the environment when it starts

    cores = count_cores()
    on_cores = max(n for n in range(1, cores + 1) if num_seeds % n == 0)
    os.environ["NPROC"] = str(cores // on_cores if is_threaded else 1)
    with contextlib.suppress(RuntimeError):  # JAX has started: take the devices that it has
        jax.config.update("jax_num_cpu_devices", on_cores)
    return max(n for n in range(1, jax.local_device_count() + 1) if num_seeds % n == 0)


def measure(script, flags, num_envs, num_seeds, steps_per_env, repeats, evaluate) -> dict:
    """A row of the table. flags are further ones of the script."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    numbers = {"num-envs": num_envs, "num-seeds": num_seeds}
    numbers |= {"total-timesteps": num_envs * steps_per_env, "eval-interval": 0}
    config = module.parse_args([*flags, *(f"--{name}={n}" for name, n in numbers.items())])
    num_devices = start_devices(config.num_seeds, config.batch_size >= module.THREADED_BATCH)
    import jax
    from jax.sharding import Mesh, PartitionSpec

    def compile_run(config):
        train = module.make_train(config)

        def on_device(keys):
            on_cpu = jax.default_backend() == "cpu"  # where a batch of small matrices is slower
            of_seeds = jax.lax.map if on_cpu else lambda function, keys: jax.vmap(function)(keys)
            return of_seeds(lambda key: train(key)[1], keys)

        mesh = Mesh(np.array(jax.local_devices()[:num_devices]), ("seeds",))
        spec = PartitionSpec("seeds")
        specs = {"mesh": mesh, "in_specs": spec, "out_specs": spec, "check_vma": False}
        started = time.perf_counter()
        run = jax.jit(jax.shard_map(on_device, **specs)).lower(keys).compile()
        return run, time.perf_counter() - started

    keys = jax.vmap(jax.random.key)(np.arange(config.num_seeds))
    final = None
    if evaluate:
        last = dataclasses.replace(config, eval_interval=config.num_updates)
        returns = np.asarray(compile_run(last)[0](keys)["eval/episodic_return"])[:, -1]
        final = [float(returns.mean()), float(returns.std())]
    run, compile_seconds = compile_run(config)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        metrics = jax.block_until_ready(run(keys))
        seconds.append(time.perf_counter() - started)
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    median = float(np.median(seconds))
    env_steps = config.num_seeds * int(metrics["global_step"][0, -1])
    loss = next(values for name, values in metrics.items() if name.startswith("losses/"))
    learning = int((~np.isnan(loss)).sum())  # updates; NaN before learning starts
    return {
        "script": script,
        "num_envs": config.num_envs,
        "num_seeds": config.num_seeds,
        "env_steps": env_steps,
        "compile_seconds": compile_seconds,
        "run_seconds": seconds,
        "env_steps_per_second": env_steps / median,
        "env_steps_per_second_spread": [env_steps / max(seconds), env_steps / min(seconds)],
        "gradient_steps_per_second": learning * config.num_gradient_steps / median,
        "peak_memory_gib": peak / 2**30,
        "final_return": final,
        "device": f"{num_devices} x {jax.devices()[0].device_kind}",
    }


def measure_alone(*arguments) -> dict:
    """measure, in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure, *arguments).result()


def run_peer(label: str, command: str) -> dict | None:
    """What the last line of another implementation's command says, as JSON.

    Variables, as $PUREJAXQL, are expanded; without one of them the peer is left out, with a line.
    """
    missing = [name for name in re.findall(r"\$(\w+)", command) if not os.environ.get(name)]
    if missing:
        print(f"without {label}: {' and '.join(missing)} is not set", file=sys.stderr)
        return None
    expanded = shlex.split(os.path.expandvars(command))
    output = subprocess.run(expanded, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(output.stdout.splitlines()[-1])


def plot(path: Path, study: dict) -> None:
    """Steps per second, from slowest to fastest repeat, over what varies: environments or seeds."""
    rows = study["rows"]
    over = "num_seeds" if len({row["num_envs"] for row in rows}) == 1 else "num_envs"
    other = "num_envs" if over == "num_seeds" else "num_seeds"
    names = {"num_envs": "environments", "num_seeds": "seeds"}
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    lines = {}
    for row in rows:
        lines.setdefault((row["script"], row[other]), []).append(row)
    others = sorted({number for _, number in lines})
    for (script, number), own in lines.items():
        x, y = ([row[key] for row in own] for key in (over, "env_steps_per_second"))
        low, high = np.array([row["env_steps_per_second_spread"] for row in own]).T
        label = script if len(others) == 1 else f"{script}, {number} {names[other]}"
        style = ("-", "--", ":", "-.")[others.index(number) % 4]
        options = {"marker": "o", "capsize": 3, "linestyle": style, "label": label}
        axes.errorbar(x, y, yerr=[y - low, high - y], color=COLOURS.get(script), **options)
    if peer := study.get("peer"):
        label = f"{peer['label']}, one agent"
        axes.axhline(peer["steps_per_second"], color="#444444", linestyle="--", label=label)
    # Ticks at the numbers themselves; of two that would touch, the first.
    ticks = sorted({row[over] for row in rows})
    ticks = [n for i, n in enumerate(ticks) if i == 0 or n / ticks[i - 1] >= 4 or n == ticks[-1]]
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=12)
    axes.set_xlabel(names[over], fontsize=12)
    axes.set_ylabel("environment steps per second", fontsize=12)
    fixed = f"{others[0]:,} {names[other].removesuffix('s' * (others == [1]))}"
    axes.set_title(fixed if len(others) == 1 else "", fontsize=12)
    axes.legend(fontsize=11)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def main(
    scripts: tyro.conf.Positional[tuple[str, ...]],
    /,
    num_envs: tuple[int, ...] = (1, 32, 128, 512, 1024, 2048),
    num_seeds: tuple[int, ...] = (1,),
    steps_per_env: int = 3000,
    repeats: int = 3,
    evaluate: bool = True,
    flags: str = "",
    peer: str | None = None,
    out: Path = Path("runs/benchmarks/throughput"),
) -> None:
    """Measure every script at every number of environments and of seeds.

    Args:
        scripts: Names of scripts, without .py.
        num_envs: Numbers of environments of a seed.
        num_seeds: Numbers of seeds that run at once.
        steps_per_env: Steps of each environment in a run.
        repeats: Timed runs.
        evaluate: Give the greedy return at the end of a run; without it a row compiles only once.
        flags: Further flags of the scripts.
        peer: "label=command" of another implementation, one agent; the command's last line is JSON
            with steps_per_second.
        out: Where the JSON file and the picture go, without suffix.
    """
    rows, own_flags = [], shlex.split(flags)
    print(" ".join(f"{title:>{width}}" for title, width, _ in COLUMNS))
    for script, envs, seeds in itertools.product(scripts, num_envs, num_seeds):
        row = measure_alone(script, own_flags, envs, seeds, steps_per_env, repeats, evaluate)
        rows.append(row)
        print(" ".join(f"{cell(row):>{width}}" for _, width, cell in COLUMNS), flush=True)
    study = describe_run() | {"flags": flags, "steps_per_env": steps_per_env, "repeats": repeats}
    study["rows"] = rows
    label, _, command = (peer or "").partition("=")
    if peer and (result := run_peer(label, command)):
        study["peer"] = {"label": label, "steps_per_second": result["steps_per_second"]}
        print(f"{label}, one agent: {result['steps_per_second']:,.0f} steps/s")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(study, indent=1))
    plot(out.with_suffix(".png"), study)
    print(f"in {out}.json and .png")


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
