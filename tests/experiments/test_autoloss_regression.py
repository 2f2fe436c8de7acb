"""Schedules on regression: what is chosen, by what, and what the pages say of it.

The scripts run here on stand-ins for their compiled parts; with the real ones they run
in the tests that are marked slow, for compiling them takes a minute.
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    autoloss_regression,
    autoloss_sweep,
    autoloss_transfer,
    report,
    schedule_runs,
    sections_autoloss,
)
from metax.autoloss import bernoulli
from metax.harness import device_mesh
from metax.tasks import regression, task_data

LEARNING = {
    "num_guided": 2, "num_controllers": 2, "num_rollouts": 2, "num_updates": 3,
    "max_steps": 30, "num_runs": 2, "num_steps": 40,
}  # fmt: skip
SMALL = {
    autoloss_regression: {
        "num_seeds": 2, "num_lams": 3, "num_coarse": 3, "chances": (0.5, 0.7),
        "thresholds": True, "drop": ("losses",),
    },
    autoloss_sweep: {"num_seeds": 2, "lams": (0.2, 0.4)},
    autoloss_transfer: {"num_seeds": 2, "num_lams": 3, "chances": (0.3, 0.7)},
}  # fmt: skip


def flags(settings):
    found = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag)
        else:
            values = value if isinstance(value, tuple) else (value,)
            found += [flag, *map(str, values)]
    return found


def runs_of(metric):
    """Runs [G, R] with these metrics, whose parameters say which they are."""
    metric = np.asarray(metric, float)
    index = np.arange(metric.size, dtype=float).reshape(metric.shape)
    return schedule_runs.Runs(
        best_params={"x": index}, params={"x": -index}, metric=metric,
        share=np.full(metric.shape, 0.5), num_steps=np.full(metric.shape, 40),
        is_finite=np.isfinite(metric),
    )  # fmt: skip


def stand_in_lead(settings, task_keys, key, data):
    """The larger a setting is, the better; and nothing looks at a test split."""
    assert set(data) == {"train", "valid"}
    size = np.asarray(jax.tree.leaves(settings)[0], float)
    size = size.reshape(len(size), -1)[:, :1]
    return runs_of(9 - size + 0.1 * np.arange(len(task_keys)))


def stand_in_learn(settings, keys, data):
    assert set(data) == {"train", "valid"}
    c, u, s = len(settings), LEARNING["num_updates"], LEARNING["num_rollouts"]
    return schedule_runs.Learned(
        phi=np.arange(c * (u + 1)).reshape(c, u + 1), feature_state=(),
        metric=np.full((c, u, s), 5.0), share=np.full((c, u, s), 0.5),
        num_steps=np.full((c, u, s), 30),
    )  # fmt: skip


def stand_ins(config, mesh=None):
    named = autoloss_regression.hand_made(autoloss_regression.Config(thresholds=True))
    kinds = ("AutoLoss", "context-free", "AutoLoss without losses")
    return {
        **{name: (stand_in_lead, settings) for name, (_, settings) in named.items()},
        **dict.fromkeys(kinds, (stand_in_learn, stand_in_lead)),
        "score": lambda params, data: params["x"] + 0 * float(data["test"].noise),
    }


def test_the_best_setting_is_that_of_the_best_mean_and_never_a_diverged_one():
    runs = runs_of([[1.0, np.nan], [3.0, 5.0], [4.0, 3.0]])
    assert schedule_runs.best_setting(runs) == 2
    assert schedule_runs.best_setting(runs, maximize=True) == 1


def test_the_controller_that_is_kept_led_the_last_of_the_best_updates():
    metric = np.array([[9, 1, 9, 2, 3, 4], [9, 9, 9, 9, 1, 1]], float)[..., None]
    learned = SimpleNamespace(metric=metric)
    assert schedule_runs.kept_updates(learned, 1).tolist() == [1, 4]
    assert schedule_runs.kept_updates(learned, 3).tolist() == [5, 5]
    assert schedule_runs.kept_updates(learned, 2, maximize=True).tolist() == [3, 1]


def test_held_picks_each_controller_at_its_own_update():
    learned = SimpleNamespace(phi=np.arange(6).reshape(2, 3), feature_state=())
    _, phi, _ = schedule_runs.held(np.zeros(2), learned, [2, 0])
    assert phi.tolist() == [2, 3]


def test_pairs_count_wins_and_have_an_interval_from_two_on():
    pair = schedule_runs.paired([1.0, 2.0, 4.0], [2.0, 3.0, 3.0])
    assert (pair["wins"], pair["n"]) == (2, 3)
    assert pair["mean"] == pytest.approx(-1 / 3)
    assert pair["error"] == pytest.approx(2 / 3)
    assert pair["low"] < -1 / 3 < pair["high"]
    assert schedule_runs.paired([1.0], [2.0]) == {"mean": -1.0, "n": 1, "wins": 1}


def test_cells_are_measured_once(tmp_path):
    seen = []
    for _ in range(2):
        found = schedule_runs.cells(tmp_path, [3, 4], lambda i: seen.append(i) or i)
        assert found == [3, 4]
    assert seen == [3, 4]


@pytest.mark.parametrize("kind", ["released", "paper"])
def test_dropped_features_are_zero_and_the_parts_cover_no_entry_twice(kind):
    config = SimpleNamespace(features=kind, normalise=False)
    names = ("magnitudes", "losses", "validation")
    parts = [set(schedule_runs.PARTS[kind, name]) for name in names]
    size = schedule_runs.seen_by(config).spec.size
    # the paper's first entry is progress
    assert set.union(*parts) == set(range(1 if kind == "paper" else 0, size))
    assert sum(map(len, parts)) == len(set.union(*parts))
    kept = schedule_runs.seen_by(config).init()[1]
    dropped = schedule_runs.seen_by(config, drop="losses").init()[1]
    wanted = [0.0 if i in parts[1] else float(x) for i, x in enumerate(kept)]
    assert dropped.tolist() == wanted


def test_runs_of_every_setting_begin_with_the_same_parameters():
    def build(lam):
        problem = regression.problem(lam, d=2, learning_rate=0.0)
        return problem, bernoulli(0.5)

    lead = schedule_runs.leader(build, 10)
    data = task_data(regression.generate(1, d=2, sizes=(3,) * 5))
    search = {"train": data["train"], "valid": data["valid"]}
    task_keys = jax.random.split(jax.random.key(0), 3)
    lams = jnp.array([0.1, 0.3])
    runs = lead(lams, task_keys, jax.random.key(1), search)
    weights = np.asarray(runs.params["model"]["b"])
    assert weights.shape == (2, 3, 2)
    np.testing.assert_array_equal(weights[0], weights[1])
    assert len({x.tobytes() for x in weights[0]}) == 3
    spread = schedule_runs.leader(build, 10, mesh=device_mesh(1))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # float32
    jax.tree.map(same, spread(lams, task_keys, jax.random.key(1), search), runs)
    score = schedule_runs.scorer(build(0.1)[0], "test_excess")
    one = jax.tree.map(lambda x: x[1, 2], runs.params)
    worth = score(runs.params, data)
    assert worth.shape == (2, 3)
    assert float(score(one, data)) == pytest.approx(float(worth[1, 2]))


def test_the_grids_hold_the_lambda_of_the_controllers():
    for preset in autoloss_regression.PRESETS.values():
        for _, settings in autoloss_regression.hand_made(preset).values():
            assert preset.lam in settings["lam"]
    assert len(autoloss_regression.hand_made(preset)["joint"][1]["lam"]) == 50


def test_regression_chooses_on_validation_and_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(autoloss_regression, "build", stand_ins)
    argv = flags({**LEARNING, **SMALL[autoloss_regression]})
    autoloss_regression.main([*argv, "--out", str(tmp_path / "run")])
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = record["rows"]
    # the stand-in is the better the larger λ is, and index tells the parameters
    assert rows["joint"]["settings"][0] == {"lam": pytest.approx(3.2)}
    assert rows["joint at λ"]["settings"][0] == {"lam": 0.2}
    assert rows["AutoLoss"]["settings"][0] == {"lam": 0.2}
    assert rows["joint"]["test"] == [14.5, 14.5]
    assert rows["without L1"]["test"] == [-0.5, -0.5]
    text = "\n".join(sections_autoloss.regression(record))
    assert "AutoLoss without losses" in text
    assert "do not differ" in text
    assert "nan" not in text


def test_of_several_controllers_the_best_on_validation_is_chosen_for_the_table():
    row = {
        "setting": {}, "steps": 1, "finite": [6, 6], "share": [[0.1], [0.2], [0.3]],
        "last_test": [[1.0], [2.0], [3.0]], "test": [[0.1], [0.5], [0.2]],
    }  # fmt: skip
    cells = [
        {"AutoLoss": {**row, "valid": valid}, "AutoLoss, last": {**row, "valid": valid}}
        for valid in ([[0.3], [0.1], [0.2]], [[np.nan], [0.3], [0.2]])
    ]
    rows = autoloss_regression.summarise([1, 2], cells)["rows"]
    assert set(rows) == {"AutoLoss", "AutoLoss, last", "AutoLoss, chosen"}
    # least on the test split is the first, which nothing but luck would have chosen
    assert rows["AutoLoss, chosen"]["test"] == [0.5, 0.2]
    assert rows["AutoLoss, chosen"]["share"] == [0.2, 0.3]
    assert rows["AutoLoss"]["controllers_valid"][0] == [0.3, 0.1, 0.2]


def test_a_page_says_what_the_interval_of_the_context_free_pair_allows():
    pair = {"mean": -0.1, "low": -0.2, "high": -0.01, "n": 9, "wins": 9}
    about = sections_autoloss._about_state
    assert "is used" in about(pair)
    assert "nothing shows" in about({**pair, "high": 0.01})
    assert "did harm" in about({**pair, "low": 0.01, "high": 0.2})


def test_the_sweep_shows_spreads_and_the_verdict():
    config = autoloss_sweep.Config(lams=(0.1, 0.8))
    cell = lambda *test: {
        **{key: [[[x]] for x in test] for key in ("test", "last_test", "valid")},
        "share": [[[0.5]]] * 2, "steps": 1, "seconds": 1,
    }  # fmt: skip
    found = [{"joint": cell(1.4, 0.1), "AutoLoss": cell(0.1, 0.2),
              "context-free": cell(0.1, 0.1)}]  # fmt: skip
    outcome = autoloss_sweep.summarise(config, found)
    assert outcome["rows"]["joint"]["spread"].tolist() == [pytest.approx(1.3)]
    record = {"config": dataclasses.asdict(config), "data_seeds": [1], **outcome}
    text = "\n".join(sections_autoloss.sweep(record))
    assert "| joint | 1.400 | 0.100 | 1.300 |" in text
    assert "0.100 and 1.300, reached" in text
    assert "two biases" not in text


def test_the_sweep_says_where_a_context_free_controller_cannot_come():
    config = dataclasses.asdict(autoloss_sweep.Config(lams=(0.1, 0.8)))
    tell = lambda *share: sections_autoloss._out_of_reach(
        {"config": config, "rows": {"AutoLoss": {"share": share}}}
    )
    # 60 updates of .02, from 1/2: a logit of 2 · 1.2 / 2
    (line,) = tell(0.8, 0.76)
    assert "comes to 0.77 at most" in line
    assert "λ = 0.1:" in line
    assert tell(0.76, 0.3) == []


def test_transfer_compares_with_the_chance_that_was_tuned_where_learning_was():
    row = lambda *test: [{"test": x, "share": 0.7} for x in test]
    cell = {"AutoLoss": row(0.5, 0.2), "context-free": row(0.5, 0.1)}
    found = [
        {**cell, "joint": 0.4, "random": [0.3, 0.9], "p": 0},
        {**cell, "joint": 0.1, "random": [0.2, 0.8], "p": 1},
    ]
    outcome = autoloss_transfer.summarise(found)
    assert outcome["matrices"]["random"].tolist() == [[0.3, 0.2], [0.9, 0.8]]
    less = outcome["matrices"]["AutoLoss − joint"]
    np.testing.assert_allclose(less, [[0.1, 0.1], [0.1, 0.1]])
    # column 1 from row 2: .5 - .9; column 2 from row 1: .2 - .2
    pair = outcome["pairs"]["AutoLoss from elsewhere − random"]
    assert pair["mean"] == pytest.approx(-0.2)
    assert outcome["pairs"]["AutoLoss at home − random"]["mean"] == pytest.approx(-0.2)


def test_the_report_has_the_sections():
    assert set(sections_autoloss.SECTIONS) <= set(report.SECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL, ids=lambda m: m.__name__.split(".")[-1])
def test_scripts_run_and_leave_what_the_page_reads(script, tmp_path):
    argv = flags({**LEARNING, **SMALL[script]})
    script.main([*argv, "--out", str(tmp_path / "run")])
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"config.json", "summary.json", "figure.png", "cells"}
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    _, write = sections_autoloss.SECTIONS[script.__name__.split(".")[-1]]
    text = "\n".join(write(record))
    assert "AutoLoss" in text
    assert "nan" not in text
