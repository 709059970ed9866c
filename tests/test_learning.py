"""Learning at real hyperparameters, with thresholds far from chance (22 on CartPole)."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from conftest import WELL

# Settings, then the lowest best evaluation and lowest mean of the later evaluations that pass. Of
# ten seeds each, the lowest were 373 and 238 (PQN), 480 and 377 (PPO), 346 and 286 (DQN).
SOLVES = {
    "pqn_cartpole": ({"total_timesteps": 100_000, "eval_interval": 4}, 300, 200),
    "ppo_cartpole": ({"total_timesteps": 100_000, "eval_interval": 12}, 400, 300),
    "dqn_cartpole": ({"total_timesteps": 150_000, "eval_interval": 10}, 280, 220),
}


@pytest.mark.parametrize("name", SOLVES)
def test_solves_cartpole(name):
    settings, best, later = SOLVES[name]
    script = importlib.import_module(name)
    train = script.make_train(script.Config(**settings))
    _, metrics = jax.jit(train, compiler_options=WELL)(jax.random.key(0))
    returns = metrics["eval/episodic_return"]
    assert jnp.nanmax(returns) > best and jnp.nanmean(returns[len(returns) // 2 :]) > later


def test_solves_pendulum():
    """A random policy returns about -1200; at this step all of eight seeds were above -165."""
    script = importlib.import_module("pql_isaac_style")
    sizes = {
        "num_envs": 128,
        "num_steps": 32,
        "batch_size": 512,
        "hidden_sizes": (128, 128),
        "buffer_size": 200_000,
    }
    settings = {
        "learning_rate": 1e-3,
        "reward_scale": 0.1,
        "total_timesteps": 53_248,
        "eval_interval": 12,
    }
    config = script.Config(env_id="Pendulum-v1", **sizes, **settings)
    _, metrics = jax.jit(script.make_train(config), compiler_options=WELL)(jax.random.key(0))
    assert metrics["eval/episodic_return"][-1] > -200


def test_ppo_solves_pendulum():
    """At this step all of eight seeds were above -180."""
    script = importlib.import_module("ppo_continuous_action")
    sizes = {"num_envs": 64, "num_steps": 64, "hidden_size": 64, "total_timesteps": 245_760}
    settings = {"learning_rate": 1e-3, "gamma": 0.95, "eval_interval": 60}
    config = script.Config(env_id="Pendulum-v1", **sizes, **settings)
    _, metrics = jax.jit(script.make_train(config), compiler_options=WELL)(jax.random.key(0))
    assert metrics["eval/episodic_return"][-1] > -210


def test_pqn_solves_pendulum():
    """At this step all of eight seeds were above -175."""
    script = importlib.import_module("pqn_continuous_action")
    sizes = {"num_envs": 64, "num_minibatches": 16, "num_critics": 1, "total_timesteps": 204_800}
    sizes |= {"actor_hidden_sizes": (64, 64), "critic_hidden_sizes": (64, 64)}
    settings = {"learning_rate": 1e-3, "gamma": 0.95, "reward_scale": 0.1, "eval_interval": 100}
    config = script.Config(env_id="Pendulum-v1", **sizes, **settings)
    _, metrics = jax.jit(script.make_train(config), compiler_options=WELL)(jax.random.key(0))
    assert metrics["eval/episodic_return"][-1] > -210


def test_remembers():
    """A bit for 20 steps: 1 for who remembers it, 0 for who guesses."""
    script = importlib.import_module("pqn_rnn_craftax")
    sizes = {"num_envs": 32, "num_minibatches": 16, "hidden_size": 128, "total_timesteps": 32_768}
    settings = {
        "learning_rate": 1e-3,
        "td_lambda": 0.95,
        "epsilon_finish": 0.01,
        "max_grad_norm": 10.0,
    }
    settings |= {
        "norm_input": False,
        "forget_bias": 3.0,
        "eval_interval": 8,
        "env_params": ("memory_length=20",),
    }
    config = script.Config(env_id="MemoryChain-bsuite", **sizes, **settings)
    _, metrics = jax.jit(script.make_train(config), compiler_options=WELL)(jax.random.key(0))
    assert metrics["eval/episodic_return"][-1] > 0.9
