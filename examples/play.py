"""Scores a trained policy over many greedy episodes, and draws one.

    python examples/play.py runs/<run>

The run may be one of any script. The episode is drawn as policy.gif for gymnax's classic control,
MinAtar, Catch and mazes, for Atari, for Craftax and for JaxMARL (slowly for SMAX; Overcooked needs
imageio); as policy.html for brax, to open in a browser.
"""

import dataclasses
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"SDL_AUDIODRIVER": "dummy", "SDL_VIDEODRIVER": "dummy"}  # pygame without a screen

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import serialization
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Player(NamedTuple):
    """A trained policy and its environments, all functions batched over them."""

    reset: Callable  # key -> obs, env_state
    step: Callable  # key, env_state, action -> obs, env_state, reward, ended
    act: Callable  # memory, obs, start (of an episode) -> memory, action
    memory: Any
    draw: Callable  # what record gives, folder -> path, or None where nothing can draw it


def feed_forward_player(script, config, variables, num_envs: int) -> Player:
    """Player for the scripts for gymnax with discrete actions."""
    env, params = script.make_env(config if hasattr(script, "GAMES") else config.env_id)
    num_actions = env.action_space(params).n
    if "actor" in variables:
        network, variables = script.MLP(num_actions, 0.01, config), variables["actor"]
    elif hasattr(config, "hidden_sizes"):
        network = script.QNetwork(num_actions, config.hidden_sizes)
    else:
        network = script.QNetwork(num_actions, config)

    def reset(key):
        return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, num_envs), params)

    def step(key, env_state, action):
        keys = jax.random.split(key, num_envs)
        obs, env_state, reward, terminated, truncated, _ = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(keys, env_state, action, params)
        return obs, env_state, reward, terminated | truncated

    def act(memory, obs, start):
        return memory, network.apply(variables, obs).argmax(-1)

    def draw(steps, folder):
        return draw_gymnax(config.env_id, [env_state for _, env_state, _ in steps], folder)

    return Player(reset, step, act, None, draw)


def atari_player(script, config, variables, num_envs: int) -> Player:
    """Player for pqn_atari.py; games end at the evaluation's limit."""
    limit = min(config.max_frames_in_episode, config.eval_steps * config.frame_skip)
    config = dataclasses.replace(config, max_frames_in_episode=limit)
    reset_games, step_games, handle, num_actions = script.make_env(config, num_envs, False)
    network = script.QNetwork(num_actions, config)

    def reset(key):
        games = reset_games(handle, key)
        return games.obs, games

    def step(key, games, action):
        games, (reward, terminated, truncated, *_) = step_games(games, action)
        return games.obs, games, reward, terminated | truncated

    def act(memory, obs, start):
        return memory, network.apply(variables, obs).argmax(-1).astype(jnp.int32)

    def draw(steps, folder):
        return draw_atari([games.obs[-1] for _, games, _ in steps], folder)

    return Player(reset, step, act, None, draw)


def recurrent_player(script, config, variables, num_envs: int) -> Player:
    """Player for pqn_rnn_craftax.py."""
    # Only first episodes count: later ones may share a world.
    config = dataclasses.replace(config, reset_ratio=num_envs)
    reset, env_step, num_actions = script.make_env(config, num_envs)
    network = script.QNetwork(num_actions, config)
    hidden = tuple(jnp.zeros((num_envs, config.hidden_size), jnp.float32) for _ in range(2))

    def step(key, env_state, action):
        obs, env_state, reward, terminated, truncated, _ = env_step(key, env_state, action)
        return obs, env_state, reward, terminated | truncated

    def act(memory, obs, start):
        hidden, last_action = memory
        inputs = (x[None] for x in (obs, last_action, start))
        hidden, q_values = network.apply(variables, hidden, *inputs)
        action = q_values[0].argmax(-1).astype(jnp.int32)
        return (hidden, action), action

    def draw(steps, folder):
        draw_env = draw_craftax if config.env_id in script.CRAFTAX else draw_gymnax
        return draw_env(config.env_id, [env_state for _, env_state, _ in steps], folder)

    return Player(reset, step, act, (hidden, jnp.zeros(num_envs, jnp.int32)), draw)


def continuous_player(script, config, variables, num_envs: int) -> Player:
    """Player for the scripts for continuous actions."""
    env = script.make_env(config.env_id, config.backend)
    statistics = script.Statistics(**variables["statistics"])
    obs_clip = config.obs_clip
    if hasattr(script, "GaussianPolicy"):
        actor = script.GaussianPolicy(env.action_size, config)
    elif hasattr(script, "DeterministicPolicy"):
        actor = script.DeterministicPolicy(env.action_size, config)
    else:
        obs_clip = jnp.inf  # only PQL's learners clip
        is_stochastic = config.algorithm == "sac_n"
        actor = script.MLP(env.action_size * (1 + is_stochastic), config.hidden_sizes)

    def reset(key):
        env_state = script.reset_envs(env, key, num_envs)
        return env_state.obs, env_state

    def step(key, env_state, action):
        env_state, step, _ = script.step_envs(env, key, env_state, action)
        return env_state.obs, env_state, step.reward, step.terminated | step.truncated

    def act(memory, obs, start):
        obs = script.normalize(obs, statistics, obs_clip)
        if hasattr(script, "GaussianPolicy"):
            return memory, jnp.clip(actor.apply(variables["actor"], obs)[0], -1, 1)
        if hasattr(script, "DeterministicPolicy"):
            return memory, actor.apply(variables["actor"], obs)
        return memory, jnp.tanh(actor.apply(variables["policy"], obs)[..., : env.action_size])

    def draw(steps, folder):
        physics = [env_state.physics for _, env_state, _ in steps]
        if hasattr(physics[0], "pipeline_state"):
            return draw_brax(config, physics, folder)
        return draw_gymnax(config.env_id, physics, folder)

    return Player(reset, step, act, None, draw)


def team_player(script, config, variables, num_envs: int) -> Player:
    """Player for pqn_vdn_jaxmarl.py; returns are the team's."""
    env_reset, env_step, env = script.make_env(config.env_id)
    network = script.QNetwork(env.action_space(env.agents[0]).n, config)
    hidden = jnp.zeros((num_envs * env.num_agents, config.hidden_size), jnp.float32)

    def reset(key):
        return jax.vmap(env_reset)(jax.random.split(key, num_envs))

    def step(key, env_state, action):
        obs, env_state, reward, _, terminated, truncated, _ = jax.vmap(env_step)(
            jax.random.split(key, num_envs), env_state, action
        )
        return obs, env_state, reward, terminated | truncated

    def act(hidden, obs, start):
        features, clear = (x.reshape(1, -1, *x.shape[2:]) for x in (obs.features, obs.clear))
        hidden, q_values = network.apply(variables, hidden, features, clear)
        q_values = jnp.where(obs.available, q_values.reshape(obs.available.shape), -jnp.inf)
        return hidden, q_values.argmax(-1)

    def draw(steps, folder):
        return draw_team(env, steps, folder)

    return Player(reset, step, act, hidden if config.network == "gru" else None, draw)


def draw_gymnax(env_id: str, env_states: list, folder: Path) -> Path | None:
    """policy.gif, by gymnax."""
    import gymnax
    from gymnax.visualize import Visualizer
    from matplotlib.animation import FuncAnimation, PillowWriter

    if env_id not in gymnax.registered_envs:
        return None
    while hasattr(env_states[0], "env_state"):  # out of the wrappers
        env_states = [state.env_state for state in env_states]
    visualizer = Visualizer(*gymnax.make(env_id), env_states)
    visualizer.init()
    if not hasattr(visualizer, "im"):
        return None
    path, num_frames = folder / "policy.gif", len(env_states)
    animation = FuncAnimation(
        visualizer.fig, visualizer.update, frames=num_frames, init_func=lambda: None
    )
    with tqdm(total=num_frames, desc="drawing", unit=" frames", disable=None) as bar:
        writer = PillowWriter(fps=1000 // visualizer.interval)
        animation.save(path, writer=writer, progress_callback=lambda *_: bar.update())
    return path


def draw_craftax(env_id: str, env_states: list, folder: Path) -> Path:
    """policy.gif, with Craftax's textures."""
    from PIL import Image

    name = "craftax_classic" if "Classic" in env_id else "craftax"
    renderer = importlib.import_module(f"craftax.{name}.renderer")
    render = jax.jit(renderer.make_craftax_pixel_renderer(16))
    frames = [
        Image.fromarray(np.asarray(render(state.env_state)).clip(0, 255).astype(np.uint8))
        for state in tqdm(env_states, desc="drawing", unit=" frames", disable=None)
    ]
    path = folder / "policy.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)
    return path


def draw_atari(screens: list, folder: Path) -> Path:
    """policy.gif, as the network sees the game."""
    from PIL import Image

    frames = [Image.fromarray(np.asarray(screen)).resize((336, 336)) for screen in screens]
    path = folder / "policy.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=70, loop=0)
    return path


def draw_brax(config, env_states: list, folder: Path) -> Path:
    """policy.html, by brax."""
    from brax import envs
    from brax.io import html

    with warnings.catch_warnings(action="ignore"):
        system = envs.get_environment(config.env_id, backend=config.backend).sys
    path = folder / "policy.html"
    path.write_text(html.render(system, [state.pipeline_state for state in env_states]))
    return path


def draw_team(env, steps: list, folder: Path) -> Path:
    """policy.gif, by JaxMARL."""
    from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer
    from jaxmarl.viz.visualizer import SMAXVisualizer

    path = folder / "policy.gif"
    if hasattr(env, "agent_view_size"):
        env_states = [state.env_state for _, state, _ in steps]
        OvercookedVisualizer().animate(env_states, env.agent_view_size, str(path))
    else:
        steps = [
            (key, state.env_state, dict(zip(env.agents, action, strict=True)))
            for key, state, action in steps
        ]
        SMAXVisualizer(env, steps).animate(str(path), view=False)
    return path


def score(player: Player, key: jax.Array, num_episodes: int) -> tuple[jax.Array, jax.Array]:
    """Returns and lengths [num_episodes] of an episode in each environment."""

    def step(carry):
        t, obs, start, memory, env_state, returns, lengths, finished = carry
        memory, action = player.act(memory, obs, start)
        obs, env_state, reward, ended = player.step(
            jax.random.fold_in(steps_key, t), env_state, action
        )
        returns, lengths = returns + reward * ~finished, lengths + ~finished
        return t + 1, obs, ended, memory, env_state, returns, lengths, finished | ended

    reset_key, steps_key = jax.random.split(key)
    zeros, start = jnp.zeros(num_episodes, jnp.float32), jnp.ones(num_episodes, bool)
    obs, env_state = player.reset(reset_key)
    carry = 0, obs, start, player.memory, env_state, zeros, zeros.astype(jnp.int32), ~start
    return jax.lax.while_loop(lambda carry: ~carry[-1].all(), step, carry)[5:7]


def record(player: Player, key: jax.Array) -> list:
    """Key, state and action of every step of an episode, without the axis of environments."""
    step, act = jax.jit(player.step), jax.jit(player.act)
    reset_key, steps_key = jax.random.split(key)
    obs, env_state = jax.jit(player.reset)(reset_key)
    memory, start, steps = player.memory, jnp.ones(1, bool), []
    with tqdm(desc="playing", unit=" steps", disable=None) as bar:
        while not steps or not start[0]:
            memory, action = act(memory, obs, start)
            step_key = jax.random.fold_in(steps_key, len(steps))
            key_of_env = jax.random.split(step_key, 1)[0]  # as step splits it
            steps.append((key_of_env, *jax.tree.map(lambda x: x[0], (env_state, action))))
            obs, env_state, _, start = step(step_key, env_state, action)
            bar.update()
    return steps


def main(
    run: tyro.conf.Positional[Path], seed: int = 0, num_episodes: int = 128, draw: bool = True
) -> None:
    """Print the score, and draw an episode into the run's folder.

    Args:
        run: Run folder.
        seed: Which of its seeds, counted from 0.
        num_episodes: Greedy episodes to score.
        draw: Draw an episode.
    """
    try:
        script = importlib.import_module(json.loads((run / "config.json").read_text())["script"])
        config = script.load_config(run)
        variables = serialization.msgpack_restore((run / "params.msgpack").read_bytes())
    except (OSError, ValueError, KeyError, TypeError, ModuleNotFoundError) as error:
        sys.exit(f"{run} is not the folder of a finished run: {error!r}")
    num_seeds = len(jax.tree.leaves(variables)[0])
    if not 0 <= seed < num_seeds:
        sys.exit(f"--seed is {seed}; it takes a number from 0 to {num_seeds - 1}")
    variables = jax.tree.map(lambda x: x[seed], variables)
    makers = {
        "make_physics": continuous_player,
        "make_craftax": recurrent_player,
        "make_jaxmarl": team_player,
        "Games": atari_player,
        "make_env": feed_forward_player,
    }
    make = next(make for name, make in makers.items() if hasattr(script, name))

    key = jax.random.key(0)
    try:
        player = make(script, config, variables, num_episodes)
    except ValueError as error:  # no such environment: docs/environments.md
        sys.exit(str(error))
    returns, lengths = jax.jit(lambda key: score(player, key, num_episodes))(key)
    print(
        f"return {returns.mean():.1f} ± {returns.std():.1f} (mean and standard deviation of "
        f"{num_episodes} episodes), {returns.min():.1f} to {returns.max():.1f}, "
        f"{lengths.mean():.0f} steps"
    )
    if draw:
        player = make(script, config, variables, 1)
        path = player.draw(record(player, jax.random.key(1)), run)
        print(path if path else f"nothing here can draw {config.env_id}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
