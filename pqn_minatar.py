"""PQN with lambda-returns and a small convolutional network, on the five MinAtar games of gymnax.

Parallelised Q-Network: Gallici et al., "Simplifying Deep Temporal Difference Learning", ICLR 2025, arXiv 2407.04811;
MinAtar: Young and Tian, 2019, arXiv 1903.03176. The algorithm is that of pqn_cartpole.py; the network, the
hyperparameters and the flags of the environments differ.

    python pqn_minatar.py --env-id Asterix-MinAtar      # as a script: trains, plots, saves; --help lists the flags

    from pqn_minatar import Config, make_train          # as a library: a pure function from a key to results
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
from flax.linen.initializers import he_normal
from jax.sharding import PartitionSpec
from tqdm import tqdm

GAMES = "Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar"


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the paper's for MinAtar."""

    seed: int = 0
    """First seed; run i has seed + i and does not depend on how many run beside it."""
    num_seeds: int = 1
    """Independent runs to train at once, spread over all devices."""
    total_timesteps: int = 10_000_000
    """Environment steps of a seed, over all its environments; rounded down to whole updates."""
    resume: str | None = None
    """Folder of a run to go on with from its last checkpoint; its configuration is read from there."""

    env_id: Literal[GAMES] = "Breakout-MinAtar"
    """Game of gymnax, with its minimal set of actions."""
    sticky_action_prob: float = 0.0
    """Probability that the environment repeats the last action instead; gymnax has 0, Young and Tian 0.1."""
    max_steps_in_episode: int = 0
    """Time limit of an episode; 0 for gymnax's: 1000 steps, 2500 in Freeway."""
    num_envs: int = 128
    """Environments of a seed, stepped in parallel."""
    num_steps: int = 32
    """Steps of each environment in a rollout."""

    learning_rate: float = 5e-4
    """Step size of RAdam."""
    anneal_lr: bool = True
    """Let the learning rate fall linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    td_lambda: float = 0.65
    """Lambda of the returns: 0 for one-step targets, 1 for Monte Carlo."""
    epsilon_start: float = 1.0
    """Probability of a random action at first."""
    epsilon_finish: float = 0.05
    """Probability of a random action after the decay."""
    epsilon_decay: float = 0.1
    """Fraction of the run in which epsilon falls linearly."""
    num_epochs: int = 2
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Gradient steps in a pass; divides num_envs * num_steps."""
    max_grad_norm: float = 10.0
    """Global norm that gradients are clipped to."""
    reward_scale: float = 1.0
    """Factor on the rewards that are learned from; reported returns are without it."""
    norm: Literal["layer_norm", "batch_norm", "none"] = "layer_norm"
    """Normalisation after the convolution and the hidden layer."""
    num_channels: int = 16
    """Channels of the convolution."""
    hidden_size: int = 128
    """Units of the hidden layer."""
    bootstrap_on_truncation: bool = True
    """Bootstrap where a time limit cut an episode; without it the cut is a termination, as in PureJaxQL."""

    eval_interval: int = 122
    """Updates between two greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes of an evaluation, each in an environment of its own."""

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
            low = 1 if field.type is int and name not in ("seed", "max_steps_in_episode", "eval_interval") else 0
            is_fraction = field.type is float and name not in ("max_grad_norm", "reward_scale", "checkpoint_interval")
            high = 1 if is_fraction else 2**31 - 1
            if field.type in (int, float) and isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it takes a number from {low} to {high}")
        batch = f"--num-envs * --num-steps, which is {self.batch_size}"
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"--num-minibatches is {self.num_minibatches}; it takes a divisor of {batch}")
        if self.num_updates == 0:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}; it takes at least {batch}")


class QNetwork(nn.Module):
    """3 x 3 convolution, hidden layer, output: observations [..., 10, 10, channels] to values [..., num_actions]."""

    num_actions: int
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm_relu(x):
            if self.config.norm == "layer_norm":
                x = nn.LayerNorm()(x)
            elif self.config.norm == "batch_norm":
                x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.relu(x)

        # The convolution as one matrix product of patches: on a CPU, three times faster than nn.Conv, gradient and all.
        x = x.astype(jnp.float32)
        patches = [x[..., i : i + 8, j : j + 8, :] for i in range(3) for j in range(3)]
        x = nn.Dense(self.config.num_channels, kernel_init=he_normal())(jnp.concatenate(patches, axis=-1))
        x = norm_relu(x)
        x = x.reshape(*x.shape[:-3], -1)
        x = norm_relu(nn.Dense(self.config.hidden_size, kernel_init=he_normal())(x))
        return nn.Dense(self.num_actions)(x)


class TrainState(NamedTuple):
    """All that training needs to go on; saved, it is a checkpoint."""

    variables: Any  # flax's: params and, for batch norm, batch_stats
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [num_envs, 10, 10, channels]
    key: jax.Array  # the seed's, for the whole run: each update folds in its number
    update: jax.Array  # updates done


class Transition(NamedTuple):
    """One step of all environments; a rollout stacks num_steps of them in front."""

    obs: jax.Array
    action: jax.Array
    value: jax.Array  # max_a Q(obs, a)
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]  # final_observation: where the step led, before any reset; returned_episode, ...


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


def make_env(config: Config):
    """The gymnax game, logging its episodes, and its parameters. Raises ValueError for an unknown id."""
    import gymnax  # not at the top: it takes seconds, and starts JAX before main has chosen the devices
    from gymnax.wrappers import LogWrapper, StickyActionWrapper

    if config.env_id not in GAMES:
        raise ValueError(f"--env-id is {config.env_id}; it takes one of {', '.join(GAMES)}")
    env, params = gymnax.make(config.env_id)
    if config.max_steps_in_episode:
        params = params.replace(max_steps_in_episode=config.max_steps_in_episode)
    return LogWrapper(StickyActionWrapper(env, config.sticky_action_prob)), params


def make_train(config: Config):
    """PQN as a pure function train(key=None, state=None, num_updates=config.num_updates) -> (TrainState, metrics).

    It starts from a key, by train.init(key), or goes on from a state. metrics is a flat dict of arrays [num_updates]:
    returns are NaN in an update in which no episode ended, eval/* in one without an evaluation. jit it, vmap it over
    keys, or over floats of config.
    To vmap over states, take the update number out of the batch, or every update pays for an evaluation:
    train(state=state._replace(update=states.update[0])).
    Raises ValueError as make_env does.
    """
    env, env_params = make_env(config)
    env_reset = jax.vmap(env.reset, in_axes=(0, None))
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    network = QNetwork(env.action_space(env_params).n, config)
    # Time limits in a rollout, at most: as many final observations are evaluated for the targets.
    max_truncations = config.num_envs * (1 + config.num_steps // int(env_params.max_steps_in_episode))

    def learning_rate(gradient_step):
        progress = gradient_step / (config.num_updates * config.num_gradient_steps)
        return config.learning_rate * (1 - progress if config.anneal_lr else 1)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    # Flattened to one vector: fewer kernels to compile and to run.
    optimizer = optax.flatten(optax.chain(clip, optax.radam(learning_rate)))

    def init(key):
        key, params_key, reset_key = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(reset_key, config.num_envs), env_params)
        variables = network.init(params_key, obs)
        return TrainState(variables, optimizer.init(variables["params"]), env_state, obs, key, jnp.int32(0))

    def collect(state, epsilon, key):
        def step(carry, keys):
            obs, env_state = carry
            q = network.apply(state.variables, obs)
            action = epsilon_greedy(keys[0], q, epsilon)
            next_obs, env_state, reward, terminated, truncated, info = env_step(keys[1:], env_state, action, env_params)
            transition = Transition(obs, action, q.max(-1), reward, terminated, truncated, info)
            return (next_obs, env_state), transition

        keys = jax.random.split(key, (config.num_steps, 1 + config.num_envs))
        (obs, env_state), rollout = jax.lax.scan(step, (state.obs, state.env_state), keys)
        return state._replace(obs=obs, env_state=env_state), rollout

    def targets(state, rollout):
        # The value of where step t led is value[t + 1], known from the rollout, but for two cases: after a time limit
        # the next row begins another episode, and the last row has none. There the network sees final_observation.
        final_observation = rollout.info["final_observation"]
        last_value = network.apply(state.variables, final_observation[-1:]).max(-1)
        next_values = jnp.concatenate([rollout.value[1:], last_value])
        (cut,) = jnp.nonzero(rollout.truncated.ravel(), size=max_truncations, fill_value=config.batch_size)
        cut_obs = final_observation.reshape(config.batch_size, *final_observation.shape[2:])[cut]
        cut_values = network.apply(state.variables, cut_obs).max(-1)
        next_values = next_values.ravel().at[cut].set(cut_values, mode="drop").reshape(next_values.shape)
        terminated = rollout.terminated | (False if config.bootstrap_on_truncation else rollout.truncated)
        rewards = config.reward_scale * rollout.reward
        return lambda_returns(rewards, next_values, terminated, rollout.truncated, config.gamma, config.td_lambda)

    def loss(params, variables, obs, action, target):
        q, updated = network.apply(variables | {"params": params}, obs, train=True, mutable=["batch_stats"])
        chosen = jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]
        return 0.5 * jnp.square(chosen - target).mean(), (chosen.mean(), updated)

    def learn(state, rollout, key):
        def gradient_step(carry, index):
            variables, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grad = jax.value_and_grad(loss, has_aux=True)
            (td_loss, (q, updated)), grads = grad(variables["params"], variables, *minibatch)
            updates, opt_state = optimizer.update(grads, opt_state)
            variables = variables | updated | {"params": optax.apply_updates(variables["params"], updates)}
            losses = {"td_loss": td_loss, "q_values": q, "grad_norm": optax.tree.norm(grads)}
            return (variables, opt_state), {f"losses/{name}": value for name, value in losses.items()}

        batch = rollout.obs, rollout.action, targets(state, rollout)
        batch = jax.tree.map(lambda x: x.reshape(config.batch_size, *x.shape[2:]), batch)
        # The order that sorts random bits is a random permutation: one sort shuffles for all epochs.
        order = jax.random.bits(key, (config.num_epochs, config.batch_size)).argsort()
        carry = state.variables, state.opt_state
        minibatches = order.reshape(config.num_gradient_steps, -1)
        (variables, opt_state), losses = jax.lax.scan(gradient_step, carry, minibatches)
        return state._replace(variables=variables, opt_state=opt_state), jax.tree.map(jnp.mean, losses)

    def evaluate(state, key):
        """Mean return of eval_episodes greedy episodes, each from a reset to its end."""

        def unfinished(carry):
            t, *_, finished = carry
            return (t < env_params.max_steps_in_episode) & ~finished.all()

        def step(carry):
            t, obs, env_state, returns, finished = carry
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            action = network.apply(state.variables, obs).argmax(-1)
            obs, env_state, reward, terminated, truncated, _ = env_step(keys, env_state, action, env_params)
            return t + 1, obs, env_state, returns + reward * ~finished, finished | terminated | truncated

        reset_key, step_key = jax.random.split(key)
        obs, env_state = env_reset(jax.random.split(reset_key, config.eval_episodes), env_params)
        zeros = jnp.zeros(config.eval_episodes)
        *_, returns, _ = jax.lax.while_loop(unfinished, step, (0, obs, env_state, zeros, zeros > 0))
        return returns.mean()

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(jax.random.fold_in(state.key, number), 3)
        decayed = jnp.minimum(number / jnp.maximum(config.epsilon_decay * config.num_updates, 1), 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed

        state, rollout = collect(state, epsilon, collect_key)
        state, losses = learn(state._replace(update=number + 1), rollout, learn_key)

        ended = rollout.info["returned_episode"]
        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": (ended * rollout.info["returned_episode_returns"]).sum() / ended.sum(),
            "charts/episodic_length": (ended * rollout.info["returned_episode_lengths"]).sum() / ended.sum(),
            "charts/epsilon": epsilon,
            "charts/learning_rate": learning_rate(number * config.num_gradient_steps),
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
    mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ("seeds",))
    update_steps = config.batch_size * config.num_seeds

    def over_seeds(function, inputs):  # on a CPU one by one: a batch of small matrices is slower there
        return jax.lax.map(function, inputs) if jax.default_backend() == "cpu" else jax.vmap(function)(inputs)

    def proceed(states):  # all seeds have the same update number: outside vmap it leaves evaluation a branch
        update = states.update[0]
        return over_seeds(lambda state: train(state=state._replace(update=update), num_updates=chunk_size), states)

    def on_devices(function, **options):
        seeds = PartitionSpec("seeds")
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=seeds, out_specs=seeds, check_vma=False), **options)

    started = time.time()
    keys = jax.vmap(jax.random.key)(config.seed + np.arange(config.num_seeds))
    states = on_devices(lambda keys: over_seeds(train.init, keys))(keys)
    checkpoint, csv = run_dir / "checkpoint.msgpack", run_dir / "metrics.csv"
    if checkpoint.exists():
        try:
            saved = serialization.from_bytes(states, checkpoint.read_bytes())
            saved = saved._replace(key=jax.random.wrap_key_data(jnp.asarray(saved.key)))
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
            host_states = jax.device_get(states._replace(key=jax.random.key_data(states.key)))
            replace(checkpoint, serialization.to_bytes(host_states))
            saved_at = time.time()
    seconds = time.time() - started
    bar.close()
    replace(run_dir / "params.msgpack", serialization.to_bytes(jax.device_get(states.variables)))

    table = np.loadtxt(csv, delimiter=",", skiprows=1, ndmin=2)[:, 1:].reshape(done, config.num_seeds, len(names))
    title = f"PQN, {config.env_id}, {config.num_seeds} seed{'s' * (config.num_seeds > 1)}"
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
