"""Parallel Q-Learning on continuous control: brax, gymnax's Pendulum, dm_control from MuJoCo Playground.

Parallel Q-Learning: Li et al., "Parallel Q-Learning: Scaling Off-policy Reinforcement Learning under Massively Parallel
Simulation", ICML 2023, arXiv 2307.12983. An actor, a learner of values and a learner of the policy work side by side,
each on copies of what the others had when they last exchanged. Unlike DQN it has continuous actions (DDPG with double Q
and n-step targets), exploration noise that differs from environment to environment, and thousands of those.

    python pql_isaac_style.py --env-id ant --num-seeds 2  # as a script: trains, plots, saves; --help lists the flags

    from pql_isaac_style import Config, make_train      # as a library: a pure function from a key to results
    state, metrics = jax.jit(make_train(Config(env_id="Pendulum-v1", num_envs=128)))(jax.random.key(0))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "gymnax>=1.0.1,<2", "six>=1.16,<2",
#   "brax>=0.14.2,<0.15", "tyro>=1.0,<2", "tqdm>=4.66,<5", "matplotlib>=3.8,<4", "wandb>=0.31,<0.32", "numpy>=2,<3"]
# ///

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
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
import tyro
from flax import serialization
from jax.sharding import PartitionSpec
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the paper's, for a GPU."""

    seed: int = 0
    """First seed; run i has seed + i and does not depend on how many run beside it."""
    num_seeds: int = 1
    """Independent runs to train at once, spread over all devices."""
    total_timesteps: int = 100_000_000
    """Environment steps of a seed, over all its environments, warm-up included."""
    resume: str | None = None
    """Folder of a run to go on with from its last checkpoint; its configuration is read from there."""

    env_id: str = "ant"
    """Task of brax, of gymnax or, where playground is installed, of its dm_control suite."""
    backend: Literal["spring", "positional", "generalized", "mjx"] = "spring"
    """Physics of a brax task."""
    num_envs: int = 4096
    """Environments of a seed, stepped in parallel."""
    num_steps: int = 64
    """Steps of each environment in an update, which is a row of the metrics."""
    resets_per_step: float = 1.0
    """First states drawn in a step, as a fraction of num_envs; if more episodes end in a step, some begin alike."""

    algorithm: Literal["pql", "pql_d", "ddpg_n"] = "pql"
    """pql; pql_d, which learns distributions of returns; ddpg_n, which does one thing after the other, without lag."""
    learning_rate: float = 5e-4
    """Step size of AdamW, for values and policy."""
    anneal_lr: bool = False
    """Let the learning rate fall linearly to zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 0.5
    """Global norm that gradients are clipped to, both critics together."""
    gamma: float = 0.99
    """Discount factor."""
    n_steps: int = 3
    """Rewards in a target before it is bootstrapped."""
    reward_scale: float = 0.01
    """Factor on the rewards that are learned from; reported returns are without (the paper: ANYmal 1, Franka 0.1)."""
    critic_updates: int = 8
    """Critic updates for a step of all environments; the paper's beta_a:v is one to this."""
    policy_updates: int = 4
    """Policy updates for a step of all environments; the paper's beta_p:v is this to critic_updates."""
    sync_every: int = 1
    """Steps of all environments between two exchanges of parameters, statistics and transitions."""
    buffer_size: int = 5_000_000
    """Transitions in the replay of a seed, on the device; they go into every checkpoint."""
    batch_size: int = 8192
    """Transitions sampled for a gradient step."""
    warmup_steps: int = 32
    """Steps of all environments with uniformly random actions, before everything else."""
    tau: float = 0.05
    """How far each critic update moves the target critic to the online one."""
    stddev_min: float = 0.05
    """Standard deviation of the exploration noise in the first environment."""
    stddev_max: float = 0.8
    """Standard deviation of the exploration noise in the last environment; the same as in the first for a fixed one."""
    target_noise: float = 0.8
    """Standard deviation of the noise on the next actions of targets."""
    target_noise_clip: float = 0.2
    """Bound of the noise on the next actions of targets."""
    obs_clip: float = 5.0
    """Bound of the normalised observations that the learners see; the actor's have none."""
    num_atoms: int = 51
    """Atoms of a distribution of returns (pql_d)."""
    value_bound: float = 10.0
    """The atoms lie from minus this to this (pql_d)."""
    combine: Literal["elementwise_min", "lower_mean"] = "elementwise_min"
    """Target of the two critics (pql_d): least probability of each atom, or the one of lower mean."""
    hidden_sizes: tuple[int, ...] = (512, 256, 128)
    """Units of the hidden layers."""
    bootstrap_on_truncation: bool = True
    """Bootstrap where a time limit cut an episode; without it the cut is a termination, as in the authors' code."""

    eval_interval: int = 20
    """Updates between two greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes of an evaluation, each in an environment of its own."""

    runs_dir: str = "runs"
    """Folder for the folders of runs."""
    checkpoint_interval: float = 60.0
    """Seconds between two checkpoints; 0 for one after every chunk of updates."""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases logging; WANDB_ENTITY says for whom."""
    wandb_project: str = "pql"
    """Weights & Biases project."""

    num_gradient_steps = property(lambda self: self.num_steps * (self.critic_updates + self.policy_updates))
    steps_per_update = property(lambda self: self.num_envs * self.num_steps)
    warmup_timesteps = property(lambda self: self.num_envs * self.warmup_steps)
    num_updates = property(lambda self: (self.total_timesteps - self.warmup_timesteps) // self.steps_per_update)

    def __post_init__(self):
        """Raises ValueError, naming the flag, for a value that cannot work; traced values are not looked at."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            low = 1 if field.type is int and name not in ("seed", "eval_interval") else 0
            low = {"num_atoms": 2, "value_bound": 1e-3}.get(name, low)
            is_fraction = name in ("resets_per_step", "learning_rate", "gamma", "tau")
            high = 1 if is_fraction else 2**31 - 1
            if field.type in (int, float) and isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it takes a number from {low} to {high}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes is {self.hidden_sizes}; it takes one or more numbers from 1")
        if self.num_steps % self.sync_every:
            raise ValueError(f"--sync-every is {self.sync_every}; it takes a divisor of --num-steps, {self.num_steps}")
        least = self.n_steps - 1 + self.sync_every
        if self.warmup_steps < least:
            what = f"--n-steps - 1 + --sync-every, which is {least}"
            raise ValueError(f"--warmup-steps is {self.warmup_steps}; it takes at least {what}")
        if self.buffer_size < self.warmup_timesteps:
            what = f"--num-envs * --warmup-steps, which is {self.warmup_timesteps}"
            raise ValueError(f"--buffer-size is {self.buffer_size}; it takes at least {what}")
        if self.num_updates < 1:
            least = self.warmup_timesteps + self.steps_per_update
            what = f"--num-envs * (--warmup-steps + --num-steps), which is {least}"
            raise ValueError(f"--total-timesteps is {self.total_timesteps}; it takes at least {what}")


class MLP(nn.Module):
    """Dense, ELU layers: inputs [..., num_inputs] to [..., num_outputs], kernels initialised as PyTorch does."""

    num_outputs: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        for size in self.hidden_sizes:
            x = nn.elu(nn.Dense(size, kernel_init=init)(x))
        return nn.Dense(self.num_outputs, kernel_init=init)(x)


class Policy(nn.Module):
    """Normalised observations [..., obs_size] to actions [..., action_size] in [-1, 1]."""

    action_size: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        return jnp.tanh(MLP(self.action_size, self.hidden_sizes)(obs))


class DoubleCritic(nn.Module):
    """Two critics of normalised observations and actions: [2, ..., num_outputs], values or logits of their atoms."""

    num_outputs: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([obs, action], axis=-1)
        return jnp.stack([MLP(self.num_outputs, self.hidden_sizes)(x) for _ in range(2)])


class Step(NamedTuple):
    """One step of all environments."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array  # where the step led, before any reset
    terminated: jax.Array
    truncated: jax.Array


class Transition(NamedTuple):
    """n steps of all environments as one; the replay stacks buffer_size // num_envs of them in front."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array  # discounted sum to the n-th step or the end of the episode
    discount: jax.Array  # of the value of next_obs
    next_obs: jax.Array  # where the last of the steps led


class Statistics(NamedTuple):
    """Running mean and variance of observations."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class Actor(NamedTuple):
    """Of the three, the one that steps the environments."""

    policy: Any  # the P-learner's when they last exchanged
    statistics: Statistics
    physics: Any
    obs: jax.Array  # [num_envs, obs_size]
    length: jax.Array  # [num_envs], of the episode so far
    episodic_return: jax.Array  # [num_envs], of the episode so far
    window: Step  # [n_steps - 1, num_envs, ...], steps whose n steps are not over yet


class VLearner(NamedTuple):
    """Of the three, the one that learns values."""

    critic: Any
    target_critic: Any
    opt_state: Any
    policy: Any  # the P-learner's when they last exchanged
    statistics: Statistics  # the actor's when they last exchanged


class PLearner(NamedTuple):
    """Of the three, the one that learns the policy."""

    policy: Any
    opt_state: Any
    critic: Any  # the V-learner's when they last exchanged
    statistics: Statistics  # the actor's when they last exchanged


class TrainState(NamedTuple):
    """All that training needs to go on; saved, it is a checkpoint."""

    v_learner: VLearner
    p_learner: PLearner
    actor: Actor
    replay: Transition  # [buffer_size // num_envs, num_envs, ...]
    fresh: Transition  # [sync_every, num_envs, ...], on their way to the replay
    key: jax.Array  # the seed's, for the whole run: each update folds in its number
    update: jax.Array  # updates done

    @property
    def params(self):
        """What a trained agent needs."""
        policy, critic = self.p_learner.policy, self.v_learner.critic
        return {"policy": policy, "critic": critic, "statistics": self.actor.statistics}


def mixed_exploration_stddevs(num_envs: int, stddev_min: jax.Array, stddev_max: jax.Array) -> jax.Array:
    """Standard deviations [num_envs] of the noise, evenly spaced from the least to the greatest (PQL, section 3.3)."""
    return stddev_min + jnp.arange(num_envs) / max(num_envs - 1, 1) * (stddev_max - stddev_min)


def n_step_transitions(rewards, next_obs, terminated, truncated, gamma, n):
    """Rewards, discounts [T, num_envs] and next observations of the windows of n steps that begin at the first T steps.

        reward[t] = sum_{i <= k} gamma^i r[t + i],  discount[t] = gamma^(k + 1) * (1 - terminated[t + k])

    with k the first end of an episode, of either kind, in steps t to t + n - 1, or n - 1 if there is none; the next
    observation is that of step t + k, before any reset. Arrays are [T + n - 1, num_envs, ...].
    """
    num_windows = len(rewards) - n + 1
    total, discount, goes_on, last_obs = 0.0, 1.0, True, next_obs[:num_windows]
    for i in range(n):
        reward, obs, end, cut = (x[i : i + num_windows] for x in (rewards, next_obs, terminated, truncated))
        total += jnp.where(goes_on, discount * reward, 0)
        discount *= jnp.where(goes_on, gamma * ~end, 1)
        last_obs = jnp.where(jnp.expand_dims(goes_on, -1), obs, last_obs)
        goes_on &= ~(end | cut)
    return total, discount, last_obs


def double_q_targets(rewards, next_values, discounts) -> jax.Array:
    """Double Q targets r + discount * min_j next_values[j], [batch], of next_values [2, batch] (PQL, equation 1)."""
    return rewards + discounts * next_values.min(axis=0)


def project_distribution(probs, rewards, discounts, support) -> jax.Array:
    """The distributions probs [..., batch, atoms] of r + discount * z, z on the evenly spaced support, back on it.

    The mass of what lies between two atoms goes to both, the nearer the more; of what lies outside, to the last one
    (Bellemare et al., 2017, arXiv 1707.06887, equation 7).
    """
    values = jnp.clip(rewards[:, None] + discounts[:, None] * support, support[0], support[-1])
    distance = jnp.abs(values[:, :, None] - support) / (support[1] - support[0])
    return jnp.einsum("...bi,bij->...bj", probs, jnp.clip(1 - distance, 0, 1))


def combine_distributions(probs, support, combine) -> jax.Array:
    """One target [batch, atoms] of the two in probs [2, batch, atoms].

    "elementwise_min" takes the least probability of each atom (as the authors of PQL, the sum may be below 1),
    "lower_mean" the distribution of lower mean (as FastTD3, arXiv 2505.22642).
    """
    if combine == "elementwise_min":
        return probs.min(axis=0)
    means = probs @ support
    return jnp.where((means[0] <= means[1])[:, None], probs[0], probs[1])


def update_statistics(statistics: Statistics, obs: jax.Array) -> Statistics:
    """The statistics with observations [batch, obs_size] added (Chan et al., 1979)."""
    count = statistics.count + len(obs)
    difference, weight = obs.mean(axis=0) - statistics.mean, len(obs) / count
    var = (1 - weight) * statistics.var + weight * obs.var(axis=0) + weight * (1 - weight) * difference**2
    return Statistics(statistics.mean + weight * difference, var, count)


def normalize(obs: jax.Array, statistics: Statistics, clip: jax.Array = jnp.inf) -> jax.Array:
    """Observations [..., obs_size] at mean 0 and variance 1, within clip."""
    return jnp.clip((obs - statistics.mean) / jnp.sqrt(statistics.var + 1e-4), -clip, clip)


def exchange(actor: Actor, v_learner: VLearner, p_learner: PLearner) -> tuple[Actor, VLearner, PLearner]:
    """Each of the three with copies of what it uses of the other two."""
    return (
        actor._replace(policy=p_learner.policy),
        v_learner._replace(policy=p_learner.policy, statistics=actor.statistics),
        p_learner._replace(critic=v_learner.critic, statistics=actor.statistics),
    )


def replay_insert(replay: Transition, row: jax.Array, transition: Transition) -> Transition:
    """The replay [rows, num_envs, ...] with a transition [num_envs, ...] in the given row, counted around the end."""
    return jax.tree.map(lambda buffer, x: buffer.at[row % len(buffer)].set(x), replay, transition)


def replay_sample(replay: Transition, bits: jax.Array, num_rows: jax.Array) -> Transition:
    """A uniform batch, with replacement, of what the first num_rows rows hold; bits [batch_size] are random uint32."""
    num_envs = jax.tree.leaves(replay)[0].shape[1]
    index = bits % (num_rows * num_envs).astype(jnp.uint32)
    return jax.tree.map(lambda buffer: buffer[index // num_envs, index % num_envs], replay)


class Env(NamedTuple):
    """A task, of one environment, with actions in [-1, 1], without time limit or reset of its own."""

    reset: Callable  # key -> physics, obs
    step: Callable  # key, physics, action -> physics, obs, reward, terminated
    obs_size: int
    action_size: int
    max_steps: int


def make_physics(env_id: str, backend: str, others: tuple[str, ...]):
    """The task of brax or dm_control of that name, which have the same methods, and its time limit."""
    brax_ids = (
        "ant halfcheetah hopper humanoid humanoidstandup inverted_double_pendulum inverted_pendulum pusher reacher"
    )
    brax_ids = (*brax_ids.split(), "swimmer", "walker2d")
    # Imported only when asked for, both take seconds; they print that they lack an optional package.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if env_id in brax_ids:
            from brax import envs

            try:
                return envs.get_environment(env_id, backend=backend), 1000
            except (ValueError, AssertionError) as error:
                raise ValueError(f"--backend is {backend}; --env-id {env_id} takes another: {error}") from error
        with contextlib.suppress(ImportError):
            from mujoco_playground import dm_control_suite

            if env_id in dm_control_suite.ALL_ENVS:
                max_steps = dm_control_suite.get_default_config(env_id).episode_length
                return dm_control_suite.load(env_id, config_overrides={"impl": "jax"}), max_steps
            others = (*dm_control_suite.ALL_ENVS, *others)
    raise ValueError(f"--env-id is {env_id}; it takes one of {', '.join((*brax_ids, *others))}")


def make_env(env_id: str, backend: str) -> Env:
    """The task of gymnax, brax or dm_control of that name.

    Raises ValueError for an unknown id, for spaces other than Box, and for physics that the task does not have.
    """
    import gymnax  # not at the top: it takes seconds, and starts JAX before main has chosen the devices

    if env_id in gymnax.registered_envs:
        env, params = gymnax.make(env_id)
        space = env.action_space(params)
        spaces = [type(space).__name__ for space in (env.observation_space(params), space)]
        if spaces != ["Box", "Box"]:
            raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; it takes one with ['Box', 'Box']")

        def reset(key):
            obs, physics = env.reset_env(key, params)
            return physics, obs.ravel()

        def step(key, physics, action):
            action = space.low + (action + 1) / 2 * (space.high - space.low)
            obs, physics, reward, terminated, _ = env.step_env(key, physics, action.reshape(space.shape), params)
            return physics, obs.ravel(), reward, terminated

        obs_size = math.prod(env.observation_space(params).shape)
        return Env(reset, step, obs_size, math.prod(space.shape), params.max_steps_in_episode)

    env, max_steps = make_physics(env_id, backend, tuple(gymnax.registered_envs))

    def reset(key):
        state = env.reset(key)
        return state, state.obs

    def step(key, state, action):
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0

    return Env(reset, step, env.observation_size, env.action_size, max_steps)


def make_train(config: Config):
    """PQL as a pure function train(key=None, state=None, num_updates=config.num_updates) -> (TrainState, metrics).

    It starts from a key, by train.init(key), or goes on from a state. metrics is a flat dict of arrays [num_updates]:
    returns are NaN in an update in which no episode ended, eval/* in one without an evaluation. jit it, vmap it over
    keys, or over floats of config.
    To vmap over states, take the update number out of the batch, or every update pays for an evaluation:
    train(state=state._replace(update=states.update[0])).
    Raises ValueError as make_env does.
    """
    env = make_env(config.env_id, config.backend)
    env_reset = jax.vmap(env.reset)
    num_resets = max(1, math.ceil(config.resets_per_step * config.num_envs))
    distributional = config.algorithm == "pql_d"
    support = jnp.linspace(-config.value_bound, config.value_bound, config.num_atoms)
    policy = Policy(env.action_size, config.hidden_sizes)
    critic = DoubleCritic(config.num_atoms if distributional else 1, config.hidden_sizes)
    num_rows = config.buffer_size // config.num_envs
    num_cycles = config.num_steps // config.sync_every
    critic_steps, policy_steps = (config.sync_every * n for n in (config.critic_updates, config.policy_updates))
    # In the replay before the first cycle: the last n_steps - 1 steps of the warm-up are not over, and sync_every
    # transitions wait, as after every cycle. By default 32 - 2 - 1 = 29 rows.
    rows_before = config.warmup_steps - config.n_steps + 1 - config.sync_every

    def make_optimizer(gradient_steps):
        def learning_rate(gradient_step):
            progress = gradient_step / (config.num_updates * gradient_steps)
            return config.learning_rate * (1 - progress if config.anneal_lr else 1)

        adamw = optax.adamw(learning_rate, weight_decay=config.weight_decay)
        return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw), learning_rate

    critic_optimizer, critic_learning_rate = make_optimizer(config.num_steps * config.critic_updates)
    policy_optimizer, _ = make_optimizer(config.num_steps * config.policy_updates)

    def init(key):
        """The state after warm-up, whose last transitions are on their way to the replay."""
        key, policy_key, critic_key, reset_key, warmup_key = jax.random.split(key, 5)
        physics, obs = env_reset(jax.random.split(reset_key, config.num_envs))
        zeros, action = jnp.zeros(config.num_envs), jnp.zeros((config.num_envs, env.action_size))
        statistics = Statistics(jnp.zeros(env.obs_size), jnp.ones(env.obs_size), jnp.float32(0))
        policy_params, critic_params = policy.init(policy_key, obs), critic.init(critic_key, obs, action)
        step = Step(obs, action, zeros, obs, zeros > 0, zeros > 0)
        window = jax.tree.map(lambda x: jnp.zeros((config.n_steps - 1, *x.shape), x.dtype), step)
        actor = Actor(policy_params, statistics, physics, obs, zeros.astype(jnp.int32), zeros, window)
        actor, transitions, _ = act(actor, warmup_key, config.warmup_steps, warmup=True)
        transitions = jax.tree.map(lambda x: x[config.n_steps - 1 :], transitions)  # of no steps before the first

        replay = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), transitions)
        replay = jax.tree.map(lambda buffer, x: buffer.at[:rows_before].set(x[:rows_before]), replay, transitions)
        fresh = jax.tree.map(lambda x: x[rows_before:], transitions)
        opt_states = critic_optimizer.init(critic_params), policy_optimizer.init(policy_params)
        v_learner = VLearner(critic_params, critic_params, opt_states[0], policy_params, actor.statistics)
        p_learner = PLearner(policy_params, opt_states[1], critic_params, actor.statistics)
        # Copies, so that a donated state holds no buffer twice.
        learners = jax.tree.map(jnp.copy, (v_learner, p_learner))
        return TrainState(*learners, actor, replay, fresh, key, jnp.int32(0))

    def env_step(keys, physics, obs, action):
        """A step, without reset; where physics fails, the observation stays, at reward 0: a cut to the learners."""
        physics, next_obs, reward, terminated = jax.vmap(env.step)(keys, physics, action)
        failed = ~((jnp.abs(next_obs) < 1e6).all(axis=-1) & (jnp.abs(reward) < 1e6))  # NaN, or on the way there
        next_obs = jnp.where(failed[:, None], obs, next_obs)
        return physics, next_obs, jnp.where(failed, 0, reward), terminated & ~failed, failed

    def act(actor, key, num_steps, warmup=False):
        """Steps of all environments, with the actor's copy of the policy: n-step transitions and sums over episodes."""

        def step(actor, inputs):
            noise, step_keys, reset_keys = inputs
            statistics = update_statistics(actor.statistics, actor.obs)
            mean = 0 if warmup else policy.apply(actor.policy, normalize(actor.obs, statistics))
            action = jnp.clip(mean + noise, -1, 1)
            physics, next_obs, reward, terminated, failed = env_step(step_keys, actor.physics, actor.obs, action)
            length, episodic_return = actor.length + 1, actor.episodic_return + reward
            truncated = (length >= env.max_steps) | failed
            ended = terminated | truncated
            row = Step(actor.obs, action, reward, next_obs, terminated, truncated)
            sums = {"ended": ended, "length": ended * length, "return": ended * episodic_return, "failed": failed}

            # The first environment to end takes the first new state, and so on, around where these are too few.
            slot = (jnp.cumsum(ended) - 1) % num_resets

            def restart(old, new):
                return jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new[slot], old)

            physics, obs = jax.tree.map(restart, (physics, next_obs), env_reset(reset_keys))
            episode = jnp.where(ended, 0, length), jnp.where(ended, 0, episodic_return)
            actor = Actor(actor.policy, statistics, physics, obs, *episode, actor.window)
            return actor, (row, jax.tree.map(jnp.sum, sums))

        noise_key, step_key, reset_key = jax.random.split(key, 3)
        shape = num_steps, config.num_envs, env.action_size
        if warmup:
            noise = jax.random.uniform(noise_key, shape, minval=-1)
        else:
            stddevs = mixed_exploration_stddevs(config.num_envs, config.stddev_min, config.stddev_max)
            noise = stddevs[:, None] * jax.random.normal(noise_key, shape)
        step_keys = jax.random.split(step_key, (num_steps, config.num_envs))
        reset_keys = jax.random.split(reset_key, (num_steps, num_resets))
        actor, (rows, sums) = jax.lax.scan(step, actor, (noise, step_keys, reset_keys))

        steps = jax.tree.map(lambda *x: jnp.concatenate(x), actor.window, rows)
        terminated = steps.terminated | (False if config.bootstrap_on_truncation else steps.truncated)
        outcomes = config.reward_scale * steps.reward, steps.next_obs, terminated, steps.truncated
        reward, discount, next_obs = n_step_transitions(*outcomes, config.gamma, config.n_steps)
        transitions = Transition(steps.obs[:num_steps], steps.action[:num_steps], reward, discount, next_obs)
        return actor._replace(window=jax.tree.map(lambda x: x[num_steps:], steps)), transitions, sums

    def critic_loss(params, v_learner, batch, noise):
        obs, next_obs = (normalize(x, v_learner.statistics, config.obs_clip) for x in (batch.obs, batch.next_obs))
        noise = jnp.clip(config.target_noise * noise, -config.target_noise_clip, config.target_noise_clip)
        next_action = jnp.clip(policy.apply(v_learner.policy, next_obs) + noise, -1, 1)
        next_outputs = critic.apply(v_learner.target_critic, next_obs, next_action)
        outputs = critic.apply(params, obs, batch.action)
        if not distributional:
            target = double_q_targets(batch.reward, next_outputs[..., 0], batch.discount)
            return jnp.square(outputs[..., 0] - target).mean(axis=-1).sum(), outputs.mean()
        probs = project_distribution(jax.nn.softmax(next_outputs), batch.reward, batch.discount, support)
        target = combine_distributions(probs, support, config.combine)
        log_probs = jax.nn.log_softmax(outputs)
        if config.combine == "lower_mean":
            loss = -(target * log_probs).sum(axis=-1)
        else:  # the target need not be a distribution: each atom is a binary choice
            log_others = jnp.log(jnp.maximum(-jnp.expm1(log_probs), 1e-7))
            loss = -(target * log_probs + (1 - target) * log_others).mean(axis=-1)
        return loss.mean(axis=-1).sum(), expected_values(outputs).mean()

    def expected_values(outputs):
        return jax.nn.softmax(outputs) @ support if distributional else outputs[..., 0]

    def policy_loss(params, p_learner, obs):
        obs = normalize(obs, p_learner.statistics, config.obs_clip)
        return -expected_values(critic.apply(p_learner.critic, obs, policy.apply(params, obs))).min(axis=0).mean()

    def learn_values(v_learner, replay, filled, key, gradient_steps):
        """Critic updates with the V-learner's copy of the policy, on the first filled rows of the replay."""

        def gradient_step(v_learner, inputs):
            bits, noise = inputs
            batch = replay_sample(replay, bits, filled)
            grad = jax.value_and_grad(critic_loss, has_aux=True)
            (td_loss, q), grads = grad(v_learner.critic, v_learner, batch, noise)
            updates, opt_state = critic_optimizer.update(grads, v_learner.opt_state, v_learner.critic)
            params = optax.apply_updates(v_learner.critic, updates)
            target = optax.incremental_update(params, v_learner.target_critic, config.tau)
            losses = {"td_loss": td_loss, "q_values": q, "grad_norm": optax.tree.norm(grads)}
            return v_learner._replace(critic=params, target_critic=target, opt_state=opt_state), losses

        bits_key, noise_key = jax.random.split(key)
        bits = jax.random.bits(bits_key, (gradient_steps, config.batch_size))
        noise = jax.random.normal(noise_key, (gradient_steps, config.batch_size, env.action_size))
        v_learner, losses = jax.lax.scan(gradient_step, v_learner, (bits, noise))
        return v_learner, jax.tree.map(jnp.mean, losses)

    def learn_policy(p_learner, obs, filled, key, gradient_steps):
        """Policy updates with the P-learner's copy of the critic, on the first filled rows of the replay's states."""

        def gradient_step(p_learner, bits):
            loss, grads = jax.value_and_grad(policy_loss)(p_learner.policy, p_learner, replay_sample(obs, bits, filled))
            updates, opt_state = policy_optimizer.update(grads, p_learner.opt_state, p_learner.policy)
            losses = {"policy_loss": loss, "policy_grad_norm": optax.tree.norm(grads)}
            params = optax.apply_updates(p_learner.policy, updates)
            return p_learner._replace(policy=params, opt_state=opt_state), losses

        bits = jax.random.bits(key, (gradient_steps, config.batch_size))
        p_learner, losses = jax.lax.scan(gradient_step, p_learner, bits)
        return p_learner, jax.tree.map(jnp.mean, losses)

    def parallel_cycle(state, filled, keys):
        """Actor, V-learner and P-learner, none of which reads what another writes, then their exchange."""
        actor, fresh, sums = act(state.actor, keys[0], config.sync_every)
        v_learner, v_losses = learn_values(state.v_learner, state.replay, filled, keys[1], critic_steps)
        p_learner, p_losses = learn_policy(state.p_learner, state.replay.obs, filled, keys[2], policy_steps)
        actor, v_learner, p_learner = exchange(actor, v_learner, p_learner)
        state = state._replace(v_learner=v_learner, p_learner=p_learner, actor=actor, fresh=fresh)
        return state, (v_losses | p_losses, sums)

    def sequential_cycle(state, filled, keys):
        """Rounds of critic and policy updates, then steps of the environments, each with the newest of all.

        As many updates as parallel_cycle does; the paper's DDPG(n) does as many of the policy as of the critic.
        """
        rounds = math.gcd(critic_steps, policy_steps)

        def learn(learners, keys):
            _, v_learner, p_learner = exchange(state.actor, *learners)
            v_learner, v_losses = learn_values(v_learner, state.replay, filled, keys[0], critic_steps // rounds)
            p_learner = p_learner._replace(critic=v_learner.critic)
            p_learner, p_losses = learn_policy(p_learner, state.replay.obs, filled, keys[1], policy_steps // rounds)
            return (v_learner, p_learner), v_losses | p_losses

        learners, losses = jax.lax.scan(
            learn, (state.v_learner, state.p_learner), jax.random.split(keys[1], (rounds, 2))
        )
        actor, _, _ = exchange(state.actor, *learners)
        actor, fresh, sums = act(actor, keys[0], config.sync_every)
        state = state._replace(v_learner=learners[0], p_learner=learners[1], actor=actor, fresh=fresh)
        return state, (jax.tree.map(jnp.mean, losses), sums)

    def evaluate(policy_params, statistics, key):
        """Mean return of eval_episodes greedy episodes, each from a reset to its end."""

        def unfinished(carry):
            return (carry[0] < env.max_steps) & ~carry[-1].all()

        def step(carry):
            t, physics, obs, returns, finished = carry
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            action = policy.apply(policy_params, normalize(obs, statistics))
            physics, obs, reward, terminated, failed = env_step(keys, physics, obs, action)
            return t + 1, physics, obs, returns + jnp.where(finished, 0, reward), finished | terminated | failed

        reset_key, step_key = jax.random.split(key)
        physics, obs = env_reset(jax.random.split(reset_key, config.eval_episodes))
        zeros = jnp.zeros(config.eval_episodes)
        return jax.lax.while_loop(unfinished, step, (0, physics, obs, zeros, zeros > 0))[3].mean()

    def plan(key, number):
        """Of the cycles of an update: the rows that they begin to write at, their keys; the key of the evaluation."""
        first_rows = rows_before + number * config.num_steps + config.sync_every * jnp.arange(num_cycles)
        cycle_key, eval_key = jax.random.split(jax.random.fold_in(key, number))
        return first_rows, jax.random.split(cycle_key, (num_cycles, 3)), eval_key

    def insert(replay, fresh, first_row):
        """The replay with the fresh rows from first_row on, and how many of its rows are filled."""
        rows = first_row + jnp.arange(config.sync_every)
        return replay_insert(replay, rows, fresh), jnp.minimum(rows[-1] + 1, num_rows)

    def summarize(number, losses, sums):
        """The metrics of an update from those of its cycles."""
        sums = jax.tree.map(jnp.sum, sums)
        return {f"losses/{name}": values.mean() for name, values in losses.items()} | {
            "global_step": config.warmup_timesteps + (number + 1) * config.steps_per_update,
            "charts/episodic_return": sums["return"] / sums["ended"],
            "charts/episodic_length": sums["length"] / sums["ended"],
            "charts/physics_failures": sums["failed"],
            "charts/learning_rate": critic_learning_rate(number * config.num_steps * config.critic_updates),
        }

    def is_due(number):
        return ((number + 1) % max(config.eval_interval, 1) == 0) | (number + 1 == config.num_updates)

    def update(state, number):
        """num_steps steps of all environments, with all their gradient steps."""

        def cycle(state, inputs):
            first_row, keys = inputs
            # Written before it is read: the other way round the compiled program would copy the whole replay.
            replay, filled = insert(state.replay, state.fresh, first_row)
            one_cycle = sequential_cycle if config.algorithm == "ddpg_n" else parallel_cycle
            return one_cycle(state._replace(replay=replay), filled, keys)

        *inputs, eval_key = plan(state.key, number)
        state, (losses, sums) = jax.lax.scan(cycle, state, inputs)
        metrics = summarize(number, losses, sums)
        if config.eval_interval:
            inputs = state.p_learner.policy, state.actor.statistics, eval_key
            metrics["eval/episodic_return"] = jax.lax.cond(is_due(number), evaluate, lambda *_: jnp.nan, *inputs)
        return state._replace(update=number + 1), metrics

    def train(key=None, state=None, num_updates=config.num_updates):
        state = init(key) if state is None else state
        return jax.lax.scan(update, state, state.update + jnp.arange(num_updates))

    def train_on_devices(state, num_updates, devices):
        """train of a state, bit for bit, as three programs for the three devices; a function of the host, not for jit.

        Actor, V-learner and P-learner each stay on their device, and what they exchange is put there after each cycle;
        nothing waits for the host. The replay is on the V-learner's device, its states on the P-learner's as well.
        Raises ValueError for ddpg_n, in which each waits for the other.
        """
        if config.algorithm == "ddpg_n":
            raise ValueError("ddpg_n does one thing after the other: it has no use for several devices")

        def learn_v(replay, fresh, first_row, key, v_learner):
            replay, filled = insert(replay, fresh, first_row)
            return replay, *learn_values(v_learner, replay, filled, key, critic_steps)

        def learn_p(states, fresh, first_row, key, p_learner):
            states, filled = insert(states, fresh, first_row)
            return states, *learn_policy(p_learner, states, filled, key, policy_steps)

        act_program = jax.jit(lambda actor, key: act(actor, key, config.sync_every))
        v_program, p_program = jax.jit(learn_v, donate_argnums=0), jax.jit(learn_p, donate_argnums=0)
        plan_program, summarize_program, evaluate_program = map(jax.jit, (plan, summarize, evaluate))
        devices, key, done, all_metrics = tuple(devices), state.key, int(state.update), []
        buffers = jax.tree.map(jnp.copy, (state.replay, state.replay.obs))  # which the programs write in place
        replay, states = jax.device_put(buffers, devices[1:])
        three, fresh = jax.device_put(
            ((state.actor, state.v_learner, state.p_learner), state.fresh), (devices, devices[0])
        )
        for number in range(done, done + num_updates):
            (first_rows, keys, eval_key), cycles = plan_program(key, number), []
            for i in range(num_cycles):
                inputs = keys[i, 0], (fresh, first_rows[i], keys[i, 1]), (fresh.obs, first_rows[i], keys[i, 2])
                act_key, v_inputs, p_inputs = jax.device_put(inputs, devices)
                actor, v_learner, p_learner = three
                replay, v_learner, v_losses = v_program(replay, *v_inputs, v_learner)
                states, p_learner, p_losses = p_program(states, *p_inputs, p_learner)
                actor, fresh, sums = act_program(actor, act_key)
                three = jax.device_put(exchange(actor, v_learner, p_learner), devices)
                cycles.append((v_losses | p_losses, sums))
            losses, sums = jax.tree.map(lambda *x: jnp.stack(x), *jax.device_put(cycles, devices[0]))
            metrics = summarize_program(number, losses, sums)
            if config.eval_interval:
                inputs = jax.device_put((three[2].policy, three[0].statistics, eval_key), devices[0])
                metrics["eval/episodic_return"] = evaluate_program(*inputs) if is_due(number) else jnp.float32(jnp.nan)
            all_metrics.append(metrics)
        actor, v_learner, p_learner = three
        state = TrainState(v_learner, p_learner, actor, replay, fresh, key, jnp.int32(done + num_updates))
        return jax.device_put((state, jax.tree.map(lambda *x: jnp.stack(x), *all_metrics)), devices[0])

    train.on_devices = train_on_devices
    train.init = init
    return train


def fail(message: str) -> NoReturn:
    print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def parse_args(args: list[str]) -> Config:
    """tyro.cli, which here also takes 1e6 for an integer and --flag=False, and fails in one line."""
    args = [re.sub(r"^(--[\w-]+=|)(\d+(\.\d+)?e\d+)$", lambda m: f"{m[1]}{float(m[2]):.15g}", arg) for arg in args]
    args = [re.sub(r"^--([\w-]+)=(?i:(true)|false)$", lambda m: f"--{'' if m[2] else 'no-'}{m[1]}", a) for a in args]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Config, args=args, description=__doc__)
    except SystemExit as stop:
        if stop.code:
            text = re.sub("[─│╭╮╰╯]", " ", errors.getvalue()).split("\n", 1)[1]  # a box with a title
            fail(text.split("For full helptext")[0].replace("Error parsing Config: ", ""))
        raise


def replace(path: Path, data: bytes) -> None:
    """Write to another name and rename: a kill at any moment leaves either file whole."""
    path.with_suffix(".tmp").write_bytes(data)
    path.with_suffix(".tmp").replace(path)


def start_wandb(config: Config, run_dir: Path) -> list:
    """A Weights & Biases run for each of up to 16 seeds, then, if there are several, one for their mean."""
    import wandb  # not at the top: it takes seconds

    names = [f"seed-{config.seed + i}" for i in range(config.num_seeds) if config.num_seeds <= 16]
    names += ["mean"] * (config.num_seeds > 1)
    shared = {"config": dataclasses.asdict(config), "project": config.wandb_project, "group": run_dir.name}
    shared |= {"mode": config.wandb_mode, "dir": run_dir, "resume": "allow", "reinit": "create_new"}
    runs = [wandb.init(name=name, id=f"{run_dir.name}-{name}", **shared) for name in names]
    for run in runs:
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
    return runs


def plot_returns(path: Path, table: np.ma.MaskedArray, names: list[str], title: str) -> str:
    """Plot the returns in table [num_updates, num_seeds, names]; tell the last ones, mean ± standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps of a seed", ylabel="episodic return", title=title)
    summary = []
    for name in [name for name in names if name.endswith("episodic_return")]:
        known = table[~np.ma.getmaskarray(table[..., names.index(name)]).all(axis=1)]
        if len(known):
            steps, returns = known[:, 0, names.index("global_step")], known[..., names.index(name)]
            mean, std = returns.mean(axis=1), returns.std(axis=1)
            axes.plot(steps, mean, label=name)
            axes.fill_between(steps, mean - std, mean + std, alpha=0.2)
            summary.append(f"{name} {mean[-1]:.1f} ± {std[-1]:.1f}")
    if summary:
        axes.legend()
    figure.savefig(path, dpi=150)
    return f"{', '.join(summary)} (mean ± standard deviation over seeds)" if summary else "no episode has ended"


def check_memory(config: Config, replay: Transition) -> None:
    """Raises ValueError if the replays of all seeds take more than there is."""
    needed = config.num_seeds * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(replay)) / 2**30
    num_devices = max(n for n in range(1, jax.device_count() + 1) if config.num_seeds % n == 0)
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        memory = stats["bytes_limit"] * num_devices / 2**30
    else:  # a CPU, where up to four copies stand beside each other while a checkpoint is written
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 / 5
    if needed > memory:
        room = (
            f"it takes what fits in {memory:.1f} GiB, and --num-seeds {config.num_seeds} of them are {needed:.1f} GiB"
        )
        raise ValueError(f"--buffer-size is {config.buffer_size}; {room}")


def main(config: Config) -> Path:
    """Train num_seeds seeds over all devices, a chunk of updates at a time; returns the folder of the run."""
    run_dir = Path(config.runs_dir, f"{Path(__file__).stem}__{config.env_id}__{config.seed}__{time.time_ns() // 10**6}")
    try:
        if config.resume is not None:
            if config != Config(resume=config.resume):
                raise ValueError("takes no other flags, the run keeps its own")
            run_dir = Path(config.resume).resolve()
            config = Config(**json.loads((run_dir / "config.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        fail(f"--resume is {config.resume}; it takes the folder of a run: {error}")
    # On a CPU: seeds side by side, on the least number of devices that keeps all cores busy, or else the greatest; one
    # thread (NPROC) each where a batch is small.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    divisors = [n for n in range(1, 4 * cores) if config.num_seeds % n == 0]
    num_devices = max(divisors, key=lambda n: (min(n, cores), -n))
    os.environ.setdefault("NPROC", str(max(1, cores // num_devices) if config.batch_size >= 4096 else 1))
    with contextlib.suppress(RuntimeError):  # JAX has started: take the devices that it has
        jax.config.update("jax_num_cpu_devices", num_devices)
    try:
        train = make_train(config)
        check_memory(config, jax.eval_shape(train.init, jax.random.key(0)).replay)
    except ValueError as error:
        fail(str(error))

    num_devices = max(n for n in range(1, jax.device_count() + 1) if config.num_seeds % n == 0)
    mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ("seeds",))
    update_steps = config.steps_per_update * config.num_seeds

    def over_seeds(function, inputs):  # on a CPU one by one: a batch of small matrices is slower there
        return jax.lax.map(function, inputs) if jax.default_backend() == "cpu" else jax.vmap(function)(inputs)

    def proceed(states):  # all seeds have the same update number: outside vmap it leaves evaluation a branch
        update = states.update[0]
        return over_seeds(lambda state: train(state=state._replace(update=update), num_updates=chunk_size), states)

    def on_devices(function, **options):
        seeds = PartitionSpec("seeds")
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=seeds, out_specs=seeds, check_vma=False), **options)

    def is_key(x):  # dm_control keeps keys in its states
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    def wrap(data):
        return jax.random.wrap_key_data(jnp.asarray(data))

    def put(new, old):
        """The new array where the old one was, which goes first: two replays may not fit."""
        new, sharding = new.reshape(old.shape), old.sharding  # reshape raises if the checkpoint is of other sizes
        old.delete()
        return jax.device_put(new, sharding)

    started = time.time()
    keys = jax.vmap(jax.random.key)(config.seed + np.arange(config.num_seeds))
    states = on_devices(lambda keys: over_seeds(train.init, keys))(keys)
    checkpoint, csv = run_dir / "checkpoint.msgpack", run_dir / "metrics.csv"
    if checkpoint.exists():
        try:
            leaves = serialization.from_bytes(jax.tree.leaves(states), checkpoint.read_bytes())
            saved = jax.tree.unflatten(jax.tree.structure(states), leaves)
            saved = jax.tree.map(lambda x, old: wrap(x) if is_key(old) else x, saved, states)
            states = jax.tree.map(put, saved, states)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"--resume is {run_dir}, whose checkpoint.msgpack cannot be read: {error}")
    first = done = int(states.update[0])
    most = max(1, 2**16 // update_steps)  # about 65,536 steps between two looks at the host
    # All chunks are of one size, so that one program runs them all.
    chunk_size = max(n for n in range(1, most + 1) if config.num_updates % n == first % n == 0)
    # Shapes, not arrays: a resumed run then lowers to the program of the first, which a compilation cache has.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    lowered = on_devices(proceed, donate_argnums=0).lower(shapes)
    names = sorted(lowered.out_info[1])
    head = ",".join(["seed", *names])
    rows = csv.read_text().splitlines() if csv.exists() else [head]
    if rows[0] != head or len(rows) <= first * config.num_seeds:
        fail(f"--resume is {run_dir}, whose metrics.csv lacks rows or has other columns than {head}")
    run_chunk = lowered.compile()
    compile_seconds = time.time() - started

    run_dir.mkdir(parents=True, exist_ok=True)
    replace(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2).encode())
    replace(csv, "\n".join([*rows[: 1 + first * config.num_seeds], ""]).encode())
    runs = start_wandb(config, run_dir) if config.wandb_mode != "disabled" else []
    bar = tqdm(total=config.num_updates * update_steps, initial=first * update_steps, unit=" steps", unit_scale=True)
    nan_seeds, stops, pending = set(), [], []

    def record(number, metrics):
        """Put the metrics [num_seeds, chunk_size] of the updates after number into file, bar and Weights & Biases."""
        metrics = jax.device_get(metrics)
        table = np.stack([metrics[name] for name in names], axis=-1).swapaxes(0, 1)
        seeds = np.broadcast_to(config.seed + np.arange(config.num_seeds)[:, None], (*table.shape[:2], 1))
        with csv.open("a") as file:
            np.savetxt(file, np.concatenate([*np.concatenate([seeds, table], axis=-1)]), fmt="%.10g", delimiter=",")
        nans = np.isnan(metrics["losses/grad_norm"])
        for seed in set(np.flatnonzero(nans.any(axis=1))) - nan_seeds:
            nan_seeds.add(seed)
            first_nan = number + nans[seed].argmax() + 1
            text = f"seed {config.seed + seed}: NaN in the loss or its gradient from update {first_nan} on"
            bar.write(text, file=sys.stderr)
        for rows in np.ma.masked_invalid(table) if runs else []:
            means = dict(zip([*names, *map("{}_std".format, names)], [*rows.mean(0), *rows.std(0)], strict=True))
            logs = [dict(zip(names, row, strict=True)) for row in rows if len(rows) <= 16]  # as start_wandb has runs
            for run, log in zip(runs, [*logs, means][: len(runs)], strict=True):
                run.log({name: float(value) for name, value in log.items() if value is not np.ma.masked})
        mean_return = np.ma.filled(np.ma.masked_invalid(metrics["charts/episodic_return"]).mean(), np.nan)
        bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
        bar.update(len(table) * update_steps)

    def stop(*_):
        stops.append(signal.signal(signal.SIGINT, signal.SIG_DFL))  # the next Ctrl-C does not wait for the updates

    handler = signal.signal(signal.SIGINT, stop)
    saved_at = started = time.time()
    is_last = done == config.num_updates
    while not is_last:
        states, metrics = run_chunk(states)  # not waited for: the chunk before is recorded while this one runs
        pending.append((done, metrics))
        done += chunk_size
        is_last = done == config.num_updates or len(stops) > 0
        save_now = is_last or time.time() - saved_at >= config.checkpoint_interval
        while len(pending) > (0 if save_now else 1):
            record(*pending.pop(0))
        if save_now:
            host_states = jax.device_get(jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, states))
            replace(checkpoint, serialization.to_bytes(jax.tree.leaves(host_states)))  # flax knows no states of MuJoCo
            saved_at = time.time()
    seconds = time.time() - started
    bar.close()
    replace(run_dir / "params.msgpack", serialization.to_bytes(jax.device_get(states.params)))

    table = np.loadtxt(csv, delimiter=",", skiprows=1, ndmin=2)[:, 1:].reshape(done, config.num_seeds, len(names))
    steps = int(table[-1, 0, names.index("global_step")])
    title = f"{config.algorithm.upper()}, {config.env_id}, {config.num_seeds} seed{'s' * (config.num_seeds > 1)}"
    summary = plot_returns(run_dir / "learning_curve.png", np.ma.masked_invalid(table), names, title)
    metadata = {
        "device": f"{num_devices} x {jax.devices()[0].device_kind}",
        "compile_seconds": compile_seconds,
        "run_seconds": seconds,
        "steps_per_second": (done - first) * update_steps / seconds,
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "gymnax", "numpy")},
    }
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        metadata["git_commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    replace(run_dir / "metadata.json", json.dumps(metadata, indent=2).encode())
    for run in runs:
        run.finish()
    print(f"{title}: {done} of {config.num_updates} updates, {steps:,} environment steps a seed")
    speed = f"{metadata['steps_per_second']:,.0f} steps/s on {metadata['device']}"
    print(f"{seconds:.1f} s, {speed}, after {compile_seconds:.1f} s of compiling")
    print(f"{summary}\nIn {run_dir}: {', '.join(sorted(os.listdir(run_dir)))}")
    if done < config.num_updates:
        print(f"To go on: python {Path(__file__).name} --resume {run_dir}")
    signal.signal(signal.SIGINT, handler)
    return run_dir


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
