"""Flags that cannot work end in one line that names them, with exit code 2, before anything is written."""

from concurrent.futures import ThreadPoolExecutor

import pytest

BAD = [
    *(f"--{name}=0" for name in ("num-seeds", "num-envs", "num-steps", "num-epochs", "num-minibatches")),
    *(f"--{name}=0" for name in ("hidden-size", "num-layers", "eval-episodes", "total-timesteps")),
    *(f"--{name}=-1" for name in ("seed", "num-envs", "eval-interval", "learning-rate", "gamma", "max-grad-norm")),
    *(f"--{name}=-0.5" for name in ("td-lambda", "epsilon-start", "epsilon-finish", "epsilon-decay", "reward-scale")),
    *(f"--{name}=1.5" for name in ("gamma", "td-lambda", "epsilon-start", "epsilon-finish", "epsilon-decay")),
    *(f"--{name}=nan" for name in ("learning-rate", "gamma", "reward-scale", "max-grad-norm", "checkpoint-interval")),
    *(f"--{name}=many" for name in ("num-envs", "learning-rate", "norm", "wandb-mode", "env-id")),
    "--num-envs=2.5", "--num-envs=1e-3", "--total-timesteps=inf", "--total-timesteps=31", "--total-timesteps=3e9",
    "--num-minibatches=3", "--num-minibatches=64", "--env-id=Pendulum-v1", "--env-id=", "--norm=LayerNorm",
    "--resume=nowhere", "--resume=.", "--no-such-flag", "--num-env=4", "--num-envs", "--learning-rate", "leftover",
    "--gamma=", "--seed=99999999999",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, script):
    """Return code, output, errors and files left of the script for each of BAD."""
    import subprocess
    import sys

    from conftest import ROOT, SCRIPTS

    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in SCRIPTS[script.__name__].items()]

    def run(flag):
        folder = tmp_path_factory.mktemp("bad")
        shared = [] if flag.startswith("--resume") else tiny
        command = [sys.executable, ROOT / f"{script.__name__}.py", *shared, flag]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        return done, list(folder.iterdir())

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(BAD, pool.map(run, BAD), strict=True))


@pytest.mark.parametrize("flag", BAD)
def test_bad_flag(outcomes, flag):
    done, files = outcomes[flag]
    assert done.returncode == 2
    assert done.stdout == "" and not files
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    name, _, value = flag.partition("=")
    assert name in lines[0] and value.lstrip("-") in lines[0].replace("3000000000", "3e9")


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
    process = command("--resume=run", tiny=[])
    _, errors = process.communicate()
    assert process.returncode == 2 and "--resume is run" in errors and len(errors.splitlines()) == 1
