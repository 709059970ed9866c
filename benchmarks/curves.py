"""Learning curves of scripts and flags, in one plot and one JSON file: benchmarks/results/<name>.json and .png.

    python benchmarks/curves.py --name pqn_norm --curves "layer norm=pqn_cartpole" "none=pqn_cartpole --norm none"

Every curve is a script run as a person runs it; what it learned is read from the metrics.csv that it leaves. A peer is
any command whose last line of output is JSON with global_step [n] and returns [num_seeds, n], of the same metric.
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

from machine import ROOT, describe_machine, run_script

LABELS = {
    "steps": "environment steps of a seed",
    "steps_per_env": "steps of each environment",
    "seconds": "seconds of one seed run alone, compiling apart",
}


def read_returns(run_dir: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and returns [num_seeds, n] of the updates in which every seed has the metric."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    seeds = sorted({int(row["seed"]) for row in rows})
    returns = np.array(
        [[float(row[metric]) for row in rows if int(row["seed"]) == seed] for seed in seeds]
    )
    steps = np.array([int(row["global_step"]) for row in rows if int(row["seed"]) == seeds[0]])
    known = ~np.isnan(returns).any(axis=0)
    return steps[known], returns[:, known]


def read_achievements(run_dir: Path) -> dict[str, float]:
    """Share of episodes that unlocked each achievement, mean over the last tenth of a Craftax run, where any did."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if float(row["global_step"]) > 0.9 * float(rows[-1]["global_step"])]
    names = [name for name in rows[0] if name.startswith("achievements/")]
    shares = {name: float(np.nanmean([float(row[name]) for row in rows])) for name in names}
    return {
        name: round(share, 4)
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
        if share > 0
    }


def run_curve(command: str, num_seeds: int, metric: str, x: str) -> dict:
    """Run "script flags" and read its curve; for x in seconds, a seed is run alone, too, without evaluation."""
    script, *flags = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        run_dir, _ = run_script(script, ["--num-seeds", str(num_seeds), *flags], Path(folder))
        steps, returns = read_returns(run_dir, metric)
        num_envs = json.loads((run_dir / "config.json").read_text())["num_envs"]
        achievements = read_achievements(run_dir)
    curve = {
        "command": command,
        "global_step": steps.tolist(),
        "num_envs": num_envs,
        "returns": returns.tolist(),
    }
    curve |= {"achievements": achievements} if achievements else {}
    if x == "seconds":
        with tempfile.TemporaryDirectory() as folder:
            _, alone = run_script(script, [*flags, "--eval-interval", "0"], Path(folder))
        curve |= {key: alone[key] for key in ("steps_per_second", "compile_seconds")}
    return curve


def run_peer(command: str) -> dict:
    """Run a peer and read its curve, with its speed where it tells one."""
    output = subprocess.run(
        shlex.split(command), stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    result = json.loads(output.splitlines()[-1])
    names = ("global_step", "returns", "steps_per_second", "compile_seconds")
    return {name: result[name] for name in names if name in result}


def plot(
    path: Path, curves: dict[str, dict], metric: str, x: str, title: str, line: float | None
) -> None:
    """Mean over seeds and its standard deviation, over environment steps, steps of each environment, or seconds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel=LABELS[x],
        ylabel="greedy return" if metric.startswith("eval") else metric,
        title=title,
    )
    for label, curve in curves.items():
        mean, std = np.array(curve["mean"]), np.array(curve["std"])
        scale = {
            "steps": 1,
            "steps_per_env": curve.get("num_envs"),
            "seconds": curve.get("steps_per_second"),
        }[x]
        label += f" (compiling {curve['compile_seconds']:.1f} s)" if x == "seconds" else ""
        axes.plot(np.array(curve["global_step"]) / scale, mean, label=label)
        axes.fill_between(np.array(curve["global_step"]) / scale, mean - std, mean + std, alpha=0.2)
    if line is not None:
        axes.axhline(line, color="grey", linewidth=1, linestyle=":")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    name: str,
    curves: tuple[str, ...],
    num_seeds: int = 10,
    metric: str = "eval/episodic_return",
    x: tuple[Literal["steps", "steps_per_env", "seconds"], ...] = ("steps",),
    peer: str | None = None,
    line: float | None = None,
    title: str = "",
) -> None:
    """Run the curves one after the other and plot them.

    Args:
        name: What the study is called in the names of its files.
        curves: Each is "label=script flags".
        num_seeds: Seeds of every curve.
        metric: Column of metrics.csv to compare.
        x: What to plot over; a further picture for each after the first, <name>_<x>.png.
        peer: "label=command" of another implementation to put beside them.
        line: Return at which to draw a horizontal line.
        title: Of the plot.
    """
    longest = "seconds" if "seconds" in x else x[0]
    results = {}
    for label, _, command in (curve.partition("=") for curve in curves):
        results[label] = run_curve(command, num_seeds, metric, longest)
    if peer:
        label, _, command = peer.partition("=")
        results[label] = run_peer(command)
    for label, curve in results.items():
        returns = np.array(curve.pop("returns"))
        curve |= {
            "mean": returns.mean(0).round(3).tolist(),
            "std": returns.std(0).round(3).tolist(),
        }
        curve["final"] = returns[:, -1].round(3).tolist()
        print(
            f"{label}: {returns[:, -1].mean():.1f} ± {returns[:, -1].std():.1f} (lowest {returns[:, -1].min():.1f})"
        )
    path = ROOT / "benchmarks" / "results" / name
    result = {"metric": metric, "num_seeds": num_seeds, **describe_machine(), "curves": results}
    path.with_suffix(".json").write_text(json.dumps(result))
    for i, over in enumerate(x):
        own_path = path.with_name(f"{name}_{over}" if i else name).with_suffix(".png")
        plot(
            own_path,
            results,
            metric,
            over,
            f"{title or name}, {num_seeds} seed{'s' * (num_seeds > 1)}",
            line,
        )


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
