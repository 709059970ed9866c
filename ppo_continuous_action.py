"""PPO with clipping for continuous actions: brax, gymnax, MuJoCo Playground's dm_control.

Proximal Policy Optimisation: Schulman et al., 2017, arXiv 1707.06347, with the details of CleanRL's
ppo_continuous_action.py, as in PureJaxRL (Lu et al., 2022). Unlike ppo_cartpole.py, it has a
Gaussian policy, and normalises observations and rewards by running statistics. These are updated
once per update, not at every step, and normalised rewards are not clipped.

    python ppo_continuous_action.py --env-id ant    # trains, plots, saves; --help lists the flags

    from ppo_continuous_action import Config, make_train  # as a library: a pure function of a key
    config = Config(env_id="Pendulum-v1", num_envs=64, num_steps=64, total_timesteps=100_000)
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
import io
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
import warnings
from collections.abc import Callable
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
    """The defaults are PureJaxRL's, except env_id, backend and obs_clip (CleanRL's)."""

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
    num_envs: int = 2048
    """Parallel environments per seed."""
    num_steps: int = 10
    """Steps per environment in a rollout."""

    learning_rate: float = 3e-4
    """Learning rate of Adam."""
    anneal_lr: bool = False
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of GAE: 0 for one-step advantages, 1 for Monte Carlo."""
    num_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 32
    """Minibatches per pass; must divide num_envs * num_steps."""
    initial_stddev: float = 1.0
    """Initial standard deviation of the actions; it is learned, the same in all states."""
    obs_clip: float = 10.0
    """Clip range of the normalised observations."""
    norm_reward: bool = True
    """Divide training rewards by the running standard deviation of discounted returns."""
    norm_adv: bool = True
    """Normalise the advantages in each minibatch."""
    clip_coef: float = 0.2
    """Clip range of the probability ratio in the policy loss."""
    clip_vloss: bool = True
    """Clip the value loss too, with the range clip_coef."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Maximum global norm of the gradients."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation function after every hidden layer."""
    hidden_size: int = 256
    """Units per hidden layer."""
    num_layers: int = 2
    """Number of hidden layers, in the actor and in the critic."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxRL does."""

    eval_interval: int = 100
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
    wandb_project: str = "ppo"
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
        rollout = f"--num-envs {self.num_envs} * --num-steps {self.num_steps}"
        if self.batch_size % self.num_minibatches:
            minibatches = f"--num-minibatches is {self.num_minibatches}"
            raise ValueError(f"{minibatches}; it must divide {rollout}")
        if self.norm_adv and self.batch_size == self.num_minibatches:
            raise ValueError(
                "--norm-adv needs more than one transition per minibatch: lower --num-minibatches"
            )
        if self.num_updates == 0:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, less than {rollout}")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_steps num_epochs num_minibatches"),
    (1, 2**31 - 1, "hidden_size num_layers eval_episodes"),
    (0, 2**31 - 1, "seed eval_interval"),
    (0, 1, "learning_rate gamma gae_lambda clip_coef"),
    (0, math.inf, "ent_coef vf_coef checkpoint_interval"),
    (1e-9, math.inf, "max_grad_norm initial_stddev obs_clip"),
]

# --- Networks -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Dense layers, orthogonal weights, zero biases: [..., obs_dim] to [..., num_outputs]."""

    num_outputs: int
    output_scale: float
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        for _ in range(self.config.num_layers):
            x = nn.Dense(self.config.hidden_size, kernel_init=nn.initializers.orthogonal(2**0.5))(x)
            x = getattr(nn, self.config.activation)(x)
        return nn.Dense(
            self.num_outputs, kernel_init=nn.initializers.orthogonal(self.output_scale)
        )(x)


class GaussianPolicy(nn.Module):
    """Mean [..., action_size] and log standard deviation [action_size] of the actions."""

    action_size: int
    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.constant(jnp.log(self.config.initial_stddev), jnp.float32)
        log_std = self.param("log_std", init, (self.action_size,))
        return MLP(self.action_size, 0.01, self.config)(obs), log_std


# --- Equations ------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Running mean and variance, such as of observations."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def gaussian_log_prob(action, mean, log_std) -> jax.Array:
    """Log-probability [...] of actions [..., action_size] under independent Gaussians."""
    log_densities = -0.5 * jnp.square((action - mean) / jnp.exp(log_std)) - log_std
    return (log_densities - 0.5 * math.log(2 * math.pi)).sum(axis=-1)


def gaussian_entropy(log_std) -> jax.Array:
    """Entropy of independent Gaussians with log standard deviations [..., action_size]."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(axis=-1)


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda) -> jax.Array:
    """Generalised advantage estimates A (Schulman et al., 2016, equation 16).

        delta[t] = r[t] + gamma * (1 - terminated[t]) * next_values[t] - values[t]
        A[t] = delta[t] + gamma * gae_lambda * (1 - terminated[t]) * (1 - truncated[t]) * A[t+1]
        A[num_steps] = 0

    Arrays are [num_steps, num_envs]; next_values[t] is the value after step t, before any reset.
    """
    deltas = rewards + gamma * ~terminated * next_values - values
    slopes = gamma * gae_lambda * ~(terminated | truncated)

    def compose(later, earlier):
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    # A[t] is a line in A[t + 1]: lines compose in log2(num_steps) rounds, without a loop.
    return jax.lax.associative_scan(compose, (deltas, slopes), reverse=True)[0]


def clipped_surrogate(ratios, advantages, clip_coef) -> jax.Array:
    """PPO's policy loss (Schulman et al., 2017, equation 7); ratios and advantages are [batch]."""
    clipped = jnp.clip(ratios, 1 - clip_coef, 1 + clip_coef)
    return -jnp.minimum(ratios * advantages, clipped * advantages).mean()


def value_loss(values, old_values, returns, clip_coef) -> jax.Array:
    """Half the mean of the larger squared error, of values [batch] or clipped near old_values."""
    clipped = old_values + jnp.clip(values - old_values, -clip_coef, clip_coef)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)).mean()


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


# --- Environment ----------------------------------------------------------------------------------


class Env(NamedTuple):
    """A single environment, with actions in [-1, 1] and no automatic reset."""

    reset: Callable  # key -> physics, obs
    step: Callable  # key, physics, action -> physics, obs, reward, terminated, truncated
    obs_size: int
    action_size: int
    max_steps: int


def make_physics(env_id: str, backend: str, others: tuple[str, ...]):
    """The brax or dm_control environment, which share an interface, and its time limit."""
    brax_ids = "ant halfcheetah hopper humanoid humanoidstandup inverted_double_pendulum"
    brax_ids += " inverted_pendulum pusher reacher swimmer walker2d"
    brax_ids = tuple(brax_ids.split())
    # Imported on demand, as both take seconds; silenced, as they print about missing packages.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if env_id in brax_ids:
            from brax import envs

            try:
                return envs.get_environment(env_id, backend=backend), 1000
            except (ValueError, AssertionError) as error:
                message = f"--backend is {backend}; --env-id {env_id} does not support it: {error}"
                raise ValueError(message) from error
        with contextlib.suppress(ImportError):
            from mujoco_playground import dm_control_suite

            if env_id in dm_control_suite.ALL_ENVS:
                max_steps = dm_control_suite.get_default_config(env_id).episode_length
                return dm_control_suite.load(env_id, config_overrides={"impl": "jax"}), max_steps
            others = (*dm_control_suite.ALL_ENVS, *others)
    raise ValueError(f"--env-id is {env_id}; it takes one of {', '.join((*brax_ids, *others))}")


def make_env(env_id: str, backend: str) -> Env:
    """The gymnax, brax or dm_control environment of that name.

    Raises ValueError for an unknown id, spaces other than Box, or a backend that brax lacks for it.
    """
    import gymnax  # not at the top: it takes seconds, and starts JAX before the devices are chosen

    if env_id in gymnax.registered_envs:
        env, params = gymnax.make(env_id)
        space = env.action_space(params)
        spaces = [type(space).__name__ for space in (env.observation_space(params), space)]
        if spaces != ["Box", "Box"]:
            takes = "it takes Box observations and actions"
            raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; {takes}")
        if not np.isfinite(np.subtract(space.high, space.low)).all():
            raise ValueError(f"--env-id is {env_id}; it takes actions with finite bounds")
        if not hasattr(params, "max_steps_in_episode"):
            raise ValueError(f"--env-id is {env_id}, whose parameters lack max_steps_in_episode")

        def reset(key):
            obs, physics = env.reset_env(key, params)
            return physics, obs.ravel().astype(jnp.float32)

        def step(key, physics, action):
            action = space.low + (action + 1) / 2 * (space.high - space.low)
            action = action.reshape(space.shape)
            obs, physics, reward, terminated, _ = env.step_env(key, physics, action, params)
            truncated = env.is_truncated(physics, params)
            obs, reward = obs.ravel().astype(jnp.float32), jnp.float32(reward)
            return physics, obs, reward, terminated, truncated

        obs_size = math.prod(env.observation_space(params).shape)
        return Env(reset, step, obs_size, math.prod(space.shape), params.max_steps_in_episode)

    env, max_steps = make_physics(env_id, backend, tuple(gymnax.registered_envs))
    shapes = jax.eval_shape(env.reset, jax.random.key(0))

    def without_empty(state):  # dm_control has empty arrays, which orbax refuses to save
        return jax.tree.map(lambda shape, x: x if shape.size else None, shapes, state)

    def with_empty(state):
        def fill(shape, x):
            return x if shape.size else jnp.zeros(shape.shape, shape.dtype)

        return jax.tree.map(fill, shapes, state)

    def reset(key):
        state = env.reset(key)
        return without_empty(state), state.obs.astype(jnp.float32)

    def step(key, state, action):
        state = env.step(with_empty(state), action)
        obs, reward = state.obs.astype(jnp.float32), jnp.float32(state.reward)
        return without_empty(state), obs, reward, state.done > 0, jnp.bool_(False)

    return Env(reset, step, env.observation_size, env.action_size, max_steps)


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

    An environment whose episode ends begins a new one. Where the physics fail (NaN, or an
    observation or reward of 1e6 or more), the episode is truncated, with reward 0 and the
    observation before the failure.
    """
    step_key, reset_key = jax.random.split(key)
    keys = jax.random.split(step_key, len(action))
    physics, next_obs, reward, *ends = jax.vmap(env.step)(keys, state.physics, action)
    failed = ~((jnp.abs(next_obs) < 1e6).all(axis=-1) & (jnp.abs(reward) < 1e6))
    next_obs = jnp.where(failed[:, None], state.obs, next_obs)
    reward = jnp.where(failed, 0, reward)
    length, episodic_return = state.length + 1, state.episodic_return + reward
    terminated = ends[0] & ~failed
    truncated = ends[1] | failed | (length >= env.max_steps)
    ended = terminated | truncated
    # Floats, as a sum of lengths may overflow int32.
    sums = {"length": ended * length.astype(jnp.float32), "return": ended * episodic_return}
    sums |= {"ended": ended, "failed": failed}

    def restart(old, new):
        return jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    after = EnvState(physics, next_obs, length, episodic_return)
    after = jax.tree.map(restart, after, reset_envs(env, reset_key, len(action)))
    step = Step(state.obs, action, reward, next_obs, terminated, truncated)
    return after, step, jax.tree.map(jnp.sum, sums)


def mean_return(env: Env, key: jax.Array, num_episodes: int, policy: Callable) -> jax.Array:
    """Mean return of episodes with actions policy(obs), each from reset to end."""

    def step(carry):
        env_state, returns, finished, key = carry
        key, step_key = jax.random.split(key)
        env_state, step, _ = step_envs(env, step_key, env_state, policy(env_state.obs))
        returns += jnp.where(finished, 0, step.reward)
        return env_state, returns, finished | step.terminated | step.truncated, key

    reset_key, step_key = jax.random.split(key)
    returns, finished = jnp.zeros(num_episodes, jnp.float32), jnp.zeros(num_episodes, bool)
    carry = reset_envs(env, reset_key, num_episodes), returns, finished, step_key
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), step, carry)[1].mean()


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The complete training state; saved, it is a checkpoint."""

    networks: Any  # flax variables of "actor" and "critic"
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

    obs: jax.Array
    action: jax.Array  # as sampled, before clipping
    log_prob: jax.Array
    reward: jax.Array
    next_obs: jax.Array  # after the step, before any reset
    terminated: jax.Array
    truncated: jax.Array
    discounted_return: jax.Array  # of the episode so far


def make_train(config: Config):
    """PPO as a pure function train(key=None, state=None, num_updates=...) -> (TrainState, metrics).

    train starts from train.init(key) or continues from a state, for config.num_updates by default.
    metrics is a flat dict of arrays [num_updates]; returns are NaN for updates in which no episode
    ended, and eval/* for updates without an evaluation. train can be jitted, and vmapped over keys
    or float fields of config.
    To vmap over states, pass an unbatched update number, train(state=state._replace(update=n)), or
    vmap turns the cond into a select and every update evaluates.
    Raises ValueError for an environment that it cannot train on.
    """
    env = make_env(config.env_id, config.backend)
    actor, critic = GaussianPolicy(env.action_size, config), MLP(1, 1.0, config)

    def learning_rate(number):
        """The rate of an update; if annealed, it stays zero after the run."""
        progress = number / config.num_updates
        remaining = 1 - config.anneal_lr * jnp.minimum(progress, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    optimizer = optax.chain(clip, optax.scale_by_adam(eps=1e-5))

    def init(key):
        key, actor_key, critic_key, reset_key = jax.random.split(key, 4)
        env_state = reset_envs(env, reset_key, config.num_envs)
        obs, mean = env_state.obs, jnp.zeros(env.obs_size, jnp.float32)
        networks = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
        return TrainState(
            networks,
            optimizer.init(ravel_pytree(networks)[0]),
            Statistics(mean, jnp.ones_like(mean), jnp.float32(0)),
            Statistics(*jnp.array([0, 1, 0], jnp.float32)),
            env_state,
            jnp.zeros(config.num_envs, jnp.float32),
            key,
            jnp.int32(0),
        )

    def value(networks, obs):
        return critic.apply(networks["critic"], obs)[..., 0]

    def policy(state, obs):
        """Mean and log standard deviation of the actions."""
        obs = normalize(obs, state.statistics, config.obs_clip)
        return actor.apply(state.networks["actor"], obs)

    def collect(state, key):
        def step(carry, inputs):
            env_state, discounted_return = carry
            noise, step_key = inputs
            mean, log_std = policy(state, env_state.obs)
            action = mean + jnp.exp(log_std) * noise
            log_prob = gaussian_log_prob(action, mean, log_std)
            # As in CleanRL, the environment alone sees clipped actions.
            env_state, step, sums = step_envs(env, step_key, env_state, jnp.clip(action, -1, 1))
            discounted_return = config.gamma * discounted_return + step.reward
            outcomes = step.reward, step.next_obs, step.terminated, step.truncated
            row = Transition(step.obs, action, log_prob, *outcomes, discounted_return)
            ended = step.terminated | step.truncated
            return (env_state, jnp.where(ended, 0, discounted_return)), (row, sums)

        noise_key, step_key = jax.random.split(key)
        shape = config.num_steps, config.num_envs, env.action_size
        noise = jax.random.normal(noise_key, shape, jnp.float32)
        inputs = noise, jax.random.split(step_key, config.num_steps)
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

    def prepare(state, rollout):
        """A flat batch of inputs of the loss; the critic evaluates the rollout in one pass."""
        obs, next_obs = (
            normalize(x, state.statistics, config.obs_clip) for x in (rollout.obs, rollout.next_obs)
        )
        values, next_values = value(state.networks, obs), value(state.networks, next_obs)
        terminated, truncated = rollout.terminated, rollout.truncated
        if not config.bootstrap_on_truncation:
            terminated |= truncated
        rewards = rollout.reward
        if config.norm_reward:
            rewards = rewards / jnp.sqrt(state.return_statistics.var + 1e-8)
        outcomes = rewards, values, next_values, terminated, truncated
        advantages = gae(*outcomes, config.gamma, config.gae_lambda)
        batch = obs, rollout.action, rollout.log_prob, values, advantages, advantages + values
        return jax.tree.map(lambda x: x.reshape(config.batch_size, *x.shape[2:]), batch)

    def loss(networks, obs, action, old_log_prob, old_value, advantage, returns):
        mean, log_std = actor.apply(networks["actor"], obs)
        log_ratio = gaussian_log_prob(action, mean, log_std) - old_log_prob
        ratio = jnp.exp(log_ratio)
        if config.norm_adv:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = clipped_surrogate(ratio, advantage, config.clip_coef)
        value_clip = config.clip_coef if config.clip_vloss else jnp.inf
        v_loss = value_loss(value(networks, obs), old_value, returns, value_clip)
        entropy = gaussian_entropy(log_std)
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipfrac = (jnp.abs(ratio - 1) > config.clip_coef).mean()
        losses = policy_loss, v_loss, entropy, approx_kl, clipfrac
        return policy_loss + config.vf_coef * v_loss - config.ent_coef * entropy, losses

    def learn(state, rollout, key):
        def gradient_step(carry, index):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grads, losses = jax.grad(loss, has_aux=True)(unflatten(params), *minibatch)
            grads, _ = ravel_pytree(grads)
            updates, opt_state = optimizer.update(grads, opt_state)
            losses = jnp.stack([*losses, optax.tree.norm(grads)])
            return (params - rate * updates, opt_state), losses

        rate = learning_rate(state.update)
        batch = prepare(state, rollout)
        # Sorting random bits gives a random permutation: one argsort shuffles for all epochs.
        bits = jax.random.bits(key, (config.num_epochs, config.batch_size), jnp.uint32)
        order = bits.argsort()
        minibatches = order.reshape(config.num_gradient_steps, -1)
        # While learning, the parameters are one vector: on a GPU, each array costs a launch a step.
        params, unflatten = ravel_pytree(state.networks)
        (params, opt_state), losses = jax.lax.scan(
            gradient_step, (params, state.opt_state), minibatches
        )
        names = "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"
        losses = dict(zip(names, losses.mean(0), strict=True))
        values, returns = batch[3], batch[5]
        losses["explained_variance"] = 1 - (returns - values).var() / returns.var()
        losses = {f"losses/{name}": value for name, value in losses.items()}
        # Only now, so that old and new log-probabilities are of the same normalised observations.
        statistics = update_statistics(state.statistics, rollout.obs.reshape(config.batch_size, -1))
        networks = unflatten(params)
        state = state._replace(networks=networks, opt_state=opt_state, statistics=statistics)
        return state, losses

    def evaluate(state, key):
        """Mean return of eval_episodes greedy episodes."""
        return mean_return(
            env, key, config.eval_episodes, lambda obs: jnp.clip(policy(state, obs)[0], -1, 1)
        )

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
            "charts/learning_rate": learning_rate(number),
        }
        if config.eval_interval:
            due = ((number + 1) % config.eval_interval == 0) | (number + 1 == config.num_updates)
            no_return = jnp.float32(jnp.nan)
            metrics["eval/episodic_return"] = jax.lax.cond(
                due, evaluate, lambda *_: no_return, state, eval_key
            )
        return state._replace(update=number + 1), metrics

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


def make_programs(config: Config, train, mesh: Mesh):
    """Jitted init(0, seeds) -> states, run_chunk(update, states) -> (states, metrics)."""
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
    return np.isnan(metrics["losses/grad_norm"])


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
