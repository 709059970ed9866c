"""Learning curves of scripts and their peers: a JSON file with every seed's returns, and a picture.

    python benchmarks/studies/curves.py --num-seeds 3 \\
        --curve "layer norm=pqn_cartpole" --curve "none=pqn_cartpole --norm none"

A curve is a script, or an adapter of examples/environments and a script, run as a person runs it;
its returns are read from the metrics.csv that it leaves. A peer is any command whose last line of
output is JSON with global_step [n] and returns [num_seeds, n], of the same metric, compile_seconds
and run_seconds.
"""

import csv
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import common
import pictures
import throughput

SECONDS = ("compile_seconds", "run_seconds", "steps_per_second")
MAX_POINTS = 200


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv."""
    with (run_dir / "metrics.csv").open() as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


def in_bins(steps, returns) -> tuple[list[int], list[list[float]]]:
    """Each seed's means over neighbouring updates, at most MAX_POINTS, where every seed has one."""
    steps, returns = np.asarray(steps), np.asarray(returns, float)
    known = ~np.isnan(returns).all(axis=0)
    steps, returns = steps[known], returns[:, known]
    bins = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    sums = np.stack([np.nansum(returns[:, own], axis=1) for own in bins], axis=1)
    counts = np.stack([(~np.isnan(returns[:, own])).sum(axis=1) for own in bins], axis=1)
    complete = (counts > 0).all(axis=0)
    means = sums[:, complete] / counts[:, complete]
    steps = np.array([steps[own[-1]] for own in bins])[complete]
    return steps.astype(int).tolist(), means.round(3).tolist()


def read_curve(run_dir: Path, metric: str) -> dict:
    """Steps and returns of a run and, of Craftax, what the episodes of its last tenth unlocked."""
    rows = read_metrics(run_dir)
    seeds = sorted({row["seed"] for row in rows})
    returns = [[row[metric] for row in rows if row["seed"] == seed] for seed in seeds]
    steps = [row["global_step"] for row in rows if row["seed"] == seeds[0]]
    steps, returns = in_bins(steps, returns)
    curve = {"global_step": steps, "returns": returns}
    last = [row for row in rows if row["global_step"] > 0.9 * rows[-1]["global_step"]]
    names = [name for name in rows[0] if name.startswith("achievements/")]
    shares = {name: float(np.nanmean([row[name] for row in last])) for name in names}
    shares = {name: round(share, 4) for name, share in shares.items() if share > 0}
    return curve | ({"achievements": shares} if shares else {})


def run_curve(command: str, num_seeds: int, metric: str) -> dict:
    """Run "script flags", all seeds at once, and read its curve."""
    script, *flags = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--num-seeds", str(num_seeds)]
        run_dir, metadata = common.run_script(script, flags, Path(folder))
        config = json.loads((run_dir / "config.json").read_text())
        curve = {"command": command, "num_envs": config["num_envs"]}
        curve |= read_curve(run_dir, metric)
    return curve | {name: metadata[name] for name in (*SECONDS, "device")}


def run_in_turns(commands: dict[str, str], num_seeds: int, metric: str) -> dict[str, dict]:
    """Run a seed of every curve, then the next of every curve: they meet the same other load."""
    rounds = [
        {label: run_curve(f"{own} --seed {seed}", 1, metric) for label, own in commands.items()}
        for seed in range(num_seeds)
    ]
    curves = {}
    for label, first in rounds[0].items():
        parts = [one_seed[label] for one_seed in rounds]
        returns = [part["returns"][0] for part in parts]
        curves[label] = first | {"command": commands[label], "returns": returns}
        for name in ("compile_seconds", "run_seconds"):
            curves[label][name] = sum(part[name] for part in parts)
        steps = sum(part["steps_per_second"] * part["run_seconds"] for part in parts)
        curves[label]["steps_per_second"] = steps / curves[label]["run_seconds"]
    return curves


def run_peer_curve(label: str, command: str) -> dict | None:
    """Run a peer and read its curve; None without its Python."""
    result = throughput.run_peer(label, command)
    if result is None:
        return None
    steps, returns = in_bins(result["global_step"], result["returns"])
    curve = {"command": command, "global_step": steps, "returns": returns}
    return curve | {name: result[name] for name in SECONDS if name in result}


Labelled = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def main(
    curve: Labelled,
    peer: Labelled = (),
    num_seeds: int = 10,
    in_turns: bool = False,
    metric: str = "eval/episodic_return",
    x: tuple[Literal["steps", "steps_per_env", "seconds"], ...] = ("steps",),
    line: float | None = None,
    title: str = "",
    flags: str = "",
    out: Path = common.OUT / "curves",
) -> None:
    """Run the curves one after the other and plot them.

    Args:
        curve: "label=script flags"; give it once for each curve.
        peer: "label=command" of another implementation; once for each. A peer with a variable, as
            $PUREJAXQL, that is not set is left out.
        num_seeds: Seeds of every curve; a peer's command says its own.
        in_turns: Run the curves seed by seed in turns, to compare their seconds.
        metric: Column of metrics.csv to compare.
        x: What to plot over; each after the first is a further picture, <out>_<x>.png.
        line: Return at which to draw a horizontal line.
        title: Of the picture.
        flags: Flags of every script, before its own.
        out: Where the JSON file and the pictures go, without suffix.
    """
    commands = {}
    for label, _, command in (text.partition("=") for text in curve):
        script, *own = command.split(maxsplit=1)
        commands[label] = " ".join(filter(None, [script, flags, *own]))
    if in_turns:
        curves = run_in_turns(commands, num_seeds, metric)
    else:
        curves = {label: run_curve(own, num_seeds, metric) for label, own in commands.items()}
    for label, _, command in (text.partition("=") for text in peer):
        curves[label] = run_peer_curve(label, command)
    curves = {label: own for label, own in curves.items() if own}
    for label, own in curves.items():
        final = [returns[-1] for returns in own["returns"]]
        mean, low, high = np.mean(final), min(final), max(final)
        print(f"{label}: {mean:.1f} at the end, seeds {low:.1f} to {high:.1f}")
    study = {"metric": metric, "title": title, "line": line, "x": x, "curves": curves}
    common.write(out, study)
    pictures.draw(out)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
