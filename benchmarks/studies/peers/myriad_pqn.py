"""Myriad's PQN on its CartPole, timed: run it with the Python of an environment that has myriad-jax.

Prints one line of JSON: steps per second over all environments and seconds to compile. Its trainer compiles inside, so
two runs of different lengths are timed: their difference is free of compiling, and what is left of the shorter one is
compiling. Hyperparameters are PureJaxQL's for CartPole; nothing is evaluated.
"""

import argparse
import json
import logging
import os
import tempfile
import time

import jax
from myriad import create_config, train_and_evaluate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--steps-per-env", type=int, default=3200)
args = parser.parse_args()
logging.disable(logging.INFO)

FIXED = {
    "learning_rate": 1e-4,
    "gamma": 0.99,
    "lambda_": 0.95,
    "reward_scale": 0.1,
    "epsilon_start": 1.0,
}
FIXED |= {
    "epsilon_end": 0.2,
    "max_grad_norm": 10.0,
    "num_epochs": 4,
    "num_minibatches": 16,
    "hidden_size": 256,
}
FIXED |= {
    "epsilon_decay_steps": args.steps_per_env // 5,
    "num_layers": 2,
    "rollout_steps": 64,
    "eval_frequency": 0,
}
FIXED |= {"lr_decay_steps": args.steps_per_env // 64 * 64, "lr_end": 0.0, "scan_chunk_size": 640}


def seconds(steps_per_env: int) -> float:
    config = create_config(
        "cartpole-control",
        "pqn",
        num_envs=args.num_envs,
        steps_per_env=steps_per_env,
        wandb_enabled=False,
        **FIXED,
    )
    started = time.perf_counter()
    jax.block_until_ready(train_and_evaluate(config).agent_state)
    return time.perf_counter() - started


with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    seconds(640)  # what only the first run of a process pays
    short, long = seconds(640), seconds(640 + args.steps_per_env)
steps_per_second = args.num_envs * args.steps_per_env / (long - short)
result = {
    "compile_seconds": short - 640 * args.num_envs / steps_per_second,
    "steps_per_second": steps_per_second,
}
print(json.dumps(result))
