"""PQN for a team of agents: value decomposition (VDN) and lambda-returns, on JaxMARL.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025,
arXiv 2407.04811; VDN: Sunehag et al., AAMAS 2018, arXiv 1706.05296; JaxMARL: Rutherford et al.,
NeurIPS 2024, arXiv 2311.10090. Unlike in pqn_cartpole.py, all agents share one network, the loss is
on the sum of their values, and a minibatch holds whole environments, as the GRU runs over time. The
metrics have the team's return, and win_rate (SMAX) or soups (Overcooked).

Equations, details, metrics and results: docs/pqn_vdn.md

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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple
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
        "norm_input": "batch_norm",
        "norm": "batch_norm",
        "memory_window": 4,
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
        "norm": "layer_norm",
        "memory_window": 0,
        "eval_interval": 200,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are PureJaxQL's for SMAX, but for the map, and JaxMARL's for Overcooked.

    Unlike both: time limits are bootstrapped; the step after an episode's end only resets, and is
    masked from the loss. Unlike JaxMARL's Overcooked: minibatches are whole environments, and
    targets are recomputed at every gradient step.
    Fields that are None take the environment's default, from DEFAULTS, when a Config is made. For
    another environment make a new Config: dataclasses.replace keeps the old one's values.
    """

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int | None = None
    """Total environment steps per seed, with resets. None: 1e7 on SMAX, 5e6 on Overcooked."""

    env_id: str = "smax_3m"
    """smax_<map>, such as smax_2s3z, or overcooked_<layout>, such as overcooked_coord_ring."""
    num_envs: int | None = None
    """Parallel environments per seed. None: 128 on SMAX, 64 on Overcooked."""
    num_steps: int | None = None
    """Steps per environment in a rollout. None: 128 on SMAX, 16 on Overcooked."""

    learning_rate: float | None = None
    """Learning rate of RAdam. None: 2.5e-4 on SMAX, 7.5e-5 on Overcooked."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    td_lambda: float | None = None
    """0 for one-step targets, 1 for Monte Carlo. None: 0.85 on SMAX, 0.5 on Overcooked."""
    epsilon_start: float = 1.0
    """Initial exploration rate."""
    epsilon_finish: float | None = None
    """Final exploration rate. None: 0.01 on SMAX, 0.2 on Overcooked."""
    epsilon_decay: float | None = None
    """Fraction of the run with linear epsilon decay. None: 0.1 on SMAX, 0.2 on Overcooked."""
    num_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 16
    """Minibatches per pass, each of whole environments; must divide num_envs."""
    max_grad_norm: float | None = None
    """Maximum global norm of the gradients. None: 1 on SMAX, 10 on Overcooked."""
    reward_scale: float | None = None
    """Scale of training rewards, not of reported ones. None: 10 on SMAX, 1 on Overcooked."""
    shaping_decay: float = 0.5
    """Fraction of the run over which Overcooked's shaped rewards decay to zero; 0 for none.
    Reported returns exclude them."""
    mixer: Literal["vdn", "none"] = "vdn"
    """vdn: learn the sum of the agents' values; none: each alone (independent Q-learning), whose
    return ends with the step in which the agent dies. (In JaxMARL's, one step later.)"""
    network: Literal["gru", "mlp", "cnn"] | None = None
    """cnn takes Overcooked's images only. None: gru on SMAX, cnn on Overcooked."""
    norm_input: Literal["batch_norm", "none"] | None = None
    """Normalisation of the observations. None: batch_norm on SMAX, none on Overcooked."""
    norm: Literal["layer_norm", "batch_norm", "none"] | None = None
    """Normalisation after hidden layers. None: batch_norm on SMAX, layer_norm on Overcooked."""
    hidden_size: int = 512
    """Units per hidden layer and of the GRU."""
    num_layers: int = 2
    """Number of hidden layers, before the GRU."""
    num_channels: int = 32
    """Channels per convolution."""
    memory_window: int | None = None
    """Last steps of the rollout before that are learned from again, on which the GRU refreshes its
    stored state; at most num_steps. None: 4 on SMAX, 0 on Overcooked."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxQL does."""

    eval_interval: int | None = None
    """Updates between greedy evaluations (the last update always has one); 0 for none.
    None: 20 on SMAX, 200 on Overcooked."""
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
        if self.memory_window > self.num_steps:
            window = f"--memory-window is {self.memory_window}"
            raise ValueError(f"{window}; it takes a number up to --num-steps {self.num_steps}")
        if self.network == "cnn" and family == "smax":
            raise ValueError("--network is cnn; on SMAX, which has no images, it takes gru or mlp")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_steps num_epochs num_minibatches"),
    (1, 2**31 - 1, "hidden_size num_layers num_channels eval_episodes"),
    (0, 2**31 - 1, "seed eval_interval memory_window"),
    (0, 1, "learning_rate gamma td_lambda epsilon_start epsilon_finish epsilon_decay"),
    (0, 1, "shaping_decay"),
    (0, math.inf, "reward_scale checkpoint_interval"),
    (1e-9, math.inf, "max_grad_norm"),
]

# --- Networks -------------------------------------------------------------------------------------


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
    before the first step. Feed-forward networks have none, and pass it on.
    """

    num_actions: int
    config: Config

    @nn.compact
    def __call__(self, hidden, features, clear, train: bool = False):
        def norm_relu(x):
            if self.config.norm == "layer_norm":
                # On a GPU, the variance in two passes is one kernel, but its gradient is more.
                x = nn.LayerNorm(use_fast_variance=train)(x)
            elif self.config.norm == "batch_norm":
                x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.relu(x)

        x = features.astype(jnp.float32)
        if self.config.norm_input == "batch_norm":
            x = nn.BatchNorm(use_running_average=not train)(x)
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
        try:
            import jaxmarl
            from jaxmarl.environments.overcooked import overcooked_layouts
            from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO
        except ImportError as error:
            needs = "which needs jaxmarl (pip install jaxmarl)"
            raise ValueError(f"--env-id is {env_id}, {needs}: {error}") from error

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

    def observe(obs, env_state, clear):
        features = stack(obs)
        if not is_smax:
            shape = env.num_agents, env.action_space(env.agents[0]).n
            return Observation(features, jnp.ones(shape, bool), jnp.full(shape[:1], clear))
        alive = env_state.state.unit_alive[: env.num_agents]
        features = jnp.hstack([features, jnp.eye(env.num_agents, dtype=features.dtype)])
        features = jnp.where(alive[:, None], features, 0)
        available = stack(env.get_avail_actions(env_state)).astype(bool)
        return Observation(features, available, clear | ~alive)

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


# --- Loops on a GPU: jax.lax.scan gives the same results ------------------------------------------


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


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The complete training state; saved, it is a checkpoint."""

    variables: Any  # flax variables: params and, with batch norm, batch_stats
    opt_state: Any
    env_state: Any
    obs: Observation  # of all environments
    hidden: jax.Array | None  # of the GRU, [num_envs, num_agents, hidden_size]
    window: Any  # the last memory_window steps: hidden before the first, obs, Transition; or None
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
    To vmap over states, give all of them one update number, as in jax.vmap(lambda state:
    train(state=state._replace(update=n)))(states), or vmap makes every update evaluate.
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
        window = None
        if config.memory_window:  # before the first rollout, nothing to learn from
            first = jax.tree.map(lambda x: jnp.stack([x] * config.memory_window), obs)
            shape = first.clear.shape
            action, reward = jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:2], jnp.float32)
            terminated, truncated = jnp.zeros((2, *shape[:2]), bool)
            nothing = Transition(action, reward, terminated, truncated, jnp.ones_like(truncated))
            window = blank(config.num_envs), first, nothing
        of_envs = env_state, obs, hidden, window
        return TrainState(variables, opt_state, *of_envs, key, jnp.int32(0))

    def collect(state, epsilon, shaping, key):
        """The state after a rollout; what to learn from, with the window before it; and infos.

        To learn from: hidden states before the first step, num_steps + 1 rows of observations (the
        last is where the last step led), and num_steps of transitions; memory_window more of both.
        """

        def step(carry, inputs):
            keys, t = inputs
            obs, hidden, env_state, kept = carry
            is_kept = t == config.num_steps - config.memory_window
            kept = jax.tree.map(lambda new, old: jnp.where(is_kept, new, old), hidden, kept)
            hidden, q = act(state.variables, hidden, obs)
            action = available_epsilon_greedy(keys[0], q, obs.available, epsilon)
            is_reset, env_keys = env_state.ended, jax.random.split(keys[1], config.num_envs)
            next_obs, env_state, reward, shaped_reward, *ends, info = env_step(
                env_keys, env_state, action
            )
            reward = config.reward_scale * (reward + shaping * shaped_reward)
            transition = Transition(action, reward.astype(jnp.float32), *ends, is_reset)
            return (next_obs, hidden, env_state, kept), (obs, transition, info)

        inputs = jax.random.split(key, (config.num_steps, 2)), jnp.arange(config.num_steps)
        carry = state.obs, state.hidden, state.env_state, state.hidden
        (obs, hidden, env_state, kept), (seen, rollout, info) = scan_packed(step, carry, inputs)
        batch = state.hidden, seen, rollout
        next_state = state._replace(obs=obs, hidden=hidden, env_state=env_state)
        if config.memory_window:
            last = jax.tree.map(lambda x: x[-config.memory_window :], (seen, rollout))
            next_state = next_state._replace(window=(kept, *last))
            hidden_before, *before = state.window
            joined = jax.tree.map(lambda *x: jnp.concatenate(x), before, [seen, rollout])
            batch = hidden_before, *joined
        first_hidden, seen, rollout = batch
        seen = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), seen, obs)
        return next_state, (first_hidden, seen, rollout), info

    def loss(params, variables, hidden, obs, rollout):
        """hidden, obs and rollout as collect returns them, of some environments."""
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
        if config.mixer == "none":  # clear after a step: the agent died, or it was a masked reset
            ends[0] |= obs.clear[1:]
        target = lambda_returns(reward, next_values, *ends, config.gamma, config.td_lambda)
        mask = jnp.broadcast_to(~rollout.is_reset[..., None], values.shape)
        count = jnp.maximum(mask.sum(), 1)  # a minibatch may hold nothing but resets
        td_loss = jnp.square(values - target).sum(where=mask) / count
        return td_loss, (values.sum(where=mask) / count, updated)

    def learn(state, batch, key):
        def gradient_step(carry, inputs):
            variables, opt_state = carry
            index, rate = inputs
            hidden = jax.tree.map(lambda x: x[index], batch[0])
            minibatch = jax.tree.map(lambda x: x[:, index], batch[1:])
            params, grad = unflatten(variables["params"]), jax.value_and_grad(loss, has_aux=True)
            (td_loss, (q, updated)), grads = grad(params, variables, hidden, *minibatch)
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
        """Mean return, length, and win_rate or soups, of eval_episodes greedy episodes."""

        def step(carry, t):
            obs, hidden, env_state, results, finished = carry
            hidden, q = act(state.variables, hidden, obs)
            action = jnp.where(obs.available, q, -jnp.inf).argmax(-1).astype(jnp.int32)
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            obs, env_state, *_, info = env_step(keys, env_state, action)
            names = "returned_episode_returns", "returned_episode_lengths", score
            result = jnp.stack([info[name].astype(jnp.float32) for name in names], axis=-1)
            results = jnp.where(finished[:, None], results, result)
            # SMAX checks the limit before it counts the step: episodes last up to max_steps + 1.
            finished |= info["returned_episode"] | (t >= env.max_steps)
            return (obs, hidden, env_state, results, finished), None

        def eight_steps(carry):  # between two looks at finished, for which a GPU waits
            t, carry = carry
            return t + 8, scan_packed(step, carry, t + jnp.arange(8))[0]

        reset_key, step_key = jax.random.split(key)
        first = env_reset(jax.random.split(reset_key, config.eval_episodes))
        hidden, finished = blank(config.eval_episodes), jnp.zeros(config.eval_episodes, bool)
        results = jnp.zeros((config.eval_episodes, 3), jnp.float32)
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

        state, batch, info = collect(state, epsilon, shaping, collect_key)
        state, losses = learn(state, batch, learn_key)

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
            nothing = jnp.full(3, jnp.nan, jnp.float32)
            results = jax.lax.cond(due, evaluate, lambda *_: nothing, state, eval_key)
            names = "episodic_return", "episodic_length", score
            metrics |= {f"eval/{name}": x for name, x in zip(names, results, strict=True)}
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
