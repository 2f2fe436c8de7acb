"""Schedules on classification: what is chosen, by what, and what the pages say of it.

The script runs here on stand-ins for its compiled parts; with the real ones it runs in
the tests that are marked slow, for compiling them takes a minute.
"""

import json

import jax
import numpy as np
import pytest

from experiments import (
    autoloss_classification,
    classification_runs,
    schedule_runs,
    sections_classification,
)

SMALL = {
    "lams": (0.02, 0.1), "num_lams": 2, "num_coarse": 2, "num_guided": 2,
    "num_rollouts": 2, "num_updates": 2, "max_steps": 20, "num_steps": 20,
    "kept_over": 1, "num_controllers": 2, "wide_lams": (0.01,),
}  # fmt: skip
TINY = autoloss_classification.Config(**SMALL)


def flags(**settings):
    found = []
    for name, value in (SMALL | settings).items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        found += [flag] if value is True else [flag, *map(str, values)]
    return found


def stand_in_lead(settings, task_keys, key, data):
    """Accuracy grows with the first of the settings, λ; no test split is at hand."""
    assert set(data) == {"train", "valid"}
    lam = np.asarray(jax.tree.leaves(settings)[0], float).reshape(-1, 1)
    metric = 0.5 + lam + 0 * np.arange(len(task_keys))
    return schedule_runs.Runs(
        best_params={"x": metric}, params={"x": metric - 0.1}, metric=metric,
        share=np.full(metric.shape, 0.5), num_steps=np.full(metric.shape, 20),
        is_finite=np.ones(metric.shape, bool),
    )  # fmt: skip


def stand_in_learn(settings, keys, data):
    assert len(data["train"].inputs) == 200
    assert set(data) == {"train", "valid"}
    c, u, s = len(settings), TINY.num_updates, TINY.num_rollouts
    return schedule_runs.Learned(
        phi=np.zeros((c, u + 1)), feature_state=(),
        metric=np.arange(c * u * s, dtype=float).reshape(c, u, s),
        share=np.full((c, u, s), 0.5), num_steps=np.full((c, u, s), 20),
    )  # fmt: skip


def stand_ins(config, mesh=None):
    score = lambda params, data: params["x"] + 0 * len(data["test"].targets)
    return classification_runs.Parts(
        hand_made=dict.fromkeys(("joint", "random", "alternate"), stand_in_lead),
        learn=dict.fromkeys(classification_runs.KINDS, stand_in_learn),
        lead=dict.fromkeys(classification_runs.KINDS, stand_in_lead),
        score=score,
    )


def summary_of(run):
    left = {path.name for path in run.iterdir()}
    assert left >= {"config.json", "summary.json", "figure.png", "cells"}
    return json.loads((run / "summary.json").read_text())


def test_the_data_are_those_of_the_global_generator():
    np.random.seed(3)  # noqa: NPY002 as the authors seed it
    made = classification_runs.make_classification(
        3400, 32, n_informative=2, n_redundant=2
    )
    splits = classification_runs.draw(TINY, 3).splits
    np.testing.assert_array_equal(splits.test.targets, made[1][-1000:])
    np.testing.assert_array_equal(
        splits.controller_train.inputs, made[0][:200].astype(np.float32)
    )
    assert [len(split.targets) for split in splits] == [200, 1000, 200, 1000, 1000]


def test_a_search_and_the_runs_that_count_share_no_initialisation():
    data = classification_runs.draw(TINY, 1)
    keys = [data.search_keys, data.final_keys, data.act_key[None]]
    drawn = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 4


def test_choices_are_the_best_on_validation_and_count_their_runs():
    data = classification_runs.draw(TINY, 1)
    rows = classification_runs.hand_made(TINY, stand_ins(TINY), data)
    assert rows["DGS"]["setting"] == {"lam": pytest.approx(0.2)}
    assert rows["DGS"]["search_runs"] == 2
    np.testing.assert_allclose(rows["DGS"]["test"], 0.3, atol=1e-6)  # float32 settings
    # 5 chances by 2 λ and the 2 of the controllers
    assert rows["random(p*)"]["search_runs"] == 20
    assert rows["random(p*) at 0.02"]["setting"]["lam"] == 0.02
    assert rows["random(p*) at 0.02"]["search_runs"] == 5
    assert rows["random(.5) at 0.1"]["search_steps"] == 0
    # nothing is left to choose its checkpoint by
    np.testing.assert_allclose(rows["without L1, train and valid"]["test"], 0.6)
    np.testing.assert_allclose(rows["without L1"]["test"], 0.5)


def test_the_table_goes_on_cell_by_cell_and_fills_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(classification_runs, "build", stand_ins)
    run = tmp_path / "run"
    autoloss_classification.main([*flags(num_seeds=2), "--out", str(run)])
    record = summary_of(run)
    rows = record["rows"]
    assert len(rows["AutoLoss at 0.02"]["test"]) == 2
    assert len(rows["AutoLoss at 0.1"]["test"]) == 1  # beside: on the first set alone
    assert rows["AutoLoss at 0.1"]["search_runs"] == 4
    assert np.shape(rows["AutoLoss at 0.02"]["controllers"]) == (2, 2)
    assert record["pairs"]["AutoLoss at 0.02 − DGS"]["mean"] == pytest.approx(0.18)
    text = "\n".join(sections_classification.tables(record))
    assert "AutoLoss at 0.02 − context-free at 0.02: +0.0000" in text
    assert "nan" not in text
    (run / "cells" / "2 AutoLoss 0.02.json").unlink()
    again = []
    train = classification_runs.train
    monkeypatch.setattr(
        classification_runs, "train", lambda *a: again.append(a[3:]) or train(*a)
    )
    autoloss_classification.main(["--resume", str(run)])
    assert again == [("AutoLoss", 0.02)]
    assert summary_of(run)["rows"] == rows


def test_transfer_leaves_out_the_set_that_a_controller_learned_on(
    tmp_path, monkeypatch
):
    matrix = np.array([[0.9, 0.1, 0.3], [0.2, 0.9, 0.5]])
    assert autoloss_classification._away(matrix) == pytest.approx([0.2, 0.1, 0.4])
    assert autoloss_classification._away(matrix[:1]) is None
    monkeypatch.setattr(classification_runs, "build", stand_ins)
    argv = flags(num_seeds=3, num_sources=2, lams=(0.02,), transfer=True)
    autoloss_classification.main([*argv, "--out", str(tmp_path / "run")])
    record = summary_of(tmp_path / "run")
    assert np.shape(record["transfer"]["AutoLoss"]) == (2, 3)
    text = "\n".join(sections_classification.transfer(record))
    assert "AutoLoss, from elsewhere − DGS: +0.1800" in text
    assert "nan" not in text


def test_the_page_says_where_a_goal_is_missed():
    row = {"std": 0.02, "range": 0.1, "best_std": 0.01, "share": [0.4, 0.6],
           "accuracy": [0.5, 0.9, 0.92]}  # fmt: skip
    close = row | {"std": 0.01}
    cell = {"paper": row, "paper, normalised": close, "released": row,
            "released, normalised": row | {"std": 0.005}}  # fmt: skip
    text = "\n".join(sections_classification._untrained({"untrained 0.02": cell}))
    assert "untrained 0.02, paper: 2.0 times smaller, **not reached**" in text
    assert "untrained 0.02, released: 4.0 times smaller, reached" in text
    # of three runs one ended at chance, and the other two lie .014 apart
    assert "| 1 | 0.0141 | 0.40 to 0.60 |" in text
    rows = {name: {"test": [0.14]} for name in
            ("without L1", "AutoLoss at 0.02", "random(.5) at 0.02")}  # fmt: skip
    text = "\n".join(sections_classification._goals(rows))
    assert "AutoLoss at 0.02 at most .093: 0.140, **not reached**" in text
    assert "above random(.5): 0.000, reached" in text


@pytest.mark.slow
def test_the_script_runs_and_leaves_what_the_page_reads(tmp_path):
    autoloss_classification.main([*flags(untrained=True), "--out", str(tmp_path / "r")])
    record = summary_of(tmp_path / "r")
    cell = record["untrained"]["untrained 0.02"]
    assert len(cell["released, normalised"]["accuracy"]) == 50
    assert all(row["std"] > 0 for row in cell.values())
    done, total = record["rows"]["AutoLoss at 0.02"]["finite"]
    assert done == total == 4
    text = "\n".join(sections_classification.tables(record))
    assert "times smaller" in text
    assert "nan" not in text
