"""Past the end of a run, beyond 2^31, under x64, in environments that cut by rules of their own."""

import dataclasses
import importlib.util
import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PURE_LEARNERS, ROOT, SCRIPTS, WELL, having, one_with, only
from flax import struct
from gymnax.environments import environment, spaces


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


class Plane(environment.Environment):
    """Rewards each step with 1; cut after seven steps, whatever the parameters say."""

    scale = 1.0
    default_params = RingParams(max_steps_in_episode=5)
    action_space = staticmethod(lambda params: spaces.Box(-1, 1, (1,), jnp.float32))
    observation_space = staticmethod(lambda params: spaces.Box(-1, 1, (3,), jnp.float32))

    def obs(self):
        return jnp.full(3, self.scale)

    def step_env(self, key, state, action, params):
        return self.obs(), state + 1, jnp.float32(self.scale), jnp.bool_(False), {}

    def reset_env(self, key, params):
        return self.obs(), jnp.int32(0)

    def is_truncated(self, state, params):
        return state >= 7


class FreePlane(Plane):
    """Its parameters have no time limit; its observations and rewards are large."""

    scale = 2e6
    default_params = Endless.default_params


for env in (Ring, LongRing, Endless, Plane, FreePlane):
    if env.__name__ not in gymnax.registered_envs:
        gymnax.register(env.__name__, env)


@pytest.mark.parametrize("script", ["pqn_cartpole"], indirect=True)
@pytest.mark.parametrize("env_id, num_steps", [("Ring", 16), ("LongRing", 4)])
def test_truncation_by_a_rule_of_its_own(script, env_id, num_steps):
    """The value of each place, 0.8^(4-p) / (1 - 0.8^5), though many steps, or a few, are cut.

    In two seeds of one program, each with other steps cut.
    """
    sizes = {"num_envs": 32, "num_steps": num_steps, "num_minibatches": 8, "num_epochs": 2}
    sizes |= {"total_timesteps": 400 * 512, "hidden_size": 32, "eval_interval": 0}
    settings = {"gamma": 0.8, "td_lambda": 0.0, "learning_rate": 3e-3, "reward_scale": 1.0}
    config = script.Config(env_id=env_id, **sizes, **settings)
    train, keys = jax.vmap(script.make_train(config)), jax.random.split(jax.random.key(0), 2)
    state, _ = jax.jit(train, compiler_options=WELL)(keys)
    network = script.QNetwork(2, config)
    values = jax.vmap(network.apply, in_axes=(0, None))(state.variables, jnp.eye(5)).max(-1)
    expected = 0.8 ** np.array([3, 2, 1, 0, 4]) / (1 - 0.8**5)
    np.testing.assert_allclose(values, np.tile(expected, (2, 1)), atol=0.002)


BILLIONS = {
    "pqn_cartpole": {"num_envs": 4, "num_steps": 8, "num_minibatches": 32, "num_epochs": 4},
    "ppo_cartpole": {"num_envs": 4, "num_steps": 8, "num_minibatches": 16, "num_epochs": 4},
    "ppo_continuous_action": {"num_envs": 4, "num_steps": 8, "num_epochs": 4},
    "pqn_continuous_action": {"num_envs": 4, "num_steps": 8, "num_epochs": 4},
    "pqn_rnn_craftax": {"num_envs": 4, "num_steps": 8, "num_minibatches": 4, "num_epochs": 4},
    "pqn_vdn_jaxmarl": {"num_envs": 4, "num_steps": 8, "num_minibatches": 4, "num_epochs": 4},
    "dqn_cartpole": {"num_envs": 4, "num_steps": 1, "target_interval": 8},
    "pql_isaac_style": {"num_envs": 4, "num_steps": 8},
}


@pytest.mark.parametrize("script", PURE_LEARNERS, indirect=True)
def test_two_billion_steps(script, config):
    """Near the end of the longest run that is accepted, counters, rates and lengths are right."""
    sizes = BILLIONS[script.__name__] | {"total_timesteps": 2**31 - 1, "eval_interval": 0}
    not_gymnax = hasattr(script, "make_physics") or hasattr(script, "make_jaxmarl")
    env_id = config.env_id if not_gymnax else "Ring"
    config = dataclasses.replace(config, env_id=env_id, **sizes)
    train = script.make_train(config)

    @jax.jit
    def one_update(number):  # only what is looked at: XLA leaves out the learning
        state = train.init(jax.random.key(0))
        if "Ring" in env_id:  # the sum of the lengths does not fit
            lengths = jnp.full(4, 2**30)
            state = state._replace(env_state=state.env_state.replace(episode_lengths=lengths))
        after, metrics = train(state=state._replace(update=number), num_updates=1)
        names = "global_step", "charts/learning_rate", "charts/episodic_length"
        memory = getattr(after, "memory", None)
        return {name: metrics[name] for name in names}, memory and memory.clear

    for number in (20_000_000, config.num_updates - 1):
        metrics, clear = one_update(jnp.int32(number))
        if clear is not None:  # after an even number of steps in the ring
            assert clear.all()
        warmup = getattr(config, "warmup_timesteps", 0)
        assert int(metrics["global_step"][0]) == warmup + (number + 1) * config.steps_per_update
        rate = config.learning_rate * (1 - number / config.num_updates)
        error = abs(float(metrics["charts/learning_rate"][0]) - rate)
        assert error < 2e-7 * config.learning_rate
        if "Ring" in env_id:  # episodes of 2^30 and of 2 steps, all as often
            length, num_episodes = (
                metrics["charts/episodic_length"][0],
                config.steps_per_update // 8,
            )
            expected = (2**30 + 2 * (num_episodes - 1)) / num_episodes
            np.testing.assert_allclose(length, expected, rtol=1e-3)


@pytest.mark.parametrize("script", ["dqn_cartpole"], indirect=True)
def test_replay_holds_where_a_truncated_step_led(script):
    """The same values from replay: not those of the next episode's first place."""
    sizes = {"num_envs": 8, "num_steps": 4, "target_interval": 8, "hidden_sizes": (32,)}
    sizes |= {"total_timesteps": 100_000, "batch_size": 64, "learning_starts": 1000}
    settings = {"gamma": 0.8, "learning_rate": 3e-3, "anneal_lr": True, "eval_interval": 0}
    config = script.Config(env_id="Ring", **sizes, **settings)
    state, _ = jax.jit(script.make_train(config), compiler_options=WELL)(jax.random.key(0))
    values = script.QNetwork(2, (32,)).apply(state.params, jnp.eye(5)).max(-1)
    np.testing.assert_allclose(values, 0.8 ** jnp.array([3, 2, 1, 0, 4]) / (1 - 0.8**5), atol=0.02)


@pytest.mark.parametrize("script", ["dqn_cartpole"], indirect=True)
def test_samples_come_from_the_rows_that_are_filled(script, config, monkeypatch):
    """Batches that end at once with the number of rows as reward: it is what the loss shows."""
    sample = script.replay_sample

    def number_of_rows(replay, bits, num_rows):
        batch = sample(replay, bits, num_rows)
        reward = jnp.full_like(batch.reward, num_rows)
        return batch._replace(reward=reward, terminated=jnp.ones_like(batch.terminated))

    monkeypatch.setattr(script, "replay_sample", number_of_rows)
    config = dataclasses.replace(config, learning_rate=0.0, eval_interval=0, buffer_size=200)
    _, metrics = jax.jit(script.make_train(config))(jax.random.key(0))
    # Each update adds 4 times 2 rows of 4 environments, up to 50 rows.
    rows = np.minimum(2 * np.arange(1, 4 * 12 + 1), 50).reshape(12, 4)[2:]
    losses, q_values = metrics["losses/td_loss"][2:], metrics["losses/q_values"][2:]
    expected = np.mean((rows - np.asarray(q_values)[:, None]) ** 2, axis=1)
    np.testing.assert_allclose(losses, expected, rtol=0.01)


GYMNAX = ["pqn_cartpole", "ppo_cartpole", "dqn_cartpole", "pqn_rnn_craftax"]


@pytest.mark.parametrize("script", GYMNAX, indirect=True)
def test_environment_without_a_time_limit(script, config):
    """Its own rule ends its episodes, in evaluations too."""
    train = script.make_train(dataclasses.replace(config, env_id="Endless"))
    _, metrics = jax.eval_shape(train, jax.random.key(0))
    assert "eval/episodic_length" in metrics


class Finite(Ring):
    """The end of the time is a termination, which observations show: a rule of the task."""

    default_params = environment.EnvParams(max_steps_in_episode=2)

    def step_env(self, key, state, action, params):
        obs, state, reward, _, info = super().step_env(key, state, action, params)
        return obs, state, reward, state[0] >= params.max_steps_in_episode, info

    def is_truncated(self, state, params):
        return jnp.bool_(False)


class OldDone(Finite):
    """Before gymnax 1.0, done included the time limit."""

    def is_truncated(self, state, params):
        return state[0] >= params.max_steps_in_episode


class ContinuousOldDone(Plane):
    def step_env(self, key, state, action, params):
        obs, state, reward, _, info = super().step_env(key, state, action, params)
        return obs, state, reward, self.is_truncated(state, params), info

    def is_truncated(self, state, params):
        return state >= params.max_steps_in_episode


class NoTruncation(Ring):
    """Its state has no time for gymnax's own is_truncated."""

    is_truncated = environment.Environment.is_truncated


class OldStep(Ring):
    def step(self, key, state, action, params):
        return self.step_env(key, state, action, params)


class NoFinalObservation(Ring):
    def step(self, key, state, action, params):
        *values, _ = super().step(key, state, action, params)
        return *values, {}


class WrongSpace(Ring):
    observation_space = staticmethod(lambda params: spaces.Box(0, 1, (5, 1), jnp.float32))


class DictObservation(Ring):
    def reset_env(self, key, params):
        obs, state = super().reset_env(key, params)
        return {"place": obs}, state

    def step_env(self, key, state, action, params):
        obs, *rest = super().step_env(key, state, action, params)
        return {"place": obs}, *rest


class ArrayReward(Ring):
    def step_env(self, key, state, action, params):
        obs, state, reward, *rest = super().step_env(key, state, action, params)
        return obs, state, reward[None], *rest


class FloatDone(Ring):
    def step(self, key, state, action, params):
        obs, state, reward, terminated, *rest = super().step(key, state, action, params)
        return obs, state, reward, jnp.float32(terminated), *rest


class Faulty(Ring):
    def step_env(self, key, state, action, params):
        return self.no_such_method()


BROKEN = {
    OldDone: "terminated includes the limit max_steps_in_episode; only is_truncated may have it",
    NoTruncation: "is_truncated(state, params) is missing: 'tuple' object has no attribute 'time'",
    OldStep: "step has to return obs, state, reward, terminated, truncated, info with",
    NoFinalObservation: "step has to return obs, state, reward, terminated, truncated, info with",
    WrongSpace: "observation is (5,), but its space (5, 1)",
    DictObservation: "observation is dict, but its space (5,)",
    ArrayReward: "reward has the shape (1,); it has to be a number",
    FloatDone: "terminated and truncated have to be booleans, not float32",
}


for env in (*BROKEN, Finite, Faulty, ContinuousOldDone):
    if env.__name__ not in gymnax.registered_envs:
        gymnax.register(env.__name__, env)


@one_with("check_env")
def test_broken_environments_are_told(script):
    for env, told in BROKEN.items():
        with pytest.raises(ValueError) as raised:
            script.make_env(env.__name__)
        assert str(raised.value).startswith(f"--env-id is {env.__name__}, whose {told}")
    script.make_env("Finite")
    with pytest.raises(AttributeError, match="no_such_method"):  # its own bug, with a traceback
        script.make_env("Faulty")


@pytest.mark.parametrize("script", having("check_env"), indirect=True)
def test_every_script_checks_its_environment(script, config):
    env_id = "ContinuousOldDone" if hasattr(script, "make_physics") else "OldDone"
    with pytest.raises(ValueError, match=f"^--env-id is {env_id}, whose terminated includes"):
        script.make_train(dataclasses.replace(config, env_id=env_id))


@only("make_physics")
@pytest.mark.parametrize("env_id", ["Plane", "FreePlane"])
def test_continuous_environment_by_its_own_rules(script, config, env_id):
    """In training and in evaluations only the environment ends an episode, and nothing fails."""
    config = dataclasses.replace(config, env_id=env_id, total_timesteps=64, eval_interval=1)
    _, metrics = jax.jit(script.make_train(config))(jax.random.key(0))
    for kind in ("charts", "eval"):
        np.testing.assert_array_equal(metrics[f"{kind}/episodic_length"][-1:], 7)
        expected = 7 * (2e6 if env_id == "FreePlane" else 1)
        np.testing.assert_allclose(metrics[f"{kind}/episodic_return"][-1:], expected)
    assert not metrics["charts/physics_failures"].any()


@only("learning_starts")
def test_learning_that_never_starts_is_refused(script, config):
    for learning_starts in (10**6, 12 * 32):
        with pytest.raises(ValueError, match=f"^--learning-starts is {learning_starts}"):
            dataclasses.replace(config, learning_starts=learning_starts)
    dataclasses.replace(config, learning_starts=11 * 32)


CANNOT_LEARN = [
    ("ppo_cartpole", {"num_minibatches": 32}, "--norm-adv"),
    ("ppo_continuous_action", {"num_minibatches": 32}, "--norm-adv"),
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
    with pytest.raises(ValueError, match=f"^{flag}"):
        dataclasses.replace(config, **settings)


@pytest.mark.parametrize("script", ["pqn_rnn_craftax"], indirect=True)
@pytest.mark.parametrize("number", ["-3", "0", "1.5"])
def test_counts_of_an_environment_are_positive(script, config, number):
    with pytest.raises(ValueError, match=f"^--env-params is memory_length={number}; "):
        script.make_train(dataclasses.replace(config, env_params=(f"memory_length={number}",)))


# A script, an environment, a module that is missing, and what to install.
MISSING = [
    (script, settings.get("env_id"), "gymnax", "gymnax")
    for script, settings in SCRIPTS.items()
    if script not in ("pqn_atari", "pqn_vdn_jaxmarl")
]
MISSING += [(script, "ant", "brax", "brax") for script in having("make_physics")]
MISSING += [
    ("pqn_rnn_craftax", "Craftax-Symbolic-v1", "craftax.craftax_env", "craftax"),
    ("pqn_vdn_jaxmarl", "smax_3m", "jaxmarl", "jaxmarl"),
    ("pqn_atari", "pong", "ale_py", "-r requirements-atari.txt"),
]


@pytest.mark.parametrize("name, env_id, module, package", MISSING)
def test_missing_package(name, env_id, module, package, monkeypatch):
    """It is a ValueError that names the flag, what to install, and the cause."""
    script = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, module, None)
    config = script.Config(**SCRIPTS.get(name, {}) | ({"env_id": env_id} if env_id else {}))
    with pytest.raises(ValueError) as raised:
        script.make_train(config)
    text = str(raised.value)
    assert text.startswith(f"--env-id is {config.env_id}, which needs ")
    assert f"(pip install {package}): import of {module} halted" in text


@one_with("make_physics")
def test_playground(script, config, tmp_path, monkeypatch):
    """What it lacks is named, and no id is said to be unknown; with it, its tasks are listed."""
    package = tmp_path / "mujoco_playground.py"
    monkeypatch.syspath_prepend(tmp_path)
    for text, env_id, told in (
        ("import no_such_module", "CartpoleBalance", r"; .* playground.*'no_such_module'; "),
        ("class dm_control_suite: ALL_ENVS = 'A', 'B'", "C", r"; it takes one of ant, .*, A, B$"),
    ):
        package.write_text(text)
        monkeypatch.delitem(sys.modules, "mujoco_playground", raising=False)
        with pytest.raises(ValueError, match=f"^--env-id is {env_id}{told}"):
            script.make_train(dataclasses.replace(config, env_id=env_id))
    monkeypatch.delitem(sys.modules, "mujoco_playground")


def test_help_without_ale_py(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    spec = importlib.util.spec_from_file_location("atari_alone", ROOT / "pqn_atari.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0 and "--env-id" in capsys.readouterr().out


X64 = """
import dataclasses, importlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import jax, jax.numpy as jnp
from conftest import SCRIPTS, floats
cases = list(SCRIPTS.items())
pql = SCRIPTS["pql_isaac_style"]
cases += [("pql_isaac_style", pql | {"algorithm": x}) for x in ("pql_d", "ddpg_n", "sac_n")]
for name, settings in cases:
    script = importlib.import_module(name)
    if hasattr(script, "make_jaxmarl"):  # SMAX itself takes no x64
        import teams
        teams.register(script)
        settings = settings | {"env_id": "smax_skirmish"}
    config = script.Config(**settings)
    def train(key, values):
        return script.make_train(dataclasses.replace(config, **values))(key)
    values = {name: jnp.float64(getattr(config, name)) for name in floats(config)}
    state, metrics = jax.eval_shape(train, jax.random.key(0), values)
    for path, leaf in jax.tree.leaves_with_path(state):
        path = jax.tree_util.keystr(path)
        of_env = ("physics",) if hasattr(script, "make_physics") else ("env_state", "obs")
        assert leaf.dtype != "float64" or any(x in path for x in of_env), (name, path)
    learned = {k: v.dtype.name for k, v in metrics.items() if k != "charts/physics_failures"}
    assert set(learned.values()) <= {"float32", "int32"}, (name, learned)
"""


def test_x64(monkeypatch):
    """With JAX_ENABLE_X64 the learners compute in float32, traced hyperparameters included."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    done = subprocess.run([sys.executable, "-c", X64, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
