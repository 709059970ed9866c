"""The adapters of examples/environments beside their suites, and the page about environments."""

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import gymnax
import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS
from conftest import flags as tiny_flags
from flax import serialization
from test_bad_flags import run

sys.path.insert(0, str(ROOT / "examples" / "environments"))
KEY = jax.random.key(0)
SUITES = [("jumanji", "Snake-v1"), ("navix", "Navix-Empty-5x5-v0")]


def roll_out(env_id: str, suite_step, num_steps: int):
    """Observations, rewards, ends of random actions: by the adapter, and by suite_step."""
    env, params = gymnax.make(env_id)

    def step(state, keys):
        action = env.action_space(params).sample(keys[0])
        _, after, *ends, info = env.step(keys[1], state, action, params)
        return after, ((info["final_observation"], *ends), suite_step(state, action))

    _, state = env.reset(KEY, params)
    keys = jax.random.split(KEY, (num_steps, 2))
    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, state, keys)[1])())


# An episode of Maze ends at its goal or after 100 steps, one of Snake long before its 4,000.
@pytest.mark.parametrize("env_id, num_steps", [("Snake-v1", 300), ("Maze-v0", 1500)])
def test_jumanji(env_id, num_steps):
    suite = pytest.importorskip("jumanji").make(env_id)
    adapter = importlib.import_module("jumanji_env")

    def suite_step(state, action):
        after, timestep = suite.step(state[0], action)
        is_cut = after.step_count >= suite.time_limit  # to Jumanji, this is a termination as well
        obs = adapter.flatten(timestep.observation)
        return obs, timestep.reward, (timestep.discount == 0) & ~is_cut, is_cut

    own, expected = roll_out(env_id, suite_step, num_steps)
    for x, y in zip(own, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    _, _, terminated, truncated = own
    assert terminated.any() and truncated.any() == (env_id == "Maze-v0")


def test_navix():
    suite = pytest.importorskip("navix").make("Navix-Empty-5x5-v0")
    importlib.import_module("navix_env")

    def suite_step(state, action):  # state is never one that ended, so that step does not reset
        after = suite.step(state, action)
        return after.observation, after.reward, after.is_termination(), after.t >= suite.max_steps

    own, expected = roll_out("Navix-Empty-5x5-v0", suite_step, 1000)
    for x, y in zip(own, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert own[2].any() and own[3].any()


def assert_traces(name: str, env_id: str):
    """Training traces, with shapes and types that fit."""
    script = importlib.import_module(name)
    config = script.Config(**SCRIPTS[name] | {"env_id": env_id})
    _, metrics = jax.eval_shape(script.make_train(config), KEY)
    assert metrics["eval/episodic_return"].shape == (config.num_updates,)


@pytest.mark.parametrize("suite, env_id", SUITES)
def test_a_script_trains_on_suites(suite, env_id):
    pytest.importorskip(suite)
    importlib.import_module(f"{suite}_env")
    assert_traces("dqn_cartpole", env_id)


@pytest.mark.parametrize("suite, env_id", SUITES)
def test_flags_are_handed_on(suite, env_id):
    """To the script as a program, which tells errors in one line."""
    pytest.importorskip(suite)
    path = ROOT / "examples" / "environments" / f"{suite}_env.py"
    command = [sys.executable, path, "pqn_cartpole", "--env-id", "no-such-environment"]
    done = subprocess.run(command, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and error.startswith("pqn_cartpole.py: error: --env-id is no-such")
    assert env_id in error


def test_a_run_is_resumed_through_its_adapter(monkeypatch, tmp_path, capsys):
    """It tells the command that was typed, not the script that the adapter runs."""
    adapter, flags = "examples/environments/jumanji_env", tiny_flags("pqn_cartpole")
    flags = [*flags, f"--runs-dir={tmp_path}"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", f"{adapter}.py", "pqn_cartpole", *flags])
    monkeypatch.setattr(gymnax, "register", lambda *_: None)  # twice is an error
    monkeypatch.setattr(serialization, "to_bytes", None)  # it fails after the last checkpoint
    with pytest.raises(TypeError):
        run(SimpleNamespace(__name__=adapter), ["pqn_cartpole", *flags])
    (folder,) = tmp_path.iterdir()
    last_line = capsys.readouterr().err.splitlines()[-1]
    command = f"python -u {adapter}.py pqn_cartpole --resume {folder}"
    assert last_line == f"stopped; to resume: {command}"


def test_environment_of_the_docs():
    text = (ROOT / "docs" / "environments.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {"__name__": "docs"})
    assert_traces("pqn_cartpole", "Corridor")
    for path in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / "docs" / path).exists(), path
