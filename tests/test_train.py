"""train: pure, exact in chunks, the same under vmap, with hyperparameters that may be traced."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCRIPTS, only, warmup
from flax import struct
from gymnax.environments import environment, spaces


def assert_equal(first, second, **tolerance):
    """Two pytrees, bit for bit or within a tolerance; typed keys and NaN included."""
    first, second = (
        jax.tree.map(
            lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
            tree,
        )
        for tree in (first, second)
    )
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole_run(script, config):
    return jax.jit(script.make_train(config))(jax.random.key(3))


def test_same_seed_same_bits(script, config, whole_run):
    assert_equal(jax.jit(script.make_train(config))(jax.random.key(3)), whole_run)


@pytest.mark.parametrize("sizes", [(4, 8), (6, 6), (2, 7, 3)])
def test_chunks_equal_one_run(script, config, whole_run, sizes):
    train = script.make_train(config)
    state, metrics = jax.jit(lambda key: train(key, num_updates=sizes[0]))(jax.random.key(3))
    parts = [metrics]
    for size in sizes[1:]:
        state, metrics = jax.jit(lambda state, size=size: train(state=state, num_updates=size))(
            state
        )
        parts.append(metrics)
    assert_equal((state, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)), whole_run)


def test_vmapped_seed_equals_the_seed_alone(script, config):
    def train(key):
        return script.make_train(config)(key, num_updates=3)

    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    states, metrics = jax.jit(jax.vmap(train))(keys)
    for i in range(3):
        alone = jax.jit(train)(keys[i])
        together = jax.tree.map(lambda x, i=i: x[i], (states, metrics))
        assert_equal(together[0][0], alone[0][0], atol=1e-5)  # the parameters
        assert_equal(together[1], alone[1], atol=1e-4)


def test_traced_hyperparameters(script, config):
    """Every float that is a hyperparameter at once, two values of each in one program.

    For half of the run: two programs round differently, and a thousand gradient steps make much of
    little.
    """
    values = {
        "learning_rate": [1e-2, 1e-3],
        "gamma": [0.9, 0.99],
        "td_lambda": [0.0, 0.8],
        "gae_lambda": [0.0, 0.8],
        "clip_coef": [0.05, 0.3],
        "ent_coef": [0.0, 0.1],
        "vf_coef": [0.1, 1.0],
        "tau": [0.2, 1.0],
        "epsilon_start": [0.5, 1.0],
        "epsilon_finish": [0.0, 0.5],
        "epsilon_decay": [0.1, 1.0],
        "max_grad_norm": [0.01, 10.0],
        "reward_scale": [0.1, 1.0],
        "forget_bias": [0.0, 1.0],
        "weight_decay": [0.0, 0.1],
        "stddev_min": [0.0, 0.1],
        "stddev_max": [0.5, 1.0],
        "target_noise": [0.1, 0.8],
        "target_noise_clip": [0.1, 0.3],
        "obs_clip": [1.0, 5.0],
        "value_bound": [10.0, 20.0],
    }
    floats = {field.name for field in dataclasses.fields(config) if field.type is float}
    assert floats - set(values) <= {"checkpoint_interval", "sticky_action_prob", "resets_per_step"}
    values = {name: pair for name, pair in values.items() if name in floats}

    def run(hyperparameters):
        train = script.make_train(dataclasses.replace(config, **hyperparameters))
        return train(jax.random.key(0), num_updates=config.num_updates // 2)

    _, swept = jax.jit(jax.vmap(run))({name: jnp.array(pair) for name, pair in values.items()})
    for i in range(2):
        _, alone = jax.jit(lambda i=i: run({name: pair[i] for name, pair in values.items()}))()
        assert_equal(jax.tree.map(lambda x, i=i: x[i], swept), alone, rtol=1e-3, atol=1e-4)


def test_metrics(script, config, whole_run):
    _, metrics = whole_run
    number = np.arange(1, config.num_updates + 1)
    assert {value.shape for value in metrics.values()} == {(config.num_updates,)}
    np.testing.assert_array_equal(metrics["global_step"], warmup(script.__name__) + 32 * number)
    np.testing.assert_array_equal(
        np.isnan(metrics["eval/episodic_return"]), number % config.eval_interval != 0
    )
    for name in ("learning_rate", "episodic_return", "episodic_length"):
        assert f"charts/{name}" in metrics
    losses = {name: values for name, values in metrics.items() if name.startswith("losses/")}
    assert "losses/grad_norm" in losses
    first = getattr(config, "learning_starts", 0) // 32
    for values in losses.values():
        assert np.isfinite(values[first:]).all() and np.isnan(values[:first]).all()
    if hasattr(config, "epsilon_start"):
        np.testing.assert_allclose(metrics["charts/epsilon"][0], config.epsilon_start)
        np.testing.assert_allclose(metrics["charts/epsilon"][-1], config.epsilon_finish, rtol=1e-6)
    np.testing.assert_allclose(metrics["charts/learning_rate"][0], config.learning_rate)
    assert 0 < metrics["charts/learning_rate"][-1] <= metrics["charts/learning_rate"][0]


def test_learning_rate_falls_to_zero(script, config):
    _, metrics = jax.jit(script.make_train(dataclasses.replace(config, anneal_lr=True)))(
        jax.random.key(0)
    )
    rates = metrics["charts/learning_rate"]
    assert (np.diff(rates) <= 0).all() and 0 < rates[-1] < 0.3 * config.learning_rate


def test_last_update_is_evaluated(script, config):
    config = dataclasses.replace(config, eval_interval=5)
    _, metrics = jax.jit(script.make_train(config))(jax.random.key(0))
    np.testing.assert_array_equal(
        np.flatnonzero(~np.isnan(metrics["eval/episodic_return"])), [4, 9, 11]
    )


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_evaluation_stays_a_branch_under_vmap(script, config):
    train = script.make_train(config)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    states, _ = jax.vmap(lambda key: train(key, num_updates=0))(keys)

    def unbatched(states):
        return jax.vmap(
            lambda state: train(state=state._replace(update=states.update[0]), num_updates=4)
        )(states)

    def batched(states):
        return jax.vmap(lambda state: train(state=state, num_updates=4))(states)

    assert "cond" in list(primitives(jax.make_jaxpr(jax.vmap(train))(keys).jaxpr))
    assert "cond" in list(primitives(jax.make_jaxpr(unbatched)(states).jaxpr))
    assert "cond" not in list(primitives(jax.make_jaxpr(batched)(states).jaxpr))


def test_no_callback(script, config):
    names = set(primitives(jax.make_jaxpr(script.make_train(config))(jax.random.key(0)).jaxpr))
    assert "scan" in names and not [name for name in names if "callback" in name]


ENVIRONMENTS = [
    "Acrobot-v1", "MountainCar-v0", "MemoryChain-bsuite", "Catch-bsuite", "DeepSea-bsuite",
    "UmbrellaChain-bsuite", "DiscountingChain-bsuite", "BernoulliBandit-misc", "Breakout-MinAtar",
    "FourRooms-misc", "MetaMaze-misc",
    "MountainCarContinuous-v0", "Reacher-misc",
]  # fmt: skip
GAMES = ["Asterix-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar"]
# PPO and DQN make their environments in the lines of pqn_cartpole.py: half of them each.
SOME = {"pqn_minatar": GAMES, "ppo_cartpole": ENVIRONMENTS[::2], "dqn_cartpole": ENVIRONMENTS[1::2]}


@pytest.mark.parametrize(
    "script, env_id",
    [(name, env_id) for name in SCRIPTS for env_id in SOME.get(name, ENVIRONMENTS)],
    indirect=["script"],
)
def test_environments(script, config, env_id):
    config = dataclasses.replace(config, env_id=env_id, total_timesteps=4 * 32, eval_interval=0)
    try:
        train = script.make_train(config)
    except ValueError as error:
        assert "spaces" in str(error)
        pytest.skip(str(error))
    _, metrics = jax.jit(train)(jax.random.key(0))
    assert np.isfinite(metrics["losses/grad_norm"][-1])


@only("sticky_action_prob", "max_steps_in_episode")
def test_flags_of_the_environment(script, config):
    """A time limit of 3 steps ends every episode; actions that all stick are all the first."""
    _, metrics = script.make_train(dataclasses.replace(config, max_steps_in_episode=3))(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(metrics["charts/episodic_length"], 3)
    env, params = script.make_env(dataclasses.replace(config, sticky_action_prob=1.0))
    _, state = env.reset(jax.random.key(0), params)
    outcomes = [env.step(jax.random.key(1), state, action, params)[0] for action in range(3)]
    assert_equal(outcomes[0], outcomes[1])
    assert_equal(outcomes[0], outcomes[2])


@struct.dataclass
class ClockParams(environment.EnvParams):
    max_steps_in_episode: int = 5


class Clock(environment.Environment):
    """Rewards every step with 1 and never terminates; only the limit of 5 steps cuts it."""

    num_actions = 2
    default_params = ClockParams()
    action_space = staticmethod(lambda params: spaces.Discrete(2))
    observation_space = staticmethod(lambda params: spaces.Box(0, 1, (10, 10, 1), jnp.float32))

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        return jnp.ones((10, 10, 1)), state, jnp.float32(1), jnp.bool_(False), {}

    def reset_env(self, key, params):
        return jnp.ones((10, 10, 1)), environment.EnvState(time=jnp.int32(0))


class ContinuousClock(Clock):
    action_space = staticmethod(lambda params: spaces.Box(-1, 1, (1,), jnp.float32))


def clock(script):
    """A Clock with the kind of actions that the script learns."""
    continuous = script.__name__ == "pql_isaac_style"
    env_id = "ContinuousClock" if continuous else "Clock"
    if env_id not in gymnax.registered_envs:
        gymnax.register(env_id, ContinuousClock if continuous else Clock)
    return env_id


@pytest.mark.parametrize("bootstrap, trace", [(True, 0.0), (True, 0.9), (False, 0.9)])
def test_truncation_is_not_an_end(script, config, bootstrap, trace, monkeypatch):
    """All states are the same: a bootstrapped value is 1 / (1 - gamma), however short episodes."""
    if hasattr(script, "GAMES"):
        monkeypatch.setattr(script, "GAMES", ("Clock",))
    settings = {
        "total_timesteps": 32 * 800,
        "eval_interval": 0,
        "gamma": 0.8,
        "learning_rate": 1e-2,
        "anneal_lr": True,
    }
    settings |= {"td_lambda": trace, "gae_lambda": trace, "reward_scale": 1.0, "clip_vloss": False}
    settings = {name: value for name, value in settings.items() if hasattr(config, name)}
    config = dataclasses.replace(
        config, env_id=clock(script), bootstrap_on_truncation=bootstrap, **settings
    )
    state, metrics = jax.jit(script.make_train(config))(jax.random.key(0))
    if "losses/q_values" in metrics:
        value = metrics["losses/q_values"][-1]
    else:
        value = script.MLP(1, 1.0, config).apply(state.params["critic"], jnp.ones(100))[0]
    if bootstrap:
        np.testing.assert_allclose(value, 1 / (1 - 0.8), atol=0.1)
    else:
        assert value < 4


def test_truncation_flag_changes_nothing_without_truncation(script, config):
    runs = [
        jax.jit(script.make_train(dataclasses.replace(config, bootstrap_on_truncation=flag)))(
            jax.random.key(0)
        )
        for flag in (True, False)
    ]
    # Where steps have a weight in the loss, the compiler may sum in another order if it knows that
    # all count.
    assert_equal(*runs, **({"atol": 1e-5} if hasattr(script, "rollout_targets") else {}))


@only("norm")
@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_norms(script, config, norm):
    train = script.make_train(dataclasses.replace(config, norm=norm))
    before, _ = train(jax.random.key(0), num_updates=0)
    after, metrics = jax.jit(lambda state: train(state=state, num_updates=2))(before)
    assert ("batch_stats" in after.variables) == (norm == "batch_norm")
    assert np.isfinite(metrics["losses/td_loss"]).all()
    if norm == "batch_norm":
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.variables, after.variables)
        assert all(jax.tree.leaves(moved["batch_stats"]))


@only("double_q")
def test_double_q_flag(script, config):
    """It changes the targets, but not before there is anything to learn from."""
    runs = [
        jax.jit(script.make_train(dataclasses.replace(config, double_q=flag, learning_rate=1e-2)))(
            jax.random.key(0)
        )
        for flag in (False, True)
    ]
    losses = np.array([metrics["losses/td_loss"] for _, metrics in runs])
    warm_up = config.learning_starts // 32
    assert (
        np.isnan(losses[:, :warm_up]).all() and (losses[0, warm_up:] != losses[1, warm_up:]).any()
    )


@only("replay_insert")
def test_replay_is_written_in_place(script, config):
    """The compiled run of many updates needs no second copy of the replay, alone or under vmap."""
    config = dataclasses.replace(config, buffer_size=400_000, eval_interval=0)
    train = script.make_train(config)

    def proceed(state):
        return train(state=state, num_updates=4)

    state = jax.eval_shape(train.init, jax.random.key(0))
    replay = sum(x.size * x.dtype.itemsize for x in state.replay)
    memory = jax.jit(proceed, donate_argnums=0).lower(state).compile().memory_analysis()
    assert memory.alias_size_in_bytes > replay and memory.temp_size_in_bytes < replay / 10
    states = jax.eval_shape(jax.vmap(train.init), jax.vmap(jax.random.key)(jnp.arange(3)))
    together = jax.vmap(lambda state: proceed(state._replace(update=jnp.int32(2))))
    memory = jax.jit(together, donate_argnums=0).lower(states).compile().memory_analysis()
    assert memory.alias_size_in_bytes > 3 * replay and memory.temp_size_in_bytes < 3 * replay / 10
