"""Parallel Q-Learning for continuous control: brax, gymnax, MuJoCo Playground's dm_control.

Parallel Q-Learning: Li et al., "Parallel Q-Learning: Scaling Off-policy Reinforcement Learning
under Massively Parallel Simulation", ICML 2023, arXiv 2307.12983. Unlike DQN, it has continuous
actions (DDPG with double Q and n-step targets), thousands of environments, and exploration noise
that differs between them.

The paper's actor, value learner and policy learner are processes that exchange parameters. Here
they are three functions of one program that start a cycle from the same state, so none waits for
another, and each sees the others' parameters from the previous cycle. The update ratios are exact,
without the paper's controller; all three run on one device.

Equations, details, metrics and results: docs/pql.md

    python pql_isaac_style.py --env-id ant          # trains, plots, saves; --help lists the flags

    from pql_isaac_style import Config, make_train  # as a library: a pure function of a key
    config = Config(env_id="Pendulum-v1", num_envs=128)
    state, metrics = jax.jit(make_train(config))(jax.random.key(0))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "gymnax>=1.0.1,<2",
#   "six>=1.16,<2", "brax>=0.14.2,<0.15", "orbax-checkpoint>=0.12,<0.13", "tyro>=1.0,<2",
#   "tqdm>=4.66,<5", "matplotlib>=3.8,<4", "pandas>=2.2,<4", "wandb>=0.31,<0.32", "numpy>=2,<3",
# ]
# ///

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# --- Configuration --------------------------------------------------------------------------------


# Of PQL and of the paper's baselines, which do not clip observations.
DEFAULTS = {
    "pql": {"policy_updates": 4, "obs_clip": 5.0},
    "pql_d": {"policy_updates": 4, "obs_clip": 5.0},
    "ddpg_n": {"policy_updates": 8, "obs_clip": math.inf},
    "sac_n": {"policy_updates": 8, "obs_clip": math.inf},
}
# The authors' for Isaac Gym's ant and humanoid. With it, three of brax's rewards are a tenth of an
# atom of pql_d's, which learns nothing from them.
REWARD_SCALES = {"ant": 0.01, "humanoid": 0.01}
PQL_D_REWARD_SCALES = {"ant": 0.3, "humanoid": 0.1}


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the authors', for a GPU, except total_timesteps and pql_d's reward_scale.

    Unlike in their code, a window that a time limit cuts is discounted by gamma to the number of
    its steps, and ddpg_n and sac_n draw one batch for the critics and another for the policy.
    Fields that are None take the default of the algorithm or task when a Config is made. For
    another one make a new Config: dataclasses.replace keeps the old one's values.
    """

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int = 100_000_000
    """Total environment steps per seed, with warm-up; rounded down to whole updates."""

    env_id: str = "ant"
    """Task of brax, of gymnax or, if MuJoCo Playground is installed, of its dm_control suite."""
    backend: Literal["spring", "positional", "generalized", "mjx"] = "spring"
    """Physics backend of a brax task."""
    num_envs: int = 4096
    """Parallel environments per seed."""
    num_steps: int = 64
    """Steps per environment in an update; the metrics have one row per update."""

    algorithm: Literal["pql", "pql_d", "ddpg_n", "sac_n"] = "pql"
    """pql_d learns return distributions; ddpg_n and sac_n act and learn one after the other."""
    learning_rate: float = 5e-4
    """Learning rate of AdamW, for critics and policy."""
    alpha_learning_rate: float = 5e-3
    """Learning rate of the entropy's weight (sac_n); never annealed."""
    anneal_lr: bool = False
    """Anneal the learning rate linearly to zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 0.5
    """Maximum global norm of the gradients; both critics share one norm."""
    gamma: float = 0.99
    """Discount factor."""
    n_steps: int = 3
    """Rewards in an n-step target."""
    reward_scale: float | None = None
    """Scale of training rewards, not of reported ones. None: 0.01 for ant and humanoid, with
    pql_d 0.3 and 0.1; else 1: choose one that keeps values small. With pql_d, values must stay
    within value_bound, and n_steps rewards be wider than two atoms."""
    critic_updates: int = 8
    """Critic updates per step of all environments; the paper's beta_a:v is 1:critic_updates."""
    policy_updates: int | None = None
    """Policy updates per step of all environments; beta_p:v is policy_updates:critic_updates.
    None: 4; 8 with ddpg_n and sac_n."""
    buffer_size: int = 5_000_000
    """Transitions in each seed's replay, on the device; saved in every checkpoint."""
    batch_size: int = 8192
    """Transitions sampled per gradient step."""
    warmup_steps: int = 32
    """Steps of all environments with uniformly random actions, before learning starts."""
    tau: float = 0.05
    """Fraction by which each critic update moves the target critic towards the online one."""
    stddev_min: float = 0.05
    """Standard deviation of the exploration noise in the first environment (not sac_n)."""
    stddev_max: float = 0.8
    """Standard deviation of the exploration noise in the last environment (not sac_n)."""
    target_noise: float = 0.8
    """Standard deviation of the noise on the next actions in targets (not sac_n)."""
    target_noise_clip: float = 0.2
    """Clip range of the noise on the next actions in targets (not sac_n)."""
    obs_clip: float | None = None
    """Clip range of the learners' normalised observations; the actor's are not clipped.
    None: 5; none (inf) with ddpg_n and sac_n."""
    num_atoms: int = 51
    """Atoms of the return distribution (pql_d)."""
    value_bound: float = 10.0
    """The atoms span [-value_bound, value_bound] (pql_d)."""
    hidden_sizes: tuple[int, ...] = (512, 256, 128)
    """Units of each hidden layer."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal."""

    eval_interval: int = 20
    """Updates between greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes per evaluation, each in its own environment and to its end, which has to come."""

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
    wandb_project: str = "pql"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team (default: WANDB_ENTITY)."""
    wandb_tags: tuple[str, ...] = ()
    """Weights & Biases tags."""

    num_gradient_steps = property(
        lambda self: self.num_steps * (self.critic_updates + self.policy_updates)
    )
    steps_per_update = property(lambda self: self.num_envs * self.num_steps)
    warmup_timesteps = property(lambda self: self.num_envs * self.warmup_steps)

    @property
    def num_updates(self):
        return (self.total_timesteps - self.warmup_timesteps) // self.steps_per_update

    def __post_init__(self):
        """Fills in the defaults of the algorithm and task, then checks the values.

        Raises ValueError, naming the flag, for an invalid value; traced ones pass as float32.
        """
        scales = PQL_D_REWARD_SCALES if self.algorithm == "pql_d" else REWARD_SCALES
        defaults = DEFAULTS[self.algorithm] | {"reward_scale": scales.get(self.env_id, 1.0)}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
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
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes is {self.hidden_sizes}; it takes positive integers")
        if self.warmup_steps < self.n_steps:
            bound = f"--n-steps {self.n_steps}"
            raise ValueError(f"--warmup-steps is {self.warmup_steps}, less than {bound}")
        warmup = f"--num-envs {self.num_envs} * --warmup-steps {self.warmup_steps}"
        if self.buffer_size < self.warmup_timesteps:
            raise ValueError(f"--buffer-size is {self.buffer_size}, less than {warmup}")
        if self.num_updates < 1:
            update = f"--num-envs * --num-steps {self.num_steps}"
            total = f"--total-timesteps is {self.total_timesteps}"
            raise ValueError(f"{total}, less than {warmup} + {update}")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_steps n_steps critic_updates"),
    (1, 2**31 - 1, "policy_updates buffer_size batch_size warmup_steps eval_episodes"),
    (2, 2**31 - 1, "num_atoms"),
    (0, 2**31 - 1, "seed eval_interval"),
    (0, 1, "learning_rate alpha_learning_rate gamma"),
    (1e-9, 1, "tau"),
    (0, math.inf, "weight_decay reward_scale stddev_min stddev_max"),
    (0, math.inf, "target_noise target_noise_clip checkpoint_interval"),
    (1e-3, math.inf, "value_bound"),
    (1e-9, math.inf, "max_grad_norm obs_clip"),
]

# --- Networks -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Dense layers with ELU, initialised as PyTorch's: [..., num_inputs] to [..., num_outputs]."""

    num_outputs: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(size, x):
            bound = x.shape[-1] ** -0.5  # of weights and biases, which are uniform

            def init(key, shape, dtype):
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            return nn.Dense(size, kernel_init=init, bias_init=init)(x)

        for size in self.hidden_sizes:
            x = nn.elu(dense(size, x))
        return dense(self.num_outputs, x)


class DoubleCritic(nn.Module):
    """Two critics of normalised obs and action: values or atom logits [2, ..., num_outputs]."""

    num_outputs: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([obs, action], axis=-1)
        # Mapped, so that on a GPU the same product of both critics is one launch.
        mapped = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        critics = nn.vmap(MLP, **mapped, axis_size=2)
        return critics(self.num_outputs, self.hidden_sizes, name="MLP")(x)


# --- Equations ------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """n-step transitions; the replay adds a leading axis of buffer_size // num_envs."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array  # discounted sum to the n-th step or the end of the episode
    discount: jax.Array  # factor on the value of next_obs
    next_obs: jax.Array  # after the last of these steps, before any reset


class Statistics(NamedTuple):
    """Running mean and variance, such as of observations."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def mixed_exploration_stddevs(
    num_envs: int, stddev_min: jax.Array, stddev_max: jax.Array
) -> jax.Array:
    """Standard deviations [num_envs] of the noise, evenly spaced (PQL, section 3.3)."""
    fractions = jnp.arange(num_envs, dtype=jnp.float32) / max(num_envs - 1, 1)
    return stddev_min + fractions * (stddev_max - stddev_min)


def n_step_transitions(rewards, next_obs, terminated, truncated, gamma, n):
    """Rewards, discounts [T, num_envs] and next observations of n-step windows.

        reward[t] = sum_{i <= k} gamma^i r[t + i]
        discount[t] = gamma^(k + 1) * (1 - terminated[t + k])

    where step t + k is the first in t, ..., t + n - 1 to end an episode (terminated or truncated),
    or k = n - 1 if none does. The next observation is the one after step t + k, before any reset.
    Input arrays are [T + n - 1, num_envs, ...].
    """
    num_windows = len(rewards) - n + 1
    total, discount, alive, last_obs = 0.0, 1.0, True, next_obs[:num_windows]
    for i in range(n):
        steps = rewards, next_obs, terminated, truncated
        reward, obs, is_terminated, is_truncated = (x[i : i + num_windows] for x in steps)
        total += jnp.where(alive, discount * reward, 0)
        discount *= jnp.where(alive, gamma * ~is_terminated, 1)
        last_obs = jnp.where(jnp.expand_dims(alive, -1), obs, last_obs)
        alive &= ~(is_terminated | is_truncated)
    return total, discount, last_obs


def double_q_targets(rewards, next_values, discounts) -> jax.Array:
    """Double Q targets r + discount * min_j v[j] for next_values v [2, batch] (PQL, equation 1)."""
    return rewards + discounts * next_values.min(axis=0)


def project_distribution(probs, rewards, discounts, support) -> jax.Array:
    """Projects the distributions probs [..., batch, atoms] of r + discount * z onto the support.

    Mass between two atoms is split linearly, mass outside goes to the edge atom (Bellemare et al.,
    2017, arXiv 1707.06887, equation 7).
    """
    values = jnp.clip(rewards[:, None] + discounts[:, None] * support, support[0], support[-1])
    distance = jnp.abs(values[:, :, None] - support) / (support[1] - support[0])
    return jnp.einsum("...bi,bij->...bj", probs, jnp.clip(1 - distance, 0, 1))


def binary_cross_entropy(logits, targets) -> jax.Array:
    """Sum over both critics [2, batch, atoms] of the mean binary cross-entropy per atom.

    As in the PQL authors' code: the targets [batch, atoms] are the minimum of two distributions per
    atom, which may sum to less than 1.
    """
    log_probs = jax.nn.log_softmax(logits)
    log_others = jnp.log(jnp.maximum(-jnp.expm1(log_probs), 1e-7))
    losses = -(targets * log_probs + (1 - targets) * log_others)
    return losses.mean(axis=-1).mean(axis=-1).sum()


def squashed_gaussian(outputs, noise) -> tuple[jax.Array, jax.Array]:
    """Actions tanh(mean + std * noise) and their log-probabilities [...] (SAC, appendix C).

    Outputs [..., 2 * action_size] are the means and the log standard deviations, clipped to
    [-5, 5]; noise [..., action_size] is standard normal. Haarnoja et al., 2018, arXiv 1812.05905.
    """
    mean, log_std = jnp.split(outputs, 2, axis=-1)
    log_std = jnp.clip(log_std, -5, 5)
    x = mean + jnp.exp(log_std) * noise
    log_prob = -(jnp.square(noise) + jnp.log(2 * jnp.pi)) / 2 - log_std
    log_slope = 2 * (jnp.log(2) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return jnp.tanh(x), (log_prob - log_slope).sum(axis=-1)


def update_statistics(statistics: Statistics, obs: jax.Array) -> Statistics:
    """Updates the statistics with observations [batch, obs_size] (Chan et al., 1979)."""
    count = statistics.count + len(obs)
    difference, weight = obs.mean(axis=0) - statistics.mean, len(obs) / count
    var = (
        (1 - weight) * statistics.var
        + weight * obs.var(axis=0)
        + weight * (1 - weight) * difference**2
    )
    return Statistics(statistics.mean + weight * difference, var, count)


def normalize(obs: jax.Array, statistics: Statistics, clip: jax.Array = jnp.inf) -> jax.Array:
    """Observations [..., obs_size] scaled to mean 0 and variance 1, then clipped."""
    return jnp.clip((obs - statistics.mean) / jnp.sqrt(statistics.var + 1e-4), -clip, clip)


def replay_insert(replay: Transition, row: jax.Array, transition: Transition) -> Transition:
    """The replay [rows, num_envs, ...] with transition written to row, wrapping around."""
    return jax.tree.map(lambda buffer, x: buffer.at[row % len(buffer)].set(x), replay, transition)


def replay_sample(replay: Transition, bits: jax.Array, num_rows: jax.Array) -> Transition:
    """A uniform batch, with replacement, from the first num_rows rows; bits [batch] are uint32."""
    num_envs = jax.tree.leaves(replay)[0].shape[1]
    index = bits % (num_rows * num_envs).astype(jnp.uint32)
    return jax.tree.map(lambda buffer: buffer[index // num_envs, index % num_envs], replay)


# --- Environment ----------------------------------------------------------------------------------


class Env(NamedTuple):
    """A single environment, with actions in [-1, 1] and no automatic reset."""

    reset: Callable  # key -> physics, obs
    step: Callable  # key, physics, action -> physics, obs, reward, terminated, truncated
    obs_size: int
    action_size: int
    max_steps: float = math.inf  # steps after which an episode is cut, whatever step says
    max_size: float = math.inf  # observations and rewards this large show that the physics failed


BRAX_TASKS = [
    "ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_double_pendulum",
    "inverted_pendulum", "pusher", "reacher", "swimmer", "walker2d",
]  # fmt: skip


def make_env(env_id: str, backend: str) -> Env:
    """The gymnax, brax or dm_control environment of that name.

    Raises ValueError for an unknown id, spaces other than Box, or a backend that brax lacks for it.
    """
    try:  # not at the top: it takes seconds, and starts JAX before the devices are chosen
        import gymnax
    except ImportError as error:
        needs = "which needs gymnax (pip install gymnax)"
        raise ValueError(f"--env-id is {env_id}, {needs}: {error}") from error
    if env_id in gymnax.registered_envs:
        return make_gymnax(env_id)
    # Silenced, as brax and playground print about missing packages.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if env_id in BRAX_TASKS:
            return make_brax(env_id, backend)
        return make_dm_control(env_id, [*BRAX_TASKS, *gymnax.registered_envs])


def check_env(env_id: str, env, params, reset, step) -> None:
    """Raises ValueError unless reset and step return what gymnax 1.0's do; computes only shapes.

    In an older environment, terminated may include the time limit: training would run, and learn
    that every time limit is an end of value zero.
    """

    def first_step(params):
        keys = jax.random.split(jax.random.key(0), 3)
        obs, state = reset(keys[0], params)
        return obs, step(keys[1], state, env.action_space(params).sample(keys[2]), params)

    def depends_on_limit(i):
        """Whether value i of a step does: for that, vmap refuses out_axes=None."""

        def value(limit):
            return first_step(params.replace(max_steps_in_episode=limit))[1][i]

        try:
            jax.eval_shape(jax.vmap(value, out_axes=None), jnp.zeros(1, jnp.int32))
        except (AttributeError, TypeError, ValueError) as error:
            return "out_axes" in str(error)  # else, params have no such limit
        return False

    told, shape = f"--env-id is {env_id}, whose", tuple(env.observation_space(params).shape)
    try:
        obs, values = jax.eval_shape(first_step, params)
    except AttributeError as error:
        if error.name not in ("is_truncated", "time", "max_steps_in_episode"):
            raise  # a bug of the environment
        raise ValueError(f"{told} is_truncated(state, params) is missing: {error}") from error
    if len(values) != 6 or "final_observation" not in values[-1]:
        needs = "obs, state, reward, terminated, truncated, info with final_observation"
        raise ValueError(f"{told} step has to return {needs}, as since gymnax 1.0")
    for x in (obs, values[0], values[-1]["final_observation"]):
        if (got := getattr(x, "shape", type(x).__name__)) != shape:
            raise ValueError(f"{told} observation is {got}, but its space {shape}")
    if values[2].shape:
        raise ValueError(f"{told} reward has the shape {values[2].shape}; it has to be a number")
    if kinds := [x.dtype.name for x in values[3:5] if x.dtype != bool or x.shape]:
        raise ValueError(f"{told} terminated and truncated have to be booleans, not {kinds[0]}")
    if depends_on_limit(3) and depends_on_limit(4):
        needs = "only is_truncated may have it, or no value is bootstrapped there"
        raise ValueError(f"{told} terminated includes the limit max_steps_in_episode; {needs}")


def make_gymnax(env_id: str) -> Env:
    """An environment of gymnax; its own rules alone end its episodes."""
    import gymnax

    env, params = gymnax.make(env_id)
    space = env.action_space(params)
    spaces = [type(space).__name__ for space in (env.observation_space(params), space)]
    if spaces != ["Box", "Box"]:
        takes = "it takes Box observations and actions"
        raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; {takes}")
    if not np.isfinite(np.subtract(space.high, space.low)).all():
        raise ValueError(f"--env-id is {env_id}; it takes actions with finite bounds")

    def env_step(key, state, action, params):
        """gymnax's step, but for its reset."""
        obs, state, reward, terminated, info = env.step_env(key, state, action, params)
        info = {**info, "final_observation": obs}
        return obs, state, reward, terminated, env.is_truncated(state, params), info

    def reset(key):
        obs, state = env.reset_env(key, params)
        return state, obs.ravel().astype(jnp.float32)

    def step(key, state, action):
        action = space.low + (action + 1) / 2 * (space.high - space.low)
        action = action.reshape(space.shape)
        obs, state, reward, *ends, _ = env_step(key, state, action, params)
        return state, obs.ravel().astype(jnp.float32), jnp.float32(reward), *ends

    check_env(env_id, env, params, env.reset_env, env_step)
    obs_size = math.prod(env.observation_space(params).shape)
    return Env(reset, step, obs_size, math.prod(space.shape))


def make_brax(env_id: str, backend: str) -> Env:
    """A task of brax."""
    try:
        from brax import envs

        env = envs.get_environment(env_id, backend=backend)
    except ImportError as error:
        needs = "which needs brax (pip install brax)"
        raise ValueError(f"--env-id is {env_id}, {needs}: {error}") from error
    except (ValueError, AssertionError) as error:
        message = f"--backend is {backend}; --env-id {env_id} does not support it: {error}"
        raise ValueError(message) from error
    return make_physics(env, max_steps=1000)


def make_dm_control(env_id: str, others: list[str]) -> Env:
    """A task of dm_control, from MuJoCo Playground; the error for an unknown id names others."""
    try:
        from mujoco_playground import dm_control_suite
    except ImportError as error:
        needs = f"a task of dm_control needs playground (pip install playground): {error}"
        known = f"else one of {', '.join(others)}"
        raise ValueError(f"--env-id is {env_id}; {needs}; {known}") from error
    if env_id not in dm_control_suite.ALL_ENVS:
        known = ", ".join([*others, *dm_control_suite.ALL_ENVS])
        raise ValueError(f"--env-id is {env_id}; it takes one of {known}")
    env = dm_control_suite.load(env_id, config_overrides={"impl": "jax"})
    return make_physics(env, dm_control_suite.get_default_config(env_id).episode_length)


def make_physics(env, max_steps: int) -> Env:
    """A task of brax or dm_control, which share an interface; both leave time limits to wrappers.

    The observation is left out of its state, as no task reads it and EnvState has it, and so are
    empty arrays, which orbax refuses to save.
    """
    shapes = jax.eval_shape(env.reset, jax.random.key(0))
    is_kept = jax.tree.map(lambda x: x.size > 0, shapes).replace(obs=False)

    def pack(state):
        return jax.tree.map(lambda keep, x: x if keep else None, is_kept, state)

    def unpack(state):
        def fill(keep, shape, x):
            return x if keep else jnp.zeros(shape.shape, shape.dtype)

        return jax.tree.map(fill, is_kept, shapes, state)

    def reset(key):
        state = env.reset(key)
        return pack(state), state.obs.astype(jnp.float32)

    def step(key, state, action):
        state = env.step(unpack(state), action)
        obs, reward = state.obs.astype(jnp.float32), jnp.float32(state.reward)
        return pack(state), obs, reward, state.done > 0, jnp.bool_(False)

    return Env(reset, step, env.observation_size, env.action_size, max_steps, max_size=1e6)


class EnvState(NamedTuple):
    """All environments."""

    physics: Any
    obs: jax.Array  # [num_envs, obs_size]
    length: jax.Array  # [num_envs], of the episode so far
    episodic_return: jax.Array  # [num_envs], of the episode so far


class Step(NamedTuple):
    """One step of all environments."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array  # after the step, before any reset
    terminated: jax.Array
    truncated: jax.Array


def reset_envs(env: Env, key: jax.Array, num_envs: int) -> EnvState:
    physics, obs = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    zeros = jnp.zeros(num_envs, jnp.float32)
    return EnvState(physics, obs, zeros.astype(jnp.int32), zeros)


def step_envs(env: Env, key: jax.Array, state: EnvState, action: jax.Array):
    """The state after a step of all environments, the Step, and sums over finished episodes.

    An environment whose episode ends begins a new one. Where a step fails (an observation or reward
    that is NaN, infinite or, in brax and dm_control, of 1e6 or more), the episode is truncated,
    with reward 0 and the observation before the failure.
    """
    step_key, reset_key = jax.random.split(key)
    keys = jax.random.split(step_key, len(action))
    physics, next_obs, reward, *ends = jax.vmap(env.step)(keys, state.physics, action)
    size = jnp.maximum(jnp.abs(next_obs).max(axis=-1), jnp.abs(reward))
    failed = ~(size < env.max_size)  # also where it is NaN
    next_obs = jnp.where(failed[:, None], state.obs, next_obs)
    reward = jnp.where(failed, 0, reward)
    length, episodic_return = state.length + 1, state.episodic_return + reward
    terminated = ends[0] & ~failed
    truncated = ends[1] | failed | (length >= env.max_steps)
    ended = terminated | truncated
    # Floats, as a sum of lengths may overflow int32.
    sums = {"length": ended * length.astype(jnp.float32), "return": ended * episodic_return}
    sums |= {"ended": ended, "failed": failed}

    def restart(state):
        def where_ended(old, new):
            return jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(where_ended, state, reset_envs(env, reset_key, len(action)))

    after = EnvState(physics, next_obs, length, episodic_return)
    # A branch, as a reset can cost as much as a step. On a GPU, seeds are vmapped: no branch.
    some_ended = ended.any() if jax.default_backend() == "cpu" else True
    after = jax.lax.cond(some_ended, restart, lambda state: state, after)
    step = Step(state.obs, action, reward, next_obs, terminated, truncated)
    return after, step, jax.tree.map(jnp.sum, sums)


def mean_episode(env: Env, key: jax.Array, num_episodes: int, policy: Callable) -> jax.Array:
    """Mean return and length of episodes with actions policy(obs), each from reset to end."""

    def step(carry):
        env_state, results, finished, key = carry
        key, step_key = jax.random.split(key)
        env_state, step, _ = step_envs(env, step_key, env_state, policy(env_state.obs))
        results += jnp.where(finished, 0, jnp.stack([step.reward, jnp.ones_like(step.reward)]))
        return env_state, results, finished | step.terminated | step.truncated, key

    reset_key, step_key = jax.random.split(key)
    results, finished = jnp.zeros((2, num_episodes), jnp.float32), jnp.zeros(num_episodes, bool)
    carry = reset_envs(env, reset_key, num_episodes), results, finished, step_key
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), step, carry)[1].mean(axis=1)


# --- Training -------------------------------------------------------------------------------------


class Actor(NamedTuple):
    """Steps the environments."""

    env: EnvState
    statistics: Statistics  # of observations
    window: Step | None  # [n_steps - 1, num_envs, ...], steps with incomplete windows, if any


class VLearner(NamedTuple):
    """Learns the critics."""

    critic: Any
    target_critic: Any
    opt_state: Any


class PLearner(NamedTuple):
    """Learns the policy and, with sac_n, the weight of its entropy (None otherwise)."""

    policy: Any
    opt_state: Any
    log_alpha: Any
    alpha_opt_state: Any


class TrainState(NamedTuple):
    """The complete training state; saved, it is a checkpoint."""

    actor: Actor
    v_learner: VLearner
    p_learner: PLearner
    replay: Transition  # [buffer_size // num_envs, num_envs, ...]
    fresh: Transition  # [1, num_envs, ...], not yet in the replay
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far

    @property
    def params(self):
        """The networks and observation statistics of a trained agent."""
        policy, critic = self.p_learner.policy, self.v_learner.critic
        return {"policy": policy, "critic": critic, "statistics": self.actor.statistics}


def exploration_noise(config: Config, key, num_steps: int, action_size: int, warmup: bool):
    """Noise [num_steps, num_envs, action_size]; during warm-up, the actions themselves."""
    shape = num_steps, config.num_envs, action_size
    if warmup:
        return jax.random.uniform(key, shape, jnp.float32, minval=-1)
    noise = jax.random.normal(key, shape, jnp.float32)
    if config.algorithm == "sac_n":
        return noise
    stddevs = mixed_exploration_stddevs(config.num_envs, config.stddev_min, config.stddev_max)
    return noise * stddevs[:, None]


def transitions_of(config: Config, steps: Step) -> tuple[Transition, Step | None]:
    """The n-step transitions of steps, and the last steps, whose windows are incomplete."""
    terminated, truncated = steps.terminated, steps.truncated
    if not config.bootstrap_on_truncation:
        terminated |= truncated
    outcomes = config.reward_scale * steps.reward, steps.next_obs, terminated, truncated
    reward, discount, next_obs = n_step_transitions(*outcomes, config.gamma, config.n_steps)
    starts = steps.obs[: len(reward)], steps.action[: len(reward)]
    # None instead of empty arrays, which orbax refuses to save.
    window = jax.tree.map(lambda x: x[len(reward) :], steps) if config.n_steps > 1 else None
    reward, discount = reward.astype(jnp.float32), discount.astype(jnp.float32)
    return Transition(*starts, reward, discount, next_obs), window


def random_inputs(config: Config, key, gradient_steps: int, action_size: int):
    """Random bits for the batches of gradient steps, and standard normal noise."""
    bits_key, noise_key = jax.random.split(key)
    shape = gradient_steps, config.batch_size
    noise = jax.random.normal(noise_key, (*shape, action_size), jnp.float32)
    return jax.random.bits(bits_key, shape, jnp.uint32), noise


def make_train(config: Config):
    """PQL as a pure function train(key=None, state=None, num_updates=...) -> (TrainState, metrics).

    train starts from train.init(key) or continues from a state, for config.num_updates by default.
    metrics is a flat dict of arrays [num_updates]; returns are NaN for updates in which no episode
    ended, and eval/* for updates without an evaluation. train can be jitted, and vmapped over keys
    or float fields of config.
    To vmap over states, give all of them one update number, as in jax.vmap(lambda state:
    train(state=state._replace(update=n)))(states), or vmap makes every update evaluate.
    Raises ValueError for an environment that it cannot train on.
    """
    env = make_env(config.env_id, config.backend)
    is_distributional, is_sac = config.algorithm == "pql_d", config.algorithm == "sac_n"
    policy = MLP(env.action_size * (1 + is_sac), config.hidden_sizes)
    critic = DoubleCritic(config.num_atoms if is_distributional else 1, config.hidden_sizes)
    bounds = -config.value_bound, config.value_bound
    support = jnp.linspace(*bounds, config.num_atoms, dtype=jnp.float32)
    num_rows = config.buffer_size // config.num_envs
    # All of the warm-up's rows but those of n_steps - 1 incomplete windows and the one in fresh.
    rows_before = config.warmup_steps - config.n_steps

    def learning_rate(number, cycle):
        """The rate in a cycle of an update; if annealed, it stays zero after the run."""
        progress = (number + cycle / config.num_steps) / config.num_updates
        remaining = 1 - config.anneal_lr * jnp.minimum(progress, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    decay = optax.add_decayed_weights(config.weight_decay)
    optimizer = optax.chain(clip, optax.scale_by_adam(), decay)  # AdamW without its rate

    def step_params(params, grads, opt_state, rate):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, optax.tree.scale(-rate, updates)), opt_state

    def init(key):
        """The state after warm-up; its last row of transitions is in fresh."""
        key, policy_key, critic_key, reset_key, warmup_key = jax.random.split(key, 5)
        env_state = reset_envs(env, reset_key, config.num_envs)
        obs, mean = env_state.obs, jnp.zeros(env.obs_size, jnp.float32)
        actor = Actor(env_state, Statistics(mean, jnp.ones_like(mean), jnp.float32(0)), window=None)

        params = policy.init(policy_key, obs)
        alpha = (jnp.float32(0), optimizer.init(jnp.float32(0))) if is_sac else (None, None)
        p_learner = PLearner(params, optimizer.init(params), *alpha)
        params = critic.init(critic_key, obs, jnp.zeros((len(obs), env.action_size), jnp.float32))
        target_params = jax.tree.map(jnp.copy, params)  # a donated state holds no buffer twice
        v_learner = VLearner(params, target_params, optimizer.init(params))

        state = TrainState(actor, v_learner, p_learner, None, None, key, jnp.int32(0))
        actor, transitions, _ = act(state, warmup_key, config.warmup_steps, warmup=True)
        fresh = jax.tree.map(lambda x: x[rows_before:], transitions)
        first = jax.tree.map(lambda x: x[:rows_before], transitions)
        replay = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), transitions)
        replay = replay_insert(replay, jnp.arange(rows_before), first)
        return state._replace(actor=actor, replay=replay, fresh=fresh)

    def sample_action(params, obs, noise):
        """Actions with noise, standard normal for sac_n, and their log-probabilities (sac_n)."""
        outputs = policy.apply(params, obs)
        if is_sac:
            return squashed_gaussian(outputs, noise)
        return jnp.clip(jnp.tanh(outputs) + noise, -1, 1), 0.0

    def act(state, key, num_steps, warmup=False):
        """The actor after num_steps, n-step transitions, and sums over finished episodes."""

        def step(actor, inputs):
            noise, step_key = inputs
            statistics = update_statistics(actor.statistics, actor.env.obs)
            obs = normalize(actor.env.obs, statistics)
            action = noise if warmup else sample_action(state.p_learner.policy, obs, noise)[0]
            env_state, step, sums = step_envs(env, step_key, actor.env, action)
            return actor._replace(env=env_state, statistics=statistics), (step, sums)

        noise_key, step_key = jax.random.split(key)
        noise = exploration_noise(config, noise_key, num_steps, env.action_size, warmup)
        inputs = noise, jax.random.split(step_key, num_steps)
        actor, (steps, sums) = jax.lax.scan(step, state.actor, inputs)

        if state.actor.window is not None:
            steps = jax.tree.map(lambda *x: jnp.concatenate(x), actor.window, steps)
        transitions, window = transitions_of(config, steps)
        return actor._replace(window=window), transitions, sums

    def expected_values(outputs):
        return jax.nn.softmax(outputs) @ support if is_distributional else outputs[..., 0]

    def learn_values(state, filled, key, rate, gradient_steps):
        """The V-learner after critic updates, with the state's policy and statistics."""

        def loss(params, target_params, batch, noise):
            obs = normalize(batch.obs, state.actor.statistics, config.obs_clip)
            next_obs = normalize(batch.next_obs, state.actor.statistics, config.obs_clip)
            next_action, log_prob = sample_action(state.p_learner.policy, next_obs, noise)
            next_outputs = critic.apply(target_params, next_obs, next_action)
            outputs = critic.apply(params, obs, batch.action)
            if is_distributional:
                probs, outcomes = jax.nn.softmax(next_outputs), (batch.reward, batch.discount)
                targets = project_distribution(probs, *outcomes, support).min(axis=0)
                td_loss = binary_cross_entropy(outputs, targets)
            else:
                alpha = jnp.exp(state.p_learner.log_alpha) if is_sac else 0.0
                next_values = next_outputs[..., 0] - alpha * log_prob
                targets = double_q_targets(batch.reward, next_values, batch.discount)
                td_loss = jnp.square(outputs[..., 0] - targets).mean(axis=-1).sum()
            return td_loss, expected_values(outputs).mean()

        def gradient_step(learner, inputs):
            bits, noise = inputs
            batch = replay_sample(state.replay, bits, filled)
            grad_fn = jax.value_and_grad(loss, has_aux=True)
            (td_loss, q), grads = grad_fn(learner.critic, learner.target_critic, batch, noise)
            params, opt_state = step_params(learner.critic, grads, learner.opt_state, rate)
            target_params = optax.incremental_update(params, learner.target_critic, config.tau)
            losses = {"td_loss": td_loss, "q_values": q, "grad_norm": optax.tree.norm(grads)}
            return VLearner(params, target_params, opt_state), losses

        bits, noise = random_inputs(config, key, gradient_steps, env.action_size)
        if not is_sac:
            limit = config.target_noise_clip
            noise = jnp.clip(config.target_noise * noise, -limit, limit)
        return jax.lax.scan(gradient_step, state.v_learner, (bits, noise))

    def learn_policy(state, filled, key, rate, gradient_steps):
        """The P-learner after policy updates, with the state's critics and statistics."""

        def loss(params, log_alpha, obs, noise):
            obs = normalize(obs, state.actor.statistics, config.obs_clip)
            action, log_prob = sample_action(params, obs, noise if is_sac else 0.0)
            values = expected_values(critic.apply(state.v_learner.critic, obs, action)).min(axis=0)
            if is_sac:
                values -= jnp.exp(log_alpha) * log_prob
            return -values.mean(), jnp.mean(log_prob)

        def gradient_step(learner, inputs):
            bits, noise = inputs
            obs = replay_sample(state.replay.obs, bits, filled)
            grad_fn = jax.value_and_grad(loss, has_aux=True)
            (policy_loss, log_prob), grads = grad_fn(learner.policy, learner.log_alpha, obs, noise)
            params, opt_state = step_params(learner.policy, grads, learner.opt_state, rate)
            losses = {"policy_loss": policy_loss, "policy_grad_norm": optax.tree.norm(grads)}
            alpha_state = learner.log_alpha, learner.alpha_opt_state
            if is_sac:  # towards an entropy of -action_size
                losses["alpha"] = jnp.exp(learner.log_alpha)
                grad = losses["alpha"] * (env.action_size - log_prob)
                alpha_state = step_params(
                    learner.log_alpha, grad, learner.alpha_opt_state, config.alpha_learning_rate
                )
            return PLearner(params, opt_state, *alpha_state), losses

        inputs = random_inputs(config, key, gradient_steps, env.action_size)
        return jax.lax.scan(gradient_step, state.p_learner, inputs)

    def parallel_cycle(state, filled, keys, rate):
        """Actor, V-learner and P-learner all start from the state: none waits for another."""
        actor, fresh, sums = act(state, keys[0], num_steps=1)
        v_learner, v_losses = learn_values(state, filled, keys[1], rate, config.critic_updates)
        p_learner, p_losses = learn_policy(state, filled, keys[2], rate, config.policy_updates)
        state = state._replace(actor=actor, v_learner=v_learner, p_learner=p_learner, fresh=fresh)
        return state, (v_losses | p_losses, sums)

    def sequential_cycle(state, filled, keys, rate):
        """Rounds of critic and policy updates, then environment steps, each with the latest."""
        rounds = math.gcd(config.critic_updates, config.policy_updates)
        critic_steps = config.critic_updates // rounds
        policy_steps = config.policy_updates // rounds

        def learn(state, keys):
            learner, v_losses = learn_values(state, filled, keys[0], rate, critic_steps)
            state = state._replace(v_learner=learner)
            learner, p_losses = learn_policy(state, filled, keys[1], rate, policy_steps)
            return state._replace(p_learner=learner), v_losses | p_losses

        state, losses = jax.lax.scan(learn, state, jax.random.split(keys[1], (rounds, 2)))
        actor, fresh, sums = act(state, keys[0], num_steps=1)
        return state._replace(actor=actor, fresh=fresh), (losses, sums)

    def evaluate(state, key):
        """Mean return and length of eval_episodes greedy episodes."""

        def greedy(obs):
            obs = normalize(obs, state.actor.statistics)
            return sample_action(state.p_learner.policy, obs, 0.0)[0]

        return mean_episode(env, key, config.eval_episodes, greedy)

    one_cycle = parallel_cycle if config.algorithm in ("pql", "pql_d") else sequential_cycle

    def update(state, number):
        """num_steps steps of all environments and their gradient steps."""

        def cycle(state, inputs):
            row, keys, rate = inputs
            # Write before reading: the other way round, XLA would copy the whole replay.
            state = state._replace(replay=replay_insert(state.replay, row[None], state.fresh))
            return one_cycle(state, jnp.minimum(row + 1, num_rows), keys, rate)

        cycles = jnp.arange(config.num_steps, dtype=jnp.int32)
        rows = rows_before + number * config.num_steps + cycles
        cycle_key, eval_key = jax.random.split(jax.random.fold_in(state.key, number))
        keys = jax.random.split(cycle_key, (config.num_steps, 3))
        inputs = rows, keys, learning_rate(number, cycles)
        state, (losses, sums) = jax.lax.scan(cycle, state, inputs)

        sums = jax.tree.map(jnp.sum, sums)
        metrics = {f"losses/{name}": values.mean() for name, values in losses.items()} | {
            "global_step": config.warmup_timesteps + (number + 1) * config.steps_per_update,
            "charts/episodic_return": sums["return"] / sums["ended"],
            "charts/episodic_length": sums["length"] / sums["ended"],
            "charts/physics_failures": sums["failed"],
            "charts/learning_rate": learning_rate(number, 0),
        }
        if config.eval_interval:
            due = ((number + 1) % config.eval_interval == 0) | (number + 1 == config.num_updates)
            nothing = jnp.full(2, jnp.nan, jnp.float32)
            results = jax.lax.cond(due, evaluate, lambda *_: nothing, state, eval_key)
            metrics["eval/episodic_return"], metrics["eval/episodic_length"] = results
        return state._replace(update=number + 1), metrics

    def train(key=None, state=None, num_updates=config.num_updates):
        state = init(key) if state is None else state
        return jax.lax.scan(update, state, state.update + jnp.arange(num_updates, dtype=jnp.int32))

    train.init = init
    return train


# --- Running it: not needed to copy the algorithm -------------------------------------------------

SCRIPT = Path(__file__)
COMMAND = ["python", SCRIPT.name]  # that started the script, without its flags
# On a CPU, the batch from which one seed is faster with several threads than with one.
THREADED_BATCH = 256
# Flags that may change on --resume, as they do not affect the results.
FREE_FLAGS = "distributed checkpoint_interval wandb_mode wandb_project wandb_entity wandb_tags"
# The returns that are drawn and summarised.
RETURNS = {"charts": "while exploring", "eval": "greedy"}


def say(message: str) -> None:
    """Prints a line above the progress bar, on the first host only."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


def parse_args(args: list[str]) -> Config:
    """Parses flags with tyro; also 1e6 for integers, and wandb's --flag=False, --sizes=[64, 64]."""
    name, words, saved = "", [], {}
    for word in args:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
        kind = str(Config.__annotations__.get(name))
        if "bool" in kind:
            word = re.sub("^--(.*)=(?i:false)$", r"--no-\1", re.sub("=(?i:true)$", "", word))
        is_list = "tuple" in kind and "=[" in word
        parts = re.findall(r"[^\s,'\"=\[\]]+", word) if is_list else [word]
        if re.search(r"\bint\b", kind):
            number = r"(^|=)(\d+(\.\d*)?([eE]\+?\d+)?)$"
            parts = [re.sub(number, lambda m: f"{m[1]}{float(m[2]):.15g}", part) for part in parts]
        if name == "resume" and word != "--resume":
            saved = {"default": load_config(word.removeprefix("--resume="))}
        words += parts
    # Without a default made here: its fields would hold what another environment defaults to.
    description = f"{__doc__}\n{inspect.cleandoc(Config.__doc__)}"
    return tyro.cli(Config, args=words, description=description, **saved)


def load_config(run_dir: str | Path) -> Config:
    """The Config of a run, set to resume it. Raises ValueError unless the run is this script's."""
    try:
        flags = json.loads(Path(run_dir, "config.json").read_text())
        script, _ = flags.pop("script"), flags.pop("name", None)
        if script != SCRIPT.stem:
            raise ValueError(f"a run of {script}.py")
        return Config(**flags | {"resume": str(run_dir)})
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--resume is {run_dir}; it takes a run folder: {error!r}") from error


def start_devices(config: Config) -> Mesh:
    """The device mesh for the seeds, with the same number of devices on every host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # On a CPU, more devices than cores cost little: 11 seeds are a device each.
    divisors = [n for n in range(1, 64 + cores) if config.num_seeds % n == 0]
    num_devices = max(divisors, key=lambda n: (min(n, cores), -n))  # few that keep all cores busy
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
    devices = [jax.local_devices(host)[: per_host[-1]] for host in range(hosts)]
    return Mesh(np.ravel(devices), ("seeds",))


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
    """Jitted init(seeds) -> states and run_chunk(update, states) -> (states, metrics).

    Metrics are [num_seeds, chunk_size], with zeros for updates past the end of the run.
    """
    check_memory(config, jax.eval_shape(train.init, jax.random.key(0)).replay)
    # One program runs all chunks, of up to 65,536 steps; the last may be shorter.
    max_chunk = max(1, 2**16 // (config.steps_per_update * config.num_seeds))
    chunk_size = math.ceil(config.num_updates / math.ceil(config.num_updates / max_chunk))
    on_cpu = jax.default_backend() == "cpu"  # where batches of small matrices are slower
    for_each = jax.lax.map if on_cpu else lambda f, xs: jax.vmap(f)(xs)

    def init(seeds):
        return for_each(lambda seed: train.init(jax.random.key(seed)), seeds)

    train_once = jax.jit(functools.partial(train, num_updates=1))

    def run(update, state):
        def step(i, carry):
            state, metrics = carry
            # The update number is unbatched, so that evaluation stays a branch.
            state, row = train_once(state=state._replace(update=update + i))
            write = functools.partial(jax.lax.dynamic_update_slice, start_indices=(i,))
            return state, jax.tree.map(write, metrics, row)

        row = jax.eval_shape(train_once, state=state)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros(chunk_size, x.dtype), row)
        num_left = jnp.minimum(chunk_size, config.num_updates - update)
        return jax.lax.fori_loop(0, num_left, step, (state, metrics))

    def run_chunk(update, states):
        return for_each(functools.partial(run, update), states)

    everywhere, by_seed = PartitionSpec(), PartitionSpec("seeds")
    on_devices = functools.partial(jax.shard_map, mesh=mesh, out_specs=by_seed, check_vma=False)
    init = on_devices(init, in_specs=by_seed)
    run_chunk = on_devices(run_chunk, in_specs=(everywhere, by_seed))
    # Metrics are gathered only across hosts: XLA aborts when a CPU device waits long for another.
    layout = NamedSharding(mesh, by_seed)
    gathered = NamedSharding(mesh, everywhere) if jax.process_count() > 1 else layout
    run_chunk = jax.jit(run_chunk, out_shardings=(layout, gathered), donate_argnums=1)
    # It runs once: more optimising takes longer than it saves, half a minute with physics.
    once = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(init, out_shardings=layout, compiler_options=once), run_chunk


def start_run(config: Config, run_dir: Path, stack: contextlib.ExitStack):
    """Locks the folder, returns wandb's runs and the checkpoints; all hosts get them, or none."""
    wandb_runs, is_ready = [], False
    try:
        if jax.process_index() == 0:
            if config.resume is None:
                run_dir.mkdir(parents=True)  # fails if another run has it
                flags = {"script": SCRIPT.stem, "name": run_dir.name} | dataclasses.asdict(config)
                (run_dir / "config.json").write_text(json.dumps(flags, indent=2))
            file = stack.enter_context((run_dir / "config.json").open("a"))
            with contextlib.suppress(ImportError):  # Windows has no fcntl
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            wandb_runs = start_wandb(config, run_dir)
        is_ready = True
    except BlockingIOError as error:
        raise ValueError(f"--resume is {run_dir}, which another process still trains") from error
    finally:  # all hosts go on, or none
        is_ready = multihost_utils.broadcast_one_to_all(np.array(is_ready))
    if not is_ready:
        sys.exit(2)  # the first host says why
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    folder = run_dir.resolve() / "checkpoints"
    return wandb_runs, ocp.CheckpointManager(folder, options=options)


def restore(config: Config, run_dir: Path, checkpoints, update: int, shapes):
    """The states and seconds of a checkpoint; drops from metrics.csv what it does not cover."""
    csv, temporary = run_dir / "metrics.csv", run_dir / "metrics.tmp"
    try:
        saved = checkpoints.restore(update, args=ocp.args.StandardRestore(shapes))
        rows = csv.read_text().splitlines(keepends=True)[: 1 + update * config.num_seeds]
        if len(rows) < 1 + update * config.num_seeds:
            raise ValueError("metrics.csv lacks rows")
    except Exception as error:  # orbax raises a bare Exception for a damaged array
        raise ValueError(f"--resume: {run_dir} is damaged: {str(error)[:200]}") from error
    if jax.process_index() == 0:
        temporary.write_text("".join(rows))
        temporary.replace(csv)
        (run_dir / "metadata.json").unlink(missing_ok=True)
    return saved


def start_wandb(config: Config, run_dir: Path) -> list:
    """One Weights & Biases run per seed, in a group; above 16 seeds, one for their mean."""
    if config.wandb_mode == "disabled":
        return []
    import wandb  # not at the top: it takes seconds

    name = json.loads((run_dir / "config.json").read_text())["name"]
    seeds = [f"seed-{config.seed + i}" for i in range(config.num_seeds)]
    options = {"project": config.wandb_project, "entity": config.wandb_entity}
    options |= {"group": name, "tags": config.wandb_tags, "mode": config.wandb_mode}
    options |= {"config": dataclasses.asdict(config), "resume": "allow", "reinit": "create_new"}
    options |= {"dir": run_dir.resolve(), "settings": wandb.Settings(silent=True, console="off")}
    try:
        seeds = seeds if len(seeds) <= 16 else ["mean"]
        runs = [wandb.init(name=seed, id=f"{name}-{seed}", **options) for seed in seeds]
    except Exception as error:  # errors of wandb's service are not wandb.Error
        raise ValueError(f"--wandb-mode is {config.wandb_mode}: {error}") from error
    if config.wandb_mode == "online":
        say(f"Weights & Biases: {runs[0].url}")
    return runs


def log_wandb(run_dir: Path, runs: list, exit_code: int | None = None) -> None:
    """Sends wandb the rows that it lacks; if that fails, training goes on without it."""
    if not runs:
        return
    rows = pd.read_csv(run_dir / "metrics.csv").drop(columns="seed")
    try:
        # From the step on that a run takes next: offline, a resumed one begins again with all rows.
        rows = rows[rows["global_step"] >= min(run.step for run in runs)]
        if len(runs) == 1:  # one seed, or the mean of many, and the deviation where they differ
            seeds = rows.groupby("global_step")
            stds = seeds.std().replace(0, np.nan).add_suffix("_std")
            rows = seeds.mean().join(stds).reset_index()
        for i, row in enumerate(rows.to_dict("records")):
            measured = {name: value for name, value in row.items() if not np.isnan(value)}
            runs[i % len(runs)].log(measured, step=int(row["global_step"]))
        for run in runs if exit_code is not None else ():
            run.finish(exit_code)
    except Exception as error:  # errors of wandb's service share no class
        say(f"Weights & Biases: {error}; training goes on, and --resume sends it the rest")
        runs.clear()
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()


def record(config: Config, run_dir: Path, bar: tqdm, metrics: dict[str, jax.Array]) -> None:
    """Appends metrics [num_seeds, chunk_size] to metrics.csv, and moves the bar."""
    rows = pd.DataFrame({name: x.T.ravel() for name, x in jax.device_get(metrics).items()})
    rows.insert(0, "seed", config.seed + rows.index % config.num_seeds)
    rows = rows[rows["global_step"] > 0]  # the last chunk may be shorter
    csv, options = run_dir / "metrics.csv", {"float_format": "%.10g", "na_rep": "nan"}
    rows.to_csv(csv, mode="a", header=not csv.exists(), index=False, **options)
    returns = rows["charts/episodic_return"].dropna()
    words = f"return {returns.mean():.1f}" if len(returns) else "no episode ended"
    if len(nan_seeds := rows.loc[rows["losses/grad_norm"].isna(), "seed"].unique()):
        words += f", NaN in the loss of seed {', '.join(map(str, nan_seeds))}"
    bar.set_postfix_str(words, refresh=False)
    bar.update(len(rows) * config.steps_per_update)
    if bar.disable and time.time() - bar.last_print_t >= 30:  # no terminal: a line now and then
        bar.last_print_t = time.time()
        say(f"step {rows['global_step'].iloc[-1]:,} of {config.total_timesteps:,}, {words}")


def save_results(config: Config, run_dir: Path, params, metadata: dict) -> None:
    """Writes parameters, learning curve and metadata, and prints a summary of the run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    (run_dir / "params.msgpack").write_bytes(serialization.to_bytes(params))
    table, many_seeds, words = pd.read_csv(run_dir / "metrics.csv"), config.num_seeds > 1, []
    title = f"{SCRIPT.stem}, {config.env_id}"
    title += f", {config.num_seeds} seeds: mean and range" if many_seeds else ""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps per seed", ylabel="return", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # Means over 200 bins of steps keep long runs readable.
    bins = table["global_step"] * 200 // table["global_step"].iloc[-1]
    for kind, label in RETURNS.items():
        name = f"{kind}/episodic_return"
        if name not in table or table[name].isna().all():
            continue
        # A seed keeps its return until its next one.
        returns = table.pivot_table(name, bins, "seed").ffill()
        steps = table.dropna(subset=name).groupby(bins)["global_step"].mean()
        axes.plot(steps, returns.mean(axis=1), "o-" if len(steps) <= 30 else "-", label=label)
        axes.fill_between(steps, returns.min(axis=1), returns.max(axis=1), alpha=0.2)
        axes.legend()
        # Of each seed, the last evaluation, or the mean over the last tenth of training.
        last_bin = returns.index[-1]
        last = returns.loc[last_bin if kind == "eval" else min(last_bin, 181) :].mean()
        spread = f" (seeds {last.min():.1f} to {last.max():.1f})" if many_seeds else ""
        words.append(f"{label} {last.mean():.1f}{spread}")
    figure.savefig(run_dir / "learning_curve.png", dpi=150)
    returns = f"return {', '.join(words)}" if words else "no episode has ended"
    print(f"{metadata['updates']} of {config.num_updates} updates, {returns}")
    for seed, rows in table[table["losses/grad_norm"].isna()].groupby("seed"):
        print(f"seed {seed}: NaN in the loss from step {rows['global_step'].iloc[0]:,} on")
    if failures := int(table.get("charts/physics_failures", np.zeros(1)).sum()):
        print(f"physics failed in {failures:,} steps, which ended their episodes")
    metadata["steps_per_second"] = len(table) * config.steps_per_update / metadata["run_seconds"]
    packages = ("jax", "flax", "optax", "gymnax", "craftax", "brax", "jaxmarl", "ale_py", "numpy")
    metadata["versions"] = {name: version(name) for name in packages if name in sys.modules}
    (run_dir / "metadata.json").write_text(json.dumps(metadata, indent=2))
    times = "{run_seconds:.1f} s plus {compile_seconds:.1f} s of compilation".format(**metadata)
    print(f"{metadata['steps_per_second']:,.0f} steps/s on {metadata['device']}, {times}")
    print(f"{run_dir} contains {', '.join(sorted(os.listdir(run_dir)))}")


def find_run(config: Config) -> tuple[Path, int]:
    """The run folder, the same on every host, and the number of updates in its checkpoint."""
    if config.resume is None:
        microseconds = np.array(divmod(time.time_ns() // 1000, 10**8), np.int32)
        high, low = multihost_utils.broadcast_one_to_all(microseconds)
        env_id = re.sub(r"[^\w.-]", "-", config.env_id)
        return Path(config.runs_dir, f"{SCRIPT.stem}__{env_id}__{config.seed}__{high}{low:08}"), 0
    for name, old in vars(load_config(config.resume)).items():
        if (new := getattr(config, name)) != old and name not in FREE_FLAGS.split():
            raise ValueError(f"--{name.replace('_', '-')} is {new}; the run to resume has {old}")
    folder = Path(config.resume, "checkpoints")
    if not folder.is_dir() or not (updates := ocp.utils.checkpoint_steps(folder)):
        raise ValueError(f"--resume is {config.resume}; it has no checkpoint yet")
    return folder.parent, max(updates)


def main(config: Config, signals: Sequence[float] = ()) -> Path:
    """Trains to the end, or until signals begins with a signal's number; returns the run folder."""
    with contextlib.ExitStack() as stack:  # closes the bar and unlocks the folder, come what may
        return train_run(config, signals, stack)


def train_run(config: Config, signals: Sequence[float], stack: contextlib.ExitStack) -> Path:
    """main, with the bar and the lock of the run folder in a stack."""
    mesh, is_first = start_devices(config), jax.process_index() == 0
    run_dir, update = find_run(config)
    if update == config.num_updates and (run_dir / "metadata.json").exists():
        say(f"{run_dir} is finished: all {update} updates are done")
        return run_dir
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    title = f"{config.env_id}, {config.num_seeds} seed{'s'[: config.num_seeds - 1]} on {device}"
    say(f"{SCRIPT.stem}: {title}, in {run_dir}; compiling takes seconds to a minute")
    train = make_train(config)
    init, run_chunk = make_programs(config, train, mesh)
    wandb_runs, checkpoints = start_run(config, run_dir, stack)
    compile_start, seconds = time.monotonic(), {"compile_seconds": 0.0, "run_seconds": 0.0}
    seeds = config.seed + np.arange(config.num_seeds)
    shapes = init.eval_shape(seeds)
    if update:
        states, seconds = restore(config, run_dir, checkpoints, update, (shapes, seconds))
    else:
        states = init(seeds)
    run_chunk = run_chunk.lower(np.int32(0), shapes).compile()
    seconds["compile_seconds"] += time.monotonic() - compile_start
    start = time.monotonic() - seconds["run_seconds"]
    size = config.steps_per_update * config.num_seeds
    options = {"total": config.num_updates * size, "initial": update * size, "unit": " steps"}
    bar = stack.enter_context(tqdm(**options, unit_scale=True, disable=None if is_first else True))
    bar.last_print_t, unrecorded, signal_number = time.time(), None, 0
    to_resume = f"to resume: {shlex.join([*COMMAND, '--resume', str(run_dir)])}"
    try:
        if signals:  # that came while compiling: there is nothing new to save
            raise KeyboardInterrupt
        while update < config.num_updates and not signal_number:
            states, metrics = run_chunk(np.int32(update), states)
            if unrecorded:  # the chunk before, while this one runs
                record(config, run_dir, bar, unrecorded)
            unrecorded = metrics if is_first else None
            while not metrics["global_step"].is_ready():  # Python handles no signals inside JAX
                time.sleep(0.001)
            update = min(update + metrics["global_step"].shape[1], config.num_updates)
            is_due = time.monotonic() - start - seconds["run_seconds"] >= config.checkpoint_interval
            flags = np.array([[signals[0] if signals else 0, is_due]])  # all hosts do the same
            signal_number, is_due = multihost_utils.process_allgather(flags, tiled=True).max(axis=0)
            if signal_number or is_due or update == config.num_updates:
                unrecorded = unrecorded and record(config, run_dir, bar, unrecorded)
                seconds["run_seconds"] = time.monotonic() - start
                checkpoints.save(update, args=ocp.args.StandardSave((states, seconds)), force=True)
                log_wandb(run_dir, wandb_runs)
        bar.close()
        params = multihost_utils.process_allgather(states.params, tiled=True)
        if is_first:
            save_results(config, run_dir, params, seconds | {"updates": update, "device": device})
    except BaseException:
        say(f"stopped; {to_resume if checkpoints.latest_step() else 'nothing was saved'}")
        raise
    exit_code = 128 + int(signal_number) if update < config.num_updates else 0
    log_wandb(run_dir, wandb_runs, exit_code)
    if exit_code:
        say(to_resume)
        sys.exit(exit_code)
    return run_dir


if __name__ == "__main__":
    COMMAND = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # a shell can close it
    received = []  # the first signal's number and time

    def handle(number, frame):
        if not received:
            received.extend([number, time.monotonic()])
            tqdm.write("stopping after this chunk (a second Ctrl-C stops at once)", file=sys.stderr)
        elif time.monotonic() - received[1] > 1:  # sooner, it is one request that came twice
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    for logger in ("absl", "asyncio"):  # orbax also logs the errors that it raises
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    if jax.config.jax_compilation_cache_dir is None:  # so that a second start does not compile
        with contextlib.suppress(RuntimeError):  # some containers' users have no home
            cache = Path.home() / ".cache" / "jax" / platform.node()
            jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        main(parse_args(sys.argv[1:]), received)
    except KeyboardInterrupt:
        os._exit(128 + received[0])  # an ordinary exit would wait for the running chunk
    except (OSError, ValueError) as error:
        # A full disk is a ValueError of tensorstore.
        if isinstance(error, ValueError) and not re.match("--|.*OS error", str(error), re.DOTALL):
            raise  # a bug
        print(f"{SCRIPT.name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
