"""Every tool of benchmarks/ runs, at tiny sizes; test_docs.py has the pages that they fill."""

import functools
import importlib
import itertools
import json
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, flags

sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))
import common
import curves
import equal_seconds
import gpu
import gpu_launches
import pictures
import speed
import throughput

TINY = shlex.join(flags("pqn_cartpole"))


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Scripts and rows run in this process: most of a process is JAX's start. Returns a path."""

    def run_script(script, flags, runs_dir):
        module = importlib.import_module(script)
        run_dir = module.main(module.parse_args([*flags, "--runs-dir", str(runs_dir)]))
        return run_dir, json.loads((run_dir / "metadata.json").read_text())

    monkeypatch.setattr(common, "run_script", run_script)
    monkeypatch.setattr(throughput, "measure_alone", throughput.measure)
    return tmp_path / "study"


def load(out):
    return json.loads(out.with_suffix(".json").read_text())


def test_commands_of_the_studies_parse():
    """Each writes a file of its own and gives the scripts flags that they take."""
    names = []
    for path in sorted((ROOT / "benchmarks" / "studies").glob("*.sh")):
        for line in path.read_text().replace("\\\n", "").splitlines():
            if not line.startswith("python "):
                continue
            _, tool, *arguments = shlex.split(line)
            assert (ROOT / tool).exists()
            names.append(arguments[arguments.index("--out") + 1])
            if tool.endswith("example.py"):
                assert (ROOT / arguments[-1].split()[0]).exists()
                continue
            given = [x.removeprefix("--flags=") for x in arguments if x.startswith("--flags=")]
            after = itertools.pairwise(arguments)
            own = [text.partition("=")[2].split() for flag, text in after if flag == "--curve"]
            for script, *further in own or [[arguments[0]]]:
                words = [*shlex.split(" ".join(given)), *further]
                if script.startswith("examples/"):  # an adapter, which hands flags on
                    assert (ROOT / f"{script}.py").exists()
                    script, *words = words
                if script not in SCRIPTS:  # without requirements-atari.txt
                    continue
                module = importlib.import_module(script)
                if "throughput" not in tool:
                    module.parse_args(words)
    assert len(names) == len(set(names))


def test_throughput(in_process, capsys):
    options = {"num_envs": (4,), "num_seeds": (2,), "steps_per_env": 32, "repeats": 2}
    tiny = "--num-steps 8 --num-minibatches 2 --hidden-size 8 --eval-episodes 4 --num-layers 1"
    throughput.main(("pqn_cartpole",), flags=tiny, out=in_process, **options)
    (row,) = load(in_process)["rows"]
    assert row["env_steps"] == 2 * 4 * 32
    gradient_steps = row["gradient_steps_per_second"] * np.median(row["run_seconds"])
    updates, epochs, minibatches = 4, 4, 2
    np.testing.assert_allclose(gradient_steps, 2 * updates * epochs * minibatches)
    assert row["final_return"][0] > 0
    assert in_process.with_suffix(".png").exists()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 1 + 1


def test_curves(in_process, monkeypatch):
    told = {"global_step": [100, 200], "returns": [[1, 2], [3, 4]], "compile_seconds": 1.0}
    told |= {"run_seconds": 2.0, "steps_per_second": 200.0}
    monkeypatch.setenv("PEER", shlex.join([sys.executable, "-c", f"print('{json.dumps(told)}')"]))
    monkeypatch.delenv("ABSENT", raising=False)
    curves.main(
        curve=("PQN=pqn_cartpole --norm none",),
        peer=("PureJaxQL=$PEER", "Myriad=$ABSENT --curve"),
        num_seeds=2,
        x=("steps", "seconds"),
        flags=TINY,
        out=in_process,
    )
    study = load(in_process)
    assert list(study["curves"]) == ["PQN", "PureJaxQL"]
    ours, peer = study["curves"].values()
    assert np.shape(ours["returns"]) == (2, 3)  # 12 updates, an evaluation every 5
    assert ours["global_step"] == [160, 320, 384]
    assert ours["steps_per_second"] == pytest.approx(2 * 384 / ours["run_seconds"])
    assert peer["returns"] == told["returns"]
    seconds = pictures.x_values(peer, "seconds")
    assert seconds.tolist() == [2, 3]
    for suffix in ("", "_seconds"):
        assert in_process.with_name(f"study{suffix}.png").exists()


def test_curves_in_turns(in_process, monkeypatch):
    """A seed of every curve, then the next; returns by seed, seconds in all."""
    started = []

    def run_curve(command, num_seeds, metric):
        started.append(command)
        seed, slow = int(command.split()[-1]), "none" in command
        curve = {"command": command, "global_step": [8, 16], "returns": [[seed, slow]]}
        seconds = {"compile_seconds": 1, "run_seconds": 4 if slow else 2}
        return curve | seconds | {"steps_per_second": 16 / seconds["run_seconds"]}

    monkeypatch.setattr(curves, "run_curve", run_curve)
    curve = ("layer norm=pqn_cartpole", "no norm=pqn_cartpole --norm none")
    curves.main(curve=curve, num_seeds=2, in_turns=True, flags="--num-envs 4", out=in_process)
    first, second = "pqn_cartpole --num-envs 4", "pqn_cartpole --num-envs 4 --norm none"
    assert started == [f"{own} --seed {seed}" for seed in (0, 1) for own in (first, second)]
    assert load(in_process)["curves"] == {
        label: {
            "command": command,
            "global_step": [8, 16],
            "returns": [[0, slow], [1, slow]],
            "compile_seconds": 2,
            "run_seconds": 4 + 4 * slow,
            "steps_per_second": 8 / (1 + slow),
        }
        for label, command, slow in (("layer norm", first, 0), ("no norm", second, 1))
    }


def test_equal_seconds(in_process):
    """Every seed learns until the seconds are over, from its own key; only DQN has a replay."""
    dqn = "dqn_cartpole --total-timesteps 1e6 --eval-interval 0 --buffer-size 100 --batch-size 8"
    curve = (f"DQN={dqn} --target-interval 8", "PQN=pqn_cartpole --num-steps 8 --hidden-size 8")
    options = {"num_seeds": 2, "seconds": 2, "points": 2}
    equal_seconds.main("sweep", curve=curve, out=in_process, **options)
    study = load(in_process)
    with_replay, without = study["curves"].values()
    assert with_replay["replay_bytes"] == 100 * (2 * 4 * 4 + 9) and without["replay_bytes"] == 0
    for own in study["curves"].values():
        assert own["seconds"] == [1, 2] and 0 < own["global_step"][0] < own["global_step"][1]
        assert np.isfinite(own["returns"]).all() and np.shape(own["returns"]) == (2, 2)
        assert own["returns"][0] != own["returns"][1]
    assert pictures.x_values(without, "seconds of a seed").tolist() == [1, 2]
    assert in_process.with_name("study_steps.png").exists()


def test_speed(tmp_path, monkeypatch):
    """With the script in a process of its own, as a person runs it."""
    out = tmp_path / "study"
    told = json.dumps({"steps_per_second": 1.0, "compile_seconds": 0})
    monkeypatch.setenv("PEER", shlex.join([sys.executable, "-c", f"print('{told}')"]))
    speed.main("pqn_cartpole", flags=TINY, peer="PureJaxQL=$PEER", repeats=1, out=out)
    study = load(out)
    assert study["medians"]["pqn_cartpole"]["peak_memory_gib"] > 0
    ours = study["medians"]["pqn_cartpole"]["steps_per_second"]
    assert study["ratios"]["steps_per_second"] == ours > 0


@pytest.mark.parametrize("tiny", [False, True])
def test_gpu_commands(monkeypatch, tiny, tmp_path):
    """Every command is one that its tool takes, with scripts' flags that these take."""
    seen = []

    def stub(main):
        return functools.wraps(main)(lambda *names, **options: seen.append((names, options)))

    monkeypatch.setattr(gpu, "TOOLS", {tool: stub(main) for tool, main in gpu.TOOLS.items()})
    gpu.main(tiny=tiny, out=tmp_path)
    assert [options["out"].name for _, options in seen] == [name for name, *_ in gpu.STUDIES]
    for names, options in seen:
        scripts = [curve.partition("=")[2] for curve in options.get("curve", ())] or names
        for script in scripts if isinstance(scripts[0], str) else scripts[0]:
            importlib.import_module(script).parse_args(shlex.split(options["flags"]))


def test_bands_stay_within_returns():
    """The interquartile mean drops the extremes; its interval lies within the returns."""
    returns = np.array([[500.0]] * 9 + [[0.0]])
    line, low, high, word = pictures.summary({"returns": returns})
    assert line == 500 and 0 <= low <= high == 500 and "IQM" in word
    line, low, high, _ = pictures.summary({"returns": returns[-3:]})
    assert (line, low, high) == (1000 / 3, 0, 500)


def test_bins():
    """Means over neighbouring updates, at most 200, without those in which a seed has none."""
    returns = np.full((2, 1000), 3.0)
    returns[:, :10] = np.nan
    returns[1, 990:] = np.nan
    steps, means = curves.in_bins(np.arange(1000), returns)
    assert len(steps) < 200 and np.unique(means).tolist() == [3]
    assert 980 < steps[-1] < 999


# What XLA dumps: a loop of 3 trips in a graph's wake, in it one of unknown length and a branch.
THUNKS = """\
000: kCommandBuffer [source | next=003 (1)]
    001: kCopy [source | sink] kCopy
    002: kCustomKernel [source | sink] add grid: [1, 1, 1]
003: kWhile [prev=000 (1) | sink]
condition:
    004: kCustomKernel [source | sink] compare
  body:
    005: kCustomKernel [source | next=006] outside
    006: kWhile [prev=005 | next=009]
condition:
        007: kCustomKernel [source | sink] compare
      body:
        000: kCommandBuffer [source | sink]
            008: kCustomKernel [source | sink] inside
    009: kConditional [prev=006 | sink]
      false_branch:
        010: kMemzero [source | sink]
      true_branch:
        000: kCommandBuffer [source | sink]
            011: kCustomKernel [source | sink] inside
            012: kCustomKernel [source | sink] inside
"""
METADATA = """
thunk_metadata {
  thunk_info {
    profile_annotation: "while.7"
    thunk_id: 3
  }
  thunk_kind: "kWhile"
}
"""
HLO = '  %while.7 = (s32[]) while(%x), body=%b, backend_config={"known_trip_count":{"n":"3"}}'


def test_gpu_launches():
    lengths = gpu_launches.trips(METADATA, HLO)
    assert lengths == {3: 3}
    total, (loop,) = gpu_launches.count(gpu_launches.parse(THUNKS), lengths)
    # A trip: one outside; the inner loop's condition, outside, and body; the longer branch.
    assert loop["trips"] == 3 and {x: loop[x] for x in total} == {
        "launches": 5,
        "outside": 2,
        "waits": 2,
    }
    assert [(inner["trips"], inner["launches"]) for inner in loop["loops"]] == [(None, 2)]
    assert total == {"launches": 2 + 3 * 5, "outside": 3 * 2, "waits": 3 * 2}
