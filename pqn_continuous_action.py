"""PQN for continuous actions: brax, gymnax, MuJoCo Playground's dm_control.

PQN: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025, arXiv 2407.04811;
this is the actor-critic form that PureJaxQL added in November 2025 (pqn_mujoco_playground.py).
Unlike pql_isaac_style.py, it has no replay buffer and no target networks: critics with layer
normalisation learn SARSA(lambda) from each rollout, exploration noise included, and a deterministic
policy ascends their gradient, held near the policy that collected the rollout.

Unlike PureJaxQL, it bootstraps at time limits; anneals the learning rate at every update, to zero,
not at every gradient step, to 0.5 %; and updates the running statistics of observations and rewards
once per update, not at every step. Those of observations start from a rollout with random actions,
which global_step does not count.

Equations, details, metrics and results: docs/pqn_continuous.md

    python pqn_continuous_action.py --env-id ant    # trains, plots, saves; --help lists the flags

    from pqn_continuous_action import Config, make_train  # as a library: a pure function of a key
    config = Config(env_id="Pendulum-v1", num_envs=64, gamma=0.97, total_timesteps=100_000)
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
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are PureJaxQL's for dm_control, except env_id and obs_clip (CleanRL's)."""

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int = 50_000_000
    """Total environment steps per seed, over all environments; rounded down to whole updates."""

    env_id: str = "ant"
    """Task of brax, of gymnax or, if MuJoCo Playground is installed, of its dm_control suite."""
    backend: Literal["spring", "positional", "generalized", "mjx"] = "spring"
    """Physics backend of a brax task."""
    num_envs: int = 1024
    """Parallel environments per seed."""
    num_steps: int = 32
    """Steps per environment in a rollout."""

    learning_rate: float = 1e-4
    """Learning rate of RAdam, for critics and policy."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.995
    """Discount factor."""
    td_lambda: float = 0.7
    """Lambda of the lambda-returns: 0 for one-step targets, 1 for Monte Carlo."""
    stddev_start: float = 1.0
    """Initial standard deviation of the exploration noise; actions are in [-1, 1]."""
    stddev_finish: float = 0.15
    """Final standard deviation of the exploration noise."""
    stddev_decay: float = 1.0
    """Fraction of the run over which the exploration noise decays linearly."""
    num_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 32
    """Minibatches per pass; must divide num_envs * num_steps."""
    penalty_threshold: float = 0.15
    """Mean absolute change of an action since the rollout above which it is penalised."""
    penalty_coef: float = 10.0
    """Weight of the penalty on actions that have changed since the rollout."""
    max_grad_norm: float = 1.0
    """Maximum global norm of the gradients, of the critics and of the actor."""
    reward_scale: float = 1.0
    """Scale of training rewards; reported returns are unscaled."""
    norm_reward: bool = False
    """Divide training rewards by the running standard deviation of discounted returns."""
    obs_clip: float = 10.0
    """Clip range of the normalised observations."""
    num_critics: int = 2
    """Critics, each with its own initial weights and the same targets, made from their mean."""
    norm: Literal["layer_norm", "none"] = "layer_norm"
    """Normalisation after every hidden layer."""
    actor_hidden_sizes: tuple[int, ...] = (512, 256, 128)
    """Units of each hidden layer of the actor."""
    critic_hidden_sizes: tuple[int, ...] = (1024, 512, 256)
    """Units of each hidden layer of a critic."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxQL does."""

    eval_interval: int = 100
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
    wandb_project: str = "pqn"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team (default: WANDB_ENTITY)."""
    wandb_tags: tuple[str, ...] = ()
    """Weights & Biases tags."""

    batch_size = property(lambda self: self.num_envs * self.num_steps, doc="Steps per rollout.")
    steps_per_update = batch_size
    num_gradient_steps = property(lambda self: self.num_epochs * self.num_minibatches)
    num_updates = property(lambda self: self.total_timesteps // self.batch_size)

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
        for name in ("actor_hidden_sizes", "critic_hidden_sizes"):
            sizes, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{flag} is {sizes}; it takes positive integers")
        rollout = f"--num-envs {self.num_envs} * --num-steps {self.num_steps}"
        if self.batch_size % self.num_minibatches:
            minibatches = f"--num-minibatches is {self.num_minibatches}"
            raise ValueError(f"{minibatches}; it must divide {rollout}")
        if self.num_updates == 0:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, less than {rollout}")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_steps num_epochs num_minibatches"),
    (1, 2**31 - 1, "num_critics eval_episodes"),
    (0, 2**31 - 1, "seed eval_interval"),
    (0, 1, "learning_rate gamma td_lambda stddev_decay"),
    (0, math.inf, "stddev_start stddev_finish penalty_threshold penalty_coef"),
    (0, math.inf, "reward_scale checkpoint_interval"),
    (1e-9, math.inf, "max_grad_norm obs_clip"),
]

# --- Networks -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Dense, norm, ReLU blocks, orthogonal weights: [..., num_inputs] to [..., num_outputs]."""

    num_outputs: int
    hidden_sizes: tuple[int, ...]
    norm: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.orthogonal()
        for size in self.hidden_sizes:
            x = nn.Dense(size, kernel_init=init)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.norm == "layer_norm" else x)
        return nn.Dense(self.num_outputs, kernel_init=init)(x)


class DeterministicPolicy(nn.Module):
    """Normalised observations to actions [..., action_size] in [-1, 1]."""

    action_size: int
    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        config = self.config
        return jnp.tanh(MLP(self.action_size, config.actor_hidden_sizes, config.norm)(obs))


class Critics(nn.Module):
    """Values [num_critics, ...] of normalised observations and actions."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x, sizes = jnp.concatenate([obs, action], axis=-1), self.config.critic_hidden_sizes
        # Mapped, so that on a GPU the same product of all critics is one launch.
        mapped = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        critics = nn.vmap(MLP, **mapped, axis_size=self.config.num_critics)
        return critics(1, sizes, self.config.norm, name="MLP")(x)[..., 0]


# --- Equations ------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Running mean and variance, such as of observations."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def lambda_returns(rewards, next_values, terminated, truncated, gamma, td_lambda) -> jax.Array:
    """Q(lambda) targets G of a rollout (PQN, section 4), with separate terminated and truncated.

        G[t] = r[t] + gamma * (1 - terminated[t]) * ((1 - l[t]) * next_values[t] + l[t] * G[t+1])
        l[t] = td_lambda * (1 - terminated[t]) * (1 - truncated[t]),  l[num_steps - 1] = 0

    Arrays are [num_steps, num_envs]; next_values[t] is the value after step t, before any reset:
    max_a Q in Q-learning, Q of the next action in SARSA.
    """
    trace = (td_lambda * ~(terminated | truncated)).at[-1].set(0)
    discount = gamma * ~terminated
    intercept, slope = rewards + discount * (1 - trace) * next_values, discount * trace

    def compose(later, earlier):
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    # G[t] is a line in G[t + 1]: lines compose in log2(num_steps) rounds, without a loop.
    return jax.lax.associative_scan(compose, (intercept, slope), reverse=True)[0]


def proximity_penalty(actions, old_actions, threshold, coef) -> jax.Array:
    """Penalty [batch] on actions [batch, action_size] that are far from old ones (PureJaxQL).

        coef * mean(huber(actions - old_actions))  where mean(|actions - old_actions|) > threshold

    It is zero elsewhere; the means are over the components of an action.
    """
    is_far = jnp.abs(actions - old_actions).mean(axis=-1) > threshold
    return jnp.where(is_far, coef * optax.huber_loss(actions, old_actions).mean(axis=-1), 0)


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
    return jnp.clip((obs - statistics.mean) / jnp.sqrt(statistics.var + 1e-8), -clip, clip)


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


def random_statistics(env: Env, key: jax.Array, num_envs: int, num_steps: int) -> Statistics:
    """Statistics of the observations of a rollout with uniformly random actions."""

    def step(carry, key):
        env_state, statistics = carry
        action_key, step_key = jax.random.split(key)
        statistics = update_statistics(statistics, env_state.obs)
        shape = num_envs, env.action_size
        action = jax.random.uniform(action_key, shape, jnp.float32, minval=-1)
        env_state, _, _ = step_envs(env, step_key, env_state, action)
        return (env_state, statistics), None

    reset_key, step_key = jax.random.split(key)
    mean = jnp.zeros(env.obs_size, jnp.float32)
    statistics = Statistics(mean, jnp.ones_like(mean), jnp.float32(0))
    carry = reset_envs(env, reset_key, num_envs), statistics
    return jax.lax.scan(step, carry, jax.random.split(step_key, num_steps))[0][1]


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The complete training state; saved, it is a checkpoint."""

    networks: Any  # flax variables of "actor" and "critics"
    opt_state: Any
    statistics: Statistics  # of observations, up to the last update
    return_statistics: Statistics  # of discounted returns
    env: EnvState
    discounted_return: jax.Array  # [num_envs], of the episode so far
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far

    @property
    def params(self):
        """The networks and observation statistics of a trained agent."""
        return self.networks | {"statistics": self.statistics}


class Transition(NamedTuple):
    """One step of all environments; a rollout adds a leading axis of num_steps."""

    step: Step
    policy_action: jax.Array  # without noise
    next_noise: jax.Array  # of the next action
    discounted_return: jax.Array  # of the episode so far


def make_train(config: Config):
    """PQN as a pure function train(key=None, state=None, num_updates=...) -> (TrainState, metrics).

    train starts from train.init(key) or continues from a state, for config.num_updates by default.
    metrics is a flat dict of arrays [num_updates]; returns are NaN for updates in which no episode
    ended, and eval/* for updates without an evaluation. train can be jitted, and vmapped over keys
    or float fields of config.
    To vmap over states, give all of them one update number, as in jax.vmap(lambda state:
    train(state=state._replace(update=n)))(states), or vmap makes every update evaluate.
    Raises ValueError for an environment that it cannot train on.
    """
    env = make_env(config.env_id, config.backend)
    actor, critics = DeterministicPolicy(env.action_size, config), Critics(config)

    def learning_rate(number):
        """The rate of an update; if annealed, it stays zero after the run."""
        progress = number / config.num_updates
        remaining = 1 - config.anneal_lr * jnp.minimum(progress, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    def stddev(number):
        """Standard deviation of the exploration noise in an update."""
        decayed = jnp.minimum(number / jnp.maximum(config.stddev_decay * config.num_updates, 1), 1)
        change = config.stddev_finish - config.stddev_start
        return jnp.float32(config.stddev_start + change * decayed)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    radam = optax.chain(clip, optax.scale_by_radam())
    # Gradients of actor and critics are clipped separately.
    optimizer = optax.partition(
        {"actor": radam, "critics": radam}, {"actor": "actor", "critics": "critics"}
    )

    def flatten(networks):
        """The parameters or gradients of actor and critics as a vector each."""
        return {name: ravel_pytree(x)[0] for name, x in networks.items()}

    def init(key):
        key, actor_key, critics_key, reset_key, random_key = jax.random.split(key, 5)
        env_state = reset_envs(env, reset_key, config.num_envs)
        obs = env_state.obs
        action = jnp.zeros((config.num_envs, env.action_size), jnp.float32)
        networks = {
            "actor": actor.init(actor_key, obs),
            "critics": critics.init(critics_key, obs, action),
        }
        return TrainState(
            networks,
            optimizer.init(flatten(networks)),
            # So that the first update, too, learns from normalised observations.
            random_statistics(env, random_key, config.num_envs, config.num_steps),
            Statistics(*jnp.array([0, 1, 0], jnp.float32)),
            env_state,
            jnp.zeros(config.num_envs, jnp.float32),
            key,
            jnp.int32(0),
        )

    def value(params, obs, action):
        return critics.apply(params, obs, action).mean(axis=0)

    def policy(state, obs):
        obs = normalize(obs, state.statistics, config.obs_clip)
        return actor.apply(state.networks["actor"], obs)

    def collect(state, key):
        def step(carry, inputs):
            env_state, discounted_return = carry
            noise, next_noise, step_key = inputs
            policy_action = policy(state, env_state.obs)
            action = jnp.clip(policy_action + noise, -1, 1)
            env_state, step, sums = step_envs(env, step_key, env_state, action)
            discounted_return = config.gamma * discounted_return + step.reward
            row = Transition(step, policy_action, next_noise, discounted_return)
            ended = step.terminated | step.truncated
            return (env_state, jnp.where(ended, 0, discounted_return)), (row, sums)

        noise_key, step_key = jax.random.split(key)
        shape = config.num_steps + 1, config.num_envs, env.action_size
        noise = stddev(state.update) * jax.random.normal(noise_key, shape, jnp.float32)
        inputs = noise[:-1], noise[1:], jax.random.split(step_key, config.num_steps)
        carry = state.env, state.discounted_return
        (env_state, discounted_return), (rollout, sums) = jax.lax.scan(step, carry, inputs)
        state = state._replace(
            env=env_state,
            discounted_return=discounted_return,
            return_statistics=update_statistics(
                state.return_statistics, rollout.discounted_return.ravel()
            ),
        )
        return state, rollout, jax.tree.map(jnp.sum, sums)

    def targets(state, rollout):
        """SARSA(lambda) targets [num_steps, num_envs]; the next action includes its noise."""
        steps, next_noise = rollout.step, rollout.next_noise
        # Within an episode, and but for the last row, this is the action taken next.
        next_action = jnp.clip(policy(state, steps.next_obs) + next_noise, -1, 1)
        next_obs = normalize(steps.next_obs, state.statistics, config.obs_clip)
        next_values = value(state.networks["critics"], next_obs, next_action)
        terminated, truncated = steps.terminated, steps.truncated
        if not config.bootstrap_on_truncation:
            terminated |= truncated
        rewards = config.reward_scale * steps.reward
        if config.norm_reward:
            rewards = rewards / jnp.sqrt(state.return_statistics.var + 1e-8)
        outcomes = rewards, next_values, terminated, truncated
        return lambda_returns(*outcomes, config.gamma, config.td_lambda)

    def loss(networks, obs, action, old_action, target):
        """The critics' losses, summed, plus the actor's, whose gradient does not reach critics."""
        values = critics.apply(networks["critics"], obs, action)
        td_loss = optax.huber_loss(values, target).mean(axis=-1).sum()
        new_action = actor.apply(networks["actor"], obs)
        q = value(jax.lax.stop_gradient(networks["critics"]), obs, new_action).mean()
        limits = config.penalty_threshold, config.penalty_coef
        penalty = proximity_penalty(new_action, old_action, *limits)
        policy_loss = penalty.mean() - q
        penalties = penalty.mean(), (penalty > 0).mean()
        return td_loss + policy_loss, (td_loss, values.mean(), policy_loss, *penalties)

    def learn(state, rollout, key):
        rate = learning_rate(state.update)
        steps = rollout.step
        obs = normalize(steps.obs, state.statistics, config.obs_clip)
        batch = obs, steps.action, rollout.policy_action, targets(state, rollout)
        batch = jax.tree.map(lambda x: x.reshape(config.batch_size, *x.shape[2:]), batch)

        def gradient_step(carry, index):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[index], batch)
            networks = {name: unflatten[name](x) for name, x in params.items()}
            grads, losses = jax.grad(loss, has_aux=True)(networks, *minibatch)
            grads = flatten(grads)
            updates, opt_state = optimizer.update(grads, opt_state)
            params = jax.tree.map(lambda x, update: x - rate * update, params, updates)
            norms = optax.tree.norm(grads["critics"]), optax.tree.norm(grads["actor"])
            return (params, opt_state), jnp.stack([*losses, *norms])

        # Sorting random bits gives a random permutation: one argsort shuffles for all epochs.
        bits = jax.random.bits(key, (config.num_epochs, config.batch_size), jnp.uint32)
        order = bits.argsort()
        minibatches = order.reshape(config.num_gradient_steps, -1)
        # While learning, the parameters are vectors: on a GPU, each array costs a launch a step.
        unflatten = {name: ravel_pytree(x)[1] for name, x in state.networks.items()}
        carry = flatten(state.networks), state.opt_state
        (params, opt_state), losses = jax.lax.scan(gradient_step, carry, minibatches)
        networks = {name: unflatten[name](x) for name, x in params.items()}
        names = "td_loss", "q_values", "policy_loss", "penalty", "penalty_ratio", "grad_norm"
        names = [f"losses/{name}" for name in (*names, "policy_grad_norm")]
        # Only now, so that old and new actions are of the same normalised observations.
        statistics = update_statistics(state.statistics, steps.obs.reshape(config.batch_size, -1))
        state = state._replace(networks=networks, opt_state=opt_state, statistics=statistics)
        return state, dict(zip(names, losses.mean(0), strict=True))

    def evaluate(state, key):
        """Mean return and length of eval_episodes greedy episodes."""
        return mean_episode(env, key, config.eval_episodes, lambda obs: policy(state, obs))

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(
            jax.random.fold_in(state.key, number), 3
        )
        state, rollout, sums = collect(state, collect_key)
        state, losses = learn(state, rollout, learn_key)

        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": sums["return"] / sums["ended"],
            "charts/episodic_length": sums["length"] / sums["ended"],
            "charts/physics_failures": sums["failed"],
            "charts/stddev": stddev(number),
            "charts/learning_rate": learning_rate(number),
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
THREADED_BATCH = 4096
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


def make_programs(config: Config, train, mesh: Mesh):
    """Jitted init(seeds) -> states and run_chunk(update, states) -> (states, metrics).

    Metrics are [num_seeds, chunk_size], with zeros for updates past the end of the run.
    """
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
