"""The three tiers against a reference tensor by tensor, and their contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.amalgamation.hierarchical import scale

SMALL = {"param_size": 4, "tensor_size": 3, "global_size": 2, "num_timescales": 3}


@functools.cache
def shapes():
    return jax.eval_shape(scale(**SMALL).init, jax.random.key(0))


def weights(seed=0):
    """Weights with no zeros: those that `init` makes move nothing."""
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.array(draws.normal(0, 0.4, w.shape)), shapes())


def rule(theta=None):
    return scale(**SMALL).rule(weights() if theta is None else theta)


def tree():
    return {"b": np.array([0.3, -0.7]), "s": np.array(1.1),
            "w": np.array([[1.0, -2.0], [0.5, 1.5], [0.1, 0.0]])}  # fmt: skip


def gradients(num=5):
    """The first of one coordinate is zero."""
    waves = np.cos(np.arange(num) * 0.7)
    grads = {name: np.stack([p * w for w in waves]) for name, p in tree().items()}
    grads["b"][0, 0] = 0
    return jax.tree.map(jnp.array, grads)


def run(transformation, grads, **extra):
    """Updates of every step, and the last state."""

    @jax.jit
    def walk(grads, extra):
        state = transformation.init(jax.tree.map(lambda g: g[0], grads))
        step = lambda state, g: transformation.update(g, state, **extra)[::-1]
        return jax.lax.scan(step, state, grads)

    state, updates = walk(grads, extra)
    return updates, state


@functools.cache
def plain_run():
    return run(rule(), gradients())


@functools.cache
def fresh():
    """The weights as the published sizes begin."""
    return jax.jit(scale().init)(jax.random.key(0))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance=1e-12):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-14)
    jax.tree.map(close, a, b)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(w, x, h):
    size = len(h)
    a, b = x @ w["wx"] + w["bx"], h @ w["wh"] + w["bh"]
    z, r = sigmoid(a[:size] + b[:size]), sigmoid((a + b)[size : 2 * size])
    n = np.tanh(a[2 * size :] + r * b[2 * size :])
    return z * h + (1 - z) * n


def reference(theta, grads, eps=1e-10, offset=1e-2):
    """The equations, one parameter of one tensor after the other."""
    theta = jax.tree.map(np.asarray, theta)
    out = lambda name, h: float(h @ theta[name]["w"][:, 0] + theta[name]["b"][0])
    times, keep = SMALL["num_timescales"], sigmoid(theta["rate_decay"]["rho"])
    flat = {name: np.asarray(g).reshape(len(g), -1) for name, g in grads.items()}
    fresh = lambda: {"g": np.zeros(times), "l": np.zeros(times), "bar": np.log(1e-3),
                     "rel": 0.0, "h": np.zeros(SMALL["param_size"])}  # fmt: skip
    cells = {name: [fresh() for _ in g[0]] for name, g in flat.items()}
    tensors = {name: np.zeros(SMALL["tensor_size"]) for name in flat}
    whole, path = np.zeros(SMALL["global_size"]), []
    for i in range(len(flat["b"])):
        deltas, new_tensors = {}, {}
        for name, g in flat.items():
            deltas[name], etas = [], []
            for cell, x in zip(cells[name], g[i], strict=True):
                powers = 0.5 ** np.arange(times)
                beta_g = sigmoid(out("gradient_decay", cell["h"])) ** powers
                beta_l = sigmoid(out("square_decay", cell["h"])) ** powers
                cell["g"] = beta_g * cell["g"] + (1 - beta_g) * x
                cell["l"] = beta_l * cell["l"] + (1 - beta_l) * x**2
                m = cell["g"] / np.sqrt(cell["l"] + eps)
                gamma = np.log(cell["l"] + eps)
                parts = [m, gamma - gamma.mean(), [cell["rel"]], tensors[name], whole]
                cell["h"] = gru(
                    theta["parameter_gru"], np.concatenate(parts), cell["h"]
                )
                eta = cell["bar"] + out("rate", cell["h"])
                cell["bar"] = keep * cell["bar"] + (1 - keep) * eta
                etas.append(eta)
                direction = out("direction", cell["h"]) + out("shortcut", m)
                deltas[name].append(-(np.exp(eta) + offset) * direction)
            for cell, eta in zip(cells[name], etas, strict=True):
                cell["rel"] = eta - np.mean(etas)
            mean = np.mean([cell["h"] for cell in cells[name]], axis=0)
            seen = np.concatenate([mean, whole])
            new_tensors[name] = gru(theta["tensor_gru"], seen, tensors[name])
        tensors = new_tensors
        whole = gru(theta["global_gru"], np.mean(list(tensors.values()), axis=0), whole)
        path.append(deltas)
    return {
        name: np.stack([step[name] for step in path]).reshape(g.shape)
        for name, g in grads.items()
    }


def test_it_follows_the_equations_tensor_by_tensor():
    updates, state = plain_run()
    # roundings of ln and exp at a gradient of exactly zero
    assert_close(updates, reference(weights(), gradients()), 1e-10)
    assert state.count == 5


@pytest.mark.parametrize(
    ("options", "num"), [({}, 5070), ({"num_timescales": 1}, 4707)]
)
def test_number_of_weights(options, num):
    theta = jax.eval_shape(scale(**options).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == num


def test_weights_begin_as_they_should():
    theta = fresh()
    decay = lambda name: jax.nn.sigmoid(theta[name]["b"][0])
    assert abs(decay("gradient_decay") - 0.9) < 1e-12
    assert abs(decay("square_decay") - 0.999) < 1e-12
    assert theta["rate_decay"]["rho"] == 3.2
    for name in ("gradient_decay", "square_decay", "rate", "direction", "shortcut"):
        np.testing.assert_array_equal(theta[name]["w"], 0)
    limit = np.sqrt(6 / (29 + 60))
    assert 0.95 * limit < jnp.max(jnp.abs(theta["parameter_gru"]["wx"])) < limit
    wh = theta["parameter_gru"]["wh"]
    np.testing.assert_allclose(wh @ wh.T, np.eye(20), atol=1e-12)


def test_first_updates_of_fresh_weights_are_zero_and_can_be_trained():
    def moved(theta):
        student = scale().rule(theta)
        updates, _ = student.update(tree(), student.init(tree()))
        return optax.tree.sum(updates), updates

    slopes, updates = jax.jit(jax.grad(moved, has_aux=True))(fresh())
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    assert jnp.any(slopes["direction"]["w"] != 0)
    assert jnp.any(slopes["shortcut"]["w"] != 0)


def test_warmup_moves_averages_and_counts_and_keeps_recurrent_states():
    walk = jax.jit(lambda warmup: run(rule(), gradients(), warmup=warmup)[1])
    start, state, without = rule().init(tree()), walk(True), walk(False)
    assert_equal(state.tiers, start.tiers)
    assert state.count == 5
    assert jnp.all(state.nu[0] > 0)
    assert_close(without, plain_run()[1])
    assert jnp.any(without.tiers.parameter != start.tiers.parameter)


@functools.cache
def compiled_update():
    return jax.jit(rule().update)


@pytest.mark.parametrize("poison", [jnp.nan, -jnp.inf, 1e200])
def test_one_bad_entry_stops_every_update_and_leaves_the_state(poison):
    """1e200 is finite, but its square is not."""
    _, state = plain_run()
    bad = {**tree(), "s": jnp.array(poison)}
    updates, after = compiled_update()(bad, state)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, bad))
    assert_equal(after, state)


def test_derivatives_after_a_bad_gradient_are_finite():
    def total(theta):
        student, grads = rule(theta), gradients(2)
        grads = {**grads, "s": grads["s"].at[0].set(jnp.nan)}
        return sum(jnp.sum(u**2) for u in jax.tree.leaves(run(student, grads)[0]))

    slopes = jax.jit(jax.grad(total))(weights())
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))


@pytest.mark.slow
def test_derivatives_equal_finite_differences_at_a_zero_gradient_too():
    theta, grads = weights(), {**gradients(2), "b": jnp.zeros((2, 2))}
    along = (weights(seed=1), gradients(2))

    @jax.jit
    def total(step):
        moved = jax.tree.map(lambda x, v: x + step * v, (theta, grads), along)
        updates, _ = run(rule(moved[0]), moved[1])
        return sum(jnp.sum(jnp.sin(3 * u)) for u in jax.tree.leaves(updates))

    # ε under the root makes curvatures of 1/ε along the gradient: so tiny a width
    width = 1e-9
    slope = jax.jit(jax.grad(total))(0.0)
    difference = (total(width) - total(-width)) / (2 * width)
    np.testing.assert_allclose(slope, difference, rtol=1e-4)


def test_tensors_may_come_in_any_order_and_parameters_too():
    updates, _ = plain_run()
    turned = jax.tree.map(lambda g: jnp.flip(g, axis=range(1, g.ndim)), gradients())
    names = {"a": "w", "m": "b", "z": "s"}
    other, _ = run(rule(), {new: turned[old] for new, old in names.items()})
    for new, old in names.items():
        back = jnp.flip(other[new], axis=range(1, other[new].ndim))
        np.testing.assert_allclose(back, updates[old], rtol=1e-10)


def test_chain_and_multi_steps_are_transparent():
    updates, _ = plain_run()
    chained, _ = run(optax.chain(optax.identity(), rule()), gradients())
    assert_close(chained, updates)
    twice = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), gradients())
    several, _ = run(optax.MultiSteps(rule(), 2), twice)
    second = jax.tree.map(lambda u: u[1::2], several)
    # MultiSteps accumulates in float32
    assert_close(second, updates, 1e-5)


def test_masked_leaves_pass_and_the_rest_is_a_smaller_network():
    masked = optax.masked(rule(), {"b": False, "s": True, "w": True})
    updates, _ = run(masked, gradients())
    np.testing.assert_array_equal(updates["b"], gradients()["b"])
    rest = {name: g for name, g in gradients().items() if name != "b"}
    alone, _ = run(rule(), rest)
    assert_close({name: updates[name] for name in rest}, alone)


def test_many_weights_at_once():
    theta = weights()
    several = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), theta)
    together = jax.vmap(lambda theta: run(rule(theta), gradients())[0])(several)
    alone, _ = run(rule(theta), gradients())
    assert_close(jax.tree.map(lambda u: u[0], together), alone, 1e-10)


def test_narrow_parameters_keep_their_dtype_and_wide_states():
    narrow = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients())
    updates, state = run(rule(optax.tree.cast(weights(), jnp.float32)), narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    floats = jax.tree.leaves((state.mu, state.nu, state.tiers))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_keeps_tree_shapes_dtypes_and_weak_types(dtype, x64):
    with jax.enable_x64(x64):
        theta = jax.eval_shape(scale().init, jax.random.key(0))
        theta = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), theta)
        student, params = scale().rule(theta), jnp.zeros((2, 2), dtype)
        before = jax.eval_shape(student.init, params)
        _, after = jax.eval_shape(student.update, params, before)
        signature = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type)
        assert jax.tree.map(signature, before) == jax.tree.map(signature, after)


@pytest.mark.parametrize("nothing", [{}, {"w": jnp.zeros((0, 3))}])
def test_trees_with_nothing_in_them_pass(nothing):
    updates, state = rule().update(nothing, rule().init(nothing))
    assert_equal(updates, nothing)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"param_size": 0}, "scale(param_size=...)` must be at least 1"),
        ({"num_timescales": 0}, "scale(num_timescales=...)` must be at least 1"),
        ({"initial_learning_rate": 0.0}, "scale(initial_learning_rate=...)` must be"),
        ({"learning_rate_offset": -1.0}, "scale(learning_rate_offset=...)` must be"),
        ({"eps": 0.0}, "scale(eps=...)` must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match="must be") as caught:
        scale(**options)
    assert words in str(caught.value)
