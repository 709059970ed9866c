"""What README.md shows is true: its code runs, and the files it links to exist."""

import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_code_runs(tmp_path):
    command = [
        sys.executable,
        ROOT / "pqn_cartpole.py",
        "--total-timesteps=2048",
        "--eval-interval=0",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", *blocks])
    assert len(blocks) == 4
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_files_exist():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
