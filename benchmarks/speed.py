"""Speed of a script beside a peer's on the same machine, run in turns; writes results/<name>.json.

    python benchmarks/speed.py pqn_cartpole --name pqn_speed_8_seeds --flags "--num-seeds 8 --eval-interval 0" \\
        --peer "PureJaxQL=path/to/its/python benchmarks/peer_purejaxql.py --num-seeds 8"

A peer is any command whose last line of output is JSON with steps_per_second and compile_seconds; without one, only the
script is timed.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from machine import describe_machine, run_script


def main(
    script: tyro.conf.Positional[str],
    /,
    name: str,
    flags: str = "",
    peer: str | None = None,
    repeats: int = 3,
) -> None:
    """Time the script and the peer in turns; prints medians and their ratio.

    Args:
        script: Name of the script, without .py.
        name: What the study is called in the name of its file.
        flags: Flags of the script.
        peer: "label=command" of the other implementation.
        repeats: Runs of each.
    """
    label, _, command = (peer or "").partition("=")
    timings = {script: [], label: []} if peer else {script: []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            _, metadata = run_script(script, shlex.split(flags), Path(folder))
        timings[script].append(metadata)
        if peer:
            output = subprocess.run(
                shlex.split(command), stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            timings[label].append(json.loads(output.splitlines()[-1]))
    keys = ("steps_per_second", "compile_seconds", "peak_memory_gib")
    timings = {
        who: {key: [round(run[key], 3) for run in runs if key in run] for key in keys}
        for who, runs in timings.items()
    }
    medians = {
        who: {key: statistics.median(values) for key, values in rows.items() if values}
        for who, rows in timings.items()
    }
    result = {
        "script": script,
        "flags": flags,
        "peer": label,
        **describe_machine(),
        "timings": timings,
        "medians": medians,
    }
    if peer:
        result["ratios"] = {
            key: medians[script][key] / medians[label][key]
            for key in keys[:2]
            if medians[label][key]
        }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=2))
    print(
        json.dumps({key: result[key] for key in ("medians", "ratios") if key in result}, indent=2)
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
