"""What the studies share: a script run as a person runs it, and the files of results."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from throughput import ROOT, describe_run

RESULTS = ROOT / "benchmarks" / "results"
OUT = Path("runs/benchmarks")  # for what is no named study; git ignores it


def run_script(script: str, flags: list[str], runs_dir: Path) -> tuple[Path, dict]:
    """Run <script>.py; returns its run folder and metadata, with peak_memory_gib of the process."""
    command = [sys.executable, ROOT / f"{script}.py", *flags, "--runs-dir", runs_dir]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{script}.py {shlex.join(flags)} failed")
    run_dir = max(runs_dir.iterdir(), key=lambda path: path.stat().st_ctime)
    metadata = json.loads((run_dir / "metadata.json").read_text())
    return run_dir, metadata | {"peak_memory_gib": usage.ru_maxrss / 2**20}


def write(out: Path, study: dict) -> None:
    """Write the JSON file of a study, with its command and machine."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(describe_run() | study))
