"""The loop as a whole: its six settings, other models, and where λ goes."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metax import BilevelProblem, Hyperparameter, squared_norm, unroll
from metax.stn import constrain
from metax.tasks import cutout, dropout, smooth_labels
from tests.stn.test_kernels import DATA, DECAY, KEY, PROBLEM, started, tuner


def test_six_settings_run_and_differ():
    settings = [
        dict(zip(("centered", "split", "linearized"), s, strict=True))
        for s in itertools.product((False, True), repeat=3)
        if s[0] or not s[2]
    ]
    loops = [tuner(**setting) for setting in settings]
    run = lambda data: [loop.step(started(loop), KEY, data) for loop in loops]
    ends = jax.jit(run)(DATA)
    assert len(ends) == 6
    for (state, info), (other, _) in itertools.combinations(ends, 2):
        assert bool(info.is_finite)
        same = lambda a, b: np.allclose(a, b, rtol=1e-6, atol=0.0)
        parts = (state.params, state.response), (other.params, other.response)
        assert not all(jax.tree.leaves(jax.tree.map(same, *parts)))


def test_modules_of_nnx_are_tuned_through_split_and_merge():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 2, rngs=rngs)
            self.last = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x))).squeeze(-1)

    graph = nnx.graphdef(Mlp(nnx.Rngs(0)))
    problem = PROBLEM._replace(
        init=lambda key: nnx.to_pure_dict(nnx.state(Mlp(nnx.Rngs(key)))),
        predict=lambda params, batch, hparams, key: nnx.merge(graph, params)(
            batch["x"].astype(jnp.float32)
        ),
    )
    loop = tuner(problem)
    run = jax.jit(lambda data: unroll(loop, started(loop), jax.random.split(KEY), data))
    state, infos = run(DATA)
    assert infos.is_finite.all()
    assert state.params["first"]["kernel"].dtype == jnp.float32
    assert float(state.hparams["decay"]) != math.log(0.1)


def scalar_model(predict, spec, wanted, **changes):
    """One weight w, best at some w*(λ); validation wants w to be `wanted`."""
    return BilevelProblem(
        init=lambda key: {"w": jnp.ones(())},
        predict=predict,
        train_loss=changes.pop(
            "train_loss", lambda outputs, *rest: 0.5 * (outputs["y"] - 1) ** 2
        ),
        valid_loss=lambda outputs, batch: (outputs["w"][0] - wanted) ** 2,
        sample_train=lambda data, key: data,
        sample_valid=lambda data, key: data,
        hparams={"value": spec},
    )


def linear_predict(change, params, batch, hparams, key):
    x = batch if key is None else change(batch, hparams["value"], key)
    y = params["w"] * x.reshape(len(x), -1).mean(1)
    return {"y": y, "w": jnp.broadcast_to(params["w"], len(x))}


def decayed_loss(outputs, batch, hparams, params):
    return 0.5 * ((outputs["y"] - 1) ** 2 + hparams["value"] * squared_norm(params))


def smoothed_loss(outputs, batch, hparams, params):
    labels = jax.nn.one_hot(jnp.zeros(len(batch), int), 2)
    target = smooth_labels(labels, hparams["value"])
    return optax.softmax_cross_entropy(
        jnp.stack([outputs["y"], -outputs["y"]], 1), target
    )


def cut(image, length, key):
    one = lambda image, key, length: cutout(image, key, length=length, holes=1)
    return jax.vmap(one)(image, jax.random.split(key, len(image)), length)


RATE = Hyperparameter(0.3, 0.0, 0.95, "logit", 0.5)
LENGTH = Hyperparameter(4, 2, 24, "logit", 0.5, discrete=True)
SMOOTHING = Hyperparameter(0.1, 0.0, 0.5, "logit", 0.5)
keep = lambda x, value, key: x
drop = lambda x, value, key: dropout(x.reshape(len(x), -1)[:, :4], value, key)


@pytest.mark.parametrize(
    ("change", "spec", "wanted", "loss", "sign"),
    [
        # w* = 1 / (1 + d), 1 / (1 + p / (4 (1 - p))), above 1, and ½ log(2 / s - 1)
        (keep, DECAY, 0.5, decayed_loss, 1),
        (keep, DECAY, 1.0, decayed_loss, -1),
        (drop, RATE, 0.5, None, 1),
        (drop, RATE, 1.0, None, -1),
        (cut, LENGTH, 2.0, None, 1),
        (keep, SMOOTHING, 0.5, smoothed_loss, 1),
    ],
    ids=["decay", "less_decay", "dropout", "less_dropout", "cutout", "smoothing"],
)
def test_a_hyperparameter_goes_where_validation_wants_it(
    change, spec, wanted, loss, sign
):
    changes = {} if loss is None else {"train_loss": loss}
    predict = functools.partial(linear_predict, change)
    loop = tuner(
        scalar_model(predict, spec, wanted, **changes),
        inner_optimizer=optax.sgd(0.2),
        response_optimizer=optax.sgd(0.5),
        outer_optimizer=optax.adam(0.02),
        perturbation="group",
        groups=8,
        antithetic=True,
        warmup_steps=50,
    )
    keys = jax.random.split(jax.random.key(1), 60)
    run = jax.jit(lambda data: unroll(loop, loop.init(KEY), keys, data))
    state, infos = run(jnp.ones((32, 8, 8, 1)))
    start = loop.init(KEY).hparams["value"]
    assert sign * float(state.hparams["value"] - start) > 0.3
    specs = {"value": spec}
    chex.assert_trees_all_close(
        infos.hparams["value"][-1], constrain(specs, state.hparams)["value"]
    )
