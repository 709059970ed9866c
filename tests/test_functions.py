"""The numbered equations, against slow and obvious NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCRIPTS
from hypothesis import given, settings
from hypothesis import strategies as st


def slow_lambda_returns(rewards, next_values, terminated, truncated, gamma, td_lambda):
    """The mixture of n-step returns that the lambda-return is, written out for every step."""
    num_steps, num_envs = rewards.shape
    returns = np.zeros((num_steps, num_envs))
    for env in range(num_envs):
        for t in range(num_steps):
            n_step_returns, total, discount = [], 0.0, 1.0
            for k in range(t, num_steps):
                total += discount * rewards[k, env]
                discount *= gamma
                value = 0.0 if terminated[k, env] else next_values[k, env]
                n_step_returns.append(total + discount * value)
                if terminated[k, env] or truncated[k, env]:
                    break
            last = n_step_returns.pop()
            weights = [(1 - td_lambda) * td_lambda**n for n in range(len(n_step_returns))]
            mixed = sum(weight * value for weight, value in zip(weights, n_step_returns, strict=True))
            returns[t, env] = mixed + td_lambda ** len(n_step_returns) * last
    return returns


@given(
    num_steps=st.integers(1, 12),
    num_envs=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    ends=st.sampled_from([0.0, 0.1, 0.5]),
    gamma=st.floats(0, 1),
    td_lambda=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_lambda_returns(script, num_steps, num_envs, seed, ends, gamma, td_lambda):
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, num_steps, num_envs)).astype(np.float32)
    terminated, truncated = rng.random((2, num_steps, num_envs)) < ends  # at times both at once
    arguments = rewards, next_values, terminated, truncated, gamma, td_lambda
    np.testing.assert_allclose(
        script.lambda_returns(*map(jnp.asarray, arguments)), slow_lambda_returns(*arguments), atol=1e-4
    )


def test_lambda_returns_against_rlax(script):
    rlax = pytest.importorskip("rlax")
    rewards, next_values = jax.random.normal(jax.random.key(0), (2, 20, 3))
    terminated = jax.random.bernoulli(jax.random.key(1), 0.2, (20, 3))
    ours = script.lambda_returns(rewards, next_values, terminated, jnp.zeros_like(terminated), 0.9, 0.7)
    theirs = jax.vmap(rlax.lambda_returns, in_axes=(1, 1, 1, None), out_axes=1)
    np.testing.assert_allclose(ours, theirs(rewards, 0.9 * ~terminated, next_values, 0.7), atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(60_000,), (30, 2_000)])
def test_epsilon_greedy_frequencies(script, epsilon, shape):
    q_values = jnp.broadcast_to(jnp.array([0.0, 2.0, 1.0]), (*shape, 3))
    actions = script.epsilon_greedy(jax.random.key(0), q_values, epsilon)
    assert actions.shape == shape and actions.dtype == jnp.int32
    frequencies = np.bincount(actions.ravel(), minlength=3) / actions.size
    np.testing.assert_allclose(frequencies, [epsilon / 3, 1 - epsilon * 2 / 3, epsilon / 3], atol=0.01)


def test_epsilon_greedy_is_greedy_for_each_row(script):
    q_values = jax.random.normal(jax.random.key(0), (5, 7, 4))
    np.testing.assert_array_equal(script.epsilon_greedy(jax.random.key(1), q_values, 0.0), q_values.argmax(-1))


def test_every_script_is_tested():
    from conftest import ROOT

    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
