"""PureJaxQL's pqn_gymnax.py, timed: run it with the Python of PureJaxQL's own environment, its checkout on PYTHONPATH.

Prints one line of JSON: seconds to compile and to run, steps per second over all seeds, and the curve of its own
evaluation where --evaluate is given. Its hyperparameters are those of its configuration file for CartPole.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
import purejaxql
import yaml
from purejaxql.pqn_gymnax import make_train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=500_000)
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--norm-type", default="layer_norm")
args = parser.parse_args()

path = Path(purejaxql.__file__).parent / "config/alg/pqn_cartpole.yaml"
config = yaml.safe_load(path.read_text())
config |= {"TOTAL_TIMESTEPS": args.total_timesteps, "TOTAL_TIMESTEPS_DECAY": args.total_timesteps}
config |= {"TEST_DURING_TRAINING": args.evaluate, "WANDB_MODE": "disabled"}
config |= {"NORM_TYPE": args.norm_type}
keys = jax.random.split(jax.random.PRNGKey(0), args.num_seeds)
start = time.perf_counter()
train = jax.jit(jax.vmap(make_train(config))).lower(keys).compile()
compiled = time.perf_counter()
metrics = jax.block_until_ready(train(keys))["metrics"]
seconds = time.perf_counter() - compiled
steps = np.asarray(metrics["env_step"])[0]
result = {
    "compile_seconds": compiled - start,
    "run_seconds": seconds,
    "steps_per_second": args.num_seeds * int(steps[-1]) / seconds,
    "train_returns": np.asarray(metrics["returned_episode_returns"])[:, -1].tolist(),
}
if args.evaluate:
    interval = int(config["NUM_UPDATES"] * config["TEST_INTERVAL"])
    result["global_step"] = steps[interval - 1 :: interval].tolist()
    result["returns"] = np.asarray(metrics["test/returned_episode_returns"])[:, interval - 1 :: interval].tolist()
print(json.dumps(result))
