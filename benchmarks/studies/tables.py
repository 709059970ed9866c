"""Writes the tables of README.md from the JSON files in results/, between the marks that name them.

python benchmarks/tables.py
"""

import json
import re

import numpy as np

from machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def load(*patterns: str) -> dict[str, dict]:
    """Studies by name, in the order of the patterns; raises FileNotFoundError for a pattern of none."""
    found = {pattern: sorted(RESULTS.glob(f"{pattern}.json")) for pattern in patterns}
    if missing := [pattern for pattern, paths in found.items() if not paths]:
        raise FileNotFoundError(
            f"no benchmarks/results/{missing[0]}.json: benchmarks/studies.py makes it"
        )
    return {path.stem: json.loads(path.read_text()) for paths in found.values() for path in paths}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def returns(*patterns: str) -> str:
    """Last greedy return of every curve of the studies."""
    rows = []
    for name, study in load(*patterns).items():
        for label, curve in study["curves"].items():
            final, steps = np.array(curve["final"]), int(curve["global_step"][-1])
            spread = f"{round(final.mean(), 1) + 0.0:.1f} ± {final.std():.1f}"  # no minus before a rounded zero
            rows.append(
                [f"`{name}`: {label}", f"{steps:,}", str(len(final)), spread, f"{final.min():.1f}"]
            )
    return markdown(["study", "environment steps", "seeds", "return", "lowest seed"], rows)


def seconds(*patterns: str) -> str:
    """Returns at equal wall-clock, compiling apart: when the first of the curves ends, linear between evaluations."""
    rows = []
    for name, study in load(*patterns).items():
        curves = study["curves"]
        end = min(curve["global_step"][-1] / curve["steps_per_second"] for curve in curves.values())
        for label, curve in curves.items():
            steps = end * curve["steps_per_second"]
            mean, std = (
                np.interp(steps, curve["global_step"], curve[key]) for key in ("mean", "std")
            )
            cells = [f"{curve['steps_per_second']:,.0f}", f"{curve['compile_seconds']:.0f}"]
            rows.append(
                [
                    f"`{name}`: {label}",
                    *cells,
                    f"{end:.0f}",
                    f"{steps:,.0f}",
                    f"{mean:,.0f} ± {std:,.0f}",
                ]
            )
    return markdown(
        ["study", "steps/s", "compile, s", "after, s", "environment steps", "return"], rows
    )


def achievements(*patterns: str) -> str:
    """Share of episodes that unlocked each achievement, in the last tenth of the runs."""
    (study,) = load(*patterns).values()
    shares = [curve["achievements"] for curve in study["curves"].values()]
    names = sorted(
        {name for share in shares for name in share},
        key=lambda name: (-shares[0].get(name, 0), name),
    )
    rows = [
        [name.split("/")[1].replace("_", " "), *(f"{share.get(name, 0):.1%}" for share in shares)]
        for name in names
    ]
    return markdown(["achievement", *study["curves"]], rows)


def speeds(*patterns: str) -> str:
    """Steps per second of scripts and peers, medians of runs in turns."""
    rows = []
    for name, study in load(*patterns).items():
        ours, peer = study["medians"][study["script"]], study["medians"].get(study["peer"])
        row = [f"`{name}`", f"{ours['steps_per_second']:,.0f}", f"{ours['compile_seconds']:.1f}"]
        if peer:
            compiling = f"{peer['compile_seconds']:.1f}" if peer["compile_seconds"] else "-"
            row += [study["peer"], f"{peer['steps_per_second']:,.0f}", compiling]
            row += [f"**{study['ratios']['steps_per_second']:.2f}**"]
        rows.append(row + ["-"] * (7 - len(row)))
    head = [
        "study",
        "steps/s",
        "compile, s",
        "peer",
        "its steps/s",
        "its compile, s",
        "ratio of steps/s",
    ]
    return markdown(head, rows)


def throughput(*patterns: str) -> str:
    """Steps per second over the number of environments."""
    rows = []
    for study in load(*patterns).values():
        for row in study["rows"]:
            cells = [f"{row['num_envs']:,}", f"{row['env_steps_per_second']:,.0f}"]
            cells += [
                f"{row['gradient_steps_per_second']:,.0f}",
                f"{np.median(row['run_seconds']):.2f}",
            ]
            cells += [
                f"{row['compile_seconds']:.1f}",
                f"{row['peak_memory_gib']:.2f}",
                f"{row['final_return'][0]:.0f}",
            ]
            algorithm = study["flags"].get("algorithm")
            rows.append([row["script"] + (f", {algorithm}" if algorithm else ""), *cells])
    head = [
        "script",
        "environments",
        "steps/s",
        "gradient steps/s",
        "run, s",
        "compile, s",
        "memory, GiB",
        "return",
    ]
    return markdown(head, rows)


def shares(*patterns: str) -> str:
    """Where the time of an update goes; the environments and the sampling are measured alone."""
    names = {"num_epochs": "learner", "critic_updates": "critic", "policy_updates": "policy"}
    rows = []
    for name, study in load(*patterns).items():
        for row in study["rows"]:
            parts = [
                f"{names.get(part, part)} {ms / row['update']:.0%}"
                for part, ms in row["parts"].items()
            ]
            cells = [f"{row['steps_per_second']:,.0f}", f"{row['update']:.0f}", ", ".join(parts)]
            rows.append([f"`{name}`: {row['label']}", *cells])
    return markdown(["study", "steps/s", "an update, ms", "of it"], rows)


def seeds(*patterns: str) -> str:
    """Time and memory over the number of seeds."""
    rows = []
    for study in load(*patterns).values():
        for row in study["rows"]:
            cells = [
                f"{row['num_seeds']:,}",
                f"{row['steps_per_second']:,.0f}",
                f"{row['run_seconds']:.1f}",
            ]
            cells += [
                f"{row['compile_seconds']:.1f}",
                f"{row['peak_memory_gib']:.2f}",
                f"{row['whole_seconds']:,.0f}",
            ]
            rows.append([study["script"], *cells])
        if peer := study["peer"]:
            cells = [
                "1",
                f"{peer['steps_per_second']:,.0f}",
                "-",
                "-",
                "-",
                f"{peer['whole_seconds']:,.0f}",
            ]
            rows.append([peer["label"], *cells])
    head = ["", "seeds", "steps/s", "run, s", "compile, s", "memory, GiB"]
    return markdown([*head, f"whole runs ({study['whole_timesteps']:,} steps), s"], rows)


def fill(text: str) -> str:
    """The text with every table between <!-- table: kind patterns --> and <!-- end --> made anew."""

    def table(match):
        kind, *patterns = match[1].split()
        return f"<!-- table: {match[1]} -->\n{globals()[kind](*patterns)}\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
