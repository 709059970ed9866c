"""Where the time of an update goes; writes results/<name>.json, prints a table.

    python benchmarks/shares.py pqn_rnn_craftax --name craftax_shares --learner num_epochs
    python benchmarks/shares.py pql_isaac_style --name pql_shares --learner critic_updates policy_updates

A part of the learner is measured by doing it twice as often: what an update takes longer is what that part takes. The
environments are stepped alone, with random actions; so is the replay sampled alone, where there is one. One seed,
without evaluation, after an update to warm up; medians of repeats, taken in turns.
"""

import dataclasses
import importlib
import json
import os
import sys
import time

import numpy as np
import tyro

from machine import ROOT, describe_machine


def environments(module, config, key):
    """A function that steps all environments as often as an update does, with random actions, and its argument."""
    import jax

    if hasattr(module, "Env"):  # continuous actions
        env = module.make_env(config.env_id, config.backend)
        reset = jax.vmap(env.reset)
        physics, _ = reset(jax.random.split(key, config.num_envs))

        def step(physics, key):
            action = jax.random.uniform(key, (config.num_envs, env.action_size), minval=-1)
            physics, obs, reward, *_ = jax.vmap(env.step)(
                jax.random.split(key, config.num_envs), physics, action
            )
            return physics, (obs.sum(), reward.sum())
    else:
        reset, env_step, num_actions, _ = module.make_env(config, config.num_envs)
        _, physics = reset(key)

        def step(physics, key):
            action = jax.random.randint(key, (config.num_envs,), 0, num_actions)
            obs, physics, reward, *_ = env_step(key, physics, action)
            return physics, (obs.sum(), reward.sum())

    return lambda physics: jax.lax.scan(
        step, physics, jax.random.split(key, config.num_steps)
    ), physics


def samples(module, config, state, key):
    """A function that samples the replay as often as an update does, and its argument."""
    import jax
    import jax.numpy as jnp

    bits = jax.random.bits(key, (config.num_steps * config.critic_updates, config.batch_size))

    def sample(total, bits):
        batch = module.replay_sample(state.replay, bits, jnp.int32(len(state.replay.reward)))
        return total + sum(jnp.sum(x) for x in jax.tree.leaves(batch)), None

    return lambda bits: jax.lax.scan(sample, 0.0, bits), bits


def measure(script: str, flags: dict, learner: tuple[str, ...], repeats: int) -> dict:
    """Milliseconds of an update and of its parts."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    os.environ.setdefault("NPROC", "1")
    import jax

    config = module.Config(**flags, eval_interval=0)
    key = jax.random.key(0)
    programs = {}
    for name in ("update", *learner):
        changed = (
            config
            if name == "update"
            else dataclasses.replace(config, **{name: 2 * getattr(config, name)})
        )
        train = module.make_train(changed)
        state = jax.jit(train.init)(key)
        run = (
            jax.jit(lambda state, train=train: train(state=state, num_updates=1))
            .lower(state)
            .compile()
        )
        programs[name] = run, run(state)[0]
    state = programs["update"][1]
    for name, (function, argument) in {
        "environments": environments(module, config, key),
        **({"samples": samples(module, config, state, key)} if hasattr(state, "replay") else {}),
    }.items():
        programs[name] = jax.jit(function).lower(argument).compile(), argument
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):  # the first warms up
        for name, (run, argument) in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(run(argument))
            times[name].append(1000 * (time.perf_counter() - started))
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}
    parts = {name: medians[name] - medians["update"] for name in learner}
    parts |= {name: medians[name] for name in ("environments", "samples") if name in medians}
    steps_per_second = config.num_envs * config.num_steps / medians["update"] * 1000
    return {
        "flags": flags,
        "update": medians["update"],
        "parts": parts,
        "steps_per_second": steps_per_second,
    }


def main(
    script: tyro.conf.Positional[str],
    /,
    name: str,
    learner: tuple[str, ...] = ("num_epochs",),
    rows: tuple[str, ...] = ("defaults={}",),
    repeats: int = 7,
) -> None:
    """Measure the parts of an update.

    Args:
        script: Name of the script, without .py.
        name: What the study is called in the name of its file.
        learner: Fields of Config that say how often the learner does something.
        rows: "label=further fields of Config, as JSON", for each row.
        repeats: Timed updates of each program.
    """
    measured = []
    for text in rows:
        label, _, flags = text.partition("=")
        row = {"label": label} | measure(script, json.loads(flags), learner, repeats)
        measured.append(row)
        parts = ", ".join(
            f"{part} {ms:.0f} ms ({ms / row['update']:.0%})" for part, ms in row["parts"].items()
        )
        print(
            f"{label}: update {row['update']:.0f} ms, {row['steps_per_second']:,.0f} steps/s: {parts}",
            flush=True,
        )
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.write_text(
        json.dumps({"script": script, **describe_machine(), "rows": measured}, indent=2)
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
