"""The demo, by the command of the README: real data, every row as expected."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_gives_the_table_of_the_readme(tmp_path):
    # one test, and not four on a shared run, so that parallel workers run it once
    command = [sys.executable, "-m", "experiments.demo", "--out", str(tmp_path)]
    # compiled as users compile it: most of its time is steps, not compilation
    compiler = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    result = subprocess.run(
        command, cwd=ROOT, env=compiler, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    check_every_row_is_as_expected(rows, result.stdout)
    check_a_learned_rate_mends_a_bad_one(rows)
    check_the_readme_shows_this_table(rows, result.stdout)
    assert "delta_stn: 100%" in result.stderr, "no progress was shown"
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert str(tmp_path) in result.stdout


SHORT = {
    "sgd_hd": (lambda: demo.hypergradient(num_epochs=1, num_seeds=2), 6),
    "delta_stn": (lambda: demo.regularisation(num_steps=2, num_seeds=2), 3),
    "autoloss": (lambda: demo.schedule(num_updates=1, num_seeds=2), 3),
}


@pytest.mark.parametrize(
    "name",
    [
        "sgd_hd",
        pytest.param("delta_stn", marks=pytest.mark.slow),
        pytest.param("autoloss", marks=pytest.mark.slow),
    ],
)
def test_parts_of_the_demo_run_when_they_are_short(name, tmp_path, monkeypatch, capsys):
    """The table itself takes minutes: see the test above, which is slow."""
    part, num_rows = SHORT[name]
    monkeypatch.setattr(demo, "METHODS", (part,))
    demo.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert len(rows) == num_rows
    assert name in capsys.readouterr().out


def check_every_row_is_as_expected(rows, printed):
    assert len(rows) == 17
    for row in rows:
        assert abs(np.mean(row["values"]) - row["expected"]) <= row["tolerance"], row
    assert printed.count(" ok\n") == len(rows)
    assert "differs" not in printed


def check_a_learned_rate_mends_a_bad_one(rows):
    """What the table is there to show, told from the values and not the constants."""
    mean = {row["method"]: np.mean(row["values"]) for row in rows}
    for name in ("sgd", "adam"):
        assert mean[f"{name}_hd"] < 0.1 * mean[f"{name} untuned"]
    assert mean["delta_stn"] < mean["dropout .05"] - 0.03
    assert mean["amalgamated"] < mean["adam best"] + 0.02
    assert mean["lstm trained"] < 0.5 * mean["lstm random"]
    assert mean["autoloss"] < 0.5 * mean["joint"]


def check_the_readme_shows_this_table(rows, printed):
    """Names, settings and expected values word for word; means within tolerance."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {cells[0]: cells for cells in map(split_cells, readme.splitlines())}
    header, *lines = printed.split("\n\n")[0].splitlines()
    assert split_cells(header) == shown["method"]
    for line, row in zip(lines, rows, strict=True):
        method, setting, measured, baseline, expected, verdict = shown[row["method"]]
        assert method == row["method"]
        # the best of the rates may be the next one where floats round otherwise
        assert setting.split(", ")[-1] == row["setting"].split(", ")[-1]
        assert [expected, verdict] == split_cells(line)[4:]
        metric, mean = re.fullmatch(r"(.*) (\S+) \[.*\]", measured).groups()
        assert metric == row["metric"]
        assert abs(float(mean) - np.mean(row["values"])) <= row["tolerance"]
        assert baseline.startswith(row["baseline"] or "-")


def split_cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def make_row(method, values, baseline=None):
    curves = {"loss": np.array([[2.0, 1.0], [3.0, 1.5]])}
    values = np.array(values)
    return demo.Row(method, "none", "loss", values, baseline, 1.0, 0.1, curves)


def test_a_row_that_differs_says_so(capsys):
    demo.report([make_row("near", [1.0, 1.1]), make_row("far", [1.1, 1.2])])
    _, near, far = capsys.readouterr().out.splitlines()[:3]
    assert near.endswith(" ok")
    assert far.endswith(" differs")


@pytest.mark.parametrize(
    ("shift", "word"), [(1.0, "worse"), (-0.5, "better"), (0.0, "not told apart")]
)
def test_losing_to_the_baseline_is_said(capsys, shift, word):
    plain = make_row("plain", [1.0, 1.2])
    new = make_row("new", [1.001 + shift, 1.199 + shift], "plain")
    demo.report([plain, new])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"new against plain: loss {shift:+.3f} [")
    assert last.endswith(word)


def test_a_folder_may_be_used_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "METHODS", (lambda: [make_row("one", [1.0, 1.1])],))
    for _ in range(2):
        demo.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "figure.png",
        "summary.json",
    }
    assert str(tmp_path) in capsys.readouterr().out
