"""PQN with lambda-returns and the Nature network, on the Atari games of ale-py.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025,
arXiv 2407.04811; the network: Mnih et al., 2015, doi 10.1038/nature14236. The algorithm is the same
as in pqn_minatar.py, but the emulators run on the CPU, called from inside the compiled program.
Learning runs on a CPU or an NVIDIA GPU, for which ale-py has calls; only the CPU has been tried.
The emulators' state is outside JAX: one process trains one seed, a resumed run starts new games.
ale-py is licensed under the GPL, version 2.

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
from ale_py import ALEInterface, roms
from ale_py.vector_env import AtariVectorEnv
from flax import serialization
from flax.linen.initializers import he_normal, zeros_init
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the paper's for Atari: 50 million steps of 4 frames."""

    seed: int = 0
    """Seed of the run."""
    num_seeds: int = 1
    """Always 1, as emulators cannot be batched by JAX: start a process for each further --seed."""
    total_timesteps: int = 50_000_000
    """Total environment steps over all environments, of frame_skip frames each; rounded down to
    whole updates."""

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
    """Step limit of an evaluation; unfinished games count their return so far. A greedy policy may
    play on for ever: 4500 steps are 5 minutes of play, 27000 the usual half hour."""

    runs_dir: str = "runs"
    """Where run folders go."""
    resume: str | None = None
    """Run folder to resume, from its last checkpoint and with its flags."""
    checkpoint_interval: float = 60.0
    """Seconds between checkpoints; 0 for one after every chunk of updates."""
    distributed: bool = False
    """Of no use here: it needs a seed for each host, and a process trains one."""
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

    def start(info):
        return info["frame_number"] - info["episode_frame_number"]

    def reset(handle, key):
        seeds = jax.random.bits(key, (num_envs,), jnp.uint32) >> 1
        handle, (obs, info) = ale_reset(handle, seeds)
        zeros = jnp.zeros(num_envs, jnp.int32)
        return Games(handle, obs, start(info), zeros.astype(jnp.float32), zeros)

    def step(games, action):
        handle, (obs, reward, terminated, truncated, info) = ale_step(games.handle, action)
        is_step = start(info) == games.first_frame  # else, a new game has begun
        episode = {
            "returned_episode": ~is_step,
            "returned_episode_returns": games.episode_return,
            "returned_episode_lengths": games.episode_length,
        }
        episode_return = jnp.where(is_step, games.episode_return + reward, 0)
        episode_length = jnp.where(is_step, games.episode_length + 1, 0)
        games = Games(handle, obs, start(info), episode_return, episode_length)
        return games, (reward, terminated, truncated, is_step, episode)

    handle = np.frombuffer(env.ale.handle(), np.uint8)
    return reset, step, handle, env.single_action_space.n


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The complete training state, but for the emulators; saved, it is a checkpoint."""

    variables: Any  # flax variables: params and, for batch norm, batch_stats
    opt_state: Any
    games: Games
    eval_handle: jax.Array  # [8]: the address of the emulators for evaluation
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
    is_step: jax.Array  # False where the environment started a new game instead
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
        return TrainState(variables, opt_state, games, jnp.array(eval_handle), key, jnp.int32(0))

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

    def loss(params, variables, obs, action, is_step, target):
        q, updated = network.apply(
            variables | {"params": params}, obs, train=True, mutable=["batch_stats"]
        )
        chosen = q.sum(-1, where=jax.nn.one_hot(action, q.shape[-1], dtype=bool))
        num_transitions = jnp.maximum(is_step.sum(), 1)  # none, in a small minibatch, is no NaN
        td_loss = 0.5 * jnp.square(chosen - target).sum(where=is_step) / num_transitions
        return td_loss, (chosen.sum(where=is_step) / num_transitions, updated)

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

        batch = rollout.obs, rollout.action, rollout.is_step, targets(state, rollout)
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
        """Mean score of eval_episodes greedy games, each from reset to its end or to eval_steps."""

        def unfinished(carry):
            t, *_, finished = carry
            return (t < config.eval_steps) & ~finished.all()

        def step(carry):
            t, games, returns, finished = carry
            action = network.apply(state.variables, games.obs).argmax(-1).astype(jnp.int32)
            games, (reward, terminated, truncated, *_) = eval_step(games, action)
            returns += jnp.where(finished, 0, reward).astype(jnp.float32)
            return t + 1, games, returns, finished | terminated | truncated

        games = eval_reset(state.eval_handle, key)
        zeros = jnp.zeros(config.eval_episodes, jnp.float32)
        *_, returns, _ = jax.lax.while_loop(unfinished, step, (0, games, zeros, zeros > 0))
        return returns.mean()

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
THREADED_BATCH = 1
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
    """Jitted init(update, seeds) -> states, run_chunk(update, states) -> (states, metrics)."""
    # Equal chunks of one update or up to 8,192 steps, so that one program runs them all.
    max_chunk = max(1, 2**13 // (config.steps_per_update * config.num_seeds))
    chunk_size = max(n for n in range(1, max_chunk + 1) if config.num_updates % n == 0)
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["seeds"], []))

    def init(update, seed):
        return train.init(jax.random.key(seed + update))  # a resumed run starts other games

    def run_chunk(update, state):
        return train(state=state._replace(update=update), num_updates=chunk_size)

    def over_seeds(function, out_shardings, **options):
        def on_device(update, inputs):
            # The update number is unbatched, so that evaluation stays a branch.
            one_seed = functools.partial(function, update)
            return jax.lax.map(one_seed, inputs)  # emulators cannot be vmapped

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


def restore(checkpoints: ocp.CheckpointManager, update: int, fresh: TrainState):
    """Loads the states after an update, with fresh games, and the seconds spent so far; fails if
    unreadable."""
    args = {"states": ocp.args.StandardRestore(fresh), "seconds": ocp.args.JsonRestore()}
    try:
        saved = checkpoints.restore(update, args=ocp.args.Composite(**args))
    except Exception as error:  # orbax raises a bare Exception for a damaged array
        fail(f"--resume: {checkpoints.directory} cannot be read: {str(error)[:200]}")
    # The emulators of the saved games are gone; their address must not be used again.
    states = saved.states._replace(games=fresh.games, eval_handle=fresh.eval_handle)
    return states, saved.seconds


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
        since = f", from update {update} with new games" if update else ""
        say(f"{SCRIPT.stem}: {title}, in {run_dir}{since}; compiling takes seconds to a minute")
        train = make_train(config)
        started = time.monotonic()
        init, run_chunk = make_programs(config, train, mesh)
        shapes = init.eval_shape(0, seeds)
        run_chunk = run_chunk.lower(np.int32(0), shapes)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        checkpoints = ocp.CheckpointManager(run_dir.resolve() / "checkpoints", options=options)
        if not is_new:
            states, seconds = restore(checkpoints, update, init(update, seeds))
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
