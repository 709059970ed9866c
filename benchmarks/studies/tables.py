"""Fills the pages of docs/ in place, and draws all pictures, from the JSON files of the studies.

    python benchmarks/studies/tables.py

What stands in a page between <!-- NAMES: KIND --> and <!-- end --> is made from the studies of
these names. On lines of their own, marks hold a block: results (table, picture and made_by), table,
picture, made_by (devices and commands), seconds, beside, ratios, achievements, launches or
compiled. Within a sentence they hold a number: ratio, mean LABEL, replay LABEL, or reach RETURN
LABEL.
"""

import functools
import itertools
import re
import shlex

import numpy as np

import common
import pictures
import throughput

PAGES = [common.ROOT / "README.md", *sorted((common.ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- ([\w/ ]+): (\w+) ?([^>]*?) ?-->(\n?).*?<!-- end -->", re.DOTALL)
NOT_RUN = "*Not run yet.*"


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
    rows, many = [], False
    for study in studies.values():
        for label, curve in study["curves"].items():
            final, interval = pictures.final_returns(study, label), "-"
            form = functools.partial(number, decimals=3 if "rate" in study["metric"] else 1)
            if len(final) >= 10:
                many = True
                low, high = pictures.bootstrap_interval(final)
                interval = f"{form(pictures.interquartile_mean(final))} "
                interval += f"({form(low)} to {form(high)})"
            cells = [f"{int(curve['global_step'][-1]):,}", str(len(final)), form(final.mean())]
            cells += [interval, form(final.min()), form(final.max())]
            task = study["title"] if len(studies) > 1 else ""
            rows.append([f"{task}: {label}" if task else label, *cells])
    head = ["", "environment steps", "seeds", "mean", "IQM (95% interval)", "lowest", "highest"]
    if not many:
        head, *rows = (row[:4] + row[5:] for row in (head, *rows))
    return markdown(head, rows)


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
    head = ["study", "steps/s", "compile, s", "peer", "its steps/s", "its compile, s", "ratio"]
    return markdown(head, rows)


def peers_of(study: dict) -> list[tuple[str, float, float]]:
    """Peers of a study, with our steps per second and theirs."""
    if "medians" in study:
        labels = [study["peer"]] if study["peer"] else []
        rates = {label: own["steps_per_second"] for label, own in study["medians"].items()}
    else:
        labels = [label for label in study["curves"] if label in pictures.PEERS]
        rates = {label: own["steps_per_second"] for label, own in study["curves"].items()}
    ours = next(iter(rates.values()))
    return [(label, ours, rates[label]) for label in labels]


def beside(studies: dict[str, dict]) -> str:
    """Steps per second of the first curve of each study and of its peers, evaluations included."""
    rows = []
    for study in studies.values():
        script = next(iter(study["curves"].values()))["command"].split()[0]
        for label, ours, theirs in peers_of(study):
            num_seeds = str(len(pictures.final_returns(study, label)))
            cells = [f"{ours:,.0f}", label, f"{theirs:,.0f}", f"**{ours / theirs:.2f}**"]
            rows.append([f"`{script}`, {study['title']}", num_seeds, *cells])
    head = ["", "seeds", "steps/s", "peer", "its steps/s", "ratio"]
    return "\n\n".join([markdown(head, rows), devices(studies)])


def ratios(studies: dict[str, dict]) -> str:
    """How many times as fast as its peers each script is, over some studies."""
    by_script = {}
    for study in studies.values():
        curves = study.get("curves", {"": {"command": study.get("script")}})
        script = next(iter(curves.values()))["command"].split()[0]
        for label, ours, theirs in peers_of(study):
            by_script.setdefault(script, {}).setdefault(label, []).append(ours / theirs)
    lines = []
    for script, peers in by_script.items():
        texts = []
        for label, found in peers.items():
            form = [f"{x:.1f}" if x < 10 else f"{x:.0f}" for x in (min(found), max(found))]
            texts.append(f"{' to '.join(dict.fromkeys(form))} times {label}")
        lines.append(f"- `{script}.py`: {', '.join(texts)}")
    return "\n".join(lines)


def throughputs(studies: dict[str, dict]) -> str:
    """The tables that throughput.py prints."""
    columns = [(title, cell) for title, _, cell in throughput.COLUMNS]
    rows = []
    for name, study in studies.items():
        rows += [[f"`{name}`", *(cell(row) for _, cell in columns)] for row in study["rows"]]
        if peer := study.get("peer"):
            cells = [peer["label"], "-", "1", f"{peer['steps_per_second']:,.0f}"]
            rows.append([f"`{name}`", *cells, *["-"] * (len(columns) - len(cells))])
    head = ["study", *(title for title, _ in columns)]
    if len(studies) == 1:
        head, *rows = (row[1:] for row in (head, *rows))
    return markdown(head, rows)


def printed(studies: dict[str, dict]) -> str:
    """What a program of examples/ printed."""
    texts = [
        f"{study['printed'].strip()}\n({study['seconds']:.0f} s)" for study in studies.values()
    ]
    return "```text\n" + "\n\n".join(texts) + "\n```"


def seconds(studies: dict[str, dict]) -> str:
    """Returns after equal seconds, when the first of the curves ends; linear between points."""
    (study,) = studies.values()
    curves, metric, rows = study["curves"], study["metric"], []
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


def achievements(studies: dict[str, dict]) -> str:
    """Share of episodes that unlocked each achievement."""
    (study,) = studies.values()
    curves = study["curves"]
    shares = [curve["achievements"] for curve in curves.values()]
    names = {name for share in shares for name in share}
    rows = [
        [name.split("/")[1].replace("_", " "), *(f"{share.get(name, 0):.1%}" for share in shares)]
        for name in sorted(names, key=lambda name: (-shares[0].get(name, 0), name))
        if max(share.get(name, 0) for share in shares) >= 0.05
    ]
    return markdown(["achievement", *curves], rows)


def caption(study: dict) -> str:
    """What the picture of a study shows, in words."""
    if "curves" not in study:
        return ""
    counts = sorted({len(pictures.final_returns(study, label)) for label in study["curves"]})
    seeds = " and ".join(map(str, counts)) + " seed" + "s" * (counts != [1])
    return f"{study['title']}, {pictures.y_label(study)}, {seeds}"


def picture(studies: dict[str, dict]) -> str:
    """The pictures of studies, two in a row, and what they show."""
    cells = []
    for name, study in studies.items():
        suffixes = [f"_{over}" if i else "" for i, over in enumerate(study.get("x", ["steps"]))]
        files = [f"{name}{suffix}.png" for suffix in suffixes]
        text = caption(study) or name.removeprefix("example_").replace("_", " ")
        link = f"![{text}](../benchmarks/results/"
        cells += [f"{link}{file})" for file in files if (common.RESULTS / file).exists()]
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
    """The commands of studies, folded."""
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


def made_by(studies: dict[str, dict]) -> str:
    """Devices and commands of studies."""
    return "\n\n".join([devices(studies), commands(studies)])


MAKERS = {"curves": returns, "rows": throughputs, "timings": speeds, "printed": printed}


def kind_of(study: dict) -> str:
    return next(kind for kind in MAKERS if kind in study)


def table(studies: dict[str, dict]) -> str:
    """The tables of studies, one for those of a kind."""
    groups = {}
    for name, study in studies.items():
        groups.setdefault(kind_of(study), {})[name] = study
    return "\n\n".join(MAKERS[kind](own) for kind, own in groups.items())


def results(studies: dict[str, dict]) -> str:
    """Table, pictures, devices and commands of studies."""
    drawn = {name: study for name, study in studies.items() if kind_of(study) != "timings"}
    parts = [table(studies), picture(drawn), made_by(studies)]
    return "\n\n".join(part for part in parts if part)


def launches(studies: dict[str, dict]) -> str:
    """What XLA launches in an update of scripts and peers, counted without a GPU."""
    (study,) = studies.values()
    rows = []
    for group in ("now", "peers"):
        for title, by_seeds in study["counts"][group].items():
            counts = by_seeds["1"]
            update = counts["update"]
            loops = [loop for loop in update["loops"] if loop["trips"]]
            steps = [f"{loop['launches']:,}" for loop in (loops[0], loops[-1])]
            cells = [f"{update[key]:,}" for key in ("launches", "outside", "waits")]
            memory = f"{counts['memory_mib']:,.0f}"
            many_seeds = ["", ""]
            if many := by_seeds.get("64"):
                many_seeds = [f"{many['update']['launches']:,}", f"{many['memory_mib']:,.0f}"]
            rows.append([f"`{title}`", cells[0], *steps, *cells[1:], memory, *many_seeds])
    head = ["program", "launches", "first loop, a step", "last loop, a step"]
    versions = f"Compiled for an H100 by jax {study['versions']['jax']}; nothing was run."
    head += ["outside of graphs", "waits", "MiB", "launches, 64 seeds", "MiB, 64 seeds"]
    made = markdown(head, rows)
    return "\n\n".join([made, versions, commands(studies)])


def compiled(studies: dict[str, dict]) -> str:
    """The memory of programs on devices for which they were compiled, for one seed."""
    (study,) = studies.values()
    rows = [
        [f"`{title}`", *(f"{by_seeds['1'][device]['mib']:,.0f}" for device in ("h100", "v5e"))]
        for title, by_seeds in study["memory"].items()
    ]
    versions = f"Compiled by jax {study['versions']['jax']}; nothing was run."
    made = markdown(["program", "H100, MiB", "TPU v5e, MiB"], rows)
    return "\n\n".join([made, versions, commands(studies)])


def ratio(studies: dict[str, dict]) -> str:
    """Our steps per second over the peer's."""
    (study,) = studies.values()
    ((_, ours, theirs),) = peers_of(study)
    return f"{ours / theirs:.1f}"


def mean(studies: dict[str, dict], label: str) -> str:
    """The mean over seeds of a curve's final return."""
    (study,) = studies.values()
    value = pictures.final_returns(study, label).mean()
    return number(value, 0 if abs(value) >= 100 else 2 if "rate" in study["metric"] else 1)


def replay(studies: dict[str, dict], label: str) -> str:
    """The memory of a curve's replay."""
    (study,) = studies.values()
    return f"{number(study['curves'][label]['replay_bytes'] / 1e6, 0)} MB"


def reach(studies: dict[str, dict], text: str) -> str:
    """How many seeds of a curve end at a return or more."""
    (study,) = studies.values()
    least, _, label = text.partition(" ")
    final = pictures.final_returns(study, label)
    return f"{(final >= float(least)).sum()} of {len(final)}"


BLOCKS = [results, table, picture, made_by, seconds, beside, ratios, achievements]
BLOCKS += [launches, compiled]
KINDS = {make.__name__: make for make in [*BLOCKS, ratio, mean, replay, reach]}


def fill_mark(match: re.Match) -> str:
    names, kind, argument, newline = match.groups()
    studies = find(names)
    text = KINDS[kind](studies, *([argument] if argument else [])) if studies else NOT_RUN
    mark = f"<!-- {names}: {kind}{argument and f' {argument}'} -->"
    return f"{mark}{newline}{text}{newline}<!-- end -->"


def fill(page: str) -> str:
    """The page with what stands between its marks made anew."""
    return MARK.sub(fill_mark, page)


if __name__ == "__main__":
    pictures.main()
    for path in PAGES:
        path.write_text(fill(path.read_text()))
        print(path)
