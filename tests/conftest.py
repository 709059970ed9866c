"""Fixtures that every script goes through: a further script joins by a line in SCRIPTS."""

import dataclasses
import gc
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
gc.disable()  # it looks through all that JAX has traced, again and again
# Most of the time is compiling: optimise less, and load what another test or process compiled.
FAST_COMPILING = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# AVX has no multiply-add, which programs of the same mathematics would use in other places: with
# it, their bits differ where the slower fusion emitters are off.
FAST_COMPILING += " --xla_cpu_max_isa=AVX"
# Options for programs that run long enough to be worth optimising.
WELL = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
if version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    FAST_COMPILING += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILING)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))

# Sizes that compile and run in seconds: 12 updates of 32 environment steps, an evaluation every 5.
SIZES = {"num_envs": 4, "total_timesteps": 12 * 32, "eval_interval": 5, "eval_episodes": 4}
SIZES |= {"anneal_lr": True}
ROLLOUTS = SIZES | {"num_steps": 8, "num_epochs": 2, "num_minibatches": 2, "hidden_size": 16}
SCRIPTS = {
    "pqn_cartpole": ROLLOUTS | {"num_layers": 1},
    "pqn_minatar": ROLLOUTS | {"num_channels": 4},
    "ppo_cartpole": ROLLOUTS | {"num_layers": 1},
    "ppo_continuous_action": ROLLOUTS | {"num_layers": 1, "env_id": "Pendulum-v1"},
    "pqn_continuous_action": SIZES
    | {"num_steps": 8, "num_epochs": 2, "num_minibatches": 2, "penalty_threshold": 1e-3}
    | {"env_id": "Pendulum-v1", "actor_hidden_sizes": (16,), "critic_hidden_sizes": (16,)},
    "dqn_cartpole": SIZES
    | {"num_steps": 2, "target_interval": 4, "hidden_sizes": (16,)}
    | {"buffer_size": 100, "batch_size": 8, "learning_starts": 64},
    "pqn_rnn_craftax": ROLLOUTS | {"num_layers": 1, "env_id": "MemoryChain-bsuite"},
    "pqn_vdn_jaxmarl": ROLLOUTS | {"num_layers": 1, "env_id": "smax_3m"},
    "pqn_atari": ROLLOUTS
    | {"num_channels": 2, "eval_steps": 4, "epsilon_finish": 0.05}
    | {"num_envs": 2, "num_steps": 16, "eval_episodes": 1},  # an emulator starts in 0.4 seconds
    "pql_isaac_style": SIZES
    | {"env_id": "Pendulum-v1", "total_timesteps": 13 * 32, "num_steps": 8, "warmup_steps": 8}
    | {"buffer_size": 100, "batch_size": 8, "hidden_sizes": (16,), "reward_scale": 0.01},
}

if importlib.util.find_spec("ale_py") is None:  # requirements-atari.txt
    del SCRIPTS["pqn_atari"]
# The scripts of pure functions; pqn_atari calls emulators: one seed, and no exact --resume.
PURE = [name for name in SCRIPTS if name != "pqn_atari"]
# Scripts with their own make_train: pqn_minatar has that of pqn_cartpole (test_same_lines.py).
LEARNERS = [name for name in SCRIPTS if name != "pqn_minatar"]
PURE_LEARNERS = [name for name in PURE if name in LEARNERS]


def warmup(script: str) -> int:
    """The environment steps of a script before its first update."""
    return SCRIPTS[script].get("warmup_steps", 0) * SIZES["num_envs"]


def having(*names: str) -> list[str]:
    """The scripts that define all of these functions or fields of Config."""
    patterns = [rf"(def |\n    ){name}[(:]" for name in names]
    return [
        name
        for name in SCRIPTS
        if all(re.search(p, (ROOT / f"{name}.py").read_text()) for p in patterns)
    ]


def only(*names: str):
    """Runs a test for the scripts that define all of these functions or fields of Config."""
    return pytest.mark.parametrize("script", having(*names), indirect=True)


def one_with(*names: str):
    """Runs a test for one script that defines these functions; they are the same in all of them."""
    return pytest.mark.parametrize("script", having(*names)[:1], indirect=True)


def pytest_collection_modifyitems(items):
    """Tests that share compiled programs or a run, and the many short ones, go to one process."""
    for item in items:
        if item.path.stem == "test_train":
            item.add_marker(pytest.mark.xdist_group(item.callspec.params["script"]))
        if item.path.stem in ("test_host", "test_bad_flags"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def strong(tree):
    """Arrays of no weak type: a function of the two kinds is compiled twice."""
    import jax  # not at the top: it reads the settings above

    def typed(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if is_key else jax.numpy.asarray(x, x.dtype)

    return jax.tree.map(typed, tree)


def flags(script: str) -> list[str]:
    """The tiny sizes of a script as flags."""
    return [
        part
        for name, value in SCRIPTS[script].items()
        for part in (
            f"--{name.replace('_', '-')}",
            *([] if value is True else map(str, value if isinstance(value, tuple) else [value])),
        )
    ]


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    """The imported script."""
    script = importlib.import_module(request.param)
    if hasattr(script, "make_jaxmarl"):
        import teams  # not at the top: JAX reads the settings above

        teams.register(script)
    return script


@pytest.fixture(scope="session")
def config(script):
    """A tiny configuration of the script."""
    quick = {"env_id": "smax_skirmish"} if hasattr(script, "make_jaxmarl") else {}
    return script.Config(**SCRIPTS[script.__name__] | quick)


def floats(config) -> set[str]:
    """The hyperparameters that may be traced: floats, also those with a default by environment."""
    names = {x.name for x in dataclasses.fields(config) if x.type in (float, float | None)}
    return names - {"checkpoint_interval", "sticky_action_prob", "repeat_action_probability"}


@pytest.fixture(params=SCRIPTS)
def command(request, tmp_path):
    """Runs a copy of the script, alone in an empty folder, with tiny sizes and further flags."""
    (tmp_path / f"{request.param}.py").write_text((ROOT / f"{request.param}.py").read_text())

    def start(*further, tiny=True, environ=None, **options):
        # wandb leaves the address of this process's own service in the environment.
        inherited = {name: x for name, x in os.environ.items() if name != "WANDB_SERVICE"}
        options |= {"cwd": tmp_path, "text": True, "env": inherited | (environ or {})}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        arguments = [*(flags(request.param) if tiny else []), *further]
        return subprocess.Popen([sys.executable, f"{request.param}.py", *arguments], **options)

    start.folder, start.script = tmp_path, request.param
    return start
