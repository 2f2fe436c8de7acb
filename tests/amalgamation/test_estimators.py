"""Reverse mode and evolution strategies: what each of them estimates."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import unroll
from metax.amalgamation import amalgamate
from metax.amalgamation.estimators import Carry, bptt, es, over_tasks, pes, pes_start
from tests.amalgamation import toys

K, TRUNCATIONS, TASKS = 2, 5, 40_000
FLOOR = 0.1  # of the loss: what was gained early cannot be gained again


def loss(x):
    return FLOOR + x**2


def whole_unroll(theta):
    """The sum of L_meta over all truncations as one function of the weights."""
    x, t, total = 1.0, 0, 0.0
    for _ in range(TRUNCATIONS):
        first = loss(x)
        for _ in range(K):
            total += (jnp.log(loss(x)) - jnp.log(first)) / K
            x -= jnp.exp(theta["log_rate"]) / (1 + theta["decay"] * t) * 2 * x
            t += 1
    return total


def summed_gradient(estimator, num_tasks):
    """Of all truncations of one unroll, the weights staying where they are."""
    loop = amalgamate(
        toys.plain_task(loss),
        toys.descent(-2.0, 0.1),
        {},
        truncation_length=K,
        unroll_length=K * TRUNCATIONS,
        num_tasks=num_tasks,
        warmup_steps=0,
        random_scale=0.0,
        estimator=estimator,
        es_std=0.01,
        meta_optimizer=toys.keep_gradients(),
    )
    keys = jax.random.split(jax.random.key(1), TRUNCATIONS)
    state, infos = jax.jit(lambda key, keys: unroll(loop, loop.init(key), keys, ()))(
        jax.random.key(0), keys
    )
    assert infos.is_finite.all()
    return state.meta_state


def test_pes_sees_the_whole_unroll_where_truncated_reverse_mode_is_wrong():
    at = {"log_rate": jnp.array(-2.0), "decay": jnp.array(0.1)}
    true = jax.jit(jax.grad(whole_unroll))(at)
    relative = lambda estimate: jax.tree.map(
        lambda e, t: abs(e / t - 1), estimate, true
    )
    unbiased = relative(summed_gradient("pes", TASKS))
    assert max(unbiased.values()) < 0.05  # sampling: about 0.01
    for blind in (("bptt", 1), ("es", TASKS)):
        assert min(relative(summed_gradient(*blind)).values()) > 0.3


class Walker(NamedTuple):
    params: jax.Array
    student_state: jax.Array


def curve(theta, walker):
    """One truncation: a smooth loss that remembers the weights by its parameter."""
    params = walker.params + jnp.sin(theta["w"]).sum()
    loss = jnp.cos(params) + theta["w"][0] * theta["w"][1]
    after = Walker(params, walker.student_state + 1)
    return loss, (after, {"loss": loss, "fine": jnp.isfinite(loss)})


THETA = {"w": jnp.array([0.3, -0.5])}


def walkers(num):
    return Walker(jnp.linspace(0.0, 1.0, num), jnp.zeros(num, jnp.int32))


def test_bptt_is_the_gradient_of_the_mean_over_tasks():
    @jax.jit
    def run(theta):
        carry = Carry(walkers(3), ())
        mean = lambda theta: jnp.mean(
            jnp.stack([curve(theta, Walker(p, 0))[0] for p in jnp.linspace(0, 1.0, 3)])
        )
        return bptt(curve, theta, carry, jax.random.key(0)), jax.value_and_grad(mean)(
            theta
        )

    (gradient, carry, (loss, measured)), (value, slope) = run(THETA)
    chex.assert_trees_all_close(gradient, slope, rtol=1e-12)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert measured["loss"].shape == (3,)
    np.testing.assert_array_equal(carry.optimizees.student_state, 1)


def test_es_estimates_the_gradient_of_the_truncation():
    num = 100_000

    @jax.jit
    def run(theta):
        carry = Carry(walkers(num), ())
        key = jax.random.key(0)
        return es(0.01)(curve, theta, carry, key), bptt(curve, theta, carry, key)

    (estimate, _, (loss, _)), (slope, _, (plain, _)) = run(THETA)
    # two coordinates, N tasks: relative error √(2/N), and σ² of smoothing
    distance = jnp.linalg.norm(estimate["w"] - slope["w"])
    assert 0 < distance < 4 * np.sqrt(2 / num) * jnp.linalg.norm(slope["w"])
    np.testing.assert_allclose(loss, plain, rtol=1e-3)


def test_es_and_pes_are_the_formulas_for_their_noise():
    """With K = unroll the two agree; after it PES weighs by the summed noise."""
    std = 0.1
    starts = walkers(3)

    @jax.jit
    def run(theta):
        keys = jax.random.split(jax.random.key(7))
        single = es(std)(curve, theta, Carry(starts, ()), keys[0])
        memory = pes_start(theta, starts.params, starts.student_state)
        first = pes(std)(curve, theta, Carry(starts, memory), keys[0])
        return single, first, pes(std)(curve, theta, first[1], keys[1])

    single, first, second = run(THETA)
    chex.assert_trees_all_close(single[0], first[0], rtol=1e-12)
    one = first[1].estimator_state.accumulator["w"]  # the noise of the first
    two = second[1].estimator_state.accumulator["w"] - one
    assert np.abs(two).min() > 0
    w, up, down = THETA["w"], starts.params, starts.params
    for noise, weight, got in ((one, one, first), (two, one + two, second)):
        up = up + jnp.sin(w + noise).sum(-1)
        down = down + jnp.sin(w - noise).sum(-1)
        plus = jnp.cos(up) + (w + noise).prod(-1)
        minus = jnp.cos(down) + (w - noise).prod(-1)
        expected = jnp.mean(weight.T * (plus - minus), -1) / (2 * std**2)
        np.testing.assert_allclose(got[0]["w"], expected, rtol=1e-9)
        np.testing.assert_allclose(got[1].optimizees.params, up, rtol=1e-12)
        np.testing.assert_allclose(got[1].estimator_state.params, down, rtol=1e-12)
        loss, measured = got[2]
        np.testing.assert_allclose(loss, np.mean([plus, minus]), rtol=1e-12)
        np.testing.assert_allclose(measured["loss"], (plus + minus) / 2, rtol=1e-12)
        assert measured["fine"].all()


@pytest.mark.parametrize("num", [1, 3])
def test_a_single_task_has_its_axis_and_no_batch(num):
    batched = []

    def double(scale, x):
        batched.append(x.ndim)
        return scale * x, x.sum()

    twice, total = over_tasks(double)(2.0, jnp.arange(2.0 * num).reshape(num, 2))
    assert twice.shape == (num, 2)
    assert total.shape == (num,)
    assert batched == [1]
    program = str(jax.make_jaxpr(over_tasks(lambda a, x: x @ a, (None, 0)))(
        jnp.ones((2, 2)), jnp.ones((num, 3, 2))
    ))  # fmt: skip
    assert ("[3,2]" in program) == (num == 1)


def test_pes_forgets_at_a_restart():
    loop = amalgamate(
        toys.plain_task(loss),
        toys.descent(),
        {},
        truncation_length=1,
        unroll_length=2,
        num_tasks=3,
        warmup_steps=0,
        estimator="pes",
        es_std=0.1,
    )

    @jax.jit
    def third(key, elsewhere):
        key_init, *keys = jax.random.split(key, 4)
        state = loop.init(key_init)
        for key in keys[:2]:
            state, _ = loop.step(state, key, ())
        spoiled = jax.tree.map(lambda x: x + elsewhere, state.estimator_state)
        again, _ = loop.step(state._replace(estimator_state=spoiled), keys[2], ())
        return state, again

    (before, plain), (_, spoiled) = (third(jax.random.key(0), x) for x in (0, 7))
    chex.assert_trees_all_equal(plain, spoiled)
    apart = jnp.abs(before.estimator_state.params - before.params)
    assert apart.min() > 0
    assert plain.inner_step == 1
