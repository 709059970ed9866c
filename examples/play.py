"""Plays an episode of a trained policy into policy.gif: python examples/play.py runs/<run>

Loads params.msgpack as anyone would, plays one greedy episode and lets gymnax draw it: the classic
control tasks (with pygame, which requirements.txt brings), MinAtar, Catch, and the mazes.
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
