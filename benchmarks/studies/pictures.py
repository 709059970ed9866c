"""Draws the pictures of the studies from their JSON files alone.

    python benchmarks/studies/pictures.py                       # all in benchmarks/results/
    python benchmarks/studies/pictures.py runs/benchmarks/curves.json

With ten seeds or more a line is their interquartile mean and its band a 95% bootstrap interval;
with fewer, their mean and the lowest to the highest seed. Of older files, which kept no seed's
curve, a line is the mean and dots are the seeds at the end.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import common
import throughput

PQN, CHANGED = throughput.COLOURS["pqn_cartpole"], "#56B4E9"
# The colour of an algorithm, and of what a study changes in it. A label takes the longest name that
# it begins with; a study of other labels is a sweep, from dark to light.
COLOURS = {
    "PQN": PQN,
    "DQN": throughput.COLOURS["dqn_cartpole"],
    "double DQN": "#D55E00",
    "PPO": throughput.COLOURS["ppo_cartpole"],
    "PQL": throughput.COLOURS["pql_isaac_style"],
    "PQL-D": "#EE7FB0",
    "DDPG(n)": "#666633",
    "SAC(n)": "#7570B3",
    # The defaults of a script, and what is changed.
    "bootstrapped": PQN,
    "treated as terminal": CHANGED,
    "layer norm": PQN,
    "batch norm": CHANGED,
    "no norm": "#88CCAA",
    "LSTM": PQN,
    "no memory": CHANGED,
    "random actions": "#999999",
}
PEERS = {  # grey and dashed
    "PureJaxQL": ("#444444", "--"),
    "PureJaxRL": ("#444444", "--"),
    "Myriad": ("#999999", "-."),
    "CleanRL": ("#999999", "-."),
    "PPO of brax": ("#444444", "--"),
}
LABELS = {
    "steps": "environment steps per seed",
    "steps_per_env": "steps of each environment",
    "seconds": "seconds, all seeds, compiling included",
    "seconds of a seed": "seconds of one seed, without compiling",
}
# What the README shows first: a study, our curve, the peer's, the title of the panel.
WALL_CLOCK = [
    ("pqn_truncation", "bootstrapped", "PureJaxQL", "PQN, CartPole-v1"),
    ("minatar_breakout_1e6", "PQN", "PureJaxQL", "PQN, Breakout-MinAtar"),
    ("ppo", "PPO", "PureJaxRL", "PPO, CartPole-v1"),
]
FONT = {"font.size": 12, "axes.titlesize": 12, "legend.fontsize": 10.5, "axes.grid": True}
FONT |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def load(path: Path) -> dict:
    """A study."""
    return json.loads(path.with_suffix(".json").read_text())


def colour_and_style(label: str, labels: list[str]) -> tuple:
    """Of a curve among the labels of its study."""
    if label in PEERS:
        return PEERS[label]
    names = [name for name in COLOURS if label.startswith(name)]
    if names:
        return COLOURS[max(names, key=len)], "-"
    position = labels.index(label) / max(len(labels) - 1, 1)
    return matplotlib.colormaps["viridis"](0.88 * position), "-"


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the middle half of the seeds, the first axis."""
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple:
    """95% interval of the interquartile mean over seeds, the first axis."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(values), size=(resamples, len(values)))
    means = np.array([interquartile_mean(values[own]) for own in chosen])
    return tuple(np.percentile(means, (2.5, 97.5), axis=0))


def summary(curve: dict) -> tuple:
    """Line, lower and upper end of its band, and what they are, of a curve [num_seeds, n]."""
    if "returns" not in curve:
        return curve["mean"], None, None, "mean; dots: seeds at the end"
    returns = np.array(curve["returns"])
    if len(returns) >= 10:
        return interquartile_mean(returns), *bootstrap_interval(returns), "IQM, 95% interval"
    if len(returns) > 1:
        return returns.mean(0), returns.min(0), returns.max(0), "mean, lowest to highest"
    return returns[0], None, None, ""


def final_returns(study: dict, label: str) -> np.ndarray:
    """Of every seed, the last evaluation, or the mean over the last tenth of training."""
    curve = study["curves"][label]
    if "returns" not in curve:
        return np.array(curve["final"])
    returns, steps = np.array(curve["returns"], float), np.array(curve["global_step"])
    is_training = study["metric"].startswith("charts")
    counted = steps > 0.9 * steps[-1] if is_training else steps == steps[-1]
    return np.nanmean(returns[:, counted], axis=1)


def x_values(curve: dict, over: str) -> np.ndarray:
    """Steps of a seed, of an environment, or the seconds at which they were taken."""
    if over == "seconds of a seed" and "seconds" in curve:  # measured, not steps at a mean speed
        return np.array(curve["seconds"])
    steps = np.array(curve["global_step"], float)
    if over == "steps_per_env":
        return steps / curve["num_envs"]
    if over == "seconds":
        return curve["compile_seconds"] + curve["run_seconds"] * steps / steps[-1]
    return steps / (curve["steps_per_second"] if over == "seconds of a seed" else 1)


def draw_curves(axes, curves: dict, over: str, names: dict | None = None) -> str:
    """Lines and bands; returns what they are."""
    words = {}
    for label, curve in curves.items():
        x, (line, low, high, word) = x_values(curve, over), summary(curve)
        colour, style = colour_and_style(label, list(curves))
        options = {"color": colour, "linestyle": style, "label": (names or {}).get(label, label)}
        axes.plot(x, line, linewidth=1.8, **options)
        if low is not None:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        elif "final" in curve and len(curve["final"]) > 1:
            at_end = np.full(len(curve["final"]), x[-1])
            axes.plot(at_end, curve["final"], ".", color=colour, alpha=0.7, clip_on=False)
        words[word] = None
    axes.set_xlabel(LABELS[over])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return ", or ".join(word for word in words if word)


def y_label(study: dict) -> str:
    name = study["metric"].split("/")[1].removeprefix("episodic_").replace("_", " ")
    return f"greedy {name}" if study["metric"].startswith("eval") else f"{name} while training"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def draw(out: Path) -> list[Path]:
    """Draws the pictures of a study beside its JSON file; returns their paths, none for timings."""
    study, paths = load(out), []
    if "rows" in study:
        paths.append(out.with_suffix(".png"))
        throughput.plot(paths[0], study)
    for i, over in enumerate(study["x"] if "curves" in study else []):
        paths.append(out.with_name(f"{out.stem}_{over}" if i else out.stem).with_suffix(".png"))
        curves = study["curves"]
        if over == "seconds" and not all("run_seconds" in curve for curve in curves.values()):
            over = "seconds of a seed"  # of older files
        with matplotlib.rc_context(FONT):
            figure = Figure(figsize=(6, 3.6), layout="constrained")
            axes = figure.add_subplot(ylabel=y_label(study))
            words = draw_curves(axes, curves, over)
            num_seeds = sorted({len(final_returns(study, label)) for label in curves})
            seeds = " and ".join(str(number) for number in num_seeds)
            seeds += " seed" + "s" * (num_seeds != [1]) + f": {words}" * bool(words)
            axes.set_title(f"{study['title']}\n{seeds}".strip())
            if study["line"] is not None:
                axes.axhline(study["line"], color="grey", linewidth=1, linestyle=":")
            axes.legend(**({"ncols": 2, "fontsize": 9} if len(curves) > 4 else {}))
            save(figure, paths[-1])
    return paths


def wall_clock_pairs(results: Path = common.RESULTS) -> list[tuple[dict, dict]] | None:
    """The studies of WALL_CLOCK and their two curves; None before all have been run."""
    if not all((results / f"{name}.json").exists() for name, *_ in WALL_CLOCK):
        return None
    pairs = []
    for name, *labels, _ in WALL_CLOCK:
        study = load(results / name)
        curves = {label: study["curves"].get(label, {}) for label in labels}
        if not all("run_seconds" in curve for curve in curves.values()):
            return None
        pairs.append((study, curves))
    return pairs


def draw_wall_clock(results: Path = common.RESULTS) -> Path | None:
    """Our scripts and their peers over seconds, from the files of other studies."""
    pairs = wall_clock_pairs(results)
    if pairs is None:
        return None
    with matplotlib.rc_context(FONT | {"font.size": 14, "axes.titlesize": 14}):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        for i, ((study, pair), (_, ours, _, title)) in enumerate(
            zip(pairs, WALL_CLOCK, strict=True)
        ):
            axes = figure.add_subplot(1, 3, i + 1, ylabel=y_label(study))
            script = pair[ours]["command"].split()[0]
            words = draw_curves(axes, pair, "seconds", {ours: f"{script}.py"})
            axes.set_title(f"{title}, {len(pair[ours]['returns'])} seeds\n{words}")
            axes.set_xlabel("seconds, compiling included")
            axes.set_xlim(left=0)
            axes.legend(loc="lower right", fontsize=13)
        save(figure, results / "wall_clock.png")
    return results / "wall_clock.png"


def main(paths: tyro.conf.Positional[tuple[Path, ...]] = (), /) -> None:
    """Draw the pictures of some studies, or of all in benchmarks/results/.

    Args:
        paths: JSON files.
    """
    for path in paths or sorted(common.RESULTS.rglob("*.json")):
        for picture in draw(path.with_suffix("")):
            print(picture)
    if not paths and (picture := draw_wall_clock()):
        print(picture)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
