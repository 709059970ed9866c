"""Navix's own PPO agent, timed: prints a line of JSON with its returns while exploring.

Its hyperparameters are those of the study's ppo_cartpole.py; all seeds at once, as its Experiment.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import navix
import numpy as np
from navix.agents import PPO, PPOHparams
from navix.agents.models import ActorCritic

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=300_000)
parser.add_argument("--env-id", default="Navix-Empty-8x8-v0")
args = parser.parse_args()


def flat(state):
    return navix.observations.symbolic(state).ravel().astype(jnp.float32)


size = navix.make(args.env_id).observation_space.shape
space = navix.spaces.Continuous.create((int(np.prod(size)),), jnp.zeros(()), jnp.ones(()))
env = navix.make(args.env_id, observation_fn=flat, observation_space=space)
settings = {"num_envs": 16, "num_steps": 128, "num_minibatches": 4, "num_epochs": 4, "lr": 1e-3}
network = ActorCritic(action_dim=len(env.action_set))
agent = PPO(PPOHparams(budget=args.total_timesteps, **settings), network, env)
keys = jnp.stack([jax.random.PRNGKey(seed) for seed in range(args.num_seeds)])
start = time.perf_counter()
train = jax.jit(jax.vmap(agent.train)).lower(keys).compile()
compiled = time.perf_counter()
_, logs = jax.block_until_ready(train(keys))
seconds = time.perf_counter() - compiled
ended = np.asarray(logs["done_mask"])  # [seeds, updates, steps, environments]
with np.errstate(invalid="ignore"):  # NaN where no episode ended
    returns = (ended * np.asarray(logs["returns"])).sum((2, 3)) / ended.sum((2, 3))
steps = settings["num_envs"] * settings["num_steps"] * np.arange(1, 1 + returns.shape[1])
result = {"compile_seconds": compiled - start, "run_seconds": seconds}
result |= {"steps_per_second": args.num_seeds * int(steps[-1]) / seconds}
print(json.dumps(result | {"global_step": steps.tolist(), "returns": returns.tolist()}))
