"""PureJaxQL's PQN for continuous actions on a task of MuJoCo Playground's dm_control suite.

Run it with the Python of an environment that has playground 0.2, hydra-core and safetensors, the
checkout of PureJaxQL on PYTHONPATH. Prints a line of JSON: seconds to compile and to run, steps per
second over all seeds, and the returns of its own evaluations. Hyperparameters are those of its
configuration file for the suite, changed by --set.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
import purejaxql
import yaml
from mujoco_playground import registry
from purejaxql.pqn_mujoco_playground import make_train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="CartpoleBalance")
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=500_000)
parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
args = parser.parse_args()

load = registry.load
# The default implementation of the physics, warp, needs a GPU.
registry.load = lambda name, config: load(name, config, config_overrides={"impl": "jax"})

alg = Path(purejaxql.__file__).parent / "config/alg/pqn_playground_dm_suite.yaml"
config = yaml.safe_load(alg.read_text())
config |= {"ENV_NAME": args.env_id, "TOTAL_TIMESTEPS": args.total_timesteps}
config |= {"WANDB_MODE": "disabled", "RETURN_METRICS": True}
config |= {
    name: yaml.safe_load(value) for name, value in (change.split("=") for change in args.set)
}
config = {  # YAML reads 5e7 as a string
    name: float(x) if isinstance(x, str) and x[:1].isdigit() else x for name, x in config.items()
}
keys = jax.random.split(jax.random.PRNGKey(0), args.num_seeds)
start = time.perf_counter()
train = jax.jit(jax.vmap(make_train(config))).lower(keys).compile()
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
    interval = int(config["NUM_UPDATES"] * config["TEST_INTERVAL"])
    evaluated = slice(interval - 1, None, interval)
    returns = np.asarray(metrics["test/returned_episode_returns"])[:, evaluated]
    result |= {"global_step": steps[evaluated].tolist(), "returns": returns.tolist()}
print(json.dumps(result))
