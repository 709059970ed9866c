"""What Atari alone has: emulators outside JAX, steps that are none, lives, the Nature network."""

import dataclasses
import functools
import importlib
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from conftest import flags as tiny_flags
from test_bad_flags import run
from test_train import assert_equal, equations

pytest.importorskip("ale_py")

import ale_py

import pqn_atari as atari

sys.path.insert(0, str(ROOT / "examples"))

TINY = atari.Config(
    num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=12 * 16, num_channels=2,
    hidden_size=16, eval_interval=0, eval_episodes=1, eval_steps=10,
)  # fmt: skip


def by_hand(game, actions, max_frames, episodic_life):
    """What each action leads to, in a new emulator: reward, terminated, truncated, is_reset."""
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("random_seed", 0)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    meanings = ale.getMinimalActionSet()
    frames, is_over, rows = 0, True, []
    for action in [0, *actions]:
        if is_over:
            ale.reset_game()
            ale.act(ale_py.Action.FIRE)
            frames, is_over = 0, False
            rows.append((0, False, False, True))
            continue
        lives, reward = ale.lives(), 0
        for _ in range(4):
            reward += ale.act(meanings[action])
            frames += 1
            if ale.game_over() or frames == max_frames:
                break
        ended = ale.game_over() or (episodic_life and 0 < ale.lives() < lives)
        is_over = ale.game_over() or frames == max_frames
        rows.append((reward, ended, is_over and not ended, False))
    return [np.array(column) for column in zip(*rows[1:], strict=True)]


@pytest.mark.parametrize(
    "game, episodic_life, max_frames, steps",
    [
        ("breakout", True, 10**5, 600),
        ("space_invaders", False, 10**5, 1150),
        ("breakout", True, 302, 320),
    ],
)
def test_transitions_are_those_of_the_emulator(game, episodic_life, max_frames, steps):
    """Through lives lost, games over and time limits, with the same actions."""
    settings = {"env_id": game, "noop_max": 0, "max_frames_in_episode": max_frames}
    config = dataclasses.replace(TINY, **settings)
    reset, step, handle, num_actions = atari.make_env(config, 1, episodic_life)
    actions = np.random.default_rng(0).integers(num_actions, size=steps).astype(np.int32)

    def play(key):
        games = reset(handle, key)
        return jax.lax.scan(lambda g, a: step(g, a[None]), games, actions)[1]

    outcome = jax.jit(play)(jax.random.key(0))
    *outcome, episodes = jax.tree.map(lambda x: np.asarray(x)[:, 0], outcome)
    assert_equal(outcome, by_hand(game, actions, max_frames, episodic_life))
    reward, terminated, truncated, is_reset = outcome
    np.testing.assert_array_equal(episodes["returned_episode"], is_reset)
    begins = [0, *np.flatnonzero(is_reset)]
    scores = [reward[a:b].sum() for a, b in itertools.pairwise(begins)]
    np.testing.assert_array_equal(episodes["returned_episode_returns"][is_reset], scores)
    lengths = [(~is_reset[a:b]).sum() for a, b in itertools.pairwise(begins)]
    np.testing.assert_array_equal(episodes["returned_episode_lengths"][is_reset], lengths)
    games = is_reset.sum()
    assert games >= 2 and max(scores) > 0 and (game == "breakout" or reward.max() > 1)
    assert truncated.sum() == (games if max_frames == 302 else 0)
    assert (terminated.sum() > games) == episodic_life


# Scripted games in place of the emulators, with one action and a picture for each observation: a
# life is lost, the time limit is reached and a new game starts, as one does after a game over.
SCRIPT = {
    "reward": [2, 0, -3, 1, 0, 1, 0, 4, 0, 0, 2, -5, 0, 1, 0, 9],
    "terminated": [t in (3, 10) for t in range(16)],
    "truncated": [t == 6 for t in range(16)],
    "is_reset": [t in (7, 11) for t in range(16)],
}
PICTURES = np.random.default_rng(0).integers(256, size=(17, 4, 84, 84)).astype(np.uint8)


@functools.cache
def scripted_train(bootstrap):
    """The settings of one update of the scripted games, and its program: (key, is_reset) -> ..."""
    settings = {"num_steps": 16, "num_minibatches": 1, "num_epochs": 1, "total_timesteps": 32}
    settings |= {"learning_rate": 0.0, "gamma": 0.9, "td_lambda": 0.5, "eval_episodes": 2}
    settings |= {"bootstrap_on_truncation": bootstrap, "eval_interval": int(bootstrap)}
    config = dataclasses.replace(TINY, **settings)

    def train(key, is_reset):
        def scripted_env(config, num_envs, episodic_life):
            def at(values, games):
                return jnp.array(values)[games.episode_length % len(values)]

            def observe(games):
                return games._replace(obs=at(PICTURES, games))

            def reset(handle, key):
                zeros = jnp.zeros(num_envs, jnp.int32)
                begin = zeros if episodic_life else 4 * jnp.arange(num_envs)  # of evaluations
                return observe(atari.Games(handle, None, zeros, zeros.astype(jnp.float32), begin))

            def step(games, action):
                outcome = [at(x, games) for x in (SCRIPT | {"is_reset": is_reset}).values()]
                names = ("returned_episode", "returned_episode_returns", "returned_episode_lengths")
                info = dict.fromkeys(names, outcome[-1])
                games = games._replace(episode_length=games.episode_length + 1)
                return observe(games), (*outcome, info)

            return reset, step, np.zeros(8, np.uint8), 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atari, "make_env", scripted_env)
            return atari.make_train(config)(key)

    return config, jax.jit(train)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_steps_that_are_none_are_not_learned_from(bootstrap):
    """The loss of a scripted rollout, from the equation; the evaluation counts raw rewards."""
    config, train = scripted_train(bootstrap)
    state, metrics = train(jax.random.key(0), jnp.array(SCRIPT["is_reset"]))
    network = atari.QNetwork(1, config)
    values = np.asarray(jax.jit(network.apply)(state.variables, PICTURES)).max(-1)

    errors, target = [], None
    for t in reversed(range(16)):
        terminal = SCRIPT["terminated"][t] or (SCRIPT["truncated"][t] and not bootstrap)
        cut = SCRIPT["terminated"][t] or SCRIPT["truncated"][t] or t == 15
        future = values[t + 1] if cut else 0.5 * values[t + 1] + 0.5 * target
        target = np.sign(SCRIPT["reward"][t]) + 0.9 * (0 if terminal else future)
        if not SCRIPT["is_reset"][t]:
            errors.append(values[t] - target)
    np.testing.assert_allclose(metrics["losses/td_loss"][0], 0.5 * np.mean(np.square(errors)), 1e-3)
    expected = values[:16][~np.array(SCRIPT["is_reset"])].mean()
    np.testing.assert_allclose(metrics["losses/q_values"][0], expected, 1e-3)
    if bootstrap:
        scores = sum(SCRIPT["reward"][:4]), sum(SCRIPT["reward"][4:7])
        np.testing.assert_array_equal(metrics["eval/episodic_return"], np.mean(scores))
        np.testing.assert_array_equal(metrics["eval/episodic_length"], np.mean([4, 3]))


def test_a_minibatch_without_steps_teaches_nothing():
    _, train = scripted_train(False)
    state, metrics = train(jax.random.key(0), jnp.ones(16, bool))
    assert metrics["losses/td_loss"] == metrics["losses/grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("size, stride, side", [(8, 4, 84), (4, 2, 20), (3, 1, 9)])
def test_convolution(size, stride, side, monkeypatch):
    """The products on a CPU are XLA's convolution, forwards and backwards."""
    x = jax.random.normal(jax.random.key(0), (2, 3, side, side, 4))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 4, 5)) / size

    def both(x, kernel):
        return atari.convolve(x, kernel, stride), jax.grad(
            lambda *inputs: jnp.sin(atari.convolve(*inputs, stride)).sum(), argnums=(0, 1)
        )(x, kernel)

    products = jax.jit(lambda *inputs: both(*inputs))(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_equal(products, jax.jit(both)(x, kernel), rtol=1e-4, atol=1e-4)
    assert products[0].shape == (2, 3, *(2 * [(side - size) // stride + 1]), 5)


def test_flags_of_the_games():
    """18 actions; with actions that all stick, they are no-ops; games start at different frames."""
    config = dataclasses.replace(TINY, repeat_action_probability=1.0, full_action_space=True)
    reset, step, handle, num_actions = atari.make_env(config, 4, True)
    assert num_actions == 18 and atari.make_env(TINY, 1, True)[3] == 6

    @jax.jit
    def play(action):
        games = reset(handle, jax.random.key(0))
        many = jnp.full(10, action)
        return games.obs, jax.lax.scan(lambda g, a: (step(g, jnp.full(4, a))[0], 0), games, many)[0]

    _, games = play(jnp.int32(3))
    assert_equal(games.obs, play(jnp.int32(4))[1].obs)
    assert len(np.unique(np.asarray(games.obs).reshape(4, -1), axis=0)) > 2


@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_norms(norm):
    network = atari.QNetwork(3, dataclasses.replace(TINY, norm=norm))
    frames = jax.random.bits(jax.random.key(0), (2, 4, 84, 84), jnp.uint8)
    variables = jax.jit(network.init)(jax.random.key(1), frames)
    assert ("batch_stats" in variables) == (norm == "batch_norm")
    train = functools.partial(network.apply, train=True, mutable=["batch_stats"])
    q, updated = jax.jit(train)(variables, frames)
    assert q.shape == (2, 3) and np.isfinite(q).all()
    assert all((x != 0).any() for x in jax.tree.leaves(updated))


def test_no_emulators_for_no_evaluation():
    for eval_interval, more in ((0, 1), (1, 2)):
        before = len(atari.EMULATORS)
        train = atari.make_train(dataclasses.replace(TINY, eval_interval=eval_interval))
        assert len(atari.EMULATORS) == before + more
        state = jax.eval_shape(train.init, jax.random.key(0))
        assert (state.eval_handle is None) == (eval_interval == 0)


def test_one_process_is_one_host():
    with pytest.raises(ValueError, match=r"^--distributed "):
        dataclasses.replace(TINY, distributed=True)


def test_no_callback():
    jaxpr = jax.make_jaxpr(atari.make_train(TINY))(jax.random.key(0)).jaxpr
    names = {equation.primitive.name for equation in equations(jaxpr)}
    assert {"scan", "ffi_call"} <= names and not [name for name in names if "callback" in name]


@pytest.mark.parametrize(
    "env_id, hint", [("Pong-v5", "pong"), ("mspacman", "ms_pacman"), ("joust", "pong")]
)
def test_unknown_game(env_id, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(atari, ["--env-id", env_id]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert f"--env-id is {env_id}" in last_line and hint in last_line.split("such as")[1]


def test_resumed_run_starts_new_games(tmp_path, monkeypatch, capsys):
    """Stopped after a chunk: all but the games is as it was saved, and the run is completed."""
    monkeypatch.setattr(atari.Config, "steps_per_update", 2**13)  # an update is a chunk
    flags = [*tiny_flags("pqn_atari"), "--total-timesteps=128", f"--runs-dir={tmp_path}"]
    flags += ["--eval-interval=0"]
    flags += ["--env-id=freeway"]  # its first frames tell games apart
    record, restore, signals, restored = atari.record, atari.restore, [], []
    with monkeypatch.context() as patch:
        patch.setattr(atari, "record", lambda *args: signals.append(15) or record(*args))
        with pytest.raises(SystemExit):
            atari.main(atari.parse_args(flags), signals)
    (folder,) = tmp_path.iterdir()

    def watched(*args):
        restored.append(jax.device_get((args[-1][0], *restore(*args))))
        return restore(*args)

    params = (folder / "params.msgpack").read_bytes()
    monkeypatch.setattr(atari, "restore", watched)
    capsys.readouterr()
    atari.main(atari.parse_args(["--resume", str(folder)]))
    fresh, states, _ = restored[0]
    assert atari.serialization.to_bytes(states.params) == params
    assert_equal((states.games, states.eval_handle), (fresh.games, fresh.eval_handle))
    init = jax.jit(atari.make_train(atari.load_config(folder)).init)
    first = init(jax.random.key(0)).games
    assert (states.games.obs[0] != first.obs).any()  # not the first ones again
    assert states.update == [2]
    assert "with new games" in capsys.readouterr().err.splitlines()[0]
    table = pd.read_csv(folder / "metrics.csv")
    np.testing.assert_array_equal(table["global_step"], [32, 64, 96, 128])
    assert json.loads((folder / "metadata.json").read_text())["updates"] == 4


def test_play(tmp_path, monkeypatch, capsys):
    """Without no-ops all games are alike: its score is that of the run's own evaluation."""
    play = importlib.import_module("play")
    record = play.record
    monkeypatch.setattr(play, "record", lambda *args: record(*args)[:5])  # drawing takes time
    flags = ["--total-timesteps=32", "--eval-steps=100", "--noop-max=0", f"--runs-dir={tmp_path}"]
    folder = atari.main(atari.parse_args([*tiny_flags("pqn_atari"), *flags]))
    own = pd.read_csv(folder / "metrics.csv")["eval/episodic_return"].iloc[-1]
    assert f"greedy (games cut at --eval-steps) {own:.1f}" in capsys.readouterr().out
    play.main(folder, num_episodes=2)
    assert f"return {own:.1f} ± 0.0 " in capsys.readouterr().out
    assert own < 0 and (folder / "policy.gif").exists()
