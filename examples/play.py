"""Plays an episode of a trained policy into policy.gif: python examples/play.py runs/<run>

Loads params.msgpack as anyone would, plays one greedy episode and lets gymnax draw it: the classic
control tasks (with pygame, which requirements.txt brings), MinAtar, Catch, and the mazes. JaxMARL
draws its teams, Overcooked's with imageio.
"""

import importlib
import os
import sys
from pathlib import Path

os.environ |= {
    "SDL_AUDIODRIVER": "dummy",
    "SDL_VIDEODRIVER": "dummy",
}  # pygame draws without a screen

import jax
import jax.numpy as jnp
import tyro
from flax import serialization
from gymnax.visualize import Visualizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def greedy_policy(script, config, num_actions: int, variables):
    """What the trained network does: from an observation to an action."""
    if "actor" in variables:
        network, variables = script.MLP(num_actions, 0.01, config), variables["actor"]
    elif hasattr(config, "hidden_sizes"):
        network = script.QNetwork(num_actions, config.hidden_sizes)
    else:
        network = script.QNetwork(num_actions, config)
    return jax.jit(lambda obs: network.apply(variables, obs).argmax())


def draw_team(script, config, variables, max_steps: int, gif: str) -> int:
    """Plays and draws a greedy episode of pqn_vdn_jaxmarl; returns its number of steps."""
    from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer
    from jaxmarl.viz.visualizer import SMAXVisualizer

    reset, step, env = script.make_env(config.env_id)
    network, step = script.QNetwork(env.action_space(env.agents[0]).n, config), jax.jit(step)
    hidden = jnp.zeros((env.num_agents, config.hidden_size)) if config.network == "gru" else None
    obs, state = reset(jax.random.key(0))
    played = []
    while not state.ended and len(played) < max_steps:
        hidden, q = network.apply(variables, hidden, obs.features[None], obs.clear[None])
        action = jnp.where(obs.available, q[0], -jnp.inf).argmax(-1)
        key = jax.random.key(len(played))
        played.append((key, state.env_state, dict(zip(env.agents, action, strict=True))))
        obs, state, *_ = step(key, state, action)
    if config.env_id.startswith("smax"):
        SMAXVisualizer(env, played).animate(gif, view=False)
    else:
        states = [env_state for _, env_state, _ in played]
        OvercookedVisualizer().animate(states, env.agent_view_size, gif)
    return len(played)


def innermost(env_state):
    """The state of the environment inside those of its wrappers."""
    return innermost(env_state.env_state) if hasattr(env_state, "env_state") else env_state


def main(run: tyro.conf.Positional[Path], seed: int = 0, max_steps: int = 200) -> None:
    """Write policy.gif into the run folder.

    Args:
        run: Run folder.
        seed: Which of its seeds, counted from 0.
        max_steps: At most this many frames; drawing one takes about a tenth of a second.
    """
    script = importlib.import_module(run.resolve().name.split("__")[0])
    config = script.load_config(run)
    variables = serialization.msgpack_restore((run / "params.msgpack").read_bytes())
    variables = jax.tree.map(lambda x: x[seed], variables)
    if hasattr(script, "make_jaxmarl"):
        steps = draw_team(script, config, variables, max_steps, str(run / "policy.gif"))
        print(f"{steps} steps in {run / 'policy.gif'}")
        return
    env, env_params = script.make_env(config if hasattr(script, "GAMES") else config.env_id)
    act = greedy_policy(script, config, env.num_actions, variables)

    obs, env_state = env.reset(jax.random.key(0), env_params)
    env_states, ended = [], False
    while not ended and len(env_states) < max_steps:
        env_states.append(innermost(env_state))
        key = jax.random.key(len(env_states))
        obs, env_state, _, terminated, truncated, _ = env.step(key, env_state, act(obs), env_params)
        ended = terminated or truncated
    Visualizer(env, env_params, env_states).animate(str(run / "policy.gif"))
    print(f"{len(env_states)} frames in {run / 'policy.gif'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
