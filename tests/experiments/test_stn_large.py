"""The scripts for CIFAR-10 and for text, on random images and on a Markov chain."""

import functools
import json
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    prepare_data,
    sections_large,
    stn_cifar,
    stn_ptb,
    tuning_runs,
)
from metax import BilevelProblem, Hyperparameter, Loop, squared_norm, unroll
from metax.harness import read_metrics
from metax.hypergradient import sgd_hd
from metax.stn import DeltaSTN, delta_stn, natural_hparams
from metax.tasks import Split, TuningData

SMALL = {
    "model": "alexnet",
    "scale": 0.02,
    "num_images": 10,
    "batch_size": 4,
    "epochs": 2,
    "warmup_epochs": 1,
    "train_steps": 1,
}
TEXT = {
    "dataset": "synthetic",
    "vocab": 12,
    "num_tokens": 800,
    "width": 4,
    "layers": 2,
    "batch_size": 4,
    "segment": 8,
    "epochs": 2,
    "warmup_steps": 12,
    "learning_rate": 1.0,
}
LEFT_BEHIND = {"config.json", "metrics.jsonl", "summary.json", "figure.png"}


class Tuner(NamedTuple):
    count: jax.Array


class Info(NamedTuple):
    train_loss: jax.Array
    seen: jax.Array
    is_finite: jax.Array


def flags(settings, **more):
    """Fields and their values as a command line."""
    pairs = {**settings, **more}.items()
    return [x for k, v in pairs for x in (f"--{k.replace('_', '-')}", str(v))]


def summary_of(run):
    assert {path.name for path in run.iterdir()} >= LEFT_BEHIND
    return json.loads((run / "summary.json").read_text())


def random_images(num):
    rng = np.random.default_rng(0)
    split = lambda n: Split(
        rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
        rng.integers(0, 10, n).astype(np.int32),
    )
    return TuningData(train=split(num), valid=split(4), test=split(4))


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    """Sixty random images in the format of the published files."""
    rng, raw = np.random.default_rng(0), tmp_path / "raw"
    raw.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (10, 3073), np.uint8)
        records[:, 0] %= 10
        (raw / name).write_bytes(records.tobytes())
    prepare_data.prepare("cifar10", raw, tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"model": "alexnet"}, 18),
        ({"model": "vgg16"}, 26),
        ({"decay": "stage"}, 22),
        ({"norm": "batch"}, 19),
    ],
)
def test_each_model_has_the_hyperparameters_that_it_should(changes, number):
    config = stn_cifar.Config(scale=0.02, **changes)
    loop = stn_cifar.build(config, "delta_stn", random_images(4))
    state = jax.eval_shape(loop.init, jax.random.key(0))
    assert len(state.hparams) == number
    assert {"rotation", "zoom", "cutout_holes", "hue"} <= set(state.hparams)


def test_cifar_leaves_a_table_and_its_section(cifar_folder, tmp_path, capsys):
    """With fixed hyperparameters and a learned rate: the cheapest to compile."""
    run = tmp_path / "run"
    argv = flags(SMALL, data_dir=cifar_folder, inner_rule="sgd_hd", out=run)
    stn_cifar.main([*argv, "--methods", "fixed"])
    summary = summary_of(run)
    rotation, rate, loss = (
        [row[name] for row in summary["rows"]]
        for name in ("hparams.rotation", "learning_rate", "test_loss")
    )
    assert rotation == [pytest.approx(5.0)] * 2
    assert len({0.03, *np.round(rate, 7)}) == 3
    assert np.isfinite(loss).all()
    assert "test_accuracy" in capsys.readouterr().out
    assert "smoke run" in "\n".join(sections_large.cifar(summary))
    before = (run / "metrics.jsonl").read_text()
    stn_cifar.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_hypergradient_descent_is_an_inner_optimizer_of_delta_stn(beta):
    """Best w is 1 / (1 + decay) and 1 / 2 is wanted; the first rate is too low."""

    def train_loss(outputs, batch, hparams, params):
        penalty = hparams["decay"] * squared_norm(params)
        return 0.5 * ((outputs - 1) ** 2 + penalty)

    problem = BilevelProblem(
        init=lambda key: {"w": jnp.zeros(())},
        predict=lambda params, batch, hparams, key: params["w"] * batch,
        train_loss=train_loss,
        valid_loss=lambda outputs, batch: jnp.mean((outputs - 0.5) ** 2),
        sample_train=lambda data, key: data,
        sample_valid=lambda data, key: data,
        hparams={"decay": Hyperparameter(0.1, 1e-3, 10.0, "log", 0.1)},
    )
    loop = delta_stn(
        problem,
        inner_optimizer=sgd_hd(1e-4, beta, rule="multiplicative", bounds=(0, None)),
        response_optimizer=optax.sgd(9.0),
        outer_optimizer=optax.adam(0.02),
        perturbation="batch",
    )
    keys = jax.random.split(jax.random.key(1), 1000)
    run = jax.jit(functools.partial(unroll, Loop(loop.init, loop.step)))
    state, _ = run(loop.init(jax.random.key(0)), keys, jnp.ones(4))
    rate, decay = state.inner_state.learning_rate, natural_hparams(state)["decay"]
    assert (rate > 1e-2) == (beta > 0)
    # not at its limit yet, and probed by noise of 0.1
    assert (abs(decay - 1) < 0.2) == (beta > 0)


def test_text_goes_on_within_a_run_and_leaves_a_table_and_its_section(
    tmp_path, capsys, monkeypatch
):
    """With fixed hyperparameters, which stay where they are."""
    run, record = tmp_path / "run", tuning_runs.record_run

    def broken_off(part, loop, data, key, epochs, **how):
        record(part, loop, data, key, epochs - 1, **how)
        raise KeyboardInterrupt

    argv = [*flags(TEXT, out=run), "--methods", "fixed"]
    with monkeypatch.context() as patch:
        patch.setattr(tuning_runs, "record_run", broken_off)
        with pytest.raises(KeyboardInterrupt):
            stn_ptb.main(argv)
    assert not read_metrics(run)
    (done,) = read_metrics(run / "parts" / "fixed_0")
    stn_ptb.main(["--resume", str(run)])
    summary = summary_of(run)
    first, last = summary["rows"]
    assert first["seconds"] == done["seconds"]  # of the first epoch, not made again
    assert first["hparams.output_dropout"] == pytest.approx(0.05)
    assert last["hparams.output_dropout"] == first["hparams.output_dropout"]
    assert last["train_loss"] < first["train_loss"]
    assert np.isfinite(last["test_perplexity"])
    assert "test_perplexity" in capsys.readouterr().out
    assert "smoke run" in "\n".join(sections_large.text(summary))


def test_a_run_is_silent_where_no_epoch_has_a_hypergradient():
    def epoch(step, **gradients):
        hparams = {name: np.full((1, 2), 0.5) for name in gradients}
        found = {name: np.array([x]) for name, x in gradients.items()}
        steps = types.SimpleNamespace(hparams=hparams, hypergradient=found)
        infos = types.SimpleNamespace(steps=steps, metrics={"loss": np.ones(1)})
        return tuning_runs.epoch_rows()(step, None, infos)[0]

    nan = np.nan
    rows = tuning_runs.whole_rows([
        epoch(1, moved=[nan, nan], silent=[nan, nan], unknown=[nan, nan], late=[0, 0]),
        epoch(2, moved=[nan, -0.1], silent=[nan, 0], unknown=[nan, nan], late=[0, 2]),
    ])  # fmt: skip
    assert [row["silent"] for row in rows] == ["silent"] * 2
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0].keys() == {
        "silent", "epoch", "loss", "seconds",
        *(f"hparams.{name}" for name in ("moved", "silent", "unknown", "late")),
    }  # fmt: skip


def test_segments_come_in_the_order_of_the_text_and_again():
    """Seen through a tuner that only notes what it is given."""

    def note(tuner, batch, key):
        place = batch[0].astype(jnp.float32)
        return Tuner(tuner.count + 1), Info(place, place, jnp.array(True))

    def check(tuner, batch, key):
        place = batch[0].astype(jnp.float32)
        return tuner, Info(jnp.nan * place, -place, jnp.array(True))

    start = lambda key: Tuner(jnp.int32(0))
    loop = stn_ptb.ordered(DeltaSTN(start, None, note, check, None), 2, 4)
    data = {"train": jnp.arange(5)[:, None], "valid": jnp.arange(1, 3)[:, None]}
    keys = jax.random.split(jax.random.key(0), 6)
    state, infos = jax.jit(functools.partial(unroll, loop))(
        loop.init(keys[0]), keys, data
    )
    assert infos.train_loss.tolist() == [0.5, 2.5, 2.0, 1.5, 3.5, 0.5]
    # 4 segments are for warming up: the last one trained on is noted twice
    assert infos.seen.tolist() == [1, 3, -1, -2, -1, -2]
    assert (int(state.train_at), int(state.valid_at)) == (12, 4)
