"""PQN with an LSTM and lambda-returns, on Craftax and on gymnax tasks that need memory.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025,
arXiv 2407.04811; Craftax: Matthews et al., ICML 2024, arXiv 2402.16801. Unlike in pqn_cartpole.py,
a minibatch holds whole environments: the LSTM runs over the rollout from the hidden state stored at
its start, and targets are recomputed at every gradient step.

Equations, details, metrics and results: docs/pqn_rnn.md

    python pqn_rnn_craftax.py --num-envs 1024       # trains, plots, saves; --help lists the flags

    from pqn_rnn_craftax import Config, make_train  # as a library: a pure function of a key
    config = Config(env_id="Craftax-Classic-Symbolic-v1")
    state, metrics = jax.jit(make_train(config))(jax.random.key(0))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "gymnax>=1.0.1,<2",
#   "six>=1.16,<2", "craftax>=1.6.1,<2", "orbax-checkpoint>=0.12,<0.13", "tyro>=1.0,<2",
#   "tqdm>=4.66,<5", "matplotlib>=3.8,<4", "pandas>=2.2,<4", "wandb>=0.31,<0.32", "numpy>=2,<3",
# ]
# ///

import contextlib
import dataclasses
import functools
import inspect
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

# Their greatest returns, of which papers give the percentage.
CRAFTAX = {"Craftax-Symbolic-v1": 226, "Craftax-Classic-Symbolic-v1": 22}

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of PureJaxQL, the code of PQN's authors, for Craftax-Symbolic-v1.

    Such a run takes hours on a GPU.
    """

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int = 1_000_000_000
    """Total environment steps per seed, over all environments; rounded down to whole updates."""

    env_id: str = "Craftax-Symbolic-v1"
    """Craftax-Symbolic-v1, Craftax-Classic-Symbolic-v1, or a gymnax id (flattened observations)."""
    env_params: tuple[str, ...] = ()
    """Environment parameters to override, such as memory_length=100 of MemoryChain-bsuite."""
    reset_ratio: int = 16
    """Environments per world that Craftax generates at a reset; 1 for no sharing of worlds."""
    num_envs: int = 1024
    """Parallel environments per seed."""
    num_steps: int = 128
    """Steps per environment in a rollout."""

    learning_rate: float = 3e-4
    """Learning rate of RAdam."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    td_lambda: float = 0.5
    """Lambda of the lambda-returns: 0 for one-step targets, 1 for Monte Carlo."""
    epsilon_start: float = 1.0
    """Initial exploration rate."""
    epsilon_finish: float = 0.005
    """Final exploration rate."""
    epsilon_decay: float = 0.1
    """Fraction of the run over which the exploration rate decays linearly."""
    num_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 4
    """Minibatches per pass, each of whole environments; must divide num_envs."""
    max_grad_norm: float = 0.5
    """Maximum global norm of the gradients."""
    reward_scale: float = 1.0
    """Scale of training rewards; reported returns are unscaled."""
    norm_input: bool = True
    """Batch renormalisation of the observations."""
    hidden_size: int = 512
    """Units per hidden layer and of the LSTM."""
    num_layers: int = 1
    """Number of hidden layers before the LSTM."""
    forget_bias: float = 0.0
    """Initial bias of the forget gate: log(T) to remember about T steps (arXiv 1804.11188)."""
    memory: bool = True
    """Keep the state of the LSTM; if off, it is cleared at every step."""
    bootstrap_on_truncation: bool = True
    """Mask truncated steps from the loss; if off, treat them as terminal, as PureJaxQL does."""

    eval_interval: int = 0
    """Updates between greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes per evaluation, each in its own environment."""
    eval_steps: int = 10_000
    """Step limit of an evaluation; unfinished episodes count their return so far."""

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
        if self.num_envs % self.num_minibatches:
            envs = f"--num-envs {self.num_envs}"
            raise ValueError(f"--num-minibatches is {self.num_minibatches}; it must divide {envs}")
        if self.num_updates == 0:
            rollout = f"--num-envs {self.num_envs} * --num-steps {self.num_steps}"
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, less than {rollout}")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 2**31 - 1, "num_seeds total_timesteps num_envs num_epochs num_minibatches"),
    (1, 2**31 - 1, "reset_ratio hidden_size num_layers eval_episodes eval_steps"),
    (2, 2**31 - 1, "num_steps"),  # the last step only serves to bootstrap
    (0, 2**31 - 1, "seed eval_interval"),
    (0, 1, "learning_rate gamma td_lambda epsilon_start epsilon_finish epsilon_decay"),
    (0, math.inf, "reward_scale forget_bias checkpoint_interval"),
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


class LSTM(nn.Module):
    """LSTM over time: from (c, h), each [B, size], x [T, B, F] and clear [T, B] to [T, B, size].

    clear zeroes the state before a step. All inputs are multiplied by their weights at once; only
    the product with the hidden state runs step by step.
    """

    size: int
    forget_bias: float = 0.0

    @nn.compact
    def __call__(self, carry, x: jax.Array, clear: jax.Array):
        def orthogonals(key, shape):  # one per gate
            init, square = nn.initializers.orthogonal(), (shape[0], shape[0])
            return jnp.hstack([init(key, square, jnp.float32) for key in jax.random.split(key, 4)])

        kernel = self.param("kernel", orthogonals, (self.size, 4 * self.size))
        initial_bias = jnp.array([0, self.forget_bias, 0, 0], jnp.float32).repeat(self.size)
        gates = nn.Dense(4 * self.size, bias_init=lambda *_: initial_bias)(x)

        def step(carry, inputs):
            gates, clear = inputs
            c, h = jax.tree.map(lambda x: jnp.where(clear[:, None], 0, x), carry)
            i, f, g, o = jnp.split(gates + h @ kernel, 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        if jax.default_backend() != "cpu":  # a GPU stores each intermediate by a launch of its own
            policy = jax.checkpoint_policies.dots_saveable
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        return jax.lax.scan(step, carry, (gates, clear))


class QNetwork(nn.Module):
    """Encoder, LSTM, output: obs [T, B, obs_dim], last_action, clear [T, B] to [T, B, num_actions].

    clear marks the first step of an episode; hidden is the LSTM's state before the first step.
    """

    num_actions: int
    config: Config

    @nn.compact
    def __call__(self, hidden, obs, last_action, clear, train: bool = False):
        x = obs.astype(jnp.float32)
        x = BatchRenorm()(x, train) if self.config.norm_input else x
        for _ in range(self.config.num_layers):
            x = nn.Dense(self.config.hidden_size)(x)
            # On a GPU, the variance in two passes is one kernel, but its gradient is more.
            x = nn.relu(nn.LayerNorm(use_fast_variance=train)(x))
        x = jnp.concatenate(
            [x, jax.nn.one_hot(last_action, self.num_actions, dtype=jnp.float32)], axis=-1
        )
        lstm = LSTM(self.config.hidden_size, self.config.forget_bias)
        hidden, x = lstm(hidden, x, clear if self.config.memory else clear | True)
        return hidden, nn.Dense(self.num_actions)(x)


# --- Equations ------------------------------------------------------------------------------------


def epsilon_greedy(key: jax.Array, q_values: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Greedy actions [...] for q_values [..., num_actions], uniform with probability epsilon."""
    num_actions = q_values.shape[-1]
    uniform = jax.random.uniform(key, q_values.shape[:-1], jnp.float32)
    # One draw decides both: given uniform < epsilon, uniform / epsilon is uniform in [0, 1).
    random_action = jnp.minimum(uniform / epsilon * num_actions, num_actions - 1).astype(jnp.int32)
    return jnp.where(uniform < epsilon, random_action, q_values.argmax(-1).astype(jnp.int32))


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


def rollout_targets(
    rewards, values, terminated, truncated, gamma, td_lambda
) -> tuple[jax.Array, jax.Array]:
    """Targets and loss mask of all steps but the last, both [num_steps - 1, num_envs].

    Arrays are [num_steps, num_envs]; values[t] is max_a Q of the observation at t. The value after
    step t is values[t + 1], except at a time limit, where the next row starts a new episode. Such a
    step has no target and is masked, and the return of the step before bootstraps from its value.
    """
    truncated = truncated & ~terminated
    ends = truncated[:-1] | truncated[1:]
    returns = lambda_returns(rewards[:-1], values[1:], terminated[:-1], ends, gamma, td_lambda)
    return returns, ~truncated[:-1]


# --- Environment ----------------------------------------------------------------------------------


class CraftaxState(NamedTuple):
    """States of the worlds, with returns and lengths of the episodes so far."""

    env_state: Any
    returns: jax.Array
    lengths: jax.Array


def make_env(config: Config, num_envs: int):
    """Functions reset(key), step(key, state, action) of num_envs environments, and actions.

    reset returns (obs, state), and step returns what gymnax's does. Its info has returned_episode,
    returned_episode_returns, returned_episode_lengths and, for Craftax, achievements of episodes
    that ended. Raises ValueError for an unknown id or parameter, or an environment that cannot be
    trained on.
    """
    return (make_craftax if config.env_id in CRAFTAX else make_gymnax)(config, num_envs)


def change_params(params, changes: tuple[str, ...]):
    """The parameters with changes such as "name=number"; raises ValueError for an invalid one."""
    names = [field.name for field in dataclasses.fields(params)]
    for text in changes:
        name, _, number = text.partition("=")
        if name not in names or not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?(e-?\d+)?", number):
            takes = f"name=number, with a name among {', '.join(names)}"
            raise ValueError(f"--env-params is {text}; it takes {takes}")
        old, new = getattr(params, name), json.loads(number)
        if type(old) is int and old > 0 and not (type(new) is int and new > 0):
            raise ValueError(f"--env-params is {text}; {name} is a count, it takes integers from 1")
        params = params.replace(**{name: new})
    return params


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


def make_gymnax(config: Config, num_envs: int):
    """make_env for gymnax."""
    env_id = config.env_id
    try:  # not at the top: it takes seconds, and starts JAX before the devices are chosen
        import gymnax
        from gymnax.wrappers import FlattenObservationWrapper, LogWrapper
    except ImportError as error:
        needs = "which needs gymnax (pip install gymnax)"
        raise ValueError(f"--env-id is {env_id}, {needs}: {error}") from error
    if env_id not in gymnax.registered_envs:
        known = ", ".join((*CRAFTAX, *gymnax.registered_envs))
        raise ValueError(f"--env-id is {env_id}; it takes one of {known}")
    env, params = gymnax.make(env_id)
    params = change_params(params, config.env_params)
    spaces = env.observation_space(params), env.action_space(params)
    spaces = [type(space).__name__ for space in spaces]
    if spaces != ["Box", "Discrete"]:
        takes = "it takes Box observations and Discrete actions"
        raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; {takes}")
    check_env(env_id, env, params, env.reset, env.step)
    env = LogWrapper(FlattenObservationWrapper(env))

    def reset(key):
        return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, num_envs), params)

    def step(key, state, action):
        return jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            jax.random.split(key, num_envs), state, action, params
        )

    return reset, step, env.action_space(params).n


def make_craftax(config: Config, num_envs: int):
    """make_env for Craftax, with optimistic resets, as generating a world is expensive.

    If any episode ends in a step, num_envs / reset_ratio worlds are generated. Environments whose
    episode ended take them in order, and share them if there are too few.
    """
    try:
        from craftax.craftax_env import make_craftax_env_from_name
    except ImportError as error:
        needs = "which needs craftax (pip install craftax)"
        raise ValueError(f"--env-id is {config.env_id}, {needs}: {error}") from error

    if num_envs % config.reset_ratio:
        counts = f"--num-envs {config.num_envs} and --eval-episodes {config.eval_episodes}"
        raise ValueError(f"--reset-ratio is {config.reset_ratio}; it must divide {counts}")
    env = make_craftax_env_from_name(config.env_id, auto_reset=False)
    params = change_params(env.default_params, config.env_params)
    num_fresh = num_envs // config.reset_ratio

    def fresh(key, number):
        return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, number), params)

    def reset(key):
        obs, env_state = fresh(key, num_envs)
        zeros = jnp.zeros(num_envs, jnp.float32)
        return obs, CraftaxState(env_state, zeros, zeros.astype(jnp.int32))

    def step(key, state, action):
        step_key, reset_key = jax.random.split(key)
        keys = jax.random.split(step_key, num_envs)
        obs, env_state, reward, done, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            keys, state.env_state, action, params
        )
        truncated = done & (env_state.timestep >= params.max_timesteps)
        returns, lengths = state.returns + reward, state.lengths + 1
        achievements = {
            name: value for name, value in info.items() if name.startswith("Achievements/")
        }
        episodes = {
            "returned_episode": done,
            "returned_episode_returns": returns,
            "returned_episode_lengths": lengths,
        }

        def reset_ended(*states):
            slot = (jnp.cumsum(done) - 1) % num_fresh

            def where_done(new, old):
                return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new[slot], old)

            return jax.tree.map(where_done, fresh(reset_key, num_fresh), states)

        # With few environments, most steps end no episode and need no new world.
        obs, env_state = jax.lax.cond(
            done.any(), reset_ended, lambda *states: states, obs, env_state
        )
        state = CraftaxState(env_state, jnp.where(done, 0, returns), jnp.where(done, 0, lengths))
        return obs, state, reward, done & ~truncated, truncated, episodes | achievements

    return reset, step, env.action_space(params).n


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


class Memory(NamedTuple):
    """What the network carries from step to step, per environment."""

    hidden: Any  # (c, h) of the LSTM, [num_envs, hidden_size] each
    last_action: jax.Array
    clear: jax.Array  # whether obs is the first of an episode, before which there is no memory


class TrainState(NamedTuple):
    """The complete training state; saved, it is a checkpoint."""

    variables: Any  # flax variables: params and batch_stats
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [num_envs, obs_dim]
    memory: Memory
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far

    params = property(lambda self: self.variables, doc="The variables of a trained agent.")


class Transition(NamedTuple):
    """One step of all environments; a rollout adds a leading axis of num_steps."""

    obs: jax.Array
    last_action: jax.Array
    clear: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array


def split_envs(x: jax.Array, axis: int) -> jax.Array:
    """Divides the axis of environments over devices, if one seed has several of them.

    Without it, the compiler gives every device all of a minibatch, gathered along this axis.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get("envs", 1)
    if devices == 1 or x.shape[axis] % devices:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, "envs"))


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
    env_reset, env_step, num_actions = make_env(config, config.num_envs)
    eval_env = make_env(config, config.eval_episodes) if config.eval_interval else None
    network = QNetwork(num_actions, config)

    def blank(num_envs):
        # Two arrays, so that a donated state holds no buffer twice.
        hidden = tuple(jnp.zeros((num_envs, config.hidden_size), jnp.float32) for _ in range(2))
        return Memory(hidden, jnp.zeros(num_envs, jnp.int32), jnp.ones(num_envs, bool))

    def act(variables, memory, obs):
        """One step of the network: the LSTM's new state, and values [num_envs, num_actions]."""
        inputs = jax.tree.map(lambda x: x[None], (obs, memory.last_action, memory.clear))
        hidden, q = network.apply(variables, memory.hidden, *inputs)
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
        obs, env_state = env_reset(reset_key)
        memory = blank(config.num_envs)
        variables = network.init(
            params_key, memory.hidden, obs[None], memory.last_action[None], memory.clear[None]
        )
        opt_state = optimizer.init(ravel_pytree(variables["params"])[0])
        return TrainState(variables, opt_state, env_state, obs, memory, key, jnp.int32(0))

    def collect(state, epsilon, key):
        def step(carry, keys):
            obs, memory, env_state = carry
            hidden, q = act(state.variables, memory, obs)
            action = epsilon_greedy(keys[0], q, epsilon)
            next_obs, env_state, reward, terminated, truncated, info = env_step(
                keys[1], env_state, action
            )
            inputs = obs, memory.last_action, memory.clear
            transition = Transition(*inputs, action, reward, terminated, truncated)
            # As in PureJaxQL, an episode starts with the last action of the previous one.
            memory = Memory(hidden, action, terminated | truncated)
            kept = {x: y for x, y in info.items() if x.startswith(("returned", "Achievements"))}
            return (next_obs, memory, env_state), (transition, kept)

        keys = jax.random.split(key, (config.num_steps, 2))
        carry = state.obs, state.memory, state.env_state
        (obs, memory, env_state), (rollout, info) = scan_packed(step, carry, keys)
        return state._replace(obs=obs, memory=memory, env_state=env_state), rollout, info

    def loss(params, variables, hidden, rollout):
        (_, q), updated = network.apply(
            variables | {"params": params},
            hidden,
            rollout.obs,
            rollout.last_action,
            rollout.clear,
            train=True,
            mutable=["batch_stats"],
        )
        terminated, truncated = rollout.terminated, rollout.truncated
        if not config.bootstrap_on_truncation:
            terminated, truncated = terminated | truncated, jnp.zeros_like(truncated)
        rewards = (config.reward_scale * rollout.reward).astype(jnp.float32)
        values = jax.lax.stop_gradient(q.max(-1))
        ends = terminated, truncated
        target, mask = rollout_targets(rewards, values, *ends, config.gamma, config.td_lambda)
        chosen = jax.nn.one_hot(rollout.action[:-1], q.shape[-1], dtype=bool)
        q_taken = q[:-1].sum(-1, where=chosen)
        squares = (mask * jnp.square(q_taken - target)).sum() / jnp.maximum(mask.sum(), 1)
        return 0.5 * squares, (q_taken.mean(), updated)

    def learn(state, hidden, rollout, key):
        def gradient_step(carry, inputs):
            variables, opt_state = carry
            index, rate = inputs
            minibatch = jax.tree.map(lambda x: split_envs(x[:, index], axis=1), rollout)
            initial = jax.tree.map(lambda x: split_envs(x[index], axis=0), hidden)
            params, grad = unflatten(variables["params"]), jax.value_and_grad(loss, has_aux=True)
            (td_loss, (q, updated)), grads = grad(params, variables, initial, minibatch)
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
        """Mean return and length of greedy episodes, each to its end or to eval_steps."""
        reset, env_step, _ = eval_env

        def step(carry, t):
            obs, memory, env_state, results, finished = carry
            hidden, q = act(state.variables, memory, obs)
            action = q.argmax(-1).astype(jnp.int32)
            key = jax.random.fold_in(step_key, t)
            obs, env_state, reward, terminated, truncated, _ = env_step(key, env_state, action)
            memory = Memory(hidden, action, terminated | truncated)
            result = jnp.stack([reward, jnp.ones_like(reward)], axis=-1).astype(jnp.float32)
            results += jnp.where(finished[:, None], 0, result)
            finished |= memory.clear | (t + 1 >= config.eval_steps)
            return (obs, memory, env_state, results, finished), None

        def eight_steps(carry):  # between two looks at finished, for which a GPU waits
            t, carry = carry
            return t + 8, scan_packed(step, carry, t + jnp.arange(8))[0]

        reset_key, step_key = jax.random.split(key)
        obs, env_state = reset(reset_key)
        results = jnp.zeros((config.eval_episodes, 2), jnp.float32)
        finished, memory = jnp.zeros(config.eval_episodes, bool), blank(config.eval_episodes)
        carry = 0, (obs, memory, env_state, results, finished)
        _, carry = jax.lax.while_loop(lambda carry: ~carry[1][-1].all(), eight_steps, carry)
        return carry[3].mean(axis=0)

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(
            jax.random.fold_in(state.key, number), 3
        )
        decayed = jnp.minimum(number / jnp.maximum(config.epsilon_decay * config.num_updates, 1), 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed
        epsilon = jnp.float32(epsilon)

        hidden = state.memory.hidden
        state, rollout, info = collect(state, epsilon, collect_key)
        state, losses = learn(state, hidden, rollout, learn_key)

        ended = info["returned_episode"]
        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": info["returned_episode_returns"].mean(where=ended),
            "charts/episodic_length": info["returned_episode_lengths"].mean(where=ended),
            "charts/epsilon": epsilon,
            "charts/learning_rate": learning_rate(number, 0),
        }
        for name, value in info.items():
            if name.startswith("Achievements/"):  # 100 if unlocked, when an episode ends
                metrics[name.replace("A", "a", 1)] = value.mean(where=ended) / 100
        if config.eval_interval:
            due = ((number + 1) % config.eval_interval == 0) | (number + 1 == config.num_updates)
            nothing = jnp.full(2, jnp.nan, jnp.float32)
            results = jax.lax.cond(due, evaluate, lambda *_: nothing, state, eval_key)
            metrics["eval/episodic_return"], metrics["eval/episodic_length"] = results
        for kind in ("charts", "eval") if config.env_id in CRAFTAX else ():
            if f"{kind}/episodic_return" in metrics:
                percent = 100 / CRAFTAX[config.env_id] * metrics[f"{kind}/episodic_return"]
                metrics[f"{kind}/percent_of_maximum"] = percent
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
    """The mesh for seeds and environments, with the same number of devices on every host."""
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
    devices = np.array([jax.local_devices(host) for host in range(hosts)])
    # Devices left over by the seeds split each seed's environments.
    for per_host in range(local, 0, -1):
        for_seeds = math.gcd(config.num_seeds, hosts * per_host)
        for_envs = hosts * per_host // for_seeds
        if config.num_envs % for_envs == 0:
            return Mesh(devices[:, :per_host].reshape(for_seeds, for_envs), ("seeds", "envs"))
    raise ValueError(f"--num-envs is {config.num_envs}, not a multiple of the {hosts} hosts")


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
    on_devices = functools.partial(on_devices, axis_names={"seeds"})  # XLA shards environments
    init = on_devices(init, in_specs=by_seed)
    run_chunk = on_devices(run_chunk, in_specs=(everywhere, by_seed))
    # Metrics are gathered only across hosts: XLA aborts when a CPU device waits long for another.
    gathered = NamedSharding(mesh, everywhere if jax.process_count() > 1 else by_seed)
    of_env = {name: PartitionSpec("seeds", "envs") for name in ("env_state", "obs", "memory")}
    layout = [NamedSharding(mesh, of_env.get(name, by_seed)) for name in TrainState._fields]
    layout = TrainState(*layout)
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
