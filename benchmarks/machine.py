"""What the studies share: running a script as a person does, and saying on what machine."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_script(script: str, arguments: list[str], runs_dir: Path) -> tuple[Path, dict]:
    """Run <script>.py; returns the folder of the run and its metadata, with peak_memory_gib of the process added."""
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", "--runs-dir", runs_dir, *arguments]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{script}.py {' '.join(arguments)} failed")
    run_dir = max(runs_dir.iterdir(), key=lambda path: path.stat().st_ctime)
    metadata = json.loads((run_dir / "metadata.json").read_text())
    return run_dir, metadata | {"peak_memory_gib": usage.ru_maxrss / 2**20}


def describe_machine() -> dict:
    """Processor, cores that this process may use, Python and the versions that matter."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), model
        )
    versions = {name: version(name) for name in ("jax", "flax", "optax", "gymnax", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "python": platform.python_version(), "versions": versions}
