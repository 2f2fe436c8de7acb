"""Learned optimizers against their formulas in NumPy, and as optax rules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.amalgamation import choice, l2l, pool, rnnprop, with_warmup

NAMES = ("rnnprop", "l2l", "choice", "with_warmup")


def policy(name):
    small = {
        "rnnprop": rnnprop,
        "l2l": l2l,
        "choice": lambda n: choice(pool("small"), n),
    }
    return small.get(name, rnnprop)(3)


@pytest.fixture(params=NAMES)
def named(request):
    """A rule of random weights, and its name."""
    return request.param, bound(request.param)


def bound(name):
    student = policy(name)
    rule = student.rule(jax.jit(student.init)(jax.random.key(0)))
    return with_warmup(rule, 3, 0.1) if name == "with_warmup" else rule


def start(dtype=jnp.float64):
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 0.1]]), "s": jnp.array(0.3), "e": {}}
    return optax.tree.cast(params, dtype)


def walk(rule, params, state, num=5):
    """Steps on a bowl, the last parameters and state."""

    def step(carry, _):
        params, state = carry
        grad = jax.tree.map(lambda p: jnp.sinh(p).astype(p.dtype), params)
        updates, state = rule.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=num)[0]


def size(theta):
    return sum(leaf.size for leaf in jax.tree.leaves(theta))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_reference(theta, x, h, c):
    """One coordinate, one gate after the other: input, forget, cell, output."""
    n = len(h)
    sums = x @ theta["wx"] + h @ theta["wh"] + theta["b"]
    i, f, g, o = (sums[k * n : (k + 1) * n] for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def output_reference(theta, inputs, layers=2):
    """[K], what the network puts out for the features [K, in] of one coordinate."""
    theta, n, outs = jax.tree.map(np.asarray, theta), len(theta["output"]["w"]), []
    carries = [(np.zeros(n), np.zeros(n)) for _ in range(layers)]
    for x in inputs:
        for layer in range(layers):
            carries[layer] = lstm_reference(theta[f"lstm_{layer}"], x, *carries[layer])
            x = carries[layer][0]
        outs.append((x @ theta["output"]["w"] + theta["output"]["b"])[0])
    return np.array(outs)


def scalar_steps(student, theta, grads):
    """[K], what the rule subtracts from one scalar parameter."""

    @jax.jit
    def run(theta, grads):
        rule = student.rule(theta)
        step = lambda state, g: rule.update(g, state)[::-1]
        return -jax.lax.scan(step, rule.init(grads[0]), grads)[1]

    return run(theta, jnp.asarray(grads))


def weights(student, seed=1):
    """Random everywhere: the zeros of `init` would hide what they multiply."""
    shapes = jax.eval_shape(student.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.array(rng.normal(size=s.shape) / 2), shapes)


GRADS = np.array([0.5, -1.0, 2.0, 1e-3, 0.0, -0.2])


@pytest.mark.parametrize(
    ("student", "count"),
    [
        (rnnprop(), 5141),
        (rnnprop(input_layer=True), 6641),
        (l2l(), 5061),
        (l2l(preprocess="log_sign"), 5141),
    ],
)
def test_numbers_of_weights_are_those_of_the_papers(student, count):
    assert size(jax.eval_shape(student.init, jax.random.key(0))) == count


def test_choice_has_5482_weights_for_two_members_and_5886_for_six():
    shapes = [jax.eval_shape(choice(pool(n)).init, jax.random.key(0))
              for n in ("small", "large")]  # fmt: skip
    assert [size(theta) for theta in shapes] == [5482, 5886]


def test_weights_start_glorot_uniform_as_one_matrix_and_orthogonal():
    theta = jax.jit(rnnprop().init)(jax.random.key(0))
    first, out = theta["lstm_0"], theta["output"]
    bound = np.sqrt(6 / (2 + 80))  # of [2, 80]; a kernel a gate would reach √(6/22)
    assert 0.95 * bound < np.abs(first["wx"]).max() <= bound
    np.testing.assert_allclose(first["wh"] @ first["wh"].T, np.eye(20), atol=1e-12)
    np.testing.assert_array_equal(first["b"], np.repeat([0.0, 1.0, 0.0, 0.0], 20))
    assert np.abs(out["w"]).max() <= np.sqrt(6 / 21)
    assert not out["b"].any()


@pytest.mark.parametrize("correction", ["true", "constant"])
def test_rnnprop_equals_its_formulas(correction):
    student = rnnprop(3, b2=0.99, bias_correction=correction)
    theta, t = weights(student), np.arange(1, 7)
    m = v = 0.0
    features = []
    for g, step in zip(GRADS, t, strict=True):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        powers = step if correction == "true" else 1
        root = np.sqrt(v / (1 - 0.99**powers) + 1e-10)
        features.append([m / (1 - 0.9**powers) / root, g / root])
    expected = 0.1 * np.tanh(output_reference(theta, np.array(features)))
    np.testing.assert_allclose(scalar_steps(student, theta, GRADS), expected, 1e-10)


def test_true_correction_in_place_of_the_constant_division_of_the_release():
    """They agree in the first step; then the release's inputs shrink, ours do not."""
    true, constant = rnnprop(3), rnnprop(3, bias_correction="constant")
    theta = weights(true)
    ones = np.ones(6)
    ours, theirs = (scalar_steps(s, theta, ones) for s in (true, constant))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
    assert np.abs(ours[1:] / theirs[1:] - 1).max() > 1e-3
    # under one gradient over and over ours stay [1, 1], but for ε beside it
    expected = 0.1 * np.tanh(output_reference(theta, np.ones((6, 2))))
    np.testing.assert_allclose(ours, expected, rtol=1e-8)


def test_input_layer_is_dense_with_elu():
    student = rnnprop(3, 1, input_layer=True)
    theta = weights(student)
    hidden = np.ones(2) @ np.asarray(theta["input"]["w"]) + theta["input"]["b"]
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    expected = 0.1 * np.tanh(output_reference(theta, [hidden], 1))
    np.testing.assert_allclose(
        scalar_steps(student, theta, np.ones(1)), expected, rtol=1e-8
    )


@pytest.mark.parametrize("preprocess", ["none", "log_sign"])
def test_l2l_equals_its_formulas(preprocess):
    student = l2l(3, output_scale=0.2, preprocess=preprocess, p=5.0)
    theta = weights(student)
    with np.errstate(divide="ignore"):
        large = [np.log(np.abs(GRADS)) / 5, np.sign(GRADS)]
    small = [-np.ones(6), np.exp(5) * GRADS]
    rows = np.where(np.abs(GRADS) >= np.exp(-5), large, small).T
    features = rows if preprocess == "log_sign" else GRADS[:, None]
    expected = 0.2 * output_reference(theta, features)
    np.testing.assert_allclose(scalar_steps(student, theta, GRADS), expected, 1e-10)


def test_no_step_of_rnnprop_exceeds_its_output_scale():
    student = rnnprop(3, output_scale=0.05)
    theta = jax.tree.map(lambda w: 100 * w, weights(student))
    steps = np.abs(scalar_steps(student, theta, 1e6 * GRADS))
    assert steps.max() <= 0.05
    assert steps.max() > 0.0499


def test_coordinates_do_not_see_each_other():
    student = rnnprop(3)
    theta = weights(student)

    @jax.jit
    def together(theta, grads):
        rule = student.rule(theta)
        step = lambda state, g: rule.update({"a": g[:1], "b": g[1:, None]}, state)[::-1]
        like = {"a": grads[0][:1], "b": grads[0][1:, None]}
        return jax.lax.scan(step, rule.init(like), grads)[1]

    grads = np.stack([GRADS, -3 * GRADS, GRADS**2], axis=1)
    steps = together(theta, jnp.array(grads))
    got = -np.concatenate([steps["a"], steps["b"][:, :, 0]], axis=1)
    alone = [scalar_steps(student, theta, column) for column in grads.T]
    np.testing.assert_allclose(got, np.stack(alone, 1), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ["rnnprop", "l2l", "choice"])
def test_warmup_advances_moments_and_counts_and_recurrent_states_rest(name):
    """In the release those of L2L move on; here no warm-up depends on the weights."""
    rule, params = bound(name), start()
    before = rule.init(params)
    warm = jax.jit(lambda s: rule.update(params, s, params, warmup=True)[1])(before)
    cold = jax.jit(lambda s: rule.update(params, s, params, warmup=False)[1])(before)
    chex.assert_trees_all_equal(warm.carries, before.carries)
    assert warm.count == cold.count == 1
    chex.assert_trees_all_equal(warm._replace(carries=()), cold._replace(carries=()))
    assert any(leaf.any() for leaf in jax.tree.leaves(cold.carries))


def test_a_gradient_that_is_not_finite_changes_nothing_bit_for_bit(named):
    _, rule = named

    @jax.jit
    def poisoned(params, state, bad):
        params, state = walk(rule, params, state)
        grad = {**start(), "w": start()["w"].at[0, 0].set(bad)}
        updates, after = rule.update(grad, state, params)
        return (params, state), (optax.apply_updates(params, updates), after)

    for bad in (jnp.nan, jnp.inf):
        before, after = poisoned(start(), rule.init(start()), bad)
        chex.assert_trees_all_equal(before, after)


def test_state_restored_in_the_middle_goes_on_bit_for_bit(named):
    _, rule = named
    run = jax.jit(lambda params, state: walk(rule, params, state, 20))
    middle = run(start(), rule.init(start()))
    saved = jax.tree.map(np.array, middle)
    chex.assert_trees_all_equal(run(*middle), run(*jax.tree.map(jnp.array, saved)))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_updates_keep_the_dtype_and_moments_are_at_least_float32(named, dtype):
    name, rule = named
    params = start(dtype)
    after, state = jax.jit(lambda p: walk(rule, p, rule.init(p)))(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(after)} == {dtype}
    floats = [
        s for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.floating)
    ]
    if name != "choice":  # whose pool keeps states of its own
        assert all(leaf.dtype.itemsize >= 4 for leaf in floats)
    wide, _ = jax.jit(lambda p: walk(rule, p, rule.init(p)))(start())
    # 8 bits of mantissa in the parameters of five steps
    tolerance = {"float64": 0, "float32": 1e-5, "bfloat16": 0.05}[dtype]
    chex.assert_trees_all_close(
        optax.tree.cast(after, jnp.float64), wide, atol=tolerance
    )


@pytest.mark.parametrize("params", [{}, {"a": (), "b": jnp.zeros((0, 3))}])
def test_trees_without_a_number_work(named, params):
    _, rule = named
    updates, state = jax.jit(rule.update)(params, rule.init(params), params)
    chex.assert_trees_all_equal_shapes(updates, params)
    assert state.count == 1


def test_extra_arguments_are_accepted(named):
    _, rule = named
    plain, _ = jax.jit(rule.update)(start(), rule.init(start()))
    extra = lambda g, s: rule.update(g, s, value=jnp.ones(()), unheard_of=None)
    also, _ = jax.jit(extra)(start(), rule.init(start()))
    chex.assert_trees_all_close(plain, also, rtol=1e-12)


@pytest.mark.parametrize("name", ["rnnprop", "l2l", "choice"])
def test_derivative_in_weights_and_gradients_is_finite_and_right_at_zeros(name):
    student = policy(name)
    theta, grads = weights(student), jnp.array([0.0, 0.7, -0.4])
    direction = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size)).reshape(w.shape),
                             (theta, grads))  # fmt: skip

    def moved(theta, grads):
        rule = student.rule(theta)
        one, state = rule.update(grads, rule.init(grads))
        two, _ = rule.update(0.5 * grads, state)
        return jnp.sum(jnp.sin(10 * (one + 2 * two)))

    @jax.jit
    def slopes(theta, grads):
        slope = jax.grad(moved, (0, 1))(theta, grads)
        shifted = lambda h: moved(
            *jax.tree.map(lambda x, d: x + h * d, (theta, grads), direction)
        )
        near, far = ((shifted(h) - shifted(-h)) / (2 * h) for h in (1e-5, 2e-5))
        return slope, optax.tree.vdot(slope, direction), (4 * near - far) / 3

    if name == "l2l":
        slope, along, difference = slopes(theta, grads)
    else:  # in g the ratio g/√(g² + ε) turns within √ε of 0: only the weights move
        direction = (direction[0], 0 * grads)
        slope, along, difference = slopes(theta, grads)
    chex.assert_tree_all_finite(slope)
    np.testing.assert_allclose(along, difference, rtol=1e-6)


def test_with_warmup_is_sgd_first_and_the_rule_after_it():
    student = rnnprop(3)
    inner = student.rule(weights(student))
    rule = with_warmup(inner, 2, 0.1)
    grads = jnp.array(GRADS)[:, None]

    @jax.jit
    def run(grads):
        step = lambda state, g: rule.update(g, state)[::-1]
        state, steps = jax.lax.scan(step, rule.init(grads[0]), grads)
        own = inner.init(grads[0])
        for g in grads[:2]:
            own = inner.update(g, own, warmup=True)[1]
        step = lambda state, g: inner.update(g, state)[::-1]
        return steps, state, jax.lax.scan(step, own, grads[2:])[1]

    steps, state, after = run(grads)
    np.testing.assert_allclose(steps[:2], -0.1 * grads[:2], rtol=1e-12)
    np.testing.assert_allclose(steps[2:], after, rtol=1e-10)
    assert state.count == state.inner.count == 6


def test_with_warmup_of_no_steps_is_the_rule():
    rule = bound("rnnprop")
    assert with_warmup(rule, 0) == rule


def test_with_warmup_wraps_rules_that_know_none():
    rule = with_warmup(optax.sgd(1.0), 1, 0.25)
    updates, state = rule.update(start(), rule.init(start()), start())
    chex.assert_trees_all_close(updates, optax.tree.scale(-0.25, start()))
    updates, _ = rule.update(start(), state, start())
    chex.assert_trees_all_close(updates, optax.tree.scale(-1.0, start()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rnnprop(0), r"rnnprop\(hidden_size=...\)` must be at least 1; got 0"),
        (lambda: l2l(num_layers=0), r"l2l\(num_layers=...\)` must be at least 1"),
        (lambda: rnnprop(b1=1.0), r"rnnprop\(b1=...\)` .* got 1.0"),
        (lambda: rnnprop(b2=-0.1), r"rnnprop\(b2=...\)` .* got -0.1"),
        (lambda: rnnprop(eps=0.0), r"rnnprop\(eps=...\)` must be above 0"),
        (lambda: rnnprop(output_scale=0), r"output_scale=...\)` must be above 0"),
        (lambda: rnnprop(bias_correction="no"), r"bias_correction=...\)` .*'no'"),
        (lambda: l2l(preprocess="log"), r"l2l\(preprocess=...\)` .*'log'"),
        (lambda: l2l(p=0), r"l2l\(p=...\)` must be above 0"),
        (lambda: with_warmup(optax.sgd(1.0), -1), r"with_warmup\(steps=...\)` .* -1"),
        (
            lambda: with_warmup(optax.sgd(1.0), 1, -0.1),
            r"with_warmup\(learning_rate=...\)` must be at least 0; got -0.1",
        ),
    ],
)
def test_arguments_outside_their_range_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
