"""The scripts of tuned image classifiers run on digits and leave what they promise."""

import json

import numpy as np
import pytest

from experiments import sections_images, stn_baselines, stn_mnist
from metax.harness import read_metrics

TINY = ["--dataset", "digits", "--widths", "8", "--batch-size", "16"]
TINY += ["--corrupted", "0.4", "--num-steps", "20", "--eval-every", "10"]
TINY += ["--warmup-steps", "5"]


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def test_mnist_reports_each_method_at_its_best_rates_and_resumes(tmp_path, capsys):
    run, methods = tmp_path / "run", ["--methods", "delta_stn", "fixed_start"]
    argv = [*TINY, *methods, "--inner-rates", "0.01", "0.1", "--out", str(run)]
    stn_mnist.main(argv)
    assert "delta_stn" in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} >= {"figure.png", "figure_cost.png"}
    summary = summary_of(run)
    outcome = summary["methods"]["delta_stn"]
    by_rates = [loss for *_, loss in outcome["final"]["valid_loss_by_rates"]]
    assert np.isclose(np.mean(outcome["final"]["valid_loss"]), min(by_rates))
    assert np.all(
        np.less_equal(outcome["best"]["valid_loss"], outcome["final"]["valid_loss"])
    )
    assert outcome["gradients"] == pytest.approx(20 * 8 / 3 + 1.3 * 3)
    assert "fixed_start" in summary["differences"]["final"]
    assert "delta_stn" in "\n".join(sections_images.images(summary))
    (run / "summary.json").unlink()
    stn_mnist.main(["--resume", str(run)])  # every method is there: only the report
    assert summary_of(run)["methods"] == summary["methods"]


def test_mnist_refuses_stretches_that_do_not_fit(tmp_path):
    with pytest.raises(SystemExit, match="eval-every"):
        stn_mnist.main([*TINY, "--eval-every", "7", "--out", str(tmp_path / "run")])


def test_searches_keep_to_their_budget_and_implicit_moves_the_decay(tmp_path):
    run, methods = tmp_path / "run", ["--methods", "random_equal", "implicit_decay"]
    budget = ["--num-trials", "3", "--implicit-every", "5", "--num-seeds", "2"]
    stn_baselines.main([*TINY, *methods, *budget, "--out", str(run)])
    summary, rows = summary_of(run), read_metrics(run)
    search = summary["methods"]["random_equal"]
    assert search["trials"] == 3
    # 20 steps of Delta-STN cost 58.5 gradients: 3 trials of 20 steps
    assert search["gradients"] == 60
    rates = [row["dropout_1"] for row in rows if row["method"] == "random_equal"]
    assert len({round(rate, 6) for rate in rates}) == 6  # seeds search for themselves
    decays = [row["weight_decay"] for row in rows if row["method"] == "implicit_decay"]
    assert np.unique(decays).size == 4
    best = np.array(search["best_so_far"])
    assert np.all(np.diff(best) <= 0)
    assert "random_equal" in "\n".join(sections_images.baselines(summary))


@pytest.mark.slow  # optuna is no dependency
def test_tpe_is_told_what_its_trials_reached(tmp_path):
    pytest.importorskip("optuna", reason="optuna is optional")
    run, methods = tmp_path / "run", ["--methods", "tpe_full", "--num-trials", "2"]
    stn_baselines.main([*TINY, *methods, "--num-seeds", "1", "--out", str(run)])
    assert summary_of(run)["methods"]["tpe_full"]["trials"] == 2


def test_a_search_is_uniform_in_the_natural_range_and_in_the_logarithm_of_a_decay():
    config = stn_baselines.Config(widths=(4,))
    image = np.zeros((8, 8, 1), np.uint8)
    problem = stn_baselines.tuning(config, image, "random_full").problem
    middle = stn_baselines.place(problem, dict.fromkeys(problem.hparams, 0.5))
    assert middle["dropout_1"] == pytest.approx(0.475)
    assert middle["weight_decay"] == pytest.approx(1e-3)
