"""Makes benchmarks/RESULTS.md and all pictures from RESULTS.template.md and the JSON files.

    python benchmarks/studies/tables.py

In the template, <!-- study NAMES --> stands for the table, pictures, commands and devices of some
studies; <!-- seconds NAME -->, <!-- speeds_of_curves NAME --> and <!-- achievements NAME --> for
further tables of one.
"""

import functools
import itertools
import re
import shlex
from pathlib import Path

import numpy as np

import common
import pictures
import throughput

TEMPLATE = Path(__file__).with_name("RESULTS.template.md")
RESULTS_MD = common.ROOT / "benchmarks" / "RESULTS.md"
NOT_RUN = "*Not run yet; its command is in [`studies/`](studies).*"


def find(names: str) -> dict[str, dict]:
    """The studies of some names that have been run, in this order."""
    paths = {name: common.RESULTS / f"{name}.json" for name in names.split()}
    return {name: pictures.load(path) for name, path in paths.items() if path.exists()}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float, decimals: int = 1) -> str:
    """With no minus before a rounded zero."""
    return f"{round(float(x), decimals) + 0.0:,.{decimals}f}"


def returns(studies: dict[str, dict]) -> str:
    """Last return of every curve."""
    rows = []
    for name, study in studies.items():
        for label, curve in study["curves"].items():
            final, interval = pictures.final_returns(curve), "-"
            form = functools.partial(number, decimals=3 if "rate" in study["metric"] else 1)
            if len(final) >= 10:
                low, high = pictures.bootstrap_interval(final)
                interval = f"{form(pictures.interquartile_mean(final))} "
                interval += f"({form(low)} to {form(high)})"
            cells = [f"{int(curve['global_step'][-1]):,}", str(len(final)), form(final.mean())]
            cells += [interval, form(final.min()), form(final.max())]
            rows.append([f"`{name}`: {label}", *cells])
    head = ["study: curve", "environment steps", "seeds", "mean", "IQM (95% interval)"]
    return markdown([*head, "lowest", "highest"], rows)


def speeds(studies: dict[str, dict]) -> str:
    """Steps per second of scripts and peers."""
    rows = []
    for name, study in studies.items():
        ours, peer = study["medians"][study["script"]], study["medians"].get(study["peer"])
        row = [f"`{name}`", f"{ours['steps_per_second']:,.0f}", f"{ours['compile_seconds']:.1f}"]
        if peer:
            compiling = f"{peer['compile_seconds']:.1f}" if peer["compile_seconds"] else "-"
            row += [study["peer"], f"{peer['steps_per_second']:,.0f}", compiling]
            row += [f"**{study['ratios']['steps_per_second']:.2f}**"]
        rows.append(row + ["-"] * (7 - len(row)))
    head = ["study", "steps/s", "compile, s", "peer", "its steps/s", "its compile, s"]
    return markdown([*head, "ratio of steps/s"], rows)


def throughputs(studies: dict[str, dict]) -> str:
    """The tables that throughput.py prints."""
    columns = [(title, cell) for title, _, cell in throughput.COLUMNS]
    rows = []
    for name, study in studies.items():
        rows += [[f"`{name}`", *(cell(row) for _, cell in columns)] for row in study["rows"]]
        if peer := study.get("peer"):
            cells = [peer["label"], "-", "1", f"{peer['steps_per_second']:,.0f}"]
            rows.append([f"`{name}`", *cells, *["-"] * (len(columns) - len(cells))])
    return markdown(["study", *(title for title, _ in columns)], rows)


def printed(studies: dict[str, dict]) -> str:
    """What a program of examples/ printed."""
    texts = [
        f"{study['printed'].strip()}\n({study['seconds']:.0f} s)" for study in studies.values()
    ]
    return "```text\n" + "\n\n".join(texts) + "\n```"


def seconds(name: str) -> str:
    """Returns after equal seconds, when the first of the curves ends; linear between points."""
    studies = find(name)
    if not studies:
        return NOT_RUN
    curves, rows = studies[name]["curves"], []
    metric = studies[name]["metric"]
    whole = all("run_seconds" in curve for curve in curves.values())
    times = {
        label: pictures.x_values(curve, "seconds" if whole else "seconds of a seed")
        for label, curve in curves.items()
    }
    end = min(own[-1] for own in times.values())
    for label, curve in curves.items():
        line, *_ = pictures.summary(curve)
        steps, reached = (np.interp(end, times[label], y) for y in (curve["global_step"], line))
        cells = [f"{curve['steps_per_second']:,.0f}", f"{curve['compile_seconds']:.0f}"]
        rows.append([label, *cells, f"{end:.0f}", f"{steps:,.0f}"])
        rows[-1].append(number(reached, 3 if "rate" in metric else 0))
    head = ["curve", "steps/s", "compile, s", "after, s", "environment steps"]
    return markdown([*head, "win rate" if "rate" in metric else "return"], rows)


def speeds_of_curves(name: str) -> str:
    """Steps per second and returns of curves of different tasks, which do not compare."""
    studies = find(name)
    if not studies:
        return NOT_RUN
    rows = []
    for label, curve in studies[name]["curves"].items():
        line, *_ = pictures.summary(curve)
        cells = [f"{curve['steps_per_second']:,.0f}", f"{curve['compile_seconds']:.0f}"]
        cells += [f"{curve['global_step'][-1]:,}", number(line[0]), number(line[-1])]
        rows.append([label, *cells])
    head = ["curve", "steps/s", "compile, s", "environment steps", "first return", "last return"]
    return "\n\n".join([markdown(head, rows), devices(studies), commands(studies)])


def achievements(name: str) -> str:
    """Share of episodes that unlocked each achievement."""
    studies = find(name)
    if not studies:
        return NOT_RUN
    curves = studies[name]["curves"]
    shares = [curve["achievements"] for curve in curves.values()]
    names = {name for share in shares for name in share}
    rows = [
        [name.split("/")[1].replace("_", " "), *(f"{share.get(name, 0):.1%}" for share in shares)]
        for name in sorted(names, key=lambda name: (-shares[0].get(name, 0), name))
    ]
    return markdown(["achievement", *curves], rows)


def images(names) -> str:
    """The pictures of studies, two in a row."""
    cells = []
    for name, study in names.items():
        suffixes = [f"_{over}" if i else "" for i, over in enumerate(study.get("x", ["steps"]))]
        files = [f"{name}{suffix}.png" for suffix in suffixes]
        cells += [f"![{name}](results/{x})" for x in files if (common.RESULTS / x).exists()]
    if len(cells) <= 1:
        return "".join(cells)
    rows = itertools.zip_longest(cells[::2], cells[1::2], fillvalue="")
    return "\n".join(["| | |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def shell(argv: list[str]) -> str:
    """A command as it is typed, a line for each flag."""
    lines = [["python"]]
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value and shlex.quote(value) != value:
            value = f"'{value}'" if "$" in value else f'"{value}"'
        lines += [[]] if word.startswith("--") else []
        lines[-1].append(flag + equals + value)
    return " \\\n    ".join(" ".join(line) for line in lines)


def commands(studies: dict[str, dict]) -> str:
    lines = "\n\n".join(shell(study["command"]) for study in studies.values())
    plural = "s" * (len(studies) > 1)
    return f"<details><summary>Command{plural}</summary>\n\n```bash\n{lines}\n```\n\n</details>"


def device(study: dict) -> str:
    """On what a study ran."""
    parts = [study, *study.get("rows", []), *study.get("curves", {}).values()]
    devices = [part["device"] for part in parts if "device" in part]
    if devices and not devices[0].lower().endswith("cpu"):
        return f"{devices[0]}, jax {study['versions']['jax']}"
    cores = f"{study['cores']} core{'s' * (study['cores'] > 1)}"
    return f"{cores} of {study['cpu']}, jax {study['versions']['jax']}"


def devices(studies: dict[str, dict]) -> str:
    """On what the studies ran, those on the same device together."""
    names = {}
    for name, study in studies.items():
        names.setdefault(device(study), []).append(f"`{name}`")
    if len(names) == 1:
        return f"Measured on {next(iter(names))}."
    return f"Measured on {'; on '.join(f'{own}: ' + ', '.join(names[own]) for own in names)}."


def study(names: str) -> str:
    """Table, pictures, commands and devices of studies of one kind."""
    studies = find(names)
    if not studies:
        return NOT_RUN
    missing = [f"`{name}`" for name in names.split() if name not in studies]
    first = next(iter(studies.values()))
    makers = {"curves": returns, "rows": throughputs, "timings": speeds, "printed": printed}
    kind = next(kind for kind in makers if kind in first)
    make_table = makers[kind]
    pictures_of = images(studies) if kind != "timings" else ""
    parts = [make_table(studies), pictures_of, devices(studies), commands(studies)]
    if missing:
        parts.append(f"*Not run yet: {', '.join(missing)}.*")
    return "\n\n".join(part for part in parts if part)


def wall_clock(_: str) -> str:
    """The picture over seconds, once its studies have run."""
    exists = pictures.wall_clock_pairs() is not None
    return "![Return over seconds](results/wall_clock.png)" if exists else NOT_RUN


def launches(name: str) -> str:
    """What XLA launches in an update of scripts and peers, counted without a GPU."""
    studies = find(name)
    if not studies:
        return NOT_RUN
    rows = []
    for group, programs in studies[name]["counts"].items():
        for title, by_seeds in programs.items():
            for seeds, counts in by_seeds.items():
                update = counts["update"]
                loops = [loop for loop in update["loops"] if loop["trips"]]
                steps = [f"{loop['launches']:,}" for loop in (loops[0], loops[-1])]
                cells = [f"{update[key]:,}" for key in ("launches", "outside", "waits")]
                memory = f"{counts['memory_mib']:,.0f}"
                rows.append([f"`{title}`", group, seeds, cells[0], *steps, *cells[1:], memory])
    head = ["program", "", "seeds", "launches", "first loop, a step", "last loop, a step"]
    versions = f"Compiled for an H100 by jax {studies[name]['versions']['jax']}; nothing was run."
    table = markdown([*head, "outside of graphs", "waits", "MiB"], rows)
    return "\n\n".join([table, versions, commands(studies)])


def fill(template: str) -> str:
    """The template with every mark replaced by what it stands for."""
    makers = study, seconds, speeds_of_curves, achievements, wall_clock, launches
    kinds = {make.__name__: make for make in makers}
    pattern = rf"<!-- ({'|'.join(kinds)})\b *(.*?) -->"
    return re.sub(pattern, lambda match: kinds[match[1]](match[2]), template)


if __name__ == "__main__":
    pictures.main()
    RESULTS_MD.write_text(fill(TEMPLATE.read_text()))
    print(RESULTS_MD)
