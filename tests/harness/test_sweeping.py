import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from metax.harness import SweepError, hash_config, sweep
from tests.harness.cells import deadly, deadly_once, squared

CELLS = [{"x": x} for x in range(4)]
SQUARES = [{"square": x * x, "of": [x]} for x in range(4)]
ROOT = Path(__file__).parents[2]
spawn_pool = functools.partial(
    ProcessPoolExecutor, 2, mp_context=multiprocessing.get_context("spawn")
)


def unwanted(cell):
    raise AssertionError("it has a result")


def folder_of(directory, cell):
    return directory / hash_config(cell)[:16]


def test_results_come_in_the_order_of_the_cells_and_are_not_made_again(tmp_path):
    assert sweep(CELLS, squared, directory=tmp_path) == SQUARES
    assert sweep(CELLS[::-1], unwanted, directory=tmp_path) == SQUARES[::-1]
    more = [*CELLS, {"x": 9}]
    assert sweep(more, squared, directory=tmp_path)[-1] == {"square": 81, "of": [9]}


def test_a_folder_says_what_its_cell_is(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float = 0.1
        widths: tuple[int, ...] = (3, 4)

    sweep([Config()], lambda config: config.rate, directory=tmp_path)
    # the name is that of the values, whatever the process, the order or the type
    (folder,) = tmp_path.iterdir()
    assert folder.name == "3ee140d0492874fe"
    assert folder == folder_of(tmp_path, {"widths": [3, 4], "rate": 0.1})
    read = lambda name: json.loads((folder / name).read_text())
    assert read("cell.json") == {"rate": 0.1, "widths": [3, 4]}
    assert read("result.json") == 0.1


def test_a_failed_cell_is_recorded_holds_up_no_other_and_is_run_again(tmp_path):
    def fn(cell):
        return 1 / (cell["x"] - 1)

    with pytest.raises(SweepError, match="1 of 4 cells have no result") as caught:
        sweep(CELLS, fn, directory=tmp_path)
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert caught.value.results == [-1, None, 1, 0.5]
    (folder,) = caught.value.folders
    error = json.loads((folder / "error.json").read_text())
    assert error["type"] == "ZeroDivisionError"
    assert "return 1 / (cell[" in error["traceback"]
    called = []
    assert sweep(CELLS, called.append, directory=tmp_path) == [-1, None, 1, 0.5]
    assert called == [CELLS[1]]
    assert not (folder / "error.json").exists()


def test_results_are_what_json_gives_back(tmp_path):
    result = {"a": (1, np.float32(0.5)), "b": jnp.arange(2), "c": float("nan")}
    first = sweep([{}], lambda cell: result, directory=tmp_path)
    assert first == [{"a": [1, 0.5], "b": [0, 1], "c": None}]


def test_results_that_json_does_not_know_are_a_failure_that_says_so(tmp_path):
    with pytest.raises(SweepError, match=r"fn=...\)` must return JSON values.*got set"):
        sweep([{"x": 1}], lambda cell: {1, 2}, directory=tmp_path)


@pytest.mark.parametrize(
    "cell", [3, {"x": np.ones(2)}, {"x": float("nan")}, {1: 2}, {"x": {"y": 1}}]
)
def test_cells_that_are_not_plain_are_refused(tmp_path, cell):
    with pytest.raises(ValueError, match=r"sweep\(cells=...\)` must be mappings or"):
        sweep([cell], squared, directory=tmp_path)


def test_equal_cells_are_refused(tmp_path):
    cells = [{"x": 1, "y": 2}, {"y": 2, "x": 1}]
    with pytest.raises(ValueError, match="must all be different"):
        sweep(cells, squared, directory=tmp_path)
    # they are different numbers: a rule may tell them apart
    assert len(sweep([{"x": 1}, {"x": 1.0}], squared, directory=tmp_path)) == 2


def test_a_damaged_result_is_named(tmp_path):
    sweep(CELLS, squared, directory=tmp_path)
    path = folder_of(tmp_path, CELLS[2]) / "result.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path} cannot"):
        sweep(CELLS, squared, directory=tmp_path)


class BreakingPool(concurrent.futures.Executor):
    """Runs each call at once until one with x = 1 comes, and is broken from then on."""

    def __init__(self):
        self.broken = False

    def submit(self, fn, *args, **kwargs):
        if self.broken:
            raise BrokenProcessPool("submitted to a broken pool")
        future = concurrent.futures.Future()
        _, cell, folder = args
        if cell["x"] == 1:
            self.broken = True
            folder.mkdir(exist_ok=True)
            (folder / "cell.json").touch()
            future.set_exception(BrokenProcessPool("a worker died"))
        else:
            future.set_result(fn(*args))
        return future


def test_a_broken_pool_leaves_what_it_lost_to_the_next_call(tmp_path):
    with pytest.raises(SweepError, match="3 of 4 cells.*\n.*its worker ended\n.*not b"):
        sweep(CELLS, squared, BreakingPool(), directory=tmp_path)
    called = []
    sweep(CELLS, called.append, directory=tmp_path)
    assert called == CELLS[1:]


def test_where_pools_can_be_made_only_the_cell_that_breaks_them_is_left(tmp_path):
    with pytest.raises(SweepError, match="this cell ends its worker") as caught:
        sweep(CELLS, squared, BreakingPool, directory=tmp_path)
    assert caught.value.folders == (folder_of(tmp_path, CELLS[1]),)
    assert caught.value.results == [SQUARES[0], None, *SQUARES[2:]]


def test_pools_that_never_work_end_the_sweep(tmp_path):
    def make():
        pool = BreakingPool()
        pool.broken = True
        return pool

    with pytest.raises(SweepError, match="4 of 4 cells have no result"):
        sweep(CELLS, squared, make, directory=tmp_path)


def test_spawned_processes_survive_a_cell_that_kills_its_worker(tmp_path):
    with pytest.raises(SweepError, match="this cell ends its worker") as caught:
        sweep(CELLS, deadly, spawn_pool, directory=tmp_path)
    assert caught.value.results == [SQUARES[0], None, *SQUARES[2:]]
    assert sweep(CELLS, squared, directory=tmp_path) == SQUARES


@pytest.mark.slow
def test_a_worker_killed_once_leaves_nothing_to_run(tmp_path):
    cells = [{"x": x, "mark": str(tmp_path / "mark")} for x in range(4)]
    found = sweep(cells, deadly_once, spawn_pool, directory=tmp_path / "sweep")
    assert found == SQUARES


@pytest.mark.slow
def test_a_pool_of_the_caller(tmp_path):
    with spawn_pool() as pool:
        assert sweep(CELLS, squared, pool, directory=tmp_path) == SQUARES
        assert sweep(CELLS, unwanted, pool, directory=tmp_path) == SQUARES


@pytest.mark.slow
def test_submitit_on_this_machine(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    where = {"directory": tmp_path / "sweep"}
    assert sweep(CELLS, squared, executor, **where) == SQUARES
    jobs = sorted((tmp_path / "jobs").iterdir())
    assert sweep(CELLS, unwanted, executor, **where) == SQUARES
    assert sorted((tmp_path / "jobs").iterdir()) == jobs


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Dask are not ours
def test_dask_on_this_machine(tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    )
    with cluster, distributed.Client(cluster) as client:
        executor = client.get_executor()
        assert sweep(CELLS, squared, executor, directory=tmp_path) == SQUARES
        assert sweep(CELLS, unwanted, executor, directory=tmp_path) == SQUARES
