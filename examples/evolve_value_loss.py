"""Evolves PPO's value loss, as in PureJaxRL: every fitness is a whole training run.

    python examples/evolve_value_loss.py --generations 60

A small network of (value, target, old value) weighs the squared error in PPO's value loss. OpenAI's
evolution strategy (evosax) changes its parameters, starting from weights of 1, to raise the return
of short CartPole runs; the members of a generation have the same seeds. An interrupted run
continues when started again with the same flags and --out.

Then come the controls, on seeds that were used for nothing else: the evolved loss against the
squared error, against the squared error with its coefficient and the gradient clip tuned, and
against no value loss. In the default setting none of these is trivial: a lambda of 0.5 makes the
advantages depend on the critic, and without a clip over actor and critic together the critic's
gradients do not slow the actor. With PPO's defaults, short runs are best with almost no value loss.
"""

import dataclasses
import functools
import itertools
import os
import shlex
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from flax import serialization
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_cartpole

# First seeds of the evolution, of the tuning of the controls, and of the comparison.
EVOLUTION, TUNING, HOLD_OUT = 0, 2**30, 2**30 + 2**20


class LossWeights(nn.Module):
    """Logarithms of the weights [batch] of squared errors; 0 at first."""

    @nn.compact
    def __call__(self, values: jax.Array, targets: jax.Array, old_values: jax.Array) -> jax.Array:
        inputs = jnp.stack([values - targets, values - old_values, targets], axis=-1)
        inputs = jnp.arcsinh(inputs)  # values are up to 100
        x = nn.tanh(nn.Dense(16)(inputs))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[..., 0]


def squared_error(values, old_values, returns, clip_coef):
    """The value loss that the evolved one starts from: half the mean squared error."""
    return 0.5 * jnp.square(values - returns).mean()


def evolved_loss(variables, values, old_values, returns, clip_coef):
    """The value loss with parameters; takes the place of ppo_cartpole.value_loss."""
    weights = jnp.exp(LossWeights().apply(variables, values, returns, old_values))
    return 0.5 * (weights * jnp.square(values - returns)).mean()


def start_devices() -> Mesh:
    """All devices; on a CPU, one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("NPROC", "1")
    jax.config.update("jax_num_cpu_devices", cores)
    return Mesh(jax.devices(), ("agents",))


def over_agents(lifetime_return, mesh: Mesh):
    """lifetime_return(inputs, seed) of many agents [agents, ...], the same number per device."""

    def on_device(inputs, seeds):
        if jax.default_backend() == "cpu":  # faster than vmap there
            return jax.lax.map(lambda agent: lifetime_return(*agent), (inputs, seeds))
        return jax.vmap(lifetime_return)(inputs, seeds)

    spec = PartitionSpec("agents")
    specs = {"mesh": mesh, "in_specs": (spec, spec), "out_specs": spec, "check_vma": False}
    program = jax.jit(jax.shard_map(on_device, **specs))

    def run(inputs, seeds):
        """Returns [len(inputs), len(seeds)]: every input with every seed."""
        pairs = np.repeat(inputs, len(seeds), axis=0), np.tile(seeds, len(inputs))
        padded = -len(pairs[1]) % mesh.size  # with copies of the first
        pairs = [np.concatenate([x, x[:1].repeat(padded, axis=0)]) for x in pairs]
        return np.asarray(program(*pairs))[: len(inputs) * len(seeds)].reshape(-1, len(seeds))

    return run


def last_quarter(metrics) -> jax.Array:
    """The fitness: mean return of the episodes that ended in the last quarter of the updates."""
    returns = metrics["charts/episodic_return"]
    return jnp.nanmean(returns[-max(len(returns) // 4, 1) :])


def draw(history: pd.DataFrame, hold_out: pd.DataFrame, loss_of_one) -> Figure:
    """Fitness over generations, the loss and its slope beside the squared error, the controls."""
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    fitness, loss, slope, controls = figure.subplots(1, 4)
    fitness.plot(history["mean"])
    low, high = history["mean"] - history["std"], history["mean"] + history["std"]
    fitness.fill_between(history.index, low, high, alpha=0.2)
    fitness.set(xlabel="generation", title="return of the members:\nmean and deviation")

    target, errors = 20.0, jnp.linspace(-20, 20, 201)
    for axes, function in ((loss, loss_of_one), (slope, jax.grad(loss_of_one))):
        for old_value in (10.0, 20.0, 30.0):
            y = jax.vmap(lambda error, f=function, old=old_value: f(target + error, old, target))(
                errors
            )
            axes.plot(errors, y, label=f"old value {old_value:.0f}")
        y = jnp.square(errors) / 2 if axes is loss else errors
        axes.plot(errors, y, "k--", label="squared error")
        axes.set(xlabel="value - target")
    loss.set_title("evolved loss, target 20")
    loss.legend(fontsize="small")
    slope.set_title("its derivative by the value")

    for position, name in enumerate(hold_out):
        own = hold_out[name]
        controls.plot(position + np.linspace(-0.25, 0.25, len(own)), own, ".", alpha=0.6)
        controls.plot(position, own.mean(), "k_", markersize=25)
    controls.set_xticks(range(len(hold_out.columns)), hold_out.columns, rotation=20, ha="right")
    controls.set_title("return on fresh seeds and mean")
    return figure


def main(
    generations: int = 60,
    population: int = 32,
    seeds_per_member: int = 2,
    hold_out_seeds: int = 32,
    stddev: float = 0.3,
    learning_rate: float = 0.05,
    flags: str = "--total-timesteps 40960 --eval-interval 0 --learning-rate 1e-3 --gae-lambda 0.5 "
    "--max-grad-norm 1e9",
    out: Path = Path("runs/evolve_value_loss"),
) -> None:
    """Evolve, compare, and write <out>.csv, <out>_generations.csv and <out>.png.

    Args:
        generations: Total generations, counting those before an interruption.
        population: Members per generation, in mirrored pairs; even.
        seeds_per_member: Training runs per member, on new seeds in each generation.
        hold_out_seeds: Training runs per loss in the comparison.
        stddev: Standard deviation of the members' parameters.
        learning_rate: Learning rate of Adam, for the mean of the members.
        flags: Flags of ppo_cartpole.py: the runs that are the fitness.
        out: Where the files go, without suffix.
    """
    mesh = start_devices()
    from evosax.algorithms import Open_ES  # not at the top: it starts JAX

    config = ppo_cartpole.parse_args(shlex.split(flags))
    first, unravel = ravel_pytree(LossWeights().init(jax.random.key(0), *jnp.zeros((3, 1))))

    def with_evolved_loss(parameters, seed):
        loss = functools.partial(evolved_loss, unravel(parameters))
        return last_quarter(ppo_cartpole.make_train(config, loss)(jax.random.key(seed))[1])

    def with_squared_error(settings, seed):
        own = dataclasses.replace(config, vf_coef=settings[0], max_grad_norm=settings[1])
        return last_quarter(ppo_cartpole.make_train(own, squared_error)(jax.random.key(seed))[1])

    run_evolved = over_agents(with_evolved_loss, mesh)
    strategy = Open_ES(
        population_size=population,
        solution=first,
        optimizer=optax.adam(learning_rate),
        std_schedule=optax.constant_schedule(stddev),
    )
    params, (init_key, key) = strategy.default_params, jax.random.split(jax.random.key(0))
    state, history = strategy.init(init_key, first, params), []
    out.parent.mkdir(parents=True, exist_ok=True)
    saved = Path(f"{out}.msgpack")
    if saved.exists():
        try:
            state, history = serialization.from_bytes((state, None), saved.read_bytes())
            history = history.tolist()
        except Exception as error:  # many kinds, by where the file is damaged
            sys.exit(f"{saved} cannot be read, remove it to start anew: {error!r}")
    lives = f"{population} members, {seeds_per_member} training runs each"
    print(f"{lives}, on {mesh.size} devices; compiling takes seconds to a minute")
    bar = tqdm(total=generations, initial=len(history), unit=" generations", disable=None)
    for generation in range(len(history), generations):
        started = time.monotonic()
        ask_key, tell_key = jax.random.split(jax.random.fold_in(key, generation))
        members, state = strategy.ask(ask_key, state, params)
        seeds = EVOLUTION + seeds_per_member * generation + np.arange(seeds_per_member)
        fitness = run_evolved(np.asarray(members), seeds).mean(axis=1)
        state, _ = strategy.tell(tell_key, members, -fitness, state, params)  # it minimises
        seconds = time.monotonic() - started
        history.append([float(fitness.mean()), float(fitness.std()), seconds])
        # Written beside it and renamed: a kill leaves the last one or this one, never half of it.
        new = Path(f"{saved}.new")
        new.write_bytes(serialization.to_bytes((state, np.array(history))))
        os.replace(new, saved)
        bar.set_postfix_str(f"return {fitness.mean():.1f} ± {fitness.std():.1f}", refresh=False)
        bar.update()
    bar.close()
    history = pd.DataFrame(history, columns=["mean", "std", "seconds"])
    steps = population * seeds_per_member * config.num_updates * config.batch_size
    per_generation = history["seconds"][1:].median()  # the first one compiles
    print(f"{per_generation:.1f} s per generation, {steps / per_generation:,.0f} steps/s")

    run_squared = over_agents(with_squared_error, mesh)
    grid = np.array(list(itertools.product((0.05, 0.5, 5.0), (0.5, 5.0, 1e9))), np.float32)
    tuned = run_squared(grid, TUNING + np.arange(hold_out_seeds)).mean(axis=1)
    best = grid[tuned.argmax()]
    seeds = HOLD_OUT + np.arange(hold_out_seeds)
    controls = np.array([[0, config.max_grad_norm], [config.vf_coef, config.max_grad_norm], best])
    names = ["none", "squared error", f"tuned: {best[0]:g}, clip {best[1]:g}", "evolved"]
    returns = run_squared(controls.astype(np.float32), seeds)
    returns = np.concatenate([returns, run_evolved(np.asarray(state.mean)[None], seeds)])
    for name, own in zip(names, returns, strict=True):
        error = own.std(ddof=1) / len(own) ** 0.5
        print(f"{name:24} {own.mean():6.1f} ± {error:.1f}, {len(own)} fresh seeds")
    hold_out = pd.DataFrame(returns.T, columns=names, index=pd.Index(seeds, name="seed"))
    hold_out.to_csv(f"{out}.csv", float_format="%.1f")
    history.to_csv(f"{out}_generations.csv", float_format="%.2f")

    def loss_of_one(value, old_value, target):
        return evolved_loss(unravel(state.mean), *jnp.stack([value, old_value, target])[:, None], 0)

    draw(history, hold_out, loss_of_one).savefig(f"{out}.png", dpi=120, facecolor="white")
    print(f"{out}.csv {out}_generations.csv {out}.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
