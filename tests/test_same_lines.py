"""A helper of several scripts is the same to the letter: testing it in one is enough."""

import ast
import importlib
import re
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

# What scripts have under one name and of their own.
OWN = {"Config", "LIMITS", "MLP", "QNetwork", "TrainState", "Transition", "make_env", "make_train"}
# Who differs from the others, and why.
VARIANTS = {
    "is_nan": {"dqn_cartpole"},  # nothing is measured before learning starts
    # replay; environments; emulators, which cannot be vmapped
    "make_programs": {"dqn_cartpole", "pql_isaac_style", "pqn_rnn_craftax", "pqn_atari"},
    "restore": {"pqn_atari"},  # new games
    "main": {"pqn_atari"},  # new games
    "start_devices": {"pqn_rnn_craftax"},  # environments over devices
    "THREADED_BATCH": {"pql_isaac_style", "pqn_atari"},  # measured
}
RULE = "# --- Running it: not needed to copy the algorithm"


def definitions(source: str) -> dict[str, str]:
    """Functions, classes and constants at the top level, as syntax trees in words."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.dump(node)
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.dump(node)
    return found


def drift(sources: dict[str, str]) -> list[str]:
    """Names under which scripts hold different code, though they should not."""
    scripts = {name: definitions(source) for name, source in sources.items()}
    names = {name for found in scripts.values() for name in found} - OWN
    copies = {
        name: {
            found[name]
            for script, found in scripts.items()
            if name in found and script not in VARIANTS.get(name, ())
        }
        for name in names
    }
    return [name for name, variants in copies.items() if len(variants) > 1]


@pytest.fixture
def sources():
    return {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def test_helpers_are_the_same(sources):
    assert drift(sources) == []


def test_continuous_environments_are_the_same(sources):
    """make_env is of a script's own, but for the three that take continuous actions."""
    copies = [
        definitions(source)["make_env"] for source in sources.values() if "class Env(" in source
    ]
    assert len(copies) == 3 and len(set(copies)) == 1


@pytest.mark.parametrize("old, new", [("30:", "31:"), ('"nan"', '"NaN"'), ("(update, m", "(0, m")])
def test_a_changed_character_is_found(sources, old, new):
    assert old in sources["ppo_cartpole"]
    sources["ppo_cartpole"] = sources["ppo_cartpole"].replace(old, new)
    assert len(drift(sources)) == 1


def test_running_half(sources):
    """The last section, the same everywhere; main is no longer than half of make_train."""
    for name, source in sources.items():
        running = definitions(source.split(RULE)[1].split("\n", 1)[1])
        assert set(running) >= {"main", "parse_args", "Recorder"} and not set(running) & OWN
        nodes = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
        lengths = {name: node.end_lineno - node.lineno + 1 for name, node in nodes.items()}
        functions = [
            length for node, length in lengths.items() if isinstance(nodes[node], ast.FunctionDef)
        ]
        assert lengths["main"] <= 80
        # With emulators make_train is short, and main is the siblings'.
        assert lengths["main"] <= lengths["make_train"] / 2 or name == "pqn_atari"
        assert max(functions) == lengths["make_train"]


def test_every_number_has_its_limits(script):
    """LIMITS names each field of Config that is a number, once."""
    kinds = int, float, int | None, float | None
    numbers = [name for name, kind in script.Config.__annotations__.items() if kind in kinds]
    limited = [name for _, _, names in script.LIMITS for name in names.split()]
    assert sorted(limited) == sorted(numbers)


def test_a_field_has_the_same_limits_everywhere():
    limits = {}
    for name in SCRIPTS:
        for low, high, names in importlib.import_module(name).LIMITS:
            for field in names.split():
                limits.setdefault(field, set()).add((low, high))
    assert limits.pop("num_seeds") <= {(1, 2**31 - 1), (1, 1)}  # with emulators, one
    assert limits.pop("num_steps") == {(1, 2**31 - 1), (2, 2**31 - 1)}  # with an LSTM, two
    assert {field for field, bounds in limits.items() if len(bounds) > 1} == set()


def test_inline_dependencies(sources):
    """PEP 723's own pattern finds them, and the requirements have each of them, with its bounds."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    files = [(ROOT / f"requirements{x}.txt").read_text() for x in ("", "-atari")]
    lines = "".join(files).replace("[visualize]", "").splitlines()
    required = {line.split("  #")[0] for line in lines}
    for name, source in sources.items():
        (match,) = re.finditer(pattern, source)
        content = [line[2:] for line in match["content"].splitlines()]
        needs = tomllib.loads("\n".join(content))["dependencies"]
        assert match["type"] == "script" and set(needs) <= required, name
