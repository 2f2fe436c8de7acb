"""Rows of `metax.hypergradient` and `metax.implicit`."""

import jax.numpy as jnp
import optax

from metax.hypergradient import (
    adam_hd,
    adamw_hd,
    check_hypergradient,
    hdm_hb,
    hypergradient_descent,
    sgd_hd,
)
from metax.implicit import implicit_hypergradient, unrolled_hypergradient
from tests.inputs.cases import KEY, NAN, RAW, case, counts, numbers
from tests.inputs.stn import BATCH, PROBLEM

PARAMS = {"w": jnp.ones(3)}
RULE = sgd_hd(0.1, 0.01)
STATE = RULE.init(PARAMS)
HDM = hdm_hb(1.0)
HDM_STATE = HDM.init(PARAMS)
SQUARE = lambda params: jnp.sum(params["w"] ** 2)
RATES = (
    *numbers("learning_rate", "hyper_learning_rate"),
    ("learning_rate", jnp.ones(2)),
    ("learning_rate", "0.1"),
    ("learning_rate", None),
)
WRONG_PARAMS = (
    ("params", None),
    ("params", jnp.ones(3)),
    ("params", {"w": jnp.ones(2)}),
    ("params", {"weights": jnp.ones(3)}),
    ("params", {"w": jnp.ones(3), "b": jnp.ones(())}),
)
MOMENTS = numbers("b1", "b2", bad=(NAN, -0.1, 1.0))
BILEVEL = {"problem": PROBLEM, "params": {"w": jnp.ones(3)}, "hparams": {"decay": 0.1}}

TABLE = {
    "hypergradient.hypergradient_descent": case(
        hypergradient_descent,
        {"base": optax.sgd(1.0), "learning_rate": 0.1, "hyper_learning_rate": 0.01},
        *RATES,
        ("base", None),
        ("rule", "none"),
        ("scope", "none"),
        ("bounds", (1.0, 0.0)),
        ("bounds", 3),
        ("max_relative_change", 0.0),
        ("transition", 1),
        ("hyper_optimizer", 3),
        ("direction_dtype", "complex9"),
    ),
    "hypergradient.hypergradient_descent:update": case(
        RULE.update,
        {"updates": PARAMS, "state": STATE, "params": PARAMS},
        ("updates", {"v": jnp.ones(3)}),
        ("updates", {"w": jnp.ones(2)}),
        ("updates", None),
    ),
    "hypergradient.sgd_hd": case(
        sgd_hd,
        {"learning_rate": 0.1, "hyper_learning_rate": 0.01, "momentum": 0.5},
        *RATES,
        *numbers("momentum", bad=(NAN, -1.0, 1.0)),
        named=("hypergradient_descent",),
    ),
    "hypergradient.adam_hd": case(
        adam_hd,
        {"learning_rate": 0.1},
        *RATES,
        *MOMENTS,
        *numbers("eps", "eps_root"),
        named=("hypergradient_descent",),
    ),
    "hypergradient.adamw_hd": case(
        adamw_hd,
        {"learning_rate": 0.1},
        *RATES,
        *MOMENTS,
        *numbers("eps", "eps_root", "weight_decay"),
        named=("hypergradient_descent",),
    ),
    "hypergradient.hdm_hb": case(
        hdm_hb,
        {"smoothness": 1.0},
        *numbers("smoothness", "hyper_learning_rate", "momentum_learning_rate"),
        *numbers("momentum", "max_momentum", "max_scaling", "epsilon"),
        ("smoothness", None),
        ("curvature_window", 0),
        ("scaling", "none"),
    ),
    "hypergradient.hdm_hb:init": case(
        HDM.init, {"params": PARAMS}, ("params", {"w": jnp.arange(3)}), ("params", 3)
    ),
    "hypergradient.hdm_hb:update": case(
        HDM.update,
        {
            "updates": PARAMS,
            "state": HDM_STATE,
            "params": PARAMS,
            "value": 1.0,
            "grad": PARAMS,
            "value_fn": SQUARE,
        },
        ("params", None),
        ("value", None),
        ("value_fn", None),
        ("grad", None),
        runs=False,
    ),
    "hypergradient.check_hypergradient": case(
        check_hypergradient,
        {"loss": SQUARE, "params": PARAMS, "rule": RULE, "num_steps": 2},
        ("num_steps", 0),
        ("num_steps", 1),
        ("rule", optax.sgd(0.1)),
        ("tolerance", NAN),
        ("tolerance", -1.0),
        ("batches", {"x": jnp.ones(1)}),
    ),
    "implicit.implicit_hypergradient": case(
        implicit_hypergradient,
        {**BILEVEL, "train_batch": BATCH, "valid_batch": BATCH, "iterations": 2},
        ("hparams", {}),
        ("hparams", {"other": 0.1}),
        ("hparams", {"decay": jnp.ones(2)}),
        *counts("iterations"),
        *numbers("damping"),
        ("step_size", -1.0),
        ("solver", "none"),
        ("curvature", "none"),
        ("key", RAW),
        ("params", {"w": jnp.arange(3)}),
        *WRONG_PARAMS,
        ("hparams", None),
        ("train_batch", {"x": jnp.ones((0, 3)), "y": jnp.ones(0)}),
        ("train_batch", {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}),
        ("valid_batch", {"x": jnp.ones((0, 3)), "y": jnp.ones(0)}),
        ("valid_batch", {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}),
        runs=False,
    ),
    "implicit.unrolled_hypergradient": case(
        unrolled_hypergradient,
        {
            **BILEVEL,
            "data": BATCH,
            "key": KEY,
            "inner_optimizer": optax.sgd(0.1),
            "steps": 2,
        },
        *counts("steps", "truncation"),
        ("truncation", 3),
        ("key", RAW),
        ("hparams", {"other": 0.1}),
        ("hparams", {"decay": jnp.ones(2)}),
        *WRONG_PARAMS,
        ("hparams", None),
        ("inner_optimizer", 0.1),
    ),
}
