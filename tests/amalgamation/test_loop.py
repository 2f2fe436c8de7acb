"""Amalgamation as a loop: its meta-gradient, its restarts, what teachers do and see."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Task, inner_loop, unroll
from metax.amalgamation import (
    amalgamate,
    distill,
    l2l,
    perturb,
    pool,
    release_settings,
    rnnprop,
)
from metax.amalgamation.perturb import Perturbation
from metax.amalgamation.restarts import draw_scale, restarts
from tests.amalgamation import toys

K = 5
PARABOLA = toys.plain_task(lambda x: 0.5 * x**2)
# optimizees that differ, and data that can be spoiled
DRAWN = PARABOLA._replace(
    init=lambda key: jax.random.normal(key, (2,)),
    loss=lambda params, batch, key: 0.5 * jnp.sum(params**2) * batch,
    sample=lambda data, key: data,
)
SGD = {"sgd": optax.sgd(0.2)}


def build(task, student, teachers, **options):
    lengths = {"truncation_length": K, "unroll_length": 2 * K, "warmup_steps": 2}
    return amalgamate(task, student, teachers, **{**lengths, **options})


def begun(loop, data, seed=0, num=1):
    """The state after some truncations."""

    @jax.jit
    def run(key, data):
        key_init, key_run = jax.random.split(key)
        return unroll(loop, loop.init(key_init), jax.random.split(key_run, num), data)

    return run(jax.random.key(seed), data)


def random_like(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), tree)


def shifted(state, direction, step):
    move = lambda w, d: w + step * d
    return state._replace(theta=jax.tree.map(move, state.theta, direction))


@functools.cache
def meta_gradients(teachers, reduce, second_order=True):
    """Along one direction: of the second truncation of an unroll, and by differences.

    With SGD of rate 1 the gradient is what the weights lost.
    """
    loop = build(
        toys.network(4), rnnprop(3, 1), pool("small") if teachers else {},
        reduce=reduce, num_tasks=2, second_order=second_order, random_scale=1.0,
        meta_optimizer=optax.sgd(1.0), imitation_weight=0.3,
    )  # fmt: skip
    data, key = toys.rows(), jax.random.key(9)
    step = jax.jit(loop.step)
    state = jax.jit(loop.init)(key)
    # the first truncation; random weights, since those of `init` move little
    state = state._replace(theta=optax.tree.scale(0.5, random_like(state.theta)))
    # and back to them, so that first and second order are compared at one place
    state = step(state, jax.random.key(8), data)[0]._replace(theta=state.theta)
    direction = random_like(state.theta, 2)
    after, info = step(state, key, data)
    assert info.is_finite
    assert not info.restarted
    gradient = optax.tree.sub(state.theta, after.theta)
    loss = lambda h: float(step(shifted(state, direction, h), key, data)[1].loss)
    near, far = ((loss(h) - loss(-h)) / (2 * h) for h in (1e-4, 2e-4))
    return float(optax.tree.vdot(gradient, direction)), (4 * near - far) / 3


@pytest.mark.parametrize(
    ("teachers", "reduce"),
    [
        (False, "mean"),
        pytest.param(True, "mean", marks=pytest.mark.slow),
        (True, "minmax"),
    ],
)
def test_meta_gradient_equals_finite_differences(teachers, reduce):
    """Of the second truncation: what came before is a constant to it."""
    along, difference = meta_gradients(teachers, reduce)
    np.testing.assert_allclose(along, difference, rtol=1e-6)


def test_a_first_order_gradient_is_another_one():
    along, difference = meta_gradients(False, "mean", second_order=False)
    assert abs(along / difference - 1) > 1e-3
    # the loss is the same: only its derivative is cut
    np.testing.assert_allclose(difference, meta_gradients(False, "mean")[1], rtol=1e-6)


@pytest.mark.slow
def test_several_tasks_give_the_mean_of_single_ones():
    options = {"meta_optimizer": optax.sgd(1.0), "imitation_weight": 0.3}
    several, single = (
        build(toys.network(), toys.descent(-3.0, 0.1), pool("small"), num_tasks=n,
              reduce="minmax", **options)
        for n in (3, 1)
    )  # fmt: skip
    data = toys.rows()  # every step sees all of it, so keys make no difference
    state, _ = begun(several, data)
    step = jax.jit(single.step)
    together, info = jax.jit(several.step)(state, jax.random.key(1), data)
    alone = []
    for i in range(3):
        cut = lambda tree, i=i: jax.tree.map(lambda x: x[i : i + 1], tree)
        one = state._replace(
            **{name: cut(getattr(state, name)) for name in
               ("params", "student_state", "teacher_params", "teacher_states", "scale")}
        )  # fmt: skip
        alone.append(step(one, jax.random.key(1), data))
    mean = lambda *leaves: jnp.mean(jnp.stack(leaves), 0)
    thetas, losses = [s.theta for s, _ in alone], [i.loss for _, i in alone]
    chex.assert_trees_all_close(together.theta, jax.tree.map(mean, *thetas), rtol=1e-9)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-9)
    join = lambda *leaves: jnp.concatenate(leaves)
    params = jax.tree.map(join, *[s.params for s, _ in alone])
    chex.assert_trees_all_close(together.params, params, rtol=1e-9)
    steps = {n: sum(int(i.farthest[n]) for _, i in alone) for n in info.farthest}
    assert steps == {name: int(times) for name, times in info.farthest.items()}
    assert sum(steps.values()) == 3 * K


@pytest.mark.parametrize("truncations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_teachers_depend_on_neither_student_nor_scale(truncations):
    """Bit for bit under other weights; the scale compiles to another program."""
    data, key = toys.rows(), jax.random.key(2)

    @functools.cache
    def teachers(random_scale):
        options = {"random_scale": random_scale, "meta_optimizer": optax.sgd(1.0)}
        loop = build(toys.network(4), toys.descent(), pool("small"), **options)

        @jax.jit
        def run(log_rate, data):
            state = loop.init(key)
            theta = {**state.theta, "log_rate": log_rate}
            keys = jax.random.split(key, truncations)
            state, infos = unroll(loop, state._replace(theta=theta), keys, data)
            return state.params, state.teacher_params, infos.inner_losses[0, 0]

        return run

    slow, fast = (teachers(0.0)(rate, data) for rate in (-3.0, -2.0))
    chex.assert_trees_all_equal(slow[1], fast[1])
    assert jnp.abs(slow[0]["first"] - fast[0]["first"]).max() > 1e-3
    scaled = teachers(1.0)(-3.0, data)
    chex.assert_trees_all_close(slow[1], scaled[1], rtol=1e-5)
    assert jnp.abs(slow[0]["first"] - scaled[0]["first"]).max() > 1e-3
    np.testing.assert_allclose(slow[2], scaled[2], rtol=1e-12)


@pytest.mark.slow
def test_coordinates_of_the_distance_agree_without_a_scale():
    run = lambda **options: begun(build(DRAWN, toys.descent(), SGD, **options), 1.0)
    loss = lambda **options: run(**options)[1].imitation_loss
    same = [loss(random_scale=0.0, distance_coordinates=c) for c in ("scaled", "true")]
    np.testing.assert_allclose(*same, rtol=1e-9)
    other = [loss(random_scale=1.0, distance_coordinates=c) for c in ("scaled", "true")]
    assert np.abs(other[0] - other[1]) > 1e-3


@pytest.mark.slow
def test_teachers_go_on_along_their_own_trajectories_until_the_restart():
    """Never set back to the student, their moments carried over the boundaries."""
    task, data = toys.network(), toys.rows()
    teachers = pool("large")
    loop = build(task, toys.descent(), teachers, unroll_length=3 * K, warmup_steps=0)

    @jax.jit
    def run(key, data):
        state, infos = unroll(loop, loop.init(key), jax.random.split(key, 3), data)
        first, _ = loop.step(loop.init(key), jax.random.split(key, 3)[0], data)
        return state, infos, first

    state, infos, first = run(jax.random.key(0), data)
    np.testing.assert_array_equal(infos.restarted, [True, False, False])

    @jax.jit
    def alone(params, states, num, data):
        inner = {n: inner_loop(task, rule) for n, rule in teachers.items()}
        start = {n: inner[n].init(num)._replace(params=params[n], opt_state=states[n])
                 for n in inner}  # fmt: skip
        keys = jax.random.split(num, 2 * K)
        return {n: unroll(inner[n], start[n], keys, data)[0].params for n in inner}

    cut = lambda tree: jax.tree.map(lambda x: x[0], tree)
    theirs = alone(cut(first.teacher_params), cut(first.teacher_states),
                   jax.random.key(1), data)  # fmt: skip
    chex.assert_trees_all_close(cut(state.teacher_params), theirs, rtol=1e-9)


def test_optimizees_restart_when_their_unroll_is_over():
    loop = build(DRAWN, toys.descent(), SGD, num_tasks=2)

    @jax.jit
    def run(key, data):
        def step(state, key):
            new, info = loop.step(state, key, data)
            return new, (new, info)

        start = loop.init(key)
        return start, jax.lax.scan(step, start, jax.random.split(key, 4))[1]

    start, (states, infos) = run(jax.random.key(0), 1.0)
    assert start.inner_step >= start.unroll_length
    np.testing.assert_array_equal(infos.restarted, [True, False, True, False])
    np.testing.assert_array_equal(states.inner_step, [K, 2 * K, K, 2 * K])
    np.testing.assert_array_equal(states.count, [1, 2, 3, 4])
    # count: the rule's steps since the restart, two of them warm-up
    np.testing.assert_array_equal(states.student_state[:, 0], [K + 2, 2 * K + 2] * 2)
    same = np.all(np.equal(states.scale[1:], states.scale[:-1]),
                  axis=(1, 2))  # fmt: skip
    np.testing.assert_array_equal(same, [True, False, True])
    assert np.abs(states.params[0, 0] - states.params[0, 1]).min() > 0


def warmed(student, *, scaled=False, random_scale=1.0, rate=0.01, steps=3):
    """One optimizee after its warm-up, and before it."""
    _, draw_anew = restarts(
        toys.network(), student, pool("small"), random_scale=random_scale,
        warmup_steps=steps, warmup_learning_rate=rate, scaled_warmup=scaled,
    )  # fmt: skip

    @jax.jit
    def run(key, data):
        theta = student.init(key)
        begin = restarts(
            toys.network(), student, {}, random_scale=random_scale, warmup_steps=0,
            warmup_learning_rate=rate, scaled_warmup=scaled,
        )[0](theta, jax.random.split(key)[0])  # fmt: skip
        return begin, draw_anew(theta, key, data)

    return run(jax.random.key(0), toys.rows())


def test_warmup_is_plain_sgd_in_true_coordinates_whatever_the_scale():
    """The release's is not: see the departures below."""
    begin, after = warmed(toys.descent())
    params = begin.params
    for _ in range(3):
        grad = jax.grad(toys.network().loss)(params, toys.rows(), None)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grad)
    chex.assert_trees_all_close(after.params, params, rtol=1e-9)
    plain = warmed(toys.descent(), random_scale=0.0)[1]
    chex.assert_trees_all_close(after.params, plain.params, rtol=1e-12)
    for teacher in after.teacher_params.values():
        chex.assert_trees_all_equal(teacher, after.params)


@pytest.mark.parametrize("make", [rnnprop, l2l])
def test_warmup_advances_counts_and_moments_and_recurrent_states_rest(make):
    """In the release those of L2L move. Teachers' moments know the warm-up too."""
    _, after = warmed(make(2, 1))
    assert after.student_state.count == 3
    assert not any(leaf.any() for leaf in jax.tree.leaves(after.student_state.carries))
    for name in ("adam", "rmsprop"):
        nu = optax.tree.get(after.teacher_states[name], "nu")
        assert all(leaf.all() for leaf in jax.tree.leaves(nu))
    if make is rnnprop:
        assert all(leaf.all() for leaf in jax.tree.leaves(after.student_state.mu))


def test_teachers_see_the_objective_in_warmup_and_after_it():
    def update(grads, state, params, *, value, grad, value_fn, **extra):
        return jax.tree.map(jnp.negative, grads), state + value_fn(params) - value

    watcher = optax.GradientTransformationExtraArgs(lambda p: jnp.zeros(()), update)
    loop = build(PARABOLA, toys.walking(), {"watcher": watcher})
    state, _ = begun(loop, ())
    assert state.teacher_states["watcher"].tolist() == [0.0]


def test_release_warms_up_in_scaled_coordinates():
    """That is at a rate of lr s² in true ones, sinh(6)/6 = 33.6 lr in the mean."""
    assert release_settings()["warmup_coordinates"] == "scaled"
    begin, after = warmed(toys.descent(), scaled=True, steps=1)
    grad = jax.grad(toys.network().loss)(begin.params, toys.rows(), None)
    rate = jax.tree.map(lambda s: 0.01 * s**2, after.scale)
    moved = jax.tree.map(lambda p, r, g: p - r * g, begin.params, rate, grad)
    chex.assert_trees_all_close(after.params, moved, rtol=1e-9)
    scale = jax.jit(lambda key: draw_scale(jnp.zeros(400_000), 3.0, key))
    drawn = scale(jax.random.key(0))
    # standard error of the mean: √(sinh(12)/12 - 33.6²)/√n = 0.13
    np.testing.assert_allclose(jnp.mean(drawn**2), np.sinh(6) / 6, atol=0.5)
    assert np.exp(-3) <= drawn.min() < drawn.max() <= np.exp(3)


def test_release_warms_up_at_five_times_the_rate():
    assert release_settings()["warmup_learning_rate"] == 0.05
    rate = lambda **options: begun(
        amalgamate(PARABOLA, toys.walking(0.0), {}, truncation_length=1,
                   unroll_length=1, warmup_steps=1, **options), ()
    )[0].params  # fmt: skip
    np.testing.assert_allclose(rate(), 1 - 0.01, rtol=1e-9)
    np.testing.assert_allclose(rate(warmup_learning_rate=0.05), 1 - 0.05, rtol=1e-9)


def test_release_measures_distances_in_scaled_coordinates_and_so_do_we():
    assert release_settings()["distance_coordinates"] == "scaled"
    build(toys.network(), toys.descent(), SGD, **release_settings())
    run = lambda **options: begun(
        amalgamate(PARABOLA, toys.walking(0.0), {"sgd": optax.sgd(0.5)},
                   truncation_length=1, unroll_length=1, warmup_steps=0, **options), ()
    )  # fmt: skip
    # the student stays at 1, the teacher goes to ½
    state, info = run()
    expected = np.log(0.5 * (0.5 / state.scale[0]) ** 2 + 1e-10)
    np.testing.assert_allclose(info.distances["sgd"], expected, rtol=1e-9)
    _, info = run(distance_coordinates="true")
    np.testing.assert_allclose(info.distances["sgd"], np.log(0.125 + 1e-10), rtol=1e-9)


@pytest.mark.parametrize("every", ["step", "truncation"])
def test_release_draws_noise_at_every_step_where_we_draw_once(every):
    """Of a student whose step is its weight, the steps show the weights."""
    loop = amalgamate(
        toys.plain_task(lambda x: x, 10.0), toys.walking(), {}, truncation_length=K,
        unroll_length=K, warmup_steps=0, random_scale=0.0,
        perturbation=perturb.gaussian(0.1, every=every),
    )  # fmt: skip
    infos = begun(loop, (), num=2)[1]
    steps = -np.diff(infos.inner_losses, axis=1)
    assert np.abs(steps - 1).min() > 1e-4
    different = {"step": 2 * (K - 1), "truncation": 2}[every]
    assert len(np.unique(np.round(steps, 9))) == different


def test_farthest_counts_the_steps_of_each_teacher():
    """A student that stands still; the distances by hand."""
    task, data = toys.network(), toys.rows()
    # the first is far ahead, and then the second overtakes it
    teachers = {"zoom": optax.sgd(optax.linear_schedule(0.05, 0.0, 3)),
                "steady": optax.sgd(0.04)}  # fmt: skip
    loop = amalgamate(
        task, toys.walking(0.0), teachers, reduce="minmax", truncation_length=10,
        unroll_length=10, num_tasks=2, warmup_steps=0, random_scale=0.0,
    )  # fmt: skip
    state, infos = begun(loop, data)

    @jax.jit
    def by_hand(params, data):
        far = []
        for rule in teachers.values():
            inner = inner_loop(task, rule)
            start = inner.init(jax.random.key(0))._replace(params=params)
            step = lambda s, k, inner=inner: (inner.step(s, k, data)[0],) * 2
            _, path = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 10))
            to = lambda p: distill.log_distance(params, p)
            far.append(jax.vmap(to)(path.params))
        return jnp.stack(far, -1)

    far = jax.vmap(by_hand, (0, None))(state.params, data)
    counts = np.bincount(np.argmax(far, -1).ravel(), minlength=2)
    assert counts.min() > 0
    assert [int(infos.farthest[n][0]) for n in teachers] == counts.tolist()
    np.testing.assert_allclose(infos.imitation_loss[0], far.max(-1).mean(), rtol=1e-9)
    for i, name in enumerate(teachers):
        np.testing.assert_allclose(infos.distances[name][0], far[..., i].mean(), 1e-9)


def test_floor_share_counts_distances_next_to_the_least_possible():
    """A teacher that stands with the student, and one that walks away from it."""
    teachers = {"still": optax.set_to_zero(), "gone": optax.sgd(0.1)}
    loop = amalgamate(PARABOLA, toys.walking(0.0), teachers, truncation_length=4,
                      unroll_length=4, warmup_steps=0)  # fmt: skip
    info = begun(loop, ())[1]
    assert info.floor_share == 0.5
    np.testing.assert_allclose(info.distances["still"], np.log(1e-10), rtol=1e-9)


def test_loss_is_the_sum_of_its_parts():
    loop = build(DRAWN, toys.descent(), pool("small"), imitation_weight=0.25,
                 reduce="softmax")  # fmt: skip
    info = begun(loop, 1.0, num=2)[1]
    total = info.meta_loss + 0.25 * info.imitation_loss
    np.testing.assert_allclose(info.loss, total, rtol=1e-12)


def test_switch_trains_on_one_part_alone_with_the_weight_as_probability():
    loop = amalgamate(PARABOLA, toys.descent(), SGD, combine="switch",
                      imitation_weight=0.25, truncation_length=2, unroll_length=4,
                      warmup_steps=1)  # fmt: skip
    info = begun(loop, (), num=400)[1]
    imitated = np.isclose(info.loss, info.imitation_loss, rtol=1e-12)
    improved = np.isclose(info.loss, info.meta_loss, rtol=1e-12)
    assert (imitated ^ improved).all()
    assert abs(imitated.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)


def test_gradient_is_taken_at_the_perturbed_weights_and_applied_to_the_plain_ones():
    away = Perturbation(
        lambda theta, key, slope: jax.tree.map(lambda w: w + 0.3, theta)
    )
    make = functools.partial(
        build, DRAWN, toys.descent(), SGD, meta_optimizer=optax.sgd(1.0)
    )
    plain, perturbed = make(), make(perturbation=away)
    state, _ = begun(plain, 1.0)
    key, there = jax.random.key(1), shifted(state, {"log_rate": 1, "decay": 1}, 0.3)
    moved, info = jax.jit(perturbed.step)(state, key, 1.0)
    expected, seen = jax.jit(plain.step)(there, key, 1.0)
    np.testing.assert_allclose(info.loss, seen.loss, rtol=1e-9)
    change = lambda a, b: optax.tree.sub(a.theta, b.theta)
    chex.assert_trees_all_close(
        change(moved, state), change(expected, there), rtol=1e-7
    )


@pytest.mark.slow
def test_adversarial_noise_raises_the_loss_and_without_steps_is_none():
    make = functools.partial(
        build, toys.network(4), rnnprop(2, 1), {}, second_order=False
    )
    loops = [make(), make(perturbation=perturb.adversarial(1e-3)),
             make(perturbation=perturb.adversarial(1e-3, steps=0))]  # fmt: skip

    @jax.jit
    def losses(keys, data):
        def one(key):
            key_init, key_step = jax.random.split(key)
            start = loops[0].init(key_init)
            return [loop.step(start, key_step, data)[1].loss for loop in loops]

        return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(0), 10)
    plain, attacked, unmoved = losses(keys, toys.rows())
    assert (attacked > plain).sum() >= 9
    np.testing.assert_allclose(unmoved, plain, rtol=1e-12)


def test_a_truncation_that_is_not_finite_moves_no_weight_and_ends_the_unroll():
    loop = build(DRAWN, toys.descent(), SGD, unroll_length=10 * K)
    data = jnp.ones(())
    state, _ = begun(loop, data)
    step = jax.jit(loop.step)
    poisoned, info = step(state, jax.random.key(1), data * jnp.nan)
    assert not info.is_finite
    chex.assert_trees_all_equal(poisoned.theta, state.theta)
    chex.assert_trees_all_equal(poisoned.meta_state, state.meta_state)
    assert poisoned.count == state.count + 1
    healed, info = step(poisoned, jax.random.key(2), data)
    assert info.restarted
    assert info.is_finite
    chex.assert_tree_all_finite(healed.teacher_params)
    assert jnp.abs(healed.theta["log_rate"] - state.theta["log_rate"]) > 0


class Counted(NamedTuple):
    weight: jax.Array
    seen: jax.Array


def test_statistics_are_carried_in_warmup_by_student_and_by_teachers():
    carry = lambda new, old, batch, key: new._replace(seen=old.seen + 1)
    task = Task(
        init=lambda key: Counted(jnp.ones(()), jnp.zeros(())),
        loss=lambda p, batch, key: p.weight**2 + 0 * jax.lax.stop_gradient(p.seen),
        sample=lambda data, key: (),
        evaluate=lambda params, data: {},
        carry=carry,
    )
    state, _ = begun(build(task, toys.descent(), SGD), ())
    for params in (state.params, state.teacher_params["sgd"]):
        np.testing.assert_array_equal(params.seen, [2 + K])


def test_nothing_flows_back_over_a_truncation():
    loop = build(DRAWN, toys.descent(), SGD)
    key, data = jax.random.key(1), 1.0
    state, _ = begun(loop, data)

    @jax.jit
    def slopes(state, data):
        def second(theta, params):
            first, _ = loop.step(state._replace(theta=theta, params=params), key, data)
            return loop.step(first, key, data)[1].loss

        return jax.grad(second, (0, 1))(state.theta, state.params)

    state = state._replace(unroll_length=jnp.int32(100))
    assert not any(leaf.any() for leaf in jax.tree.leaves(slopes(state, data)))


def test_meta_gradient_of_a_truncation_is_that_from_a_state_that_was_loaded():
    loop = build(DRAWN, toys.descent(), SGD)
    state, _ = begun(loop, 1.0)
    step = jax.jit(loop.step)
    loaded = jax.tree.map(lambda x: jnp.array(np.array(x)), state)
    pair = [step(s, jax.random.key(1), 1.0) for s in (state, loaded)]
    chex.assert_trees_all_equal(*pair)


def test_first_meta_update_is_one_of_adam_after_clipping():
    """Adam's first step is its rate times the sign, however much was clipped."""
    loop = build(DRAWN, toys.descent(), SGD)
    key, data = jax.random.key(0), 1.0
    start = jax.jit(loop.init)(key)
    state, info = jax.jit(loop.step)(start, key, data)
    change = optax.tree.sub(state.theta, start.theta)
    for leaf in jax.tree.leaves(change):
        np.testing.assert_allclose(np.abs(leaf), 1e-3, rtol=1e-3)
    assert info.gradient_norm > 0


def test_clipped_share_is_by_the_weights_before_the_update():
    """A step of 1 from weights of 10: after it the bound would be another."""
    make = lambda rate: build(
        DRAWN, toys.descent(), SGD, meta_optimizer=optax.sgd(rate)
    )
    state = jax.jit(make(1.0).init)(jax.random.key(0))
    run = lambda rate: jax.jit(make(rate).step)(state, jax.random.key(1), 1.0)
    moved, info = run(1e-9)
    gradient = jax.tree.map(lambda a, b: (a - b) / 1e-9, state.theta, moved.theta)
    long = [
        abs(g) > 0.1 * max(abs(w), 1e-3)
        for g, w in zip(*map(jax.tree.leaves, (gradient, state.theta)), strict=True)
    ]
    np.testing.assert_allclose(info.clipped_share, np.mean(long))
    # a meta-optimizer that moves far changes nothing about the gradient that was
    np.testing.assert_allclose(run(1e6)[1].clipped_share, np.mean(long))


def test_state_may_be_donated_and_no_leaf_stands_twice():
    loop = build(
        toys.network(), rnnprop(2), pool("small"), num_tasks=2, estimator="pes"
    )
    state = loop.init(jax.random.key(0))
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)


def adam_on_the_rate(rate):
    """The other weight of `toys.descent` stays, and with it one over it finite."""
    fixed = optax.masked(optax.set_to_zero(), {"log_rate": False, "decay": True})
    return optax.chain(fixed, optax.adam(rate))


def test_training_teaches_a_rate():
    """Plain meta-learning of SGD's rate: the loss of an unroll falls."""
    loop = amalgamate(
        toys.plain_task(lambda x: 0.1 + x**2), toys.descent(-4.0), {},
        truncation_length=4, unroll_length=4, warmup_steps=0, random_scale=0.0,
        meta_optimizer=adam_on_the_rate(0.05),
    )  # fmt: skip
    state, infos = begun(loop, (), num=40)
    assert infos.meta_loss[-1] < infos.meta_loss[0] - 0.3
    assert state.theta["log_rate"] > -2.5


@pytest.mark.slow
def test_a_student_takes_after_its_teacher():
    """Imitation alone: SGD's rate becomes the teacher's, from either side."""
    for begin in (-1.0, -3.0):
        loop = amalgamate(
            PARABOLA, toys.descent(begin), {"sgd": optax.sgd(np.exp(-2.0))},
            combine="switch", imitation_weight=1.0, truncation_length=4,
            unroll_length=4, warmup_steps=0, random_scale=0.0,
            meta_optimizer=adam_on_the_rate(optax.exponential_decay(0.1, 20, 0.5)),
        )  # fmt: skip
        state, infos = begun(loop, (), num=200)
        # Adam moves little after a close pass, where the slope of the log is steep
        np.testing.assert_allclose(state.theta["log_rate"], -2.0, atol=0.2)
        assert infos.distances["sgd"][-1] < infos.distances["sgd"][0] - 2


def test_a_raw_key_is_refused():
    loop = build(PARABOLA, toys.descent(), {})
    with pytest.raises(ValueError, match=r"amalgamate\(...\).init\(key=...\)"):
        loop.init(jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match=r"amalgamate\(...\).step\(key=...\)"):
        loop.step(None, jnp.zeros(2, jnp.uint32), ())
