"""The programs of examples/: each runs, and computes what it says."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SCRIPTS, flags, strong
from flax import serialization
from jax.sharding import Mesh

sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture
def mesh():
    """One device, for examples that would choose theirs before JAX starts."""
    return Mesh(jax.devices()[:1], ("agents",))


def test_sweep(mesh, monkeypatch, tmp_path, capsys):
    """Every agent of the table is the script's own run with these hyperparameters and that seed."""
    sweep, ppo = importlib.import_module("sweep"), importlib.import_module("ppo_cartpole")
    monkeypatch.setattr(sweep, "start_devices", lambda max_per_device: (mesh, 2))
    tiny = " ".join([*flags("ppo_cartpole"), "--total-timesteps 2560"])
    grid = ("learning_rate=1e-3,1e-2", "gae-lambda=0.5,0.9")
    sweep.main("ppo_cartpole", grid, flags=tiny, num_seeds=3, out=tmp_path / "sweep")
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert len(table) == 12 and len(table.drop_duplicates()) == 12
    agent = table.iloc[7].to_dict()
    config = ppo.parse_args(tiny.split())
    own = dataclasses.replace(
        config, learning_rate=agent["learning_rate"], gae_lambda=agent["gae_lambda"]
    )
    _, metrics = jax.jit(ppo.make_train(own))(jax.random.key(int(agent["seed"])))
    last = np.nanmean(metrics["charts/episodic_return"][-config.num_updates // 10 :])
    np.testing.assert_allclose(agent["episodic_return"], last, rtol=0.05)
    assert (table.episodic_return - last).abs().idxmin() == 7

    best = table.groupby(["learning_rate", "gae_lambda"]).episodic_return.mean().idxmax()
    printed = capsys.readouterr().out
    assert f" 1. learning_rate={best[0]:g}, gae_lambda={best[1]:g}: " in printed
    assert "on fresh seeds: winner " in printed
    assert (tmp_path / "sweep.png").exists()
    with pytest.raises(SystemExit, match="num_envs is not a float field"):
        sweep.main("ppo_cartpole", ("num_envs=4,8", grid[1]))


@pytest.mark.parametrize(
    "script, second, options, told",
    [
        ("no_such_script", "gae_lambda=0.5,0.9", {}, "no_such_script is no script"),
        ("ppo_cartpole", "gae_lambda=0.5,2", {}, "--gae-lambda is 2.0"),
        ("ppo_cartpole", "gae_lambda", {}, "could not convert"),
        ("ppo_cartpole", "learning_rate=1e-4", {}, "it takes two fields"),
        ("ppo_cartpole", "gae_lambda=0.5,0.9", {"num_seeds": 1}, "it takes two fields"),
        ("ppo_cartpole", "gae_lambda=0.5,0.9", {"metric": "no/such"}, "--metric is no/such"),
    ],
)
def test_sweep_of_something_wrong(script, second, options, told, mesh, monkeypatch):
    sweep = importlib.import_module("sweep")
    monkeypatch.setattr(sweep, "start_devices", lambda max_per_device: (mesh, 2))
    with pytest.raises(SystemExit, match=f"^{told}"):
        sweep.main(script, ("learning_rate=1e-4,1e-3", second), **options)


def test_sweep_of_emulators_is_refused(mesh, monkeypatch):
    """Emulators are outside JAX: several agents would share them, and XLA hang or crash."""
    sweep = importlib.import_module("sweep")
    monkeypatch.setattr(sweep, "start_devices", lambda max_per_device: (mesh, 2))
    with pytest.raises(SystemExit, match=r"^pqn_atari trains one seed per process"):
        sweep.main("pqn_atari", ("learning_rate=1e-4,1e-3", "td_lambda=0.5,0.9"))


def test_wandb_sweep():
    """The flags that a sweep's agent passes are ones that the script takes."""
    lines = (ROOT / "examples" / "wandb_sweep.yaml").read_text().splitlines()
    script = next(line.split()[1] for line in lines if line.startswith("program:"))
    metric = next(re.search(r"name: ([\w/]+)", line)[1] for line in lines if "metric:" in line)
    values = {"learning_rate": "0.001", "gae_lambda": "0.25", "wandb_mode": "online"}
    names = [line.split(":")[0].strip() for line in lines if line.startswith("  ")]
    assert names == list(values)
    ppo = importlib.import_module(script.removesuffix(".py"))
    config = ppo.parse_args([f"--{name}={value}" for name, value in values.items()])
    assert config.learning_rate == 1e-3 and config.gae_lambda == 0.25
    tiny = ppo.Config(**SCRIPTS[ppo.__name__])
    assert metric in jax.eval_shape(ppo.make_train(tiny), jax.random.key(0))[1]


def test_baird():
    """Linear TD follows the expected updates of the textbook and diverges; layer norm does not."""
    baird = importlib.import_module("baird")
    key = jax.random.key(0)
    linear = baird.Network(1, (), False)
    values = np.asarray(baird.baird(linear, 0.0, key, steps_per_point=2))
    features = np.zeros((7, 8))
    features[:6, :6], features[:6, 7], features[6, 6:] = 2 * np.eye(6), 1, [1, 2]
    (weights,) = jax.tree.leaves(linear.init(key, jnp.asarray(features)))
    weights = np.asarray(weights, float)[:, 0]
    for _ in range(2):
        errors = 0.99 * features[6] @ weights - features @ weights
        weights += 0.01 / 7 * features.T @ errors
    np.testing.assert_allclose(values[0], np.abs(features @ weights).mean(), rtol=1e-5)

    many = baird.baird(linear, 0.0, key, steps_per_point=100)[-1]
    normed = baird.baird(baird.Network(1, (16,), True), 0.0, key, steps_per_point=100)[-1]
    assert many > 100 > 50 > normed


def test_evolution(mesh, monkeypatch, tmp_path, capsys):
    """It raises the fitness, and a run that was stopped goes on as if it had not been."""
    evolve = importlib.import_module("evolve_value_loss")
    run = evolve.over_agents(lambda x, seed: 10 * x[0] + seed, mesh)
    returns = run(np.array([[1.0], [2.0]]), np.arange(3))
    np.testing.assert_array_equal(returns, [[10, 11, 12], [20, 21, 22]])
    assert evolve.last_quarter({"charts/episodic_return": jnp.arange(8.0)}) == 6.5

    monkeypatch.setattr(evolve, "start_devices", lambda: mesh)
    monkeypatch.setattr(
        evolve,
        "over_agents",
        lambda *_: lambda x, seeds: -np.square(x - 1).mean(1)[:, None] + 0 * seeds,
    )
    options = {"population": 8, "hold_out_seeds": 2}
    evolve.main(generations=40, out=tmp_path / "whole", **options)
    evolve.main(generations=15, out=tmp_path / "parts", **options)
    # Killed while it writes its state: the last one is still there.
    saved = tmp_path / "parts.msgpack"
    before = saved.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evolve.os, "replace", lambda *_: exec("raise KeyboardInterrupt"))
        evolve.main(generations=16, out=tmp_path / "parts", **options)
    assert saved.read_bytes() == before
    evolve.main(generations=40, out=tmp_path / "parts", **options)
    assert {x.name for x in tmp_path.glob("parts.msgpack*")} == {saved.name}
    whole, parts = (
        pd.read_csv(tmp_path / f"{name}_generations.csv") for name in ("whole", "parts")
    )
    assert whole["mean"].iloc[-1] > whole["mean"].iloc[0] + 0.2
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), parts.drop(columns="seconds"))

    for damaged in (saved.read_bytes()[:-9], b"\x80"):
        saved.write_bytes(damaged)
        with pytest.raises(SystemExit, match=f"^{saved} cannot be read"):
            evolve.main(generations=41, out=tmp_path / "parts", **options)
        assert saved.read_bytes() == damaged


def test_evolved_loss_starts_as_the_squared_error():
    evolve, ppo = (
        importlib.import_module("evolve_value_loss"),
        importlib.import_module("ppo_cartpole"),
    )
    values, old_values, returns = jax.random.normal(jax.random.key(0), (3, 5))
    variables = evolve.LossWeights().init(jax.random.key(1), values, returns, old_values)
    loss = evolve.evolved_loss(variables, values, old_values, returns, 0.2)
    np.testing.assert_allclose(
        loss, ppo.value_loss(values, old_values, returns, jnp.inf), rtol=1e-6
    )
    # PPO learns with the loss that it is given.
    config = ppo.Config(**SCRIPTS["ppo_cartpole"])
    train = ppo.make_train(config, lambda values, *_: jnp.float32(7) + 0 * values.sum())
    _, metrics = train(jax.random.key(0), num_updates=1)
    np.testing.assert_allclose(metrics["losses/value_loss"], 7)


@pytest.mark.parametrize(
    "name", ["ppo_cartpole", "pqn_continuous_action", "pqn_rnn_craftax", "pqn_vdn_jaxmarl"]
)
def test_play(name, monkeypatch, tmp_path, capsys):
    """Its score is that of the run's own evaluation with the same parameters."""
    play, script = importlib.import_module("play"), importlib.import_module(name)
    record = play.record
    monkeypatch.setattr(play, "record", lambda *args: record(*args)[:5])  # drawing takes time
    changes = {"eval_episodes": 64, "total_timesteps": 64}
    if name == "ppo_cartpole":  # long enough to be far from a random policy, which returns about 20
        changes |= {"total_timesteps": 20_480, "num_steps": 64, "learning_rate": 3e-3}
    if name == "pqn_vdn_jaxmarl":
        importlib.import_module("teams").register(script)
        changes |= {"env_id": "smax_skirmish"}
    config = script.Config(**SCRIPTS[name] | changes)
    run = script.main(dataclasses.replace(config, runs_dir=str(tmp_path)))
    run = run.rename(tmp_path / "another name")  # the script is the one in config.json
    own = pd.read_csv(run / "metrics.csv")["eval/episodic_return"].iloc[-1]
    capsys.readouterr()
    play.main(run, num_episodes=64, draw=name == "ppo_cartpole")
    printed = capsys.readouterr().out
    mean, spread = map(float, re.match(r"return (\S+) ± (\S+) ", printed).groups())
    assert abs(mean - own) <= 4 * spread / 64**0.5 * 2**0.5 + 0.1
    assert name != "ppo_cartpole" or own > 60
    assert (run / "policy.gif").exists() == (name == "ppo_cartpole")


CONFIG = json.dumps({"script": "pqn_cartpole"})


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{"},
        {"config.json": "[]"},
        {"config.json": "{}"},
        {"config.json": '{"script": "no_such_script"}'},
        {"config.json": CONFIG},  # of a run that was killed
        {"config.json": CONFIG, "params.msgpack": "\u1234"},
    ],
)
def test_play_of_a_wrong_folder(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("play").main(tmp_path)
    (line,) = str(stop.value).splitlines()
    assert line.startswith(f"{tmp_path} is not the folder of a finished run: ")


def test_play_of_a_wrong_seed(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "params.msgpack").write_bytes(serialization.msgpack_serialize({"x": np.ones(2)}))
    for seed in (2, -1):
        with pytest.raises(SystemExit, match=f"--seed is {seed}; it takes a number from 0 to 1$"):
            importlib.import_module("play").main(tmp_path, seed=seed)


def test_play_of_an_unknown_environment(tmp_path):
    """As one that only its own program registers."""
    config = {"script": "pqn_cartpole", "env_id": "Mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "params.msgpack").write_bytes(serialization.msgpack_serialize({"x": np.ones(1)}))
    with pytest.raises(SystemExit, match=r"^--env-id is Mine; it takes one of"):
        importlib.import_module("play").main(tmp_path)


def test_quickstart(tmp_path, monkeypatch):
    """The notebook's cells, in order, with shorter runs."""
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    assert len(cells) == 10
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].splitlines()[-1] == "%pip install -q -r ../requirements.txt"
    text = re.sub(r"total_timesteps=\d+_000", "total_timesteps=20_480", "\n".join(code[1:-1]))
    text = text.replace("range(40)", "range(3)").replace("plt.show()", "plt.close()")
    text = text.replace("Config(", "Config(hidden_size=16, ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    matplotlib.use("agg")
    exec(text, {})
    assert Path("cartpole.gif").exists()


def test_craftax_in_gymnax(monkeypatch):
    """Craftax's own steps; truncated at the limit, terminated by a death, reset by gymnax."""
    example = importlib.import_module("craftax_in_gymnax")
    monkeypatch.setattr(example.CraftaxClassic.__init__, "__defaults__", (2,))  # worlds
    env, params = example.gymnax.make("Craftax-Classic")
    name = "Craftax-Classic-Symbolic-v1"
    craftax = example.make_craftax_env_from_name(name, auto_reset=False)

    @jax.jit
    def compiled(key, state, action):
        own_key, _ = jax.random.split(key)  # gymnax keeps the other for a reset
        return env.step(key, state, action, params), craftax.step(own_key, state, action)

    def both_steps(key, state, action):  # of the same types each time: one program
        return compiled(key, strong(state), jnp.int32(action))

    obs, state = env.reset(jax.random.key(0))
    starts = np.asarray(env.starts[0])
    assert (np.abs(starts - obs).sum(axis=1) == 0).any() and (starts[0] != starts[1]).any()
    for t in range(8):
        ours, theirs = both_steps(jax.random.key(t), state, t % 6)
        same = jax.tree.map(lambda x, y: (x == y).all(), ours[:3], theirs[:3])  # also its key
        assert jax.tree.all(same)
        np.testing.assert_array_equal(ours[5]["final_observation"], ours[0])
        assert not ours[3] and not ours[4]
        state = ours[1]

    limit = params.max_steps_in_episode
    last = {"timestep": jnp.int32(limit - 1)}
    late = {"timestep": jnp.int32(10_000)}  # Craftax's own limit, which is not used
    dying = {"player_health": jnp.int32(0)}
    for changes, ends in [(last, (0, 1)), (dying, (1, 0)), (late, (0, 1)), (dying | late, (1, 1))]:
        ours, theirs = both_steps(jax.random.key(9), state.replace(**changes), 0)
        obs, after, reward, *own_ends, info = ours
        assert tuple(map(int, own_ends)) == ends
        assert reward == theirs[2]
        np.testing.assert_array_equal(info["final_observation"], theirs[0])
        assert after.timestep == 0 and (obs == starts).all(axis=1).any()
        assert (obs != theirs[0]).any()

    dqn = importlib.import_module("dqn_cartpole")
    config = dqn.Config(**SCRIPTS["dqn_cartpole"] | {"env_id": "Craftax-Classic"})

    def init(key):  # make_train may stand in a jit: the worlds are constants there, too
        assert not isinstance(dqn.make_env("Craftax-Classic")[0].starts[0], jax.core.Tracer)
        return dqn.make_train(config).init(key)

    state = jax.eval_shape(init, jax.random.key(0))
    assert state.replay.obs.shape == (25, 4, 1345)
