"""Myriad's PQN on its CartPole: run it with the Python of an environment that has myriad-jax.

Prints a line of JSON. Without --curve: steps per second over all environments and seconds to
compile, nothing evaluated. Its trainer compiles inside, so two runs of different lengths are timed:
their difference is free of compiling, and what is left of the shorter one is compiling.

With --curve, its tutorial's run for every seed, one after the other: global_step [n] and greedy
returns [num_seeds, n], and the seconds of all, compiling of every seed among them. The tutorial
keeps the learning rate fixed, 3,000 steps are no multiple of its 640 between evaluations, and so
the last of these is after 2,560 steps.
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
parser.add_argument("--steps-per-env", type=int, default=None, help="3200, with --curve 3000")
parser.add_argument("--curve", action="store_true")
parser.add_argument("--num-seeds", type=int, default=10, help="for --curve")
args = parser.parse_args()
logging.disable(logging.INFO)
steps = args.steps_per_env or (3000 if args.curve else 3200)

# PureJaxQL's for CartPole.
OPTIONS = {"env": "cartpole-control", "agent": "pqn", "num_envs": args.num_envs}
OPTIONS |= {"learning_rate": 1e-4, "gamma": 0.99, "lambda_": 0.95, "reward_scale": 0.1}
OPTIONS |= {"epsilon_start": 1.0, "epsilon_end": 0.2, "epsilon_decay_steps": steps // 5}
OPTIONS |= {"max_grad_norm": 10.0, "num_epochs": 4, "num_minibatches": 16, "rollout_steps": 64}
OPTIONS |= {"hidden_size": 256, "num_layers": 2, "wandb_enabled": False}
# Linear to zero over all gradient steps, 64 in each of the updates of 64 steps.
ANNEALED = {"lr_decay_steps": steps // 64 * 64, "lr_end": 0.0}


def train(steps_per_env: int, **options):
    """The results and the seconds they took."""
    config = create_config(steps_per_env=steps_per_env, **OPTIONS, **options)
    started = time.perf_counter()
    results = train_and_evaluate(config)
    jax.block_until_ready(results.agent_state)
    return results, time.perf_counter() - started


def learning_curves() -> dict:
    """The tutorial's evaluations of every seed."""
    evaluating = {"eval_frequency": 640, "eval_rollouts": 128}
    runs = [train(steps, seed=seed, **evaluating) for seed in range(args.num_seeds)]
    evaluations = [results.eval_metrics for results, _ in runs]
    returns = [[float(x) for x in own.mean_return] for own in evaluations]
    return {
        "global_step": [int(step) for step in evaluations[0].global_steps],
        "returns": returns,
        "compile_seconds": 0.0,
        "run_seconds": sum(seconds for _, seconds in runs),
    }


def speed() -> dict:
    """Steps per second, compiling apart."""
    options = {"eval_frequency": 0, "scan_chunk_size": 640} | ANNEALED
    train(640, **options)  # what only the first run of a process pays
    (_, short), (_, long) = (train(n, **options) for n in (640, 640 + steps))
    steps_per_second = args.num_envs * steps / (long - short)
    compiling = short - 640 * args.num_envs / steps_per_second
    return {"compile_seconds": compiling, "steps_per_second": steps_per_second}


with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # where it writes its outputs
    result = learning_curves() if args.curve else speed()
print(json.dumps(result))
