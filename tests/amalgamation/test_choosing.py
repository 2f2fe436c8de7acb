"""The choice policy: a mixture of its pool, coordinate by coordinate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.amalgamation import choice, choice_weights, pool
from metax.amalgamation.choosing import _features
from metax.hypergradient import adam_hd

PAIR = {"sgd": optax.sgd(0.1), "momentum": optax.sgd(0.05, momentum=0.9)}


def random_weights(student, seed=1):
    shapes = jax.eval_shape(student.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.array(rng.normal(size=s.shape)), shapes)


def silent(theta, bias):
    """Weights whose mixture is the softmax of `bias`, whatever the features."""
    zeros = jax.tree.map(jnp.zeros_like, theta)
    return {**zeros, "output": {**zeros["output"], "b": jnp.array(bias)}}


def start():
    return {"w": jnp.array([[1.0, -2.0], [0.5, 0.1]]), "b": jnp.array([0.3, 1.2])}


def path(rule, num=4):
    """Parameters after each step on a bowl, and the last state."""

    def step(carry, _):
        params, state = carry
        grad = jax.tree.map(jnp.sinh, params)
        updates, state = rule.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), along = jax.lax.scan(step, (start(), rule.init(start())), length=num)
    return along, state


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_all_weight_on_one_member_is_that_member(name):
    student = choice(PAIR, 3)
    shapes = jax.eval_shape(student.init, jax.random.key(0))
    # softmax of (0, 1000) is (0, 1) exactly
    theta = silent(shapes, [1000.0 * (n == name) for n in PAIR])
    mixed = jax.jit(lambda theta: path(student.rule(theta))[0])(theta)
    alone = jax.jit(lambda: path(optax.with_extra_args_support(PAIR[name]))[0])()
    chex.assert_trees_all_close(mixed, alone, rtol=1e-12)


def test_equal_weights_average_the_steps_and_members_keep_their_own_states():
    student = choice(PAIR, 3)
    theta = silent(jax.eval_shape(student.init, jax.random.key(0)), [0.0, 0.0])
    mixed, state = jax.jit(lambda theta: path(student.rule(theta)))(theta)
    params, trace = jax.tree.map(np.asarray, start()), dict.fromkeys(start(), 0.0)
    for i in range(4):
        for leaf in params:
            g = np.sinh(params[leaf])
            trace[leaf] = g + 0.9 * trace[leaf]
            params[leaf] = params[leaf] - 0.5 * (0.1 * g + 0.05 * trace[leaf])
            np.testing.assert_allclose(mixed[leaf][i], params[leaf], rtol=1e-12)
    chex.assert_trees_all_close(state.pool["momentum"][0].trace, trace, rtol=1e-12)


def test_weights_are_a_convex_combination_at_every_coordinate():
    student = choice(pool("large"), 3)
    theta = random_weights(student)

    @jax.jit
    def weighed(theta):
        state = path(student.rule(theta))[1]
        return choice_weights(theta, state)

    mixture = weighed(theta)
    assert mixture.shape == (6, 6)
    np.testing.assert_allclose(mixture.sum(-1), 1, rtol=1e-12)
    assert mixture.min() > 0
    assert np.ptp(mixture, axis=0).max() > 1e-3  # coordinates differ


def test_update_is_the_shown_mixture_of_the_members_updates():
    student, names = choice(pool("small"), 3), list(pool("small"))
    theta = random_weights(student)

    @jax.jit
    def once(theta):
        rule, grads = student.rule(theta), start()
        updates, state = rule.update(grads, rule.init(grads), grads)
        own = [pool("small")[n].update(grads, pool("small")[n].init(grads))[0]
               for n in names]  # fmt: skip
        flat = [jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(u)])
                for u in (updates, *own)]  # fmt: skip
        return flat[0], jnp.stack(flat[1:], -1), choice_weights(theta, state)

    update, own, mixture = once(theta)
    np.testing.assert_allclose(update, (own * mixture).sum(-1), rtol=1e-12)


def test_time_feature_is_bounded_and_convolutions_have_a_rank():
    """The release's time grows without end, and rank 4 has no place in its one-hot."""
    grads = {"a": jnp.zeros(()), "b": jnp.zeros(1), "c": jnp.zeros((1, 1)),
             "d": jnp.zeros((1, 1, 1)), "e": jnp.zeros((1, 1, 1, 1))}  # fmt: skip
    features = _features(jnp.zeros((5, 2)), jnp.float32(0.5), grads)
    np.testing.assert_array_equal(features[:, 2], 0.5)
    np.testing.assert_array_equal(features[:, 3:].argmax(-1), [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(features[:, 3:].sum(-1), 1)
    student = choice(PAIR, 3, time_scale=100.0)

    @jax.jit
    def update(theta, count):
        rule = student.rule(theta)
        state = rule.init(start())._replace(count=count)
        return rule.update(start(), state)[0]["w"]

    theta = random_weights(student)
    at = [update(theta, jnp.int32(n)) for n in (50, 100, 10_000)]
    np.testing.assert_array_equal(at[1], at[2])
    assert np.abs(at[0] - at[1]).max() > 1e-6


def test_extra_arguments_and_warmup_reach_the_members():
    seen = []

    def update(grads, state, params=None, *, warmup=None, **extra):
        seen.append((warmup is not None, *extra))
        return grads, state

    member = optax.GradientTransformationExtraArgs(lambda p: (), update)
    student = choice({"member": member}, 2)
    rule = student.rule(random_weights(student))
    seen.clear()  # the door's probe
    rule.update(start(), rule.init(start()), start(), value=1.0)
    rule.update(start(), rule.init(start()), start(), warmup=True)
    assert seen == [(False, "value"), (True,)]


def test_a_hypergradient_rule_may_be_a_member():
    hd = adam_hd(0.01, 1e-3, eps_root=1e-10)
    student = choice({**pool("small"), "hd": hd}, 3)
    theta = random_weights(student)
    along, state = jax.jit(lambda theta: path(student.rule(theta)))(theta)
    chex.assert_tree_all_finite(along)
    assert state.pool["hd"].count == 4


@pytest.mark.parametrize("member", [optax.adam(0.1), optax.nadam(0.1)])
def test_a_member_without_a_derivative_at_zero_is_refused_by_name(member):
    with pytest.raises(ValueError, match=r"choice\(pool=\{'bad': ...\}\)` .*eps_root"):
        choice({"sgd": optax.sgd(0.1), "bad": member})
    choice({"good": optax.adam(0.1, eps=0.0, eps_root=1e-10)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": {}}, r"choice\(pool=...\)` must hold at least one"),
        ({"time_scale": 0}, r"choice\(time_scale=...\)` must be above 0; got 0"),
        ({"hidden_size": 0}, r"choice\(hidden_size=...\)` must be at least 1"),
        ({"num_layers": 0}, r"choice\(num_layers=...\)` must be at least 1"),
    ],
)
def test_arguments_outside_their_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        choice(**{"pool": PAIR, **options})
