"""Throughput of scripts over the number of environments; writes results/<name>.json and .png, prints a table.

    python benchmarks/throughput.py pqn_cartpole                                # 1 to 2048 environments
    python benchmarks/throughput.py pqn_cartpole ppo_cartpole --name both --num-envs 32 512 --repeats 5

Any script with Config and make_train will do. Each point is a process of its own, so that its peak memory is its own:
it runs once with a last evaluation, which tells the return and warms up, then times repeats without evaluation.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from machine import ROOT, describe_machine


def measure(
    script: str, flags: dict, num_envs: int, num_seeds: int, steps_per_env: int, repeats: int
) -> dict:
    """Run num_seeds seeds once with a last evaluation, then compile and time whole runs without."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    config = module.Config(
        **flags, num_envs=num_envs, total_timesteps=num_envs * steps_per_env, eval_interval=0
    )
    cores = os.cpu_count()
    os.environ["NPROC"] = str(cores if config.batch_size >= 4096 else 1)
    import jax  # only now: it takes its number of threads from the environment

    def over_seeds(train, keys):
        if num_seeds == 1:
            return jax.tree.map(lambda x: x[None], train(keys[0]))
        return jax.lax.map(train, keys) if jax.default_backend() == "cpu" else jax.vmap(train)(keys)

    def compile_run(config):
        train = module.make_train(config)
        started = time.perf_counter()
        run = jax.jit(lambda keys: over_seeds(train, keys)[1]).lower(keys).compile()
        return run, time.perf_counter() - started

    keys = jax.vmap(jax.random.key)(np.arange(num_seeds))
    evaluating, _ = compile_run(dataclasses.replace(config, eval_interval=config.num_updates))
    final = np.asarray(evaluating(keys)["eval/episodic_return"])[:, -1]
    run, compile_seconds = compile_run(config)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        metrics = jax.block_until_ready(run(keys))
        seconds.append(time.perf_counter() - started)
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    median = float(np.median(seconds))
    env_steps = num_seeds * int(metrics["global_step"][0, -1])
    loss = next(values for name, values in metrics.items() if name.startswith("losses/"))
    gradient_steps = (
        int((~np.isnan(loss)).sum()) * config.num_gradient_steps
    )  # NaN before learning starts
    return {
        "script": script,
        "num_envs": num_envs,
        "num_seeds": num_seeds,
        "env_steps": env_steps,
        "compile_seconds": compile_seconds,
        "run_seconds": seconds,
        "env_steps_per_second": env_steps / median,
        "env_steps_per_second_spread": [env_steps / max(seconds), env_steps / min(seconds)],
        "gradient_steps_per_second": gradient_steps / median,
        "peak_memory_gib": peak / 2**30,
        "final_return": [float(final.mean()), float(final.std())],
        "device": f"{jax.devices()[0].device_kind}",
    }


def measure_alone(*arguments) -> dict:
    """measure, in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure, *arguments).result()


def plot(path: Path, rows: list[dict]) -> None:
    """Steps per second over the number of environments, both logarithmic, with the spread over repeats."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="environments", ylabel="environment steps per second", xscale="log", yscale="log"
    )
    for script in dict.fromkeys(row["script"] for row in rows):
        own = [row for row in rows if row["script"] == script]
        x, y = (
            [row["num_envs"] for row in own],
            np.array([row["env_steps_per_second"] for row in own]),
        )
        low, high = np.array([row["env_steps_per_second_spread"] for row in own]).T
        axes.errorbar(x, y, yerr=[y - low, high - y], marker="o", capsize=3, label=script)
    ticks = sorted({row["num_envs"] for row in rows})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{rows[0]['num_seeds']} seed(s) on {rows[0]['device']}")
    figure.savefig(path, dpi=150)


def main(
    scripts: tyro.conf.Positional[tuple[str, ...]],
    /,
    name: str = "throughput",
    num_envs: tuple[int, ...] = (1, 32, 128, 512, 1024, 2048),
    num_seeds: int = 1,
    steps_per_env: int = 3000,
    repeats: int = 3,
    flags: str = "{}",
) -> None:
    """Measure every script at every number of environments.

    Args:
        scripts: Names of scripts, without .py.
        name: What the study is called in the names of its files.
        num_envs: Numbers of environments of a seed.
        num_seeds: Seeds that run at once.
        steps_per_env: Steps of each environment in a run.
        repeats: Timed runs.
        flags: Further fields of Config, as JSON.
    """
    rows = []
    print(
        f"{'script':>14} {'envs':>5} {'compile s':>9} {'run s':>7} {'env steps/s':>12} {'lowest':>10} {'highest':>10}",
        end="",
    )
    print(f" {'gradient/s':>10} {'GiB':>5} {'return':>14}")
    for script in scripts:
        for number in num_envs:
            row = measure_alone(
                script, json.loads(flags), number, num_seeds, steps_per_env, repeats
            )
            rows.append(row)
            low, high = row["env_steps_per_second_spread"]
            mean, std = row["final_return"]
            print(
                f"{script:>14} {number:>5} {row['compile_seconds']:9.1f} {np.median(row['run_seconds']):7.2f}",
                end="",
            )
            print(f" {row['env_steps_per_second']:12,.0f} {low:10,.0f} {high:10,.0f}", end="")
            print(
                f" {row['gradient_steps_per_second']:10,.0f} {row['peak_memory_gib']:5.2f} {mean:6.1f} ± {std:<5.1f}"
            )
    path = ROOT / "benchmarks" / "results" / name
    study = {"flags": json.loads(flags), "steps_per_env": steps_per_env, "repeats": repeats}
    path.with_suffix(".json").write_text(
        json.dumps(study | describe_machine() | {"rows": rows}, indent=2)
    )
    plot(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
