"""Past the end of a run, beyond 2^31, under x64, in environments that cut by rules of their own."""

import dataclasses
import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, only
from flax import struct
from gymnax.environments import environment, spaces
from test_train import assert_equal


def test_schedules_hold_their_last_value(script, config):
    config = dataclasses.replace(config, anneal_lr=True, eval_interval=0)
    train = script.make_train(config)
    state, metrics = jax.jit(train)(jax.random.key(0))
    after, past = jax.jit(lambda state: train(state=state, num_updates=6))(state)
    assert metrics["charts/learning_rate"][-1] > 0
    np.testing.assert_array_equal(past["charts/learning_rate"], 0)
    if "charts/epsilon" in metrics:
        np.testing.assert_allclose(past["charts/epsilon"], config.epsilon_finish, rtol=1e-6)
    weights = [
        x.variables["params"] if hasattr(x, "variables") else x.params for x in (state, after)
    ]
    if script.__name__ == "pql_isaac_style":  # its statistics go on
        weights = [(x["policy"], x["critic"]) for x in weights]
    assert_equal(*weights)


def test_rate_falls_linearly(script, config):
    """The rate is what it was before the first gradient step, zero after the last one."""
    config = dataclasses.replace(config, anneal_lr=True)
    _, metrics = jax.jit(script.make_train(config))(jax.random.key(0))
    rates, num_updates = metrics["charts/learning_rate"], config.num_updates
    first = -(-getattr(config, "learning_starts", 0) // 32)
    expected = 1 - np.maximum(np.arange(num_updates) - first, 0) / (num_updates - first)
    np.testing.assert_allclose(rates, config.learning_rate * expected, rtol=1e-5)


BILLIONS = {
    "pqn_cartpole": {"num_envs": 4, "num_steps": 8, "num_minibatches": 32, "num_epochs": 4},
    "pqn_minatar": {"num_envs": 4, "num_steps": 8, "num_minibatches": 32, "num_epochs": 4},
    "ppo_cartpole": {"num_envs": 4, "num_steps": 8, "num_minibatches": 16, "num_epochs": 4},
    "pqn_rnn_craftax": {"num_envs": 4, "num_steps": 8, "num_minibatches": 4, "num_epochs": 4},
    "dqn_cartpole": {"num_envs": 4, "num_steps": 1, "target_interval": 8},
    "pql_isaac_style": {"num_envs": 4, "num_steps": 8},
}


def test_two_billion_steps(script, config):
    """Near the end of the longest run that is accepted, counters and rates are right."""
    sizes = BILLIONS[script.__name__] | {"total_timesteps": 2**31 - 1, "eval_interval": 0}
    config = dataclasses.replace(config, anneal_lr=True, **sizes)
    train = script.make_train(config)
    state, _ = train(jax.random.key(0), num_updates=0)
    for number in (20_000_000, config.num_updates - 1):
        _, metrics = train(state=state._replace(update=jnp.int32(number)), num_updates=1)
        warmup = getattr(config, "warmup_timesteps", 0)
        assert int(metrics["global_step"][0]) == warmup + (number + 1) * config.steps_per_update
        rate = config.learning_rate * (1 - number / config.num_updates)
        error = abs(float(metrics["charts/learning_rate"][0]) - rate)
        assert error < 2e-7 * config.learning_rate


@struct.dataclass
class RingParams(environment.EnvParams):
    max_steps_in_episode: int = 1000


class Ring(environment.Environment):
    """Five places; actions go on, or stay; entering place 4 is rewarded; cut after two steps."""

    limit = 2
    num_actions = 2
    default_params = RingParams()
    action_space = staticmethod(lambda params: spaces.Discrete(2))
    observation_space = staticmethod(lambda params: spaces.Box(0, 1, (5,), jnp.float32))

    def step_env(self, key, state, action, params):
        time, place = state
        new = (place + 1 - action) % 5
        reward = ((new == 4) & (place != 4)).astype(jnp.float32)
        return jax.nn.one_hot(new, 5), (time + 1, new), reward, jnp.bool_(False), {}

    def reset_env(self, key, params):
        place = jax.random.randint(key, (), 0, 5)
        return jax.nn.one_hot(place, 5), (jnp.int32(0), place)

    def is_truncated(self, state, params):
        return state[0] >= self.limit


class LongRing(Ring):
    limit = 6


class Endless(Ring):
    """Its parameters have no time limit."""

    default_params = struct.dataclass(type("NoParams", (), {"__annotations__": {}}))()


for env in (Ring, LongRing, Endless):
    if env.__name__ not in gymnax.registered_envs:
        gymnax.register(env.__name__, env)


@pytest.mark.parametrize("script", ["pqn_cartpole"], indirect=True)
@pytest.mark.parametrize("env_id, num_steps", [("Ring", 16), ("LongRing", 4)])
def test_truncation_by_a_rule_of_its_own(script, env_id, num_steps):
    """The value of each place, 0.8^(4-p) / (1 - 0.8^5), though many steps, or a few, are cut."""
    sizes = {"num_envs": 32, "num_steps": num_steps, "num_minibatches": 8, "num_epochs": 2}
    settings = {"gamma": 0.8, "td_lambda": 0.0, "learning_rate": 3e-3, "reward_scale": 1.0}
    config = script.Config(
        env_id=env_id,
        hidden_size=32,
        total_timesteps=400 * 512,
        eval_interval=0,
        **sizes,
        **settings,
    )
    state, _ = jax.jit(script.make_train(config))(jax.random.key(0))
    values = script.QNetwork(2, config).apply(state.variables, jnp.eye(5)).max(-1)
    np.testing.assert_allclose(values, 0.8 ** jnp.array([3, 2, 1, 0, 4]) / (1 - 0.8**5), atol=0.002)


@pytest.mark.parametrize("script", ["pqn_cartpole", "ppo_cartpole", "dqn_cartpole"], indirect=True)
def test_environment_without_a_time_limit(script, config):
    config = dataclasses.replace(config, env_id="Endless")
    with pytest.raises(ValueError, match="max_steps_in_episode"):
        script.make_train(config)
    _, metrics = script.make_train(dataclasses.replace(config, eval_interval=0))(jax.random.key(0))
    assert np.isfinite(metrics["losses/grad_norm"][-1])


@pytest.mark.parametrize("script", ["pqn_rnn_craftax"], indirect=True)
def test_recurrent_environment_without_a_time_limit(script, config):
    with pytest.raises(ValueError, match="max_steps_in_episode"):
        script.make_train(dataclasses.replace(config, env_id="Endless"))


def test_first_state_can_be_donated(script, config):
    """Eager or jitted, it holds no buffer twice."""
    config = dataclasses.replace(config, eval_interval=0)
    train = script.make_train(config)
    program = jax.jit(lambda state: train(state=state, num_updates=1), donate_argnums=0)
    results = [program(init(jax.random.key(0))) for init in (train.init, jax.jit(train.init))]
    for _, metrics in results:
        assert np.isfinite(metrics["charts/learning_rate"]).all()


@only("learning_starts")
def test_learning_that_never_starts_is_refused(script, config):
    for learning_starts in (10**6, 12 * 32):
        with pytest.raises(ValueError, match=f"--learning-starts is {learning_starts}"):
            dataclasses.replace(config, learning_starts=learning_starts)
    dataclasses.replace(config, learning_starts=11 * 32)


CANNOT_LEARN = [
    ("ppo_cartpole", {"num_minibatches": 32}, "--norm-adv"),
    ("pqn_cartpole", {"num_minibatches": 32, "norm": "batch_norm"}, "--norm batch_norm"),
    ("pqn_minatar", {"num_minibatches": 32, "norm": "batch_norm"}, "--norm batch_norm"),
    *(
        (name, {"max_grad_norm": 0.0}, "--max-grad-norm")
        for name in SCRIPTS
        if name != "dqn_cartpole"
    ),
]


@pytest.mark.parametrize("script, settings, flag", CANNOT_LEARN, indirect=["script"])
def test_settings_that_cannot_learn_are_refused(script, config, settings, flag):
    with pytest.raises(ValueError, match=flag):
        dataclasses.replace(config, **settings)


@pytest.mark.parametrize("script", ["pqn_rnn_craftax"], indirect=True)
@pytest.mark.parametrize("number", ["-3", "0", "1.5"])
def test_counts_of_an_environment_are_positive(script, config, number):
    with pytest.raises(ValueError, match=f"memory_length={number}"):
        script.make_train(dataclasses.replace(config, env_params=(f"memory_length={number}",)))


LOGGED = ["pqn_cartpole", "ppo_cartpole", "dqn_cartpole", "pqn_rnn_craftax"]


@pytest.mark.parametrize("script", LOGGED, indirect=True)
def test_lengths_whose_sum_does_not_fit(script, config):
    """Four episodes of 2^30 steps and those of two that follow them."""
    train = script.make_train(dataclasses.replace(config, env_id="Ring", eval_interval=0))
    state, _ = train(jax.random.key(0), num_updates=0)
    env_state = state.env_state.replace(episode_lengths=jnp.full(4, 2**30))
    _, metrics = train(state=state._replace(env_state=env_state), num_updates=1)
    np.testing.assert_allclose(metrics["charts/episodic_length"][0], (2**30 + 3 * 2) / 4, rtol=1e-3)


X64 = """
import importlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import jax
from conftest import SCRIPTS
for name, settings in SCRIPTS.items():
    script = importlib.import_module(name)
    train = script.make_train(script.Config(**settings))
    state, metrics = jax.jit(lambda key: train(key, num_updates=4))(jax.random.key(0))
    learner = state.params, getattr(state, "opt_state", ())
    floats = {x.dtype.name for x in jax.tree.leaves(learner)}
    assert floats <= {"float32", "int32"}, (name, floats)
    learned = {k: v.dtype.name for k, v in metrics.items() if k != "charts/physics_failures"}
    assert set(learned.values()) <= {"float32", "int32"}, (name, learned)
"""


def test_x64(monkeypatch):
    """With JAX_ENABLE_X64 the learners compute in float32, as without it."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    done = subprocess.run([sys.executable, "-c", X64, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
