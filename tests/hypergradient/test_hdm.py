"""HDM-HB against the published table, a plain NumPy program, and gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Task, inner_loop, unroll
from metax.hypergradient import HDMHBState, hdm_hb
from metax.tasks import census_like, smoothed_svm

# Made with the authors' program: f, mean of P and b after k iterations from x0.
TABLE = {
    "diagonal": {
        1: (2.64100526032, 1, 0.95),
        2: (0.342894428065, 1.067188534, 0.95),
        3: (0.342894428065, 0.5212433228, 0),
        5: (0.152841813683, 0.9597209887, 0.02208566562),
        10: (0.0200501634572, 1.795869819, 0.3213146508),
        20: (0.00196130694005, 3.215019967, 0.5020641407),
    },
    "scalar": {
        1: (2.64100526032, 1, 0.95),
        2: (0.342894428063, 1.065799382, 0.95),
        3: (0.342894428063, 1.069115093, 0),
        5: (0.109609267547, 2.007056367, 0.03725063362),
        10: (0.00982575042331, 3.953825131, 0.5820615763),
        20: (0.00077233267896, 6.705242552, 0.5961978032),
    },
}
LEARNT = ["scaling", "scaling_accumulator", "momentum", "momentum_accumulator"]


def golden_quadratic():
    """f(x) = ½ (x − c)ᵀ H (x − c): eigenvalues 1e-3 … 1, turned by a reflection."""
    i, v = np.arange(10), np.arange(1.0, 11.0)
    reflection = np.eye(10) - 2 * np.outer(v, v) / (v @ v)
    hessian = reflection @ np.diag(np.logspace(-3, 0, 10)) @ reflection
    centre = np.cos(i)
    return hessian, centre, centre + 1 + 0.5 * np.sin(i)


def quadratic_loss(x):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    hessian, centre, _ = (jnp.asarray(a, dtype) for a in golden_quadratic())
    return 0.5 * (x - centre) @ hessian @ (x - centre)


def start(dtype=jnp.float64):
    return jnp.asarray(golden_quadratic()[2], dtype)


def split(x):
    return {"a": x[:4], "b": x[4:].reshape(2, 3)}


def split_loss(tree):
    return quadratic_loss(jnp.concatenate([tree["a"], tree["b"].ravel()]))


def update(rule, loss, params, state, **extra):
    value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
    point = {"value": value, "grad": grad, "value_fn": loss}
    updates, state = rule.update(grad, state, params, **point, **extra)
    return optax.apply_updates(params, updates), state


def run(rule, loss, params, num_steps):
    """All iterates and states, with a leading axis of `num_steps`."""

    def step(carry, _):
        carry = update(rule, loss, *carry)
        return carry, carry

    return jax.lax.scan(step, (params, rule.init(params)), length=num_steps)[1]


def reference(x, scaling, eta, eta_b, window, num_steps, smoothness=1.0):
    """The published iteration in NumPy; yields x, P, b, η and L of every iteration."""
    hessian, centre, _ = golden_quadratic()

    def evaluate(x):
        return 0.5 * (x - centre) @ hessian @ (x - centre), hessian @ (x - centre)

    L, eta_0, x_old, b, sum_b, m = smoothness, eta, x, 0.95, 0.0, 0
    P, sum_P = (0.0, 0.0) if scaling == "scalar" else (0 * x, 0 * x)
    known, samples = False, []
    f, g = evaluate(x)
    for k in range(1, num_steps + 1):
        d = x - x_old
        y = x - P * g + b * d
        f_y, g_y = evaluate(y)
        D = g @ g + (0.25 * L**2 * d @ d if known else 1e-12)
        q = -(g_y @ g if scaling == "scalar" else g_y * g) / D
        sum_P = sum_P + q**2
        P = np.clip(P - eta * q / (np.sqrt(sum_P) + 1e-12), 0, 1e10 / L)
        q = g_y @ d / D
        sum_b = sum_b + q**2
        b = np.clip(b - eta_b * q / (np.sqrt(sum_b) + 1e-12), 0, 0.9995)
        if k % 50 == 49 and not known:
            eta = max(0.8 * eta, 1e-3 * eta_0)
        x_old = x
        if f_y < f:
            length = np.linalg.norm(y - x)
            if length > 1e-3:
                samples.append(np.linalg.norm(g_y - g) / length)
            x, f, g, m = y, f_y, g_y, m + 1
        else:
            m = max(0, m - 2)
        if m > window and not known:
            L, sum_P, known = np.mean(samples), 0 * sum_P, True
            eta = eta_0 = 1 / L
        yield x, P, b, eta, L


def test_quadratic_is_the_one_of_the_table():
    np.testing.assert_allclose(quadratic_loss(start()), 2.641005260315428, rtol=1e-15)


@pytest.mark.parametrize("scaling", ["diagonal", "scalar"])
@pytest.mark.parametrize(
    ("loss_fn", "params"), [(quadratic_loss, start()), (split_loss, split(start()))]
)
def test_follows_the_published_table(scaling, loss_fn, params):
    rule = hdm_hb(1.0, 1.0, 1.0, scaling=scaling)
    iterates, states = run(rule, loss_fn, params, 20)
    for k, row in TABLE[scaling].items():
        x, state = jax.tree.map(lambda a, k=k: a[k - 1], (iterates, states))
        entries = jnp.concatenate([a.ravel() for a in jax.tree.leaves(state.scaling)])
        found = (loss_fn(x), jnp.mean(entries), state.momentum)
        np.testing.assert_allclose(found, row, rtol=1e-9)
        assert state.value == pytest.approx(row[0], rel=1e-9)


@pytest.mark.parametrize("scaling", ["diagonal", "scalar"])
@pytest.mark.parametrize("window", [200, 3])
@pytest.mark.parametrize(("eta", "eta_b"), [(1.0, 1.0), (3.0, 5.0)])
def test_equals_the_iteration_in_numpy(scaling, window, eta, eta_b):
    options = {"scaling": scaling, "curvature_window": window}
    iterates, states = run(
        hdm_hb(1.0, eta, eta_b, **options), quadratic_loss, start(), 20
    )
    found = (
        iterates,
        states.scaling,
        states.momentum,
        states.hyper_learning_rate,
        states.smoothness,
    )
    expected = reference(np.asarray(start()), scaling, eta, eta_b, window, 20)
    for k, wanted in enumerate(expected):
        # One ulp of x0 moves the NumPy iterates themselves by up to 2e-13 (diagonal)
        # and, in the second half, by up to 8e-10 (scalar).
        tolerance = 1e-12 if scaling == "diagonal" or k < 10 else 1e-8
        for want, got in zip(wanted, found, strict=True):
            np.testing.assert_allclose(got[k], want, rtol=tolerance, atol=tolerance)
    assert bool(states.is_known[-1]) == (window == 3)


@pytest.mark.parametrize("scaling", ["diagonal", "scalar"])
def test_any_tree_of_parameters_gives_the_same_run(scaling):
    rule = hdm_hb(1.0, 1.0, 1.0, scaling=scaling)
    flat, _ = run(rule, quadratic_loss, start(), 10)
    tree, _ = run(rule, split_loss, split(start()), 10)
    joined = jnp.concatenate([tree["a"], tree["b"].reshape(10, 6)], axis=1)
    np.testing.assert_allclose(joined, flat, rtol=1e-12)


def test_default_rate_is_ten_over_the_smoothness():
    assert hdm_hb(4.0).init(start()).hyper_learning_rate == 2.5


def test_first_iteration_teaches_the_scaling_its_rate():
    _, state = update(hdm_hb(2.0), quadratic_loss, start(), hdm_hb(2.0).init(start()))
    # AdaGrad's first step has the length of the rate, but for its ε.
    np.testing.assert_allclose(state.scaling, 5.0, rtol=1e-9)


def test_rate_shrinks_every_fifty_iterations_down_to_a_floor():
    _, states = run(hdm_hb(1.0, 1.0, 1.0), quadratic_loss, start(), 110)
    expected = np.repeat([1.0, 0.8, 0.8**2], [48, 50, 12])
    np.testing.assert_allclose(states.hyper_learning_rate, expected, rtol=1e-15)
    rule = hdm_hb(1.0, 1.0, 1.0)
    state = rule.init(start())._replace(
        count=jnp.array(48, jnp.int32), hyper_learning_rate=jnp.array(1.1e-3)
    )
    assert update(rule, quadratic_loss, start(), state)[1].hyper_learning_rate == 1e-3


def test_smoothness_becomes_the_mean_sampled_curvature():
    # On ½·3‖x‖² every sample is 3, so L = 3 however the run went.
    rule = hdm_hb(0.5, 0.1, curvature_window=4)
    _, states = run(rule, lambda x: 1.5 * jnp.sum(x**2), start(), 60)
    k = int(jnp.argmax(states.is_known))
    assert states.progress[k] == 5
    assert states.is_known.tolist() == [False] * k + [True] * (60 - k)
    np.testing.assert_allclose(states.smoothness[:k], 0.5)
    np.testing.assert_allclose(states.smoothness[k:], 3.0, rtol=1e-12)
    np.testing.assert_allclose(states.hyper_learning_rate[k:], 1 / 3, rtol=1e-12)
    assert jnp.all(states.scaling_accumulator[k] == 0)


def test_smoothness_stays_a_guess_where_no_curvature_was_seen():
    rule = hdm_hb(1.0, 0.1, curvature_window=2)
    _, states = run(rule, lambda x: jnp.sum(x), start(), 10)
    assert states.progress[-1] > 2
    assert not states.is_known[-1]
    assert jnp.all(states.smoothness == 1.0)


def test_null_step_learns_and_leaves_the_parameters_bitwise():
    rule, params = hdm_hb(1.0, 1.0, 1.0), start()
    before = after = (params, rule.init(params))
    for _ in range(3):  # the table: the third is a null step
        before, after = after, update(rule, quadratic_loss, *after)
    (x, old), (x_new, new) = before, after
    assert jnp.array_equal(x, x_new)
    assert jnp.any(old.displacement != 0)
    assert jnp.all(new.displacement == 0)
    assert (new.value, new.progress) == (old.value, 0)
    far = old._replace(progress=jnp.array(5, jnp.int32))
    assert update(rule, quadratic_loss, x, far)[1].progress == 3
    for field in LEARNT:
        assert jnp.all(getattr(new, field) != getattr(old, field))


def wall_at_start(kind):
    """The quadratic, with a test point that cannot be used wherever it differs."""

    def bad_value(x):
        return jnp.where(jnp.all(x == start()), 1.0, jnp.nan) * quadratic_loss(x)

    def minus_infinity(x):
        return quadratic_loss(x) - jnp.where(jnp.all(x == start()), 0.0, jnp.inf)

    @jax.custom_jvp
    def bad_gradient(x):
        return quadratic_loss(x)

    @bad_gradient.defjvp
    def _(primals, tangents):
        (x,), (dx,) = primals, tangents
        value, slope = jax.jvp(quadratic_loss, (x,), (dx,))
        return value, slope * jnp.where(jnp.all(x == start()), 1.0, jnp.nan)

    return {"nan": bad_value, "-inf": minus_infinity, "gradient": bad_gradient}[kind]


@pytest.mark.parametrize("kind", ["nan", "-inf", "gradient"])
def test_unusable_test_point_is_a_null_step_that_teaches_nothing(kind):
    loss, rule = wall_at_start(kind), hdm_hb(1.0, 1.0, 1.0)
    params, before = update(rule, loss, start(), rule.init(start()))
    assert jnp.all(before.scaling > 0)
    params, after = update(rule, loss, params, before)
    assert jnp.array_equal(params, start())
    for field in LEARNT:
        assert jnp.array_equal(getattr(after, field), getattr(before, field)), field
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after))


def test_feedback_that_overflows_teaches_nothing():
    def loss(x):  # a gradient of 1e30 beside one of 1: q² leaves float32
        return jnp.where(x[0] > 0.5, x[0], 1e30 * (0.5 - x[0]))

    rule = hdm_hb(1.0, 1.0)
    params, state = jnp.ones(1, jnp.float32), rule.init(jnp.ones(1, jnp.float32))
    for _ in range(3):
        params, state = update(rule, loss, params, state)
    assert params == 1
    np.testing.assert_allclose(state.scaling, 1.0, rtol=1e-6)
    np.testing.assert_allclose(state.scaling_accumulator, 1.0, rtol=1e-6)


def test_value_and_gradient_in_the_state_belong_bitwise_to_the_held_point():
    rule, params = hdm_hb(1.0, 1.0, 1.0), split(start())
    state = rule.init(params)
    for _ in range(15):
        params, state = update(rule, split_loss, params, state)
        value, grad = jax.value_and_grad(split_loss)(params)
        assert state.value == value
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state.grad, grad))


def test_one_evaluation_an_update_when_the_state_is_reused():
    evaluations = []

    def counted(x):
        jax.debug.callback(lambda: evaluations.append(None))
        return quadratic_loss(x)

    rule, params = hdm_hb(1.0), start()
    state = rule.init(params)
    for _ in range(6):
        params, state = update(rule, counted, params, state)
    jax.effects_barrier()
    assert len(evaluations) == 6 + 1


@pytest.mark.parametrize("missing", ["params", "value", "grad", "value_fn"])
def test_update_names_the_missing_argument(missing):
    rule, grad = hdm_hb(1.0), jnp.ones(10)
    given = {"value": 1.0, "grad": grad, "value_fn": quadratic_loss, "params": start()}
    given[missing] = None
    with pytest.raises(ValueError, match=rf"update\({missing}=\.\.\.\)"):
        rule.update(grad, rule.init(start()), **given)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("smoothness", 0.0),
        ("smoothness", float("inf")),
        ("smoothness", None),
        ("smoothness", jnp.ones(2)),
        ("hyper_learning_rate", -1.0),
        ("hyper_learning_rate", float("nan")),
        ("momentum_learning_rate", -1.0),
        ("scaling", "full"),
        ("momentum", -0.1),
        ("momentum", 0.9996),
        ("max_momentum", 1.0),
        ("max_momentum", 0.0),
        ("max_scaling", 0.0),
        ("curvature_window", 0),
        ("epsilon", 0.0),
    ],
)
def test_factory_names_the_argument_it_refuses(argument, value):
    arguments = {"smoothness": 1.0, argument: value}
    with pytest.raises(ValueError, match=rf"hdm_hb\({argument}=\.\.\.\)"):
        hdm_hb(**arguments)


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, complex), 1.0])
def test_init_names_the_leaf_it_refuses(leaf):
    with pytest.raises(ValueError, match=r"real floating arrays.*\['b'\]"):
        hdm_hb(1.0).init({"a": jnp.ones(2), "b": leaf})


@pytest.mark.parametrize("scaling", ["diagonal", "scalar"])
def test_eager_jit_and_scan_agree(scaling):
    rule, tree = hdm_hb(1.0, 1.0, 1.0, scaling=scaling), split(start())
    eager = jitted = (tree, rule.init(tree))
    jitted_update = jax.jit(lambda p, s: update(rule, split_loss, p, s))
    for _ in range(10):
        eager, jitted = update(rule, split_loss, *eager), jitted_update(*jitted)
    scanned = jax.tree.map(lambda a: a[-1], run(rule, split_loss, tree, 10))
    for other in (jitted, scanned):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15),
            eager,
            other,
        )


def test_is_traced_once():
    traces = []

    def counted(params, state):
        traces.append(None)
        return update(hdm_hb(1.0), quadratic_loss, params, state)

    carry, counted = (start(), hdm_hb(1.0).init(start())), jax.jit(counted)
    for _ in range(3):
        carry = counted(*carry)
    assert len(traces) == 1


def test_vmap_over_arguments_and_starts_equals_one_run_each():
    def final(eta, eta_b, x):
        return run(hdm_hb(1.0, eta, eta_b), quadratic_loss, x, 10)[0][-1]

    cells = [(1.0, 1.0, start()), (3.0, 5.0, start() + 1), (0.1, 0.0, start() * 2)]
    batched = jax.vmap(final)(*map(jnp.stack, zip(*cells, strict=True)))
    np.testing.assert_allclose(batched, [final(*cell) for cell in cells], rtol=1e-11)


@pytest.mark.parametrize("num_eager", [0, 1])
def test_donating_parameters_and_state_over_two_updates(num_eager):
    smoothness, rate = jnp.ones(()), jnp.ones(())
    rule = hdm_hb(smoothness, rate)
    params = split(start())
    grad = jax.grad(split_loss)(params)
    value = split_loss(params)
    point = {"value": value, "grad": grad, "value_fn": split_loss}

    state = rule.init(params)
    for _ in range(num_eager):  # eagerly, nothing copies what is passed through
        updates, state = rule.update(grad, state, params, **point)
        params = optax.apply_updates(params, updates)
    donating = jax.jit(
        lambda p, s: update(rule, split_loss, p, s), donate_argnums=(0, 1)
    )
    for _ in range(2):
        params, state = donating(params, state)
    assert state.count == num_eager + 2
    for mine in jax.tree.leaves((grad, value, smoothness, rate)):
        assert not mine.is_deleted()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("scaling", ["diagonal", "scalar"])
def test_update_keeps_tree_shapes_and_dtypes(dtype, scaling):
    rule, params = hdm_hb(1.0, scaling=scaling), split(start(dtype))
    state = rule.init(params)
    new_params, new_state = update(rule, split_loss, params, state)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    assert types((new_params, new_state)) == types((params, state))
    wide = jnp.promote_types(dtype, jnp.float32)
    for scalar in (state.scaling, state.momentum, state.smoothness, state.value):
        assert all(leaf.dtype == wide for leaf in jax.tree.leaves(scalar))


def test_float32_parameters_follow_the_double_run():
    rule = hdm_hb(1.0, 1.0, 1.0)
    single, states = run(rule, quadratic_loss, start(jnp.float32), 10)
    double, _ = run(rule, quadratic_loss, start(), 10)
    assert states.value.dtype == jnp.float32
    # Ten steps of a learning rule that divides by ‖g‖² amplify 6e-8 a little.
    np.testing.assert_allclose(single, double, rtol=1e-5, atol=1e-5)


def test_extra_arguments_reach_the_objective_that_names_them():
    def loss(x, shift):
        return quadratic_loss(x - shift)

    def anything(x, **extra):
        return loss(x, extra["shift"])

    def after_one_step(value_fn):
        rule = optax.chain(hdm_hb(1.0), optax.identity())
        state, params = rule.init(start()), start()
        value, grad = jax.value_and_grad(loss)(params, 2.0)
        point = {"value": value, "grad": grad, "value_fn": value_fn}
        extra = {"shift": 2.0, "meant_for_another": 1}
        return rule.update(grad, state, params, **point, **extra)[1][0].scaling

    expected = run(hdm_hb(1.0), quadratic_loss, start() - 2.0, 1)[1].scaling
    for value_fn in (loss, anything):
        np.testing.assert_allclose(after_one_step(value_fn), expected[0], rtol=1e-12)


def test_solves_a_full_batch_task_in_an_inner_loop():
    key_x, key_w, key_init, key_run = jax.random.split(jax.random.key(0), 4)
    inputs = jax.random.normal(key_x, (60, 4))
    weights = jax.random.normal(key_w, (4,))
    task = Task(
        init=lambda key: {"w": jax.random.normal(key, (4,)), "b": jnp.zeros(())},
        loss=lambda p, batch, key: jnp.mean(
            (batch[0] @ p["w"] + p["b"] - batch[1]) ** 2
        ),
        sample=lambda data, key: data,
        evaluate=lambda p, data: {},
    )
    loop = inner_loop(task, hdm_hb(4.0), observe=lambda s: s.progress)
    data, keys = (inputs, inputs @ weights + 0.5), jax.random.split(key_run, 150)
    state, infos = jax.jit(lambda s: unroll(loop, s, keys, data))(loop.init(key_init))
    assert isinstance(state.opt_state, HDMHBState)
    assert jnp.all(jnp.diff(infos.loss) <= 0)
    assert infos.loss[-1] < 1e-12
    np.testing.assert_allclose(state.params["w"], weights, atol=1e-5)


def test_gradient_through_a_run_equals_finite_differences():
    def final_loss(eta_b):
        # A coordinate whose gradient is exactly 0 has roots of 0 everywhere.
        loss = lambda x: quadratic_loss(x[:10]) + 0.0 * x[10]
        x = jnp.append(start(), 1.0)
        return quadratic_loss(run(hdm_hb(1.0, 1.0, eta_b), loss, x, 8)[0][-1][:10])

    step = 1e-6
    difference = (final_loss(0.3 + step) - final_loss(0.3 - step)) / (2 * step)
    assert abs(difference) > 1e-6
    # A central difference of step 1e-6 has errors of about 1e-9.
    np.testing.assert_allclose(
        jax.grad(final_loss)(0.3), difference, rtol=1e-5, atol=1e-8
    )


def gradients_to_solve(rule, loss, starts):
    """Per start, how many gradients until ‖g‖_∞ < 1e-4; 1001 if more than 1000."""

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        point = {"value": value, "grad": grad, "value_fn": loss}
        updates, state = rule.update(grad, state, params, **point)
        is_solved = jnp.max(jnp.abs(grad)) < 1e-4
        return (optax.apply_updates(params, updates), state), is_solved

    def count(w):
        solved = jax.lax.scan(step, (w, rule.init(w)), length=1000)[1]
        return jnp.where(jnp.any(solved), 1 + jnp.argmax(solved), 1001)

    return np.asarray(jax.jit(jax.vmap(count))(starts))


def test_solves_an_ill_conditioned_svm_where_gradient_descent_does_not():
    rows, task = census_like(), smoothed_svm(51)
    smoothness = np.linalg.norm(rows, 2) ** 2
    loss = lambda w: task.loss(w, jnp.asarray(rows), jax.random.key(0))
    starts = jax.vmap(task.init)(jax.random.split(jax.random.key(0), 20))
    # After some 30 iterations the path is chaotic: only the distribution counts.
    learnt = gradients_to_solve(hdm_hb(smoothness), loss, starts)
    plain = optax.with_extra_args_support(optax.sgd(1 / smoothness))
    # Minimum, quartiles and maximum when written: 436, 469, 500, 551, 673.
    distribution = np.percentile(learnt, [0, 25, 50, 75, 100])
    assert np.median(learnt) <= 700, distribution
    assert np.all(gradients_to_solve(plain, loss, starts) > 1000)
