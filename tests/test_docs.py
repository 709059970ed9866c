"""The pages of docs/ are true: numbers, links, names, flags, columns and examples."""

import importlib
import re
import sys

import jax
import matplotlib.image
import pytest
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))
import tables

PAGES = {path.name: path.read_text() for path in tables.PAGES}
SCRIPT_NAMES = [path.stem for path in ROOT.glob("*_*.py")]
# The first line of a page's first paragraph links the scripts that the page is about.
SCRIPTS_OF = {
    name: re.findall(r"\]\(\.\./(\w+)\.py\)", page.split("\n\n")[1]) for name, page in PAGES.items()
}
EXAMPLES = [name for name, page in PAGES.items() if "## Make it yours" in page]


def anchors(page: str) -> set[str]:
    """As GitHub makes them from headings."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_script_has_a_page():
    """The page links the script, the script names the page, and README's table links both."""
    for script in SCRIPT_NAMES:
        (page,) = [name for name, scripts in SCRIPTS_OF.items() if script in scripts]
        docstring = (ROOT / f"{script}.py").read_text().split('"""')[1]
        assert f"docs/{page}" in docstring, script
        (row,) = re.findall(rf"^\| \[`{script}\.py`\].*", PAGES["README.md"], re.M)
        assert f"](docs/{page})" in row, script


@pytest.mark.parametrize("name", PAGES)
def test_numbers_are_of_the_files(name):
    page = PAGES[name]
    assert tables.fill(page) == page, "run benchmarks/studies/tables.py"
    marks = len(re.findall(r"<!-- end -->", page))
    assert len(tables.MARK.findall(page)) == marks
    # GitHub shows a line that begins with a comment as HTML, so a number must not stand first.
    assert not re.findall(r"^<!--.*?-->.*\S", page, re.M)


def test_every_study_is_on_a_page():
    """Or benchmarks/studies/README.md names it as left out."""
    text = "".join(PAGES.values())
    named = {name for names, *_ in tables.MARK.findall(text) for name in names.split()}
    left_out = (ROOT / "benchmarks" / "studies" / "README.md").read_text()
    results = tables.common.RESULTS
    for path in results.rglob("*.json"):
        study = str(path.relative_to(results).with_suffix(""))
        assert study in named or f"`{study}`" in left_out, study


@pytest.mark.parametrize("name", PAGES)
def test_links_exist(name):
    """Files, sections and, in [`name`](script.py), a function, class or field of that script."""
    folder = next(path.parent for path in tables.PAGES if path.name == name)
    for words, link in re.findall(r"\[([^\]]*)\]\((?!http)([^)]+)\)", PAGES[name]):
        path, _, section = link.partition("#")
        target = (folder / path).resolve() if path else folder / name
        assert target.exists(), link
        assert not section or section in anchors(target.read_text()), link
        symbol = re.fullmatch(r"`(\w+)`", words)
        if symbol and target.suffix == ".py":
            assert re.search(rf"(def|class) {symbol[1]}\b", target.read_text()), (words, link)


@pytest.mark.parametrize("name", PAGES)
def test_pictures_are_opaque(name):
    """White in both of GitHub's colour schemes."""
    folder = next(path.parent for path in tables.PAGES if path.name == name)
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", PAGES[name]):
        pixels = matplotlib.image.imread(folder / link)
        assert pixels.shape[-1] == 3 or (pixels[..., 3] == 1).all(), link
        assert (pixels[0, 0, :3] == 1).all(), link


@pytest.mark.parametrize("script", SCRIPTS)
def test_columns_and_flags(script):
    """A page explains every column of metrics.csv, and no other; it names flags that exist."""
    module = importlib.import_module(script)
    (name,) = [name for name, scripts in SCRIPTS_OF.items() if script in scripts]
    table = PAGES[name].split("## Metrics explained")[1].split("###")[0]
    explained = set(re.findall(r"`((?:seed|\w+/[\w*]+|global_step)+)`", table))
    columns = {"seed"}
    changes = [{}]
    changes += [{"algorithm": "sac_n"}] if script == "pql_isaac_style" else []
    changes += [{"env_id": "overcooked_cramped_room"}] if script == "pqn_vdn_jaxmarl" else []
    for change in changes:
        sizes = SCRIPTS[script] | change
        if script == "pqn_atari":
            sizes |= {"env_id": "pong"}
        config = module.Config(**sizes)
        columns |= set(jax.eval_shape(module.make_train(config), jax.random.key(0))[1])
    assert columns <= explained, columns - explained
    text = "".join((ROOT / f"{x}.py").read_text() for x in SCRIPTS_OF[name])
    own = re.sub(r"<!-- .*?<!-- end -->", "", PAGES[name], flags=re.DOTALL)
    assert all(x.split("/")[-1] in text for x in explained)
    for flag in re.findall(r"`--([a-z-]+)[ `]", own):
        field = flag.removeprefix("no-").replace("-", "_")
        fields = {
            x for s in SCRIPTS_OF[name] for x in importlib.import_module(s).Config.__annotations__
        }
        assert flag.replace("-", "_") in fields or field in fields, flag


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, monkeypatch):
    """As typed, in the folder of the scripts, each at most fifteen lines."""
    for code in re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL):
        assert len([line for line in code.splitlines() if line]) <= 15
        for script in SCRIPTS_OF[name]:  # an example changes its script: not that of other tests
            monkeypatch.setitem(sys.modules, script, None)
            del sys.modules[script]
        exec(compile(code, name, "exec"), scope := {"__name__": name})
        last = {x: y[-1] for x, y in scope["metrics"].items() if x.startswith("losses/")}
        assert last and all(map(jax.numpy.isfinite, last.values())), last
