"""What XLA would launch on an H100, counted without one: benchmarks/results/gpu/launches.json.

    pip install "jax-cuda12-plugin==<jax's version>" "jax-cuda12-pjrt==<jax's version>"
    python benchmarks/studies/gpu_launches.py                 # scripts and peers at their defaults
    python benchmarks/studies/gpu_launches.py --only pqn_cartpole --num-seeds 64
    python benchmarks/studies/gpu_launches.py --label before --root <checkout of another commit>

JAX compiles for a GPU that is described, and not there: 200 MB of plugin, no driver. A script is
compiled as it runs on a GPU, vmapped over seeds, without its evaluation. A launch is a kernel, a
copy or a memset. Those within a CUDA graph cost the host next to nothing, those outside are started
by the host one by one; at a wait, it must see a value before it goes on, as where a loop of unknown
length or a branch stands outside of a graph. Such loops are counted as one trip, and of a branch
the longer side.

Counts are the compiler's and the same each time. They are no times: kernels differ in length, and
as there is no device to tune products on, these have XLA's default tilings.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import tyro

import common

# Script, or peer and environment, and its flags. Physics would hide what an algorithm launches.
PROGRAMS = [
    ("pqn_cartpole", ""),
    ("purejaxql", "CartPole-v1"),
    ("pqn_minatar", ""),
    ("purejaxql", "Breakout-MinAtar"),
    ("ppo_cartpole", ""),
    ("purejaxrl", "CartPole-v1"),
    ("dqn_cartpole", ""),
    ("pqn_rnn_craftax", "--env-id MemoryChain-bsuite"),
    ("pqn_rnn_craftax", ""),  # compiles for eight minutes
    ("pqn_vdn_jaxmarl", ""),
    ("pqn_continuous_action", "--env-id Pendulum-v1"),
    ("ppo_continuous_action", "--env-id Pendulum-v1"),
    ("pql_isaac_style", "--env-id Pendulum-v1"),
]
NO_LAUNCHES = {"kCommandBuffer", "kWhile", "kConditional", "kSequential", "kAsyncStart"}
NO_LAUNCHES |= {"kAsyncDone", "kDynamicSlice", "kDynamicSliceFusion", "kWaitForStreams"}
# What the compiler needs to know about an H100.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {
    major: 9
    feature_extension: ACCELERATED_FEATURES
  }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info {
  major: 9
  minor: 10
  patch: 0
}
runtime_version {
  major: 12
  minor: 9
  patch: 0
}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass
class Thunk:
    """A launch, a loop, a branch or a graph, from XLA's dump; children are in named sections."""

    kind: str
    number: int
    indent: int
    section: str = "body"
    sections: dict = dataclasses.field(default_factory=dict)

    def children(self, *names: str) -> list:
        return [child for name in names or self.sections for child in self.sections.get(name, [])]


def parse(text: str) -> Thunk:
    """The tree of what is launched."""
    path, last = [Thunk("root", -1, -4)], None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if match := re.match(r"(\d+): (k\w+)", line.strip()):
            last = Thunk(match[2], int(match[1]), indent)
            while path[-1].indent >= indent:
                path.pop()
            path[-1].sections.setdefault(path[-1].section, []).append(last)
            path.append(last)
        elif match := re.fullmatch(r"(\w+):", line.strip()):
            # A condition stands right below its loop, whatever the indent says.
            owners = [thunk for thunk in path if thunk.indent == indent - 2]
            owner = last if match[1] == "condition" else (owners or [last])[-1]
            owner.section = match[1]
            del path[path.index(owner) + 1 :]
    return path[0]


def trips(thunks: str, hlo: str) -> dict[int, int]:
    """How often each loop of known length runs, by the number of its thunk."""
    lengths = {
        match[1]: int(match[2])
        for match in re.finditer(
            r'%?([\w.-]+) = [^\n]* while\([^\n]*known_trip_count":\{"n":"(\d+)', hlo
        )
    }
    named = re.finditer(
        r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)\s+\}\s+thunk_kind: "kWhile"', thunks
    )
    return {int(match[2]): lengths[match[1]] for match in named if match[1] in lengths}


def count(thunk: Thunk, lengths: dict[int, int], in_graph: bool = False) -> tuple[dict, list]:
    """Launches, outside ones and waits of all that is in a thunk; and its loops, each per trip."""
    total, loops = {"launches": 0, "outside": 0, "waits": 0}, []
    for child in thunk.children():
        if child.kind not in NO_LAUNCHES:
            total["launches"] += 1
            total["outside"] += not in_graph
            continue
        graph = in_graph or child.kind == "kCommandBuffer"
        times = 1
        if child.kind == "kWhile":
            known = child.number in lengths
            times = lengths.get(child.number, 1)
            sections = ["body"] if known else ["condition", "body"]
            parts = Thunk("trip", -1, 0, sections={"body": child.children(*sections)})
            mine, inner = count(parts, lengths, graph)
            loops.append({"trips": times if known else None, **mine, "loops": inner})
            total["waits"] += not known and not in_graph
        elif child.kind == "kConditional":
            sides = [
                count(Thunk("side", -1, 0, sections={"body": side}), lengths, graph)
                for side in child.sections.values()
            ]
            mine, inner = max(sides, key=lambda side: side[0]["launches"])
            loops += inner
            total["waits"] += not in_graph
        else:
            mine, inner = count(child, lengths, graph)
            loops += inner
        for name in total:
            total[name] += times * mine[name]
    return total, loops


def script_program(name: str, num_seeds: int, flags: str, root: Path):
    """Four updates of a script over seeds, and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, str(root))
    script = importlib.import_module(name)
    train = script.make_train(script.parse_args(["--eval-interval", "0", *flags.split()]))
    init = jax.vmap(lambda seed: train.init(jax.random.key(seed)))
    states = jax.eval_shape(init, jnp.arange(num_seeds))

    def chunk(update, states):
        return jax.vmap(lambda state: train(state=state._replace(update=update), num_updates=4))(
            states
        )

    return chunk, (jax.ShapeDtypeStruct((), jnp.int32), states), {"donate_argnums": 1}


def peer_program(name: str, num_seeds: int, env_id: str):
    """A peer's whole run over seeds, without its tests: found on PYTHONPATH, on today's JAX."""
    import jax
    import jax.numpy as jnp

    jax.tree_map = jax.tree.map
    sys.modules["wandb"] = types.ModuleType("wandb")
    sys.modules["wandb"].__spec__ = None
    if name == "purejaxrl":
        import gymnax.wrappers.purerl as wrappers

        sys.modules["wrappers"] = wrappers
        config = {"LR": 2.5e-4, "NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 5e5}
        config |= {"UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95}
        config |= {"CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5}
        config |= {"ACTIVATION": "tanh", "ENV_NAME": env_id, "ANNEAL_LR": True, "DEBUG": False}
        module = importlib.import_module("ppo")
    else:
        import purejaxql
        import yaml

        kind, file = ("minatar", "minatar") if "MinAtar" in env_id else ("gymnax", "cartpole")
        folder = Path(purejaxql.__file__).parent
        config = yaml.safe_load((folder / f"config/alg/pqn_{file}.yaml").read_text())
        config |= {"ENV_NAME": env_id, "TOTAL_TIMESTEPS": 500_000, "WANDB_MODE": "disabled"}
        config |= {"TOTAL_TIMESTEPS_DECAY": 500_000, "TEST_DURING_TRAINING": False}
        module = importlib.import_module(f"purejaxql.pqn_{kind}")
    keys = jax.ShapeDtypeStruct((num_seeds, 2), jnp.uint32)
    return jax.vmap(module.make_train(config)), (keys,), {}


def compile_one(name: str, num_seeds: str, flags: str, root: str, dump: str) -> None:
    """Compiles one program for the H100 and prints its counts as JSON."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.default_backend = lambda: "gpu"  # scripts ask it while they are traced
    if name.startswith("purejax"):
        function, shapes, options = peer_program(name, int(num_seeds), flags)
    else:
        function, shapes, options = script_program(name, int(num_seeds), flags, Path(root))
    devices = topologies.get_topology_desc(
        "h100", "cuda", topology="1x1x1", target_config=H100
    ).devices
    here = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
    jitted = jax.jit(function, in_shardings=here, out_shardings=here, **options)
    memory = jitted.lower(*shapes).compile().memory_analysis()

    def largest(pattern):
        return max(Path(dump).glob(pattern), key=lambda path: path.stat().st_size).read_text()

    lengths = trips(largest("*thunk_metadata.txt"), largest("*gpu_after_optimizations.txt"))
    _, loops = count(parse(largest("*thunk_sequence_after_thunk_passes.txt")), lengths)
    update = max(loops, key=lambda loop: (loop["trips"] or 1) * loop["launches"])
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    print(json.dumps({"update": update, "memory_mib": round(used / 2**20, 1)}))


def main(
    only: tuple[str, ...] = (),
    num_seeds: tuple[int, ...] = (1, 64),
    root: Path = common.ROOT,
    label: str = "now",
    out: Path = common.RESULTS / "gpu" / "launches",
) -> None:
    """Count for each program and number of seeds; what the file holds already is kept.

    Args:
        only: Scripts, purejaxql or purejaxrl; all of them by default.
        num_seeds: Seeds of a program.
        root: The repository whose scripts are compiled.
        label: What the counts are called in the file.
        out: Where the JSON file goes, without suffix.
    """
    file = out.with_suffix(".json")
    counts = json.loads(file.read_text())["counts"] if file.exists() else {}
    for name, flags in PROGRAMS:
        for seeds in num_seeds if not only or name in only else ():
            group = "peers" if name.startswith("purejax") else label
            with tempfile.TemporaryDirectory() as dump:
                flags_xla = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
                environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_xla}
                command = [sys.executable, __file__, "compile", name, str(seeds), flags, root, dump]
                result = subprocess.run(command, env=environ, capture_output=True, text=True)
            title = f"{name} {flags}".strip()
            if result.returncode:
                print(f"{title}, {seeds} seeds: {result.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(result.stdout.splitlines()[-1])
            counts.setdefault(group, {}).setdefault(title, {})[str(seeds)] = found
            common.write(out, {"counts": counts})
            update = {key: x for key, x in found["update"].items() if key != "loops"}
            steps = [
                f"{loop['trips'] or '?'} x {loop['launches']}" for loop in found["update"]["loops"]
            ]
            print(f"{group}: {title}, {seeds} seeds: {update}, {steps}, {found['memory_mib']} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_one(*sys.argv[2:])
    else:
        tyro.cli(main, description=__doc__)
