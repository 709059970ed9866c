"""Speed of a script beside a peer's on the same machine, run in turns: a JSON file of timings.

    python benchmarks/studies/speed.py pqn_cartpole --flags="--num-seeds 8 --eval-interval 0" \\
        --peer 'PureJaxQL=$PUREJAXQL benchmarks/studies/peers/purejaxql_pqn.py --num-seeds 8'

A peer is any command whose last line of output is JSON with steps_per_second and compile_seconds;
without one, only the script is timed.
"""

import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import tyro

import common
import throughput

KEYS = ("steps_per_second", "compile_seconds", "peak_memory_gib")


def main(
    script: tyro.conf.Positional[str],
    /,
    flags: str = "",
    peer: str | None = None,
    repeats: int = 3,
    out: Path = common.OUT / "speed",
) -> None:
    """Time the script and the peer in turns; prints medians and their ratio.

    Args:
        script: Name of the script, without .py.
        flags: Flags of the script.
        peer: "label=command" of the other implementation; left out where a variable in it, as
            $PUREJAXQL, is not set.
        repeats: Runs of each.
        out: Where the JSON file goes, without suffix.
    """
    label, _, command = (peer or "").partition("=")
    runs = {script: []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            _, metadata = common.run_script(script, shlex.split(flags), Path(folder))
        runs[script].append(metadata)
        if peer and (result := throughput.run_peer(label, command)):
            runs.setdefault(label, []).append(result)
    timings = {
        who: {key: [round(run[key], 3) for run in own if key in run] for key in KEYS}
        for who, own in runs.items()
    }
    medians = {
        who: {key: statistics.median(values) for key, values in own.items() if values}
        for who, own in timings.items()
    }
    study = {"script": script, "flags": flags, "peer": label if label in runs else ""}
    study |= {"device": metadata["device"], "timings": timings, "medians": medians}
    if label in runs:
        ratios = {key: medians[script][key] / (medians[label][key] or 1) for key in KEYS[:1]}
        study["ratios"] = ratios
    common.write(out, study)
    print(json.dumps({key: study[key] for key in ("medians", "ratios") if key in study}, indent=2))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
