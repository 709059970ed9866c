"""PPO of brax on one of its tasks: seeds one after the other, an evaluation after each tenth.

Run it with the Python of an environment of its own: it needs an older JAX than the scripts. Prints
a line of JSON: global_step [n], returns [num_seeds, n], steps per second of a seed alone, and the
seconds to compile and to run of all seeds. The hyperparameters are those that brax has for ant, at
a number of environments that a CPU steps well.
"""

import argparse
import json

import numpy as np
from brax import envs
from brax.training.agents.ppo import train as ppo

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="ant")
parser.add_argument("--backend", default="spring")
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=1_000_000)
parser.add_argument("--num-envs", type=int, default=256)
parser.add_argument("--eval-episodes", type=int, default=16)
args = parser.parse_args()

returns, walltimes = [], []
for seed in range(args.num_seeds):
    steps, evaluations = [], []

    def record(step, metrics, steps=steps, evaluations=evaluations):
        steps.append(step)
        evaluations.append(metrics)

    ppo.train(
        environment=envs.get_environment(args.env_id, backend=args.backend),
        num_timesteps=args.total_timesteps,
        num_evals=11,
        num_eval_envs=args.eval_episodes,
        deterministic_eval=True,
        reward_scaling=10,
        episode_length=1000,
        normalize_observations=True,
        unroll_length=5,
        num_minibatches=16,
        num_updates_per_batch=4,
        discounting=0.97,
        learning_rate=3e-4,
        entropy_cost=1e-2,
        num_envs=args.num_envs,
        batch_size=args.num_envs,
        seed=seed,
        progress_fn=record,
    )
    returns.append([float(metrics["eval/episode_reward"]) for metrics in evaluations])
    walltimes.append([metrics["training/walltime"] for metrics in evaluations[1:]])

epochs = np.diff(walltimes, axis=1)  # without the first, which compiles
compiling = np.array(walltimes)[:, 0] - epochs.mean(axis=1)
result = {
    "global_step": steps,
    "returns": returns,
    "steps_per_second": float((steps[-1] - steps[1]) / epochs.sum(axis=1).mean()),
    "compile_seconds": float(compiling.sum()),
    "run_seconds": float(np.array(walltimes)[:, -1].sum() - compiling.sum()),
}
print(json.dumps(result))
