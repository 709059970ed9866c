"""Why PQN has layer normalisation: off-policy TD without a target network can diverge.

    python examples/baird.py

Two tasks, learned off-policy and without a target network:

- Baird's counterexample (Sutton and Barto, 2nd edition, section 11.2): seven states, all rewards
  zero, so every true value is zero. The target policy always goes to the last state; the behaviour
  visits all states equally often. The updates are the expected ones.
- CartPole: Q-learning from transitions of a uniformly random policy. A reward of 1 per step and a
  discount of 0.99 allow no value above 100.

Layer normalisation bounds the term that makes TD diverge (Gallici et al., 2025, arXiv 2407.04811,
section 4). Every seed is drawn, as a median would hide the few that diverge.
"""

import functools
import time
from pathlib import Path

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from matplotlib.figure import Figure

GAMMA = 0.99
POINTS = 50
# Whether there are hidden layers, whether they are normalised, and the weight of the l2 penalty.
VARIANTS = {
    "linear": (False, False, 0.0),
    "ReLU": (True, False, 0.0),
    "ReLU, l2": (True, False, 0.01),
    "ReLU, layer norm": (True, True, 0.0),
    "ReLU, layer norm, l2": (True, True, 0.01),
}


class Network(nn.Module):
    """Values [..., num_outputs] of features [..., num_inputs]; no hidden layer: linear values."""

    num_outputs: int
    hidden_sizes: tuple[int, ...]
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.hidden_sizes:
            x = nn.Dense(size)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.norm else x)
        return nn.Dense(self.num_outputs, use_bias=bool(self.hidden_sizes))(x)


def baird_features() -> jax.Array:
    """Features [7, 8]: v[i] = 2 w[i] + w[7] for the first six states, v[6] = w[6] + 2 w[7]."""
    features = np.zeros((7, 8), np.float32)
    features[range(6), range(6)], features[:6, 7] = 2, 1
    features[6, 6:] = 1, 2
    return jnp.asarray(features)


def baird(network: Network, l2: float, key: jax.Array, steps_per_point: int) -> jax.Array:
    """Mean absolute value of the states [POINTS], every steps_per_point gradient steps."""
    features = baird_features()
    params = network.init(key, features)
    optimizer = optax.sgd(0.01)

    def loss(params, targets):
        errors = network.apply(params, features)[:, 0] - targets
        return 0.5 * jnp.square(errors).mean() + 0.5 * l2 * optax.tree.norm(params, squared=True)

    def step(params, _):
        targets = GAMMA * network.apply(params, features[6])  # the target policy goes to state 6
        grads = jax.grad(loss)(params, targets)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), None

    def point(params, _):
        params, _ = jax.lax.scan(step, params, None, steps_per_point)
        return params, jnp.abs(network.apply(params, features)).mean()

    return jax.lax.scan(point, params, None, POINTS)[1]


def random_transitions(key: jax.Array, num_envs=16, num_steps=256):
    """Transitions [num_envs * num_steps, ...] of CartPole under uniformly random actions."""
    env, env_params = gymnax.make("CartPole-v1")

    def step(carry, key):
        obs, env_state = carry
        action_key, step_key = jax.random.split(key)
        action = jax.random.randint(action_key, (num_envs,), 0, 2)
        keys = jax.random.split(step_key, num_envs)
        obs_after, env_state, reward, terminated, _, info = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(keys, env_state, action, env_params)
        next_obs = info["final_observation"]
        return (obs_after, env_state), (obs, action, reward, next_obs, terminated)

    reset_key, step_key = jax.random.split(key)
    start = jax.vmap(env.reset, in_axes=(0, None))(
        jax.random.split(reset_key, num_envs), env_params
    )
    _, steps = jax.lax.scan(step, start, jax.random.split(step_key, num_steps))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)


def cartpole(network: Network, l2: float, key: jax.Array, steps_per_point: int) -> jax.Array:
    """Mean absolute Q-value over the data [POINTS], every steps_per_point gradient steps."""
    data_key, init_key, batch_key = jax.random.split(key, 3)
    data = random_transitions(data_key)
    params = network.init(init_key, data[0])
    optimizer = optax.adam(1e-3)

    def loss(params, obs, action, reward, next_obs, terminated):
        next_values = jax.lax.stop_gradient(network.apply(params, next_obs).max(axis=-1))
        targets = reward + GAMMA * ~terminated * next_values
        q = jnp.take_along_axis(network.apply(params, obs), action[:, None], axis=-1)[:, 0]
        squares = optax.tree.norm(params, squared=True)
        return 0.5 * jnp.square(q - targets).mean() + 0.5 * l2 * squares

    def step(carry, key):
        params, opt_state = carry
        index = jax.random.randint(key, (128,), 0, len(data[0]))
        grads = jax.grad(loss)(params, *jax.tree.map(lambda x: x[index], data))
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    def point(carry, key):
        carry, _ = jax.lax.scan(step, carry, jax.random.split(key, steps_per_point))
        return carry, jnp.abs(network.apply(carry[0], data[0])).mean()

    carry = params, optimizer.init(params)
    return jax.lax.scan(point, carry, jax.random.split(batch_key, POINTS))[1]


# Function, hidden layers, outputs, the largest value that is possible, and the ylabel.
TASKS = {
    "Baird": (baird, (16,), 1, 0.0, "mean |V|"),
    "CartPole": (cartpole, (64, 64), 2, 100.0, "mean |Q|"),
}


def draw(table: pd.DataFrame) -> Figure:
    """A panel for each task and variant, with a line per seed."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(len(TASKS), len(VARIANTS), sharex="row", sharey="row")
    for row, (task, (_, _, _, bound, label)) in zip(panels, TASKS.items(), strict=True):
        row[0].set(ylabel=f"{task}: {label}", yscale="log", ylim=(1e-4, 1e8))
        for axes, variant in zip(row, VARIANTS, strict=True):
            own = table[(table.task == task) & (table.variant == variant)]
            for _, line in own.groupby("seed"):
                # A value that overflowed is drawn above the panel.
                axes.plot(line.gradient_steps, line.value.fillna(np.inf).clip(1e-5, 1e30))
            if bound:
                axes.axhline(bound, color="black", linestyle="--", linewidth=1)
            axes.set_title(variant, fontsize="medium")
            axes.set_xlabel("gradient steps")
    return figure


def main(num_seeds: int = 5, steps_per_point: int = 400, out: Path = Path("runs/baird")) -> None:
    """Write <out>.csv and <out>.png, and print the values of every seed at the end.

    Args:
        num_seeds: Initial weights, and for CartPole data sets, that are tried.
        steps_per_point: Gradient steps between two points of a curve, of which there are 50.
        out: Where the table and the picture go, without suffix.
    """
    started, tables = time.monotonic(), []
    keys = jnp.stack([jax.random.key(seed) for seed in range(num_seeds)])
    for task, (function, hidden_sizes, num_outputs, *_) in TASKS.items():
        for variant, (is_deep, norm, l2) in VARIANTS.items():
            network = Network(num_outputs, hidden_sizes if is_deep else (), norm)
            one_seed = functools.partial(function, network, l2, steps_per_point=steps_per_point)
            values = np.asarray(jax.jit(functools.partial(jax.lax.map, one_seed))(keys))
            last = " ".join(f"{value:9.3g}" for value in values[:, -1])
            print(f"{task:9}{variant:21} {last}", flush=True)
            index = pd.MultiIndex.from_product(
                [[task], [variant], range(num_seeds), steps_per_point * np.arange(1, POINTS + 1)],
                names=["task", "variant", "seed", "gradient_steps"],
            )
            tables.append(pd.Series(values.ravel(), index, name="value"))
    table = pd.concat(tables).reset_index()
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(f"{out}.csv", index=False, float_format="%.4g", na_rep="nan")
    draw(table).savefig(f"{out}.png", dpi=120, facecolor="white")
    print(f"{time.monotonic() - started:.0f} s; {out}.csv {out}.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
