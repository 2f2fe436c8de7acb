"""Rows of `metax.amalgamation`."""

from pathlib import Path

import jax.numpy as jnp
import optax

from metax.amalgamation import (
    PeriodRecord,
    Settings,
    amalgamate,
    choice,
    choice_weights,
    clip_by_weight_norm,
    curriculum,
    decide,
    distill,
    imitate,
    l2l,
    load,
    load_artifact,
    long_horizon_gate,
    perturb,
    pool,
    rnnprop,
    save_artifact,
    scale,
    teachers,
    validation_loss,
    with_warmup,
)
from tests.amalgamation import toys
from tests.inputs.base import DATA, TASK
from tests.inputs.cases import ABSENT, KEY, NAN, RAW, case, counts, numbers

STUDENT = toys.descent()
TEACHERS = {"sgd": optax.sgd(0.1), "momentum": optax.sgd(0.1, momentum=0.9)}
SHORT = {"truncation_length": 2, "unroll_length": 4}
LOOP = amalgamate(TASK, STUDENT, TEACHERS, warmup_steps=0, **SHORT)
IMITATION = imitate(TASK, STUDENT, optax.sgd(0.1), **SHORT)
PARAMS = {"w": jnp.ones(3)}
VALIDATE = validation_loss(TASK, STUDENT, truncation_length=2, num_trajectories=1)
GATE = long_horizon_gate(TASK, STUDENT, steps=2, runs=1, window=1)
THETA = STUDENT.init(KEY)
SMALL = {"hidden_size": 2, "num_layers": 1}
CARD = {"warmup_steps": 0, "warmup_learning_rate": 0.1}
NETWORK = (*counts("hidden_size", "num_layers"), *numbers("output_scale"))
WARMUP = (
    ("warmup_steps", -1),
    *numbers("warmup_learning_rate"),
)
RECORD = PeriodRecord(0, 0, 0, 1.0, 1.0, True)
RULES = numbers("learning_rate", "eps") + numbers("b1", "b2", bad=(NAN, -0.1, 1.0))

TABLE = {
    "amalgamation.amalgamate": case(
        amalgamate,
        {"task": TASK, "student": STUDENT, "teachers": TEACHERS, **SHORT},
        *counts("truncation_length", "unroll_length", "num_tasks"),
        ("truncation_length", 3),
        *WARMUP,
        *numbers("softmax_tau", "imitation_weight", "random_scale", "input_noise"),
        *numbers("es_std", "distance_eps", "huber_delta"),
        *(
            (word, "none of these")
            for word in (
                "reduce",
                "combine",
                "estimator",
                "remat",
                "warmup_coordinates",
                "distance_coordinates",
            )
        ),
        ("teachers", {"sgd": 0.1}),
        ("teachers", optax.sgd(0.1)),
        ("student", optax.sgd(0.1)),
        ("task", None),
        ("perturbation", 0.1),
        ("meta_optimizer", 0.1),
    ),
    "amalgamation.amalgamate:init": case(LOOP.init, {"key": KEY}, ("key", RAW)),
    "amalgamation.amalgamate:step": case(
        LOOP.step,
        {"state": None, "key": KEY, "data": DATA},
        ("key", RAW),
        runs=False,
    ),
    "amalgamation.imitate": case(
        imitate,
        {"task": TASK, "student": STUDENT, "teacher": optax.sgd(0.1), **SHORT},
        *counts("truncation_length", "unroll_length", "num_tasks"),
        ("truncation_length", 3),
        *numbers("random_scale"),
        ("teacher", 0.1),
        ("student", optax.sgd(0.1)),
        ("meta_optimizer", 0.1),
    ),
    "amalgamation.imitate:init": case(IMITATION.init, {"key": KEY}, ("key", RAW)),
    "amalgamation.imitate:step": case(
        IMITATION.step,
        {"state": None, "key": KEY, "data": DATA},
        ("key", RAW),
        runs=False,
    ),
    "amalgamation.choice": case(
        choice,
        {"pool": TEACHERS, **SMALL},
        ("pool", {}),
        ("pool", {"adam": optax.adam(0.1)}, "choice(pool=", "eps_root"),
        ("pool", {"rate": 0.1}),
        ("pool", None),
        *counts("hidden_size", "num_layers"),
        *numbers("time_scale"),
    ),
    "amalgamation.choice_weights": case(
        choice_weights,
        {
            "theta": choice(TEACHERS, **SMALL).init(KEY),
            "state": choice(TEACHERS, **SMALL)
            .rule(choice(TEACHERS, **SMALL).init(KEY))
            .init(PARAMS),
        },
        ("theta", {}),
        ("state", ()),
    ),
    "amalgamation.clip_by_weight_norm": case(
        clip_by_weight_norm, {}, *numbers("clipping", "eps", bad=(NAN, -1.0, 0.0))
    ),
    "amalgamation.clip_by_weight_norm:update": case(
        clip_by_weight_norm().update,
        {"updates": PARAMS, "state": optax.EmptyState(), "params": PARAMS},
        ("params", None, "clip_by_weight_norm", "params"),
        ("params", {"v": jnp.ones(3)}, "clip_by_weight_norm(...).update(updates=...)"),
        ("updates", {"w": jnp.ones(2)}),
    ),
    "amalgamation.curriculum": case(
        curriculum,
        {
            "loop": LOOP,
            "validate": VALIDATE,
            "state": None,
            "key": KEY,
            "data": DATA,
        },
        ("key", RAW),
        *counts("truncation_length", "trajectories", "min_periods", "max_periods"),
        *counts("patience", "max_repeats", bad=(-1,)),
        *numbers("repeat_threshold"),
        ("stages", ()),
        ("stage_reference", "none"),
        runs=False,
    ),
    "amalgamation.decide": case(
        decide,
        {"records": (RECORD,), "settings": Settings(1, 1, 1, 1, 0.5, 1, "train")},
        ("records", ()),
    ),
    "amalgamation.rnnprop": case(
        rnnprop,
        SMALL,
        *NETWORK,
        *numbers("eps"),
        *numbers("b1", "b2", bad=(NAN, -0.1, 1.0)),
        ("bias_correction", "none"),
    ),
    "amalgamation.l2l": case(
        l2l, SMALL, *NETWORK, *numbers("p"), ("preprocess", "nonsense")
    ),
    "amalgamation.scale": case(
        scale,
        {"param_size": 2, "tensor_size": 2, "global_size": 2, "num_timescales": 1},
        *counts("param_size", "tensor_size", "global_size", "num_timescales"),
        *numbers("initial_learning_rate", "learning_rate_offset", "eps"),
    ),
    "amalgamation.load": case(
        load, {"name": "amalgamated-small"}, ("name", "x"), ("name", 3)
    ),
    "amalgamation.load_artifact": case(
        load_artifact,
        {
            "path": Path(load.__code__.co_filename).with_name("pretrained")
            / "amalgamated-small"
        },
        ("path", ABSENT, "trained.json"),
    ),
    "amalgamation.save_artifact": case(
        save_artifact,
        {
            "path": ABSENT,
            "theta": {},
            "policy": "rnnprop",
            "policy_options": SMALL,
            "metadata": CARD,
        },
        ("policy", "none"),
        ("policy_options", {"width": 3}, "save_artifact(policy"),
        ("metadata", {}),
        ("metadata", {**CARD, "policy": "x"}),
        ("theta", {}, "trained.safetensors", "leaf"),
        runs=False,
    ),
    "amalgamation.long_horizon_gate": case(
        long_horizon_gate,
        {"task": TASK, "student": STUDENT, "steps": 2, "runs": 1, "window": 1},
        *counts("steps", "runs", "window"),
        *WARMUP,
        *numbers("max_rise"),
        ("window", 3),
        ("student", optax.sgd(0.1)),
    ),
    "amalgamation.long_horizon_gate:call": case(
        GATE,
        {"theta": THETA, "key": KEY, "data": DATA},
        ("key", RAW, "long_horizon_gate(...)(key="),
        runs=False,
    ),
    "amalgamation.validation_loss": case(
        validation_loss,
        {"task": TASK, "student": STUDENT},
        *counts("truncation_length", "num_trajectories"),
        *WARMUP,
        *numbers("random_scale"),
        ("student", optax.sgd(0.1)),
    ),
    "amalgamation.validation_loss:call": case(
        VALIDATE,
        {"theta": THETA, "key": KEY, "data": DATA, "unroll_length": 2},
        ("key", RAW, "validation_loss(...)(key="),
        runs=False,
    ),
    "amalgamation.with_warmup": case(
        with_warmup,
        {"rule": optax.sgd(0.1), "steps": 2},
        ("rule", 0.1),
        ("steps", -1),
        *numbers("learning_rate"),
    ),
    "amalgamation.distill.choice_loss": case(
        distill.choice_loss,
        {"distances": jnp.ones((2, 1))},
        ("distances", jnp.ones(())),
        ("distances", jnp.ones((0, 1))),
    ),
    "amalgamation.distill.log_distance": case(
        distill.log_distance,
        {"params": PARAMS, "teacher_params": {"w": jnp.zeros(3)}},
        *numbers("eps", "huber_delta"),
        ("params", {}),
        ("params", {"w": jnp.ones(2)}),
        ("params", {"v": jnp.ones(3)}),
        ("teacher_params", {}),
    ),
    "amalgamation.distill.mean_loss": case(
        distill.mean_loss,
        {"distances": jnp.ones((2, 3))},
        ("distances", jnp.ones(())),
        ("distances", jnp.ones((0, 3))),
    ),
    "amalgamation.distill.minmax_loss": case(
        distill.minmax_loss,
        {"distances": jnp.ones((2, 3))},
        ("distances", jnp.ones(())),
        ("distances", jnp.ones((0, 3))),
    ),
    "amalgamation.distill.softmax_loss": case(
        distill.softmax_loss,
        {"distances": jnp.ones((2, 3))},
        ("distances", jnp.ones(())),
        ("distances", jnp.ones((0, 3))),
        *numbers("tau"),
    ),
    "amalgamation.distill.meta_loss": case(
        distill.meta_loss,
        {"losses": jnp.ones(3), "start_losses": jnp.ones(3)},
        *numbers("eps"),
        ("losses", jnp.ones(())),
        ("start_losses", jnp.ones(5)),
        ("losses", jnp.ones(0)),
    ),
    "amalgamation.perturb.adversarial": case(
        perturb.adversarial,
        {},
        *numbers("step_size"),
        ("steps", -1),
        ("norm", "none"),
        ("radius", 0.1),
    ),
    "amalgamation.perturb.gaussian": case(
        perturb.gaussian, {}, *numbers("std"), ("every", "none")
    ),
    "amalgamation.perturb.gaussian:apply": case(
        lambda key: perturb.gaussian().apply(PARAMS, key, None),
        {"key": KEY},
        ("key", RAW),
    ),
    "amalgamation.teachers.addsign": case(
        teachers.addsign, {"learning_rate": 0.1}, *RULES
    ),
    "amalgamation.teachers.powersign": case(
        teachers.powersign, {"learning_rate": 0.1}, *RULES
    ),
    "amalgamation.teachers.adam_constant_correction": case(
        teachers.adam_constant_correction, {"learning_rate": 0.1}, *RULES
    ),
    "amalgamation.teachers.momentum_ema": case(
        teachers.momentum_ema,
        {"learning_rate": 0.1},
        *numbers("learning_rate"),
        *numbers("decay", bad=(NAN, -0.1, 1.0)),
    ),
    "amalgamation.pool": case(
        pool, {"name": "small"}, ("name", "none"), ("setting", "none")
    ),
}
