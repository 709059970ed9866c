"""main within a process: refusals, signals, threads, what it tells; the same in every script."""

import dataclasses
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import threading
import time

import gymnax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import SCRIPTS
from gymnax.environments.classic_control.cartpole import CartPole
from test_bad_flags import run
from test_script import read_rows, wandb_history
from tqdm import tqdm

import pqn_cartpole as script

TINY = script.Config(**SCRIPTS["pqn_cartpole"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    return script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def stopped(finished, tmp_path):
    """The folder of a run that was killed after its last checkpoint."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metadata.json").unlink()
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(folder, *flags):
    return script.main(script.parse_args(["--resume", str(folder), *flags]))


@pytest.fixture
def no_compiling(monkeypatch):
    monkeypatch.setattr(script.jax.stages.Lowered, "compile", None)


def test_finished_run_is_not_touched(finished, capsys):
    before = contents(finished)
    assert resume(finished) == finished
    assert f"{finished} is finished" in capsys.readouterr().err
    assert contents(finished) == before


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--gamma=0.5", "--gamma is 0.5; the run to resume has 0.99"),
        ("--num-envs=8", "--num-envs is 8; the run to resume has 4"),
        ("--runs-dir=there", "--runs-dir is there"),
    ],
)
def test_resumed_run_keeps_its_flags(stopped, flag, words, capsys):
    before = contents(stopped)
    assert run(script, ["--resume", stopped, flag]) == 2
    assert words in capsys.readouterr().err and contents(stopped) == before


def test_resume_within_the_folder(stopped, monkeypatch):
    """An empty word is this folder: as the run was, not with the defaults."""
    before = contents(stopped)
    monkeypatch.chdir(stopped)
    assert run(script, ["--resume", ""]) is None
    after = contents(stopped)
    assert all(after[path] == data for path, data in before.items() if path.suffix == ".csv")


def test_resume_from_python_compares_flags(stopped):
    before = contents(stopped)
    with pytest.raises(
        ValueError, match=r"^--total-timesteps is 500000; the run to resume has 384"
    ):
        script.main(script.Config(resume=str(stopped)))
    assert contents(stopped) == before


def test_resume_takes_flags_that_do_not_change_the_results(stopped):
    # With the default of the other sizes, 4 environments are none that the minibatches divide.
    flags = ["--num-envs=4", "--checkpoint-interval=5", "--wandb-mode=offline", "--wandb-tags=b"]
    config = script.parse_args(["--resume", str(stopped), *flags])
    assert (config.checkpoint_interval, config.wandb_mode, config.wandb_tags) == (
        5,
        "offline",
        ("b",),
    )
    before = (stopped / "params.msgpack").read_bytes()
    (stopped / "params.msgpack").unlink()
    script.main(config)
    assert (stopped / "params.msgpack").read_bytes() == before  # of the state that was loaded
    histories = [wandb_history(path)[1] for path in stopped.glob("wandb/offline-run-*/run-*.wandb")]
    assert [len(history) for history in histories] == [12]  # wandb gets what it has not


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "it has no checkpoint yet"),
        (lambda run: damage(checkpoint(run) / "manifest.ocdbt", b"0" * 99), "is damaged"),
        (lambda run: damage(checkpoint(run) / "_METADATA", b"{"), "is damaged"),
        (lambda run: damage(run / "metrics.csv", b"seed,a\n"), "metrics.csv lacks rows"),
        (lambda run: damage(run / "metrics.csv", b""), "is damaged"),
        (lambda run: drop_row(run / "metrics.csv"), "metrics.csv lacks rows"),
        (lambda run: edit(run / "config.json", script="dqn_cartpole"), "a run of dqn_cartpole.py"),
        (lambda run: edit(run / "config.json", hidden_size=8), "not compatible"),
    ],
)
def test_damaged_run(stopped, damage, words):
    damage(stopped)
    before = contents(stopped)
    with pytest.raises(ValueError, match=f"^--resume.*{stopped}.*") as error:
        resume(stopped)
    assert words in str(error.value) and contents(stopped) == before
    with (stopped / "config.json").open() as file:  # not locked, though the error is kept
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def checkpoint(folder):
    return folder / "checkpoints" / "12" / "default"


def damage(path, data):
    assert path.exists()
    path.write_bytes(data)


def drop_row(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_after_the_checkpoint_are_dropped(stopped):
    """Also half a row; and those that it covers stay, with the line ends of another system."""
    before = (stopped / "metrics.csv").read_bytes()
    rows = before.splitlines(keepends=True)
    (stopped / "metrics.csv").write_bytes(before.replace(b"\n", b"\r\n") + rows[3] + rows[4][:9])
    resume(stopped)
    assert (stopped / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("runs_dir", ["file", "/proc/nowhere"])
def test_folder_that_cannot_be_made(runs_dir, tmp_path, monkeypatch, no_compiling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=runs_dir):
        script.main(dataclasses.replace(TINY, runs_dir=runs_dir))


def test_a_folder_is_of_one_run(tmp_path, monkeypatch, no_compiling):
    """Two runs of one seed and environment at the same time."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_234_567_890_123_456_789)
    config = dataclasses.replace(TINY, runs_dir=str(tmp_path))
    with pytest.raises(TypeError):
        script.main(config)  # compiling fails, the folder is there
    before = contents(tmp_path)
    with pytest.raises(FileExistsError):
        script.main(dataclasses.replace(config, gamma=0.5))
    assert before and contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["pqn_cartpole__CartPole-v1__0__1234567890123456"]


def test_a_run_is_trained_by_one_process(stopped, capsys):
    with (stopped / "config.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(stopped)
        assert run(script, ["--resume", stopped]) == 2
        assert contents(stopped) == before
    *_, line = capsys.readouterr().err.splitlines()
    assert f"--resume is {stopped}, which another process still trains" in line
    resume(stopped)


def test_folder_of_an_environment_with_a_slash(tmp_path):
    gymnax.register("Mine/CartPole", CartPole)
    config = dataclasses.replace(TINY, runs_dir=str(tmp_path), env_id="Mine/CartPole")
    assert script.main(config).parent == tmp_path


def test_wandb_without_login(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert run(script, ["--wandb-mode=online", f"--runs-dir={tmp_path}", "--num-seeds=2"]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert "compiling" in first and "--wandb-mode is online" in last


def test_wandb_without_login_leaves_a_stopped_run(stopped, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (stopped / "metadata.json").write_text("{}")
    damage(stopped / "metrics.csv", (stopped / "metrics.csv").read_bytes() + b"a row too many\n")
    edit(stopped / "config.json", total_timesteps=24 * 32)  # not yet finished
    before = contents(stopped)
    assert run(script, ["--resume", stopped, "--wandb-mode=online"]) == 2
    assert "--wandb-mode is online" in capsys.readouterr().err.splitlines()[-1]
    after = {path: data for path, data in contents(stopped).items() if "wandb" not in path.parts}
    assert after == before


def test_wandb_ids_are_those_of_the_first_start(tmp_path, monkeypatch):
    """Resumed inside of its folder, which was renamed."""
    config = dataclasses.replace(TINY, runs_dir=str(tmp_path / "runs"), wandb_mode="offline")
    folder = script.main(config)
    (folder / "metadata.json").unlink()
    monkeypatch.chdir(folder.rename(tmp_path / "renamed"))
    resume(".", "--wandb-mode=offline")
    runs = [
        wandb_history(path)[0]
        for path in (tmp_path / "renamed").glob("wandb/offline-run-*/run-*.wandb")
    ]
    assert {(x.run_id, x.run_group) for x in runs} == {(f"{folder.name}-seed-0", folder.name)}
    assert len(runs) == 2


class Wandb:
    """A run whose next step is this one or a later one, as wandb counts."""

    def __init__(self, step):
        self.step, self.rows, self.calls, self.exit_code = step, {}, 0, None

    def log(self, row, step):
        self.calls += 1
        if step >= self.step:  # wandb ignores the others, and takes a step's rows as one
            self.step = step
            self.rows[step] = row["a"]

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_gets_what_its_server_lacks(tmp_path):
    """Of rows that were sent, a kill can lose the last ones, of each seed others."""
    table = {"seed": [0, 1] * 3, "global_step": [1, 1, 2, 2, 3, 3], "a": range(6)}
    pd.DataFrame(table).to_csv(tmp_path / "metrics.csv", index=False)
    runs = [Wandb(0), Wandb(3)]
    for exit_code in (None, 143):
        script.log_wandb(tmp_path, runs, exit_code)
        assert [run.rows for run in runs] == [{1: 0, 2: 2, 3: 4}, {3: 5}]
        assert [run.exit_code for run in runs] == [exit_code] * 2
    assert [run.calls for run in runs] == [3 + 1] * 2  # not all rows each time


def test_wandb_that_does_not_answer(tmp_path, capsys):
    """Its step is a question to its service, which may be gone: training goes on."""

    class Gone:
        @property
        def step(self):
            raise ConnectionError("the service is gone")

    pd.DataFrame({"seed": [0], "global_step": [32]}).to_csv(tmp_path / "metrics.csv", index=False)
    runs = [Gone()]
    script.log_wandb(tmp_path, runs)
    assert runs == [] and "the service is gone; training goes on" in capsys.readouterr().err


def test_in_a_thread(tmp_path):
    """As a sweep agent of wandb calls it."""
    config = dataclasses.replace(TINY, runs_dir=str(tmp_path))
    thread = threading.Thread(target=script.main, args=[config])
    thread.start()
    thread.join()
    (folder,) = tmp_path.iterdir()
    assert (folder / "metadata.json").exists()


def test_main_sets_no_signal_handlers(tmp_path, monkeypatch):
    def record(*_):
        inside.extend(map(signal.getsignal, numbers))
        raise ZeroDivisionError

    numbers, inside = (signal.SIGINT, signal.SIGTERM), []
    before = [*map(signal.getsignal, numbers)]
    monkeypatch.setattr(script, "record", record)
    with pytest.raises(ZeroDivisionError):
        script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path)))
    assert inside == before


def test_stopped_by_a_signal(tmp_path, monkeypatch):
    """Saved, and not taken for finished; nothing of this is seen in the results."""
    monkeypatch.setattr(script.Config, "steps_per_update", 2**16)  # an update is a chunk
    whole = script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path / "whole")))
    record, signals = script.record, []
    monkeypatch.setattr(script, "record", lambda *args: signals.append(15) or record(*args))
    with pytest.raises(SystemExit) as stop:
        script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path / "parts")), signals)
    assert stop.value.code == 128 + 15
    (folder,) = (tmp_path / "parts").iterdir()
    assert 0 < json.loads((folder / "metadata.json").read_text())["updates"] < 12
    resume(folder)
    for name in ("params.msgpack", "metrics.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("num_seeds, num_devices", [(1, 1), (6, 2), (7, 7), (11, 11)])
def test_seeds_keep_all_cores_busy(num_seeds, num_devices, monkeypatch):
    """A CPU of two cores, as JAX is told before it starts."""
    told = {}
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(script.jax.config, "update", told.__setitem__)
    script.start_devices(dataclasses.replace(TINY, num_seeds=num_seeds))
    assert told == {"jax_num_cpu_devices": num_devices}


def test_chunks_of_a_prime_number_of_updates():
    """As long as others; chunks of a single update had the host work as long as the device."""
    config = dataclasses.replace(TINY, total_timesteps=4099 * TINY.steps_per_update)
    programs = script.make_programs(config, script.make_train(config), script.start_devices(config))
    states = programs[0].eval_shape(np.arange(1))
    _, metrics = programs[1].eval_shape(np.int32(0), states)
    assert metrics["global_step"].shape == (1, 1367)  # three chunks of up to 65,536 steps


def test_signals_while_compiling(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path)), [2])
    assert "nothing was saved" in capsys.readouterr().err


def test_without_stderr(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    config = script.parse_args([])
    assert run(script, [*flags_of(TINY, config), f"--runs-dir={tmp_path}"]) is None
    (folder,) = tmp_path.iterdir()
    assert (folder / "metadata.json").exists()


def flags_of(config, default):
    values = {name: x for name, x in vars(config).items() if x != getattr(default, name)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@pytest.mark.parametrize(
    "part", ["jax.stages.Lowered.compile", "orbax.checkpoint.CheckpointManager.save"]
)
def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path, part):
    """A ValueError that names no flag is not a user's mistake, nor, while saving, a full disk."""
    monkeypatch.setattr(part, raise_value_error)
    with pytest.raises(ValueError, match="a bug"):
        run(script, [*flags_of(TINY, script.Config()), f"--runs-dir={tmp_path}"])


def test_a_bug_while_training_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "record", raise_value_error)
    with pytest.raises(ValueError, match="a bug"):
        script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path)))


def raise_value_error(*_, **__):
    raise ValueError("a bug")


def last_lines(config, folder, columns, capsys):
    """What is told of the returns of a run whose metrics.csv has these columns."""
    (folder / "metrics.csv").write_text("")
    table = pd.DataFrame({"losses/grad_norm": 1.0} | columns)
    table.to_csv(folder / "metrics.csv", index=False)
    metadata = {"updates": 12, "device": "a device", "run_seconds": 1.0, "compile_seconds": 1.0}
    script.save_results(config, folder, {}, metadata)
    return capsys.readouterr().out.splitlines()


def test_one_seed_has_no_spread(finished, capsys, tmp_path):
    rows = read_rows(finished)
    columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
    line, *_ = last_lines(TINY, tmp_path, columns, capsys)
    last = np.mean(columns["charts/episodic_return"][-2:])  # of 12 updates
    greedy = columns["eval/episodic_return"][-1]
    assert line == f"12 of 12 updates, return while exploring {last:.1f}, greedy {greedy:.1f}"


def test_seeds_whose_episodes_end_at_other_times(tmp_path, capsys):
    """Each seed's own last value, then the mean over seeds, in the summary and in the curve."""
    curves = []

    def plot(axes, steps, returns, *args, **kwargs):
        curves.append(dict(zip(steps, returns, strict=True)))

    returns = np.full((100, 2), np.nan)
    returns[:, 0], returns[49, 1] = 10, 1000
    steps = np.arange(1, 101)
    columns = {"seed": np.tile([0, 1], 100), "global_step": np.repeat(steps, 2)}
    columns |= {"charts/episodic_return": returns.ravel()}
    config = dataclasses.replace(TINY, num_seeds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.plot", plot)
        patch.setattr("matplotlib.axes.Axes.legend", lambda axes: None)
        line, *_ = last_lines(config, tmp_path, columns, capsys)
    assert line.endswith("return while exploring 505.0 (seeds 10.0 to 1000.0)")
    (curve,) = curves
    assert curve == {step: 10 if step < 50 else 505 for step in steps}


def test_nan_is_named_in_the_summary(tmp_path, capsys):
    columns = {"seed": [0, 1] * 3, "global_step": [32, 32, 64, 64, 96, 96]}
    columns |= {"charts/episodic_return": 1.0, "losses/grad_norm": [1, 1, 1, np.nan, 1, np.nan]}
    lines = last_lines(dataclasses.replace(TINY, num_seeds=2), tmp_path, columns, capsys)
    assert lines[1] == "seed 1: NaN in the loss from step 64 on"


def test_failures_of_physics_are_counted_in_the_summary(tmp_path, capsys):
    columns = {"seed": [0] * 3, "global_step": [32, 64, 96], "charts/episodic_return": 1.0}
    for failures, words in {(0, 0, 0): "steps/s", (0, 3, 1): "physics failed in 4 steps"}.items():
        _, line, *_ = last_lines(
            TINY, tmp_path, columns | {"charts/physics_failures": failures}, capsys
        )
        assert words in line


def test_log_gets_plain_lines(finished, tmp_path, capsys):
    columns = list(read_rows(finished)[0])[1:]
    metrics = {name: jnp.full((1, 3), 7.0) for name in columns}
    bar = tqdm(disable=True)
    bar.last_print_t = time.time()
    script.record(TINY, tmp_path, bar, dict(metrics))
    assert capsys.readouterr().err == ""
    bar.last_print_t -= 31
    metrics["losses/grad_norm"] = jnp.array([[1.0, jnp.nan, 1]])
    script.record(TINY, tmp_path, bar, metrics)
    words = "step 7.0 of 384, return 7.0, NaN in the loss of seed 0\n"
    assert capsys.readouterr().err == words
    bar.last_print_t -= 31
    metrics["charts/episodic_return"] *= jnp.nan  # as in Overcooked, where all end together
    script.record(TINY, tmp_path, bar, metrics)
    assert "of 384, no episode ended, NaN in the loss" in capsys.readouterr().err
    assert len(read_rows(tmp_path)) == 9


class Terminal(io.StringIO):
    """Both streams, as a person sees them."""

    def isatty(self):
        return True


def test_summary_stands_below_the_bar(stopped, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    resume(stopped)
    above, below = terminal.getvalue().split("12 of 12 updates")
    assert "100%" in above and above.endswith("\n") and "\r" not in below


def test_wandb_of_many_seeds(tmp_path):
    """One run, with the mean of all seeds, and the deviation of what varies between them."""
    config = dataclasses.replace(TINY, num_seeds=17, runs_dir=str(tmp_path), wandb_mode="offline")
    folder = script.main(config)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run, history = wandb_history(path)
    rows = read_rows(folder)
    assert run.display_name == "mean" and len(history) == 12
    loss = [float(row["losses/td_loss"]) for row in rows[-17:]]
    np.testing.assert_allclose(history[-1]["losses/td_loss"], np.mean(loss), rtol=1e-5)
    np.testing.assert_allclose(history[-1]["losses/td_loss_std"], np.std(loss, ddof=1), rtol=1e-5)
    stds = {name for item in history for name in item if name.endswith("_std")}
    assert not stds & {"global_step_std", "charts/learning_rate_std", "charts/epsilon_std"}


def test_numbers_of_numpy_and_jax_are_numbers(tmp_path):
    settings = {"num_envs": np.int64(4), "learning_rate": np.float32(1e-3), "gamma": jnp.array(0.5)}
    config = dataclasses.replace(TINY, **settings)
    assert (
        type(config.num_envs) is int and type(config.learning_rate) is type(config.gamma) is float
    )
    for name, value in {"num_envs": np.int64(0), "gamma": jnp.array(1.5)}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is"):
            dataclasses.replace(TINY, **{name: value})
    folder = script.main(dataclasses.replace(config, runs_dir=str(tmp_path)))
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == config.learning_rate
