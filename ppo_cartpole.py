"""PPO with clipping, on any gymnax environment with Box observations and Discrete actions.

Proximal Policy Optimisation: Schulman et al., 2017, arXiv 1707.06347, with the details of CleanRL's ppo.py, as in
PureJaxRL (Lu et al., 2022). Unlike PQN it learns a policy, and a value function only to know which actions did better.

    python ppo_cartpole.py --num-seeds 8                # as a script: trains, plots, saves; --help lists the flags

    from ppo_cartpole import Config, make_train         # as a library: a pure function from a key to results
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
    """The defaults are those of CleanRL's ppo.py for CartPole-v1."""

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
    num_envs: int = 4
    """Environments of a seed, stepped in parallel."""
    num_steps: int = 128
    """Steps of each environment in a rollout."""

    learning_rate: float = 2.5e-4
    """Step size of Adam."""
    anneal_lr: bool = True
    """Let the learning rate fall linearly to zero."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of the advantages: 0 for one-step, 1 for Monte Carlo."""
    num_epochs: int = 4
    """Passes over a rollout."""
    num_minibatches: int = 4
    """Gradient steps in a pass; divides num_envs * num_steps."""
    norm_adv: bool = True
    """Normalise the advantages of a minibatch."""
    clip_coef: float = 0.2
    """How far the ratio of new to old probability may leave 1, in the policy loss."""
    clip_vloss: bool = True
    """Clip the change of the values by clip_coef too."""
    ent_coef: float = 0.01
    """Weight of the entropy in the loss."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Global norm that gradients are clipped to."""
    activation: Literal["tanh", "relu"] = "tanh"
    """After every hidden layer."""
    hidden_size: int = 64
    """Units of a hidden layer."""
    num_layers: int = 2
    """Hidden layers, of the actor and of the critic."""
    bootstrap_on_truncation: bool = True
    """Bootstrap where a time limit cut an episode; without it the cut is a termination, as in PureJaxRL."""

    eval_interval: int = 48
    """Updates between two greedy evaluations (the last update always has one); 0 for none."""
    eval_episodes: int = 128
    """Episodes of an evaluation, each in an environment of its own."""

    runs_dir: str = "runs"
    """Folder for the folders of runs."""
    checkpoint_interval: float = 60.0
    """Seconds between two checkpoints; 0 for one after every chunk of updates."""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases logging; WANDB_ENTITY says for whom."""
    wandb_project: str = "ppo"
    """Weights & Biases project."""

    batch_size = property(lambda self: self.num_envs * self.num_steps, doc="Transitions of a rollout.")
    num_gradient_steps = property(lambda self: self.num_epochs * self.num_minibatches, doc="Of an update.")
    num_updates = property(lambda self: self.total_timesteps // self.batch_size, doc="Rollouts of a run.")

    def __post_init__(self):
        """Raises ValueError, naming the flag, for a value that cannot work; traced values are not looked at."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            low = 1 if field.type is int and name not in ("seed", "eval_interval") else 0
            unbounded = ("ent_coef", "vf_coef", "max_grad_norm", "checkpoint_interval")
            is_fraction = field.type is float and name not in unbounded
            high = 1 if is_fraction else 2**31 - 1
            if field.type in (int, float) and isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it takes a number from {low} to {high}")
        batch = f"--num-envs * --num-steps, which is {self.batch_size}"
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"--num-minibatches is {self.num_minibatches}; it takes a divisor of {batch}")
        if self.num_updates == 0:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}; it takes at least {batch}")


class MLP(nn.Module):
    """Hidden layers of one activation, orthogonal weights, zero biases: [..., obs_dim] to [..., num_outputs]."""

    num_outputs: int
    output_scale: float
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.config.num_layers):
            x = nn.Dense(self.config.hidden_size, kernel_init=nn.initializers.orthogonal(2**0.5))(x)
            x = getattr(nn, self.config.activation)(x)
        return nn.Dense(self.num_outputs, kernel_init=nn.initializers.orthogonal(self.output_scale))(x)


class TrainState(NamedTuple):
    """All that training needs to go on; saved, it is a checkpoint."""

    params: Any  # flax variables of "actor" and "critic"
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [num_envs, obs_dim]
    key: jax.Array  # the seed's, for the whole run: each update folds in its number
    update: jax.Array  # updates done


class Transition(NamedTuple):
    """One step of all environments; a rollout stacks num_steps of them in front."""

    obs: jax.Array
    action: jax.Array
    logits: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]  # final_observation: where the step led, before any reset; returned_episode, ...


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda) -> jax.Array:
    """Generalised advantage estimates A (Schulman et al., 2016, equation 16), with terminated and truncated kept apart.

        delta[t] = r[t] + gamma * (1 - terminated[t]) * next_values[t] - values[t]
        A[t] = delta[t] + gamma * gae_lambda * (1 - terminated[t]) * (1 - truncated[t]) * A[t+1],  A[num_steps] = 0

    Arrays are [num_steps, num_envs]; next_values[t] is the value of where step t led, before any reset.
    """
    deltas = rewards + gamma * ~terminated * next_values - values
    traces = gamma * gae_lambda * ~(terminated | truncated)

    def step(advantage, inputs):
        delta, trace = inputs
        advantage = delta + trace * advantage
        return advantage, advantage

    return jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, traces), reverse=True)[1]


def clipped_surrogate(ratios, advantages, clip_coef) -> jax.Array:
    """The policy loss of PPO (Schulman et al., 2017, equation 7): ratios and advantages [batch] to a scalar."""
    clipped = jnp.clip(ratios, 1 - clip_coef, 1 + clip_coef)
    return -jnp.minimum(ratios * advantages, clipped * advantages).mean()


def value_loss(values, old_values, returns, clip_coef) -> jax.Array:
    """Half the mean squared error, the worse of values [batch] and of values no further than clip_coef from the old."""
    clipped = old_values + jnp.clip(values - old_values, -clip_coef, clip_coef)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)).mean()


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
    """PPO as a pure function train(key=None, state=None, num_updates=config.num_updates) -> (TrainState, metrics).

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
    num_actions = env.action_space(env_params).n
    actor, critic = MLP(num_actions, 0.01, config), MLP(1, 1.0, config)

    def learning_rate(gradient_step):
        progress = gradient_step // config.num_gradient_steps / config.num_updates
        return config.learning_rate * (1 - progress if config.anneal_lr else 1)

    clip = optax.clip_by_global_norm(config.max_grad_norm)
    # Flattened to one vector: fewer kernels to compile and to run.
    optimizer = optax.flatten(optax.chain(clip, optax.adam(learning_rate, eps=1e-5)))

    def init(key):
        key, actor_key, critic_key, reset_key = jax.random.split(key, 4)
        obs, env_state = env_reset(jax.random.split(reset_key, config.num_envs), env_params)
        params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
        return TrainState(params, optimizer.init(params), env_state, obs, key, jnp.int32(0))

    def value(params, obs):
        return critic.apply(params["critic"], obs)[..., 0]

    def collect(state, key):
        def step(carry, inputs):
            obs, env_state = carry
            noise, keys = inputs
            logits = actor.apply(state.params["actor"], obs)
            action = (logits + noise).argmax(-1)  # with Gumbel noise, a sample of the softmax of the logits
            next_obs, env_state, reward, terminated, truncated, info = env_step(keys, env_state, action, env_params)
            return (next_obs, env_state), Transition(obs, action, logits, reward, terminated, truncated, info)

        noise_key, step_key = jax.random.split(key)
        noise = jax.random.gumbel(noise_key, (config.num_steps, config.num_envs, num_actions))
        keys = jax.random.split(step_key, (config.num_steps, config.num_envs))
        (obs, env_state), rollout = jax.lax.scan(step, (state.obs, state.env_state), (noise, keys))
        return state._replace(obs=obs, env_state=env_state), rollout

    def log_prob(logits, action):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]

    def prepare(params, rollout):
        """A flat batch of what the loss needs of every transition; the critic sees the rollout in one pass."""
        values, next_values = value(params, rollout.obs), value(params, rollout.info["final_observation"])
        terminated = rollout.terminated | (False if config.bootstrap_on_truncation else rollout.truncated)
        outcomes = rollout.reward, values, next_values, terminated, rollout.truncated
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
        v_loss = value_loss(value(params, obs), old_value, returns, config.clip_coef if config.clip_vloss else jnp.inf)
        entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
        return policy_loss + config.vf_coef * v_loss - config.ent_coef * entropy, {
            "losses/policy_loss": policy_loss,
            "losses/value_loss": v_loss,
            "losses/entropy": entropy,
            "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
            "losses/clipfrac": (jnp.abs(ratio - 1) > config.clip_coef).mean(),
        }

    def learn(state, rollout, key):
        def gradient_step(carry, index):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[index], batch)
            grads, losses = jax.grad(loss, has_aux=True)(params, *minibatch)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), losses | {
                "losses/grad_norm": optax.tree.norm(grads)
            }

        batch = prepare(state.params, rollout)
        # The order that sorts random bits is a random permutation: one sort shuffles for all epochs.
        order = jax.random.bits(key, (config.num_epochs, config.batch_size)).argsort()
        carry = state.params, state.opt_state
        (params, opt_state), losses = jax.lax.scan(gradient_step, carry, order.reshape(config.num_gradient_steps, -1))
        values, returns = batch[3], batch[5]
        losses |= {"losses/explained_variance": 1 - (returns - values).var() / returns.var()}
        return state._replace(params=params, opt_state=opt_state), jax.tree.map(jnp.mean, losses)

    def evaluate(state, key):
        """Mean return of eval_episodes greedy episodes, each from a reset to its end."""

        def unfinished(carry):
            t, *_, finished = carry
            return (t < env_params.max_steps_in_episode) & ~finished.all()

        def step(carry):
            t, obs, env_state, returns, finished = carry
            keys = jax.random.split(jax.random.fold_in(step_key, t), config.eval_episodes)
            action = actor.apply(state.params["actor"], obs).argmax(-1)
            obs, env_state, reward, terminated, truncated, _ = env_step(keys, env_state, action, env_params)
            return t + 1, obs, env_state, returns + reward * ~finished, finished | terminated | truncated

        reset_key, step_key = jax.random.split(key)
        obs, env_state = env_reset(jax.random.split(reset_key, config.eval_episodes), env_params)
        zeros = jnp.zeros(config.eval_episodes)
        *_, returns, _ = jax.lax.while_loop(unfinished, step, (0, obs, env_state, zeros, zeros > 0))
        return returns.mean()

    def update(state, number):
        collect_key, learn_key, eval_key = jax.random.split(jax.random.fold_in(state.key, number), 3)
        state, rollout = collect(state, collect_key)
        state, losses = learn(state._replace(update=number + 1), rollout, learn_key)

        ended = rollout.info["returned_episode"]
        metrics = losses | {
            "global_step": (number + 1) * config.batch_size,
            "charts/episodic_return": (ended * rollout.info["returned_episode_returns"]).sum() / ended.sum(),
            "charts/episodic_length": (ended * rollout.info["returned_episode_lengths"]).sum() / ended.sum(),
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
    replace(run_dir / "params.msgpack", serialization.to_bytes(jax.device_get(states.params)))

    table = np.loadtxt(csv, delimiter=",", skiprows=1, ndmin=2)[:, 1:].reshape(done, config.num_seeds, len(names))
    title = f"PPO, {config.env_id}, {config.num_seeds} seed{'s' * (config.num_seeds > 1)}"
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
