"""One truncation: its objective written out again, and its derivative."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Task
from metax.amalgamation import LearnedOptimizer, distill, pool, rnnprop
from metax.amalgamation.truncation import (
    Optimizee,
    follow_teachers,
    scan_steps,
    student_objective,
)

K = 4


def network_loss(params, batch, key):
    del key
    x, y = batch
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["second"] - y) ** 2)


TASK = Task(
    init=lambda key: {
        "first": jax.random.normal(key, (2, 3)),
        "second": jax.random.normal(jax.random.fold_in(key, 1), (3,)),
    },
    loss=network_loss,
    # four of twelve rows, drawn anew at each step
    sample=lambda data, key: jax.tree.map(
        lambda leaf: jax.random.choice(key, leaf, (4,), axis=0), data
    ),
    evaluate=lambda params, data: {},
)


def examples():
    x = jax.random.normal(jax.random.key(3), (12, 2))
    return x, jnp.sin(2 * x[:, 0]) + x[:, 1]


@functools.cache
def student():
    return rnnprop(3, 1)


@functools.cache
def theta(seed=1):
    shapes = jax.eval_shape(student().init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.array(rng.normal(size=s.shape) / 2), shapes)


def optimizee(teachers, data, alpha=0.3):
    """In the middle of an unroll: student and teachers stand at different places."""
    key_params, key_scale, key_run, key_noise = jax.random.split(jax.random.key(5), 4)
    params = TASK.init(key_params)
    scale = jax.tree.map(
        lambda p: jnp.exp(jax.random.uniform(key_scale, p.shape, minval=-1)), params
    )
    apart = {n: jax.tree.map(lambda p, i=i: p + 0.1 * (i + 1), params)
             for i, n in enumerate(teachers)}  # fmt: skip
    states = {n: rule.init(apart[n]) for n, rule in teachers.items()}
    keys = jax.random.split(key_run, K)
    _, _, paths = follow_teachers(TASK, teachers, apart, states, keys, data)
    state = student().rule(theta()).init(params)
    return Optimizee(
        params, state, scale, keys, paths, key_noise, jnp.array([1, alpha])
    )


def written_out(weights, teachers, data, reduce, alpha=0.3, second_order=True):
    """The truncation in scaled coordinates, teachers alongside, nothing in a scan."""
    begin = optimizee(teachers, data, alpha)
    s = begin.scale
    times = lambda a, b: jax.tree.map(jnp.multiply, a, b)
    scaled = jax.tree.map(jnp.divide, begin.params, s)
    state, total = begin.student_state, 0.0
    apart = {n: jax.tree.map(lambda p, i=i: p + 0.1 * (i + 1), begin.params)
             for i, n in enumerate(teachers)}  # fmt: skip
    states = {n: rule.init(apart[n]) for n, rule in teachers.items()}
    rule = student().rule(weights)
    for key in begin.keys:
        batch = TASK.sample(data, jax.random.split(key)[0])
        loss_of = lambda at, batch=batch: network_loss(times(at, s), batch, None)
        loss, grad = jax.value_and_grad(loss_of)(scaled)
        grad = grad if second_order else jax.lax.stop_gradient(grad)
        first = network_loss(begin.params, batch, None)
        updates, state = rule.update(grad, state, scaled)
        scaled = optax.apply_updates(scaled, updates)
        total += jnp.log(loss + 1e-10) - jnp.log(first + 1e-10)
        far = []
        for name, teacher in teachers.items():
            grad = jax.grad(network_loss)(apart[name], batch, None)
            updates, states[name] = teacher.update(grad, states[name], apart[name])
            apart[name] = optax.apply_updates(apart[name], updates)
            there = jax.tree.map(jnp.divide, apart[name], s)
            gaps = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2) / 2, scaled, there)
            far.append(jnp.log(optax.tree.sum(gaps) + 1e-10) - jnp.log(9.0))
        total += alpha * reduce(jnp.stack(far)) if far else 0.0
    return total / K


@pytest.mark.parametrize(
    ("reduce", "second_order"), [(jnp.max, True), (jnp.mean, False)]
)
def test_objective_and_gradient_equal_the_formulas_written_out(reduce, second_order):
    """The teachers' separate scan changes nothing against a joint one."""
    reduced = {jnp.mean: distill.mean_loss, jnp.max: distill.minmax_loss}[reduce]
    objective = student_objective(TASK, student(), reduced, second_order=second_order)

    @jax.jit
    def both(weights, data):
        begin = optimizee(pool("small"), data)
        ours = jax.value_and_grad(lambda w: objective(w, begin, data)[0])(weights)
        plain = functools.partial(written_out, second_order=second_order)
        written = lambda w: plain(w, pool("small"), data, reduce)
        return ours, jax.value_and_grad(written)(weights)

    ours, written = both(theta(), examples())
    chex.assert_trees_all_close(ours, written, rtol=1e-9, atol=1e-12)


def test_distances_in_true_coordinates_leave_the_scale_out():
    objective = student_objective(
        TASK, student(), distill.mean_loss, scaled_distance=False
    )

    @jax.jit
    def run(weights, data):
        begin = optimizee({"sgd": optax.sgd(0.2)}, data)
        _, (after, measured) = objective(weights, begin, data)
        last = jax.tree.map(lambda leaf: leaf[-1], begin.trajectories["sgd"])
        return measured.distances[-1, 0], distill.log_distance(after.params, last)

    np.testing.assert_allclose(*run(theta(), examples()), rtol=1e-12)


@pytest.mark.slow
def test_remat_changes_the_gradient_by_rounding_only():
    narrow = lambda tree: optax.tree.cast(tree, jnp.float32)

    @jax.jit
    def gradients(weights, data):
        begin = optimizee(pool("small"), data)
        begin = begin._replace(
            params=narrow(begin.params),
            student_state=student().rule(weights).init(narrow(begin.params)),
            scale=narrow(begin.scale),
            trajectories=narrow(begin.trajectories),
            parts=narrow(begin.parts),
        )
        slope = lambda remat: jax.grad(
            lambda w: student_objective(
                TASK, student(), distill.minmax_loss, remat=remat
            )(w, begin, data)[0]
        )(weights)
        return [slope(remat) for remat in ("none", "step", "block")]

    none, step, block = gradients(narrow(theta()), narrow(examples()))
    assert none["output"]["w"].dtype == jnp.float32
    size = optax.tree.norm(none)
    for other in (step, block):
        assert optax.tree.norm(optax.tree.sub(none, other)) < 1e-6 * size


@pytest.mark.parametrize("num", [1, 4, 6, 7, 12])
@pytest.mark.parametrize("remat", ["none", "step", "block"])
def test_scan_steps_is_a_scan_for_any_length(num, remat):
    step = lambda carry, x: (jnp.sin(carry + x), (carry * x, x))
    xs = jnp.linspace(0.1, 1.0, num)
    run = lambda c: scan_steps(step, c, xs, remat)
    plain = lambda c: jax.lax.scan(step, c, xs)
    both = jax.jit(lambda c: [(f(c), jax.jacrev(f)(c)) for f in (run, plain)])
    chex.assert_trees_all_close(*both(0.3), rtol=1e-12)


def count(jaxpr, name):
    """How often a primitive stands in a program, bodies of scans and all."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


def convolution_loss(params, batch, key):
    del key
    out = jax.lax.conv(batch, params["kernel"], (1, 1), "VALID")
    return jnp.mean(jnp.tanh(out) ** 2)


CONVOLUTION = Task(
    init=lambda key: {"kernel": jax.random.normal(key, (2, 1, 3, 3))},
    loss=convolution_loss,
    sample=lambda data, key: data,
    evaluate=lambda params, data: {},
)


def truncated(teachers, forward_only=False, **options):
    """The objective of a truncation of `CONVOLUTION`, or it and its gradient."""

    def loss(weights, data):
        params = {"kernel": jnp.ones((2, 1, 3, 3))}
        states = {n: rule.init(params) for n, rule in teachers.items()}
        keys = jax.random.split(jax.random.key(0), 4)
        there = dict.fromkeys(teachers, params)
        run = follow_teachers(CONVOLUTION, teachers, there, states, keys, data)
        state = student().rule(weights).init(params)
        begin = Optimizee(params, state, params, keys, run[2], keys[0], jnp.ones(2))
        objective = student_objective(
            CONVOLUTION, student(), distill.mean_loss, **options
        )
        return objective(weights, begin, data)[0]

    run = loss if forward_only else jax.value_and_grad(loss)
    return jax.jit(run).trace(theta(), jnp.ones((1, 1, 5, 5)))


def convolutions(*args, **options):
    return count(truncated(*args, **options).jaxpr.jaxpr, "conv_general_dilated")


@pytest.mark.parametrize("remat", ["none", "step", "block"])
def test_backward_pass_holds_no_convolution_of_a_teacher(remat):
    gradient = jax.make_jaxpr(jax.grad(convolution_loss))(
        {"kernel": jnp.ones((2, 1, 3, 3))}, jnp.ones((1, 1, 5, 5)), None
    )
    # of two teachers: their gradients, forward, and nothing else
    theirs = 2 * count(gradient.jaxpr, "conv_general_dilated")
    assert theirs > 0
    small, how = pool("small"), {"remat": remat}
    assert convolutions(small, **how) - convolutions({}, **how) == theirs
    assert convolutions(small, True, **how) - convolutions({}, True, **how) == theirs
    # and the count does see what a derivative adds
    assert convolutions({}, **how) > convolutions({}, True, **how)


def test_a_step_computed_again_keeps_the_gradient_of_its_optimizee():
    def compiled(remat):
        text = truncated({}, remat=remat).lower().compile().as_text()
        return text.count(" convolution(")

    # the forward pass alone is repeated, not the one that makes the gradient of it
    assert compiled("step") == compiled("none") + 1


def downhill(rate):
    """A student of one weight w: it subtracts rate · w · gradient."""

    def rule(weights):
        init = lambda params: jnp.zeros((), jnp.int32)
        step = lambda g, state, params=None, **extra: (
            jax.tree.map(lambda g: -rate * weights["w"] * g, g),
            state + 1,
        )
        return optax.GradientTransformationExtraArgs(init, step)

    return LearnedOptimizer(lambda key: {"w": jnp.ones(())}, rule)


def scalar_task(loss):
    return Task(
        init=lambda key: jnp.ones(()),
        loss=lambda params, batch, key: loss(params),
        sample=lambda data, key: (),
        evaluate=lambda params, data: {},
    )


def scalar_run(task, learner, num, trajectories=None, **options):
    """Value and slope of the objective at w = 1, and what it shows."""

    @jax.jit
    def run(weights, keys, paths):
        state = learner.rule(weights).init(jnp.ones(()))
        begin = Optimizee(
            jnp.ones(()), state, jnp.ones(()), keys, paths, keys[0], jnp.ones(2)
        )
        objective = student_objective(task, learner, distill.mean_loss, **options)
        slope = jax.value_and_grad(lambda w: objective(w, begin, ()), has_aux=True)
        return slope(weights)

    keys = jax.random.split(jax.random.key(0), num)
    (loss, (after, measured)), slope = run(
        {"w": jnp.ones(())}, keys, trajectories or {}
    )
    return loss, after, measured, slope["w"]


def test_meta_loss_and_slope_of_gradient_descent_on_a_parabola_in_closed_form():
    """ln of the loss falls by 2 ln(1 - 2rw) a step: L = (K-1) ln(1 - 2rw)."""
    task, rate = scalar_task(jnp.square), 0.1
    loss, after, measured, slope = scalar_run(task, downhill(rate), K)
    np.testing.assert_allclose(loss, (K - 1) * np.log(1 - 2 * rate), rtol=1e-7)  # ε
    np.testing.assert_allclose(slope, (K - 1) * -2 * rate / (1 - 2 * rate), rtol=1e-7)
    np.testing.assert_allclose(measured.inner_losses, 0.8 ** (2 * np.arange(K)))
    np.testing.assert_allclose(after.params, 0.8**K)
    *_, first_order = scalar_run(task, downhill(rate), K, second_order=False)
    # θ_i = 1 - w Σ r g, so d ln θ²/dw is -2 Σ r g / θ with the g of the path
    sums = np.cumsum(np.concatenate([[0], 2 * rate * 0.8 ** np.arange(K - 1)]))
    expected = np.mean(-2 * sums / 0.8 ** np.arange(K))
    np.testing.assert_allclose(first_order, expected, rtol=1e-7)


def test_last_update_is_learned_from_the_imitation_alone():
    """The loss of a step is taken before its update, the distance after it."""
    task = scalar_task(jnp.square)
    loss, _, measured, slope = scalar_run(task, downhill(0.1), 1)
    assert loss == slope == 0
    path = {"there": jnp.array([0.5])}
    _, _, measured, slope = scalar_run(task, downhill(0.1), 1, path)
    np.testing.assert_allclose(measured.distances, [[np.log(0.5 * 0.3**2 + 1e-10)]])
    np.testing.assert_allclose(slope, 2 / 0.3 * -0.2, rtol=1e-7)


@pytest.mark.parametrize("at", ["loss", "update"])
def test_what_is_not_finite_stops_the_truncation_and_later_terms_count_zero(at):
    """Up to the third step all is as it would be; there the student stands still."""
    bad = lambda count: jnp.where(count >= 3, jnp.inf, 1.0)

    def rule(weights):
        init = lambda params: jnp.zeros((), jnp.int32)
        step = lambda g, count, params=None, **extra: (
            -0.1 * weights["w"] * g * bad(count + 1), count + 1)  # fmt: skip
        return optax.GradientTransformationExtraArgs(init, step)

    learner = LearnedOptimizer(lambda key: {"w": jnp.ones(())}, rule)
    task = scalar_task(jnp.square)
    if at == "loss":
        learner = downhill(0.1)
        task = scalar_task(lambda p: jnp.where(p < 0.7, jnp.nan, 1.0) * p**2)
    path = {"there": jnp.zeros(6)}
    loss, after, measured, _ = scalar_run(task, learner, 6, path)
    # updates made: two; the loss at the third parameters is not finite, or the third
    # update is
    np.testing.assert_allclose(after.params, 0.8**2)
    seen = 3 if at == "update" else 2
    terms = 2 * np.log(0.8) * np.arange(seen)
    np.testing.assert_allclose(measured.meta_loss, terms.sum() / 6, rtol=1e-7)
    np.testing.assert_array_equal(measured.counted, [True] * 2 + [False] * 4)
    assert not measured.distances[2:].any()
    assert np.isfinite(loss)


def test_first_term_is_zero_and_a_student_that_stands_still_gains_nothing():
    standing = jax.tree.map(jnp.zeros_like, theta())
    objective = student_objective(TASK, student(), distill.mean_loss)

    @jax.jit
    def run(weights, data):
        begin = optimizee({}, data)
        loss, (_, measured) = objective(weights, begin, data)
        one = begin._replace(keys=begin.keys[:1])
        return loss, measured.meta_loss, objective(weights, one, data)[0]

    # the losses of start and step come from two programs, which may round apart
    loss, meta, _ = run(standing, examples())
    assert loss == meta
    assert abs(loss) < 1e-15
    assert abs(run(theta(), examples())[2]) < 1e-15


def test_noise_on_the_gradient_has_the_standard_deviation_asked_for():
    line = scalar_task(lambda p: p)  # gradient 1, so the parameter walks by 1 + noise
    _, after, *_ = scalar_run(line, downhill(1e-4), 1000, input_noise=0.5)
    np.testing.assert_allclose(1 - after.params, 0.1, atol=4 * 1e-4 * 0.5 * 1000**0.5)
    assert abs(1 - after.params - 0.1) > 1e-6
    _, quiet, *_ = scalar_run(line, downhill(1e-4), 1000)
    np.testing.assert_allclose(quiet.params, 0.9, rtol=1e-12)
