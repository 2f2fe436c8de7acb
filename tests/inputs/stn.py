"""Rows of `metax.stn`."""

import jax.numpy as jnp
import optax

from metax import BilevelProblem, Hyperparameter, squared_norm
from metax.stn import (
    best_response,
    centered_stn,
    check_response,
    constrain,
    delta_stn,
    entropy,
    natural_hparams,
    replace_hparams,
    response_jacobian,
    silent_hparams,
    stn,
    unconstrain,
)
from tests.inputs.cases import KEY, NAN, RAW, case, counts, numbers

SPECS = {"decay": Hyperparameter(0.1, 1e-3, 10.0, "log")}
PROBLEM = BilevelProblem(
    init=lambda key: {"w": jnp.full(3, 0.1)},
    predict=lambda params, batch, hparams, key: batch["x"] @ params["w"],
    train_loss=lambda outputs, batch, hparams, params: (
        (outputs - batch["y"]) ** 2 + hparams["decay"] * squared_norm(params)
    ),
    valid_loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
    sample_train=lambda data, key: data,
    sample_valid=lambda data, key: data,
    hparams=SPECS,
)
BATCH = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}
EMPTY = {"x": jnp.ones((0, 3)), "y": jnp.ones(0)}
UNEVEN = {"x": jnp.ones((4, 3)), "y": jnp.ones(3)}
OPTIMIZERS = {
    "inner_optimizer": optax.sgd(0.1),
    "response_optimizer": optax.sgd(0.1),
    "outer_optimizer": optax.sgd(0.1),
}
LOOP = delta_stn(PROBLEM, **OPTIMIZERS, perturbation="batch")
STATE = LOOP.init(KEY)
RESPONSE = best_response(1)
FN = lambda params: params["w"]
PHI = RESPONSE.init(KEY, STATE.params)
BUILD = (
    ("problem", PROBLEM._replace(hparams={})),
    ("problem", None),
    ("problem", PROBLEM._replace(hparams={"decay": Hyperparameter(NAN)})),
    ("inner_optimizer", 0.1),
    ("response_optimizer", None),
    ("outer_optimizer", optax.sgd),
    *counts("train_steps", "valid_steps", "groups"),
    ("warmup_steps", -1),
    ("perturbation", "none"),
    ("valid_forward", "none"),
    ("scale_bounds", (1.0, 0.1)),
    *numbers("entropy_weight", "logit_bound"),
    ("response", 3),
)
STEPS = (("key", RAW), ("batch", EMPTY), ("batch", UNEVEN), ("batch", {}))

TABLE = {
    "stn.delta_stn": case(delta_stn, {"problem": PROBLEM, **OPTIMIZERS}, *BUILD),
    "stn.centered_stn": case(
        centered_stn, {"problem": PROBLEM, **OPTIMIZERS}, *BUILD, named=("delta_stn",)
    ),
    "stn.stn": case(
        stn, {"problem": PROBLEM, **OPTIMIZERS}, *BUILD, named=("delta_stn",)
    ),
    "stn.delta_stn:init": case(LOOP.init, {"key": KEY}, ("key", RAW), ("key", 0)),
    "stn.delta_stn:step": case(
        LOOP.step, {"state": STATE, "key": KEY, "data": BATCH}, ("key", RAW), runs=False
    ),
    "stn.delta_stn:train_step": case(
        LOOP.train_step,
        {"state": STATE, "batch": BATCH, "key": KEY},
        *STEPS,
        runs=False,
    ),
    "stn.delta_stn:valid_step": case(
        LOOP.valid_step,
        {"state": STATE, "batch": BATCH, "key": KEY},
        *STEPS,
        runs=False,
    ),
    "stn.best_response": case(
        best_response,
        {"num_hparams": 1},
        *counts("num_hparams"),
        ("structure", "nonsense"),
        ("structure", 0),
        ("route", "none"),
        ("select", 3),
    ),
    "stn.best_response:init": case(
        RESPONSE.init, {"params": STATE.params, "key": KEY}, ("key", RAW)
    ),
    "stn.best_response:apply": case(
        RESPONSE.apply,
        {"fn": FN, "params": STATE.params, "phi": PHI, "eps": jnp.ones(1)},
        ("eps", jnp.ones(2)),
        ("eps", jnp.ones(())),
    ),
    "stn.check_response": case(
        check_response,
        {
            "fn": FN,
            "params": STATE.params,
            "phi": PHI,
            "key": KEY,
            "num_hparams": 1,
        },
        ("key", RAW),
        *counts("num_hparams"),
        runs=False,
    ),
    "stn.constrain": case(
        constrain,
        {"specs": SPECS, "unconstrained": {"decay": 0.0}},
        ("unconstrained", {"rate": 0.0}),
        ("unconstrained", None),
    ),
    "stn.unconstrain": case(
        unconstrain,
        {"specs": SPECS, "natural": {"decay": 0.1}},
        ("natural", {"rate": 0.1}),
        ("natural", {"decay": -1.0}),
        ("natural", {"decay": NAN}),
    ),
    "stn.entropy": case(entropy, {"scale": {"a": 1.0}}, *numbers("scale")),
    "stn.natural_hparams": case(natural_hparams, {"state": STATE}, ("state", {})),
    "stn.replace_hparams": case(
        replace_hparams,
        {"state": STATE, "natural": {"decay": 0.2}},
        ("natural", {"rate": 0.2}),
        ("natural", {"decay": 20.0}),
        ("natural", {"decay": NAN}),
        ("state", {}),
        named=("unconstrain",),
    ),
    "stn.response_jacobian": case(response_jacobian, {"state": STATE}, ("state", {})),
    "stn.silent_hparams": case(
        silent_hparams, {"infos": None}, ("infos", {}), runs=False
    ),
}
