"""The checker accepts right rules and names the fault of wrong ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.hypergradient import check_hypergradient, hypergradient_descent, sgd_hd

BASES = {
    "sgd": optax.identity(),
    "momentum": optax.trace(0.9),
    "nesterov": optax.trace(0.9, nesterov=True),
    "adam": optax.scale_by_adam(),
    "adamw": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    "rmsprop": optax.scale_by_rms(),
    "lion": optax.scale_by_lion(),
}


def network(dtype="float64"):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(keys[0], (3, 4), dtype),
        "v": jax.random.normal(keys[1], (4,), dtype),
    }
    inputs = jax.random.normal(keys[2], (8, 3), dtype)
    batches = [(inputs, jnp.sin(inputs[:, 0])), (2 * inputs, jnp.cos(inputs[:, 1]))]

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    return loss, params, batches


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scope", ["global", "leaf", "element"])
def test_stored_hypergradient_equals_autodiff(base, scope):
    loss, params, batches = network()
    rule = hypergradient_descent(BASES[base], 0.01, 1e-3, scope=scope)
    errors = check_hypergradient(
        loss, params, rule, batches=batches, num_steps=6, tolerance=1e-12
    )
    assert set(errors) == {"['w']", "['v']", "total"}


@pytest.mark.parametrize("rule", ["multiplicative", "normalized"])
def test_raw_hypergradient_is_stored_whatever_the_rule(rule):
    loss, params, batches = network()
    rule = hypergradient_descent(optax.scale_by_adam(), 0.01, 0.02, rule=rule)
    check_hypergradient(loss, params, rule, batches=batches, tolerance=1e-12)


def test_float32_passes_at_its_own_tolerance():
    loss, params, batches = network("float32")
    errors = check_hypergradient(loss, params, sgd_hd(0.01, 1e-3), batches=batches)
    assert 0 < errors["total"] < 1e-4


def test_applied_rate_of_a_transition_is_used():
    loss, params, batches = network()
    rule = sgd_hd(0.01, 1e-3, transition=(lambda count: 1 / (count + 1) ** 2, 0.3))
    check_hypergradient(loss, params, rule, batches=batches, tolerance=1e-12)


def test_coupled_l2_in_the_chain_needs_the_data_gradient():
    loss, params, batches = network()
    chain = optax.chain(optax.add_decayed_weights(0.1), sgd_hd(0.01, 1e-3))

    def full(params, batch):
        return loss(params, batch) + 0.05 * optax.tree.norm(params, squared=True)

    data_gradient = jax.grad(loss)
    errors = check_hypergradient(
        full, params, chain, batches=batches, gradient=data_gradient, tolerance=1e-12
    )
    assert errors["total"] <= 1e-12
    with pytest.raises(AssertionError, match="total"):
        check_hypergradient(full, params, chain, batches=batches)


def test_masked_leaves_are_left_out():
    loss, params, batches = network()
    rule = optax.masked(sgd_hd(0.01, 1e-3), {"w": True, "v": False})
    freeze = optax.masked(optax.set_to_zero(), {"w": False, "v": True})
    errors = check_hypergradient(
        loss, params, optax.chain(rule, freeze), batches=batches, tolerance=1e-12
    )
    assert set(errors) == {"['w']", "total"}


def test_scale_after_the_rule_is_blamed_on_its_leaf():
    loss, params, batches = network()
    halve = optax.masked(optax.scale(0.5), {"w": False, "v": True})
    chain = optax.chain(sgd_hd(0.01, 1e-3), halve)
    with pytest.raises(
        AssertionError, match=r"step 2, leaf '\['v'\]'.*expected.*found"
    ):
        check_hypergradient(loss, params, chain, batches=batches)
    errors = check_hypergradient(loss, params, chain, batches=batches, tolerance=10)
    assert errors["['v']"] > 0.1
    assert errors["['w']"] <= 1e-12


def broken(change):
    """`sgd_hd` with its stored state changed after each update."""
    rule = sgd_hd(0.01, 0.0)

    def update(updates, state, params=None, **extra_args):
        emitted, new = rule.update(updates, state, params, **extra_args)
        return emitted, change(new, updates)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def test_direction_stored_wrongly_is_blamed_on_its_leaf():
    loss, params, batches = network()
    rule = broken(
        lambda s, g: s._replace(direction=s.direction | {"w": 2 * s.direction["w"]})
    )
    with pytest.raises(AssertionError, match=r"leaf '\['w'\]'"):
        check_hypergradient(loss, params, rule, batches=batches)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("current direction", lambda s, g: -optax.tree.vdot(g, g)),
        ("opposite sign", lambda s, g: -s.hypergradient),
        ("missing psum", lambda s, g: s.hypergradient / 2),
    ],
)
def test_wrong_reduction_is_blamed_on_the_total(fault, change):
    loss, params, batches = network()
    rule = broken(lambda s, g: s._replace(hypergradient=change(s, g)))
    with pytest.raises(AssertionError, match="though every leaf agrees"):
        check_hypergradient(loss, params, rule, batches=batches)


def test_complex_parameters_pass():
    params = jnp.array([1.0 + 2.0j, -0.5 + 0.3j])
    target = jnp.array([0.2 - 0.1j, 0.4j])
    loss = lambda z: jnp.sum(jnp.abs(z - target) ** 2 * jnp.array([1.0, 3.0]))
    errors = check_hypergradient(loss, params, sgd_hd(0.01, 1e-3), tolerance=1e-12)
    assert np.isfinite(errors["total"])


def test_refuses_what_it_cannot_check():
    loss, params, batches = network()
    with pytest.raises(ValueError, match="must be at least 2.*got 1"):
        check_hypergradient(loss, params, sgd_hd(0.1), batches=batches, num_steps=1)
    with pytest.raises(ValueError, match="one outermost.*got 0"):
        check_hypergradient(loss, params, optax.sgd(0.1), batches=batches)
    with pytest.raises(ValueError, match="learning rate of 0"):
        check_hypergradient(loss, params, sgd_hd(0.0, 0.0), batches=batches)
