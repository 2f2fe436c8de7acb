"""What coordinatewise networks cost: counted in their programs, not timed."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from metax.amalgamation import rnnprop
from metax.amalgamation.coordinates import flatten, lstm, lstm_init, unflatten

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array(6.0), "c": jnp.zeros((0, 2))}


def primitives(function, *args):
    """Names of the primitives of a program, those of its inner programs included."""
    names = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            names.append(equation.primitive.name)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return names


def test_cutting_undoes_joining():
    vector = flatten(TREE, jnp.float32)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 6]
    again = unflatten(vector, TREE)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, TREE)
    assert flatten(again, jnp.float32).tolist() == vector.tolist()
    assert unflatten(jnp.zeros(0), {}) == {}
    assert unflatten(vector, TREE, jnp.float16)["b"].dtype == jnp.float16


def test_cutting_is_differentiated_by_joining_and_not_by_padding():
    pull = lambda tree: jax.vjp(lambda v: unflatten(v, TREE), jnp.zeros(7))[1](tree)[0]
    tree = jax.tree.map(lambda x: x + 1, TREE)
    assert pull(tree).tolist() == [1, 2, 3, 4, 5, 6, 7]
    names = primitives(pull, tree)
    assert names.count("concatenate") == 1
    assert "pad" not in names


def test_a_layer_is_one_product():
    student = rnnprop(3, 2)
    theta, params = student.init(jax.random.key(0)), jnp.zeros(5)
    state = student.rule(theta).init(params)
    update = lambda g: student.rule(theta).update(g, state, params)
    # two layers and the output
    assert primitives(update, params).count("dot_general") == 3


def test_a_layer_is_its_formula():
    theta = lstm_init(jax.random.key(0), 2, 3)
    theta["b"] = jax.random.normal(jax.random.key(1), (12,))
    x, h, c = (jax.random.normal(jax.random.key(n), (4, n)) for n in (2, 3, 3))
    found = lstm(theta, x, (h, c + 1))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    gates = x @ theta["wx"] + h @ theta["wh"] + theta["b"]
    i, f, g, o = np.split(np.asarray(gates), 4, axis=1)
    cell = sigmoid(f) * (c + 1) + sigmoid(i) * np.tanh(g)
    np.testing.assert_allclose(found[1], cell, rtol=1e-12)
    np.testing.assert_allclose(found[0], sigmoid(o) * np.tanh(cell), rtol=1e-12)
