"""Perturbations: who shares a draw, which shapes a problem sees, groups."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Hyperparameter, squared_norm
from metax.stn import best_response
from metax.stn.hparams import make_space
from metax.stn.perturbation import Perturbation, draw
from tests.stn.test_kernels import DATA, DECAY, KEY, PROBLEM, started, train_loss, tuner


def vector_problem(seen=None):
    """Two decays under one name, and a shared gain."""

    def predict(params, batch, hparams, key):
        if seen is not None:
            seen.append({name: x.shape for name, x in hparams.items()})
        return hparams["gain"] * nn.Dense(1, param_dtype=float).apply(
            {"params": params["params"]}, batch["x"]
        ).squeeze(-1)

    def loss(outputs, batch, hparams, params):
        return (outputs - batch["y"]) ** 2 + hparams["decay"] @ jnp.ones(
            2
        ) * squared_norm(params)

    return PROBLEM._replace(
        init=lambda key: nn.Dense(1, param_dtype=float).init(key, DATA["x"]),
        predict=predict,
        train_loss=loss,
        hparams={
            "decay": DECAY._replace(init=jnp.array([0.1, 0.2])),
            "gain": Hyperparameter(1.0, 0.0, 3.0, shared=True),
        },
    )


@pytest.mark.parametrize(
    ("perturbation", "size"), [("example", 8), ("group", 4), ("batch", 8)]
)
def test_hyperparameters_come_with_a_batch_axis_unless_shared(perturbation, size):
    seen = []
    loop = tuner(
        vector_problem(seen),
        perturbation=perturbation,
        groups=2,
        scale_optimizer=optax.sgd(0.1),
    )
    jax.eval_shape(lambda d: loop.step(loop.init(KEY), KEY, d), DATA)
    shapes = {(shape["decay"], shape["gain"]) for shape in seen}
    assert shapes == {((8, 2), ()), ((size, 2), ())}


def test_draws_are_shared_and_paired_as_asked():
    space = make_space(vector_problem().hparams, "test", 5.0)
    parts = {"groups": 6, "space": space, "response": best_response(3)}
    of = lambda by, anti: Perturbation(by=by, antithetic=anti, **parts)
    for by, rows in (("example", 8), ("group", 6)):
        z = draw(of(by, True), KEY, 8, jnp.float64)
        assert z.shape == (rows, 3)
        free = z[:, :2]  # "gain" comes last
        np.testing.assert_array_equal(free[: rows // 2], -free[rows // 2 :])
        assert len(set(free[:, 0].tolist())) == rows
    z = draw(of("example", False), KEY, 8, jnp.float64)
    assert len(set(z[:, 2].tolist())) == 1
    assert len(set(z[:, 1].tolist())) == 8
    assert draw(of("batch", False), KEY, 8, jnp.float64).shape == (3,)


def test_groups_of_one_example_are_perturbations_of_examples():
    problem = vector_problem()._replace(hparams=vector_problem().hparams)
    problem = problem._replace(
        hparams={
            name: spec._replace(shared=False) for name, spec in problem.hparams.items()
        }
    )
    scale = optax.sgd(0.1)
    loops = [
        tuner(problem, perturbation=by, groups=8, scale_optimizer=scale)
        for by in ("group", "example")
    ]

    def run(data):
        state = started(loops[0])
        return [
            (loop.train_step(state, data, KEY), loop.valid_step(state, data, KEY))
            for loop in loops
        ]

    chex.assert_trees_all_close(*jax.jit(run)(DATA), rtol=1e-9, atol=1e-12)


def test_outputs_that_do_not_grow_with_the_batch_are_averaged_over_groups():
    def predict(params, batch, hparams, key):
        y = batch["x"] @ params["w"]
        return {"y": y, "mean": jnp.mean(y), "rows": batch["x"].mean(0)}

    problem = PROBLEM._replace(
        predict=predict,
        train_loss=lambda outputs, *rest: train_loss(outputs["y"], *rest),
        valid_loss=lambda outputs, batch: (
            jnp.mean(outputs["y"] - outputs["mean"]) + jnp.sum(outputs["rows"])
        ),
    )
    loop = tuner(
        problem, perturbation="group", groups=2, scale_optimizer=optax.sgd(0.1)
    )
    run = lambda d: loop.step(loop.init(KEY), KEY, d)[1].valid_loss
    np.testing.assert_allclose(jax.jit(run)(DATA), DATA["x"].sum() / 8, atol=1e-12)
