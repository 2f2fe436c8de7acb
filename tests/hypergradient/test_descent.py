"""Claims about hypergradient descent that no battery and no trajectory holds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.hypergradient import (
    HypergradientDescentState,
    adam_hd,
    adamw_hd,
    hypergradient_descent,
    sgd_hd,
)

RULES = ("additive", "multiplicative", "normalized")
HESSIAN_EIGENVALUES = np.logspace(-3, 0, 10)


def golden_quadratic():
    """The reference quadratic from its definition; initial loss 2.641005260315428."""
    v = np.arange(1.0, 11.0)
    reflect = np.eye(10) - 2 * np.outer(v, v) / (v @ v)
    hessian = jnp.asarray(reflect @ np.diag(HESSIAN_EIGENVALUES) @ reflect)
    i = np.arange(10)
    centre = jnp.asarray(np.cos(i))
    start = centre + 1 + 0.5 * np.sin(i)
    return lambda x: 0.5 * (x - centre) @ hessian @ (x - centre), start


def run(rule, loss, start, num_steps):
    """Parameters, states and losses before each step, stacked."""

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = rule.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, value)

    return jax.lax.scan(step, (start, rule.init(start)), length=num_steps)[1]


def test_quadratic_of_these_tests_is_the_reference_one():
    loss, start = golden_quadratic()
    np.testing.assert_allclose(loss(start), 2.641005260315428, rtol=1e-14)


@pytest.mark.parametrize("base", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_zero_hyper_learning_rate_equals_the_fixed_rate(base):
    build, plain = {
        "sgd": (lambda a, b: sgd_hd(a, b), optax.sgd(0.05)),
        "momentum": (lambda a, b: sgd_hd(a, b, 0.9), optax.sgd(0.05, 0.9)),
        "nesterov": (lambda a, b: sgd_hd(a, b, 0.9, True), optax.sgd(0.05, 0.9, True)),
        "adam": (lambda a, b: adam_hd(a, b), optax.adam(0.05)),
        "adamw": (lambda a, b: adamw_hd(a, b), optax.adamw(0.05)),
    }[base]
    loss, start = golden_quadratic()
    for dtype in ("float32", "float64"):
        for eager in (True, False):
            # Operation by operation they are equal bit for bit. Compiled, XLA may
            # contract a·b + c to one rounding in one program and not in the other: a
            # few units in the last place of numbers of order 1.
            rules = (build(0.05, 0.0), plain)
            paths = [walk(r, loss, start.astype(dtype), 20, eager) for r in rules]
            tolerance = 0 if eager else 8 * jnp.finfo(dtype).eps
            np.testing.assert_allclose(*paths, rtol=0, atol=tolerance)


def walk(rule, loss, params, num_steps, eager):
    """The parameters after each step."""

    def step(carry, _):
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    carry, path = (params, rule.init(params)), []
    if not eager:
        return np.asarray(jax.lax.scan(step, carry, length=num_steps)[1])
    for _ in range(num_steps):
        carry, params = step(carry, None)
        path.append(np.asarray(params))
    return np.stack(path)


def test_third_order_tower_equals_the_written_recursion():
    loss, start = golden_quadratic()
    third = hypergradient_descent(optax.identity(), 1e-3, 1e-6)
    second = hypergradient_descent(optax.identity(), 0.005, hyper_optimizer=third)
    rule = sgd_hd(0.05, hyper_optimizer=second)
    _, states, _ = run(rule, loss, start, 50)
    rates = [
        states.learning_rate[-1],
        states.hyper_state.learning_rate[-1],
        states.hyper_state.hyper_state.learning_rate[-1],
    ]
    expected = [0.436846364962, 0.0439477253775, 0.00124341652249]
    np.testing.assert_allclose(rates, expected, rtol=1e-11)

    x, grad = np.asarray(start), jax.jit(jax.grad(loss))
    a, b, c = 0.05, 0.005, 1e-3
    d, h1, h2 = np.zeros(10), 0.0, 0.0
    for t in range(50):
        g = np.asarray(grad(x))
        new_h = -g @ d
        new_h1 = -new_h * h1  # H¹_t = −h_t h_{t−1}
        c -= 1e-6 * (-new_h1 * h2)  # H²_t = −H¹_t H¹_{t−1}
        b -= c * new_h1
        a -= b * new_h
        x, d, h1, h2 = x - a * g, g, new_h, new_h1
        np.testing.assert_allclose(states.learning_rate[t], a, rtol=0, atol=1e-12)
        inner = states.hyper_state
        np.testing.assert_allclose(inner.learning_rate[t], b, rtol=0, atol=1e-12)


def test_leaf_scope_equals_a_rule_a_leaf_and_its_parts_sum_to_the_global():
    loss, start = golden_quadratic()
    params = {"a": start[:4], "b": start[4:]}
    tree_loss = lambda p: loss(jnp.concatenate([p["a"], p["b"]]))
    leaf = run(sgd_hd(0.05, 0.02, scope="leaf"), tree_loss, params, 20)
    each = optax.multi_transform(
        {"a": sgd_hd(0.05, 0.02), "b": sgd_hd(0.05, 0.02)}, {"a": "a", "b": "b"}
    )
    separate = run(each, tree_loss, params, 20)
    for name in ("a", "b"):
        np.testing.assert_allclose(leaf[0][name], separate[0][name], rtol=1e-13)
    frozen = [run(sgd_hd(0.05, 0.0, scope=s), tree_loss, params, 9)[1] for s in
              ("global", "leaf", "element")]  # fmt: skip
    for state in frozen[1:]:
        total = sum(
            h.reshape(9, -1).sum(1) for h in jax.tree.leaves(state.hypergradient)
        )
        np.testing.assert_allclose(total, frozen[0].hypergradient, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 0.1, 100.0])
def test_multiplicative_rule_is_invariant_to_the_scale_of_the_loss(factor):
    loss, start = golden_quadratic()
    scaled = lambda x: factor * loss(x)
    build = lambda alpha: sgd_hd(alpha, 0.05, rule="multiplicative")
    plain = run(build(0.05), loss, start, 50)[0]
    other = run(build(0.05 / factor), scaled, start, 50)[0]
    np.testing.assert_allclose(other, plain, rtol=1e-10)
    adam = adam_hd(0.01, 0.02, eps=0.0, rule="multiplicative")
    rates = [run(adam, f, start, 50)[1].learning_rate for f in (loss, scaled)]
    np.testing.assert_allclose(rates[1], rates[0], rtol=1e-10)


@pytest.mark.parametrize(("alpha", "steps"), [(1e-4, 230), (3.0, 90)])
def test_multiplicative_rule_on_a_parabola_finds_its_curvature(alpha, steps):
    curvature, beta = 2.0, 0.05
    rule = sgd_hd(alpha, beta, rule="multiplicative")
    loss = lambda x: 0.5 * curvature * x**2
    # Few enough steps that x², shrinking 400-fold a step at the end, stays above 0.
    x, state, _ = run(rule, loss, jnp.asarray(1.0), steps)
    x, q = np.asarray(x), np.asarray(curvature * state.learning_rate)
    np.testing.assert_allclose(np.abs(q[1:] / q[:-1] - 1), beta, rtol=1e-9)
    inside = np.flatnonzero((q >= 1 - beta) & (q <= 1 + beta))
    assert inside.size
    shrinking = np.abs(x[1:] / x[:-1])[inside[0] :]
    assert shrinking.max() <= beta * (1 + 1e-9)


def test_unbounded_rate_may_become_negative():
    loss, start = golden_quadratic()
    _, states, losses = run(sgd_hd(0.05, 0.05, momentum=0.9), loss, start, 51)
    steps = np.array([2, 5, 6, 40, 50]) - 1
    expected = [0.255525425733, 0.0320400895608, -0.0312868266936, -0.123519903634,
                0.236360565153]  # fmt: skip
    # A change of 1e-12 in the start moves these rates by 1.3e-11.
    np.testing.assert_allclose(states.learning_rate[steps], expected, atol=1e-9)
    np.testing.assert_allclose(losses[50], 0.064573601, atol=1e-9)
    bounded = sgd_hd(0.05, 0.05, momentum=0.9, bounds=(0, None))
    assert run(bounded, loss, start, 50)[1].learning_rate.min() == 0


def test_unguarded_nesterov_diverges_and_every_limit_saves_it():
    loss, start = golden_quadratic()
    build = lambda **options: sgd_hd(0.05, momentum=0.9, nesterov=True, **options)
    _, states, losses = run(build(hyper_learning_rate=0.1), loss, start, 200)
    expected = [0.05, 0.796561, -0.26555, 0.0787568, 0.972856, -0.770234, 0.862279,
                -2.56095, -0.681024, 29.3]  # fmt: skip
    # The reference prints six digits, of 29.3 three.
    np.testing.assert_allclose(states.learning_rate[:9], expected[:9], rtol=1e-5)
    np.testing.assert_allclose(states.learning_rate[9], expected[9], rtol=5e-3)
    assert not np.all(np.isfinite(losses))
    assert np.all(np.isfinite(states.learning_rate))
    limits = [
        ({"hyper_learning_rate": 0.1, "bounds": (0, None)}, 2.7),
        ({"hyper_learning_rate": 0.1, "bounds": (0, 1)}, 2.7),
        ({"hyper_learning_rate": 0.1, "max_relative_change": 0.2}, 2.7),
        ({"hyper_learning_rate": 0.1, "rule": "multiplicative"}, 5e4),
    ]
    for options, largest in limits:
        assert run(build(**options), loss, start, 200)[2].max() < largest


def test_relative_change_is_limited_before_the_bounds():
    rule = sgd_hd(1.0, 100.0, max_relative_change=0.5, bounds=(0.4, 1.2))
    state = rule.init(jnp.ones(2))
    rates = []
    for sign in (1.0, 1.0, -1.0, -1.0, -1.0):
        _, state = rule.update(sign * jnp.ones(2), state)
        rates.append(float(state.learning_rate))
    # h < 0 raises the rate to 1.5, cut to 1.2; then 0.6; −1, −1 agree again: 0.9
    np.testing.assert_allclose(rates, [1.0, 1.2, 0.6, 0.9, 1.2])


def test_schedule_of_the_hyper_rate_sees_the_number_of_updates_done():
    seen = lambda count: jnp.where(count == 2, 0.5, 0.0)
    rule = sgd_hd(1.0, seen)
    state, rates = rule.init(jnp.ones(3)), []
    for _ in range(4):
        _, state = rule.update(jnp.ones(3), state)
        rates.append(float(state.learning_rate))
    assert rates == [1.0, 1.0, 2.5, 2.5]


def test_transition_goes_over_to_the_final_rate():
    rule = sgd_hd(1.0, 0.0, transition=(lambda count: 1 / (count + 1) ** 2, 3.0))
    state, emitted = rule.init(jnp.ones(1)), []
    for _ in range(3):
        updates, state = rule.update(jnp.ones(1), state)
        emitted.append(float(updates[0]))
    np.testing.assert_allclose(emitted, [-1, -(0.25 + 0.75 * 3), -(1 / 9 + 8 / 9 * 3)])
    assert state.learning_rate == 1.0


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("rule_name", "scope"),
    [
        pair
        for pair in itertools.product(RULES, ("global", "leaf", "element"))
        if pair != ("normalized", "element")
    ],
)
def test_nonfinite_gradient_leaves_the_rate_and_is_reported(rule_name, scope, compiled):
    hyper = optax.adam(0.01)
    rule = sgd_hd(0.1, hyper_optimizer=hyper, rule=rule_name, scope=scope)
    if compiled:
        rule = rule._replace(update=jax.jit(rule.update))
    good, bad = jnp.array([1.0, 2.0]), jnp.array([jnp.nan, 1.0])
    _, before = rule.update(good, rule.init(good))
    for poison in (bad, bad * jnp.inf, jnp.array([jnp.inf, 1.0])):
        _, after = rule.update(poison, before)
        assert not np.all(np.isfinite(after.hypergradient))
        np.testing.assert_array_equal(after.learning_rate, before.learning_rate)
        for new, old in zip(
            jax.tree.leaves(after.hyper_state), jax.tree.leaves(before.hyper_state),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(after.direction, 0)
        _, later = rule.update(good, after)
        np.testing.assert_array_equal(later.hypergradient, 0)
        np.testing.assert_array_equal(later.learning_rate, before.learning_rate)


def test_first_gradient_may_be_nonfinite():
    rule = adam_hd(0.1, 0.02, rule="multiplicative")
    _, state = rule.update(jnp.array([jnp.nan]), rule.init(jnp.ones(1)))
    assert state.learning_rate == jnp.asarray(0.1)
    np.testing.assert_array_equal(state.direction, 0)


@pytest.mark.parametrize("size", [1e-11, 1e10])
def test_cosine_stays_in_the_range_of_float32(size):
    rule = sgd_hd(1.0, 0.1, rule="multiplicative")
    grad = jnp.full(4, size, jnp.float32)
    state = rule.init(grad)
    for _ in range(2):
        _, state = rule.update(grad, state)
    np.testing.assert_allclose(state.learning_rate, 1.1, rtol=1e-6)


def test_inner_products_of_bfloat16_accumulate_in_float32():
    grad = jnp.full(200_000, 0.5, jnp.bfloat16)
    rule = sgd_hd(0.1, 1e-3)
    state = rule.init(grad)
    for _ in range(2):
        _, state = rule.update(grad, state)
    np.testing.assert_allclose(-state.hypergradient, 50_000, rtol=1e-6)
    assert state.direction.dtype == jnp.bfloat16
    assert state.learning_rate.dtype == jnp.float64  # x64 is on in these tests


def test_direction_dtype_halves_the_extra_state():
    rule = sgd_hd(0.1, 1e-3, direction_dtype=jnp.bfloat16)
    state = rule.init(jnp.ones(3, jnp.float32))
    updates, state = rule.update(jnp.ones(3, jnp.float32), state)
    assert state.direction.dtype == jnp.bfloat16
    assert updates.dtype == jnp.float32


def test_masked_none_scalar_and_empty_trees_pass():
    rule = sgd_hd(0.1, 1e-3)
    for params in ({}, {"a": None, "b": jnp.ones(())}, jnp.ones(())):
        state = rule.init(params)
        for _ in range(2):
            updates, state = rule.update(params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    masked = optax.masked(rule, {"a": False})
    state = masked.init({"a": jnp.ones(2)})
    for _ in range(2):
        _, state = masked.update({"a": jnp.ones(2)}, state, {"a": jnp.ones(2)})
    assert state.inner_state.hypergradient == 0


def test_rate_is_read_and_set_through_a_chain():
    chain = optax.chain(optax.clip_by_global_norm(1.0), adam_hd(1e-3))
    state = chain.init(jnp.ones(2))
    assert np.isclose(optax.tree.get(state, "learning_rate"), 1e-3)
    state = optax.tree.set(state, learning_rate=jnp.asarray(0.5))
    assert optax.tree.get(state, "learning_rate") == 0.5


def test_hyper_optimizer_replaces_the_default_hyper_rate_only():
    tower = adam_hd(1e-3, hyper_optimizer=optax.sgd(1e-7))
    plain = adam_hd(1e-3, 1e-7)
    loss, start = golden_quadratic()
    pair = [run(rule, loss, start, 10)[1].learning_rate for rule in (tower, plain)]
    np.testing.assert_allclose(*pair, rtol=1e-13)
    with pytest.raises(ValueError, match="got both"):
        adam_hd(1e-3, 1e-6, hyper_optimizer=optax.sgd(1e-7))


def test_whole_optimizer_becomes_a_base():
    loss, start = golden_quadratic()
    whole = optax.chain(optax.adam(1.0), optax.scale(-1.0))
    got = run(hypergradient_descent(whole, 0.01, 1e-4), loss, start, 20)[0]
    np.testing.assert_allclose(got, run(adam_hd(0.01, 1e-4), loss, start, 20)[0])


def test_learning_rate_of_the_state_never_shares_a_buffer():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    alpha = jnp.asarray(0.1)
    for scope in ("global", "leaf", "element"):
        rule = sgd_hd(alpha, 0.01, scope=scope, transition=(lambda count: 1.0, 0.1))
        state = rule.init(params)
        leaves = jax.tree.leaves((state, params, alpha))
        pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
        assert len(set(pointers)) == len(pointers)


ERRORS = {
    "negative rate": ({"learning_rate": -0.1}, "learning_rate.*at least 0.*got -0.1"),
    "nan rate": ({"learning_rate": float("nan")}, "learning_rate.*number.*nan"),
    "infinite rate": ({"learning_rate": np.inf}, "learning_rate.*finite.*inf"),
    "array rate": ({"learning_rate": jnp.ones(2)}, r"learning_rate.*scalar.*\(2,\)"),
    "negative beta": ({"hyper_learning_rate": -1.0}, "hyper_learning_rate.*at least 0"),
    "neither": ({"hyper_learning_rate": None}, "one without the other.*got neither"),
    "both": ({"hyper_optimizer": optax.sgd(0.1)}, "one without the other.*got both"),
    "rule": ({"rule": "addition"}, "rule.*'additive', .*got 'addition'"),
    "scope": ({"scope": "layer"}, "scope.*'leaf', .*got 'layer'"),
    "normalized element": ({"rule": "normalized", "scope": "element"}, "per element"),
    "stuck at zero": ({"learning_rate": 0, "rule": "multiplicative"}, "never leave 0"),
    "stuck by the limit": (
        {"learning_rate": 0.0, "max_relative_change": 0.1}, "never leave 0"),
    "outside bounds": ({"bounds": (0.2, None)}, "learning_rate.*bounds.*got 0.1"),
    "bounds reversed": ({"bounds": (1.0, 0.0)}, "bounds.*lo <= hi"),
    "bounds no pair": ({"bounds": 1.0}, "bounds.*pair"),
    "no change": ({"max_relative_change": 0.0}, "max_relative_change.*above 0"),
    "transition": ({"transition": 0.1}, "transition.*pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_factory_refuses(case):
    arguments, message = ERRORS[case]
    arguments = {"learning_rate": 0.1, "hyper_learning_rate": 0.01} | arguments
    with pytest.raises(ValueError, match=message):
        hypergradient_descent(optax.identity(), **arguments)


def test_traced_rates_are_not_looked_at():
    build = lambda a, b: sgd_hd(a, b, rule="multiplicative").init(jnp.ones(2))
    states = jax.vmap(build)(jnp.array([0.0, 1.0]), jnp.array([-1.0, 0.1]))
    assert states.learning_rate.shape == (2,)


def test_updates_of_another_tree_are_refused():
    rule = sgd_hd(0.1, 0.01)
    state = rule.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="tree of the parameters given to init"):
        rule.update({"b": jnp.ones(2)}, state)
    with pytest.raises(ValueError, match=r"got \(3,\), wanted \(2,\) at '\['a'\]'"):
        rule.update({"a": jnp.ones(3)}, state)


def test_stability_of_the_additive_rule_falls_with_size_and_of_the_others_does_not():
    """β_crit ∝ 1/n around Adam, on noisy quadratics; the normalised rules lose n."""

    def stable(rule, n, key):
        key_h, key_x, key_run = jax.random.split(key, 3)
        eigenvalues = 10 ** jax.random.uniform(key_h, (n,), minval=-2.0, maxval=0.0)
        start = jax.random.normal(key_x, (n,))
        loss = lambda x: 0.5 * jnp.sum(eigenvalues * x**2)

        def step(carry, key):
            x, state = carry
            noise = 0.05 * jax.random.normal(key, (n,))
            updates, state = rule.update(eigenvalues * x + noise, state, x)
            return (optax.apply_updates(x, updates), state), loss(x)

        keys = jax.random.split(key_run, 300)
        losses = jax.lax.scan(step, (start, rule.init(start)), keys)[1]
        kept = jnp.all(losses <= 10 * losses[0]) & (losses[-1] < losses[0])
        return kept & jnp.all(jnp.isfinite(losses))

    key = jax.random.key(0)
    for n, beta in itertools.product((100, 1000), (1.0, 100.0)):
        # the largest stable β·n was between 9.8 and 15.6 for n from 1e2 to 1e5
        assert stable(adam_hd(1e-3, beta / n), n, key) == (beta < 10)
    for beta in (0.02, 0.2):
        assert stable(adam_hd(1e-3, beta, rule="multiplicative"), 1000, key)
    for beta in (0.01, 1.0):
        assert stable(adam_hd(1e-3, beta, rule="normalized"), 1000, key)


def test_state_has_the_documented_fields():
    fields = ("count", "learning_rate", "hypergradient", "direction", "base_state",
              "hyper_state", "applied_learning_rate")  # fmt: skip
    assert HypergradientDescentState._fields == fields
