"""main within a process: refusals, signals, threads, what it tells; the same in every script."""

import dataclasses
import json
import shutil
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCRIPTS
from test_bad_flags import run
from test_script import read_rows, wandb_history

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


def test_finished_run_is_not_touched(finished, capsys):
    before = contents(finished)
    assert script.main(script.parse_args(["--resume", str(finished)])) == finished
    assert f"{finished} is finished" in capsys.readouterr().out
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
    run(script, ["--resume", stopped, flag])
    assert words in capsys.readouterr().err and contents(stopped) == before


def test_resume_takes_flags_that_do_not_change_the_results(stopped):
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


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "it has no checkpoint yet"),
        (
            lambda run: damage(run / "checkpoints/12/states/manifest.ocdbt", b"0" * 99),
            "checkpoints",
        ),
        (lambda run: damage(run / "checkpoints/12/states/_METADATA", b"{"), "checkpoints"),
        (lambda run: damage(run / "metrics.csv", b"seed,a\n"), "metrics.csv lacks rows"),
        (lambda run: damage(run / "metrics.csv", b""), "metrics.csv"),
        (lambda run: drop_row(run / "metrics.csv"), "metrics.csv lacks rows"),
        (lambda run: edit(run / "config.json", script="dqn_cartpole"), "a run of dqn_cartpole.py"),
        (lambda run: edit(run / "config.json", hidden_size=8), "not compatible"),
    ],
)
def test_damaged_run(stopped, damage, words, capsys):
    damage(stopped)
    before = contents(stopped)
    run(script, ["--resume", stopped])
    *_, last_line = capsys.readouterr().err.splitlines()
    assert words in last_line and str(stopped) in last_line
    assert contents(stopped) == before


def damage(path, data):
    path.write_bytes(data)


def drop_row(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("runs_dir", ["file", "/proc/nowhere"])
def test_folder_that_cannot_be_made(runs_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(script.jax.stages.Lowered, "compile", None)  # before compiling
    with pytest.raises(SystemExit):
        script.main(dataclasses.replace(TINY, runs_dir=runs_dir))
    assert runs_dir in capsys.readouterr().err.splitlines()[-1]


def test_wandb_without_login_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(script.jax.stages.Lowered, "compile", None)
    config = dataclasses.replace(TINY, runs_dir=str(tmp_path / "runs"), wandb_mode="online")
    with pytest.raises(SystemExit):
        script.main(config)
    assert "--wandb-mode is online" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "runs").iterdir())


def test_wandb_without_login_leaves_a_stopped_run(stopped, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (stopped / "metadata.json").write_text("{}")
    damage(stopped / "metrics.csv", (stopped / "metrics.csv").read_bytes() + b"a row too many\n")
    edit(stopped / "config.json", total_timesteps=24 * 32)  # not yet finished
    before = contents(stopped)
    run(script, ["--resume", stopped, "--wandb-mode=online"])
    assert "--wandb-mode is online" in capsys.readouterr().err.splitlines()[-1]
    after = {path: data for path, data in contents(stopped).items() if "wandb" not in path.parts}
    assert after == before


def test_in_a_thread(tmp_path):
    """As a sweep agent of wandb calls it."""
    config = dataclasses.replace(TINY, runs_dir=str(tmp_path))
    thread = threading.Thread(target=script.main, args=[config])
    thread.start()
    thread.join()
    (folder,) = tmp_path.iterdir()
    assert (folder / "metadata.json").exists()


def test_signal_handlers_are_given_back(tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def record(*_):
        inside.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        raise ZeroDivisionError

    inside = []
    monkeypatch.setattr(script.Recorder, "record", record)
    with pytest.raises(ZeroDivisionError):
        script.main(dataclasses.replace(TINY, runs_dir=str(tmp_path)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not set(inside) & set(handlers)


def test_one_seed_has_no_spread(finished, tmp_path, capsys):
    words = script.plot_returns(TINY, finished)
    rows = read_rows(finished)
    last = np.mean([float(row["charts/episodic_return"]) for row in rows[-2:]])  # of 12 updates
    greedy = float(rows[-1]["eval/episodic_return"])
    assert words == f"return while exploring {last:.1f}, greedy {greedy:.1f}"


def test_log_gets_plain_lines(finished, monkeypatch, tmp_path, capsys):
    columns = list(read_rows(finished)[0])[1:]
    recorder = script.Recorder(TINY, tmp_path, columns, 0)
    metrics = {name: jnp.full((1, 3), 7.0) for name in columns}
    recorder.record(0, metrics)
    assert capsys.readouterr().err == ""
    recorder.printed_at = time.monotonic() - 31
    recorder.record(3, metrics)
    assert capsys.readouterr().err == "update 6 of 12, return 7.0\n"


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
