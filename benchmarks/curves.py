"""Learning curves of one script under several sets of flags, in one plot and one JSON file.

    python benchmarks/curves.py pqn_cartpole --name norms --variants "layer norm=" "none=--norm none"

Every variant is the script run as a person runs it; what it learned is read from the metrics.csv that it leaves. A peer
is any command whose last line of output is JSON with global_step [n] and eval_returns [num_seeds, n].
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from machine import describe_machine, run_script

RESULTS = Path(__file__).parent / "results"


def read_returns(run_dir: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and returns [num_seeds, n] of the updates in which every seed has the metric."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    seeds = sorted({int(row["seed"]) for row in rows})
    returns = np.array([[float(row[metric]) for row in rows if int(row["seed"]) == seed] for seed in seeds])
    steps = np.array([int(row["global_step"]) for row in rows if int(row["seed"]) == seeds[0]])
    known = ~np.isnan(returns).any(axis=0)
    return steps[known], returns[:, known]


def plot(path: Path, curves: dict[str, dict], title: str, line: float | None) -> None:
    """Mean over seeds and its standard deviation, over environment steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps of a seed", ylabel="greedy return", title=title)
    for label, curve in curves.items():
        mean, std = np.array(curve["mean"]), np.array(curve["std"])
        axes.plot(curve["global_step"], mean, label=label)
        axes.fill_between(curve["global_step"], mean - std, mean + std, alpha=0.2)
    if line is not None:
        axes.axhline(line, color="grey", linewidth=1, linestyle=":")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    script: tyro.conf.Positional[str],
    /,
    name: str,
    variants: tuple[str, ...],
    num_seeds: int = 10,
    flags: str = "",
    metric: str = "eval/episodic_return",
    peer: str | None = None,
    line: float | None = None,
) -> None:
    """Run the variants one after the other; write results/<script>_<name>.json and .png.

    Args:
        script: Name of the script, without .py.
        name: What the study is called in the names of its files.
        variants: Each is "label=flags".
        num_seeds: Seeds of every variant.
        flags: Flags that all variants share.
        metric: Column of metrics.csv to compare.
        peer: "label=command" of another implementation to put beside them.
        line: Return at which to draw a horizontal line.
    """
    curves = {}
    for variant in variants:
        label, _, own_flags = variant.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            arguments = shlex.split(f"--num-seeds {num_seeds} {flags} {own_flags}")
            run_dir, _ = run_script(script, arguments, Path(folder))
            steps, returns = read_returns(run_dir, metric)
        curves[label] = {"flags": own_flags, "global_step": steps.tolist(), "returns": returns.tolist()}
    if peer:
        label, _, command = peer.partition("=")
        output = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True).stdout
        result = json.loads(output.splitlines()[-1])
        curves[label] = {"global_step": result["global_step"], "returns": result["eval_returns"]}
    for label, curve in curves.items():
        returns = np.array(curve.pop("returns"))
        curve |= {"mean": returns.mean(0).round(3).tolist(), "std": returns.std(0).round(3).tolist()}
        curve["final"] = returns[:, -1].round(3).tolist()
        print(f"{label}: {returns[:, -1].mean():.1f} ± {returns[:, -1].std():.1f} (lowest {returns[:, -1].min():.1f})")
    result = {"script": script, "flags": flags, "metric": metric, "num_seeds": num_seeds, **describe_machine()}
    path = RESULTS / f"{script}_{name}"
    path.with_suffix(".json").write_text(json.dumps(result | {"curves": curves}))
    plot(path.with_suffix(".png"), curves, f"{script}, {num_seeds} seeds", line)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
