"""Which scripts compile for a GPU or a TPU, and the memory they take, without one.

    pip install "jax-cuda12-plugin==<jax's version>" "jax-cuda12-pjrt==<jax's version>" libtpu
    python benchmarks/studies/compiled_memory.py              # all programs, for both devices
    python benchmarks/studies/compiled_memory.py --only pql_isaac_style --devices h100

A script is compiled as it runs there, vmapped over seeds, without its evaluation. The memory is the
compiler's: the state, the metrics of four updates, and the largest scratch space between them.
"""

import json
import os
import subprocess
import sys
from typing import Literal

import tyro

import common
from gpu_launches import H100, script_program

# Script and flags; the last two are at the papers' sizes, which take long to compile.
PROGRAMS = [
    ("pqn_cartpole", ""),
    ("pqn_minatar", ""),
    ("ppo_cartpole", ""),
    ("dqn_cartpole", ""),
    ("pqn_vdn_jaxmarl", ""),
    ("pqn_continuous_action", "--env-id Pendulum-v1"),
    ("ppo_continuous_action", "--env-id Pendulum-v1"),
    ("pql_isaac_style", "--env-id Pendulum-v1"),
    ("pqn_rnn_craftax", "--env-id MemoryChain-bsuite"),
    ("pqn_rnn_craftax", ""),
    ("pql_isaac_style", ""),
]


def compile_one(name: str, flags: str, num_seeds: str, device: str) -> None:
    """Compiles one program and prints its memory in MiB."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if device == "h100":
        topology = topologies.get_topology_desc(
            "h100", "cuda", topology="1x1x1", target_config=H100
        )
    else:
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    jax.default_backend = lambda: "gpu" if device == "h100" else "tpu"  # scripts ask it
    function, shapes, options = script_program(name, int(num_seeds), flags, common.ROOT)
    here = NamedSharding(Mesh(np.array(topology.devices[:1]), ("devices",)), PartitionSpec())
    jitted = jax.jit(function, in_shardings=here, out_shardings=here, **options)
    memory = jitted.lower(*shapes).compile().memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    print(json.dumps({"mib": round(used / 2**20, 1)}))


def main(
    only: tuple[str, ...] = (),
    devices: tuple[Literal["h100", "v5e"], ...] = ("h100", "v5e"),
    num_seeds: tuple[int, ...] = (1, 64),
) -> None:
    """Compile each program for each device and number of seeds; what the file has is kept.

    Args:
        only: Scripts; all of them by default.
        devices: What to compile for.
        num_seeds: Seeds of a program.
    """
    out = common.RESULTS / "gpu" / "memory"
    file = out.with_suffix(".json")
    memory = json.loads(file.read_text())["memory"] if file.exists() else {}
    # A TPU's compiler asks for its surroundings, which are not there.
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, flags in PROGRAMS if not only else [x for x in PROGRAMS if x[0] in only]:
        for seeds, device in [(seeds, device) for seeds in num_seeds for device in devices]:
            command = [sys.executable, __file__, "compile", name, flags, str(seeds), device]
            result = subprocess.run(command, env=environ, capture_output=True, text=True)
            title = f"{name} {flags}".strip()
            if result.returncode:  # the compiler's reason, such as too much memory
                found = {"error": result.stderr.strip().splitlines()[-1][:200]}
            else:
                found = json.loads(result.stdout.splitlines()[-1])
            memory.setdefault(title, {}).setdefault(str(seeds), {})[device] = found
            common.write(out, {"memory": memory})
            print(f"{title}, {seeds} seeds, {device}: {found}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_one(*sys.argv[2:])
    else:
        tyro.cli(main, description=__doc__)
