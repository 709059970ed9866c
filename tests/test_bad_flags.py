"""Flags that cannot work end in words that name them, with exit code 2, and nothing is written."""

import json
import runpy
import signal
import sys

import pytest
from conftest import ROOT, SCRIPTS, flags, having

# What each flag does not take; a script is tried with those of its own flags.
BAD = {
    "0": "num-seeds num-envs num-steps num-epochs num-minibatches hidden-size hidden-sizes"
    " num-layers eval-episodes num-channels total-timesteps buffer-size batch-size target-interval"
    " critic-updates policy-updates n-steps reset-ratio eval-steps tau obs-clip"
    " num-critics actor-hidden-sizes critic-hidden-sizes frame-skip max-frames-in-episode",
    "-1": "seed num-envs eval-interval learning-rate gamma max-grad-norm learning-starts"
    " hidden-sizes stddev-max max-steps-in-episode noop-max",
    "-0.5": "td-lambda gae-lambda epsilon-start epsilon-finish epsilon-decay reward-scale clip-coef"
    " ent-coef vf-coef tau sticky-action-prob alpha-learning-rate value-bound forget-bias"
    " stddev-start stddev-finish stddev-decay penalty-threshold penalty-coef"
    " repeat-action-probability",
    "1.5": "gamma td-lambda gae-lambda epsilon-start epsilon-finish epsilon-decay clip-coef tau"
    " sticky-action-prob stddev-decay repeat-action-probability",
    "nan": "learning-rate gamma reward-scale max-grad-norm checkpoint-interval vf-coef",
    "many": "num-envs learning-rate norm activation wandb-mode env-id hidden-sizes buffer-size"
    " algorithm backend",
    "2.5": "num-envs", "1e-3": "num-envs", "inf": "total-timesteps", "31": "total-timesteps",
    "3e9": "total-timesteps", "1e9": "num-envs", "3": "num-minibatches buffer-size",
    "64": "num-minibatches", "": "env-id gamma", "1": "num-atoms", "2": "warmup-steps",
    "LayerNorm": "norm", "nowhere": "resume", ".": "resume", "99999999999": "seed",
}  # fmt: skip
OF_SIZES = ("3", "31", "64")
MALFORMED = ["--no-such-flag", "--num-env=4", "--num-envs", "--learning-rate", "leftover"]
MALFORMED += ["--distributed"]  # there is no cluster
CONTINUOUS = having("make_physics")
DISCRETE = [name for name in SCRIPTS if name not in CONTINUOUS]
# A field that several scripts have has the same limits in all of them (test_same_lines.py): one
# script is enough, but for what depends on the sizes of each.
CASES = [("pqn_cartpole", flag) for flag in MALFORMED]
CASES += [(script, "--env-id=Pendulum-v1") for script in DISCRETE]
CASES += [(script, "--env-id=CartPole-v1") for script in CONTINUOUS]
CASES += [(script, "--gamma=1.5") for script in SCRIPTS if script != "pqn_cartpole"]
CASES += [
    (script, f"--{name}={value}")
    for value, names in BAD.items()
    for name in names.split()
    for script in having(name.replace("-", "_"))[: None if value in OF_SIZES else 1]
]


def run(script, arguments):
    """Runs the script as a program, within this process; returns its exit code."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = sys.argv, *map(signal.getsignal, numbers)
    sys.argv = [f"{script.__name__}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv, *handlers = before
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("script, flag", CASES, indirect=["script"])
def test_bad_flag(script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = [] if flag.startswith("--resume") else flags(script.__name__)
    assert run(script, [*sizes, flag]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and not list(tmp_path.iterdir()) and "Traceback" not in errors
    text = " ".join(errors.replace("│", " ").split())
    name, _, value = flag.partition("=")
    assert name in text
    assert value.lstrip("-") in text.replace("3000000000", "3e9").replace("1000000000", "1e9")


def test_numbers(script):
    """Integers may be written as floats, flags as --flag=False."""
    for text in ("10_000_000", "1e7", "1E7", "1e+07", "1.0e7"):
        config = script.parse_args(["--total-timesteps", text, f"--checkpoint-interval={text}"])
        assert (config.total_timesteps, config.checkpoint_interval) == (10_000_000, 1e7)
    config = script.parse_args(["--anneal-lr=False", "--anneal_lr=True", "--distributed=false"])
    assert (config.anneal_lr, config.distributed) == (True, False)
    assert script.parse_args(["--eval_interval=7.0"]).eval_interval == 7


def test_text_stays_as_typed(script):
    """Though it looks like a number, a list or a boolean."""
    config = script.parse_args(
        ["--wandb-tags=26e7694", "--wandb-project", "12e4567", "--runs-dir=20e5"]
    )
    assert config.wandb_tags == ("26e7694",)
    assert (config.wandb_project, config.runs_dir) == ("12e4567", "20e5")
    config = script.parse_args(["--wandb-project=false", "--runs-dir=[64, 64]"])
    assert (config.wandb_project, config.runs_dir) == ("false", "[64, 64]")


@pytest.mark.parametrize("script", ["dqn_cartpole", "pql_isaac_style"], indirect=True)
def test_lists_of_sweeps(script):
    """As wandb's agent and a shell write them."""
    for words in (["--hidden_sizes=[64, 64]"], ["--hidden-sizes", "64", "6.4e1"]):
        assert script.parse_args(words).hidden_sizes == (64, 64)
    assert script.parse_args(["--wandb_tags=['a', 'b']"]).wandb_tags == ("a", "b")


def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    output, _ = capsys.readouterr()
    assert stop.value.code == 0
    assert "arXiv" in output and "--gamma" in output and "Discount factor" in output


SAVED = {"script": "pqn_cartpole"}
DAMAGED = ["", "not json", '{"no_such_field": 1}', "[1]", json.dumps(SAVED | {"num_envs": 0})]
DAMAGED += [json.dumps(SAVED | {"no_such_field": 1})]


@pytest.mark.parametrize("script", ["pqn_cartpole"], indirect=True)
@pytest.mark.parametrize("text", DAMAGED)
def test_resume_of_a_broken_configuration(script, text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert run(script, ["--resume", tmp_path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--resume is {tmp_path}; it takes a run folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
