"""Flags that cannot work end in one line that names them, with exit code 2, before anything is written."""

import pytest
from conftest import SCRIPTS, flags, having

# What each flag does not take; a script is tried with those of its own flags.
BAD = {
    "0": "num-seeds num-envs num-steps num-epochs num-minibatches hidden-size hidden-sizes num-layers eval-episodes "
    "num-channels total-timesteps buffer-size batch-size target-interval critic-updates policy-updates n-steps "
    "sync-every reset-ratio eval-steps",
    "-1": "seed num-envs eval-interval learning-rate gamma max-grad-norm learning-starts hidden-sizes stddev-max "
    "max-steps-in-episode",
    "-0.5": "td-lambda gae-lambda epsilon-start epsilon-finish epsilon-decay reward-scale clip-coef ent-coef "
    "vf-coef tau sticky-action-prob resets-per-step value-bound forget-bias",
    "1.5": "gamma td-lambda gae-lambda epsilon-start epsilon-finish epsilon-decay clip-coef tau sticky-action-prob "
    "resets-per-step",
    "nan": "learning-rate gamma reward-scale max-grad-norm checkpoint-interval vf-coef",
    "many": "num-envs learning-rate norm activation wandb-mode env-id hidden-sizes buffer-size "
    "algorithm backend combine",
    "2.5": "num-envs", "1e-3": "num-envs", "inf": "total-timesteps", "31": "total-timesteps", "3e9": "total-timesteps",
    "3": "num-minibatches buffer-size sync-every", "64": "num-minibatches", "": "env-id gamma", "1": "num-atoms",
    "2": "warmup-steps",
    "LayerNorm": "norm", "nowhere": "resume", ".": "resume", "99999999999": "seed",
}  # fmt: skip
MALFORMED = ["--no-such-flag", "--num-env=4", "--num-envs", "--learning-rate", "leftover"]
CASES = (
    [(script, flag) for script in SCRIPTS for flag in MALFORMED]
    + [(script, f"--env-id={'CartPole-v1' if script == 'pql_isaac_style' else 'Pendulum-v1'}") for script in SCRIPTS]
    + [
        (script, f"--{name}={value}")
        for value, names in BAD.items()
        for name in names.split()
        for script in having(name.replace("-", "_"))
    ]
)


def check(errors, flag):
    (line,) = errors.splitlines()
    name, _, value = flag.partition("=")
    assert name in line and value.lstrip("-") in line.replace("3000000000", "3e9")


@pytest.mark.parametrize("script, flag", CASES, indirect=["script"])
def test_bad_flag(script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = [] if flag.startswith("--resume") else flags(script.__name__)
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args([*shared, flag]))
    output, errors = capsys.readouterr()
    assert stop.value.code == 2 and output == "" and not list(tmp_path.iterdir())
    check(errors, flag)


@pytest.mark.parametrize("flag", ["--gamma=1.5", "--num-envs=many", "--env-id=nowhere", "--no-such-flag"])
def test_bad_flag_of_a_process(command, flag):
    process = command(flag)
    output, errors = process.communicate()
    assert process.returncode == 2 and output == "" and not (command.folder / "runs").exists()
    check(errors, flag)


def test_resume_takes_no_other_flags(command):
    (command.folder / "run").mkdir()
    (command.folder / "run" / "config.json").write_text("{}")
    process = command("--resume=run")
    _, errors = process.communicate()
    assert process.returncode == 2 and "--resume" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "not json", '{"no_such_field": 1}', "[1]", '{"num_envs": 0}'])
def test_resume_of_a_broken_configuration(command, text):
    (command.folder / "run").mkdir()
    (command.folder / "run" / "config.json").write_text(text)
    process = command("--resume=run", tiny=False)
    _, errors = process.communicate()
    assert process.returncode == 2 and "--resume is run" in errors and len(errors.splitlines()) == 1


def test_scientific_notation(script):
    config = script.parse_args(["--total-timesteps", "1e7", "--checkpoint-interval=1.25e1", "--eval-interval=2e1"])
    assert (config.total_timesteps, config.checkpoint_interval, config.eval_interval) == (10_000_000, 12.5, 20)
