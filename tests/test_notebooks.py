"""Every notebook runs from top to bottom, offline and from any folder."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_is_a_notebook():
    assert NOTEBOOKS


# What a cell of the test puts before the first one: runs of few steps.
SHORT = """
import functools
from metax import autoloss, harness

def short(function, most, place=None):
    @functools.wraps(function)
    def run(*args, **options):
        if place is None:
            options["num_steps"] = min(options["num_steps"], most)
        else:
            args = (*args[:place], min(args[place], most), *args[place + 1 :])
        return function(*args, **options)
    return run

harness.train = short(harness.train, 12, 3)
autoloss.rollout = short(autoloss.rollout, 200, 4)
autoloss.autoloss = short(autoloss.autoloss, 200)
"""


@each_notebook
@pytest.mark.parametrize(
    "first", [SHORT, pytest.param("", marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_notebook_runs(path, first, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    folder = {"metadata": {"path": str(tmp_path)}}
    # generous: a cell takes seconds, and the machine may be busy
    NotebookClient(notebook, timeout=600, resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not list(tmp_path.iterdir()), "a notebook leaves no files behind"
    errors = [o.text for o in outputs if o.get("name") == "stderr"]
    assert not errors, "neither warnings nor bars"


@each_notebook
def test_notebook_is_committed_without_outputs_and_short(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 88
