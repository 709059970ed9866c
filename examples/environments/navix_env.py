"""Navix's grid worlds (MiniGrid in JAX), registered with gymnax under their own ids.

    python examples/environments/navix_env.py ppo_cartpole --env-id Navix-Empty-8x8-v0

Any script for gymnax and discrete actions may take the place of ppo_cartpole, with its own flags;
--resume works the same way. It needs pip install "navix>=0.7.4,<0.8".
"""

import functools
import runpy
import sys
from pathlib import Path

import gymnax
import navix
from gymnax.environments import environment, spaces


class Navix(environment.Environment):
    """Its state is Navix's own Timestep, which holds all that a step needs."""

    def __init__(self, env_id: str):
        self.env = navix.make(env_id)

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=self.env.max_steps)

    def action_space(self, params):
        return spaces.Discrete(len(self.env.action_set))

    def observation_space(self, params):
        space = self.env.observation_space  # navix calls it discrete
        return spaces.Box(0, 255, space.shape, space.dtype)

    def reset_env(self, key, params):
        timestep = self.env.reset(key)
        return timestep.observation, timestep

    def step_env(self, key, state, action, params):
        # Not step, which answers the action after an end with a reset. A termination at the limit
        # is one: Navix reports a truncation only where nothing else ended the episode.
        timestep = self.env._step(state, action)
        return timestep.observation, timestep, timestep.reward, timestep.is_termination(), {}

    def is_truncated(self, state, params):
        return state.t >= params.max_steps_in_episode


for env_id in navix.registry():
    gymnax.register(env_id, functools.partial(Navix, env_id))

if __name__ == "__main__":  # runs the script that is named first, with the other arguments
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
