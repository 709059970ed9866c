"""PQN with lambda-returns and the Nature network, on the Atari games of ale-py.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025,
arXiv 2407.04811; the network: Mnih et al., 2015, doi 10.1038/nature14236. The algorithm is the same
as in pqn_minatar.py, but the emulators run on the CPU, called from inside the compiled program.
Learning runs on a CPU or an NVIDIA GPU, for which ale-py has calls; only the CPU has been tried.
The emulators' state is outside JAX: one process trains one seed, a resumed run starts new games.
ale-py is licensed under the GPL, version 2.

Equations, details, metrics and results: docs/pqn.md

    python pqn_atari.py --env-id breakout           # trains, plots, saves; --help lists the flags

    from pqn_atari import Config, make_train        # as a library: a function of a key, not vmapped
    state, metrics = jax.jit(make_train(Config()))(jax.random.key(0))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "ale-py>=0.12.1,<0.13",
#   "gymnasium>=1.1,<2", "chex>=0.1.90,<0.2", "orbax-checkpoint>=0.12,<0.13", "tyro>=1.0,<2",
#   "tqdm>=4.66,<5", "matplotlib>=3.8,<4", "pandas>=2.2,<4", "wandb>=0.31,<0.32", "numpy>=2,<3",
# ]
# ///

import contextlib
import dataclasses
import difflib
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
from flax.linen.initializers import he_normal, zeros_init
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of PureJaxQL, the code of PQN's authors, for Atari.

    Unlike there, a step that only starts a new game is masked from the loss, and a game's last
    frame is missing, as ale-py leaves it out.
    """

    seed: int = 0
    """Seed of the run."""
    num_seeds: int = 1
    """Always 1, as emulators cannot be batched by JAX: start a process for each further --seed."""
    total_timesteps: int = 50_000_000
    """Total environment steps over all environments, of frame_skip frames each, with those that
    only start a new game; rounded down to whole updates."""

    env_id: str = "pong"
    """Game, by its name in ale-py: breakout, ms_pacman, ..."""
    repeat_action_probability: float = 0.0
    """Probability of repeating the last action: 0 in the paper, 0.25 in Machado et al., 2018."""
    full_action_space: bool = False
    """Use all 18 actions, as in Machado et al., 2018, instead of those that the game uses."""
    episodic_life: bool = True
    """Treat the loss of a life as terminal in training; the game goes on. (With envpool, which the
    paper uses, no-ops and FIRE follow: here, the agent itself has to fire for the next ball.)"""
    noop_max: int = 30
    """A game starts after fewer frames than this without an action, and FIRE where it is needed."""
    frame_skip: int = 4
    """Frames per step, with the same action."""
    max_frames_in_episode: int = 108_000
    """Time limit of a game in frames: half an hour of play."""
    num_envs: int = 128
    """Parallel environments."""
    num_steps: int = 32
    """Steps per environment in a rollout."""

    learning_rate: float = 2.5e-4
    """Learning rate of RAdam."""
    anneal_lr: bool = False
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    td_lambda: float = 0.65
    """Lambda of the lambda-returns: 0 for one-step targets, 1 for Monte Carlo."""
    epsilon_start: float = 1.0
    """Initial exploration rate."""
    epsilon_finish: float = 0.001
    """Final exploration rate."""
    epsilon_decay: float = 0.1
    """Fraction of the run over which the exploration rate decays linearly."""
    num_epochs: int = 2
    """Passes over each rollout."""
    num_minibatches: int = 32
    """Minibatches per pass; must divide num_envs * num_steps."""
    max_grad_norm: float = 10.0
    """Maximum global norm of the gradients."""
    norm: Literal["layer_norm", "batch_norm", "none"] = "layer_norm"
    """Normalisation after each convolution and the hidden layer."""
    num_channels: int = 32
    """Channels of the first convolution; the second and third have twice as many."""
    hidden_size: int = 512
    """Units of the hidden layer."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxQL does."""

    eval_interval: int = 122
    """Updates between greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 8
    """Games per evaluation, each in its own environment."""
    eval_steps: int = 4500
    """Step limit of an evaluation. A greedy policy may play on for ever, so unfinished games count
    their score so far, and eval/episodic_return is too low where games take longer: 4500 steps are
    5 minutes of play, 27000 the usual half hour."""

    runs_dir: str = "runs"
    """Where run folders go."""
    resume: str | None = None
    """Run folder to resume, from its last checkpoint and with its flags."""
    checkpoint_interval: float = 60.0
    """Seconds between checkpoints; 0 for one after every chunk of updates."""
    distributed: bool = False
    """Refused: it needs a seed for each host, and a process trains one."""
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
        rollout = f"--num-envs {self.num_envs} * --num-steps {self.num_steps}"
        if self.batch_size % self.num_minibatches:
            minibatches = f"--num-minibatches is {self.num_minibatches}"
            raise ValueError(f"{minibatches}; it must divide {rollout}")
        if self.norm == "batch_norm" and self.batch_size == self.num_minibatches:
            raise ValueError("--norm batch_norm needs more than one transition per minibatch")
        if self.num_updates == 0:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, less than {rollout}")
        if self.distributed:
            raise ValueError("--distributed needs a seed for each host, and a process trains one")


# Lowest value, highest value, and the fields that they bound.
LIMITS = [
    (1, 1, "num_seeds"),
    (1, 2**31 - 1, "total_timesteps num_envs num_steps num_epochs num_minibatches frame_skip"),
    (1, 2**31 - 1, "num_channels hidden_size max_frames_in_episode eval_episodes eval_steps"),
    (0, 2**31 - 1, "seed noop_max eval_interval"),
    (0, 1, "learning_rate gamma td_lambda epsilon_start epsilon_finish epsilon_decay"),
    (0, 1, "repeat_action_probability"),
    (0, math.inf, "checkpoint_interval"),
    (1e-9, math.inf, "max_grad_norm"),
]

# --- Networks -------------------------------------------------------------------------------------


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution without padding: [..., height, width, channels] to [..., rows, cols, features].

    kernel is [size, size, channels, features]; stride divides height, width and size.
    """
    if jax.default_backend() != "cpu":
        layout = ("NHWC", "HWIO", "NHWC")
        batch = x.reshape(-1, *x.shape[-3:])
        y = jax.lax.conv_general_dilated(
            batch, kernel, (stride, stride), "VALID", dimension_numbers=layout
        )
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    # The gradient of XLA's convolution is very slow inside a scan on a CPU. The same numbers as a
    # sum of matrix products: in blocks of stride * stride pixels, the stride is 1.
    def blocks(x):
        *batch, height, width, channels = x.shape
        x = x.reshape(*batch, height // stride, stride, width // stride, stride, channels)
        return x.swapaxes(-4, -3).reshape(*batch, height // stride, width // stride, -1)

    x, size = blocks(x), kernel.shape[0] // stride
    rows, cols = (n - size + 1 for n in x.shape[-3:-1])
    kernel = blocks(kernel.reshape(*kernel.shape[:2], -1))
    kernel = kernel.reshape(size, size, x.shape[-1], -1)
    shifts = [(i, j) for i in range(size) for j in range(size)]
    return sum(x[..., i : i + rows, j : j + cols, :] @ kernel[i, j] for i, j in shifts)


class Conv(nn.Module):
    """A convolution without padding, of strided square patches."""

    features: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.size, self.size, x.shape[-1], self.features
        kernel = self.param("kernel", he_normal(), shape, jnp.float32)
        bias = self.param("bias", zeros_init(), (self.features,), jnp.float32)
        return convolve(x, kernel, self.stride) + bias


class QNetwork(nn.Module):
    """Three convolutions, hidden layer, output: frames [..., 4, 84, 84] to [..., num_actions]."""

    num_actions: int
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm_relu(x):
            if self.config.norm == "layer_norm":
                # On a GPU, the variance in two passes is one kernel, but its gradient is more.
                x = nn.LayerNorm(use_fast_variance=train)(x)
            elif self.config.norm == "batch_norm":
                x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.relu(x)

        channels = self.config.num_channels
        x = jnp.moveaxis(x, -3, -1).astype(jnp.float32) / 255
        x = norm_relu(Conv(channels, size=8, stride=4)(x))
        x = norm_relu(Conv(2 * channels, size=4, stride=2)(x))
        x = norm_relu(Conv(2 * channels, size=3, stride=1)(x))
        x = x.reshape(*x.shape[:-3], -1)
        x = norm_relu(nn.Dense(self.config.hidden_size, kernel_init=he_normal())(x))
        return nn.Dense(self.num_actions)(x)


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


# --- Environment ----------------------------------------------------------------------------------


class Games(NamedTuple):
    """What JAX holds of the games; the emulators themselves live outside it, in ale-py."""

    handle: jax.Array  # [8]: the emulators' address in this process
    obs: jax.Array  # [num_envs, 4, 84, 84]: the last four frames
    first_frame: jax.Array  # [num_envs]: the emulator's frame count when the game began
    episode_return: jax.Array  # [num_envs]: the score so far
    episode_length: jax.Array  # [num_envs]: the steps so far


EMULATORS = []  # never freed, as a program or a state may still hold their address


def make_env(config: Config, num_envs: int, episodic_life: bool):
    """Games as functions reset(handle, key) -> games and step(games, action) -> (games, outcome).

    Also returns the handle of the emulators and the number of actions. outcome is the reward, if
    the step ended an episode (terminated, truncated), if there was a step at all, and info. In
    ale-py, the step after a game's end ignores the action: it starts the next game. So games.obs is
    where a step led even at a game's end (but for its very last frame, which ale-py leaves out).
    Raises ValueError for an unknown game.
    """
    try:  # not at the top: --help works without it
        from ale_py import ALEInterface, roms
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as error:
        needs = "which needs ale-py (pip install -r requirements-atari.txt)"
        raise ValueError(f"--env-id is {config.env_id}, {needs}: {error}") from error
    # Of other games, ale-py would end the process.
    games = [x for x in roms.get_all_rom_ids() if ALEInterface.isSupportedROM(roms.get_rom_path(x))]
    if config.env_id not in games:
        close = difflib.get_close_matches(config.env_id.lower(), games, n=5, cutoff=0.5)
        names = f"such as {', '.join(close or ['pong', 'breakout', 'ms_pacman'])}"
        raise ValueError(f"--env-id is {config.env_id}; it takes a game of ale-py, {names}")
    env = AtariVectorEnv(
        config.env_id,
        num_envs,
        frameskip=config.frame_skip,
        max_num_frames_per_episode=config.max_frames_in_episode,
        life_loss_info=episodic_life,  # ale-py's own episodic_life would start a new game
        reward_clipping=False,
        noop_max=config.noop_max,
        repeat_action_probability=config.repeat_action_probability,
        full_action_space=config.full_action_space,
    )
    EMULATORS.append(env)
    _, ale_reset, ale_step = env.xla()

    def first_frame(info):
        return info["frame_number"] - info["episode_frame_number"]

    def reset(handle, key):
        seeds = jax.random.bits(key, (num_envs,), jnp.uint32) >> 1
        handle, (obs, info) = ale_reset(handle, seeds)
        zeros = jnp.zeros(num_envs, jnp.int32)
        return Games(handle, obs, first_frame(info), zeros.astype(jnp.float32), zeros)

    def step(games, action):
        handle, (obs, reward, terminated, truncated, info) = ale_step(games.handle, action)
        is_reset = first_frame(info) != games.first_frame  # a new game has begun
        episode = {
            "returned_episode": is_reset,
            "returned_episode_returns": games.episode_return,
            "returned_episode_lengths": games.episode_length,
        }
        episode_return = jnp.where(is_reset, 0, games.episode_return + reward)
        episode_length = jnp.where(is_reset, 0, games.episode_length + 1)
        games = Games(handle, obs, first_frame(info), episode_return, episode_length)
        return games, (reward, terminated, truncated, is_reset, episode)

    handle = np.frombuffer(env.ale.handle(), np.uint8)
    return reset, step, handle, env.single_action_space.n


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The complete training state, but for the emulators; saved, it is a checkpoint."""

    variables: Any  # flax variables: params and, for batch norm, batch_stats
    opt_state: Any
    games: Games
    eval_handle: jax.Array | None  # [8]: the address of the emulators for evaluation, if any
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far

    params = property(lambda self: self.variables, doc="The variables of a trained agent.")


class Transition(NamedTuple):
    """One step of all environments; a rollout adds a leading axis of num_steps.

    The observation after a step, before any reset, is the next step's obs.
    """

    obs: jax.Array
    action: jax.Array
    value: jax.Array  # max_a Q(obs, a)
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    is_reset: jax.Array  # whether the step only started a game: there is nothing to learn
    info: dict[str, jax.Array]  # returned_episode, returned_episode_returns, ..._lengths


def make_train(config: Config):
    """PQN as a function train(key=None, state=None, num_updates=...) -> (TrainState, metrics).

    train starts from train.init(key) or continues from a state, for config.num_updates by default.
    metrics is a flat dict of arrays [num_updates]; returns are NaN for updates in which no game
    ended, and eval/* for updates without an evaluation. train can be jitted, but not vmapped over
    keys. The emulators are those of this call of make_train, outside the state, and kept until the
    process ends, about 1 MiB each: only the last state continues their games, train.init(key)
    starts new ones, and a state from a checkpoint needs new games:
    state._replace(games=new.games, eval_handle=new.eval_handle), new = train.init(key).
    Raises ValueError for an unknown game.
    """
    env_reset, env_step, env_handle, num_actions = make_env(
        config, config.num_envs, config.episodic_life
    )
    if config.eval_interval:
        eval_reset, eval_step, eval_handle, _ = make_env(config, config.eval_episodes, False)
    network = QNetwork(num_actions, config)

    def learning_rate(number, step):
        """The rate at a gradient step of an update; if annealed, it stays zero after the run."""
        progress = (number + step / config.num_gradient_steps) / config.num_updates
        remaining = 1 - config.anneal_lr * jnp.minimum(progress, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    optimizer = optax.chain(clip, optax.scale_by_radam())

    def init(key):
        key, params_key, reset_key = jax.random.split(key, 3)
        games = env_reset(env_handle, reset_key)
        variables = network.init(params_key, games.obs)
        opt_state = optimizer.init(ravel_pytree(variables["params"])[0])
        handle = jnp.array(eval_handle) if config.eval_interval else None
        return TrainState(variables, opt_state, games, handle, key, jnp.int32(0))

    def collect(state, epsilon, key):
        def step(games, key):
            obs, q_values = games.obs, network.apply(state.variables, games.obs)
            action = epsilon_greedy(key, q_values, epsilon)
            games, outcome = env_step(games, action)
            return games, Transition(obs, action, q_values.max(-1), *outcome)

        keys = jax.random.split(key, config.num_steps)
        games, rollout = jax.lax.scan(step, state.games, keys)
        return state._replace(games=games), rollout

    def targets(state, rollout):
        # The value after step t is value[t + 1], also where the step ended a game.
        last_value = network.apply(state.variables, state.games.obs).max(-1)
        next_values = jnp.concatenate([rollout.value[1:], last_value[None]])
        terminated, truncated = rollout.terminated, rollout.truncated
        if not config.bootstrap_on_truncation:
            terminated |= truncated
        rewards = jnp.sign(rollout.reward).astype(jnp.float32)
        ends = terminated, truncated
        return lambda_returns(rewards, next_values, *ends, config.gamma, config.td_lambda)

    def loss(params, variables, obs, action, mask, target):
        q, updated = network.apply(
            variables | {"params": params}, obs, train=True, mutable=["batch_stats"]
        )
        chosen = q.sum(-1, where=jax.nn.one_hot(action, q.shape[-1], dtype=bool))
        num_transitions = jnp.maximum(mask.sum(), 1)  # none, in a small minibatch, is no NaN
        td_loss = 0.5 * jnp.square(chosen - target).sum(where=mask) / num_transitions
        return td_loss, (chosen.sum(where=mask) / num_transitions, updated)

    def learn(state, rollout, key):
        def gradient_step(carry, inputs):
            variables, opt_state = carry
            index, rate = inputs
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grad = jax.value_and_grad(loss, has_aux=True)
            params = unflatten(variables["params"])
            (td_loss, (q, updated)), grads = grad(params, variables, *minibatch)
            grads, _ = ravel_pytree(grads)
            updates, opt_state = optimizer.update(grads, opt_state)
            variables |= updated | {"params": variables["params"] - rate * updates}
            return (variables, opt_state), jnp.stack([td_loss, q, optax.tree.norm(grads)])

        batch = rollout.obs, rollout.action, ~rollout.is_reset, targets(state, rollout)
        batch = jax.tree.map(lambda x: x.reshape(config.batch_size, *x.shape[2:]), batch)
        # Sorting random bits gives a random permutation: one argsort shuffles for all epochs.
        bits = jax.random.bits(key, (config.num_epochs, config.batch_size), jnp.uint32)
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
        """Mean score and length of greedy games, each from reset to its end or to eval_steps."""

        def unfinished(carry):
            t, *_, finished = carry
            return (t < config.eval_steps) & ~finished.all()

        def step(carry):
            t, games, results, finished = carry
            action = network.apply(state.variables, games.obs).argmax(-1).astype(jnp.int32)
            games, (reward, terminated, truncated, *_) = eval_step(games, action)
            result = jnp.stack([reward, jnp.ones_like(reward)]).astype(jnp.float32)
            results += jnp.where(finished, 0, result)
            return t + 1, games, results, finished | terminated | truncated

        games = eval_reset(state.eval_handle, key)
        results = jnp.zeros((2, config.eval_episodes), jnp.float32)
        carry = 0, games, results, jnp.zeros(config.eval_episodes, bool)
        return jax.lax.while_loop(unfinished, step, carry)[2].mean(axis=1)

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(
            jax.random.fold_in(state.key, number), 3
        )
        decayed = jnp.minimum(number / jnp.maximum(config.epsilon_decay * config.num_updates, 1), 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed
        epsilon = jnp.float32(epsilon)

        state, rollout = collect(state, epsilon, collect_key)
        state, losses = learn(state, rollout, learn_key)

        episodes, ended = rollout.info, rollout.info["returned_episode"]
        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": episodes["returned_episode_returns"].mean(where=ended),
            "charts/episodic_length": episodes["returned_episode_lengths"].mean(where=ended),
            "charts/epsilon": epsilon,
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
THREADED_BATCH = 1
# Flags that may change on --resume, as they do not affect the results.
FREE_FLAGS = "distributed checkpoint_interval wandb_mode wandb_project wandb_entity wandb_tags"
# The returns that are drawn and summarised.
RETURNS = {"charts": "while exploring", "eval": "greedy (games cut at --eval-steps)"}


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
    # One program runs all chunks, of up to 8,192 steps; the last may be shorter.
    max_chunk = max(1, 2**13 // (config.steps_per_update * config.num_seeds))
    chunk_size = math.ceil(config.num_updates / math.ceil(config.num_updates / max_chunk))

    def init(seeds):
        return jax.lax.map(lambda seed: train.init(jax.random.key(seed)), seeds)

    train_once = jax.jit(functools.partial(train, num_updates=1))

    def run(update, state):
        def step(i, carry):
            state, metrics = carry
            state, row = train_once(state=state._replace(update=update + i))
            write = functools.partial(jax.lax.dynamic_update_slice, start_indices=(i,))
            return state, jax.tree.map(write, metrics, row)

        row = jax.eval_shape(train_once, state=state)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros(chunk_size, x.dtype), row)
        num_left = jnp.minimum(chunk_size, config.num_updates - update)
        return jax.lax.fori_loop(0, num_left, step, (state, metrics))

    def run_chunk(update, states):
        # Not vmapped: emulators take no batch of seeds, and evaluation stays a branch.
        return jax.lax.map(functools.partial(run, update), states)

    everywhere, by_seed = PartitionSpec(), PartitionSpec("seeds")
    on_devices = functools.partial(jax.shard_map, mesh=mesh, out_specs=by_seed, check_vma=False)
    init = on_devices(init, in_specs=by_seed)
    run_chunk = on_devices(run_chunk, in_specs=(everywhere, by_seed))
    # Metrics are gathered only across hosts: XLA aborts when a CPU device waits long for another.
    layout = NamedSharding(mesh, by_seed)
    gathered = NamedSharding(mesh, everywhere) if jax.process_count() > 1 else layout
    run_chunk = jax.jit(run_chunk, out_shardings=(layout, gathered), donate_argnums=1)
    return jax.jit(init, out_shardings=layout), run_chunk


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


def restore(config: Config, run_dir: Path, checkpoints, update: int, fresh):
    """The states and seconds of a checkpoint; drops from metrics.csv what it does not cover.

    Its games are gone: the states get fresh ones.
    """
    csv, temporary = run_dir / "metrics.csv", run_dir / "metrics.tmp"
    try:
        states, seconds = checkpoints.restore(update, args=ocp.args.StandardRestore(fresh))
        rows = csv.read_text().splitlines(keepends=True)[: 1 + update * config.num_seeds]
        if len(rows) < 1 + update * config.num_seeds:
            raise ValueError("metrics.csv lacks rows")
    except Exception as error:  # orbax raises a bare Exception for a damaged array
        raise ValueError(f"--resume: {run_dir} is damaged: {str(error)[:200]}") from error
    if jax.process_index() == 0:
        temporary.write_text("".join(rows))
        temporary.replace(csv)
        (run_dir / "metadata.json").unlink(missing_ok=True)
    games, eval_handle = fresh[0].games, fresh[0].eval_handle
    return states._replace(games=games, eval_handle=eval_handle), seconds


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
    title = f"{config.env_id}{' with new games' if update else ''}, 1 seed on {device}"
    say(f"{SCRIPT.stem}: {title}, in {run_dir}; compiling takes seconds to a minute")
    train = make_train(config)
    init, run_chunk = make_programs(config, train, mesh)
    wandb_runs, checkpoints = start_run(config, run_dir, stack)
    compile_start, seconds = time.monotonic(), {"compile_seconds": 0.0, "run_seconds": 0.0}
    seeds = config.seed + np.arange(config.num_seeds)
    shapes = init.eval_shape(seeds)
    if update:
        fresh = init(seeds + update), seconds  # a resumed run starts other games
        states, seconds = restore(config, run_dir, checkpoints, update, fresh)
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
