"""The ridge experiment: what its tables are held against, and that it runs."""

import json

import numpy as np
import pytest

from experiments import sections_ridge, stn_ridge
from experiments import stn_ridge_tables as tables
from metax.tasks import diabetes_ridge, ridge_solutions


def test_eleven_rows_stand_for_all():
    full, small = diabetes_ridge(), tables.moments(diabetes_ridge())
    assert [len(part.y) for part in small] == [11, 11]
    for lam in (-6.0, -1.0):
        for name in ("best_weights", "validation_loss", "hypergradient"):
            function = getattr(ridge_solutions, name)
            # a 10 x 10 solve of condition 603
            np.testing.assert_allclose(
                function(small, lam), function(full, lam), rtol=1e-9
            )


def test_condition_numbers_are_those_of_the_paper_s_factor():
    rows = tables.condition_numbers(np.diag([1.0, 4.0]))
    wanted = [727, 67650, 34.0, 105.2, 4, 730, 2715, 23217, 41005]
    found = [row["uncentred"] for row in rows]
    np.testing.assert_allclose(found, wanted, rtol=2e-3)  # as many digits are known
    assert [round(row["centred"]) for row in rows] == [1, 100, 1, 1, 4, 1, 1, 1, 1]
    assert rows[0]["centred_total"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("lam", "uncentred", "centred"),
    [(-6, 0.0124, 0.461), (-3, 0.045, 0.456), (-1, 0.199, 0.425), (2, 0.033, 0.171)],
)
def test_largest_rate_of_a_quadratic(lam, uncentred, centred):
    x = diabetes_ridge().train.x
    found = [tables.largest_rate(x.T @ x / 300, lam, 0.5, on) for on in (False, True)]
    np.testing.assert_allclose(found, [uncentred, centred], rtol=2e-2)  # three digits


def test_course_tells_detours_and_divergence():
    lam = np.concatenate([[2.2, 2.5], np.linspace(2, -1, 31), np.full(200, -1.0)])
    row = tables.course(lam, np.full(233, 0.5), 2.0, first=1)
    assert not row["diverged"]
    assert row["final"] == -1
    assert row["wrong_way"] == 0.5
    assert row["wrong_way_first"] == pytest.approx(0.2)
    assert row["steps"] == 31
    row = tables.course(lam, np.append(np.full(232, 0.5), np.nan), 2.0)
    assert row["diverged"]
    assert row["final"] is None
    assert row["largest_loss"] == np.inf


def test_bracket_ends_at_the_first_rate_that_any_seed_fails():
    loss = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, np.nan, 0.5]])
    rates = np.array([1.0, 2.0, 3.0, 4.0])
    assert tables.bracket(rates, loss) == {"stable": 2, "unstable": 3}
    assert tables.bracket(rates[:2], loss[:, :2]) == {"stable": 2, "unstable": None}


def test_oracles_without_a_network_agree_with_the_closed_form():
    rows = tables.oracles(diabetes_ridge(), 0.0, None, {}, 1)
    errors = {row["method"]: row["error"] for row in rows}
    assert errors["implicit, CG 20"] < 1e-9  # ten unknowns
    assert errors["implicit, Neumann 100"] < 1e-6
    # from the optimum, k steps of gradient descent are k terms of Neumann's series
    assert errors["unrolled, 100 steps"] < 1e-6
    assert errors["unrolled, 1 steps"] > 0.1


def test_run_leaves_what_the_results_page_reads(tmp_path, monkeypatch):
    smaller = {
        "ABLATION": ("STN", "Delta-STN"),
        "ENDS": ("Delta-STN",),
        "MEASURED": ("Delta-STN",),
        "LEARNED": ("Delta-STN",),
        "INTERVALS": (5,),
        "CORRECTIONS": (True,),
        "ORACLE_LAMBDAS": (-3.0,),
    }
    for name, value in smaller.items():
        monkeypatch.setattr(stn_ridge, name, value)
    for name in ("NEUMANN", "UNROLLED"):
        monkeypatch.setattr(tables, name, (5,))
    run = tmp_path / "run"
    argv = ["--steps", "40", "--num-seeds", "2", "--draws", "2", "--calls", "1"]
    stn_ridge.main([*argv, "--out", str(run)])
    assert {p.name for p in run.iterdir()} >= {"config.json", "figure.png"}
    record = json.loads((run / "summary.json").read_text())
    lost = {row["variant"]: row["diverged"] for row in record["ablation"]
            if (row["start"], row["rate"]) == (-6, 0.05)}  # fmt: skip
    assert lost == {"STN": True, "Delta-STN": False}
    for row in record["largest_rates"]:
        assert row["stable"] > 0.5 * row["bound"]
    text = "\n".join(sections_ridge.ridge(record))
    assert "diverged" in text
    assert "nan" not in text
