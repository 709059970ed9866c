"""What README.md shows is true: its code runs as written, and what it links to is there."""

import re

from conftest import ROOT

import pqn_cartpole

README = (ROOT / "README.md").read_text()


def test_code_runs(tmp_path, monkeypatch, capsys):
    """In order, as typed from the folder of the README, with the run that it loads."""
    monkeypatch.chdir(tmp_path)
    training = re.search(r"python (pqn_cartpole.py .*--runs-dir runs/short)", README)[1].split()
    tiny = "--total-timesteps=2048", "--hidden-size=16", "--eval-episodes=4"  # in less time
    pqn_cartpole.main(pqn_cartpole.parse_args([*training[1:], *tiny]))
    text = README.replace("hidden_size=64", "hidden_size=16, eval_episodes=4")
    text = text.replace("total_timesteps=20_480", "total_timesteps=1280, num_steps=4")
    first, second, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    for code in (first + second, *others):  # others stand alone, in sections of their own
        exec(code, {"__name__": "readme"})
    shape, greedy, q_values, length = capsys.readouterr().out.splitlines()
    assert shape == "(3, 10)"
    assert len(greedy.strip("[]").split()) == 3 and len(q_values.strip("[]").split()) == 2
    assert float(length) <= 20


def test_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path


def test_length():
    """One page: at most 900 words of prose, code and tables apart, and two tables."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.DOTALL)
    lines = prose.splitlines()
    assert len(" ".join(line for line in lines if not line.startswith("|")).split()) <= 900
    assert sum(line.startswith("|---") for line in lines) <= 2
