"""Runs a program of examples/ as a person does, and keeps what it prints and draws.

    python benchmarks/studies/example.py examples/baird.py --out benchmarks/results/example_baird

The program gets the same --out, so its table and picture lie beside the JSON file.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import tyro

import common


def main(program: tyro.conf.Positional[str], out: Path = common.OUT / "example") -> None:
    """Run it, and write <out>.json.

    Args:
        program: Its path from the root of the repository, and its flags.
        out: Where the files go, without suffix.
    """
    out = out.resolve()
    of_root = os.path.relpath(out, common.ROOT)
    command = [sys.executable, *shlex.split(program), "--out", of_root]
    started, lines = time.monotonic(), []
    with subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    common.write(out, {"printed": "".join(lines), "seconds": time.monotonic() - started})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
