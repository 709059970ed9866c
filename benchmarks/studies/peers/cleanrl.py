"""CleanRL's ppo.py or another of its scripts, timed: run it with the Python of CleanRL.

    python benchmarks/studies/peers/cleanrl.py path/to/cleanrl/ppo.py --total-timesteps 100000

Prints a line of JSON: steps per second as the script itself counts them (its start-up not
included), seconds of the whole process, and the mean return of its last twenty episodes.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

script, *flags = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    started = time.perf_counter()
    command = [sys.executable, Path(script).resolve(), "--no-cuda", *flags]
    output = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder
    ).stdout
    seconds = time.perf_counter() - started
returns = [float(text) for text in re.findall(r"episodic_return=\[?([-\d.]+)", output)]
result = {
    "compile_seconds": 0,
    "process_seconds": seconds,
    "steps_per_second": int(re.findall(r"SPS: (\d+)", output)[-1]),
    "train_returns": [sum(returns[-20:]) / 20],
}
print(json.dumps(result))
