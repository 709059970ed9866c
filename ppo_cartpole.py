"""PPO with clipping, on any gymnax environment with Box observations and Discrete actions.

Proximal Policy Optimisation: Schulman et al., 2017, arXiv 1707.06347, with the details of CleanRL's
ppo.py, as in PureJaxRL (Lu et al., 2022). Unlike PQN, it learns a policy, with a value function as
baseline.

Equations, details, metrics and results: docs/ppo.md

    python ppo_cartpole.py --num-seeds 8            # trains, plots, saves; --help lists the flags

    from ppo_cartpole import Config, make_train     # as a library: a pure function of a key
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

# --- Configuration --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of CleanRL's ppo.py for CartPole-v1."""

    seed: int = 0
    """First seed; run i uses seed + i and does not depend on num_seeds."""
    num_seeds: int = 1
    """Independent runs trained in parallel, spread over all devices."""
    total_timesteps: int = 500_000
    """Total environment steps per seed, over all environments; rounded down to whole updates."""

    env_id: str = "CartPole-v1"
    """gymnax environment id; observations are flattened."""
    num_envs: int = 4
    """Parallel environments per seed."""
    num_steps: int = 128
    """Steps per environment in a rollout."""

    learning_rate: float = 2.5e-4
    """Learning rate of Adam."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of GAE: 0 for one-step advantages, 1 for Monte Carlo."""
    num_epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 4
    """Minibatches per pass; must divide num_envs * num_steps."""
    norm_adv: bool = True
    """Normalise the advantages in each minibatch."""
    clip_coef: float = 0.2
    """Clip range of the probability ratio in the policy loss."""
    clip_vloss: bool = True
    """Clip the value loss too, with the range clip_coef."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Maximum global norm of the gradients."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation function after every hidden layer."""
    hidden_size: int = 64
    """Units per hidden layer."""
    num_layers: int = 2
    """Number of hidden layers, in the actor and in the critic."""
    bootstrap_on_truncation: bool = True
    """Bootstrap at time limits; if off, treat them as terminal, as PureJaxRL does."""

    eval_interval: int = 48
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
    (1e-9, math.inf, "max_grad_norm"),
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


# --- Equations ------------------------------------------------------------------------------------


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


# --- Environment ----------------------------------------------------------------------------------


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


def make_env(env_id: str):
    """The gymnax environment with flattened observations and an episode log, and its parameters.

    Raises ValueError for an unknown id or an environment that cannot be trained on.
    """
    try:  # not at the top: it takes seconds, and starts JAX before the devices are chosen
        import gymnax
        from gymnax.wrappers import FlattenObservationWrapper, LogWrapper
    except ImportError as error:
        needs = "which needs gymnax (pip install gymnax)"
        raise ValueError(f"--env-id is {env_id}, {needs}: {error}") from error

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
    check_env(env_id, env, params, env.reset, env.step)
    return LogWrapper(FlattenObservationWrapper(env)), params


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

    params: Any  # flax variables of "actor" and "critic"
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [num_envs, obs_dim]
    key: jax.Array  # fixed per seed; update n uses fold_in(key, n)
    update: jax.Array  # updates so far


class Transition(NamedTuple):
    """One step of all environments; a rollout adds a leading axis of num_steps."""

    obs: jax.Array
    action: jax.Array
    logits: jax.Array
    reward: jax.Array
    next_obs: jax.Array  # after the step, before any reset
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]  # returned_episode, returned_episode_returns, ..._lengths


def make_train(config: Config, value_loss=value_loss):
    """PPO as a pure function train(key=None, state=None, num_updates=...) -> (TrainState, metrics).

    train starts from train.init(key) or continues from a state, for config.num_updates by default.
    metrics is a flat dict of arrays [num_updates]; returns are NaN for updates in which no episode
    ended, and eval/* for updates without an evaluation. train can be jitted, and vmapped over keys
    or float fields of config.
    To vmap over states, give all of them one update number, as in jax.vmap(lambda state:
    train(state=state._replace(update=n)))(states), or vmap makes every update evaluate.
    Another function of the same arguments may take the place of value_loss.
    Raises ValueError for an environment that it cannot train on.
    """
    env, env_params = make_env(config.env_id)
    env_reset = jax.vmap(env.reset, in_axes=(0, None))
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    num_actions = env.action_space(env_params).n
    actor, critic = MLP(num_actions, 0.01, config), MLP(1, 1.0, config)

    def learning_rate(number):
        """The rate of an update; if annealed, it stays zero after the run."""
        progress = number / config.num_updates
        remaining = 1 - config.anneal_lr * jnp.minimum(progress, 1)
        return (config.learning_rate * remaining).astype(jnp.float32)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    optimizer = optax.chain(clip, optax.scale_by_adam(eps=1e-5))

    def init(key):
        key, actor_key, critic_key, reset_key = jax.random.split(key, 4)
        obs, env_state = env_reset(jax.random.split(reset_key, config.num_envs), env_params)
        params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
        opt_state = optimizer.init(ravel_pytree(params)[0])
        return TrainState(params, opt_state, env_state, obs, key, jnp.int32(0))

    def value(params, obs):
        return critic.apply(params["critic"], obs)[..., 0]

    def collect(state, key):
        def step(carry, inputs):
            obs, env_state = carry
            noise, keys = inputs
            logits = actor.apply(state.params["actor"], obs)
            # Gumbel-max: the argmax of logits plus Gumbel noise is a sample of their softmax.
            action = (logits + noise).argmax(-1)
            obs_after, env_state, reward, *ends, info = env_step(
                keys, env_state, action, env_params
            )
            next_obs = info.pop("final_observation")
            transition = Transition(obs, action, logits, reward, next_obs, *ends, info)
            return (obs_after, env_state), transition

        noise_key, step_key = jax.random.split(key)
        shape = config.num_steps, config.num_envs, num_actions
        noise = jax.random.gumbel(noise_key, shape, jnp.float32)
        keys = jax.random.split(step_key, (config.num_steps, config.num_envs))
        (obs, env_state), rollout = scan_packed(step, (state.obs, state.env_state), (noise, keys))
        return state._replace(obs=obs, env_state=env_state), rollout

    def log_prob(logits, action):
        chosen = jax.nn.one_hot(action, num_actions, dtype=bool)
        return jax.nn.log_softmax(logits).sum(-1, where=chosen)

    def prepare(params, rollout):
        """A flat batch of inputs of the loss; the critic evaluates the rollout in one pass."""
        values, next_values = value(params, rollout.obs), value(params, rollout.next_obs)
        terminated, truncated = rollout.terminated, rollout.truncated
        if not config.bootstrap_on_truncation:
            terminated |= truncated
        rewards = rollout.reward.astype(jnp.float32)
        outcomes = rewards, values, next_values, terminated, truncated
        advantages = gae(*outcomes, config.gamma, config.gae_lambda)
        log_probs = log_prob(rollout.logits, rollout.action)
        batch = rollout.obs, rollout.action, log_probs, values, advantages, advantages + values
        return jax.tree.map(lambda x: x.reshape(config.batch_size, *x.shape[2:]), batch)

    def loss(params, obs, action, old_log_prob, old_value, advantage, returns):
        logits = actor.apply(params["actor"], obs)
        log_ratio = log_prob(logits, action) - old_log_prob
        ratio = jnp.exp(log_ratio)
        if config.norm_adv:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = clipped_surrogate(ratio, advantage, config.clip_coef)
        value_clip = config.clip_coef if config.clip_vloss else jnp.inf
        v_loss = value_loss(value(params, obs), old_value, returns, value_clip)
        entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
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
        batch = prepare(state.params, rollout)
        # Sorting random bits gives a random permutation: one argsort shuffles for all epochs.
        bits = jax.random.bits(key, (config.num_epochs, config.batch_size), jnp.uint32)
        order = bits.argsort()
        minibatches = order.reshape(config.num_gradient_steps, -1)
        # While learning, the parameters are one vector: on a GPU, each array costs a launch a step.
        params, unflatten = ravel_pytree(state.params)
        (params, opt_state), losses = jax.lax.scan(
            gradient_step, (params, state.opt_state), minibatches
        )
        names = "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"
        losses = dict(zip(names, losses.mean(0), strict=True))
        values, returns = batch[3], batch[5]
        losses["explained_variance"] = 1 - (returns - values).var() / returns.var()
        losses = {f"losses/{name}": value for name, value in losses.items()}
        return state._replace(params=unflatten(params), opt_state=opt_state), losses

    def evaluate(state, key):
        """Mean return and length of eval_episodes greedy episodes, each from reset to end."""

        def step(carry, t):
            obs, env_state, results, finished = carry
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            action = actor.apply(state.params["actor"], obs).argmax(-1)
            obs, env_state, reward, terminated, truncated, _ = env_step(
                keys, env_state, action, env_params
            )
            result = jnp.stack([reward, jnp.ones_like(reward)], axis=-1).astype(jnp.float32)
            results += jnp.where(finished[:, None], 0, result)
            finished |= terminated | truncated
            return (obs, env_state, results, finished), None

        def eight_steps(carry):  # between two looks at finished, for which a GPU waits
            t, carry = carry
            return t + 8, scan_packed(step, carry, t + jnp.arange(8))[0]

        reset_key, step_key = jax.random.split(key)
        obs, env_state = env_reset(jax.random.split(reset_key, config.eval_episodes), env_params)
        results = jnp.zeros((config.eval_episodes, 2), jnp.float32)
        carry = 0, (obs, env_state, results, jnp.zeros(config.eval_episodes, bool))
        _, carry = jax.lax.while_loop(lambda carry: ~carry[1][-1].all(), eight_steps, carry)
        return carry[2].mean(axis=0)

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(
            jax.random.fold_in(state.key, number), 3
        )
        state, rollout = collect(state, collect_key)
        state, losses = learn(state, rollout, learn_key)

        episodes, ended = rollout.info, rollout.info["returned_episode"]
        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": episodes["returned_episode_returns"].mean(where=ended),
            "charts/episodic_length": episodes["returned_episode_lengths"].mean(where=ended),
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
