"""DQN, on any gymnax environment with Box observations and Discrete actions.

Deep Q-Network: Mnih et al., Nature 2015; --double-q is van Hasselt et al., 2016, arXiv 1509.06461.
Unlike PQN, it samples transitions from a replay buffer and takes one-step targets from a target
network. It differs from CleanRL's dqn.py in two ways: it runs several environments, as PureJaxRL
does, and it bootstraps at time limits.

    python dqn_cartpole.py --num-seeds 8            # trains, plots, saves; --help lists the flags

    from dqn_cartpole import Config, make_train     # as a library: a pure function of a key
    state, metrics = jax.jit(jax.vmap(make_train(Config())))(jax.random.split(jax.random.key(0), 8))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "gymnax>=1.0.1,<2",
#   "six>=1.16,<2", "orbax-checkpoint>=0.12,<0.13", "tyro>=1.0,<2", "tqdm>=4.66,<5",
#   "matplotlib>=3.8,<4", "pandas>=2.2,<4", "wandb>=0.31,<0.32", "numpy>=2,<3",
# ]
# ///

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
import tyro
from flax import serialization
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of PureJaxRL's dqn.py for CartPole-v1."""

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int = 500_000
    """Total environment steps per seed, over all environments; rounded down to whole updates."""

    env_id: str = "CartPole-v1"
    """gymnax environment id; observations are flattened."""
    num_envs: int = 10
    """Parallel environments per seed."""
    num_steps: int = 1
    """Steps per environment between gradient steps."""

    learning_rate: float = 2.5e-4
    """Learning rate of Adam."""
    anneal_lr: bool = False
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    epsilon_start: float = 1.0
    """Initial exploration rate."""
    epsilon_finish: float = 0.05
    """Final exploration rate."""
    epsilon_decay: float = 0.5
    """Fraction of the run over which the exploration rate decays linearly."""
    buffer_size: int = 10_000
    """Transitions in each seed's replay, on the device; each takes 2 observations plus 9 bytes."""
    batch_size: int = 128
    """Transitions sampled per gradient step."""
    learning_starts: int = 10_000
    """Environment steps before the first gradient step."""
    target_interval: int = 50
    """Gradient steps between target network updates; the metrics have one row per target update."""
    tau: float = 1.0
    """Fraction by which an update moves the target network towards the online one; 1 copies it."""
    double_q: bool = False
    """Double DQN: the online network chooses the next action, the target network evaluates it."""
    hidden_sizes: tuple[int, ...] = (120, 84)
    """Units of each hidden layer."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxRL does."""

    eval_interval: int = 50
    """Updates between greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes per evaluation, each in its own environment."""

    runs_dir: str = "runs"
    """Where run folders go."""
    resume: str | None = None
    """Run folder to resume, from its last checkpoint and with its flags."""
    checkpoint_interval: float = 60.0
    """Seconds between checkpoints; 0 for one after every chunk of updates."""
    distributed: bool = False
    """Train on several hosts, as started by Slurm, Open MPI, Kubernetes or a TPU pod."""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases logging."""
    wandb_project: str = "dqn"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team (default: WANDB_ENTITY)."""
    wandb_tags: tuple[str, ...] = ()
    """Weights & Biases tags."""

    num_gradient_steps = property(lambda self: self.target_interval)
    steps_per_update = property(lambda self: self.num_envs * self.num_steps * self.target_interval)
    num_updates = property(lambda self: self.total_timesteps // self.steps_per_update)

    def __post_init__(self):
        """Raises ValueError, naming the flag, for an invalid value; traced ones pass as float32."""
        for name, value in vars(self).items():
            if isinstance(value, np.generic | jax.Array) and not isinstance(value, jax.core.Tracer):
                object.__setattr__(self, name, value.item())
            if isinstance(value, jax.core.Tracer) and value.dtype == np.float64:
                object.__setattr__(self, name, value.astype(jnp.float32))
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, name, tuple(value))
        for low, high, names in LIMITS:
            for name in names.split():
                value = getattr(self, name)
                if not isinstance(value, jax.core.Tracer) and not low <= value <= high:
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"{flag} is {value}; it takes a number from {low} to {high}")
        if self.buffer_size < self.num_envs:
            envs = f"--num-envs {self.num_envs}"
            raise ValueError(f"--buffer-size is {self.buffer_size}, less than {envs}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes is {self.hidden_sizes}; it takes positive integers")
        if self.num_updates == 0:
            update = f"--num-envs {self.num_envs} * --num-steps {self.num_steps}"
            update += f" * --target-interval {self.target_interval}"
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, less than {update}")
        last_update = (self.num_updates - 1) * self.steps_per_update
        if self.learning_starts > last_update:
            last = f"the last update starts before, at step {last_update}"
            raise ValueError(f"--learning-starts is {self.learning_starts}; {last}")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_steps buffer_size batch_size"),
    (1, 2**31 - 1, "target_interval eval_episodes"),
    (0, 2**31 - 1, "seed learning_starts eval_interval"),
    (0, 1, "learning_rate gamma epsilon_start epsilon_finish epsilon_decay"),
    (1e-9, 1, "tau"),
    (0, math.inf, "checkpoint_interval"),
]

# --- Networks -------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """Dense, ReLU layers: observations [..., obs_dim] to action values [..., num_actions]."""

    num_actions: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.num_actions)(x)


# --- Equations ------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of all environments; the replay adds a leading axis of buffer_size // num_envs."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: jax.Array  # after the step, before any reset


def epsilon_greedy(key: jax.Array, q_values: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Greedy actions [...] for q_values [..., num_actions], uniform with probability epsilon."""
    num_actions = q_values.shape[-1]
    uniform = jax.random.uniform(key, q_values.shape[:-1], jnp.float32)
    # One draw decides both: given uniform < epsilon, uniform / epsilon is uniform in [0, 1).
    random_action = jnp.minimum(uniform / epsilon * num_actions, num_actions - 1).astype(jnp.int32)
    return jnp.where(uniform < epsilon, random_action, q_values.argmax(-1).astype(jnp.int32))


def td_targets(rewards, next_values, terminated, gamma) -> jax.Array:
    """One-step targets r + gamma * (1 - terminated) * next_values, [batch] (Mnih et al., 2015)."""
    return rewards + gamma * ~terminated * next_values


def chosen_values(q_values: jax.Array, action: jax.Array) -> jax.Array:
    """Q-values [...] of the chosen actions [...], for q_values [..., num_actions]."""
    return q_values.sum(-1, where=jax.nn.one_hot(action, q_values.shape[-1], dtype=bool))


def replay_insert(replay: Transition, row: jax.Array, transition: Transition) -> Transition:
    """The replay [rows, num_envs, ...] with transition written to row, wrapping around."""
    return jax.tree.map(lambda buffer, x: buffer.at[row % len(buffer)].set(x), replay, transition)


def replay_sample(replay: Transition, bits: jax.Array, num_rows: jax.Array) -> Transition:
    """A uniform batch, with replacement, from the first num_rows rows; bits [batch] are uint32."""
    num_envs = jax.tree.leaves(replay)[0].shape[1]
    index = bits % (num_rows * num_envs).astype(jnp.uint32)
    return jax.tree.map(lambda buffer: buffer[index // num_envs, index % num_envs], replay)


# --- Environment ----------------------------------------------------------------------------------


def make_env(env_id: str):
    """The gymnax environment with flattened observations and an episode log, and its parameters.

    Raises ValueError for an unknown id, or unless observations are Box and actions Discrete.
    """
    import gymnax  # not at the top: it takes seconds, and starts JAX before the devices are chosen
    from gymnax.wrappers import FlattenObservationWrapper, LogWrapper

    if env_id not in gymnax.registered_envs:
        known = ", ".join(gymnax.registered_envs)
        raise ValueError(f"--env-id is {env_id}; it takes one of {known}")
    env, params = gymnax.make(env_id)
    spaces = [
        type(space).__name__ for space in (env.observation_space(params), env.action_space(params))
    ]
    if spaces != ["Box", "Discrete"]:
        takes = "it takes Box observations and Discrete actions"
        raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; {takes}")
    return LogWrapper(FlattenObservationWrapper(env)), params


# --- Training -------------------------------------------------------------------------------------


def pack(tree):
    """Small arrays [num_envs, ...] of a tree as one of uint32 [num_envs, size], and the others."""
    leaves = jax.tree.leaves(tree)
    words = [
        (x.astype(jnp.uint32) if x.dtype == bool else x.view(jnp.uint32)).reshape(len(x), -1)
        for x in leaves
        if is_small(x)
    ]
    return words and jnp.concatenate(words, axis=1), [x for x in leaves if not is_small(x)]


def unpack(packed, like):
    """The tree that was packed, of shapes and types like these, or a stack of many of them."""
    words, others = packed[0], iter(packed[1])

    def unpack_leaf(x):
        nonlocal words
        if not is_small(x):
            return next(others)
        mine, words = jnp.split(words, [math.prod(x.shape[1:])], axis=-1)
        mine = mine.reshape(*mine.shape[:-1], *x.shape[1:])
        return mine.astype(bool) if x.dtype == bool else mine.view(x.dtype)

    return jax.tree.map(unpack_leaf, like)


def is_small(x) -> bool:
    """Whether an array [num_envs, ...] is packed: up to 128 numbers each, of 32 bits or boolean."""
    types = jnp.bool_, jnp.int32, jnp.uint32, jnp.float32
    return x.dtype in types and 0 < math.prod(x.shape[1:]) <= 128


def scan_packed(step, carry, inputs):
    """jax.lax.scan over steps of all environments, trees of arrays [num_envs, ...].

    On a GPU, a loop copies each array that it carries and writes each output in a launch of its
    own: there, the small ones are one array while it runs. The results are the same.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.scan(step, carry, inputs)

    def packed_step(packed, inputs):
        carry_after, output = step(unpack(packed, carry), inputs)
        return pack(carry_after), pack(output)

    output = jax.eval_shape(step, carry, jax.tree.map(lambda x: x[0], inputs))[1]
    packed, outputs = jax.lax.scan(packed_step, pack(carry), inputs)
    return unpack(packed, carry), unpack(outputs, output)


class TrainState(NamedTuple):
    """The complete training state; saved, it is a checkpoint."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: Transition  # [buffer_size // num_envs, num_envs, ...]
    env_state: Any
    obs: jax.Array  # [num_envs, obs_dim]
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far


def make_train(config: Config):
    """DQN as a pure function train(key=None, state=None, num_updates=...) -> (TrainState, metrics).

    train starts from train.init(key) or continues from a state, for config.num_updates by default.
    metrics is a flat dict of arrays [num_updates]; returns are NaN for updates in which no episode
    ended, and eval/* for updates without an evaluation. train can be jitted, and vmapped over keys
    or float fields of config.
    To vmap over states, pass an unbatched update number, train(state=state._replace(update=n)), or
    vmap turns the cond into a select and every update evaluates.
    Raises ValueError for an environment that it cannot train on.
    """
    env, env_params = make_env(config.env_id)
    if config.eval_interval and not hasattr(env_params, "max_steps_in_episode"):
        raise ValueError(f"{config.env_id} has no max_steps_in_episode; set --eval-interval 0")
    env_reset = jax.vmap(env.reset, in_axes=(0, None))
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    network = QNetwork(env.action_space(env_params).n, config.hidden_sizes)
    num_rows = config.buffer_size // config.num_envs

    def learning_rate(number, step):
        """The rate at a gradient step of an update; annealing starts at the first gradient step."""
        progress = (number - first_update + step / config.target_interval) / num_learning
        remaining = 1 - config.anneal_lr * jnp.clip(progress, 0, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    first_update = -(-config.learning_starts // config.steps_per_update)
    num_learning = config.num_updates - first_update
    # Flattened to one vector: fewer kernels to compile and to run.
    optimizer = optax.flatten(optax.scale_by_adam())

    def init(key):
        key, params_key, reset_key = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(reset_key, config.num_envs), env_params)
        params = network.init(params_key, obs)
        zeros = jnp.zeros(config.num_envs, jnp.float32)
        row = Transition(obs, zeros.astype(jnp.int32), zeros, zeros > 0, obs)
        replay = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape), x.dtype), row)
        # The target network is a copy, so that a donated state holds no buffer twice.
        target_params = jax.tree.map(jnp.copy, params)
        return TrainState(
            params, target_params, optimizer.init(params), replay, env_state, obs, key, jnp.int32(0)
        )

    def epsilon(step):
        decay_steps = jnp.maximum(config.epsilon_decay * config.total_timesteps, 1)
        decayed = jnp.minimum(step / decay_steps, 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed
        return jnp.float32(epsilon)

    def collect(state, step, keys):
        """Adds num_steps steps of all environments to the replay; step counts one environment's."""

        def env_steps(carry, inputs):
            obs, env_state, replay = carry
            step, keys = inputs
            action = epsilon_greedy(
                keys[0], network.apply(state.params, obs), epsilon(step * config.num_envs)
            )
            next_obs, env_state, reward, terminated, truncated, info = env_step(
                keys[1:], env_state, action, env_params
            )
            terminated |= False if config.bootstrap_on_truncation else truncated
            reward, final_obs = reward.astype(jnp.float32), info["final_observation"]
            transition = Transition(obs, action, reward, terminated, final_obs)
            return (next_obs, env_state, replay_insert(replay, step, transition)), info

        steps = step + jnp.arange(config.num_steps)
        carry, infos = jax.lax.scan(
            env_steps, (state.obs, state.env_state, state.replay), (steps, keys)
        )
        obs, env_state, replay = carry
        return state._replace(obs=obs, env_state=env_state, replay=replay), infos

    def loss(params, target_params, batch):
        next_q = network.apply(target_params, batch.next_obs)
        choice = network.apply(params, batch.next_obs) if config.double_q else next_q
        next_value = chosen_values(next_q, choice.argmax(-1))
        target = td_targets(batch.reward, next_value, batch.terminated, config.gamma)
        q = chosen_values(network.apply(params, batch.obs), batch.action)
        return jnp.square(q - jax.lax.stop_gradient(target)).mean(), q.mean()

    def gradient_step(learner, target_params, batch, rate):
        params, opt_state = learner
        (td_loss, q), grads = jax.value_and_grad(loss, has_aux=True)(params, target_params, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        losses = jnp.stack([td_loss, q, optax.tree.norm(ravel_pytree(grads)[0])])
        params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
        return (params, opt_state), losses

    def no_step(learner, *_):
        return learner, jnp.full(3, jnp.nan, jnp.float32)

    def evaluate(state, key):
        """Mean return of eval_episodes greedy episodes, each from reset to end."""

        def step(carry, t):
            obs, env_state, returns, finished = carry
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            action = network.apply(state.params, obs).argmax(-1)
            obs, env_state, reward, terminated, truncated, _ = env_step(
                keys, env_state, action, env_params
            )
            returns += jnp.where(finished, 0, reward).astype(jnp.float32)
            finished |= terminated | truncated | (t + 1 >= env_params.max_steps_in_episode)
            return (obs, env_state, returns, finished), None

        def eight_steps(carry):  # between two looks at finished, for which a GPU waits
            t, carry = carry
            return t + 8, scan_packed(step, carry, t + jnp.arange(8))[0]

        reset_key, step_key = jax.random.split(key)
        obs, env_state = env_reset(jax.random.split(reset_key, config.eval_episodes), env_params)
        zeros = jnp.zeros(config.eval_episodes, jnp.float32)
        carry = 0, (obs, env_state, zeros, zeros > 0)
        _, carry = jax.lax.while_loop(lambda carry: ~carry[1][-1].all(), eight_steps, carry)
        return carry[2].mean()

    def update(state, number):
        """target_interval rounds of num_steps steps and a gradient step, then a target update."""
        collect_key, sample_key, eval_key = jax.random.split(
            jax.random.fold_in(state.key, number), 3
        )
        learning = number >= first_update
        first_step = number * config.target_interval * config.num_steps

        def iteration(state, inputs):
            step, keys, bits, rate = inputs
            state, infos = collect(state, step, keys)
            filled = jnp.minimum(step + config.num_steps, num_rows)
            batch = replay_sample(state.replay, bits, filled)
            operands = (state.params, state.opt_state), state.target_params, batch, rate
            # On a GPU this branch is in a CUDA graph; around the scan, it would copy the replay.
            learner, losses = jax.lax.cond(learning, gradient_step, no_step, *operands)
            params, opt_state = learner
            return state._replace(params=params, opt_state=opt_state), (infos, losses)

        shape = config.target_interval, config.num_steps, 1 + config.num_envs
        keys = jax.random.split(collect_key, shape)
        shape = config.target_interval, config.batch_size
        bits = jax.random.bits(sample_key, shape, jnp.uint32)
        steps = first_step + config.num_steps * jnp.arange(config.target_interval)
        rates = learning_rate(number, jnp.arange(config.target_interval))
        state, (infos, losses) = jax.lax.scan(iteration, state, (steps, keys, bits, rates))
        target_params = optax.incremental_update(state.params, state.target_params, config.tau)
        state = state._replace(target_params=target_params, update=number + 1)

        ended = infos["returned_episode"]
        names = "losses/td_loss", "losses/q_values", "losses/grad_norm"
        metrics = dict(zip(names, losses.mean(0), strict=True)) | {
            "global_step": (number + 1) * config.steps_per_update,
            "charts/episodic_return": infos["returned_episode_returns"].mean(where=ended),
            "charts/episodic_length": infos["returned_episode_lengths"].mean(where=ended),
            "charts/epsilon": epsilon(first_step * config.num_envs),
            "charts/learning_rate": learning_rate(number, 0),
        }
        if config.eval_interval:
            due = ((number + 1) % config.eval_interval == 0) | (number + 1 == config.num_updates)
            no_return = jnp.float32(jnp.nan)
            metrics["eval/episodic_return"] = jax.lax.cond(
                due, evaluate, lambda *_: no_return, state, eval_key
            )
        return state, metrics

    def train(key=None, state=None, num_updates=config.num_updates):
        state = init(key) if state is None else state
        return jax.lax.scan(update, state, state.update + jnp.arange(num_updates, dtype=jnp.int32))

    train.init = init
    return train


# --- Running it: not needed to copy the algorithm -------------------------------------------------

SCRIPT = Path(__file__)
# On a CPU, the batch from which one seed is faster with several threads than with one.
THREADED_BATCH = 4096
# Flags that may change on --resume, as they do not affect the results.
FREE_FLAGS = "distributed checkpoint_interval wandb_mode wandb_project wandb_entity wandb_tags"


def fail(message: str) -> NoReturn:
    """Exits with code 2 and one line on stderr."""
    print(f"{SCRIPT.name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def say(message: str) -> None:
    """Prints a line above the progress bar, on the first host only."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


def parse_args(args: list[str]) -> Config:
    """Parses flags with tyro; also accepts 1e6 for integers and --flag=False for --no-flag."""
    number, boolean = r"^(--[\w-]+=|)(\d+(\.\d+)?[eE]\+?\d+)$", r"^--([\w-]+)=(?i:(true)|false)$"
    args = [re.sub(number, lambda m: f"{m[1]}{float(m[2]):.15g}", arg) for arg in args]
    args = [re.sub(boolean, lambda m: f"--{'' if m[2] else 'no-'}{m[1]}", arg) for arg in args]
    config = tyro.cli(Config, args=args, description=__doc__)
    if config.resume is not None:
        saved = load_config(config.resume)
        config = tyro.cli(Config, args=args, description=__doc__, default=saved)
        for name, old in vars(saved).items():
            if (new := getattr(config, name)) != old and name not in FREE_FLAGS.split():
                fail(f"--{name.replace('_', '-')} is {new}; the run to resume has {old}")
    return config


def load_config(run_dir: str | Path) -> Config:
    """Loads the Config of a run to resume; fails unless the run is one of this script."""
    try:
        flags = json.loads(Path(run_dir, "config.json").read_text())
        script = flags.pop("script")
        if script == SCRIPT.stem:
            return Config(**flags | {"resume": str(run_dir)})
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        fail(f"--resume is {run_dir}; it takes a run folder: {error!r}")
    fail(f"--resume is {run_dir}, a run of {script}.py")


def last_checkpoint(run_dir: str) -> int:
    """The update number of a run's last checkpoint; fails if there is none."""
    folder = Path(run_dir, "checkpoints")
    updates = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    return max(updates) if updates else fail(f"--resume is {run_dir}; it has no checkpoint yet")


def start_devices(config: Config) -> Mesh:
    """The device mesh for the seeds, with the same number of devices on every host.

    A CPU is split into as few devices as keep all cores busy; with small batches, each device uses
    one thread (NPROC).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    divisors = [n for n in range(1, 4 * cores) if config.num_seeds % n == 0]
    num_devices = max(divisors, key=lambda n: (min(n, cores), -n))
    threads = cores // num_devices if config.batch_size >= THREADED_BATCH else 1
    os.environ.setdefault("NPROC", str(max(threads, 1)))
    with contextlib.suppress(RuntimeError):  # JAX has already started: use its devices
        jax.config.update("jax_num_cpu_devices", num_devices)
    try:
        if config.distributed and not jax.distributed.is_initialized():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed finds no cluster: {error}") from error

    hosts, local = jax.process_count(), jax.local_device_count()
    per_host = [n for n in range(1, local + 1) if config.num_seeds % (n * hosts) == 0]
    if not per_host:
        raise ValueError(f"--num-seeds is {config.num_seeds}, not a multiple of the {hosts} hosts")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.reshape(devices, (hosts, local))[:, : per_host[-1]].ravel(), ("seeds",))


def check_memory(config: Config, replay: Transition) -> None:
    """Raises ValueError if the replays of all seeds do not fit in memory."""
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(replay)) / 2**30
    needed *= config.num_seeds / jax.process_count()
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        memory = stats["bytes_limit"] * jax.local_device_count() / 2**30
    elif hasattr(os, "sysconf"):  # on a CPU, leave room for the copies of a checkpoint
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # a container's limit
                limits.append(int(Path(path).read_text()))
        memory = min(limits) / 2**30 / 3
    else:
        return
    if needed > memory:
        excess = f"{needed:.1f} GiB with --num-seeds {config.num_seeds}, more than {memory:.1f} GiB"
        raise ValueError(f"--buffer-size is {config.buffer_size}; it takes {excess}")


def make_programs(config: Config, train, mesh: Mesh):
    """Jitted init(0, seeds) -> states, run_chunk(update, states) -> (states, metrics)."""
    check_memory(config, jax.eval_shape(train.init, jax.random.key(0)).replay)
    # Equal chunks of one update or up to 65,536 steps, so that one program runs them all.
    max_chunk = max(1, 2**16 // (config.steps_per_update * config.num_seeds))
    chunk_size = max(n for n in range(1, max_chunk + 1) if config.num_updates % n == 0)
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["seeds"], []))

    def init(update, seed):
        return train.init(jax.random.key(seed))

    def run_chunk(update, state):
        return train(state=state._replace(update=update), num_updates=chunk_size)

    def over_seeds(function, out_shardings, **options):
        def on_device(update, inputs):
            # The update number is unbatched, so that evaluation stays a branch.
            one_seed = functools.partial(function, update)
            on_cpu = jax.default_backend() == "cpu"  # where batches of small matrices are slower
            return jax.lax.map(one_seed, inputs) if on_cpu else jax.vmap(one_seed)(inputs)

        specs = {"in_specs": (replicated.spec, sharded.spec), "out_specs": sharded.spec}
        on_devices = jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs)
        return jax.jit(on_devices, out_shardings=out_shardings, **options)

    # Metrics are gathered only across hosts: XLA aborts when a CPU device waits long for another.
    gathered = replicated if jax.process_count() > 1 else sharded
    return over_seeds(init, sharded), over_seeds(run_chunk, (sharded, gathered), donate_argnums=1)


def run_folder(config: Config) -> Path:
    """The run folder: the one to resume, or a new name, the same on every host."""
    if config.resume is not None:
        return Path(config.resume)
    milliseconds = np.array(divmod(time.time_ns() // 10**6, 10**6), np.int32)
    high, low = multihost_utils.broadcast_one_to_all(milliseconds)
    name = f"{SCRIPT.stem}__{config.env_id}__{config.seed}__{high}{low:06}"
    return Path(config.runs_dir, name)


def restore(checkpoints: ocp.CheckpointManager, update: int, shapes):
    """Loads the states after an update and the seconds spent so far; fails if unreadable."""
    args = {"states": ocp.args.StandardRestore(shapes), "seconds": ocp.args.JsonRestore()}
    try:
        saved = checkpoints.restore(update, args=ocp.args.Composite(**args))
    except Exception as error:  # orbax raises a bare Exception for a damaged array
        fail(f"--resume: {checkpoints.directory} cannot be read: {str(error)[:200]}")
    return saved.states, saved.seconds


def start_wandb(config: Config, run_dir: Path) -> list:
    """One Weights & Biases run per seed, in a group; above 16 seeds, one for their mean."""
    if config.wandb_mode == "disabled":
        return []
    import wandb  # not at the top: it takes seconds

    names = [f"seed-{config.seed + i}" for i in range(config.num_seeds)]
    names = names if len(names) <= 16 else ["mean"]
    options = {"project": config.wandb_project, "entity": config.wandb_entity}
    options |= {"group": run_dir.name, "tags": config.wandb_tags, "mode": config.wandb_mode}
    options |= {"config": dataclasses.asdict(config), "dir": run_dir, "resume": "allow"}
    options |= {"reinit": "create_new", "settings": wandb.Settings(silent=True, console="off")}
    try:
        runs = [wandb.init(name=name, id=f"{run_dir.name}-{name}", **options) for name in names]
    except Exception as error:  # errors of wandb's service are not wandb.Error
        if config.resume is None:
            shutil.rmtree(run_dir)
        raise ValueError(f"--wandb-mode is {config.wandb_mode}: {error}") from error
    if config.wandb_mode == "online":
        say(f"Weights & Biases: {runs[0].url}")
    return runs


def is_nan(config: Config, metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Where the loss or its gradient is NaN, [num_seeds, updates]."""
    learns = metrics["global_step"] >= config.learning_starts + config.steps_per_update
    return learns & np.isnan(metrics["losses/grad_norm"])


class Recorder:
    """Records a run in metrics.csv, the progress bar and wandb; only the first host has one."""

    def __init__(self, config: Config, run_dir: Path, columns: list[str], update: int):
        """Starts after the given update. Raises ValueError if metrics.csv lacks rows up to it."""
        self.config, self.csv, self.columns = config, run_dir / "metrics.csv", ["seed", *columns]
        header, num_lines = ",".join(self.columns) + "\n", 1 + update * config.num_seeds
        lines = self.csv.read_text().splitlines(keepends=True) if update else [header]
        if lines[:1] != [header] or len(lines) < num_lines:
            raise ValueError(f"{self.csv} lacks rows or its columns are not {header}")
        self.wandb_runs, self.unlogged, self.nan_seeds = start_wandb(config, run_dir), [], set()
        if update:
            os.truncate(self.csv, len("".join(lines[:num_lines])))
            (run_dir / "metadata.json").unlink(missing_ok=True)
        else:
            self.csv.write_text(header)
            flags = {"script": SCRIPT.stem} | dataclasses.asdict(config)
            (run_dir / "config.json").write_text(json.dumps(flags, indent=2))
        update_steps = config.steps_per_update * config.num_seeds
        total, initial = config.num_updates * update_steps, update * update_steps
        self.bar = tqdm(total=total, initial=initial, unit=" steps", unit_scale=True, disable=None)
        self.printed_at = time.monotonic()

    def record(self, update: int, metrics: dict[str, jax.Array]) -> None:
        """Records metrics [num_seeds, chunk_size] of the updates after the given one."""
        metrics = jax.device_get(metrics)
        seeds = self.config.seed + np.arange(self.config.num_seeds)
        metrics["seed"] = np.broadcast_to(seeds[:, None], metrics["global_step"].shape)
        rows = pd.DataFrame({name: metrics[name].T.ravel() for name in self.columns})
        with self.csv.open("a") as file:
            rows.to_csv(file, header=False, index=False, float_format="%.10g", na_rep="nan")
        self.unlogged.append(rows)

        for seed, nans in zip(seeds, is_nan(self.config, metrics), strict=True):
            if nans.any() and seed not in self.nan_seeds:
                self.nan_seeds.add(seed)
                first = update + 1 + nans.argmax()
                say(f"seed {seed}: NaN in the loss or its gradient from update {first} on")

        mean_return = f"return {rows['charts/episodic_return'].mean():.1f}"
        self.bar.set_postfix_str(mean_return, refresh=False)
        self.bar.update(len(rows) * self.config.steps_per_update)
        # Without a terminal there is no bar: print a line every half minute.
        if self.bar.disable and time.monotonic() - self.printed_at >= 30:
            self.printed_at = time.monotonic()
            update += metrics["seed"].shape[1]
            say(f"update {update} of {self.config.num_updates}, {mean_return}")

    def log(self) -> None:
        """Sends wandb only what a checkpoint covers, so that a resumed run sends nothing twice."""
        for chunk in self.unlogged if self.wandb_runs else []:
            for step, rows in chunk.drop(columns="seed").groupby("global_step"):
                if len(self.wandb_runs) < len(rows):  # mean, and deviation where seeds differ
                    stds = rows.loc[:, rows.nunique() > 1].std().add_suffix("_std")
                    rows = pd.concat([rows.mean(), stds]).to_frame().T
                for run, (_, row) in zip(self.wandb_runs, rows.iterrows(), strict=True):
                    run.log(row.dropna().to_dict(), step=step)
        self.unlogged = []

    def close(self) -> None:
        self.bar.close()
        for run in self.wandb_runs:
            run.finish()


@contextlib.contextmanager
def caught_signals(message: str):
    """Collects Ctrl-C and SIGTERM in a list: the first prints message, the second interrupts."""
    received = []

    def handle(number, frame):
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        say(message)

    # Only the main thread may set handlers; wandb's sweep agent calls main in another thread.
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def plot_returns(config: Config, run_dir: Path) -> str:
    """Plots the returns in metrics.csv over all seeds; returns a summary of the last ones."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    table = pd.read_csv(run_dir / "metrics.csv")
    many_seeds = config.num_seeds > 1
    title = f"{SCRIPT.stem}, {config.env_id}"
    title += f", {config.num_seeds} seeds: mean and range" if many_seeds else ""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps per seed", ylabel="return", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    summary = []
    for kind, label in (("charts", "while exploring"), ("eval", "greedy")):
        name = f"{kind}/episodic_return"
        measured = table.dropna(subset=name) if name in table else table[:0]
        if measured.empty:
            continue
        # Average each seed over 200 bins of steps, so that long runs stay readable.
        last_step = table["global_step"].iloc[-1]
        bins = measured["global_step"] * 200 // last_step
        binned = measured.groupby([bins, "seed"])[["global_step", name]].mean().groupby(level=0)
        steps, returns = binned["global_step"].mean(), binned[name]
        axes.plot(steps, returns.mean(), "o-" if len(steps) <= 30 else "-", label=label)
        axes.fill_between(steps, returns.min(), returns.max(), alpha=0.2)
        axes.legend()
        # The last evaluation, or the mean over the last tenth of training up to the last return.
        since = measured["global_step"].iloc[-1] * (1 if kind == "eval" else 0.9)
        seed_means = measured[measured["global_step"] >= since].groupby("seed")[name].mean()
        spread = f" (seeds {seed_means.min():.1f} to {seed_means.max():.1f})" if many_seeds else ""
        summary.append(f"{label} {seed_means.mean():.1f}{spread}")
    figure.savefig(run_dir / "learning_curve.png", dpi=150)
    return f"return {', '.join(summary)}" if summary else "no episode has ended"


def save_results(config: Config, run_dir: Path, params, metadata: dict) -> None:
    """Writes parameters, learning curve and metadata, and prints a summary of the run."""
    (run_dir / "params.msgpack").write_bytes(serialization.to_bytes(params))
    print(f"{metadata['updates']} of {config.num_updates} updates, {plot_returns(config, run_dir)}")
    steps = metadata["updates"] * config.steps_per_update * config.num_seeds
    metadata["steps_per_second"] = steps / max(metadata["run_seconds"], 1e-9)
    packages = ("jax", "flax", "optax", "gymnax", "craftax", "brax", "jaxmarl", "ale_py", "numpy")
    metadata["versions"] = {name: version(name) for name in packages if name in sys.modules}
    (run_dir / "metadata.json").write_text(json.dumps(metadata, indent=2))
    times = "{run_seconds:.1f} s plus {compile_seconds:.1f} s of compilation".format(**metadata)
    print(f"{metadata['steps_per_second']:,.0f} steps/s on {metadata['device']}, {times}")
    print(f"{run_dir} contains {', '.join(sorted(os.listdir(run_dir)))}")


def main(config: Config) -> Path:
    """Trains all seeds, a chunk of updates at a time; returns the run folder."""
    is_new = config.resume is None
    update = 0 if is_new else last_checkpoint(config.resume)
    if update == config.num_updates and Path(config.resume, "metadata.json").exists():
        print(f"{config.resume} is finished: all {update} updates are done")
        return Path(config.resume)
    seeds = config.seed + np.arange(config.num_seeds)
    seconds = {"compile_seconds": 0.0, "run_seconds": 0.0}
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # fail reports orbax's errors instead
    try:  # before compilation, everything that can fail for outside reasons
        mesh = start_devices(config)
        run_dir = run_folder(config)
        device = f"{mesh.size} x {jax.devices()[0].device_kind}"
        title = f"{config.env_id}, {len(seeds)} seed{'s' * (len(seeds) > 1)} on {device}"
        since = f", from update {update}" if update else ""
        say(f"{SCRIPT.stem}: {title}, in {run_dir}{since}; compiling takes seconds to a minute")
        train = make_train(config)
        started = time.monotonic()
        init, run_chunk = make_programs(config, train, mesh)
        shapes = init.eval_shape(0, seeds)
        run_chunk = run_chunk.lower(np.int32(0), shapes)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        checkpoints = ocp.CheckpointManager(run_dir.resolve() / "checkpoints", options=options)
        if not is_new:
            states, seconds = restore(checkpoints, update, shapes)
        columns, is_first_host = sorted(run_chunk.out_info[1]), jax.process_index() == 0
        recorder = Recorder(config, run_dir, columns, update) if is_first_host else None
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    if is_new:
        states = init(0, seeds)
    run_chunk = run_chunk.compile()
    saved_at = time.monotonic()
    seconds["compile_seconds"] += saved_at - started
    if recorder:
        recorder.bar.unpause()  # exclude compilation from its speed

    to_resume = f"to resume: python {SCRIPT.name} --resume {run_dir}"
    pending, stopping = [], False
    try:
        message = f"stopping after this chunk of updates (Ctrl-C again stops at once); {to_resume}"
        with caught_signals(message) as signals:
            while update < config.num_updates and not stopping:
                states, metrics = run_chunk(np.int32(update), states)
                while recorder and pending:  # record the previous chunk while this one runs
                    recorder.record(*pending.pop())
                pending.append((update, metrics))
                update += metrics["global_step"].shape[1]
                # Python handles signals while it joins a thread, but not while it waits for JAX.
                chunk = threading.Thread(target=jax.block_until_ready, args=[metrics], daemon=True)
                chunk.start()
                chunk.join()
                is_due = time.monotonic() - saved_at >= config.checkpoint_interval
                flags = np.array([[len(signals) > 0, is_due]])  # all hosts stop and save together
                stopping, is_due = multihost_utils.process_allgather(flags, tiled=True).any(axis=0)
                if stopping or is_due or update == config.num_updates:
                    if recorder:
                        recorder.record(*pending.pop())
                    seconds["run_seconds"] += time.monotonic() - saved_at
                    saved_at = time.monotonic()
                    save = {"states": ocp.args.StandardSave(states)}
                    save |= {"seconds": ocp.args.JsonSave(seconds)}
                    checkpoints.save(update, args=ocp.args.Composite(**save))
                    if recorder:
                        recorder.log()
    except KeyboardInterrupt:
        say(f"stopped at once; {to_resume if checkpoints.latest_step() else 'nothing was saved'}")
        raise
    except (OSError, ValueError) as error:  # such as a full disk
        fail(f"{error}; {to_resume if checkpoints.latest_step() else 'nothing was saved'}")
    params = multihost_utils.process_allgather(states.params, tiled=True)
    if recorder:
        recorder.close()
        save_results(config, run_dir, params, seconds | {"updates": update, "device": device})
    if update < config.num_updates:
        say(to_resume)
    return run_dir


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except KeyboardInterrupt:
        os._exit(130)  # an ordinary exit would wait for the running chunk
