"""Steps per second of ale-py's and of envpool's emulators in a jitted scan, with random actions.

    python benchmarks/studies/peers/atari_emulators.py --num-envs 8 32 128

Without envpool, of ale-py's alone. A step is of all four frames and of one environment.
"""

import importlib.util
import statistics
import time
from pathlib import Path

import jax
import tyro


def make_program(emulators: str, game: str, num_envs: int):
    """Jitted function of a handle and actions [num_steps, num_envs], and the handle."""
    if emulators == "ale-py":
        from ale_py.vector_env import AtariVectorEnv

        env = AtariVectorEnv(game, num_envs, life_loss_info=True, reward_clipping=False)
        env.reset()
        handle, _, step = env.xla()
    else:
        import envpool

        name = "".join(word.capitalize() for word in game.split("_")) + "-v5"
        env = envpool.make(name, env_type="gymnasium", num_envs=num_envs, episodic_life=True)
        env.reset()
        handle, _, _, step = env.xla()

    def one_step(handle, action):
        handle, (obs, reward, *_) = step(handle, action)
        return handle, reward.sum() + obs[0, 0, 0, 0]

    # The environment comes along, as its end would free the emulators.
    return jax.jit(lambda handle, actions: jax.lax.scan(one_step, handle, actions)), handle, env


def main(
    num_envs: tuple[int, ...] = (8, 32, 128),
    num_steps: int = 300,
    repeats: int = 5,
    game: str = "pong",
    out: Path | None = None,
) -> None:
    """Time both in turns; prints medians and their ratio.

    Args:
        num_envs: Numbers of environments.
        num_steps: Steps of each environment in a scan.
        repeats: Scans of each.
        game: By its name in ale-py.
        out: Ignored; example.py passes it.
    """
    names = ["ale-py", "envpool"] if importlib.util.find_spec("envpool") else ["ale-py"]
    for count in num_envs:
        actions = jax.random.randint(jax.random.key(0), (num_steps, count), 0, 3)
        programs = {name: make_program(name, game, count) for name in names}
        speeds = {name: [] for name in names}
        for _ in range(1 + repeats):
            for name, (play, handle, _) in programs.items():
                started = time.perf_counter()
                jax.block_until_ready(play(handle, actions))
                speeds[name].append(actions.size / (time.perf_counter() - started))
        # The first scan compiles.
        medians = {name: statistics.median(own[1:]) for name, own in speeds.items()}
        text = ", ".join(f"{name} {median:,.0f} steps/s" for name, median in medians.items())
        ratio = f", ratio {medians['ale-py'] / medians['envpool']:.2f}" if len(names) > 1 else ""
        print(f"{count} environments: {text}{ratio}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
