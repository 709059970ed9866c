"""Small teams in JaxMARL's terms: JaxMARL's own take a dozen seconds to compile."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Units(NamedTuple):
    unit_alive: jax.Array  # of two allies and an enemy
    features: jax.Array
    step: jax.Array


class State(NamedTuple):
    state: Units


class Skirmish:
    """As SMAX: units die by chance, which ends episodes; which actions there are varies."""

    agents = "ally_0", "ally_1"
    num_agents = 2

    def __init__(self, max_steps):
        self.max_steps = max_steps

    def action_space(self, agent):
        return types.SimpleNamespace(n=3)

    def obs(self, units):
        return {agent: units.features[i] for i, agent in enumerate(self.agents)}

    def reset(self, key):
        features = jax.random.normal(key, (2, 4), jnp.float32)
        units = Units(jnp.ones(3, bool), features, jnp.int32(0))
        return self.obs(units), State(units)

    def get_avail_actions(self, state):
        alive = state.state.unit_alive[:2, None]
        seen = state.state.features[:, :2] > 0
        available = jnp.hstack([jnp.ones((2, 1), bool), seen & alive]).astype(jnp.uint8)
        return {agent: available[i] for i, agent in enumerate(self.agents)}

    def step_env(self, key, state, actions):
        alive_key, features_key = jax.random.split(key)
        survive = jax.random.uniform(alive_key, (3,)) > 0.15
        features = jax.random.normal(features_key, (2, 4), jnp.float32)
        units = Units(state.state.unit_alive & survive, features, state.state.step + 1)
        won = ~units.unit_alive[2] & units.unit_alive[:2].any()
        chosen = jnp.array([actions[agent] for agent in self.agents])
        reward = 0.1 * chosen.sum() + 0.2 * state.state.features[0, 0] * (chosen[0] == 1) + won
        dones = {agent: ~units.unit_alive[i] for i, agent in enumerate(self.agents)}
        over = ~units.unit_alive[2] | ~units.unit_alive[:2].any()
        dones["__all__"] = over | (units.step >= self.max_steps)
        return self.obs(units), State(units), dict.fromkeys(self.agents, reward), dones, {}


class Kitchen:
    """As Overcooked: only the limit of 5 steps ends an episode; all steps are the same."""

    agents = "agent_0", "agent_1"
    num_agents = 2
    max_steps = 5

    def __init__(self, reward, shaped_rewards):
        self.reward, self.shaped_rewards = reward, shaped_rewards

    def action_space(self, agent):
        return types.SimpleNamespace(n=2)

    def obs(self):
        return dict.fromkeys(self.agents, jnp.ones((5, 4, 2), jnp.uint8))

    def reset(self, key):
        return self.obs(), jnp.int32(0)

    def step_env(self, key, time, actions):
        rewards = dict.fromkeys(self.agents, jnp.float32(self.reward))
        shaped = {a: jnp.float32(x) for a, x in zip(self.agents, self.shaped_rewards, strict=True)}
        dones = dict.fromkeys([*self.agents, "__all__"], time + 1 >= self.max_steps)
        return self.obs(), time + 1, rewards, dones, {"shaped_reward": shaped}


TEAMS = {"smax_skirmish": Skirmish(100), "smax_short": Skirmish(4)}
TEAMS |= {"overcooked_clock": Kitchen(1, (0, 0)), "overcooked_shaped": Kitchen(2, (1, 3))}


def register(script):
    """Lets the script make them, too."""
    make = script.make_jaxmarl
    if make.__module__ == script.__name__:  # not yet registered
        script.make_jaxmarl = lambda env_id: TEAMS[env_id] if env_id in TEAMS else make(env_id)
