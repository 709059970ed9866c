"""PQN with an LSTM and lambda-returns, on Craftax, and on gymnax tasks that need memory.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025, arXiv 2407.04811;
Craftax: Matthews et al., ICML 2024, arXiv 2402.16801. Unlike pqn_cartpole.py, a minibatch is whole environments: the
LSTM runs over the rollout from the hidden state stored at its start, and the targets are made anew from the network
that is being trained.

    python pqn_rnn_craftax.py --num-envs 1024           # as a script: trains, plots, saves; --help lists the flags

    from pqn_rnn_craftax import Config, make_train      # as a library: a pure function from a key to results
    state, metrics = jax.jit(make_train(Config(env_id="Craftax-Classic-Symbolic-v1")))(jax.random.key(0))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "gymnax>=1.0.1,<2", "six>=1.16,<2",
#   "craftax>=1.6.1,<2", "tyro>=1.0,<2", "tqdm>=4.66,<5", "matplotlib>=3.8,<4", "wandb>=0.31,<0.32", "numpy>=2,<3"]
# ///

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
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
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

CRAFTAX = "Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1"


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the paper's for Craftax-Symbolic-v1; a run of these takes hours on a GPU."""

    seed: int = 0
    """First seed; run i has seed + i and does not depend on how many run beside it."""
    num_seeds: int = 1
    """Independent runs to train at once, spread over all devices."""
    total_timesteps: int = 1_000_000_000
    """Environment steps of a seed, over all its environments; rounded down to whole updates."""
    resume: str | None = None
    """Folder of a run to go on with from its last checkpoint; its configuration is read from there."""

    env_id: str = "Craftax-Symbolic-v1"
    """Craftax-Symbolic-v1, Craftax-Classic-Symbolic-v1, or a gymnax environment; its observations are flattened."""
    env_params: tuple[str, ...] = ()
    """Parameters of the environment to change, as memory_length=100 of MemoryChain-bsuite."""
    reset_ratio: int = 16
    """Environments that share one fresh Craftax world when they end in the same step; 1 for one each."""
    num_envs: int = 1024
    """Environments of a seed, stepped in parallel."""
    num_steps: int = 128
    """Steps of each environment in a rollout."""

    learning_rate: float = 3e-4
    """Step size of RAdam."""
    anneal_lr: bool = True
    """Let the learning rate fall linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    td_lambda: float = 0.5
    """Lambda of the returns: 0 for one-step targets, 1 for Monte Carlo."""
    epsilon_start: float = 1.0
    """Probability of a random action at first."""
    epsilon_finish: float = 0.005
    """Probability of a random action after the decay."""
    epsilon_decay: float = 0.1
    """Fraction of the run in which epsilon falls linearly."""
    num_epochs: int = 4
    """Passes over a rollout."""
    num_minibatches: int = 4
    """Gradient steps in a pass, each on whole environments; divides num_envs."""
    max_grad_norm: float = 0.5
    """Global norm that gradients are clipped to."""
    reward_scale: float = 1.0
    """Factor on the rewards that are learned from; reported returns are without it."""
    norm_input: bool = True
    """Batch renormalisation of the observations."""
    hidden_size: int = 512
    """Units of a hidden layer and of the LSTM."""
    num_layers: int = 1
    """Hidden layers before the LSTM."""
    forget_bias: float = 0.0
    """First bias of the LSTM's forget gate: log(T) lets it remember for about T steps (arXiv 1804.11188)."""
    memory: bool = True
    """Let the LSTM remember; without it, its state is cleared at every step."""
    bootstrap_on_truncation: bool = True
    """Leave the step that a time limit cut out of the loss; without it the cut is a termination, as in PureJaxQL."""

    eval_interval: int = 0
    """Updates between two greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes of an evaluation, each in an environment of its own."""
    eval_steps: int = 10_000
    """Steps after which an evaluation counts what its episodes have returned so far."""

    runs_dir: str = "runs"
    """Folder for the folders of runs."""
    checkpoint_interval: float = 60.0
    """Seconds between two checkpoints; 0 for one after every chunk of updates."""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases logging; WANDB_ENTITY says for whom."""
    wandb_project: str = "pqn"
    """Weights & Biases project."""

    batch_size = property(lambda self: self.num_envs * self.num_steps, doc="Transitions of a rollout.")
    num_gradient_steps = property(lambda self: self.num_epochs * self.num_minibatches, doc="Of an update.")
    num_updates = property(lambda self: self.total_timesteps // self.batch_size, doc="Rollouts of a run.")

    def __post_init__(self):
        """Raises ValueError, naming the flag, for a value that cannot work; traced values are not looked at."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            low = 1 if field.type is int and name not in ("seed", "eval_interval") else 0
            is_fraction = field.type is float and name not in (
                "max_grad_norm",
                "reward_scale",
                "forget_bias",
                "checkpoint_interval",
            )
            high = 1 if is_fraction else 2**31 - 1
            if field.type in (int, float) and isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it takes a number from {low} to {high}")
        batch = f"--num-envs * --num-steps, which is {self.batch_size}"
        if self.num_envs % self.num_minibatches:
            raise ValueError(
                f"--num-minibatches is {self.num_minibatches}; it takes a divisor of --num-envs, {self.num_envs}"
            )
        if self.num_steps < 2:
            raise ValueError(
                f"--num-steps is {self.num_steps}; it takes at least 2: the last step is only bootstrapped from"
            )
        if self.num_updates == 0:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}; it takes at least {batch}")


class BatchRenorm(nn.Module):
    """Batch renormalisation over all but the last axis (Ioffe, 2017, arXiv 1702.03275, algorithm 1).

    In its first 1000 training steps it is batch normalisation, while the running statistics form.
    """

    momentum: float = 0.999
    epsilon: float = 1e-3
    r_max: float = 3.0
    d_max: float = 5.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        features = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_std = jnp.sqrt(running_var.value + self.epsilon)
        if not train:
            return (x - running_mean.value) / running_std * scale + bias
        axes = tuple(range(x.ndim - 1))
        mean, var = x.mean(axes), x.var(axes)
        std = jnp.sqrt(var + self.epsilon)
        warm = steps.value >= 1000
        r = jnp.where(warm, jax.lax.stop_gradient(jnp.clip(std / running_std, 1 / self.r_max, self.r_max)), 1)
        d = jax.lax.stop_gradient(jnp.clip((mean - running_mean.value) / running_std, -self.d_max, self.d_max))
        if not self.is_initializing():
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
            steps.value += 1
        return ((x - mean) / std * r + jnp.where(warm, d, 0)) * scale + bias


class LSTM(nn.Module):
    """LSTM over time: inputs [T, B, F] and clear [T, B], from (c, h), each [B, size], to outputs [T, B, size].

    Where clear, the state is zeroed before the step. The product with the inputs is one for all steps; only that with
    the hidden state waits for the step before.
    """

    size: int
    forget_bias: float = 0.0

    @nn.compact
    def __call__(self, carry, x: jax.Array, clear: jax.Array):
        def orthogonals(key, shape):  # one for each gate
            return jnp.hstack([nn.initializers.orthogonal()(key, (shape[0],) * 2) for key in jax.random.split(key, 4)])

        kernel = self.param("kernel", orthogonals, (self.size, 4 * self.size))
        first_bias = jnp.repeat(jnp.array([0, self.forget_bias, 0, 0]), self.size)
        gates = nn.Dense(4 * self.size, bias_init=lambda *_: first_bias)(x)

        def step(carry, inputs):
            gates, clear = inputs
            c, h = jax.tree.map(lambda x: jnp.where(clear[:, None], 0, x), carry)
            i, f, g, o = jnp.split(gates + h @ kernel, 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        return jax.lax.scan(step, carry, (gates, clear))


class QNetwork(nn.Module):
    """Encoder, LSTM, output: obs [T, B, obs_dim], last_action and start [T, B] to values [T, B, num_actions].

    start tells where an episode begins, hidden is the state of the LSTM before the first step.
    """

    num_actions: int
    config: Config

    @nn.compact
    def __call__(self, hidden, obs, last_action, start, train: bool = False):
        x = BatchRenorm()(obs, train) if self.config.norm_input else obs
        for _ in range(self.config.num_layers):
            x = nn.relu(nn.LayerNorm()(nn.Dense(self.config.hidden_size)(x)))
        x = jnp.concatenate([x, jax.nn.one_hot(last_action, self.num_actions)], axis=-1)
        lstm = LSTM(self.config.hidden_size, self.config.forget_bias)
        hidden, x = lstm(hidden, x, start if self.config.memory else start | True)
        return hidden, nn.Dense(self.num_actions)(x)


class Memory(NamedTuple):
    """What acting needs beside the environments, for each of them."""

    hidden: Any  # (c, h) of the LSTM, [num_envs, hidden_size] each
    last_action: jax.Array
    start: jax.Array  # whether obs is the first of an episode


class TrainState(NamedTuple):
    """All that training needs to go on; saved, it is a checkpoint."""

    variables: Any  # flax's: params and batch_stats
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [num_envs, obs_dim]
    memory: Memory
    key: jax.Array  # the seed's, for the whole run: each update folds in its number
    update: jax.Array  # updates done


class Transition(NamedTuple):
    """One step of all environments; a rollout stacks num_steps of them in front."""

    obs: jax.Array
    last_action: jax.Array
    start: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array


def epsilon_greedy(key: jax.Array, q_values: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Actions [...] for q_values [..., num_actions]: uniform with probability epsilon, greedy otherwise."""
    num_actions = q_values.shape[-1]
    uniform = jax.random.uniform(key, q_values.shape[:-1])
    # Where uniform < epsilon, uniform / epsilon is uniform in [0, 1): one draw decides whether and what to explore.
    random_action = jnp.minimum(uniform / epsilon * num_actions, num_actions - 1).astype(jnp.int32)
    return jnp.where(uniform < epsilon, random_action, q_values.argmax(-1))


def lambda_returns(rewards, next_values, terminated, truncated, gamma, td_lambda) -> jax.Array:
    """Q(lambda) targets G of a rollout (PQN, section 4), with terminated and truncated kept apart.

        G[t] = r[t] + gamma * (1 - terminated[t]) * ((1 - l[t]) * next_values[t] + l[t] * G[t+1])
        l[t] = td_lambda * (1 - terminated[t]) * (1 - truncated[t]),  l[num_steps - 1] = 0

    Arrays are [num_steps, num_envs]; next_values[t] is max_a Q of where step t led, before any reset.
    """
    trace = (td_lambda * ~(terminated | truncated)).at[-1].set(0)

    def step(next_return, inputs):
        reward, next_value, terminated, trace = inputs
        target = reward + gamma * ~terminated * ((1 - trace) * next_value + trace * next_return)
        return target, target

    return jax.lax.scan(step, next_values[-1], (rewards, next_values, terminated, trace), reverse=True)[1]


def rollout_targets(rewards, values, terminated, truncated, gamma, td_lambda) -> tuple[jax.Array, jax.Array]:
    """Targets of all steps of a rollout but the last, and whether each counts, both [num_steps - 1, num_envs].

    Arrays are [num_steps, num_envs]; values[t] is max_a Q of the observation at t, so the next row has that of where
    step t led. Not where a time limit cut: the next row begins another episode. Such a step has no return and does not
    count, so the return of the step before it ends at its value.
    """
    truncated = truncated & ~terminated
    ends = truncated[:-1] | truncated[1:]
    returns = lambda_returns(rewards[:-1], values[1:], terminated[:-1], ends, gamma, td_lambda)
    return returns, ~truncated[:-1]


class CraftaxState(NamedTuple):
    """Worlds and the episodes in them so far."""

    env_state: Any
    returns: jax.Array
    lengths: jax.Array


def make_env(config: Config, num_envs: int):
    """num_envs environments at once: reset(key) -> (obs, state), step(key, state, action), actions, time limit.

    step returns what gymnax's does; info has returned_episode, returned_episode_returns, returned_episode_lengths, and
    for Craftax the achievements of an episode that ended. Raises ValueError for an unknown id, unknown parameters, and
    spaces other than Box observations and Discrete actions.
    """
    return (make_craftax if config.env_id in CRAFTAX else make_gymnax)(config, num_envs)


def change_params(params, changes: tuple[str, ...]):
    """The parameters of an environment with changes as "name=number"; raises ValueError for any other."""
    names = [field.name for field in dataclasses.fields(params)]
    for text in changes:
        name, _, number = text.partition("=")
        if name not in names or not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?(e-?\d+)?", number):
            raise ValueError(f"--env-params is {text}; it takes name=number, with a name of {', '.join(names)}")
        params = params.replace(**{name: json.loads(number)})
    return params


def make_gymnax(config: Config, num_envs: int):
    """make_env for gymnax."""
    import gymnax  # not at the top: it takes seconds, and starts JAX before main has chosen the devices
    from gymnax.wrappers import FlattenObservationWrapper, LogWrapper

    env_id = config.env_id
    if env_id not in gymnax.registered_envs:
        raise ValueError(f"--env-id is {env_id}; it takes one of {', '.join((*CRAFTAX, *gymnax.registered_envs))}")
    env, params = gymnax.make(env_id)
    params = change_params(params, config.env_params)
    spaces = [type(space).__name__ for space in (env.observation_space(params), env.action_space(params))]
    if spaces != ["Box", "Discrete"]:
        raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; it takes one with ['Box', 'Discrete']")
    env = LogWrapper(FlattenObservationWrapper(env))

    def reset(key):
        return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, num_envs), params)

    def step(key, state, action):
        return jax.vmap(env.step, in_axes=(0, 0, 0, None))(jax.random.split(key, num_envs), state, action, params)

    return reset, step, env.action_space(params).n, params.max_steps_in_episode


def make_craftax(config: Config, num_envs: int):
    """make_env for Craftax, with optimistic resets: making a world is dear.

    A step that ends an episode makes num_envs / reset_ratio worlds. Environments that end take them in order, and share
    them when more end than were made.
    """
    from craftax.craftax_env import make_craftax_env_from_name

    if num_envs % config.reset_ratio:
        what = f"--num-envs, {config.num_envs}, and --eval-episodes, {config.eval_episodes}"
        raise ValueError(f"--reset-ratio is {config.reset_ratio}; it takes a divisor of {what}")
    env = make_craftax_env_from_name(config.env_id, auto_reset=False)
    params = change_params(env.default_params, config.env_params)
    num_fresh = num_envs // config.reset_ratio

    def fresh(key, number):
        return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, number), params)

    def reset(key):
        obs, env_state = fresh(key, num_envs)
        return obs, CraftaxState(env_state, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))

    def step(key, state, action):
        step_key, reset_key = jax.random.split(key)
        keys = jax.random.split(step_key, num_envs)
        obs, env_state, reward, done, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            keys, state.env_state, action, params
        )
        truncated = done & (env_state.timestep >= params.max_timesteps)
        returns, lengths = state.returns + reward, state.lengths + 1
        achievements = {name: value for name, value in info.items() if name.startswith("Achievements/")}
        episodes = {"returned_episode": done, "returned_episode_returns": returns, "returned_episode_lengths": lengths}

        def reset_ended(*states):
            slot = (jnp.cumsum(done) - 1) % num_fresh

            def where_done(new, old):
                return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new[slot], old)

            return jax.tree.map(where_done, fresh(reset_key, num_fresh), states)

        # Most steps of a few environments end none: they make no world.
        obs, env_state = jax.lax.cond(done.any(), reset_ended, lambda *states: states, obs, env_state)
        state = CraftaxState(env_state, jnp.where(done, 0, returns), jnp.where(done, 0, lengths))
        return obs, state, reward, done & ~truncated, truncated, episodes | achievements

    return reset, step, env.action_space(params).n, params.max_timesteps


def make_train(config: Config):
    """PQN as a pure function train(key=None, state=None, num_updates=config.num_updates) -> (TrainState, metrics).

    It starts from a key, by train.init(key), or goes on from a state. metrics is a flat dict of arrays [num_updates]:
    returns are NaN in an update in which no episode ended, eval/* in one without an evaluation. jit it, vmap it over
    keys, or over floats of config.
    To vmap over states, take the update number out of the batch, or every update pays for an evaluation:
    train(state=state._replace(update=states.update[0])).
    Raises ValueError as make_env does.
    """
    env_reset, env_step, num_actions, _ = make_env(config, config.num_envs)
    eval_env = make_env(config, config.eval_episodes) if config.eval_interval else None
    network = QNetwork(num_actions, config)

    def blank(num_envs):
        zeros = jnp.zeros((num_envs, config.hidden_size))
        return Memory((zeros, zeros), jnp.zeros(num_envs, jnp.int32), jnp.ones(num_envs, bool))

    def act(variables, memory, obs):
        """Values [num_envs, num_actions] and the LSTM's new state, a step of the network."""
        inputs = jax.tree.map(lambda x: x[None], (obs, memory.last_action, memory.start))
        hidden, q = network.apply(variables, memory.hidden, *inputs)
        return hidden, q[0]

    def learning_rate(gradient_step):
        progress = gradient_step / (config.num_updates * config.num_gradient_steps)
        return config.learning_rate * (1 - progress if config.anneal_lr else 1)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    # Flattened to one vector: fewer kernels to compile and to run.
    optimizer = optax.flatten(optax.chain(clip, optax.radam(learning_rate)))

    def init(key):
        key, params_key, reset_key = jax.random.split(key, 3)
        obs, env_state = env_reset(reset_key)
        memory = blank(config.num_envs)
        variables = network.init(params_key, memory.hidden, obs[None], memory.last_action[None], memory.start[None])
        opt_state = optimizer.init(variables["params"])
        return TrainState(variables, opt_state, env_state, obs, memory, key, jnp.int32(0))

    def collect(state, epsilon, key):
        def step(carry, keys):
            obs, memory, env_state = carry
            hidden, q = act(state.variables, memory, obs)
            action = epsilon_greedy(keys[0], q, epsilon)
            next_obs, env_state, reward, terminated, truncated, info = env_step(keys[1], env_state, action)
            transition = Transition(obs, memory.last_action, memory.start, action, reward, terminated, truncated)
            info = {name: value for name, value in info.items() if name.startswith(("returned", "Achievements"))}
            # As in PureJaxQL, an episode begins with the last action of the one before.
            return (next_obs, Memory(hidden, action, terminated | truncated), env_state), (transition, info)

        keys = jax.random.split(key, (config.num_steps, 2))
        carry, (rollout, info) = jax.lax.scan(step, (state.obs, state.memory, state.env_state), keys)
        obs, memory, env_state = carry
        return state._replace(obs=obs, memory=memory, env_state=env_state), rollout, info

    def loss(params, variables, hidden, rollout):
        (_, q), updated = network.apply(
            variables | {"params": params},
            hidden,
            rollout.obs,
            rollout.last_action,
            rollout.start,
            train=True,
            mutable=["batch_stats"],
        )
        terminated, truncated = rollout.terminated, rollout.truncated
        if not config.bootstrap_on_truncation:
            terminated, truncated = terminated | truncated, jnp.zeros_like(truncated)
        rewards = config.reward_scale * rollout.reward
        values = jax.lax.stop_gradient(q.max(-1))
        target, weight = rollout_targets(rewards, values, terminated, truncated, config.gamma, config.td_lambda)
        q_taken = jnp.take_along_axis(q[:-1], rollout.action[:-1, :, None], axis=-1)[..., 0]
        squares = (weight * jnp.square(q_taken - target)).sum() / jnp.maximum(weight.sum(), 1)
        return 0.5 * squares, (q_taken.mean(), updated)

    def learn(state, hidden, rollout, key):
        def gradient_step(carry, index):
            variables, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[:, index], rollout)
            initial = jax.tree.map(lambda x: x[index], hidden)
            grad = jax.value_and_grad(loss, has_aux=True)
            (td_loss, (q, updated)), grads = grad(variables["params"], variables, initial, minibatch)
            updates, opt_state = optimizer.update(grads, opt_state)
            variables = variables | updated | {"params": optax.apply_updates(variables["params"], updates)}
            losses = {"td_loss": td_loss, "q_values": q, "grad_norm": optax.tree.norm(grads)}
            return (variables, opt_state), {f"losses/{name}": value for name, value in losses.items()}

        # The order that sorts random bits is a random permutation: one sort shuffles for all epochs.
        order = jax.random.bits(key, (config.num_epochs, config.num_envs)).argsort()
        carry = state.variables, state.opt_state
        (variables, opt_state), losses = jax.lax.scan(
            gradient_step, carry, order.reshape(config.num_gradient_steps, -1)
        )
        return state._replace(variables=variables, opt_state=opt_state), jax.tree.map(jnp.mean, losses)

    def evaluate(state, key):
        """Mean return of eval_episodes greedy episodes, each from a reset to its end, or to eval_steps."""
        reset, env_step, _, max_steps = eval_env

        def unfinished(carry):
            return (carry[0] < min(max_steps, config.eval_steps)) & ~carry[-1].all()

        def step(carry):
            t, obs, memory, env_state, returns, finished = carry
            hidden, q = act(state.variables, memory, obs)
            action = q.argmax(-1)
            key = jax.random.fold_in(step_key, t)
            obs, env_state, reward, terminated, truncated, _ = env_step(key, env_state, action)
            memory = Memory(hidden, action, terminated | truncated)
            return t + 1, obs, memory, env_state, returns + reward * ~finished, finished | memory.start

        reset_key, step_key = jax.random.split(key)
        zeros = jnp.zeros(config.eval_episodes)
        carry = 0, *reset(reset_key), zeros, zeros > 0
        carry = *carry[:2], blank(config.eval_episodes), *carry[2:]
        return jax.lax.while_loop(unfinished, step, carry)[4].mean()

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(jax.random.fold_in(state.key, number), 3)
        decayed = jnp.minimum(number / jnp.maximum(config.epsilon_decay * config.num_updates, 1), 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed

        hidden = state.memory.hidden
        state, rollout, info = collect(state, epsilon, collect_key)
        state, losses = learn(state._replace(update=number + 1), hidden, rollout, learn_key)

        ended = info["returned_episode"]

        def mean_of_ended(values):
            return (ended * values).sum() / ended.sum()

        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": mean_of_ended(info["returned_episode_returns"]),
            "charts/episodic_length": mean_of_ended(info["returned_episode_lengths"]),
            "charts/epsilon": epsilon,
            "charts/learning_rate": learning_rate(number * config.num_gradient_steps),
        }
        for name in info:
            if name.startswith("Achievements/"):  # 100 for one that was unlocked, in the step that ends an episode
                metrics[name.replace("Achievements", "achievements")] = mean_of_ended(info[name]) / 100
        if config.eval_interval:
            due = ((number + 1) % config.eval_interval == 0) | (number + 1 == config.num_updates)
            metrics["eval/episodic_return"] = jax.lax.cond(due, evaluate, lambda *_: jnp.nan, state, eval_key)
        return state, metrics

    def train(key=None, state=None, num_updates=config.num_updates):
        state = init(key) if state is None else state
        return jax.lax.scan(update, state, state.update + jnp.arange(num_updates))

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
    except ValueError as error:
        fail(str(error))

    num_devices = max(n for n in range(1, jax.device_count() + 1) if config.num_seeds % n == 0)
    # Devices that the seeds leave over share the environments of each.
    share = max(n for n in range(1, jax.device_count() // num_devices + 1) if config.num_envs % n == 0)
    devices = np.reshape(jax.devices()[: num_devices * share], (num_devices, share))
    mesh = jax.sharding.Mesh(devices, ("seeds", "envs"))
    by_seed, by_env = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["seeds"], ["seeds", "envs"]))
    of_states = TrainState(
        *[by_env if name in ("env_state", "obs", "memory") else by_seed for name in TrainState._fields]
    )
    update_steps = config.batch_size * config.num_seeds

    def over_seeds(function, inputs):  # on a CPU one by one: a batch of small matrices is slower there
        return jax.lax.map(function, inputs) if jax.default_backend() == "cpu" else jax.vmap(function)(inputs)

    def proceed(states):  # all seeds have the same update number: outside vmap it leaves evaluation a branch
        update = states.update[0]
        return over_seeds(lambda state: train(state=state._replace(update=update), num_updates=chunk_size), states)

    def on_devices(function, out_shardings, **jit_options):
        seeds = PartitionSpec("seeds")
        options = {"in_specs": seeds, "out_specs": seeds, "axis_names": {"seeds"}, "check_vma": False}
        return jax.jit(jax.shard_map(function, mesh=mesh, **options), out_shardings=out_shardings, **jit_options)

    def is_key(x):  # Craftax keeps keys in its states
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    def wrap(data):
        return jax.random.wrap_key_data(jnp.asarray(data))

    started = time.time()
    keys = jax.vmap(jax.random.key)(config.seed + np.arange(config.num_seeds))
    states = on_devices(lambda keys: over_seeds(train.init, keys), of_states)(keys)
    checkpoint, csv = run_dir / "checkpoint.msgpack", run_dir / "metrics.csv"
    if checkpoint.exists():
        try:
            saved = serialization.from_bytes(states, checkpoint.read_bytes())
            saved = jax.tree.map(lambda x, old: wrap(x) if is_key(old) else x, saved, states)
            # reshape raises if the checkpoint is of other sizes.
            states = jax.tree.map(lambda new, old: jax.device_put(new.reshape(old.shape), old.sharding), saved, states)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"--resume is {run_dir}, whose checkpoint.msgpack cannot be read: {error}")
    first = done = int(states.update[0])
    most = max(1, 2**16 // update_steps)  # about 65,536 steps between two looks at the host
    # All chunks are of one size, so that one program runs them all.
    chunk_size = max(n for n in range(1, most + 1) if config.num_updates % n == first % n == 0)
    # Shapes, not arrays: a resumed run then lowers to the program of the first, which a compilation cache has.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    lowered = on_devices(proceed, (of_states, by_seed), donate_argnums=0).lower(shapes)
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
            replace(checkpoint, serialization.to_bytes(host_states))
            saved_at = time.time()
    seconds = time.time() - started
    bar.close()
    replace(run_dir / "params.msgpack", serialization.to_bytes(jax.device_get(states.variables)))

    table = np.loadtxt(csv, delimiter=",", skiprows=1, ndmin=2)[:, 1:].reshape(done, config.num_seeds, len(names))
    title = f"PQN, {config.env_id}, {config.num_seeds} seed{'s' * (config.num_seeds > 1)}"
    summary = plot_returns(run_dir / "learning_curve.png", np.ma.masked_invalid(table), names, title)
    metadata = {
        "device": f"{num_devices * share} x {jax.devices()[0].device_kind}",
        "compile_seconds": compile_seconds,
        "run_seconds": seconds,
        "steps_per_second": (done - first) * update_steps / seconds,
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "gymnax", "craftax", "numpy")},
    }
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        metadata["git_commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    replace(run_dir / "metadata.json", json.dumps(metadata, indent=2).encode())
    for run in runs:
        run.finish()
    print(f"{title}: {done} of {config.num_updates} updates, {done * config.batch_size:,} environment steps a seed")
    speed = f"{metadata['steps_per_second']:,.0f} steps/s on {metadata['device']}"
    print(f"{seconds:.1f} s, {speed}, after {compile_seconds:.1f} s of compiling")
    print(f"{summary}\nIn {run_dir}: {', '.join(sorted(os.listdir(run_dir)))}")
    if done < config.num_updates:
        print(f"To go on: python {Path(__file__).name} --resume {run_dir}")
    signal.signal(signal.SIGINT, handler)
    return run_dir


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
