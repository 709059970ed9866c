"""PureJaxQL's PQN, timed: its scripts for gymnax, MinAtar, Craftax and, with memory, MemoryChain.

Run it with the Python of PureJaxQL's own environment, its checkout on PYTHONPATH. Prints a line of
JSON: seconds to compile and to run, steps per second over all seeds and, where asked for, returns.
Hyperparameters are those of its configuration files, changed by --set.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import jax
import numpy as np
import purejaxql
import yaml

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="CartPole-v1")
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=500_000)
parser.add_argument("--evaluate", action="store_true", help="returns of its own evaluation")
parser.add_argument("--curve", action="store_true", help="returns while training")
parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
args = parser.parse_args()

kinds = {
    "MinAtar": ("pqn_minatar", "pqn_minatar"),
    "Craftax": ("pqn_rnn_craftax", "pqn_rnn_craftax"),
    "MemoryChain": ("pqn_rnn_gymnax", "pqn_rnn_memory_chain"),
}
module, alg = next(
    (names for kind, names in kinds.items() if kind in args.env_id), ("pqn_gymnax", "pqn_cartpole")
)
make_train = importlib.import_module(f"purejaxql.{module}").make_train
config = yaml.safe_load((Path(purejaxql.__file__).parent / f"config/alg/{alg}.yaml").read_text())
config |= {
    "ENV_NAME": args.env_id,
    "TOTAL_TIMESTEPS": args.total_timesteps,
    "TOTAL_TIMESTEPS_DECAY": args.total_timesteps,
}
config |= {"TEST_DURING_TRAINING": args.evaluate, "WANDB_MODE": "disabled"}
config |= {
    name: yaml.safe_load(value) for name, value in (change.split("=") for change in args.set)
}
keys = jax.random.split(jax.random.PRNGKey(0), args.num_seeds)
start = time.perf_counter()
train = jax.jit(jax.vmap(make_train(config))).lower(keys).compile()
compiled = time.perf_counter()
results = jax.block_until_ready(train(keys))
seconds = time.perf_counter() - compiled
result = {
    "compile_seconds": compiled - start,
    "run_seconds": seconds,
    "steps_per_second": int(results["runner_state"][0].timesteps.sum()) / seconds,
}
metrics = results["metrics"]
steps = np.asarray(metrics["env_step"])[0]
if args.evaluate:
    interval = max(1, int(config["NUM_UPDATES"] * config["TEST_INTERVAL"]))
    evaluated = slice(interval - 1, None, interval)
    returns = np.asarray(metrics["test/returned_episode_returns"])[:, evaluated]
    result |= {"global_step": steps[evaluated].tolist(), "returns": returns.tolist()}
elif args.curve:  # of the last episode of each environment: zero until one has ended
    returns = np.asarray(metrics["returned_episode_returns"])
    result |= {"global_step": steps.tolist(), "returns": returns.tolist()}
print(json.dumps(result))
