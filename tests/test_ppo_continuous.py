"""What PPO for continuous actions alone has: running statistics, a Gaussian, states of physics."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCRIPTS
from test_pql import Count, Failing

import ppo_continuous_action as ppo

TINY = ppo.Config(**SCRIPTS["ppo_continuous_action"] | {"eval_interval": 0})


class Timed(Count):
    """Rewards each of the five steps of an episode with the time, whatever the action."""

    kinds = 1

    def step_env(self, key, state, action, params):
        obs, state, _, *rest = super().step_env(key, state, action, params)
        return obs, state, state[0], *rest


if "Timed" not in gymnax.registered_envs:
    gymnax.register("Timed", Timed)


@pytest.fixture(scope="module")
def timed():
    """Two updates of 8 steps without learning: gamma 0.5, one-step advantages."""
    settings = {"env_id": "Timed", "gamma": 0.5, "gae_lambda": 0.0, "learning_rate": 0.0}
    settings |= {"clip_vloss": False, "obs_clip": 1.2, "bootstrap_on_truncation": False}
    config = dataclasses.replace(TINY, **settings)
    state, metrics = jax.jit(lambda key: ppo.make_train(config)(key, num_updates=2))(
        jax.random.key(0)
    )
    return config, state, metrics


def test_running_statistics_of_returns(timed):
    """Of the rewards so far in each episode, discounted; all environments have the same."""
    _, state, _ = timed
    returns = [sum(0.5 ** (t - k) * k for k in range(1, t + 1)) for t in [1, 2, 3, 4, 5] * 3 + [1]]
    assert state.return_statistics.count == 4 * 16
    np.testing.assert_allclose(state.return_statistics.mean, np.mean(returns), rtol=1e-5)
    np.testing.assert_allclose(state.return_statistics.var, np.var(returns), rtol=1e-5)
    np.testing.assert_allclose(state.discounted_return, returns[-1])


def test_statistics_and_rewards_in_the_loss(timed):
    """The value loss of the second update: observations by the first one's statistics, clipped."""
    config, state, metrics = timed
    times = np.array([0, 1, 2, 3, 4] * 3 + [0], np.float32)
    second, seen = times[8:], np.concatenate([times[:8], times])  # from init's rollout on
    np.testing.assert_allclose(state.statistics.mean, [seen.mean(), 0], atol=1e-6)
    np.testing.assert_allclose(state.statistics.var, [seen.var(), 0], rtol=1e-5)
    first = seen[:16]

    def values(times):
        obs = np.clip((times - first.mean()) / np.sqrt(first.var() + 1e-8), -1.2, 1.2)
        obs = jnp.stack([obs, jnp.zeros_like(obs)], axis=-1)
        return ppo.MLP(1, 1.0, config).apply(state.params["critic"], obs)[:, 0]

    rewards = (second + 1) / np.sqrt(state.return_statistics.var)
    targets = rewards + 0.5 * (second < 4) * values(second + 1)
    expected = 0.5 * np.mean((values(second) - targets) ** 2)
    np.testing.assert_allclose(metrics["losses/value_loss"][1], expected, rtol=1e-4)


def test_old_and_new_log_probabilities_agree(timed):
    """Without learning the ratios are 1, though the statistics change with each update."""
    _, _, metrics = timed
    assert (np.abs(metrics["losses/approx_kl"]) < 1e-10).all()
    np.testing.assert_allclose(metrics["losses/entropy"], 0.5 * np.log(2 * np.pi * np.e), rtol=1e-6)


def test_physics_that_fail():
    """They truncate, with a reward of 0: nothing of what they give reaches the learner."""
    config = dataclasses.replace(TINY, env_id=Failing.__name__)
    state, metrics = jax.jit(ppo.make_train(config))(jax.random.key(0))
    assert metrics["charts/physics_failures"].sum() > 0
    learned = state.params, state.env.obs, state.return_statistics, metrics["losses/grad_norm"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learned))
    assert 3 <= np.nanmin(metrics["charts/episodic_length"]) <= 5


def test_episodes_begin_afresh():
    """Each environment in a state of its own, after every end, here of a limit of 200 steps."""
    sizes = {"num_envs": 64, "num_steps": 200, "total_timesteps": 64 * 200}
    train = ppo.make_train(dataclasses.replace(TINY, **sizes))
    before = jax.jit(train.init)(jax.random.key(0))
    after, metrics = jax.jit(lambda state: train(state=state))(before)
    np.testing.assert_array_equal(metrics["charts/episodic_length"], 200)
    assert not np.asarray(after.env.length).any()
    assert len(np.unique(jnp.concatenate([before.env.obs, after.env.obs]), axis=0)) == 128


def test_evaluation_does_not_explore():
    config = dataclasses.replace(TINY, env_id=Count.__name__, learning_rate=0.0, eval_interval=1)

    def returns(initial_stddev):
        train = ppo.make_train(dataclasses.replace(config, initial_stddev=initial_stddev))
        return train(jax.random.key(0))[1]["eval/episodic_return"]

    quiet, noisy = jax.jit(jax.vmap(returns))(jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(quiet, noisy, rtol=1e-5)
