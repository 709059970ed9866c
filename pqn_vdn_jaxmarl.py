"""PQN for a team of agents: value decomposition (VDN) and lambda-returns, on JaxMARL.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025,
arXiv 2407.04811; VDN: Sunehag et al., AAMAS 2018, arXiv 1706.05296; JaxMARL: Rutherford et al.,
NeurIPS 2024, arXiv 2311.10090. Unlike in pqn_cartpole.py, all agents share one network, the loss is
on the sum of their values, and a minibatch holds whole environments, as the GRU runs over time. The
metrics have the team's return, and win_rate (SMAX) or soups (Overcooked).

    python pqn_vdn_jaxmarl.py --env-id smax_3m      # trains, plots, saves; --help lists the flags

    from pqn_vdn_jaxmarl import Config, make_train  # as a library: a pure function of a key
    config = Config(env_id="overcooked_cramped_room")
    state, metrics = jax.jit(make_train(config))(jax.random.key(0))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "jaxmarl>=0.2,<0.3",
#   "gymnax>=1.0.1,<2", "six>=1.16,<2", "orbax-checkpoint>=0.12,<0.13", "tyro>=1.0,<2",
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
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn
from unittest import mock

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

# PureJaxQL's for SMAX and JaxMARL's for Overcooked, sized for a GPU. Unlike PureJaxQL: inputs have
# batch renormalisation and hidden layers layer norm, and there is no window of 4 earlier steps.
# Unlike JaxMARL: minibatches are whole environments; targets are recomputed in each of them.
DEFAULTS = {
    "smax": {
        "total_timesteps": 10_000_000,
        "num_envs": 128,
        "num_steps": 128,
        "learning_rate": 2.5e-4,
        "td_lambda": 0.85,
        "epsilon_finish": 0.01,
        "epsilon_decay": 0.1,
        "max_grad_norm": 1.0,
        "reward_scale": 10.0,
        "network": "gru",
        "norm_input": "batch_renorm",
        "eval_interval": 20,
    },
    "overcooked": {
        "total_timesteps": 5_000_000,
        "num_envs": 64,
        "num_steps": 16,
        "learning_rate": 7.5e-5,
        "td_lambda": 0.5,
        "epsilon_finish": 0.2,
        "epsilon_decay": 0.2,
        "max_grad_norm": 10.0,
        "reward_scale": 1.0,
        "network": "cnn",
        "norm_input": "none",
        "eval_interval": 200,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields that are None take the environment's default, from DEFAULTS, when a Config is made.

    For another environment make a new Config: dataclasses.replace keeps the old one's values.
    """

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int | None = None
    """Total environment steps per seed, with resets. Default: 1e7 on SMAX, 5e6 on Overcooked."""

    env_id: str = "smax_3m"
    """smax_<map>, such as smax_2s3z, or overcooked_<layout>, such as overcooked_coord_ring."""
    num_envs: int | None = None
    """Parallel environments per seed. Default: 128 on SMAX, 64 on Overcooked."""
    num_steps: int | None = None
    """Steps per environment in a rollout. Default: 128 on SMAX, 16 on Overcooked."""

    learning_rate: float | None = None
    """Learning rate of RAdam. Default: 2.5e-4 on SMAX, 7.5e-5 on Overcooked."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    td_lambda: float | None = None
    """0 for one-step targets, 1 for Monte Carlo. Default: 0.85 on SMAX, 0.5 on Overcooked."""
    epsilon_start: float = 1.0
    """Initial exploration rate."""
    epsilon_finish: float | None = None
    """Final exploration rate. Default: 0.01 on SMAX, 0.2 on Overcooked."""
    epsilon_decay: float | None = None
    """Fraction of the run with linear epsilon decay. Default: 0.1 on SMAX, 0.2 on Overcooked."""
    num_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 16
    """Minibatches per pass, each of whole environments; must divide num_envs."""
    max_grad_norm: float | None = None
    """Maximum global norm of the gradients. Default: 1 on SMAX, 10 on Overcooked."""
    reward_scale: float | None = None
    """Scale of training rewards, not of reported ones. Default: 10 on SMAX, 1 on Overcooked."""
    shaping_decay: float = 0.5
    """Fraction of the run over which Overcooked's shaped rewards decay to zero; 0 for none.

    Reported returns exclude them."""
    mixer: Literal["vdn", "none"] = "vdn"
    """vdn: learn the sum of the agents' values; none: each alone (independent Q-learning)."""
    network: Literal["gru", "mlp", "cnn"] | None = None
    """cnn takes Overcooked's images only. Default: gru on SMAX, cnn on Overcooked."""
    norm_input: Literal["batch_renorm", "none"] | None = None
    """Normalisation of the observations. Default: batch_renorm on SMAX, none on Overcooked."""
    hidden_size: int = 512
    """Units per hidden layer and of the GRU."""
    num_layers: int = 2
    """Number of hidden layers, before the GRU."""
    num_channels: int = 32
    """Channels per convolution."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxQL does."""

    eval_interval: int | None = None
    """Updates between greedy evaluations (the last update always has one); 0 for none.

    Default: 20 on SMAX, 200 on Overcooked."""
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
        """Fills in the environment's defaults, then checks the values.

        Raises ValueError, naming the flag, for an invalid value; traced ones pass as float32.
        """
        family = self.env_id.split("_")[0]
        if family not in DEFAULTS:
            takes = "smax_<map> or overcooked_<layout>"
            raise ValueError(f"--env-id is {self.env_id}; it takes {takes}")
        for name, value in DEFAULTS[family].items():
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
        if self.num_envs % self.num_minibatches:
            envs = f"--num-envs {self.num_envs}"
            raise ValueError(f"--num-minibatches is {self.num_minibatches}; it must divide {envs}")
        if self.num_updates == 0:
            rollout = f"--num-envs {self.num_envs} * --num-steps {self.num_steps}"
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, less than {rollout}")
        if self.network == "cnn" and family == "smax":
            raise ValueError("--network is cnn; on SMAX, which has no images, it takes gru or mlp")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_steps num_epochs num_minibatches"),
    (1, 2**31 - 1, "hidden_size num_layers num_channels eval_episodes"),
    (0, 2**31 - 1, "seed eval_interval"),
    (0, 1, "learning_rate gamma td_lambda epsilon_start epsilon_finish epsilon_decay"),
    (0, 1, "shaping_decay"),
    (0, math.inf, "reward_scale checkpoint_interval"),
    (1e-9, math.inf, "max_grad_norm"),
]

# --- Networks -------------------------------------------------------------------------------------


class BatchRenorm(nn.Module):
    """Batch renormalisation over all but the last axis (Ioffe, 2017, arXiv 1702.03275).

    It is batch normalisation for its first 1000 training steps, while running statistics warm up.
    """

    momentum: float = 0.999
    epsilon: float = 1e-3
    r_max: float = 3.0
    d_max: float = 5.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        features = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        running_std = jnp.sqrt(running_var.value + self.epsilon)
        if not train:
            return (x - running_mean.value) / running_std * scale + bias
        axes = tuple(range(x.ndim - 1))
        mean, var = x.mean(axes), x.var(axes)
        std = jnp.sqrt(var + self.epsilon)
        warm = steps.value >= 1000
        r = jnp.where(
            warm, jax.lax.stop_gradient(jnp.clip(std / running_std, 1 / self.r_max, self.r_max)), 1
        )
        d = jax.lax.stop_gradient(
            jnp.clip((mean - running_mean.value) / running_std, -self.d_max, self.d_max)
        )
        if not self.is_initializing():
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
            steps.value += 1
        return ((x - mean) / std * r + jnp.where(warm, d, 0)) * scale + bias


class GRU(nn.Module):
    """GRU over time: from h [B, size], x [T, B, F] and clear [T, B] to [T, B, size].

    clear zeroes the state before a step. All inputs are multiplied by their weights at once; only
    the product with the hidden state runs step by step.
    """

    size: int

    @nn.compact
    def __call__(self, h, x: jax.Array, clear: jax.Array):
        def orthogonals(key, shape):  # one per gate
            init, square = nn.initializers.orthogonal(), (shape[0], shape[0])
            return jnp.hstack([init(key, square, jnp.float32) for key in jax.random.split(key, 3)])

        kernel = self.param("kernel", orthogonals, (self.size, 3 * self.size))
        bias = self.param("bias", nn.initializers.zeros, (self.size,), jnp.float32)
        gates = nn.Dense(3 * self.size)(x)

        def step(h, inputs):
            gates, clear = inputs
            h = jnp.where(clear[:, None], 0, h)
            (r, z, n), (r_h, z_h, n_h) = (jnp.split(x, 3, axis=-1) for x in (gates, h @ kernel))
            r, z = nn.sigmoid(r + r_h), nn.sigmoid(z + z_h)
            h = (1 - z) * jnp.tanh(n + r * (n_h + bias)) + z * h
            return h, h

        if jax.default_backend() != "cpu":  # a GPU stores each intermediate by a launch of its own
            policy = jax.checkpoint_policies.dots_saveable
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        return jax.lax.scan(step, h, (gates, clear))


class QNetwork(nn.Module):
    """The agents' shared network: features [T, B, ...] and clear [T, B] to [T, B, num_actions].

    clear empties an agent's memory before a step; hidden [B, hidden_size] is the GRU's state
    before the first step. Feed-forward networks have none, and pass it on. Hidden layers have layer
    normalisation everywhere; PureJaxQL has batch normalisation on SMAX.
    """

    num_actions: int
    config: Config

    @nn.compact
    def __call__(self, hidden, features, clear, train: bool = False):
        def norm_relu(x):
            # On a GPU, the variance in two passes is one kernel, but its gradient is more.
            return nn.relu(nn.LayerNorm(use_fast_variance=train)(x))

        x = features.astype(jnp.float32)
        x = BatchRenorm()(x, train) if self.config.norm_input == "batch_renorm" else x
        for size in (5, 3, 3) if self.config.network == "cnn" else ():
            # A convolution as a matrix product of patches: on a CPU, much faster than nn.Conv.
            rows, columns = x.shape[-3:-1]
            margins = [(0, 0)] * (x.ndim - 3) + [(size // 2, size // 2)] * 2 + [(0, 0)]
            x = jnp.pad(x, margins)
            patches = [
                x[..., i : i + rows, j : j + columns, :] for i in range(size) for j in range(size)
            ]
            x = jnp.concatenate(patches, axis=-1)
            x = norm_relu(nn.Dense(self.config.num_channels)(x))
        x = x.reshape(*clear.shape, -1)
        for _ in range(self.config.num_layers):
            x = norm_relu(nn.Dense(self.config.hidden_size)(x))
        if self.config.network == "gru":
            hidden, x = GRU(self.config.hidden_size)(hidden, x, clear)
        return hidden, nn.Dense(self.num_actions)(x)


# --- Equations ------------------------------------------------------------------------------------


def available_epsilon_greedy(key, q_values, available, epsilon) -> jax.Array:
    """Greedy actions [...], uniform with probability epsilon, both among the available ones.

    q_values and available are [..., num_actions]; at least one action is available.
    """
    uniform = jax.random.uniform(key, q_values.shape[:-1], jnp.float32)
    # One draw decides both: given uniform < epsilon, uniform / epsilon is uniform in [0, 1).
    counts = available.cumsum(-1, dtype=jnp.int32)
    index = jnp.minimum(uniform / epsilon * counts[..., -1], counts[..., -1] - 1).astype(jnp.int32)
    random_action = (counts > index[..., None]).argmax(-1)
    greedy_action = jnp.where(available, q_values, -jnp.inf).argmax(-1)
    return jnp.where(uniform < epsilon, random_action, greedy_action).astype(jnp.int32)


def team_values(values: jax.Array, mixer: str) -> jax.Array:
    """What the loss is on, from the agents' values [..., num_agents].

    vdn: their sum [..., 1] (VDN, equation 4); none: each by itself, unchanged.
    """
    return values.sum(-1, keepdims=True) if mixer == "vdn" else values


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


# --- Environment ----------------------------------------------------------------------------------


class Observation(NamedTuple):
    """What the agents of a team see; every field is [num_agents, ...]."""

    features: jax.Array  # a vector that ends with the agent's id, or an image; zeros if dead
    available: jax.Array  # [num_agents, num_actions]: which actions can be taken
    clear: jax.Array  # whether the agent begins an episode or is dead, and remembers nothing


class TeamState(NamedTuple):
    """State of a team's environment, with return and length of the episode so far."""

    env_state: Any
    episode_returns: jax.Array
    episode_lengths: jax.Array
    ended: jax.Array  # whether the episode is over: the next step only resets


def make_jaxmarl(env_id: str):
    """The environment of JaxMARL. Raises ValueError for an unknown id."""
    # Not at the top: it takes seconds, and starts JAX before the devices are chosen. Silenced: it
    # prints about missing packages, after setting sys.stdout to sys.__stdout__.
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), mock.patch.object(sys, "__stdout__", silent):
        import jaxmarl
        from jaxmarl.environments.overcooked import overcooked_layouts
        from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    maps = {f"smax_{name}": scenario for name, scenario in MAP_NAME_TO_SCENARIO.items()}
    layouts = {f"overcooked_{name}": layout for name, layout in overcooked_layouts.items()}
    if env_id in maps:  # its defaults are PureJaxQL's settings
        return jaxmarl.make("HeuristicEnemySMAX", scenario=maps[env_id])
    if env_id in layouts:
        return jaxmarl.make("overcooked", layout=layouts[env_id])
    raise ValueError(f"--env-id is {env_id}; it takes one of {', '.join([*maps, *layouts])}")


def make_env(env_id: str):
    """Functions reset(key), step(key, state, action) of one team, and JaxMARL's environment.

    reset returns (Observation, TeamState). step takes actions [num_agents] and returns Observation,
    TeamState, the team's reward, its shaped reward, terminated, truncated and info: whether an
    episode returned, its return, length, and win_rate (SMAX) or soups (Overcooked).
    The observation after an episode's last step is its final one; the next step ignores the actions
    and resets. So a rollout has every final observation, and the network evaluates it in order.
    """
    env = make_jaxmarl(env_id)
    is_smax = env_id.startswith("smax")

    def stack(by_agent):
        return jnp.stack([by_agent[agent] for agent in env.agents])

    def observe(obs, env_state, start):
        features = stack(obs)
        if not is_smax:
            shape = env.num_agents, env.action_space(env.agents[0]).n
            return Observation(features, jnp.ones(shape, bool), jnp.full(shape[:1], start))
        alive = env_state.state.unit_alive[: env.num_agents]
        features = jnp.hstack([features, jnp.eye(env.num_agents, dtype=features.dtype)])
        features = jnp.where(alive[:, None], features, 0)
        available = stack(env.get_avail_actions(env_state)).astype(bool)
        return Observation(features, available, start | ~alive)

    def reset(key):
        obs, env_state = env.reset(key)
        zero = jnp.float32(0), jnp.int32(0), jnp.bool_(False)
        return observe(obs, env_state, True), TeamState(env_state, *zero)

    def step(key, state, action):
        step_key, reset_key = jax.random.split(key)
        actions = dict(zip(env.agents, action, strict=True))
        obs, env_state, rewards, dones, info = env.step_env(step_key, state.env_state, actions)
        reward = rewards[env.agents[0]].astype(jnp.float32)  # the agents share it
        if is_smax:
            alive = env_state.state.unit_alive
            is_over = ~(alive[: env.num_agents].any() & alive[env.num_agents :].any())
            shaped_reward = jnp.float32(0)
        else:  # only the time limit ends an episode
            is_over = jnp.bool_(False)
            shaped_reward = sum(info["shaped_reward"].values())
        running = ~state.ended
        terminated, truncated = running & is_over, running & dones["__all__"] & ~is_over
        returns, length = state.episode_returns + reward, state.episode_lengths + 1
        episode = {
            "returned_episode": terminated | truncated,
            "returned_episode_returns": returns,
            "returned_episode_lengths": length,
        }
        # A victory is rewarded with 1, a soup with 20.
        episode |= {"win_rate": reward >= 1} if is_smax else {"soups": returns / 20}
        next_state = TeamState(env_state, returns, length, terminated | truncated)
        obs, next_state = jax.tree.map(
            lambda fresh, stepped: jnp.where(running, stepped, fresh).astype(fresh.dtype),
            reset(reset_key),
            (observe(obs, env_state, False), next_state),
        )
        rewards = running * reward, running * shaped_reward
        return obs, next_state, *rewards, terminated, truncated, episode

    return reset, step, env


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

    variables: Any  # flax variables: params and, for input normalisation, batch_stats
    opt_state: Any
    env_state: Any
    obs: Observation  # of all environments
    hidden: jax.Array | None  # of the GRU, [num_envs, num_agents, hidden_size]
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far

    params = property(lambda self: self.variables, doc="The variables of a trained team.")


class Transition(NamedTuple):
    """One step of all environments; a rollout adds a leading axis of num_steps."""

    action: jax.Array  # [num_envs, num_agents]
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    is_reset: jax.Array  # whether the step only reset: there is nothing to learn


def make_train(config: Config):
    """PQN-VDN as a pure function train(key=None, state=None, num_updates=...).

    train returns (TrainState, metrics). It starts from train.init(key) or continues from a state,
    for config.num_updates by default. metrics is a flat dict of arrays [num_updates]; returns are
    NaN for updates in which no episode ended, and eval/* for updates without an evaluation. train
    can be jitted, and vmapped over keys or float fields of config.
    To vmap over states, pass an unbatched update number, train(state=state._replace(update=n)), or
    vmap turns the cond into a select and every update evaluates.
    Raises ValueError for an environment that it cannot train on.
    """
    env_reset, env_step, env = make_env(config.env_id)
    env_reset, env_step = jax.vmap(env_reset), jax.vmap(env_step)
    score = "win_rate" if config.env_id.startswith("smax") else "soups"
    network = QNetwork(env.action_space(env.agents[0]).n, config)

    def blank(num_envs):
        """The first hidden states of the GRU; None for other networks."""
        if config.network == "gru":
            return jnp.zeros((num_envs, env.num_agents, config.hidden_size), jnp.float32)

    def apply(variables, hidden, obs, **options):
        """Hidden states and values, each [..., num_envs, num_agents, size], for obs over time."""
        shape = obs.clear.shape
        flat = jax.tree.map(lambda x: x.reshape(shape[0], -1, *x.shape[3:]), obs)
        first = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), hidden)
        outputs = network.apply(variables, first, flat.features, flat.clear, **options)
        (last, q), updated = outputs if options else (outputs, None)
        last = jax.tree.map(lambda x: x.reshape(-1, env.num_agents, x.shape[-1]), last)
        return last, q.reshape(*shape, -1), updated

    def act(variables, hidden, obs):
        """One step of the network: hidden states, and values [num_envs, num_agents, actions]."""
        hidden, q, _ = apply(variables, hidden, jax.tree.map(lambda x: x[None], obs))
        return hidden, q[0]

    def learning_rate(number, step):
        """The rate at a gradient step of an update; if annealed, it stays zero after the run."""
        progress = (number + step / config.num_gradient_steps) / config.num_updates
        remaining = 1 - config.anneal_lr * jnp.minimum(progress, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    optimizer = optax.chain(clip, optax.scale_by_radam())

    def init(key):
        key, params_key, reset_key = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(reset_key, config.num_envs))
        hidden = blank(config.num_envs)
        one_team = jax.tree.map(lambda x: x[0], (hidden, obs))
        inputs = one_team[0], one_team[1].features[None], one_team[1].clear[None]
        variables = network.init(params_key, *inputs)
        opt_state = optimizer.init(ravel_pytree(variables["params"])[0])
        return TrainState(variables, opt_state, env_state, obs, hidden, key, jnp.int32(0))

    def collect(state, epsilon, shaping, key):
        def step(carry, keys):
            obs, hidden, env_state = carry
            hidden, q = act(state.variables, hidden, obs)
            action = available_epsilon_greedy(keys[0], q, obs.available, epsilon)
            is_reset, env_keys = env_state.ended, jax.random.split(keys[1], config.num_envs)
            next_obs, env_state, reward, shaped_reward, *ends, info = env_step(
                env_keys, env_state, action
            )
            reward = config.reward_scale * (reward + shaping * shaped_reward)
            transition = Transition(action, reward.astype(jnp.float32), *ends, is_reset)
            return (next_obs, hidden, env_state), (obs, transition, info)

        keys = jax.random.split(key, (config.num_steps, 2))
        carry = state.obs, state.hidden, state.env_state
        (obs, hidden, env_state), (seen, rollout, info) = scan_packed(step, carry, keys)
        seen = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), seen, obs)
        return state._replace(obs=obs, hidden=hidden, env_state=env_state), seen, rollout, info

    def loss(params, variables, hidden, obs, rollout):
        """obs has num_steps + 1 rows; the last is where the rollout's last step led."""
        _, q, updated = apply(
            variables | {"params": params}, hidden, obs, train=True, mutable=["batch_stats"]
        )
        best = jnp.where(obs.available, jax.lax.stop_gradient(q), -jnp.inf).max(-1)
        next_values = team_values(best, config.mixer)[1:]
        chosen = jax.nn.one_hot(rollout.action, q.shape[-1], dtype=bool)
        values = team_values(q[:-1].sum(-1, where=chosen), config.mixer)
        terminated, truncated = rollout.terminated, rollout.truncated
        if not config.bootstrap_on_truncation:
            terminated |= truncated
        reward, *ends = (x[..., None] for x in (rollout.reward, terminated, truncated))
        target = lambda_returns(reward, next_values, *ends, config.gamma, config.td_lambda)
        learned = jnp.broadcast_to(~rollout.is_reset[..., None], values.shape)
        count = jnp.maximum(learned.sum(), 1)  # a minibatch may hold nothing but resets
        squares = jnp.square(values - target).sum(where=learned) / count
        return 0.5 * squares, (values.sum(where=learned) / count, updated)

    def learn(state, hidden, obs, rollout, key):
        def gradient_step(carry, inputs):
            variables, opt_state = carry
            index, rate = inputs
            minibatch = jax.tree.map(lambda x: x[:, index], (obs, rollout))
            initial = jax.tree.map(lambda x: x[index], hidden)
            params, grad = unflatten(variables["params"]), jax.value_and_grad(loss, has_aux=True)
            (td_loss, (q, updated)), grads = grad(params, variables, initial, *minibatch)
            grads, _ = ravel_pytree(grads)
            updates, opt_state = optimizer.update(grads, opt_state)
            variables |= updated | {"params": variables["params"] - rate * updates}
            return (variables, opt_state), jnp.stack([td_loss, q, optax.tree.norm(grads)])

        # Sorting random bits gives a random permutation: one argsort shuffles for all epochs.
        bits = jax.random.bits(key, (config.num_epochs, config.num_envs), jnp.uint32)
        order = bits.argsort()
        minibatches = order.reshape(config.num_gradient_steps, -1)
        rates = learning_rate(state.update, jnp.arange(config.num_gradient_steps))
        # While learning, the parameters are one vector: on a GPU, each array costs a launch a step.
        params, unflatten = ravel_pytree(state.variables["params"])
        carry = state.variables | {"params": params}, state.opt_state
        (variables, opt_state), losses = jax.lax.scan(gradient_step, carry, (minibatches, rates))
        variables |= {"params": unflatten(variables["params"])}
        names = "losses/td_loss", "losses/q_values", "losses/grad_norm"
        losses = dict(zip(names, losses.mean(0), strict=True))
        return state._replace(variables=variables, opt_state=opt_state), losses

    def evaluate(state, key):
        """Mean return, and win_rate or soups, of eval_episodes greedy episodes."""

        def step(carry, t):
            obs, hidden, env_state, results, finished = carry
            hidden, q = act(state.variables, hidden, obs)
            action = jnp.where(obs.available, q, -jnp.inf).argmax(-1).astype(jnp.int32)
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            obs, env_state, *_, info = env_step(keys, env_state, action)
            result = jnp.stack([info["returned_episode_returns"], info[score]], axis=-1)
            results = jnp.where(finished[:, None], results, result.astype(jnp.float32))
            # SMAX checks the limit before it counts the step: episodes last up to max_steps + 1.
            finished |= info["returned_episode"] | (t >= env.max_steps)
            return (obs, hidden, env_state, results, finished), None

        def eight_steps(carry):  # between two looks at finished, for which a GPU waits
            t, carry = carry
            return t + 8, scan_packed(step, carry, t + jnp.arange(8))[0]

        reset_key, step_key = jax.random.split(key)
        first = env_reset(jax.random.split(reset_key, config.eval_episodes))
        hidden, finished = blank(config.eval_episodes), jnp.zeros(config.eval_episodes, bool)
        results = jnp.zeros((config.eval_episodes, 2), jnp.float32)
        carry = 0, (first[0], hidden, first[1], results, finished)
        _, carry = jax.lax.while_loop(lambda carry: ~carry[1][-1].all(), eight_steps, carry)
        return carry[3].mean(0)

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(
            jax.random.fold_in(state.key, number), 3
        )
        decayed = jnp.minimum(number / jnp.maximum(config.epsilon_decay * config.num_updates, 1), 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed
        epsilon = jnp.float32(epsilon)
        shaping = 1 - number / jnp.maximum(config.shaping_decay * config.num_updates, 1)
        shaping = (jnp.maximum(shaping, 0) * (config.shaping_decay > 0)).astype(jnp.float32)

        hidden = state.hidden
        state, obs, rollout, info = collect(state, epsilon, shaping, collect_key)
        state, losses = learn(state, hidden, obs, rollout, learn_key)

        ended = info["returned_episode"]
        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": info["returned_episode_returns"].mean(where=ended),
            "charts/episodic_length": info["returned_episode_lengths"].mean(where=ended),
            f"charts/{score}": info[score].mean(where=ended),
            "charts/epsilon": epsilon,
            "charts/learning_rate": learning_rate(number, 0),
        }
        if config.eval_interval:
            due = ((number + 1) % config.eval_interval == 0) | (number + 1 == config.num_updates)
            nothing = jnp.full(2, jnp.nan, jnp.float32)
            results = jax.lax.cond(due, evaluate, lambda *_: nothing, state, eval_key)
            metrics["eval/episodic_return"], metrics[f"eval/{score}"] = results
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
