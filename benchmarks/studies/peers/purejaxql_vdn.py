"""PureJaxQL's PQN with value decomposition on SMAX: its returns and its seconds.

Run it with the Python of PureJaxQL's own environment with jaxmarl, its checkout on PYTHONPATH.
Prints a line of JSON: seconds to compile and to run, steps per second over all seeds, and the
greedy win rates of its own evaluation. Hyperparameters are those of its configuration file, changed
by --set. The learner is PureJaxQL's as it is.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import jax
import numpy as np
import purejaxql
import yaml
from purejaxql.pqn_vdn_rnn_jaxmarl import env_from_config, make_train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--map", default="3m")
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=1_000_000)
parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
args = parser.parse_args()

folder = Path(purejaxql.__file__).parent / "config/alg"
config = yaml.safe_load((folder / "pqn_vdn_rnn_smax.yaml").read_text())
config |= {"MAP_NAME": args.map, "TOTAL_TIMESTEPS": args.total_timesteps}
config |= {"WANDB_MODE": "disabled"}
config |= {
    name: yaml.safe_load(value) for name, value in (change.split("=") for change in args.set)
}
config = {name: float(x) if name in ("REW_SCALE", "LR") else x for name, x in config.items()}
env, _ = env_from_config(copy.deepcopy(config))
keys = jax.random.split(jax.random.PRNGKey(0), args.num_seeds)
start = time.perf_counter()
train = jax.jit(jax.vmap(make_train(config, env))).lower(keys).compile()
compiled = time.perf_counter()
results = jax.block_until_ready(train(keys))
seconds = time.perf_counter() - compiled
metrics = results["metrics"]
steps = np.asarray(metrics["env_step"])[0]
result = {
    "compile_seconds": compiled - start,
    "run_seconds": seconds,
    "steps_per_second": args.num_seeds * int(steps[-1]) / seconds,
}
if config["TEST_DURING_TRAINING"]:
    interval = max(1, int(config["NUM_UPDATES"] * config["TEST_INTERVAL"]))
    evaluated = slice(interval - 1, None, interval)
    win_rates = np.asarray(metrics["test/returned_won_episode"])[:, evaluated]
    result |= {"global_step": steps[evaluated].tolist(), "returns": win_rates.tolist()}
print(json.dumps(result))
