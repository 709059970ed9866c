"""The script as a person runs it: alone in an empty folder, in a process of its own."""

import csv
import importlib
import json
import os
import random
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import PURE, ROOT, SCRIPTS, SIZES, only, warmup
from conftest import flags as tiny_flags
from flax import serialization

FILES = {"checkpoints", "config.json", "learning_curve.png", "metadata.json", "metrics.csv"}
FILES |= {"params.msgpack"}
NUM_UPDATES, NUM_ENVS = 140, 320  # 11 chunks of 12 updates, and one of 8
OFTEN = "--checkpoint-interval=0"  # after each chunk


def long_run(script: str, num_updates=NUM_UPDATES, num_envs=NUM_ENVS) -> list[str]:
    steps = num_envs * (8 * num_updates + warmup(script) // SIZES["num_envs"])
    sizes = ["--num-seeds=2", f"--num-envs={num_envs}", f"--total-timesteps={steps}"]
    sizes += ["--buffer-size=2000"] if "buffer_size" in SCRIPTS[script] else []
    return [*sizes, "--eval-interval=20"]


def finish(process, code=0):
    """Wait for a process that is to end with an exit code; its output."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


def resume(script, folder, *flags):
    """In this process, which has JAX and what the scripts import."""
    module = importlib.import_module(script)
    return module.main(module.parse_args(["--resume", str(folder), *flags]))


def run_folder(command, runs_dir="runs"):
    (folder,) = (command.folder / runs_dir).iterdir()
    return folder


def results(folder):
    """The bytes that a run must reproduce."""
    return (folder / "metrics.csv").read_bytes(), (folder / "params.msgpack").read_bytes()


def checkpoints(command):
    """The names of the whole checkpoints of the run."""
    return {
        path.name for path in command.folder.glob("runs/*/checkpoints/*") if path.name.isdigit()
    }


def wait_for_checkpoint(command, process, other_than=()):
    while process.poll() is None and not checkpoints(command) - set(other_than):
        time.sleep(0.01)


def read_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def wandb_history(path):
    """The runs and the history in an offline file of wandb, a leveldb log of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message, history, run = path.read_bytes(), 7, b"", [], None
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
                names = [item.key or item.nested_key[0] for item in items]
                values = [json.loads(item.value_json) for item in items]
                history.append(dict(zip(names, values, strict=True)))
            if record.WhichOneof("record_type") == "run":
                run = record.run
    return run, history


# Those whose programs are put on devices in lines of their own (test_same_lines.py).
OWN_DEVICES = ["pqn_cartpole", "pqn_rnn_craftax"]


@pytest.mark.parametrize("command", OWN_DEVICES, indirect=True)
def test_journey(command, monkeypatch):
    """Run, kill, resume: the files of a run that was left alone, and wandb has what they have."""
    cache = command.folder / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = [*long_run(command.script), "--seed=5"]
    process = command(*flags, OFTEN, "--wandb-mode=offline", "--wandb-tags=a")
    wait_for_checkpoint(command, process)
    time.sleep(random.Random(command.script).uniform(0, 0.5))  # of some seconds
    process.kill()
    process.communicate()
    folder = run_folder(command)
    assert not (folder / "metadata.json").exists(), "it was finished before it was killed"
    told = finish(command(f"--resume={folder}", "--checkpoint-interval=1", tiny=False))
    check_words(command.script, folder, *told)
    assert {path.name for path in folder.iterdir()} == FILES | {"wandb"}
    check_files(command.script, folder)
    check_wandb(folder)
    # The first states and a chunk: the resumed run compiled no program of its own.
    programs = [path.name for path in cache.glob("jit_*-cache")]
    assert sum(name.startswith(("jit_init-", "jit_run_chunk-")) for name in programs) == 2

    finish(command(*flags, "--runs-dir=whole"))
    whole = run_folder(command, "whole")
    assert {path.name for path in whole.iterdir()} == FILES
    assert results(folder) == results(whole)
    if command.script == "pqn_cartpole":  # a seed does not depend on those beside it
        script = importlib.import_module(command.script)
        arguments = [*tiny_flags(command.script), *long_run(command.script)]
        arguments += ["--num-seeds=1", "--seed=6", "--runs-dir", str(command.folder / "alone")]
        alone = read_rows(script.main(script.parse_args(arguments)))[:12]
        together = [row for row in read_rows(whole) if row["seed"] == "6"][:12]
        tables = [[[*map(float, row.values())] for row in rows] for rows in (alone, together)]
        np.testing.assert_allclose(*tables, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(*(f"error::{kind}Warning" for kind in ("User", "Runtime", "Future")))
@pytest.mark.parametrize("script", sorted(set(PURE) - set(OWN_DEVICES)), indirect=True)
def test_run(script, tmp_path, capsys):
    """From start to end, in this process; their checkpoints are in test_train.py."""
    flags = [*tiny_flags(script.__name__), *long_run(script.__name__, 22, 32), "--seed=5"]
    flags += ["--env-id=smax_skirmish"] if hasattr(script, "make_jaxmarl") else []
    folder = script.main(script.parse_args([*flags, f"--runs-dir={tmp_path}"]))
    check_words(script.__name__, folder, *capsys.readouterr())
    assert {path.name for path in folder.iterdir()} == FILES
    check_files(script.__name__, folder, 22, 32)


def check_words(script, folder, output, errors):
    first_line = errors.splitlines()[0]
    assert all(word in first_line for word in (script, "2 seeds on", str(folder.name)))
    assert "warning" not in (output + errors).lower() and "\r" not in errors
    assert "steps/s" in output and "greedy" in output


def check_files(script, folder, num_updates=NUM_UPDATES, num_envs=NUM_ENVS):
    config = json.loads((folder / "config.json").read_text())
    assert config["num_seeds"] == 2 and config["script"] == script
    rows = read_rows(folder)
    per_env = warmup(script) // SIZES["num_envs"] + 8 * np.arange(1, num_updates + 1)
    steps = num_envs * per_env
    expected = [(seed, step) for step in steps for seed in (5, 6)]
    assert [(int(row["seed"]), int(row["global_step"])) for row in rows] == expected
    variables = serialization.msgpack_restore((folder / "params.msgpack").read_bytes())
    shapes = [x.shape for x in jax.tree.leaves(variables)]
    assert {shape[0] for shape in shapes} == {2}  # seeds
    assert 16 in {shape[-1] for shape in shapes}  # units
    metadata = json.loads((folder / "metadata.json").read_text())
    seconds = 2 * 8 * num_envs * num_updates / metadata["steps_per_second"]
    np.testing.assert_allclose(metadata["run_seconds"], seconds, rtol=1e-6)
    assert "jax" in metadata["versions"] and metadata["updates"] == num_updates
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def check_wandb(folder):
    """Of the resumed run, each seed's offline file has each update once, with its values: it
    replaces the first one on wandb's server."""
    rows = read_rows(folder)
    histories = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run, history = wandb_history(path)
        if run is None:  # killed
            continue
        assert run.run_group == folder.name and list(run.tags) == ["a"]
        histories[run.display_name] = history  # the last one
    assert set(histories) == {"seed-5", "seed-6"}
    for name, history in histories.items():
        mine = [row for row in rows if row["seed"] == name[-1]]
        for row, item in zip(mine, history, strict=True):
            assert item["_step"] == item["global_step"] == int(row["global_step"])
            known = {column for column, value in row.items() if value != "nan"} - {"seed"}
            assert known == {column for column in item if column[0] != "_"}
            for column in known:
                np.testing.assert_allclose(item[column], float(row[column]), rtol=1e-5)


@pytest.mark.parametrize("command", ["pqn_cartpole"], indirect=True)
def test_ctrl_c(command):
    """It is answered at once; one a second later ends the run at once; only a chunk is lost."""
    flags = ["--total-timesteps=1e9", "--num-envs=32", "--eval-interval=0"]
    process = command(*flags, OFTEN)
    wait_for_checkpoint(command, process)
    folder = run_folder(command)
    process.send_signal(signal.SIGINT)
    output, errors = finish(process, code=128 + signal.SIGINT)
    _, told, *_, last = errors.splitlines()
    assert told.startswith("stopping after this chunk")
    resume_command = [sys.executable, "pqn_cartpole.py", "--resume", f"runs/{folder.name}"]
    assert last == f"to resume: {shlex.join(resume_command)}"
    assert "updates, return" in output and (folder / "params.msgpack").exists()

    # A chunk of many seconds: the second signal does not wait for its end.
    long_chunk = ["--num-envs=64", "--num-steps=8192", "--num-minibatches=256"]
    process = command(*flags, *long_chunk, OFTEN, "--runs-dir=long")
    while process.poll() is None and not list(command.folder.glob("long/*/checkpoints/1")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process, code=128 + signal.SIGINT)
    assert errors.splitlines()[-1].startswith("stopped; to resume: ")


@pytest.mark.parametrize("command", ["pqn_cartpole"], indirect=True)
def test_stopped_by_a_scheduler(command):
    """SIGTERM reaches all processes of a run, twice as from uv: wandb's service is gone, the
    training is saved; a resumed run sends it everything."""
    flags = ["--total-timesteps=1e9", "--eval-interval=0", "--wandb-mode=offline", "--seed=5"]
    process = command(*flags, "--num-seeds=2", OFTEN)
    wait_for_checkpoint(command, process)
    folder = run_folder(command)
    subprocess.run(["pkill", "-TERM", "-P", str(process.pid)], check=True)
    time.sleep(0.5)  # of training without it
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    _, errors = finish(process, code=128 + signal.SIGTERM)
    told = [line for line in errors.splitlines() if "Weights & Biases" in line]
    assert len(told) == 1 and "Traceback" not in errors
    before = set(folder.glob("wandb/offline-run-*/*.wandb"))
    config = json.loads((folder / "config.json").read_text())
    config["total_timesteps"] = int(read_rows(folder)[-1]["global_step"]) + 32  # soon at its end
    (folder / "config.json").write_text(json.dumps(config))
    resume(command.script, folder, "--wandb-mode=offline")
    rows = [int(row["global_step"]) for row in read_rows(folder) if row["seed"] == "5"]
    after = set(folder.glob("wandb/offline-run-*/*.wandb")) - before
    assert len(after) == 2  # seeds
    for path in after:
        assert [item["global_step"] for item in wandb_history(path)[1]] == rows


@pytest.mark.parametrize("command", ["pqn_cartpole"], indirect=True)
def test_full_disk(command):
    """One line, and the last whole checkpoint stays: no file may grow beyond 40 KiB."""
    no_cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # it would be cut off, too
    process = command(*long_run(command.script, num_envs=32), OFTEN, environ=no_cache)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40 * 2**10,) * 2)
    _, errors = process.communicate()
    assert process.returncode == 2
    *_, to_resume, last_line = errors.splitlines()
    assert "File too large" in last_line and "Traceback" not in errors
    folder = run_folder(command)
    assert f"--resume runs/{folder.name}" in to_resume
    resume(command.script, folder)
    assert len(read_rows(folder)) == 2 * NUM_UPDATES


DIVERGING = {
    "pqn_cartpole": "--gamma=1 --reward-scale=2e9 --norm=none --max-grad-norm=2e9 --num-layers=3",
    "dqn_cartpole": "--hidden-sizes" + " 64" * 20,
}


@pytest.mark.parametrize("script", DIVERGING, indirect=True)
def test_nan_is_named(script, tmp_path, capsys):
    flags = [*tiny_flags(script.__name__), *DIVERGING[script.__name__].split()]
    flags += ["--learning-rate=1", "--num-seeds=2", "--eval-interval=0", f"--runs-dir={tmp_path}"]
    folder = script.main(script.parse_args(flags))
    named = re.findall(r"seed (\d): NaN in the loss from step (\d+) on", capsys.readouterr().out)
    nan_steps = {
        row["seed"]: row["global_step"]
        for row in reversed(read_rows(folder))
        if row["losses/grad_norm"] == "nan"
    }
    learns = SCRIPTS[script.__name__].get("learning_starts", 0)
    assert nan_steps and dict(named) == nan_steps
    assert all(int(step) > learns for step in nan_steps.values())


TWO_DEVICES = """
import sys
sys.path[:0] = sys.argv[1:]
import importlib, jax, numpy as np
from conftest import SCRIPTS
for name in ("pqn_cartpole", "pqn_rnn_craftax"):  # whose make_programs differ
    script = importlib.import_module(name)
    config = script.Config(**SCRIPTS[name], num_seeds=2)
    mesh = script.start_devices(config)
    init, run_chunk = script.make_programs(config, script.make_train(config), mesh)
    states = init.eval_shape(np.arange(2))
    assert mesh.size == 2
    program = run_chunk.lower(np.int32(0), states).compile().as_text()
    assert not [name for name in ("all-gather", "all-reduce") if name in program], name
"""


def test_seeds_on_two_devices_do_not_wait_for_each_other():
    """XLA aborts a program in which a CPU device waits for another for longer than 40 seconds."""
    two_devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environ = os.environ | {"XLA_FLAGS": two_devices}
    command = [sys.executable, "-c", TWO_DEVICES, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def start_hosts(command, *flags, environ=None):
    """The script on two hosts, as Slurm would start it, both on this machine."""
    job = str(random.randrange(4096, 2**15))  # the coordinator's port comes from it
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [
        command(
            *flags,
            environ=slurm | {"SLURM_PROCID": host, "SLURM_LOCALID": host} | (environ or {}),
        )
        for host in "01"
    ]


@pytest.mark.parametrize("command", ["pqn_cartpole"], indirect=True)
def test_two_hosts(command):
    """Two processes with a device each, one of them killed, both resumed: one process with two."""
    flags = long_run(command.script)
    finish(command(*flags, "--runs-dir=one"))
    hosts = start_hosts(command, *flags, OFTEN, "--distributed")
    wait_for_checkpoint(command, hosts[0])
    for process in hosts[::-1]:
        process.kill()
        process.communicate()
    folder = run_folder(command)
    for process in start_hosts(command, *flags, "--distributed", f"--resume={folder}"):
        finish(process)
    assert results(folder) == results(run_folder(command, "one"))


@pytest.mark.parametrize("command", ["pqn_cartpole"], indirect=True)
def test_hosts_end_together(command):
    """What the first one refuses, none waits for."""
    login = {"WANDB_API_KEY": "", "NETRC": str(command.folder / "netrc")}
    started = time.monotonic()
    flags = ["--distributed", "--num-seeds=2", "--wandb-mode=online"]
    hosts = start_hosts(command, *flags, environ=login)
    errors = [finish(process, code=2)[1] for process in hosts]
    assert "--wandb-mode is online" in errors[0].splitlines()[-1]
    assert not [text for text in errors if "Traceback" in text or "Fatal" in text]
    assert time.monotonic() - started < 100


ENV_IDS = {"dqn_cartpole": "CartPole-v1", "pql_isaac_style": "Pendulum-v1"}


@only("replay_insert")
def test_replay_too_large_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--buffer-size is 2000000000.* GiB"):
        script.main(script.parse_args(["--buffer-size=2e9", "--env-id", ENV_IDS[script.__name__]]))
    assert not list(tmp_path.iterdir())
