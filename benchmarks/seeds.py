"""Time and memory over the number of seeds trained at once; writes results/<name>.json and .png, prints a table.

    python benchmarks/seeds.py ppo_cartpole --name ppo_seeds --num-seeds 1 8 64 512 2048

Each point is a run as a person starts it. On a CPU, whole runs of thousands of seeds take hours, so that by default a
run is short; the time of whole ones is what the steps per second of these promise.
"""

import dataclasses
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from machine import ROOT, describe_machine, run_script


def plot(path: Path, rows: list[dict], title: str, peer: dict | None) -> None:
    """Seconds of whole runs over the number of seeds, both logarithmic."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="seeds", ylabel="seconds", title=title, xscale="log", yscale="log"
    )
    x = [row["num_seeds"] for row in rows]
    axes.plot(x, [row["whole_seconds"] for row in rows], marker="o", label="all seeds")
    axes.plot(
        x, [row["whole_seconds"] / row["num_seeds"] for row in rows], marker="o", label="a seed"
    )
    if peer:
        axes.axhline(
            peer["whole_seconds"],
            color="grey",
            linestyle=":",
            label=f"one agent of {peer['label']}",
        )
    axes.set_xticks(x, labels=[str(number) for number in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    script: tyro.conf.Positional[str],
    /,
    name: str,
    num_seeds: tuple[int, ...] = (1, 8, 64, 512, 2048),
    total_timesteps: int = 10_240,
    flags: str = "--eval-interval 0",
    peer: str | None = None,
) -> None:
    """Train every number of seeds at once.

    Args:
        script: Name of the script, without .py.
        name: What the study is called in the names of its files.
        num_seeds: Numbers of seeds.
        total_timesteps: Environment steps of a seed in the runs that are timed.
        flags: Further flags of the script.
        peer: "label=command" of another implementation, which trains one agent; its last line is JSON with
            steps_per_second.
    """
    sys.path.insert(0, str(ROOT))
    fields = {
        field.name: field.default
        for field in dataclasses.fields(importlib.import_module(script).Config)
    }
    whole = fields["total_timesteps"]
    rows, reference = [], None
    print(
        f"{'seeds':>6} {'compile s':>9} {'run s':>8} {'env steps/s':>12} {'GiB':>6} {f'{whole:,} steps':>14}"
    )
    for number in num_seeds:
        arguments = [
            "--num-seeds",
            str(number),
            "--total-timesteps",
            str(total_timesteps),
            *shlex.split(flags),
        ]
        with tempfile.TemporaryDirectory() as folder:
            _, run = run_script(script, arguments, Path(folder))
        keys = ("compile_seconds", "run_seconds", "steps_per_second", "peak_memory_gib", "device")
        row = {"num_seeds": number} | {key: run[key] for key in keys}
        row["whole_seconds"] = number * whole / row["steps_per_second"]
        rows.append(row)
        print(f"{number:>6} {row['compile_seconds']:9.1f} {row['run_seconds']:8.1f} ", end="")
        print(
            f"{row['steps_per_second']:12,.0f} {row['peak_memory_gib']:6.2f} {row['whole_seconds']:12,.0f} s"
        )
    if peer:
        label, _, command = peer.partition("=")
        output = subprocess.run(
            shlex.split(command), stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        speed = json.loads(output.splitlines()[-1])["steps_per_second"]
        reference = {"label": label, "steps_per_second": speed, "whole_seconds": whole / speed}
        print(
            f"{label}, one agent: {speed:,.0f} steps/s, {whole / speed:,.0f} s for {whole:,} steps"
        )
    path = ROOT / "benchmarks" / "results" / name
    study = {
        "script": script,
        "flags": flags,
        "total_timesteps": total_timesteps,
        "whole_timesteps": whole,
    }
    study |= describe_machine() | {"rows": rows, "peer": reference}
    path.with_suffix(".json").write_text(json.dumps(study, indent=2))
    title = f"{script}, {whole:,} steps a seed, from runs of {total_timesteps:,}, {rows[0]['device'].split(' x ')[1]}"
    plot(path.with_suffix(".png"), rows, title, reference)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
