"""Fixtures that every script goes through: a further script joins by a line in SCRIPTS."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Sizes that compile and run in seconds: 12 updates, an evaluation every 4.
SCRIPTS = {
    "pqn_cartpole": {
        "num_envs": 4,
        "num_steps": 8,
        "total_timesteps": 4 * 8 * 12,
        "num_epochs": 2,
        "num_minibatches": 2,
        "hidden_size": 16,
        "eval_interval": 4,
        "eval_episodes": 4,
    }
}


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    """The imported script."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def config(script):
    """A tiny configuration of the script."""
    return script.Config(**SCRIPTS[script.__name__])


@pytest.fixture(params=SCRIPTS)
def command(request, tmp_path):
    """Runs a copy of the script, alone in an empty folder, with tiny sizes and further flags."""
    (tmp_path / f"{request.param}.py").write_text((ROOT / f"{request.param}.py").read_text())
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in SCRIPTS[request.param].items()]

    def start(*flags, tiny=tiny, **options):
        options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        options["env"] = os.environ | {"WANDB_SILENT": "true"}
        return subprocess.Popen([sys.executable, f"{request.param}.py", *tiny, *flags], **options)

    start.folder = tmp_path
    return start
