"""Hypergradient descent against reference trajectories of an independent program.

Eighteen runs of 50 float64 steps on one quadratic, written in NumPy from the paper.
Tolerances: a change of 1e-12 in the start stays below 1.5e-12 after 50 steps, so 1e-12
means the same arithmetic; in float32 the authors' own code lies within 5.5e-7.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.hypergradient import adam_hd, hypergradient_descent, sgd_hd

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}
BASES = {
    "sgd": optax.identity,
    "sgdm": lambda: optax.trace(0.9),
    "sgdn": lambda: optax.trace(0.9, nesterov=True),
    "adam": optax.scale_by_adam,
}
RUNS = [
    "sgd", "sgdn", "adam", "sgd_hd_add", "sgd_hd_mul", "sgdm_hd_add", "sgdn_hd_add",
    "sgdn_hd_mul", "adam_hd_add", "adam_hd_mul", "sgd_hdm", "sgd_hd_add_transition",
    "sgd_hd_order2", "sgd_hd_add_leaf", "sgd_hd_mul_leaf", "adam_hd_add_leaf",
    "adam_hd_add_element",
]  # fmt: skip


@pytest.fixture(scope="module")
def golden(golden_path):
    return json.loads(golden_path.read_text())


def rule_of(name, config):
    options = {"scope": config.get("scope", "global")}
    rule = config.get("rule", "additive")
    options["rule"] = {"hdm": "normalized"}.get(rule, rule)
    if "transition" in config:
        final = config["transition"]["alpha_inf"]
        options["transition"] = (lambda count: 1.0 / (count + 1) ** 2, final)
    base, alpha = BASES[name.split("_")[0]](), config["alpha0"]
    beta = 0.0 if config.get("constant") else config["beta"]
    if "order2" in config:
        options["hyper_optimizer"] = hypergradient_descent(
            optax.identity(), beta, config["order2"]
        )
        beta = None
    return hypergradient_descent(base, alpha, beta, **options)


def quadratic(meta, dtype):
    hessian, centre = (jnp.asarray(meta["quadratic"][k], dtype) for k in ("H", "c"))
    x0 = np.asarray(meta["quadratic"]["x0"])
    start = {
        "a": jnp.asarray(x0[:4], dtype),
        "b": jnp.asarray(x0[4:].reshape(2, 3), dtype),
    }

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"].ravel()]) - centre
        return 0.5 * x @ hessian @ x

    return loss, start


def run(rule, loss, start, mode, steps=50):
    def step(carry, _):
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        beta = getattr(state.hyper_state, "learning_rate", ())
        record = {
            "params": params,
            "lr": state.learning_rate,
            "h": state.hypergradient,
            "beta": beta,
            "used_lr": state.applied_learning_rate,
        }
        return (params, state), record

    carry = (start, rule.init(start))
    if mode == "scan":
        return jax.lax.scan(step, carry, length=steps)[1]
    step = jax.jit(step) if mode == "jit" else step
    records = []
    for _ in range(steps):
        carry, record = step(carry, None)
        records.append(record)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)


def compare(record, reference, config, tolerance):
    close = lambda got, want: np.testing.assert_allclose(
        np.asarray(got).reshape(50, -1), np.asarray(want).reshape(50, -1), rtol=0,
        atol=tolerance,
    )  # fmt: skip
    for leaf, want in reference["params"].items():
        close(record["params"][leaf], want)
    if config.get("scope", "global") == "global":
        close(record["lr"], reference["lr"])
    else:
        for leaf in ("a", "b"):
            close(record["lr"][leaf], [lr[leaf] for lr in reference["lr"]])
    if not config.get("constant"):
        total = sum(
            np.asarray(h).reshape(50, -1).sum(1) for h in jax.tree.leaves(record["h"])
        )
        close(total, reference["h"])
    for extra in ("beta", "used_lr"):
        if extra in reference:
            close(record[extra], reference[extra])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mode", ["eager", "jit", "scan"])
@pytest.mark.parametrize("name", RUNS)
def test_trajectory_equals_reference(golden, name, mode, dtype):
    reference = golden["runs"]["quadratic"][name]
    config = reference["config"]
    loss, start = quadratic(golden["meta"], dtype)
    record = run(rule_of(name, config), loss, start, mode)
    compare(record, reference, config, TOLERANCE[dtype])


def test_every_reference_run_is_compared(golden):
    # The authors' sequential Adam steps tensor by tensor: not this method's rule.
    assert set(golden["runs"]["quadratic"]) - set(RUNS) == {"adam_hd_add_authors"}


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("sgd_hd_add", lambda a, b: sgd_hd(a, b)),
        ("sgdm_hd_add", lambda a, b: sgd_hd(a, b, momentum=0.9)),
        ("sgdn_hd_add", lambda a, b: sgd_hd(a, b, momentum=0.9, nesterov=True)),
        ("adam_hd_add", lambda a, b: adam_hd(a, b)),
        ("sgd_hd_add", lambda a, b: sgd_hd(a, hyper_optimizer=optax.sgd(b))),
        ("adam_hd_mul", lambda a, b: adam_hd(a, b, rule="multiplicative")),
    ],
)
def test_ready_made_optimizer_equals_reference(golden, name, build):
    reference = golden["runs"]["quadratic"][name]
    config = reference["config"]
    loss, start = quadratic(golden["meta"], "float64")
    record = run(build(config["alpha0"], config["beta"]), loss, start, "scan")
    compare(record, reference, config, TOLERANCE["float64"])
