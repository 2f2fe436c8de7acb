"""The scripts of tuned image classifiers run on digits and leave what they promise."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from experiments import (
    judged_runs,
    sections_images,
    stn_baselines,
    stn_mnist,
    stn_starts,
)
from metax import Loop, unroll
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


@pytest.mark.slow
def test_the_steps_without_a_scan_are_those_of_delta_stn():
    config = stn_mnist.Config(dataset="digits", widths=(4,), batch_size=8)
    config = dataclasses.replace(config, warmup_steps=5)
    data = judged_runs.prepare(config, jax.random.key(1))
    problem = judged_runs.network(config, data.train.image[0]).problem
    tuned = judged_runs.tuned_loop(config, problem, 0.1, 0.1)
    start, keys = tuned.init(jax.random.key(0)), jax.random.split(jax.random.key(2), 3)
    runs = []
    for loop in (tuned, judged_runs.without_scan(config, problem, tuned)):
        run = jax.jit(functools.partial(unroll, Loop(loop.init, loop.step)))
        state, infos = run(start, keys, data)
        seen = infos.train_loss, infos.valid_loss, infos.hparams, infos.hypergradient
        assert infos.updated.tolist() == [False, True, True]
        runs.append((state, seen))
    # two programs, in float32
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *runs)


@pytest.mark.slow
def test_the_small_network_with_convolutions_runs_step_by_step(tmp_path):
    run, methods = tmp_path / "run", ["--methods", "delta_stn", "fixed_literature"]
    argv = ["--dataset", "digits", "--model", "cnn", "--by-step", "--num-seeds", "1"]
    argv += ["--batch-size", "4", "--num-steps", "4", "--eval-every", "2"]
    argv += ["--train-steps", "1", "--warmup-steps", "2", "--out", str(run)]
    stn_mnist.main([*argv, *methods])
    summary = summary_of(run)
    assert set(summary["methods"]["delta_stn"]["raw_spread"]) >= {"cutout_holes"}
    assert "SimpleCNN" in "\n".join(sections_images.images(summary))


def test_mnist_refuses_stretches_that_do_not_fit(tmp_path):
    with pytest.raises(SystemExit, match="eval-every"):
        stn_mnist.main([*TINY, "--eval-every", "7", "--out", str(tmp_path / "run")])


def test_searches_keep_to_their_budget_and_implicit_moves_the_decay(tmp_path):
    run, methods = tmp_path / "run", ["--methods", "random_equal", "implicit_decay"]
    methods.append("random_rate")
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
    chosen = summary["methods"]["random_rate"]["chosen"]
    searched = [trial["learning_rate"] for trial in chosen]
    assert len(set(searched)) == 2
    assert min(searched) > 0.001
    assert max(searched) < 0.1
    best = np.array(search["best_so_far"])
    assert np.all(np.diff(best) <= 0)
    assert "random_equal" in "\n".join(sections_images.baselines(summary))


@pytest.mark.slow
def test_starts_are_where_dropout_starts_and_fixed_dropout_stays(tmp_path):
    run, starts = tmp_path / "run", ["--starts", "0.02", "0.6"]
    how = ["--num-seeds", "2", "--outer-rate", "0.001", *starts, "--out", str(run)]
    stn_starts.main([*TINY, *how])
    summary = summary_of(run)
    tuned, fixed = (summary["methods"][n]["dropout_1"] for n in stn_starts.METHODS)
    assert np.allclose(fixed, [[0.02, 0.6]] * 2)
    assert np.shape(tuned) == (2, 2)
    assert np.allclose(tuned, fixed, rtol=0.05)
    assert not np.allclose(tuned, fixed, rtol=1e-6)
    assert "0.02" in "\n".join(sections_images.starts(summary))


@pytest.mark.slow  # optuna is no dependency
def test_tpe_is_told_what_its_trials_reached(tmp_path):
    pytest.importorskip("optuna", reason="optuna is optional")
    run, methods = tmp_path / "run", ["--methods", "tpe_rate", "--num-trials", "2"]
    stn_baselines.main([*TINY, *methods, "--num-seeds", "1", "--out", str(run)])
    found = summary_of(run)["methods"]["tpe_rate"]
    assert found["trials"] == 2
    assert 0.001 < found["chosen"][0]["learning_rate"] < 0.1


def test_a_search_is_uniform_in_the_natural_range_and_in_the_logarithm_of_a_decay():
    config = stn_baselines.Config(widths=(4,))
    image = np.zeros((8, 8, 1), np.uint8)
    problem = stn_baselines.tuning(config, image, "random_full").problem
    specs = stn_baselines.space(config, problem, "random_rate")
    middle = stn_baselines.place(specs, dict.fromkeys(specs, 0.5))
    assert middle["dropout_1"] == pytest.approx(0.475)
    assert middle["weight_decay"] == pytest.approx(1e-3)
    assert middle["learning_rate"] == pytest.approx(0.01)
    assert "learning_rate" not in stn_baselines.space(config, problem, "random_full")
