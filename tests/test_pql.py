"""What PQL alone has: physics that fail, windows of several steps."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import SCRIPTS
from flax import struct
from gymnax.environments import environment, spaces
from test_train import ClockParams, assert_equal

import pql_isaac_style as pql

TINY = pql.Config(**SCRIPTS["pql_isaac_style"])


class Count(environment.Environment):
    """Observes the time and the kind of the episode, which is drawn at its reset.

    An episode of kind 0 is cut after 5 steps, of kind 1 it terminates at time 3, of kind 2 its
    physics fail at time 4.
    """

    num_actions = 1
    kinds = 2
    default_params = ClockParams()
    action_space = staticmethod(lambda params: spaces.Box(-2, 2, (1,), jnp.float32))
    observation_space = staticmethod(lambda params: spaces.Box(0, 5, (2,), jnp.float32))

    def step_env(self, key, state, action, params):
        time, kind = state[0] + 1, state[1]
        fails = (kind == 2) & (time >= 4)
        obs = jnp.where(fails, jnp.nan, jnp.stack([time, kind]))
        return (
            obs,
            obs,
            jnp.where(fails, jnp.nan, action[0] / 2 + time),
            (kind == 1) & (time == 3),
            {},
        )

    def is_truncated(self, state, params):
        return state[0] >= params.max_steps_in_episode

    def reset_env(self, key, params):
        state = jnp.stack([0.0, jax.random.randint(key, (), 0, self.kinds).astype(jnp.float32)])
        return state, state


class Failing(Count):
    kinds = 3


class Plain(Count):
    """Rewards with a number of Python."""

    def step_env(self, key, state, action, params):
        obs, state, _, *rest = super().step_env(key, state, action, params)
        return obs, state, 1.0, *rest


class Unbounded(Count):
    action_space = staticmethod(lambda params: spaces.Box(-jnp.inf, jnp.inf, (1,), jnp.float32))


for env in (Count, Failing, Plain, Unbounded):
    if env.__name__ not in gymnax.registered_envs:
        gymnax.register(env.__name__, env)


@pytest.mark.parametrize(
    "env_id, bootstrap, settings",
    [
        ("Count", True, {}),
        ("Failing", True, {"algorithm": "ddpg_n", "n_steps": 4}),
        ("Failing", False, {"n_steps": 1}),
    ],
)
def test_replay_holds_what_happened(env_id, bootstrap, settings):
    """Every transition follows from its first observation, its action and the kind of episode."""
    settings = settings | {
        "gamma": 0.5,
        "reward_scale": 0.1,
        "buffer_size": 10_000,
        "bootstrap_on_truncation": bootstrap,
    }
    config = dataclasses.replace(TINY, env_id=env_id, eval_interval=0, **settings)
    state, metrics = jax.jit(pql.make_train(config))(jax.random.key(0))
    steps = config.warmup_steps + config.num_updates * config.num_steps
    num_rows = steps - config.n_steps  # the last one is on its way
    replay = jax.tree.map(lambda x: np.asarray(x[:num_rows]), state.replay)
    assert not state.replay.obs[num_rows:].any() and not state.replay.reward[num_rows:].any()
    ends = {0: 5, 1: 3, 2: 4}
    for index in np.ndindex(num_rows, config.num_envs):
        time, kind = replay.obs[index]
        k = int(min(config.n_steps, ends[kind] - time))
        at_end = time + k == ends[kind]
        failed = at_end and kind == 2
        terminal = at_end and (kind == 1 or not bootstrap)
        np.testing.assert_array_equal(replay.next_obs[index], [time + k - failed, kind])
        np.testing.assert_allclose(replay.discount[index], 0 if terminal else 0.5**k)
        actions = [
            replay.action[index[0] + i, index[1], 0] for i in range(k) if index[0] + i < num_rows
        ]
        if len(actions) == k:
            rewards = [action + time + 1 + i for i, action in enumerate(actions)]
            expected = sum(0.1 * 0.5**i * reward for i, reward in enumerate(rewards[: k - failed]))
            np.testing.assert_allclose(replay.reward[index], expected, atol=1e-5)
    # The statistics are those of all observations that the actor has seen.
    seen = [replay.obs[:num_rows], state.fresh.obs]
    seen += [state.actor.window.obs] if state.actor.window else []
    seen = np.concatenate(seen).reshape(-1, 2)
    np.testing.assert_allclose(state.actor.statistics.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.actor.statistics.var, seen.var(0), rtol=1e-4)
    lengths = {ends[kind] for kind in range(3 if env_id == "Failing" else 2)}
    assert min(lengths) <= np.nanmean(metrics["charts/episodic_length"]) <= max(lengths)
    assert (metrics["charts/physics_failures"].sum() > 0) == (env_id == "Failing")
    assert all(
        np.isfinite(x).all()
        for x in jax.tree.leaves((state.params, state.actor.env.obs, state.replay))
    )


def test_episodes_begin_afresh():
    """Environments that end in one step begin new episodes, each in a state of its own."""
    sizes = {"num_envs": 64, "num_steps": 200, "critic_updates": 1, "policy_updates": 1}
    sizes |= {"total_timesteps": 64 * 208, "buffer_size": 64 * 300}
    train = pql.make_train(dataclasses.replace(TINY, **sizes))
    state, _ = jax.jit(train)(jax.random.key(0))
    obs = np.asarray(state.replay.obs[200])  # all began a new episode at the limit of 200 steps
    assert not (obs == state.replay.next_obs[197]).all(axis=-1).any()
    assert len(np.unique(obs, axis=0)) == 64


@pytest.mark.parametrize(
    "algorithm, name", [("pql_d", "value_bound"), ("sac_n", "alpha_learning_rate")]
)
def test_other_algorithms(algorithm, name):
    """Finite losses, networks of their size, and a hyperparameter of theirs that matters."""
    config = dataclasses.replace(TINY, algorithm=algorithm, learning_rate=3e-3)

    @jax.jit
    def run(value):
        train = pql.make_train(dataclasses.replace(config, **{name: value}))
        return train(jax.random.key(0))

    state, metrics = run(getattr(config, name))
    for loss in ("td_loss", "policy_loss", "grad_norm"):
        assert np.isfinite(metrics[f"losses/{loss}"]).all()
    _, others = run(3 * getattr(config, name))
    assert (metrics["losses/td_loss"] != others["losses/td_loss"]).any()
    units = {"pql_d": ("critic", "MLP", (2, 16, 51)), "sac_n": ("policy", None, (16, 2))}
    network, inner, shape = units[algorithm]
    params = state.params[network]["params"]
    params = params[inner] if inner else params
    assert params["Dense_1"]["kernel"].shape == shape


def test_defaults_by_algorithm_and_task():
    """The paper's baselines have 8 policy updates and do not clip; its reward scales are Isaac's"""
    for algorithm, defaults in {
        "pql": (4, 5.0),
        "pql_d": (4, 5.0),
        "ddpg_n": (8, np.inf),
        "sac_n": (8, np.inf),
    }.items():
        config = pql.Config(algorithm=algorithm)
        assert (config.policy_updates, config.obs_clip) == defaults
        assert pql.parse_args([f"--algorithm={algorithm}"]) == config
    given = pql.parse_args(["--algorithm=sac_n", "--policy-updates=3", "--obs-clip=2"])
    assert (given.policy_updates, given.obs_clip) == (3, 2)
    for env_id, scale in {"ant": 0.01, "humanoid": 0.01, "walker2d": 1, "Pendulum-v1": 1}.items():
        assert pql.Config(env_id=env_id).reward_scale == scale
        assert pql.parse_args([f"--env-id={env_id}"]).reward_scale == scale
    for env_id, scale in {"ant": 0.3, "humanoid": 0.1, "walker2d": 1}.items():
        assert pql.Config(algorithm="pql_d", env_id=env_id).reward_scale == scale
    assert pql.Config(env_id="ant", reward_scale=0.1).reward_scale == 0.1


def test_initial_weights():
    """PyTorch's: weights and biases are uniform, within 1 / sqrt(number of inputs)."""
    params = pql.MLP(3, (400, 100)).init(jax.random.key(0), jnp.zeros((1, 25)))["params"]
    for layer, num_inputs in (("Dense_0", 25), ("Dense_1", 400), ("Dense_2", 100)):
        for weights in params[layer].values():
            scaled = np.abs(weights).ravel() * num_inputs**0.5
            assert scaled.max() <= 1
            assert scaled.size < 50 or (abs(scaled.mean() - 0.5) < 0.1 and scaled.max() > 0.95)
        assert params[layer]["bias"].any()


def test_weight_of_the_entropy():
    """It falls while the entropy is above its target, as that of the first policy is."""
    config = dataclasses.replace(TINY, algorithm="sac_n", alpha_learning_rate=0.01, anneal_lr=False)
    _, metrics = jax.jit(pql.make_train(config))(jax.random.key(0))
    alphas = metrics["losses/alpha"]
    assert 0.8 < alphas[0] < 1 and (np.diff(alphas) < 0).all()


def test_entropy_is_a_reward():
    """Without other rewards and at gamma 0.5, values rise to the entropy of the uniform policy."""
    settings = {"algorithm": "sac_n", "reward_scale": 0.0, "gamma": 0.5, "n_steps": 1}
    settings |= {"alpha_learning_rate": 0.0, "weight_decay": 0.0, "learning_rate": 3e-3}
    settings |= {"total_timesteps": 32 * 61, "anneal_lr": False, "eval_interval": 0}
    config = dataclasses.replace(TINY, **settings, buffer_size=2000)
    _, metrics = jax.jit(pql.make_train(config))(jax.random.key(0))
    assert 0.5 < metrics["losses/q_values"][-1] < 0.75  # log 2 = 0.69


def test_samples_come_from_the_rows_that_are_filled(monkeypatch):
    """Batches that end at once with the number of rows as reward: it is what the loss shows."""
    sample = pql.replay_sample

    def number_of_rows(replay, bits, num_rows):
        batch = sample(replay, bits, num_rows)
        if not isinstance(batch, pql.Transition):  # observations alone, for the policy
            return batch
        ones = jnp.ones_like(batch.reward)
        return batch._replace(reward=num_rows * ones, discount=0 * ones)

    monkeypatch.setattr(pql, "replay_sample", number_of_rows)
    settings = {"learning_rate": 0.0, "eval_interval": 0, "buffer_size": 200}
    config = dataclasses.replace(TINY, **settings)
    _, metrics = jax.jit(pql.make_train(config))(jax.random.key(0))
    # 8 steps of warm-up give 6 rows; eight cycles an update read all but that of the last step.
    rows = np.minimum(6 + np.arange(8 * 12), 50).reshape(12, 8)
    q_values = np.asarray(metrics["losses/q_values"])[:, None]
    expected = 2 * np.mean((rows - q_values) ** 2, axis=1)
    np.testing.assert_allclose(metrics["losses/td_loss"], expected, rtol=0.01)


def test_evaluation_does_not_explore():
    config = dataclasses.replace(TINY, env_id="Count", learning_rate=0.0, eval_interval=1)

    def returns(stddev_max):
        train = pql.make_train(dataclasses.replace(config, stddev_max=stddev_max))
        return train(jax.random.key(0))[1]["eval/episodic_return"]

    quiet, noisy = jax.jit(jax.vmap(returns))(jnp.array([0.05, 0.8]))
    np.testing.assert_allclose(quiet, noisy, rtol=1e-5)


def test_within_a_cycle_none_reads_what_another_writes():
    """The policy updates are the same whatever the critic learns meanwhile, and vice versa."""
    config = dataclasses.replace(TINY, num_steps=1, total_timesteps=20 * 32, eval_interval=0)

    def one_cycle(**settings):
        train = pql.make_train(dataclasses.replace(config, **settings))
        return jax.jit(lambda key: train(key, num_updates=1))(jax.random.key(0))[0]

    usual, faster = one_cycle(), one_cycle(critic_updates=9)
    assert_equal(usual.p_learner.policy, faster.p_learner.policy)
    more = one_cycle(policy_updates=5)
    assert_equal(usual.actor.env.obs, more.actor.env.obs)  # with the policy of the cycle's start
    assert_equal(usual.v_learner.critic, more.v_learner.critic)
    with pytest.raises(AssertionError):
        assert_equal(usual.v_learner.critic, faster.v_learner.critic)
    with pytest.raises(AssertionError):
        assert_equal(usual.p_learner.policy, more.p_learner.policy)


def test_brax():
    """A task of brax: terminations, finite losses."""
    env = pql.make_env("inverted_pendulum", "spring")
    assert env.max_steps == 1000
    state = jax.eval_shape(lambda key: pql.reset_envs(env, key, 4), jax.random.key(0))
    assert state.physics.obs is None and state.obs.shape == (4, 4)
    config = dataclasses.replace(TINY, env_id="inverted_pendulum", num_envs=16, buffer_size=1000)
    config = dataclasses.replace(config, total_timesteps=16 * 24, eval_interval=0)
    _, metrics = jax.jit(pql.make_train(config))(jax.random.key(0))
    assert np.isfinite(metrics["losses/grad_norm"]).all()
    assert 2 < np.nanmean(metrics["charts/episodic_length"]) < 30  # a fallen pole terminates


def test_environments_of_a_user():
    train = pql.make_train(dataclasses.replace(TINY, env_id="Plain"))
    _, metrics = jax.eval_shape(train, jax.random.key(0))
    assert metrics["eval/episodic_return"].dtype == jnp.float32
    with pytest.raises(ValueError, match="--env-id is Unbounded; it takes actions with finite"):
        pql.make_env("Unbounded", "spring")


def test_backend_that_a_task_lacks():
    with pytest.raises(ValueError, match="--backend is spring"):
        pql.make_env("swimmer", "spring")


def test_keys_in_the_states_of_physics(tmp_path, monkeypatch):
    """dm_control keeps a key in the state of each environment: a checkpoint takes it."""
    make_env = pql.make_env

    def with_keys(env_id, backend):
        env = make_env(env_id, backend)

        def reset(key):
            physics, obs = env.reset(key)
            return (physics, key), obs

        def step(key, state, action):
            physics, *rest = env.step(state[1], state[0], action)
            return (physics, jax.random.split(state[1], 1)[0]), *rest

        return env._replace(reset=reset, step=step)

    monkeypatch.setattr(pql, "make_env", with_keys)
    state = jax.jit(pql.make_train(TINY).init)(jax.random.key(0))
    assert state.actor.env.physics[1].shape == (4,)
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        shapes = ocp.args.StandardRestore(jax.eval_shape(lambda: state))
        assert_equal(checkpoints.restore(1, args=shapes), state)


@struct.dataclass
class Body:
    place: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    empty: jax.Array


class Physics:
    """In the terms of brax: actions push a body along, and are rewarded."""

    observation_size, action_size = 2, 1

    def reset(self, key):
        place, zero = jax.random.normal(key, (2,)), jnp.float32(0)
        return Body(place, place, zero, zero, jnp.zeros((0, 3), jnp.float32))

    def step(self, state, action):
        assert state.empty.shape == (0, 3) and state.empty.dtype == jnp.float32
        place = state.place + action
        return state.replace(place=place, obs=place, reward=action[0])


def test_states_of_physics_hold_what_they_need():
    """No empty array, as MJX's do, which orbax refuses to save, and no observation twice."""
    env = pql.make_physics(Physics(), 5)
    state = pql.reset_envs(env, jax.random.key(0), 4)
    after, step, _ = pql.step_envs(env, jax.random.key(1), state, jnp.ones((4, 1)))
    assert all(x.size for x in jax.tree.leaves((state, after)))
    assert len(jax.tree.leaves(after.physics)) == 3 and after.physics.obs is None
    np.testing.assert_allclose(after.obs, state.obs + 1)
    np.testing.assert_array_equal(step.reward, 1)


@pytest.mark.parametrize("size", [2e6, np.inf, np.nan])
def test_physics_that_explode(size):
    """Theirs fail at 1e6, and at their limit of 5 steps the episode is cut."""
    env = pql.make_physics(Physics(), 5)
    state = pql.reset_envs(env, jax.random.key(0), 4)
    for t in range(5):
        action = jnp.where(t == 2, jnp.array([[size], [0], [0], [0]]), 0.0)
        state, step, sums = pql.step_envs(env, jax.random.key(t), state, action)
        assert sums["failed"] == (t == 2)
        np.testing.assert_array_equal(step.truncated, [t == 2, t == 4, t == 4, t == 4])
        assert jnp.abs(step.next_obs).max() < 10 and not step.reward.any()
