"""The script as a person runs it: alone in an empty folder, in a process of its own."""

import csv
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, only, warmup
from flax import serialization

FILES = {"checkpoint.msgpack", "config.json", "learning_curve.png", "metadata.json", "metrics.csv", "params.msgpack"}


def finish(process):
    """Wait for a process that is to succeed; its output."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


def run_folder(command):
    (folder,) = (command.folder / "runs").iterdir()
    return folder


def results(folder):
    """The bytes that a run must reproduce."""
    return (folder / "metrics.csv").read_bytes(), (folder / "params.msgpack").read_bytes()


def test_help(command):
    output, _ = finish(command("--help", tiny=False))
    assert "arXiv" in output and "--gamma" in output and "Discount factor" in output


def test_run_leaves_its_files_and_no_warning(command):
    output, errors = finish(command("--num-seeds=2", "--seed=5", "--anneal_lr=False", "--total-timesteps=3.2e2"))
    folder = run_folder(command)
    assert re.fullmatch(r"\w+__[\w-]+__5__\d+", folder.name)
    assert {path.name for path in folder.iterdir()} == FILES
    assert "warning" not in (output + errors).lower()
    assert str(folder.relative_to(command.folder)) in output and "steps/s" in output and "100%" in errors

    config = json.loads((folder / "config.json").read_text())
    assert config["num_seeds"] == 2 and config["anneal_lr"] is False and config["total_timesteps"] == 320
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(int(row["seed"]), int(row["global_step"])) for row in rows] == [
        (seed, steps) for steps in range(32 + warmup(command.script), 321, 32) for seed in (5, 6)
    ]
    assert len({row["charts/learning_rate"] for row in rows}) == 1
    variables = serialization.msgpack_restore((folder / "params.msgpack").read_bytes())
    shapes = [x.shape for x in jax.tree.leaves(variables)]
    assert {shape[0] for shape in shapes} == {2} and 16 in {shape[-1] for shape in shapes}  # seeds, units
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["steps_per_second"] > 0 and "jax" in metadata["versions"]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_seed_does_not_depend_on_those_beside_it(command):
    finish(command("--num-seeds=3", "--seed=7"))
    with (run_folder(command) / "metrics.csv").open() as file:
        together = [row for row in csv.DictReader(file) if row["seed"] == "8"]
    finish(command("--seed=8", "--runs-dir=alone"))
    (alone,) = (command.folder / "alone").iterdir()
    rows = list(csv.DictReader((alone / "metrics.csv").open()))
    assert len(rows) == 12
    values = [np.array([list(map(float, row.values())) for row in table]) for table in (rows, together)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


LONG = ["--num-seeds=3", "--total-timesteps=9600", "--checkpoint-interval=0", "--eval-interval=50"]


def test_killed_and_resumed_equals_never_killed(command):
    """SIGKILL at KILLS random moments; the bytes of metrics and parameters are those of a run left alone."""
    started = time.time()
    finish(command(*LONG, "--runs-dir=whole"))
    seconds = time.time() - started
    (whole,) = (command.folder / "whole").iterdir()
    flags, tiny, moments, kills = LONG, True, random.Random(0), int(os.environ.get("KILLS", "3"))
    while kills:
        process = command(*flags, tiny=tiny)
        if not (folders := list(command.folder.glob("runs/*/config.json"))):
            while not folders and process.poll() is None:
                time.sleep(0.05)
                folders = list(command.folder.glob("runs/*/config.json"))
            time.sleep(moments.uniform(0, 1))
        else:
            time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.communicate()
        kills -= 1
        flags, tiny = [f"--resume={folders[0].parent}"], False
    finish(command(*flags, tiny=tiny))
    assert results(run_folder(command)) == results(whole)


def test_interrupted_and_resumed(command):
    """Ctrl-C ends the run after the updates under way, with all its files."""
    finish(command(*LONG, "--runs-dir=whole"))
    (whole,) = (command.folder / "whole").iterdir()
    process = command(*LONG)
    while process.poll() is None and not list(command.folder.glob("runs/*/checkpoint.msgpack")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = finish(process)
    folder = run_folder(command)
    assert {path.name for path in folder.iterdir()} == FILES
    if results(folder) != results(whole):
        assert "--resume" in output
    finish(command(f"--resume={folder}", tiny=False))
    assert results(folder) == results(whole)


@pytest.mark.parametrize("command", ["pqn_cartpole", "pqn_rnn_craftax", "pql_isaac_style"], indirect=True)
def test_resumed_run_is_the_same_program(command, monkeypatch):
    """A compilation cache that has the program of a run need not compile another one to resume it."""
    cache = command.folder / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    finish(command())
    (program,) = cache.glob("jit_proceed*-cache")
    finish(command(f"--resume={run_folder(command)}", tiny=False))
    assert list(cache.glob("jit_proceed*-cache")) == [program]


def test_damaged_files(command):
    """A checkpoint that is not whole, metrics of another script or with rows lost: one line that names the file."""
    finish(command())
    checkpoint, metrics = (run_folder(command) / name for name in ("checkpoint.msgpack", "metrics.csv"))
    state, rows = checkpoint.read_bytes(), metrics.read_bytes()
    for file, data in (
        (metrics, b"".join(rows.splitlines(keepends=True)[:-1])),
        (metrics, rows.replace(b"seed,", b"seed,losses/other,", 1)),
        (checkpoint, state[: len(state) // 2]),
        (checkpoint, b"\x00" * 99),
    ):
        file.write_bytes(data)
        process = command(f"--resume={run_folder(command)}", tiny=False)
        _, errors = process.communicate()
        assert process.returncode == 2
        assert "--resume" in errors and file.name in errors and len(errors.splitlines()) == 1


DIVERGING = {
    "pqn_cartpole": "--gamma=1 --reward-scale=2e9 --norm=none --max-grad-norm=2e9",
    "pqn_minatar": "--gamma=1 --reward-scale=2e9 --norm=none --max-grad-norm=2e9",
    "ppo_cartpole": "--activation=relu --num-layers=40",
    "dqn_cartpole": "--hidden-sizes" + " 64" * 40,
    "pqn_rnn_craftax": "--env-params memory_length=0",  # observations divided by it
    "pql_isaac_style": "--hidden-sizes" + " 64" * 40,
}


def test_nan_is_named(command):
    flags = [*DIVERGING[command.script].split(), "--learning-rate=1", "--num-seeds=2", "--eval-interval=0"]
    _, errors = finish(command(*flags))
    named = re.findall(r"seed (\d): NaN in the loss or its gradient from update (\d+) on", errors)
    rows = list(csv.DictReader((run_folder(command) / "metrics.csv").open()))
    learns = SCRIPTS[command.script].get("learning_starts", 0)
    nan_updates = {
        row["seed"]: (int(row["global_step"]) - warmup(command.script)) // 32
        for row in reversed(rows)
        if row["losses/grad_norm"] == "nan" and int(row["global_step"]) > learns
    }
    assert nan_updates and {seed: int(update) for seed, update in named} == nan_updates


def wandb_history(path):
    """The records of history in an offline file of Weights & Biases: a leveldb log of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message, history, config = path.read_bytes(), 7, b"", [], {}
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, message = Record.FromString(message), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
            if record.WhichOneof("record_type") == "run":
                run = record.run
                config = {item.key: json.loads(item.value_json) for item in run.config.update} or config
    return run.display_name, run.run_group, config, history


def test_wandb_offline(command):
    finish(command("--num-seeds=2", "--wandb-mode=offline"))
    folder = run_folder(command)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    runs = {}
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        name, group, config, history = wandb_history(path)
        assert group == folder.name and config["num_envs"] == 4
        runs[name] = history
    assert set(runs) == {"seed-0", "seed-1", "mean"}
    for seed in "01":
        mine = [row for row in rows if row["seed"] == seed]
        assert [item["global_step"] for item in runs[f"seed-{seed}"]] == [int(row["global_step"]) for row in mine]
        logged = [item["losses/grad_norm"] for item in runs[f"seed-{seed}"] if "losses/grad_norm" in item]
        known = [float(row["losses/grad_norm"]) for row in mine if row["losses/grad_norm"] != "nan"]
        np.testing.assert_allclose(logged, known, rtol=1e-5)
        assert sum("eval/episodic_return" in item for item in runs[f"seed-{seed}"]) == 3
    assert len(runs["mean"]) == 12 and "losses/grad_norm_std" in runs["mean"][-1]


@pytest.mark.parametrize("command", ["pqn_cartpole"], indirect=True)
def test_wandb_of_one_seed(command):
    finish(command("--wandb-mode=offline"))
    (path,) = run_folder(command).glob("wandb/offline-run-*/run-*.wandb")
    name, _, _, history = wandb_history(path)
    assert name == "seed-0" and len(history) == 12
    assert not [key for item in history for key in item if key.endswith("_std")]


@only("replay_insert")
def test_replay_too_large_is_refused(script, tmp_path):
    arguments = [sys.executable, ROOT / f"{script.__name__}.py", "--buffer-size=2e9"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "--buffer-size is 2000000000" in done.stderr and "GiB" in done.stderr and done.stderr.count("\n") == 1
