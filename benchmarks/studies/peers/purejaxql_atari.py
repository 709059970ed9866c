"""PureJaxQL's PQN on Atari, timed, with an envpool of today.

Run it with the Python of PureJaxQL's own environment with envpool, its checkout on PYTHONPATH.
Prints a line of JSON: seconds to compile and to run, and steps per second. Hyperparameters are
those of its configuration file, changed by --set. The learner is PureJaxQL's as it is; a few lines
stand in for gym 0.23, of which it uses the base class of wrappers.
"""

import argparse
import importlib
import json
import sys
import time
import types
from pathlib import Path

import jax
import yaml


class Wrapper:
    """The base class of gym's wrappers."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self):
        return self.env.reset()


class OldEnv(Wrapper):
    """An environment of gymnasium as gym 0.23 had it: one flag for both kinds of ends."""

    def reset(self):
        return self.env.reset()[0]

    def xla(self):
        handle, recv, send, step = self.env.xla()

        def old_step(handle, action):
            handle, (obs, reward, terminated, truncated, info) = step(handle, action)
            ends = {"terminated": info["terminated"], "TimeLimit.truncated": truncated}
            return handle, (obs, reward, terminated | truncated, info | ends)

        return handle, recv, send, old_step


gym = types.ModuleType("gym")
gym.__version__, gym.Wrapper = "0.23.1", Wrapper
sys.modules["gym"] = gym
purejaxql_atari = importlib.import_module("purejaxql.pqn_atari")
make_pool = purejaxql_atari.envpool.make
purejaxql_atari.envpool.make = lambda name, env_type, **options: OldEnv(
    make_pool(name, env_type="gymnasium", **options)
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="Pong-v5")
parser.add_argument("--total-timesteps", type=int, default=8192)
parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
args = parser.parse_args()

config = yaml.safe_load(
    (Path(purejaxql_atari.__file__).parent / "config/alg/pqn_atari.yaml").read_text()
)
config |= {"ENV_NAME": args.env_id, "TEST_DURING_TRAINING": False, "WANDB_MODE": "disabled"}
config |= {"TOTAL_TIMESTEPS": args.total_timesteps, "TOTAL_TIMESTEPS_DECAY": args.total_timesteps}
config |= {"SEED": 0}
config |= {
    name: yaml.safe_load(value) for name, value in (change.split("=") for change in args.set)
}
key = jax.random.PRNGKey(0)
start = time.perf_counter()
train = jax.jit(purejaxql_atari.make_train(config)).lower(key).compile()
compiled = time.perf_counter()
results = jax.block_until_ready(train(key))
seconds = time.perf_counter() - compiled
steps = int(results["runner_state"][0].timesteps)
result = {"compile_seconds": compiled - start, "run_seconds": seconds}
print(json.dumps(result | {"steps_per_second": steps / seconds}))
