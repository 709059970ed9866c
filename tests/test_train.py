"""train: pure, exact in chunks, the same under vmap, with hyperparameters that may be traced."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import LEARNERS, PURE, PURE_LEARNERS, floats, only, warmup
from flax import struct
from gymnax.environments import environment, spaces
from jax.extend.core import Var

KEYS = jax.vmap(jax.random.key)(jnp.array([2, 3, 4]))


def assert_equal(first, second, **tolerance):
    """Two pytrees, bit for bit or within a tolerance; typed keys and NaN included."""

    def comparable(path, x):
        if "handle" in jax.tree_util.keystr(path):  # the address of an emulator
            return jnp.zeros_like(x)
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    first, second = (jax.tree.map_with_path(comparable, tree) for tree in (first, second))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


OTHER_VALUES = {
    "learning_rate": 1e-2, "gamma": 0.9, "td_lambda": 0.1, "gae_lambda": 0.1, "clip_coef": 0.05,
    "ent_coef": 0.1, "vf_coef": 0.1, "tau": 0.3, "epsilon_start": 0.5, "epsilon_finish": 0.4,
    "epsilon_decay": 0.9, "max_grad_norm": 0.01, "reward_scale": 0.5, "forget_bias": 3.0,
    "weight_decay": 0.1, "stddev_min": 0.2, "stddev_max": 0.5, "target_noise": 0.1,
    "target_noise_clip": 0.1, "obs_clip": 1.0, "value_bound": 20.0, "alpha_learning_rate": 1e-2,
    "initial_stddev": 0.5, "stddev_start": 0.3, "stddev_finish": 0.8, "stddev_decay": 0.5,
    "penalty_threshold": 0.01, "penalty_coef": 1.0, "shaping_decay": 0.1,
}  # fmt: skip


def make_train_of(script, config, values, **changes):
    return script.make_train(dataclasses.replace(config, **values, **changes))


@pytest.fixture(scope="module")
def values(config):
    """Every float that is a hyperparameter: the programs below take them as arguments."""
    assert floats(config) <= set(OTHER_VALUES)
    return {name: getattr(config, name) for name in floats(config)}


@pytest.fixture(scope="module")
def run(script, config, values):
    """The whole run in one program, a function of a key."""

    def train(key, values):
        return make_train_of(script, config, values)(key)

    program = jax.jit(train)
    return lambda key: program(key, values)


@pytest.fixture(scope="module")
def chunk(script, config):
    """Four updates of a state, which is donated."""

    def four_updates(state, values):
        return make_train_of(script, config, values)(state=state, num_updates=4)

    return jax.jit(four_updates, donate_argnums=0)


@pytest.fixture(scope="module")
def init(script, config):
    """The first state."""

    def start(key, values):
        return make_train_of(script, config, values).init(key)

    return jax.jit(start)


@pytest.fixture(scope="module")
def chunks(init, chunk, values):
    """States and metrics of seed 3 after each of five chunks: the run, and eight updates more."""
    state, results = init(KEYS[1], values), []
    for _ in range(5):
        state, metrics = chunk(state, values)
        results.append((jax.tree.map(jnp.copy, state), metrics))
    return results


@pytest.mark.parametrize("script", PURE_LEARNERS, indirect=True)
def test_same_seed_same_bits(run):
    first = run(KEYS[1])
    assert_equal(first, run(KEYS[1]))
    with pytest.raises(AssertionError):
        assert_equal(first[0][0], run(KEYS[2])[0][0])


@pytest.mark.parametrize("script", LEARNERS, indirect=True)
def test_chunks_equal_one_run(run, chunks):
    state, metrics = run(KEYS[1])
    parts = [metrics for _, metrics in chunks[:3]]
    assert_equal(
        (chunks[2][0], jax.tree.map(lambda *x: jnp.concatenate(x), *parts)), (state, metrics)
    )


def types(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.parametrize("script", PURE_LEARNERS, indirect=True)
def test_checkpoint_is_the_state(chunks, tmp_path):
    """Every leaf and its type: what is trained after it is the same."""
    state, seconds = chunks[1][0], {"run_seconds": 1.5}
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(8, args=ocp.args.StandardSave((state, seconds)))
    shapes = jax.eval_shape(lambda: state)
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        saved = checkpoints.restore(8, args=ocp.args.StandardRestore((shapes, seconds)))
    assert_equal(saved[0], state)
    assert saved[1] == seconds and types(saved[0]) == types(state)


@pytest.mark.parametrize("script", PURE, indirect=True)
def test_first_state_holds_no_buffer_twice(script, config):
    """Made outside of jit it can be donated, too."""
    leaves = jax.make_jaxpr(script.make_train(config).init)(KEYS[0]).jaxpr.outvars
    computed = [x for x in leaves if isinstance(x, Var)]  # constants are new arrays each time
    assert len(set(computed)) == len(computed)


@pytest.mark.parametrize("n_steps", [None, 1])
def test_no_leaf_of_the_state_is_empty(script, config, n_steps):
    """orbax refuses to save an empty array."""
    if n_steps and not hasattr(config, "n_steps"):
        pytest.skip("it has no n-step targets")
    config = dataclasses.replace(config, n_steps=n_steps) if n_steps else config
    train = script.make_train(config)
    state = jax.eval_shape(train.init, KEYS[0])
    after, _ = jax.eval_shape(lambda state: train(state=state), state)
    for path, leaf in jax.tree.leaves_with_path((state, after)):
        assert leaf.size, jax.tree_util.keystr(path)


@pytest.mark.parametrize("script", LEARNERS, indirect=True)
def test_past_the_end(script, config, chunks):
    """Schedules hold their last value, and nothing is learned any more."""
    for _, metrics in chunks[3:]:
        np.testing.assert_array_equal(metrics["charts/learning_rate"], 0)
        if "charts/epsilon" in metrics:
            np.testing.assert_allclose(metrics["charts/epsilon"], config.epsilon_finish, rtol=1e-6)
    before, after = chunks[2][0], chunks[4][0]
    if hasattr(script, "Statistics"):  # those of the observations go on
        weights = [state.params | {"statistics": ()} for state in (before, after)]
    elif hasattr(before, "variables"):
        weights = [state.variables["params"] for state in (before, after)]
    else:
        weights = [state.params for state in (before, after)]
    assert_equal(*weights)


@pytest.mark.parametrize("script", PURE_LEARNERS, indirect=True)
def test_vmapped_over_seeds_and_hyperparameters(script, config, init, chunk, values):
    """Three seeds, and one with other values of every float, in one program: as each run alone.

    Only some updates, as programs round differently and gradient steps make much of it; without
    evaluation and, where nothing is truncated, without bootstrapping, which changes nothing.
    """
    others = {name: OTHER_VALUES[name] for name in values}
    changes = {"bootstrap_on_truncation": False, "eval_interval": 0}

    def start(key, values):
        return make_train_of(script, config, values, **changes)(key, num_updates=4)

    cases = [(KEYS[0], values), (KEYS[1], values), (KEYS[2], values), (KEYS[1], others)]
    together = jax.jit(jax.vmap(start))(*jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for i, (key, own) in enumerate(cases):
        state, metrics = chunk(init(key, own), own)
        metrics = {name: x for name, x in metrics.items() if name in together[1]}  # no evaluations
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        assert_equal(mine[0].params, state.params, atol=1e-4)
        assert_equal(mine[1], metrics, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script", LEARNERS, indirect=True)
def test_every_hyperparameter_matters(init, chunk, values):
    """Another value of any of them gives other losses or returns, not only another schedule."""
    schedules = {"charts/learning_rate", "charts/epsilon"}
    base = values | {"learning_rate": 3e-3}
    _, expected = chunk(init(KEYS[1], base), base)
    elsewhere = {"value_bound", "alpha_learning_rate", "shaping_decay"}  # test_pql.py, test_vdn.py
    for name in set(values) - elsewhere:
        own = base | {name: OTHER_VALUES[name]}
        _, metrics = chunk(init(KEYS[1], own), own)
        learned = set(metrics) - schedules
        same = [np.array_equal(metrics[x], expected[x], equal_nan=True) for x in learned]
        assert not all(same), f"{name} changes nothing"


@pytest.mark.parametrize("script", LEARNERS, indirect=True)
def test_metrics(script, config, run):
    _, metrics = run(KEYS[1])
    number = np.arange(1, config.num_updates + 1)
    assert {value.shape for value in metrics.values()} == {(config.num_updates,)}
    np.testing.assert_array_equal(metrics["global_step"], warmup(script.__name__) + 32 * number)
    evaluated = ~np.isnan(metrics["eval/episodic_return"])  # every fifth update, and the last one
    np.testing.assert_array_equal(np.flatnonzero(evaluated), [4, 9, 11])
    for name in ("learning_rate", "episodic_return", "episodic_length"):
        assert f"charts/{name}" in metrics
    losses = {name: values for name, values in metrics.items() if name.startswith("losses/")}
    assert "losses/grad_norm" in losses
    first = getattr(config, "learning_starts", 0) // 32
    for name, values in losses.items():
        before = 0 if name == "losses/grad_norm" else np.nan  # a gradient of NaN would be a fault
        assert np.isfinite(values[first:]).all()
        np.testing.assert_array_equal(values[:first], before)
    if hasattr(config, "epsilon_start"):
        np.testing.assert_allclose(metrics["charts/epsilon"][0], config.epsilon_start)
        np.testing.assert_allclose(metrics["charts/epsilon"][-1], config.epsilon_finish, rtol=1e-6)
    # The rate before the first gradient step is whole, after the last one it would be zero.
    remaining = 1 - np.maximum(number - 1 - first, 0) / (config.num_updates - first)
    expected = config.learning_rate * remaining
    np.testing.assert_allclose(metrics["charts/learning_rate"], expected, rtol=1e-5)


def test_no_key_is_used_twice(script, config):
    """JAX follows every key through the whole program, and raises KeyReuseError."""
    with jax.debug_key_reuse(True):
        jax.jit(script.make_train(config)).lower(jax.random.key(0))


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("script", PURE, indirect=True)
def test_no_callback_and_evaluation_stays_a_branch_under_vmap(script, config):
    train = script.make_train(config)
    states = jax.eval_shape(jax.vmap(train.init), KEYS)

    def over_keys(keys):
        return jax.vmap(train)(keys)

    def unbatched(states):
        return jax.vmap(lambda state: train(state=state._replace(update=jnp.int32(3))))(states)

    def batched(states):
        return jax.vmap(lambda state: train(state=state))(states)

    cases = [(over_keys, KEYS), (unbatched, states)]
    cases += [(batched, states)] if script.__name__ == "pqn_cartpole" else []
    for function, argument in cases:
        jaxpr = jax.make_jaxpr(function)(argument).jaxpr
        names = {equation.primitive.name for equation in equations(jaxpr)}
        assert ("cond" in names) == (function is not batched)
        assert "scan" in names and not [name for name in names if "callback" in name]


def test_every_epoch_is_shuffled_anew(script, config):
    """One sort of random bits for each epoch, or none where there are none."""
    jaxpr = jax.make_jaxpr(script.make_train(config))(KEYS[0]).jaxpr
    sorts = {x.invars[0].aval.shape for x in equations(jaxpr) if x.primitive.name == "sort"}
    of_whole_envs = script.__name__ in ("pqn_rnn_craftax", "pqn_vdn_jaxmarl")
    size = config.num_envs if of_whole_envs else 32
    epochs = getattr(config, "num_epochs", None)
    assert (epochs, size) in sorts if epochs else not sorts


ENVIRONMENTS = [
    "MemoryChain-bsuite", "Acrobot-v1", "DeepSea-bsuite", "DiscountingChain-bsuite",
    "BernoulliBandit-misc", "Breakout-MinAtar", "FourRooms-misc",
]  # fmt: skip
CONTINUOUS = ["MountainCarContinuous-v0", "Reacher-misc"]
GAMES = ["Asterix-MinAtar", "Freeway-MinAtar", "SpaceInvaders-MinAtar"]
# Others make their environments in the lines of pqn_cartpole.py or of pql_isaac_style.py.
TRAINED_ON = {"pqn_cartpole": ENVIRONMENTS, "pqn_rnn_craftax": ENVIRONMENTS[::3]}
TRAINED_ON |= {"pqn_minatar": GAMES, "pql_isaac_style": CONTINUOUS[:1]}
TRAINED_ON |= dict.fromkeys(["ppo_continuous_action", "pqn_continuous_action"], CONTINUOUS[1:])


@pytest.mark.parametrize(
    "script, env_id",
    [(name, env_id) for name, env_ids in TRAINED_ON.items() for env_id in env_ids],
    indirect=["script"],
)
def test_environments(script, config, env_id):
    """Training traces, with shapes and types that fit; compiling it for each would take minutes."""
    train = script.make_train(dataclasses.replace(config, env_id=env_id))
    _, metrics = jax.eval_shape(train, KEYS[0])
    assert metrics["losses/grad_norm"].shape == (config.num_updates,)


@only("sticky_action_prob", "max_steps_in_episode")
def test_flags_of_the_environment(script, config):
    """A time limit of 3 steps ends every episode; actions that all stick are all the first."""
    limited = dataclasses.replace(config, max_steps_in_episode=3, eval_interval=0)
    _, metrics = jax.jit(script.make_train(limited))(jax.random.key(0))
    np.testing.assert_array_equal(metrics["charts/episodic_length"], 3)
    env, params = script.make_env(dataclasses.replace(config, sticky_action_prob=1.0))
    _, state = env.reset(jax.random.key(0), params)
    step = jax.jit(env.step)
    outcomes = [step(jax.random.key(1), state, action, params)[0] for action in range(3)]
    assert_equal(outcomes[0], outcomes[1])
    assert_equal(outcomes[0], outcomes[2])


@only("random_statistics")
def test_statistics_before_the_first_update(script, config):
    """Of a rollout with random actions: the first update, too, learns from what they normalise."""
    sizes = {"num_envs": 256, "num_steps": 64, "total_timesteps": 256 * 64}
    train = script.make_train(dataclasses.replace(config, **sizes))
    state = jax.jit(train.init)(jax.random.key(0))
    assert state.statistics.count == 256 * 64 and not state.env.length.any()
    # Cosine, sine and speed of a pendulum that is pushed at random.
    assert (np.abs(state.statistics.mean) < [0.9, 0.2, 0.5]).all()
    assert (state.statistics.var[:2] > 0.1).all() and 1 < state.statistics.var[2] < 64


@struct.dataclass
class ClockParams(environment.EnvParams):
    max_steps_in_episode: int = 5


class Clock(environment.Environment):
    """Rewards every step with 1 and never terminates; cut after 5 steps, whatever params say."""

    num_actions = 2
    default_params = ClockParams(max_steps_in_episode=3)
    action_space = staticmethod(lambda params: spaces.Discrete(2))
    observation_space = staticmethod(lambda params: spaces.Box(0, 1, (10, 10, 1), jnp.float32))

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        return jnp.ones((10, 10, 1)), state, jnp.float32(1), jnp.bool_(False), {}

    def reset_env(self, key, params):
        return jnp.ones((10, 10, 1)), environment.EnvState(time=jnp.int32(0))

    def is_truncated(self, state, params):
        return state.time >= 5


class ContinuousClock(Clock):
    action_space = staticmethod(lambda params: spaces.Box(-1, 1, (1,), jnp.float32))


def clock(script):
    """A Clock with the kind of actions that the script learns."""
    if hasattr(script, "make_jaxmarl"):
        return "overcooked_clock"
    continuous = hasattr(script, "make_physics")
    env_id = "ContinuousClock" if continuous else "Clock"
    if env_id not in gymnax.registered_envs:
        gymnax.register(env_id, ContinuousClock if continuous else Clock)
    return env_id


@pytest.mark.parametrize("script", PURE_LEARNERS, indirect=True)
@pytest.mark.parametrize("bootstrap", [True, False])
def test_truncation_is_not_an_end(script, config, bootstrap):
    """All states are the same: a bootstrapped value is r / (1 - gamma), however short episodes."""
    num_updates = 200 if script.__name__ == "pql_isaac_style" else 800  # which learns more in each
    settings = {"total_timesteps": 32 * (num_updates + 2), "gamma": 0.8}
    settings |= {"eval_interval": 800 * bootstrap}
    settings |= {"learning_rate": 1e-2, "reward_scale": 0.5, "clip_vloss": False}
    settings |= {"norm_reward": False}
    if hasattr(script, "make_jaxmarl"):  # batch norm takes all that there is from equal inputs
        settings |= {"norm": "layer_norm", "norm_input": "none"}
    settings = {name: value for name, value in settings.items() if hasattr(config, name)}
    settings |= {"env_id": clock(script), "bootstrap_on_truncation": bootstrap}
    traces = [name for name in ("td_lambda", "gae_lambda") if hasattr(config, name)]

    def train(trace):
        mine = dataclasses.replace(config, **settings, **dict.fromkeys(traces, trace))
        state, metrics = script.make_train(mine)(jax.random.key(0))
        if "losses/q_values" in metrics:
            return metrics["losses/q_values"][-1], metrics
        obs = jnp.ones(100)
        if hasattr(script, "normalize"):
            obs = script.normalize(obs, state.params["statistics"])
        return script.MLP(1, 1.0, mine).apply(state.params["critic"], obs)[0], metrics

    values, metrics = jax.jit(jax.vmap(train))(jnp.array([0.0, 0.9] if traces else [0.0]))
    limit = settings.get("reward_scale", 1) / (1 - 0.8)
    if bootstrap:
        np.testing.assert_allclose(values, limit, rtol=0.02)
        # Five rewards of 1 in each episode, however training scales them.
        for kind in ("charts", "eval"):
            np.testing.assert_array_equal(metrics[f"{kind}/episodic_return"][:, -1], 5)
            np.testing.assert_array_equal(metrics[f"{kind}/episodic_length"][:, -1], 5)
        if script.__name__ == "ppo_cartpole":  # no action is better: the bonus keeps it uniform
            np.testing.assert_allclose(metrics["losses/entropy"][:, -1], np.log(2), rtol=1e-2)
    else:
        assert (values < 0.8 * limit).all()


@pytest.mark.parametrize("script", ["pqn_cartpole", "pqn_minatar"], indirect=True)
@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_norms(script, config, norm):
    train = script.make_train(dataclasses.replace(config, norm=norm, eval_interval=0))
    before = jax.jit(train.init)(KEYS[0])
    after, metrics = jax.jit(lambda state: train(state=state, num_updates=2))(before)
    assert ("batch_stats" in after.variables) == (norm == "batch_norm")
    assert np.isfinite(metrics["losses/td_loss"]).all()
    if norm == "batch_norm":
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.variables, after.variables)
        assert all(jax.tree.leaves(moved["batch_stats"]))


@only("norm_adv")
@pytest.mark.parametrize("norm_adv", [True, False])
def test_normalised_advantages(script, config, norm_adv):
    """Their mean, which the first policy loss of an update is, is zero."""
    sizes = {"num_epochs": 1, "num_minibatches": 1, "eval_interval": 0}
    train = script.make_train(dataclasses.replace(config, norm_adv=norm_adv, **sizes))
    _, metrics = jax.jit(lambda key: train(key, num_updates=2))(KEYS[0])
    assert (np.abs(metrics["losses/policy_loss"]) < 1e-5).all() == norm_adv


@only("double_q")
def test_double_q_flag(script, config):
    """It changes the targets, but not before there is anything to learn from."""
    config = dataclasses.replace(config, learning_rate=1e-2, eval_interval=0)
    trains = [
        script.make_train(dataclasses.replace(config, double_q=flag)) for flag in (False, True)
    ]
    losses = np.array([jax.jit(train)(KEYS[0])[1]["losses/td_loss"] for train in trains])
    warm_up = config.learning_starts // 32
    assert np.isnan(losses[:, :warm_up]).all()
    assert (losses[0, warm_up:] != losses[1, warm_up:]).any()


@only("replay_insert")
def test_replay_is_written_in_place(script, config):
    """The compiled run of many updates needs no second copy of the replay, alone or under vmap."""
    config = dataclasses.replace(config, buffer_size=400_000, eval_interval=1)
    train = script.make_train(config)

    def four_updates(state):
        return train(state=state, num_updates=4)

    state = jax.eval_shape(train.init, jax.random.key(0))
    replay = sum(x.size * x.dtype.itemsize for x in state.replay)
    memory = jax.jit(four_updates, donate_argnums=0).lower(state).compile().memory_analysis()
    assert memory.alias_size_in_bytes > replay and memory.temp_size_in_bytes < replay / 10
    states = jax.eval_shape(jax.vmap(train.init), KEYS)
    together = jax.vmap(lambda state: four_updates(state._replace(update=jnp.int32(2))))
    memory = jax.jit(together, donate_argnums=0).lower(states).compile().memory_analysis()
    assert memory.alias_size_in_bytes > 3 * replay and memory.temp_size_in_bytes < 3 * replay / 10
