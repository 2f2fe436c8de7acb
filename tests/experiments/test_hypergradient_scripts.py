"""Every hypergradient script runs with tiny settings and leaves what it promises."""

import json

import numpy as np
import pytest

from experiments import (
    hypergradient_cifar,
    hypergradient_hdm,
    hypergradient_mnist,
    hypergradient_recovery,
    hypergradient_stability,
    prepare_data,
    report,
)
from experiments.hypergradient_recovery import RULES
from metax.harness import read_metrics

LEFT_BEHIND = {"config.json", "summary.json", "figure.png"}
DIGITS = ["--dataset", "digits", "--epochs", "1", "--num-seeds", "1"]


def summary_of(run):
    assert {path.name for path in run.iterdir()} >= LEFT_BEHIND
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(
    "setting", ["tuning", pytest.param("grid", marks=pytest.mark.slow)]
)
def test_mnist(setting, tmp_path, capsys):
    argv = [*DIGITS, "--setting", setting, "--out", str(tmp_path / "run")]
    hypergradient_mnist.main(argv)
    summary = summary_of(tmp_path / "run")
    cells = {"tuning": 6, "grid": 3 * (6 + 36)}[setting]
    assert len(summary["rows"]) == cells
    assert "adam_hd" in capsys.readouterr().out


@pytest.mark.slow
def test_mnist_resumes_at_the_first_method_that_is_missing(tmp_path):
    run = tmp_path / "run"
    hypergradient_mnist.main([*DIGITS, "--out", str(run)])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(text.splitlines(True)[:5]))
    hypergradient_mnist.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_text() == text


RECOVERED = ("sgd", "adam", "adam_hd multiplicative .02", "dog")


@pytest.mark.parametrize(
    "names",
    [RECOVERED, pytest.param(tuple(RULES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_recovery(names, tmp_path, capsys, monkeypatch):
    """Each rule is a program to compile: all of them take a minute."""
    some = {name: RULES[name] for name in names}
    monkeypatch.setattr(hypergradient_recovery, "RULES", some)
    hypergradient_recovery.main([*DIGITS, "--out", str(tmp_path / "run")])
    methods = {row["method"] for row in summary_of(tmp_path / "run")["rows"]}
    assert methods == set(names)
    assert "best tuned plain training loss" in capsys.readouterr().out


def test_stability_shows_divergence_and_its_cures(tmp_path, monkeypatch):
    guards = hypergradient_stability.GUARDS
    shown = ("additive 1e-4", "additive 1e-4, bounds (0, 1e-2)", "multiplicative .02")
    some = {name: guards[name] for name in shown}
    monkeypatch.setattr(hypergradient_stability, "GUARDS", some)
    argv = ["--dataset", "digits", "--steps", "12", "--num-seeds", "1"]
    argv += ["--sizes", "100", "--out", str(tmp_path / "run")]
    hypergradient_stability.main(argv)
    summary = summary_of(tmp_path / "run")
    diverged = {
        name: row["diverged_at_step"] for name, row in summary["failure"].items()
    }
    assert diverged.pop("additive 1e-4") != [None]
    assert all(steps == [None] for steps in diverged.values())
    # between 9.8 and 15.6 for n from 1e2 to 1e5, on a grid of six values a decade
    assert 6 < summary["law"]["additive, β·n"]["100"] < 22


def test_hdm(tmp_path):
    argv = ["--steps", "60", "--num-seeds", "2", "--tolerance", "1.0"]
    hypergradient_hdm.main([*argv, "--out", str(tmp_path / "run")])
    table = summary_of(tmp_path / "run")["table"]
    assert table["gd 1/L"]["solved"] == 0
    assert len(table["hdm_hb 10/L, 5"]["counts"]) == 2


def test_cifar_runs_and_resumes(tmp_path, monkeypatch):
    """On twenty random images written in the format of the published files."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] %= 10
        (raw / name).write_bytes(records.tobytes())
    prepare_data.prepare("cifar10", raw, tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = [
        "--width",
        "0.05",
        "--batch-size",
        "10",
        "--data-dir",
        str(tmp_path / "data"),
    ]
    argv = [*tiny, "--method", "sgdn_hd", "--epochs", "1"]
    hypergradient_cifar.main([*argv, "--out", str(tmp_path / "run")])
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1]
    assert np.isfinite(rows[0]["train_loss"])
    hypergradient_cifar.main(["--resume", str(tmp_path / "run")])
    assert read_metrics(tmp_path / "run") == rows
    summary_of(tmp_path / "run")


def test_results_page_is_what_the_report_writes():
    assert (report.ROOT / "RESULTS.md").read_text() == report.compose(
        report.ROOT / "results"
    )
