import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.autoloss.combining import joint, projected
from metax.base import Action, AlternatingProblem
from tests.autoloss.pairs import two_losses

BATCH = jnp.array([0.5, 0.5, -1.0])
KEY = jax.random.key(0)


def of_gradients(*gradients, **options):
    """A problem of linear losses with these gradients, on a group of two leaves."""
    gradients = [jnp.array(g) for g in gradients]
    flat = lambda params: jnp.append(params["x"]["a"], params["x"]["b"])
    losses = [lambda p, batch, key, g=g: flat(p) @ g * batch for g in gradients]
    size = gradients[0].size
    return AlternatingProblem(
        init=lambda key: {"x": {"a": jnp.ones(size - 1), "b": jnp.ones(())}},
        losses=tuple(losses),
        actions=tuple(Action(m) for m in range(len(gradients))),
        optimizers=optax.sgd(0.1),
        sample=lambda data, key: data,
        metric=lambda params, data: jnp.zeros(()),
        **options,
    )


def gradient(problem, key=KEY):
    """Of the one loss, as one vector."""
    out = jax.jit(jax.grad(problem.losses[0]))(problem.init(key), 1.0, key)
    return np.append(out["x"]["a"], out["x"]["b"])


def by_definition(gradients, orders):
    """Algorithm 1 of PCGrad with given orders."""
    total = np.zeros(len(gradients[0]))
    for m, order in enumerate(orders):
        g = np.array(gradients[m])
        for j in order:
            other = np.array(gradients[j])
            if j != m and g @ other < 0:
                g = g - (g @ other) / (other @ other) * other
        total += g
    return total


@pytest.mark.parametrize(("lam", "weights"), [(0.3, (1, 0.3)), ([2.0, 0.5], (2, 0.5))])
def test_joint_loss_and_gradient_are_the_weighted_sums(lam, weights):
    problem = two_losses()
    together = joint(jnp.array(lam))(problem)
    params = problem.init(KEY)

    @jax.jit
    def both(params):
        parts = [jax.value_and_grad(f)(params, BATCH, KEY) for f in problem.losses]
        return jax.value_and_grad(together.losses[0])(params, BATCH, KEY), parts

    got, parts = both(params)
    total = lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True))
    expected = jax.tree.map(total, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *[got, expected]
    )


@pytest.mark.parametrize(
    ("transform", "name"), [(joint(), "joint"), (projected, "projected")]
)
def test_one_action_moves_every_group_and_the_rest_stays(transform, name):
    rules = {"w": optax.sgd(0.1), "v": optax.adam(0.1)}
    problem = two_losses(optimizers=rules, patience=3)
    together = transform(problem)
    assert together.actions == (Action(0, None, 1),)
    assert together.names == (name,)
    assert together.optimizers is rules
    changed = ("losses", "actions", "names")
    for field in set(problem._fields) - set(changed):
        assert getattr(together, field) is getattr(problem, field)


@pytest.mark.parametrize("transform", [joint(), projected])
def test_optimizers_of_actions_cannot_be_kept(transform):
    by_action = {"optimizer_sharing": "action"}
    together = transform(two_losses(**by_action))
    assert together.optimizer_sharing == "variable"
    rules = {0: optax.sgd(0.1), 1: optax.sgd(0.2)}
    with pytest.raises(ValueError, match=r"optimizers of the actions \[0, 1\]"):
        transform(two_losses(optimizers=rules, **by_action))


@pytest.mark.parametrize("transform", [joint(0.5), projected])
def test_the_first_loss_says_what_is_returned_beside(transform):
    loss = lambda params, batch, key: (params["w"].sum(), {"seen": batch.sum()})
    other = lambda params, batch, key: (params["v"], {"seen": jnp.array(7.0)})
    problem = transform(two_losses(losses=(loss, other), has_aux=True))
    gradient = jax.value_and_grad(problem.losses[0], has_aux=True)
    (value, aux), grads = jax.jit(gradient)(problem.init(KEY), BATCH, KEY)
    assert aux == {"seen": 0.0}
    weight = 0.5 if problem.names == ("joint",) else 1.0
    assert float(value) == pytest.approx(-0.5 + weight * 3)
    assert grads["w"].tolist() == [1.0, 1.0, 1.0]
    assert float(grads["v"]) == weight


def test_a_sweep_over_weights_is_a_vmap():
    problem = two_losses()
    params = problem.init(KEY)
    value = lambda lam: joint(lam)(problem).losses[0](params, BATCH, KEY)
    first, second = (f(params, BATCH, KEY) for f in problem.losses)
    np.testing.assert_allclose(
        jax.vmap(value)(jnp.array([0.0, 2.0])), [first, first + 2 * second]
    )


def test_weights_that_do_not_fit_are_refused():
    for lam in (jnp.ones((2, 2)), jnp.inf):
        with pytest.raises(ValueError, match=r"`joint\(lam="):
            joint(lam)
    with pytest.raises(ValueError, match="each of 2 losses"):
        joint(jnp.ones(3))(two_losses())


@pytest.mark.parametrize(
    "gradients",
    [
        ([1.0, 0.0, 0.0], [1.0, 2.0, 0.0]),
        ([1.0, 0.0, 2.0], [-1.0, 1.0, 0.0]),
        ([1.0, 0.0], [-2.0, 0.0]),
        ([1.0, 0.0], [0.0, 0.0]),
    ],
)
def test_two_projected_gradients_are_their_definition(gradients):
    problem = projected(of_gradients(*gradients))
    expected = by_definition(gradients, [(1,), (0,)])
    np.testing.assert_allclose(gradient(problem), expected, atol=1e-12)


def test_three_projected_gradients_are_their_definition_in_some_order():
    gradients = [[1.0, 0.0, 0.3], [-1.0, 0.5, 0.2], [0.2, -1.0, -1.0]]
    problem = projected(of_gradients(*gradients))
    others = [[j for j in range(3) if j != m] for m in range(3)]
    possible = {
        tuple(np.round(by_definition(gradients, orders), 9))
        for orders in itertools.product(*map(itertools.permutations, others))
    }
    keys = jax.random.split(KEY, 64)
    value = jax.jit(jax.vmap(lambda key: gradient_of(problem, key)))(keys)
    assert {tuple(row) for row in np.round(np.array(value), 9)} == possible
    assert len(possible) > 1


def gradient_of(problem, key):
    out = jax.grad(problem.losses[0])(problem.init(key), 1.0, key)
    return jnp.append(out["x"]["a"], out["x"]["b"])


def test_the_projected_value_is_the_sum():
    problem = of_gradients([1.0, 2.0], [-1.0, 3.0])
    value = projected(problem).losses[0](problem.init(KEY), 1.0, KEY)
    assert float(value) == 5.0


def test_a_scaled_projected_loss_has_a_scaled_gradient():
    problem = projected(of_gradients([1.0, 2.0], [-1.0, 0.1]))

    @jax.jit
    def both(params):
        loss = lambda p: problem.losses[0](p, 1.0, KEY)
        return jax.grad(lambda p: 3 * loss(p))(params), jax.grad(loss)(params)

    scaled, plain = map(jax.tree.leaves, both(problem.init(KEY)))
    for a, b in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(a, 3 * b)


def test_projected_losses_take_integer_batches():
    problem = projected(of_gradients([1.0, 2.0], [-1.0, 0.1]))
    gradient = jax.jit(jax.grad(problem.losses[0]))
    out = gradient(problem.init(KEY), jnp.int32(1), KEY)
    assert jnp.isfinite(out["x"]["b"])


@pytest.mark.parametrize("combine", [joint(0.5), projected])
def test_losses_that_share_a_part_combine_as_if_it_were_written_into_each(combine):
    common = lambda p, b, key: p["x"] ** 3
    apart = of_gradients([1.0, 2.0])._replace(
        losses=(
            lambda p, b, key: (common(p, b, key) - 1) ** 2,
            lambda p, b, key: common(p, b, key) * p["x"],
        )
    )
    together = apart._replace(
        losses=(
            lambda p, b, key, cube: (cube - 1) ** 2,
            lambda p, b, key, cube: cube * p["x"],
        ),
        shared=common,
    )
    one, two = (
        jax.value_and_grad(combine(problem).losses[0])({"x": jnp.array(1.3)}, 1.0, KEY)
        for problem in (apart, together)
    )
    assert combine(together).shared is None
    np.testing.assert_allclose(one[0], two[0], rtol=1e-12)
    np.testing.assert_allclose(one[1]["x"], two[1]["x"], rtol=1e-12)
