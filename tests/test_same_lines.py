"""A helper of several scripts is the same to the letter: testing it in one is enough.

    python tests/test_same_lines.py --fix pqn_cartpole.py

copies a helper that was changed there into the other scripts that have it.
"""

import argparse
import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

# What scripts have under one name and of their own.
OWN = {"Config", "DEFAULTS", "LIMITS", "MLP", "QNetwork", "TrainState", "Transition"}
OWN |= {"make_env", "make_train"}
# Who differs from the others, and why.
VARIANTS = {
    # replay; environments; emulators, which cannot be vmapped
    "make_programs": {"dqn_cartpole", "pql_isaac_style", "pqn_rnn_craftax", "pqn_atari"},
    "restore": {"pqn_atari"},  # new games
    "normalize": {"pql_isaac_style"},  # what its reference adds to a variance
    "make_gymnax": {"pqn_rnn_craftax"},  # many environments at once
    "train_run": {"pqn_atari"},  # new games
    "start_devices": {"pqn_rnn_craftax"},  # environments over devices
    "THREADED_BATCH": {"pql_isaac_style", "pqn_atari"},  # measured
    "RETURNS": {"pqn_atari"},  # evaluations that end before the games
}
RULE = "# --- Running it: not needed to copy the algorithm"


def top_level(source: str) -> dict[str, ast.stmt]:
    """Functions, classes, constants and what runs as a program."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = node
        if isinstance(node, ast.If):
            found[ast.unparse(node.test)] = node
    return found


def definitions(source: str) -> dict[str, str]:
    """What top_level finds, as syntax trees in words."""
    return {name: ast.dump(node) for name, node in top_level(source).items()}


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


def test_minatar_learns_as_cartpole(sources):
    """The same make_train, but for what its make_env takes: tests of it run on one of them."""
    cartpole, minatar = (
        top_level(sources[name])["make_train"] for name in ("pqn_cartpole", "pqn_minatar")
    )
    call = "make_env(config.env_id)"
    assert call in ast.unparse(cartpole)
    assert ast.unparse(cartpole).replace(call, "make_env(config)") == ast.unparse(minatar)


@pytest.mark.parametrize("old, new", [("30:", "31:"), ('"nan"', '"NaN"'), ("0.001", "0.002")])
def test_a_changed_character_is_found(sources, old, new):
    assert old in sources["ppo_cartpole"]
    sources["ppo_cartpole"] = sources["ppo_cartpole"].replace(old, new)
    assert len(drift(sources)) == 1


def test_running_half(sources):
    """The last section, the same everywhere; train_run is no longer than half of make_train."""
    for name, source in sources.items():
        running = definitions(source.split(RULE)[1].split("\n", 1)[1])
        assert set(running) >= {"main", "train_run", "record"} and not set(running) & OWN
        nodes = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
        lengths = {name: node.end_lineno - node.lineno + 1 for name, node in nodes.items()}
        functions = [
            length for node, length in lengths.items() if isinstance(nodes[node], ast.FunctionDef)
        ]
        assert lengths["main"] + lengths["train_run"] <= 70
        # With emulators make_train is short, and train_run is the siblings'.
        assert lengths["train_run"] <= lengths["make_train"] / 2 or name == "pqn_atari"
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


def span(node: ast.stmt, lines: list[str]) -> slice:
    """The lines of a definition, with its decorators and the comments directly above."""
    first = min(x.lineno for x in [node, *getattr(node, "decorator_list", [])]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return slice(first, node.end_lineno)


def unknown(node: ast.stmt, source: str, other: str) -> set[str]:
    """Names in a definition that source defines or imports at the top, and the other does not."""
    known = []
    for text in (source, other):
        imports = [x for x in ast.parse(text).body if isinstance(x, ast.Import | ast.ImportFrom)]
        aliases = [alias for x in imports for alias in x.names]
        known.append({*top_level(text), *(x.asname or x.name.split(".")[0] for x in aliases)})
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & (known[0] - known[1])


def fix(changed: Path) -> str:
    """Copies what a script defines to the scripts beside it that define it too; says what."""
    source, told = changed.read_text(), []
    source_lines, source_nodes = source.splitlines(keepends=True), top_level(source)
    for path in sorted(set(changed.parent.glob("*.py")) - {changed}):
        text = path.read_text()
        lines, own = text.splitlines(keepends=True), top_level(text)
        pairs = {
            name: (span(own[name], lines), source_lines[span(node, source_lines)])
            for name, node in source_nodes.items()
            if name in own and name not in OWN
            if not {changed.stem, path.stem} & VARIANTS.get(name, set())
        }
        copied = [name for name, (old, new) in pairs.items() if lines[old] != new]
        for old, new in sorted(pairs.values(), key=lambda pair: -pair[0].start):  # from below
            lines[old] = new
        lacks = set().union(*(unknown(source_nodes[name], source, text) for name in copied))
        if copied:
            path.write_text("".join(lines))
            told.append(f"{path.name}: {', '.join(copied)}")
        if lacks:
            told.append(f"{path.name} still lacks {', '.join(sorted(lacks))}")
    return "\n".join(told) or "nothing to copy"


def test_fix_has_nothing_to_do(sources, tmp_path):
    """Comments are the same, too; nothing is written."""
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    for name in ("pqn_cartpole", "pql_isaac_style", "pqn_rnn_craftax"):  # with all shared helpers
        assert fix(tmp_path / f"{name}.py") == "nothing to copy"
    assert {path.stem: path.read_text() for path in tmp_path.iterdir()} == sources


HEAD = "import sys\n\n# --- A rule ---\n\n"
BODY = """# Above.
LIMIT = [
    {x},  # a comment
]
THREADED_BATCH = {x}


@decorated({x})
def helper(a):  # another comment
    # Inside.
    return a + {x}


class Config:
    x = {x}


class Record:
    x = {x}


def only_here():
    return {x}


if __name__ == "__main__":
    # Inside.
    helper({x})
"""


def test_fix_copies_what_is_shared(tmp_path):
    """With comments and decorators; OWN, VARIANTS and what the others do not have stay."""
    changed, plain, variant = (
        tmp_path / f"{name}.py" for name in ("changed", "plain", "pqn_atari")
    )
    old, new = BODY.format(x=1), BODY.format(x="sys.a + math.b")
    changed.write_text(HEAD.replace("sys", "sys, math") + new)
    for path in (plain, variant):
        text = old.replace("# Inside.", "# Old.").replace("# Above.", "# Old\n# words.")
        path.write_text(HEAD + text.replace("only", "not"))
    told = "LIMIT, THREADED_BATCH, helper, Record, __name__ == '__main__'"
    assert fix(changed).splitlines() == [
        f"plain.py: {told}",
        "plain.py still lacks math",
        f"pqn_atari.py: {told.replace('THREADED_BATCH, ', '')}",
        "pqn_atari.py still lacks math",
    ]
    for kept in ("class Config:\n    x = {x}", "def only_here():\n    return {x}"):
        new = new.replace(kept.format(x="sys.a + math.b"), kept.format(x=1))
    new = new.replace("only", "not")
    assert plain.read_text() == HEAD + new
    batch = "THREADED_BATCH = {x}\n"
    new = new.replace(batch.format(x="sys.a + math.b"), batch.format(x=1))
    assert variant.read_text() == HEAD + new
    variant.write_text(HEAD + new.replace(batch.format(x=1), batch.format(x=2)))
    assert "THREADED_BATCH" not in fix(variant)  # nor is a variant copied to the others


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", type=Path, required=True, metavar="SCRIPT", help="copy from it")
    print(fix(parser.parse_args().fix.resolve()))
