"""What `delta_stn` refuses: function, argument, rule and value in every message."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from metax import BilevelProblem, Hyperparameter, squared_norm, unroll
from metax.harness import NonFiniteError, train
from metax.stn import (
    best_response,
    centered_stn,
    delta_stn,
    replace_hparams,
    silent_hparams,
    stn,
)

DECAY = Hyperparameter(0.1, 1e-3, 10.0, "log")
RATE = Hyperparameter(0.3, 0.0, 0.9, "logit")
OPTIMIZERS = {
    "inner_optimizer": optax.sgd(0.1),
    "response_optimizer": optax.sgd(0.1),
    "outer_optimizer": optax.sgd(0.1),
}
BATCH = {"x": jnp.ones((6, 3)), "y": jnp.ones(6)}
KEY = jax.random.key(0)


def train_loss(outputs, batch, hparams, params):
    penalty = hparams["decay"] * squared_norm(params) if "decay" in hparams else 0.0
    return 0.5 * ((outputs - batch["y"]) ** 2 + penalty)


def regression(**changes):
    """A linear model with `decay` and whatever else is asked for."""
    problem = BilevelProblem(
        init=lambda key: {"w": jnp.full(3, 0.1)},
        predict=lambda params, batch, hparams, key: batch["x"] @ params["w"],
        train_loss=train_loss,
        valid_loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
        sample_train=lambda data, key: data,
        sample_valid=lambda data, key: data,
        hparams={"decay": DECAY},
    )
    return problem._replace(**changes)


def tuner(problem=None, **options):
    return delta_stn(problem or regression(), **{**OPTIMIZERS, **options})


def with_spec(**fields):
    return regression(hparams={"decay": DECAY._replace(**fields)})


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("linearized", [True, False])
def test_six_settings_are_built_and_two_are_refused(centered, split, linearized):
    make = lambda: tuner(centered=centered, split=split, linearized=linearized)
    if centered or not linearized:
        assert callable(make().step)
        return
    with pytest.raises(ValueError, match=r"`delta_stn\(linearized=True\)` needs cent"):
        make()


@pytest.mark.parametrize("make", [stn, centered_stn])
def test_named_settings_take_the_options_of_delta_stn(make):
    assert callable(make(regression(), **OPTIMIZERS, train_steps=2).step)
    with pytest.raises(TypeError, match="linearized"):
        make(regression(), **OPTIMIZERS, linearized=True)


@pytest.mark.parametrize(
    ("options", "argument", "got"),
    [
        ({"train_steps": 0}, "train_steps", "0"),
        ({"valid_steps": 0}, "valid_steps", "0"),
        ({"warmup_steps": -1}, "warmup_steps", "-1"),
        ({"groups": 0}, "groups", "0"),
        ({"perturbation": "examples"}, "perturbation", "'examples'"),
        ({"valid_forward": "linear"}, "valid_forward", "'linear'"),
        (
            {"antithetic": True, "perturbation": "batch"},
            "antithetic",
            "perturbation='batch'",
        ),
        ({"antithetic": True, "perturbation": "group", "groups": 3}, "groups", "3"),
        (
            {"predictor": True, "centered": False, "linearized": False},
            "predictor",
            "centered=False",
        ),
        ({"scale_bounds": (1.0, 0.1)}, "scale_bounds", r"\(1.0, 0.1\)"),
        ({"scale_bounds": (0.0, 1.0)}, "scale_bounds", r"\(0.0, 1.0\)"),
        ({"logit_bound": 0.0}, "logit_bound", "0.0"),
        ({"logit_bound": math.nan}, "logit_bound", "nan"),
        ({"entropy_weight": -1e-3}, "entropy_weight", "-0.001"),
        ({"entropy_weight": math.nan}, "entropy_weight", "nan"),
    ],
)
def test_bad_options_are_refused(options, argument, got):
    with pytest.raises(ValueError, match=rf"`delta_stn\({argument}=.*got {got}"):
        tuner(**options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lower": 10.0, "upper": 1e-3}, "lower < upper; got lower=10.0, upper=0.001"),
        ({"lower": 1.0, "upper": 1.0}, "lower < upper; got lower=1.0"),
        ({"lower": -1.0}, "lower >= 0.*got lower=-1.0"),
        ({"init": 20.0}, r"\.init` must lie in \[0.001, 10\].*got 20.0"),
        ({"init": math.nan}, r"\.init` must lie in.*got nan"),
        ({"init": 0.0, "lower": 0.0}, r"\.init` must lie in.*above 0.*got 0.0"),
        ({"init": jnp.zeros((0,))}, r"\.init` must have coordinates.*\(0,\)"),
        ({"scale": "logit", "upper": math.inf}, "two finite bounds.*upper=inf"),
        ({"scale": "logit", "lower": -math.inf}, "two finite bounds.*lower=-inf"),
        ({"scale": "logit", "init": 10.0}, r"\.init` must.*neither bound.*got 10.0"),
        ({"scale": "logit", "init": 1e-3}, r"\.init` must.*neither bound.*got 0.001"),
        ({"scale": "logit", "init": 9.99}, r"\.init`.*logit_bound=5.*got 9.99"),
        ({"scale": "logit", "init": 2e-3}, r"\.init`.*logit_bound=5.*got 0.002"),
        ({"scale": "softplus"}, "finite lower bound and no upper.*upper=10.0"),
        (
            {"scale": "softplus", "lower": -math.inf, "upper": math.inf},
            "finite lower bound and no upper.*lower=-inf",
        ),
        (
            {"scale": "softplus", "init": 1e-3, "upper": math.inf},
            r"\.init` must.*above the lower bound.*got 0.001",
        ),
        ({"scale": "exp"}, r"\.scale` must be in .*got 'exp'"),
        ({"perturbation": 0.0}, r"\.perturbation`.*above 0; got 0.0"),
        ({"perturbation": -1.0}, r"\.perturbation`.*above 0; got -1.0"),
        ({"perturbation": math.inf}, r"\.perturbation`.*got inf"),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(fields, words):
    where = r"`delta_stn\(problem=...\).hparams\['decay'\]"
    with pytest.raises(ValueError, match=f"{where}.*{words}"):
        tuner(with_spec(**fields))


def test_one_bad_coordinate_of_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"\.init`.*logit_bound=5"):
        tuner(with_spec(scale="logit", init=jnp.array([1.0, 9.99])))


def test_a_wider_logit_bound_admits_a_start_nearer_the_end():
    assert tuner(with_spec(scale="logit", init=9.99), logit_bound=10.0)


def test_empty_hyperparameters_are_refused():
    with pytest.raises(ValueError, match=r"`delta_stn\(problem=.*hparams=\{\}"):
        tuner(regression(hparams={}))


@pytest.mark.parametrize("sigma", [1e-4, 4.0])
def test_a_scale_that_is_tuned_must_start_within_its_bounds(sigma):
    problem = with_spec(perturbation=sigma)
    assert tuner(problem)  # it is not tuned here
    words = rf"hparams\['decay'\].perturbation`.*\(0.001, 3.0\).*got {sigma}"
    with pytest.raises(ValueError, match=words):
        tuner(problem, scale_optimizer=optax.sgd(0.1))


def run(kernel, loop, batch, key=KEY):
    """Traces only: what a door refuses, it refuses before anything is computed."""
    state = loop.init(KEY)
    return jax.eval_shape(lambda b: getattr(loop, kernel)(state, b, key), batch)


@pytest.mark.parametrize("kernel", ["train_step", "valid_step"])
@pytest.mark.parametrize(
    "batch",
    [
        {"x": jnp.ones((6, 3)), "y": jnp.ones(5)},
        {"x": jnp.ones((6, 3)), "y": jnp.ones(())},
        {"x": jnp.ones((0, 3)), "y": jnp.ones(0)},
        {},
    ],
)
def test_a_batch_needs_one_leading_axis(kernel, batch):
    words = rf"`delta_stn\(...\).{kernel}\(batch=...\)` must.*got leading axes"
    with pytest.raises(ValueError, match=words):
        run(kernel, tuner(), batch)


@pytest.mark.parametrize("kernel", ["train_step", "valid_step"])
def test_groups_must_divide_a_batch_that_is_perturbed(kernel):
    options = {"perturbation": "group", "groups": 4}
    loop = tuner(scale_optimizer=optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match=r"groups=...\)` must divide.*groups=4.* 6"):
        run(kernel, loop, BATCH)


def test_a_validation_batch_without_noise_needs_no_groups():
    loop = tuner(perturbation="group", groups=4)
    assert run("valid_step", loop, BATCH)


def test_antithetic_examples_come_in_pairs():
    odd = jax.tree.map(lambda x: x[:5], BATCH)
    with pytest.raises(ValueError, match=r"`delta_stn\(antithetic=True\)`.*got a.* 5"):
        run("train_step", tuner(antithetic=True), odd)
    assert run("valid_step", tuner(antithetic=True), odd)


@pytest.mark.parametrize("perturbation", ["example", "group", "batch"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda *seen: jnp.mean(train_loss(*seen)), r"\(\)"),
        (lambda *seen: train_loss(*seen)[:, None], r"\(\d, 1\)"),
        (lambda *seen: train_loss(*seen)[1:], r"\(\d,\)"),
    ],
)
def test_the_training_loss_must_have_one_value_an_example(
    perturbation, split, loss, shape
):
    loop = tuner(
        regression(train_loss=loss), perturbation=perturbation, groups=2, split=split
    )
    words = rf"train_loss\(...\)` must.* shape \(\d,\); got shape {shape}"
    with pytest.raises(ValueError, match=words):
        run("train_step", loop, BATCH)


def test_a_hyperparameter_that_is_never_used_is_named():
    problem = regression(hparams={"decay": DECAY, "unused": RATE, "idle": RATE})
    with pytest.raises(ValueError, match=r"hparams`.*not: \['idle', 'unused'\]"):
        run("train_step", tuner(problem), BATCH)


@pytest.mark.parametrize("shared", [True, False])
def test_a_hyperparameter_of_the_validation_alone_counts_as_used(shared):
    def predict(params, batch, hparams, key):
        return batch["x"] @ params["w"] + (hparams["gain"] if key is None else 0.0)

    problem = regression(
        hparams={"decay": DECAY, "gain": RATE._replace(shared=shared)}, predict=predict
    )
    assert run("train_step", tuner(problem), BATCH)


@pytest.mark.parametrize(
    ("entry", "call"),
    [
        ("init", lambda loop, key: loop.init(key)),
        ("step", lambda loop, key: loop.step(loop.init(KEY), key, BATCH)),
        ("train_step", lambda loop, key: run("train_step", loop, BATCH, key)),
        ("valid_step", lambda loop, key: run("valid_step", loop, BATCH, key)),
    ],
)
def test_raw_keys_are_refused(entry, call):
    words = rf"`delta_stn\(...\).{entry}\(key=...\)` must.*uint32"
    with pytest.raises(ValueError, match=words):
        call(tuner(), jax.random.PRNGKey(0))


def test_replacing_by_an_unknown_name_or_a_bad_value_is_refused():
    state = tuner().init(KEY)
    for natural in ({"rate": 0.1}, {"decay": 11.0}):
        with pytest.raises(ValueError, match="unconstrain"):
            replace_hparams(state, natural)


def test_a_hyperparameter_without_a_response_is_silent_unless_it_enters_directly():
    def predict(params, batch, hparams, key):
        gain = hparams["gain"] if key is None else 1.0
        return gain * (batch["x"] @ params["w"])

    problem = regression(hparams={"decay": DECAY, "gain": RATE}, predict=predict)
    loop = tuner(
        problem,
        perturbation="batch",
        warmup_steps=5,
        response=best_response(2, select=lambda path, leaf: False),
    )
    keys = jax.random.split(jax.random.key(1), 3)
    run = jax.jit(lambda state, data: unroll(loop, state, keys, data))
    _, infos = run(loop.init(KEY), BATCH)
    assert infos.updated.tolist() == [False, True, True]
    assert silent_hparams(infos) == ("decay",)
    assert silent_hparams(jax.tree.map(lambda x: x[:1], infos)) == ()


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    problem = regression(valid_loss=lambda outputs, batch: jnp.sum(outputs) / 0.0)
    loop = tuner(problem, perturbation="batch", warmup_steps=10)
    with pytest.raises(NonFiniteError) as caught:
        train(loop, BATCH, KEY, 4)
    assert caught.value.step == 2  # the first that looks at it
