"""PureJaxRL's ppo.py or dqn.py, timed.

Run it with the Python of PureJaxRL's own environment, its folder of scripts on PYTHONPATH. Prints a
line of JSON: seconds to compile and to run, steps per second over all seeds and, with --curve, the
returns while training. Hyperparameters are those of the script's own main, changed by --set.
"""

import argparse
import importlib
import json
import sys
import time

import gymnax.wrappers.purerl
import jax
import numpy as np

PPO = {
    "LR": 2.5e-4,
    "NUM_ENVS": 4,
    "NUM_STEPS": 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
}
PPO |= {"GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5}
PPO |= {"ACTIVATION": "tanh", "ANNEAL_LR": True, "DEBUG": False}
DQN = {
    "NUM_ENVS": 10,
    "BUFFER_SIZE": 10_000,
    "BUFFER_BATCH_SIZE": 128,
    "EPSILON_START": 1.0,
    "EPSILON_FINISH": 0.05,
}
DQN |= {
    "TARGET_UPDATE_INTERVAL": 500,
    "LR": 2.5e-4,
    "LEARNING_STARTS": 10_000,
    "TRAINING_INTERVAL": 10,
}
DQN |= {"LR_LINEAR_DECAY": False, "GAMMA": 0.99, "TAU": 1.0, "WANDB_MODE": "disabled"}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("algorithm", choices=["ppo", "dqn"])
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=500_000)
parser.add_argument("--env-id", default="CartPole-v1")
parser.add_argument("--set", nargs="*", default=[], help="further NAME=value of its configuration")
parser.add_argument("--curve", action="store_true")
args = parser.parse_args()

# ppo.py's own wrappers.py imports brax and navix; gymnax took over the two wrappers that it needs.
sys.modules["wrappers"] = gymnax.wrappers.purerl
config = dict(PPO if args.algorithm == "ppo" else DQN)
config |= {"ENV_NAME": args.env_id, "TOTAL_TIMESTEPS": args.total_timesteps}
config |= {"EPSILON_ANNEAL_TIME": args.total_timesteps / 2}
for name, _, value in (item.partition("=") for item in args.set):
    config[name] = json.loads(value) if value[0].isdigit() else value
keys = jax.random.split(jax.random.PRNGKey(0), args.num_seeds)
start = time.perf_counter()
train = (
    jax.jit(jax.vmap(importlib.import_module(args.algorithm).make_train(config)))
    .lower(keys)
    .compile()
)
compiled = time.perf_counter()
metrics = jax.block_until_ready(train(keys))["metrics"]
seconds = time.perf_counter() - compiled
result = {
    "compile_seconds": compiled - start,
    "run_seconds": seconds,
    "steps_per_second": args.num_seeds * args.total_timesteps / seconds,
}
if args.curve:
    if args.algorithm == "ppo":  # [seeds, updates, steps, environments]
        ended = np.asarray(metrics["returned_episode"])
        returns = np.where(ended, np.asarray(metrics["returned_episode_returns"]), 0).sum((2, 3))
        with np.errstate(invalid="ignore"):
            returns = returns / ended.sum((2, 3))  # NaN where no episode ended
        steps = config["NUM_ENVS"] * config["NUM_STEPS"]
    else:
        returns, steps = np.asarray(metrics["returns"]), config["NUM_ENVS"]
    result["global_step"] = (steps * np.arange(1, 1 + returns.shape[1])).tolist()
    result["returns"] = returns.tolist()
print(json.dumps(result))
