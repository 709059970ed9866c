"""DQN with a replay buffer and a target network, on any gymnax environment with Box observations, Discrete actions.

Deep Q-Network: Mnih et al., Nature 2015; --double-q is van Hasselt et al., 2016, arXiv 1509.06461. Unlike PQN it learns
from transitions sampled out of a replay, with one-step targets from a network that lags behind. Two differences to
CleanRL's dqn.py: several environments, as in PureJaxRL, and an episode cut by a time limit is bootstrapped.

    python dqn_cartpole.py --num-seeds 8                # as a script: trains, plots, saves; --help lists the flags

    from dqn_cartpole import Config, make_train         # as a library: a pure function from a key to results
    state, metrics = jax.jit(jax.vmap(make_train(Config())))(jax.random.split(jax.random.key(0), 8))
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "gymnax>=1.0.1,<2", "six>=1.16,<2",
#   "tyro>=1.0,<2", "tqdm>=4.66,<5", "matplotlib>=3.8,<4", "wandb>=0.31,<0.32", "numpy>=2,<3"]
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
from jax.sharding import PartitionSpec
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of PureJaxRL's dqn.py for CartPole-v1."""

    seed: int = 0
    """First seed; run i has seed + i and does not depend on how many run beside it."""
    num_seeds: int = 1
    """Independent runs to train at once, spread over all devices."""
    total_timesteps: int = 500_000
    """Environment steps of a seed, over all its environments; rounded down to whole updates."""
    resume: str | None = None
    """Folder of a run to go on with from its last checkpoint; its configuration is read from there."""

    env_id: str = "CartPole-v1"
    """gymnax environment; its observations are flattened."""
    num_envs: int = 10
    """Environments of a seed, stepped in parallel."""
    num_steps: int = 1
    """Steps of each environment between two gradient steps."""

    learning_rate: float = 2.5e-4
    """Step size of Adam."""
    anneal_lr: bool = False
    """Let the learning rate fall linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    epsilon_start: float = 1.0
    """Probability of a random action at first."""
    epsilon_finish: float = 0.05
    """Probability of a random action after the decay."""
    epsilon_decay: float = 0.5
    """Fraction of the run in which epsilon falls linearly."""
    buffer_size: int = 10_000
    """Transitions in the replay of a seed; each takes two observations and 9 bytes, on the device."""
    batch_size: int = 128
    """Transitions sampled for a gradient step."""
    learning_starts: int = 10_000
    """Environment steps before the first gradient step."""
    target_interval: int = 50
    """Gradient steps between two updates of the target network; the metrics have a row for each."""
    tau: float = 1.0
    """How far an update moves the target network to the online one: 1 is a copy."""
    double_q: bool = False
    """Let the online network choose the next action that the target network values."""
    hidden_sizes: tuple[int, ...] = (120, 84)
    """Units of the hidden layers."""
    bootstrap_on_truncation: bool = True
    """Bootstrap where a time limit cut an episode; without it the cut is a termination, as in PureJaxRL."""

    eval_interval: int = 50
    """Updates between two greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes of an evaluation, each in an environment of its own."""

    runs_dir: str = "runs"
    """Folder for the folders of runs."""
    checkpoint_interval: float = 60.0
    """Seconds between two checkpoints; 0 for one after every chunk of updates."""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases logging; WANDB_ENTITY says for whom."""
    wandb_project: str = "dqn"
    """Weights & Biases project."""

    num_gradient_steps = property(lambda self: self.target_interval, doc="Of an update.")
    steps_per_update = property(lambda self: self.num_envs * self.num_steps * self.target_interval)
    num_updates = property(lambda self: self.total_timesteps // self.steps_per_update, doc="Target updates of a run.")

    def __post_init__(self):
        """Raises ValueError, naming the flag, for a value that cannot work; traced values are not looked at."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            low = 1 if field.type is int and name not in ("seed", "eval_interval", "learning_starts") else 0
            is_fraction = field.type is float and name not in ("checkpoint_interval",)
            high = 1 if is_fraction else 2**31 - 1
            if field.type in (int, float) and isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it takes a number from {low} to {high}")
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size is {self.buffer_size}; it takes at least --num-envs, {self.num_envs}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes is {self.hidden_sizes}; it takes one or more numbers from 1")
        if self.num_updates == 0:
            least = f"--num-envs * --num-steps * --target-interval, which is {self.steps_per_update}"
            raise ValueError(f"--total-timesteps is {self.total_timesteps}; it takes at least {least}")


class QNetwork(nn.Module):
    """Dense, ReLU layers: observations [..., obs_dim] to action values [..., num_actions]."""

    num_actions: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.num_actions)(x)


class Transition(NamedTuple):
    """One step of all environments; the replay stacks buffer_size // num_envs of them in front."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: jax.Array  # where the step led, before any reset


class TrainState(NamedTuple):
    """All that training needs to go on; saved, it is a checkpoint."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: Transition  # [buffer_size // num_envs, num_envs, ...]
    env_state: Any
    obs: jax.Array  # [num_envs, obs_dim]
    key: jax.Array  # the seed's, for the whole run: each update folds in its number
    update: jax.Array  # updates done


def epsilon_greedy(key: jax.Array, q_values: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Actions [...] for q_values [..., num_actions]: uniform with probability epsilon, greedy otherwise."""
    num_actions = q_values.shape[-1]
    uniform = jax.random.uniform(key, q_values.shape[:-1])
    # Where uniform < epsilon, uniform / epsilon is uniform in [0, 1): one draw decides whether and what to explore.
    random_action = jnp.minimum(uniform / epsilon * num_actions, num_actions - 1).astype(jnp.int32)
    return jnp.where(uniform < epsilon, random_action, q_values.argmax(-1))


def td_targets(rewards, next_values, terminated, gamma) -> jax.Array:
    """One-step targets r + gamma * (1 - terminated) * next_values, all [batch] (Mnih et al., 2015, algorithm 1)."""
    return rewards + gamma * ~terminated * next_values


def replay_insert(replay: Transition, row: jax.Array, transition: Transition) -> Transition:
    """The replay [rows, num_envs, ...] with a transition [num_envs, ...] in the given row, counted around the end."""
    return jax.tree.map(lambda buffer, x: buffer.at[row % len(buffer)].set(x), replay, transition)


def replay_sample(replay: Transition, bits: jax.Array, num_rows: jax.Array) -> Transition:
    """A uniform batch, with replacement, of what the first num_rows rows hold; bits [batch_size] are random uint32."""
    num_envs = replay.action.shape[1]
    index = bits % (num_rows * num_envs).astype(jnp.uint32)
    return jax.tree.map(lambda buffer: buffer[index // num_envs, index % num_envs], replay)


def make_env(env_id: str):
    """The gymnax environment, flattened and logging its episodes, and its parameters.

    Raises ValueError for an unknown id and for spaces other than Box observations and Discrete actions.
    """
    import gymnax  # not at the top: it takes seconds, and starts JAX before main has chosen the devices
    from gymnax.wrappers import FlattenObservationWrapper, LogWrapper

    if env_id not in gymnax.registered_envs:
        raise ValueError(f"--env-id is {env_id}; it takes one of {', '.join(gymnax.registered_envs)}")
    env, params = gymnax.make(env_id)
    spaces = [type(space).__name__ for space in (env.observation_space(params), env.action_space(params))]
    if spaces != ["Box", "Discrete"]:
        raise ValueError(f"--env-id is {env_id}, with spaces {spaces}; it takes one with ['Box', 'Discrete']")
    return LogWrapper(FlattenObservationWrapper(env)), params


def make_train(config: Config):
    """DQN as a pure function train(key=None, state=None, num_updates=config.num_updates) -> (TrainState, metrics).

    It starts from a key, by train.init(key), or goes on from a state. metrics is a flat dict of arrays [num_updates]:
    returns are NaN in an update in which no episode ended, eval/* in one without an evaluation. jit it, vmap it over
    keys, or over floats of config.
    To vmap over states, take the update number out of the batch, or every update pays for an evaluation:
    train(state=state._replace(update=states.update[0])).
    Raises ValueError as make_env does.
    """
    env, env_params = make_env(config.env_id)
    env_reset = jax.vmap(env.reset, in_axes=(0, None))
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    network = QNetwork(env.action_space(env_params).n, config.hidden_sizes)
    num_rows = config.buffer_size // config.num_envs

    def learning_rate(gradient_step):
        progress = gradient_step / (config.num_updates * config.target_interval)
        return config.learning_rate * (1 - progress if config.anneal_lr else 1)

    # Flattened to one vector: fewer kernels to compile and to run.
    optimizer = optax.flatten(optax.adam(learning_rate))

    def init(key):
        key, params_key, reset_key = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(reset_key, config.num_envs), env_params)
        params = network.init(params_key, obs)
        zeros = jnp.zeros(config.num_envs)
        row = Transition(obs, zeros.astype(jnp.int32), zeros, zeros > 0, obs)
        replay = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape), x.dtype), row)
        # The target network is a copy, so that a donated state holds no buffer twice.
        target_params = jax.tree.map(jnp.copy, params)
        return TrainState(params, target_params, optimizer.init(params), replay, env_state, obs, key, jnp.int32(0))

    def epsilon(step):
        decayed = jnp.minimum(step / jnp.maximum(config.epsilon_decay * config.total_timesteps, 1), 1)
        return config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed

    def collect(state, step, keys):
        """num_steps steps of all environments into the replay; step counts those of an environment."""

        def env_steps(carry, inputs):
            obs, env_state, replay = carry
            step, keys = inputs
            action = epsilon_greedy(keys[0], network.apply(state.params, obs), epsilon(step * config.num_envs))
            next_obs, env_state, reward, terminated, truncated, info = env_step(keys[1:], env_state, action, env_params)
            terminated |= False if config.bootstrap_on_truncation else truncated
            transition = Transition(obs, action, reward, terminated, info["final_observation"])
            return (next_obs, env_state, replay_insert(replay, step, transition)), info

        steps = step + jnp.arange(config.num_steps)
        carry, infos = jax.lax.scan(env_steps, (state.obs, state.env_state, state.replay), (steps, keys))
        obs, env_state, replay = carry
        return state._replace(obs=obs, env_state=env_state, replay=replay), infos

    def loss(params, target_params, batch):
        next_q = network.apply(target_params, batch.next_obs)
        choice = network.apply(params, batch.next_obs) if config.double_q else next_q
        next_value = jnp.take_along_axis(next_q, choice.argmax(-1)[:, None], axis=-1)[:, 0]
        target = td_targets(batch.reward, next_value, batch.terminated, config.gamma)
        q = jnp.take_along_axis(network.apply(params, batch.obs), batch.action[:, None], axis=-1)[:, 0]
        return jnp.square(q - jax.lax.stop_gradient(target)).mean(), q.mean()

    def no_step(learner, target_params, batch):
        return learner, dict.fromkeys(["td_loss", "q_values", "grad_norm"], jnp.float32(jnp.nan))

    def gradient_step(learner, target_params, batch):
        params, opt_state = learner
        (td_loss, q), grads = jax.value_and_grad(loss, has_aux=True)(params, target_params, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        losses = {"td_loss": td_loss, "q_values": q, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state), losses

    def evaluate(state, key):
        """Mean return of eval_episodes greedy episodes, each from a reset to its end."""

        def unfinished(carry):
            t, *_, finished = carry
            return (t < env_params.max_steps_in_episode) & ~finished.all()

        def step(carry):
            t, obs, env_state, returns, finished = carry
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            action = network.apply(state.params, obs).argmax(-1)
            obs, env_state, reward, terminated, truncated, _ = env_step(keys, env_state, action, env_params)
            return t + 1, obs, env_state, returns + reward * ~finished, finished | terminated | truncated

        reset_key, step_key = jax.random.split(key)
        obs, env_state = env_reset(jax.random.split(reset_key, config.eval_episodes), env_params)
        zeros = jnp.zeros(config.eval_episodes)
        *_, returns, _ = jax.lax.while_loop(unfinished, step, (0, obs, env_state, zeros, zeros > 0))
        return returns.mean()

    def update(state, number):
        """target_interval times num_steps environment steps and a gradient step, then the target network."""
        collect_key, sample_key, eval_key = jax.random.split(jax.random.fold_in(state.key, number), 3)
        learning = number * config.steps_per_update >= config.learning_starts
        first = number * config.target_interval * config.num_steps

        def iteration(state, inputs):
            step, keys, bits = inputs
            state, infos = collect(state, step, keys)
            batch = replay_sample(state.replay, bits, jnp.minimum(step + config.num_steps, num_rows))
            learner = state.params, state.opt_state
            learner, losses = jax.lax.cond(learning, gradient_step, no_step, learner, state.target_params, batch)
            params, opt_state = learner
            return state._replace(params=params, opt_state=opt_state), (infos, losses)

        keys = jax.random.split(collect_key, (config.target_interval, config.num_steps, 1 + config.num_envs))
        bits = jax.random.bits(sample_key, (config.target_interval, config.batch_size))
        steps = first + config.num_steps * jnp.arange(config.target_interval)
        state, (infos, losses) = jax.lax.scan(iteration, state, (steps, keys, bits))
        target_params = optax.incremental_update(state.params, state.target_params, config.tau)
        state = state._replace(target_params=target_params, update=number + 1)

        ended = infos["returned_episode"]
        metrics = {f"losses/{name}": values.mean() for name, values in losses.items()} | {
            "global_step": (number + 1) * config.steps_per_update,
            "charts/episodic_return": (ended * infos["returned_episode_returns"]).sum() / ended.sum(),
            "charts/episodic_length": (ended * infos["returned_episode_lengths"]).sum() / ended.sum(),
            "charts/epsilon": epsilon(first * config.num_envs),
            "charts/learning_rate": learning_rate(state.opt_state[1].count),
        }
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
            saved = serialization.from_bytes(states, checkpoint.read_bytes())
            saved = saved._replace(key=jax.random.wrap_key_data(jnp.asarray(saved.key)))
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
        learns = metrics["global_step"] >= config.learning_starts + config.steps_per_update
        nans = learns & np.isnan(metrics["losses/grad_norm"])
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
            host_states = jax.device_get(states._replace(key=jax.random.key_data(states.key)))
            replace(checkpoint, serialization.to_bytes(host_states))
            saved_at = time.time()
    seconds = time.time() - started
    bar.close()
    replace(run_dir / "params.msgpack", serialization.to_bytes(jax.device_get(states.params)))

    table = np.loadtxt(csv, delimiter=",", skiprows=1, ndmin=2)[:, 1:].reshape(done, config.num_seeds, len(names))
    title = f"DQN, {config.env_id}, {config.num_seeds} seed{'s' * (config.num_seeds > 1)}"
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
    print(
        f"{title}: {done} of {config.num_updates} updates, {done * config.steps_per_update:,} environment steps a seed"
    )
    speed = f"{metadata['steps_per_second']:,.0f} steps/s on {metadata['device']}"
    print(f"{seconds:.1f} s, {speed}, after {compile_seconds:.1f} s of compiling")
    print(f"{summary}\nIn {run_dir}: {', '.join(sorted(os.listdir(run_dir)))}")
    if done < config.num_updates:
        print(f"To go on: python {Path(__file__).name} --resume {run_dir}")
    signal.signal(signal.SIGINT, handler)
    return run_dir


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
