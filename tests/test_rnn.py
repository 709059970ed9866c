"""What the recurrent script alone has: memory, batch renormalisation, targets, resets."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import FAST_COMPILING, ROOT, SCRIPTS, flags, strong
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import assert_equal

import pqn_rnn_craftax as rnn

TINY = rnn.Config(**SCRIPTS["pqn_rnn_craftax"])
LSTM, NORM = rnn.LSTM(5, 1.0), rnn.BatchRenorm(momentum=0.9)
init_lstm, apply_lstm = jax.jit(LSTM.init), jax.jit(LSTM.apply)
apply_norm = jax.jit(functools.partial(NORM.apply, train=True, mutable=["batch_stats"]))
use_norm = jax.jit(functools.partial(NORM.apply, train=False))


@given(resets=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_lstm_with_resets(resets, seed):
    """One pass is step after step, from a hidden state that is zero where an episode begins."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, 2, 3)).astype(np.float32)
    hidden = tuple(rng.normal(size=(2, 2, 5)).astype(np.float32))
    clear = rng.random((12, 2)) < resets
    params = init_lstm(jax.random.key(seed), hidden, x, clear)
    last, whole = apply_lstm(params, hidden, x, clear)
    for t in range(12):
        hidden = [np.where(clear[t, :, None], 0, h) for h in hidden]
        hidden, out = apply_lstm(params, tuple(hidden), x[t : t + 1], np.zeros((1, 2), bool))
        np.testing.assert_allclose(whole[t], out[0], atol=1e-6)
    assert_equal(last, hidden, atol=1e-6)


def test_lstm_against_flax():
    """flax's cell, with its parameters put together."""
    import flax.linen as nn

    x, zeros = jax.random.normal(jax.random.key(0), (9, 4, 3)), jnp.zeros((4, 5))
    clear = jnp.zeros((9, 4), bool)
    params = init_lstm(jax.random.key(1), (zeros, zeros), x, clear)["params"]
    params["Dense_0"]["bias"] += jax.random.normal(jax.random.key(2), (20,))
    inputs = jnp.split(params["Dense_0"]["kernel"], 4, axis=1)
    recurrent = zip(
        jnp.split(params["kernel"], 4, axis=1), jnp.split(params["Dense_0"]["bias"], 4), strict=True
    )
    theirs = {f"i{gate}": {"kernel": kernel} for gate, kernel in zip("ifgo", inputs, strict=True)}
    theirs |= {
        f"h{gate}": {"kernel": kernel, "bias": bias}
        for gate, (kernel, bias) in zip("ifgo", recurrent, strict=True)
    }
    _, ours = apply_lstm({"params": params}, (zeros, zeros), x, clear)
    carry, cell = (zeros, zeros), jax.jit(nn.OptimizedLSTMCell(5).apply)
    for t in range(9):
        carry, expected = cell({"params": theirs}, carry, x[t])
        np.testing.assert_allclose(ours[t], expected, atol=1e-5)


def test_q_values_of_a_rollout_are_recomputed():
    """A pass over a rollout from its first hidden state gives the values that acting saw."""
    config = dataclasses.replace(TINY, norm_input=False, num_steps=20)
    reset, step, num_actions = rnn.make_env(config, 4)
    network = rnn.QNetwork(num_actions, config)
    step, act = jax.jit(step), jax.jit(network.apply)
    obs, env_state = jax.jit(reset)(jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 4, config.hidden_size))
    first = hidden = hidden[0], hidden[1]
    last_action, start = jnp.zeros(4, jnp.int32), jnp.array([True, False, True, False])
    init = jax.jit(network.init)
    variables = init(jax.random.key(2), hidden, obs[None], last_action[None], start[None])
    steps, values = [], []
    for t in range(20):
        steps.append((obs, last_action, start))
        hidden, q = act(variables, hidden, obs[None], last_action[None], start[None])
        values.append(q[0])
        last_action = jax.random.randint(jax.random.key(t), (4,), 0, num_actions)
        obs, env_state, _, terminated, truncated, _ = step(
            jax.random.key(t), env_state, last_action
        )
        start = terminated | truncated
    rollout = [jnp.stack(x) for x in zip(*steps, strict=True)]
    assert rollout[2][1:].any()
    train = functools.partial(network.apply, train=True, mutable=["batch_stats"])
    (_, again), _ = jax.jit(train)(variables, first, *rollout)
    np.testing.assert_allclose(again, jnp.stack(values), atol=1e-5)


def test_without_memory_the_past_is_forgotten():
    obs, action = jax.random.normal(jax.random.key(0), (2, 6, 1, 3)), jnp.zeros((6, 1), jnp.int32)
    obs = obs.at[1, -1].set(obs[0, -1])  # two pasts, one present
    zeros, start = jnp.zeros((1, TINY.hidden_size)), jnp.zeros((6, 1), bool)
    for memory in (True, False):
        network = rnn.QNetwork(2, dataclasses.replace(TINY, memory=memory, norm_input=False))
        init, act = jax.jit(network.init), jax.jit(network.apply)
        variables = init(jax.random.key(1), (zeros, zeros), obs[0], action, start)
        last = [act(variables, (zeros, zeros), past, action, start)[1][-1] for past in obs]
        assert bool((last[0] == last[1]).all()) != memory


@given(
    batch=st.sampled_from([2, 6]),
    updates=st.integers(1, 4),
    first_steps=st.sampled_from([0, 998, 5000]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_batch_renorm(batch, updates, first_steps, seed):
    """Against the paper's algorithm in NumPy, with bounds that bite and bounds that do not."""
    rng = np.random.default_rng(seed)
    scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
    variables = {"params": {"scale": scale, "bias": bias}}
    stats = {
        "mean": rng.normal(size=3).astype(np.float32),
        "var": rng.uniform(0.01, 9, 3).astype(np.float32),
    }
    variables["batch_stats"] = stats | {"steps": jnp.int32(first_steps)}
    mean, var = stats["mean"].astype(np.float64), stats["var"].astype(np.float64)
    for update in range(updates):
        x = (rng.normal(size=(4, batch, 3)) * [0.1, 1, 5] + [0, 20, 1]).astype(np.float32)
        y, changed = apply_norm(variables, x)
        variables = variables | changed
        rows = x.reshape(-1, 3).astype(np.float64)
        std, running_std = np.sqrt(rows.var(0) + 1e-3), np.sqrt(var + 1e-3)
        warm = first_steps + update >= 1000
        r = np.clip(std / running_std, 1 / 3, 3) if warm else 1
        d = np.clip((rows.mean(0) - mean) / running_std, -5, 5) if warm else 0
        expected = ((x - rows.mean(0)) / std * r + d) * scale + bias
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0)
    np.testing.assert_allclose(
        use_norm(variables, x),
        (x - mean) / np.sqrt(var + 1e-3) * scale + bias,
        rtol=1e-3,
        atol=1e-3,
    )
    assert variables["batch_stats"]["steps"] == first_steps + updates


@given(
    num_steps=st.sampled_from([2, 3, 12]),
    seed=st.integers(0, 2**32 - 1),
    ends=st.sampled_from([0.0, 0.2, 0.5]),
    trace=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_rollout_targets(num_steps, seed, ends, trace):
    """Step by step; a truncated step has no target, and none before it sees beyond it."""
    rng, gamma = np.random.default_rng(seed), 0.9
    rewards, values = rng.normal(size=(2, num_steps, 1)).astype(np.float32)
    terminated, truncated = rng.random((2, num_steps, 1)) < ends
    cut = truncated & ~terminated
    targets, counts = jax.jit(rnn.rollout_targets)(
        *map(jnp.asarray, (rewards, values, terminated, truncated)), gamma, trace
    )
    np.testing.assert_array_equal(counts, ~cut[:-1])
    for t in range(num_steps - 1):
        if cut[t]:
            continue
        mixed, weight, total, discount = 0.0, 1.0, 0.0, 1.0
        for k in range(t, num_steps - 1):
            total += discount * rewards[k, 0]
            discount *= gamma
            n_step = total + (0 if terminated[k] else discount * values[k + 1, 0])
            if terminated[k] or cut[k + 1] or k == num_steps - 2:
                mixed += weight * n_step
                break
            mixed += weight * (1 - trace) * n_step
            weight *= trace
        np.testing.assert_allclose(targets[t, 0], mixed, atol=1e-4)


def test_craftax():
    """All episodes end after 3 steps: worlds are shared as the ratio says, achievements counted."""
    env = {"env_id": "Craftax-Classic-Symbolic-v1", "env_params": ("max_timesteps=3",)}
    sizes = {"num_envs": 8, "reset_ratio": 4, "total_timesteps": 8 * 16, "eval_interval": 0}
    config = dataclasses.replace(TINY, **env, **sizes)
    _, step, num_actions = rnn.make_env(config, 8)
    train, step = rnn.make_train(config), jax.jit(step)
    first = jax.jit(train.init)(jax.random.key(0))
    first = strong(first)
    obs, state = first.obs, first.env_state
    assert num_actions == 17 and len(np.unique(obs, axis=0)) == 8
    for t in range(3):
        obs, state, _, terminated, truncated, info = step(jax.random.key(t), state, jnp.full(8, 6))
        assert truncated.all() == (t == 2) and not (terminated & truncated).any()
    assert len(np.unique(obs, axis=0)) == 2 and (state.env_state.timestep == 0).all()
    np.testing.assert_array_equal(info["returned_episode_lengths"], 3)
    np.testing.assert_array_equal((state.returns, state.lengths), 0)
    timestep = jnp.zeros(8, jnp.int32).at[jnp.array([3, 5])].set(2)
    state = state._replace(env_state=state.env_state.replace(timestep=timestep))
    obs, state, _, _, truncated, _ = step(jax.random.key(3), state, jnp.full(8, 6))
    np.testing.assert_array_equal(np.flatnonzero(truncated), [3, 5])
    np.testing.assert_array_equal(state.env_state.timestep, np.where(truncated, 0, 1))
    assert (obs[3] != obs[5]).any()
    _, metrics = jax.jit(lambda state: train(state=state))(first)
    assert np.isfinite(metrics["losses/grad_norm"]).all()
    np.testing.assert_array_equal(metrics["charts/episodic_length"], 3)
    percent = 100 * metrics["charts/episodic_return"] / 22  # achievements, each rewarded with 1
    np.testing.assert_allclose(metrics["charts/percent_of_maximum"], percent, rtol=1e-6)
    rates = {name: values for name, values in metrics.items() if name.startswith("achievements/")}
    assert len(rates) == 22
    assert all(((values >= 0) & (values <= 1)).all() for values in rates.values())


ENVS_OVER_DEVICES = """
import sys, jax, numpy as np
assert len(jax.devices()) == 2
constrain, divided = jax.lax.with_sharding_constraint, []
jax.lax.with_sharding_constraint = lambda x, spec: divided.append(spec) or constrain(x, spec)
from pqn_rnn_craftax import main, parse_args
run_dir = main(parse_args(sys.argv[1:]))
print(run_dir)
print("minibatches are", "divided" if divided else "whole")
"""


def test_environments_of_one_seed_over_two_devices(tmp_path, monkeypatch):
    """A run on one device and, its environments divided, on two: equal up to the order of sums."""
    arguments = [*flags("pqn_rnn_craftax"), "--runs-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "with_sharding_constraint", None)  # minibatches stay whole
        one = rnn.main(rnn.parse_args(arguments))
    two_devices = f"{FAST_COMPILING} --xla_force_host_platform_device_count=2"
    environ = os.environ | {"XLA_FLAGS": two_devices, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", ENVS_OVER_DEVICES, *arguments]
    done = subprocess.run(arguments, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, divided = done.stdout.splitlines()[-2:]
    assert "on 2 x cpu" in done.stdout and divided == "minibatches are divided"
    tables = [pd.read_csv(Path(run_dir, "metrics.csv")) for run_dir in (one, two)]
    np.testing.assert_allclose(*tables, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "params", ["memory_length", "no_such=1", "memory_length=long", "memory_length=[1]", "="]
)
def test_bad_env_params(params):
    with pytest.raises(ValueError, match="--env-params"):
        rnn.make_env(dataclasses.replace(TINY, env_params=(params,)), 4)
