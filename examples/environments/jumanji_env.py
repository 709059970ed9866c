"""Jumanji's environments with one discrete action, registered with gymnax under their own ids.

    python examples/environments/jumanji_env.py pqn_cartpole --env-id Snake-v1 --total-timesteps 2e5

Any script for gymnax and discrete actions may take the place of pqn_cartpole, with its own flags;
--resume works the same way.
"""

import functools
import runpy
import sys
from pathlib import Path

import gymnax
import jax
import jax.numpy as jnp
import jumanji
from gymnax.environments import environment, spaces


class Jumanji(environment.Environment):
    """Its state is Jumanji's own and the number of steps so far."""

    def __init__(self, env_id: str):
        self.env = jumanji.make(env_id)
        if not isinstance(self.env.action_spec, jumanji.specs.DiscreteArray):
            raise ValueError(f"--env-id is {env_id}; its action is not a single discrete one")
        # Jumanji reports its time limit as a termination. Without one it reports only true ends,
        # and the limit is gymnax's. A game without a limit gets one, as it may go on for ever.
        self.limit, self.env.time_limit = getattr(self.env, "time_limit", 1000), 2**31 - 1

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=self.limit)

    def action_space(self, params):
        return spaces.Discrete(self.env.action_spec.num_values)

    def observation_space(self, params):
        obs, _ = jax.eval_shape(self.reset_env, jax.random.key(0), params)
        return spaces.Box(-jnp.inf, jnp.inf, obs.shape, obs.dtype)

    def reset_env(self, key, params):
        state, timestep = self.env.reset(key)
        return flatten(timestep.observation), (state, jnp.int32(0))

    def step_env(self, key, state, action, params):
        state, time = state
        state, timestep = self.env.step(state, action)
        obs, reward = flatten(timestep.observation), timestep.reward
        return obs, (state, time + 1), reward, timestep.last(), {}

    def is_truncated(self, state, params):
        return state[1] >= params.max_steps_in_episode


def flatten(observation) -> jax.Array:
    """All numbers of an observation but the step count, which can be thousands."""
    leaves = jax.tree.leaves_with_path(observation)
    kept = [x for path, x in leaves if "step_count" not in jax.tree_util.keystr(path)]
    return jnp.concatenate([x.ravel().astype(jnp.float32) for x in kept])


for env_id in jumanji.registered_environments():
    gymnax.register(env_id, functools.partial(Jumanji, env_id))

if __name__ == "__main__":  # runs the script that is named first, with the other arguments
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
