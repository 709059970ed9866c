"""Craftax-Classic as an environment of your own, for the scripts that train on gymnax.

    python examples/craftax_in_gymnax.py dqn_cartpole --env-id Craftax-Classic --eval-interval 0
    python examples/craftax_in_gymnax.py pqn_cartpole --env-id Craftax-Classic --eval-interval 0

The first word is a script, the others are its flags. gymnax's Environment does the resets, and
keeps an episode's last observation. Craftax reports its time limit as if the player had died; here
an episode is truncated by a limit of its own, and terminated only by a death.

Generating a world takes as long as more than ten steps, and under vmap gymnax computes a reset in
every step. So worlds are generated once, and each episode starts in one of them, drawn at random;
what happens after the start, such as where creatures appear, is random as ever.
"""

import runpy
import sys
from pathlib import Path

import gymnax
import jax
from craftax.craftax_classic.envs.craftax_state import EnvParams
from craftax.craftax_env import make_craftax_env_from_name
from flax import struct
from gymnax.environments.environment import Environment
from gymnax.environments.spaces import Box, Discrete


@struct.dataclass
class Params(EnvParams):
    """Craftax's parameters, and the time limit."""

    max_timesteps: int = 2**31 - 1  # Craftax's own, never reached: it would look like a death
    max_steps_in_episode: int = 1000


class CraftaxClassic(Environment):
    """Craftax-Classic-Symbolic, terminated when the player dies and truncated at a time limit."""

    default_params = Params()

    def __init__(self, num_worlds: int = 1024):
        self.game = make_craftax_env_from_name("Craftax-Classic-Symbolic-v1", auto_reset=False)

        def generate(key):
            return self.game.reset_env(key, self.default_params)

        with jax.ensure_compile_time_eval():  # make_train may stand in a jit or vmap
            keys = jax.random.split(jax.random.key(0), num_worlds)
            self.starts = jax.jit(lambda: jax.lax.map(generate, keys))()

    def reset_env(self, key, params):
        number = jax.random.randint(key, (), 0, len(self.starts[0]))
        return jax.tree.map(lambda x: x[number], self.starts)

    def step_env(self, key, state, action, params):
        obs, state, reward, is_dead, _ = self.game.step_env(key, state, action, params)
        return obs, state, reward, is_dead, {"achievements": state.achievements}

    def is_truncated(self, state, params):
        return state.timestep >= params.max_steps_in_episode

    def observation_space(self, params):
        return Box(0, 1, self.game.observation_space(params).shape)

    def action_space(self, params):
        return Discrete(self.game.num_actions)


gymnax.register("Craftax-Classic", CraftaxClassic)

if __name__ == "__main__":  # runs the script that is named first, with the other arguments
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
