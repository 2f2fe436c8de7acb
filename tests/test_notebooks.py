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
from metax import harness
harness.train = lambda loop, data, key, num_steps, *, _train=harness.train, **options: (
    _train(loop, data, key, min(num_steps, 12), **options))
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
