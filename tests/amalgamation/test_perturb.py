"""Perturbations: their size in every tensor, their derivative, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.amalgamation import perturb
from metax.amalgamation.perturb import adversarial, gaussian, none

KEY = jax.random.key(0)


def theta():
    keys = jax.random.split(jax.random.key(1))
    return {
        "kernel": 3 + jax.random.normal(keys[0], (6, 5)),
        "bias": jax.random.normal(keys[1], (7,)),
        "gain": jnp.array(-2.0),
    }


def slope(weights):
    """A gradient that is exactly zero in one tensor and in one entry of another."""
    zero = {"gain": 0 * weights["gain"], "bias": jnp.sin(weights["bias"]).at[0].set(0)}
    return {"kernel": weights["kernel"] ** 2, **zero}


def moved(perturbation, weights=None, gradient=slope, key=KEY):
    weights = theta() if weights is None else weights
    apply = lambda weights, key: perturbation.apply(weights, key, gradient)
    new = jax.jit(apply)(weights, key)
    return jax.tree.map(lambda n, w: n - w, new, weights)


def norms(tree):
    return {name: float(np.linalg.norm(leaf)) for name, leaf in tree.items()}


def draws(perturbation, num=10_000):
    apply = lambda key: perturbation.apply(theta(), key, slope)
    many = jax.jit(jax.vmap(apply))(jax.random.split(KEY, num))
    return jax.tree.map(lambda many, w: many - w, many, theta())


def test_relative_noise_has_a_share_of_the_root_mean_square_of_each_tensor():
    noise, weights = draws(gaussian(1e-2)), theta()
    for name, leaf in noise.items():
        rms = np.sqrt(np.mean(np.square(weights[name])))
        # 10,000 draws of a scalar: the standard error is 0.7 %
        assert abs(np.std(leaf) / rms / 1e-2 - 1) < 0.02


def test_absolute_noise_has_one_scale():
    for leaf in draws(gaussian(1e-2, relative=False)).values():
        assert abs(np.std(leaf) / 1e-2 - 1) < 0.02  # as above


def test_tensors_of_one_shape_are_moved_independently():
    weights = {"a": jnp.ones(1000), "b": jnp.ones(1000)}
    noise = moved(gaussian(0.1), weights)
    # 1/√1000 is one standard error
    assert abs(np.corrcoef(noise["a"], noise["b"])[0, 1]) < 0.15


def test_zeros_stay_where_noise_is_relative():
    noise = moved(gaussian(0.1), {"w": jnp.zeros(3), "none": jnp.zeros((0, 2))})
    np.testing.assert_array_equal(noise["w"], 0)


def test_relative_attack_has_a_share_of_the_norm_of_each_tensor():
    psi, expected = norms(moved(adversarial(1e-3))), norms(theta())
    assert psi.pop("gain") == 0  # its gradient is zero
    for name, size in psi.items():
        np.testing.assert_allclose(size, 1e-3 * expected[name], rtol=1e-6)


def test_relative_attack_normalises_where_clipped_does_not():
    small = lambda weights: jax.tree.map(lambda w: 1e-8 * jnp.cos(w), weights)
    relative = norms(moved(adversarial(1e-3), gradient=small))
    clipped = moved(adversarial(1e-3, norm="clipped"), gradient=small)
    for name, leaf in small(theta()).items():
        # what is left of 1e-8 after adding and subtracting weights of about 3
        np.testing.assert_allclose(clipped[name], leaf, atol=1e-14)
        assert relative[name] > 1e3 * norms(clipped)[name]


def test_clipped_attack_is_the_relative_one_where_the_gradient_is_large():
    large = lambda weights: jax.tree.map(lambda w: 1e3 * jnp.cos(w), weights)
    relative = moved(adversarial(1e-3), gradient=large)
    clipped = moved(adversarial(1e-3, norm="clipped"), gradient=large)
    for name in relative:
        np.testing.assert_allclose(relative[name], clipped[name], atol=1e-14)


def test_sign_attack_moves_every_weight_alike():
    psi = moved(adversarial(1e-3, norm="sign"))
    expected = jax.tree.map(lambda g: 1e-3 * jnp.sign(g), slope(theta()))
    for name, leaf in psi.items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-14)


def test_projections_end_on_box_and_ball():
    box = moved(adversarial(0.1, norm="linf", radius=1e-4))
    np.testing.assert_allclose(box["kernel"], 1e-4, atol=1e-14)
    ball = moved(adversarial(0.1, norm="l2", radius=1e-2))
    np.testing.assert_allclose(norms(ball)["kernel"], 1e-2, rtol=1e-12)


def test_projections_leave_the_inside_alone():
    for norm in ("linf", "l2"):
        psi = moved(adversarial(1e-3, norm=norm, radius=1e6))
        for name, leaf in slope(theta()).items():
            np.testing.assert_allclose(psi[name], 1e-3 * leaf, atol=1e-14)


def test_each_step_takes_the_gradient_where_it_is():
    # towards 0.505, so that the second of three steps of 0.01 goes back
    gradient = lambda weights: {"w": 0.505 - weights["w"]}
    psi = moved(adversarial(1e-2, 3, norm="sign"), {"w": jnp.array(0.5)}, gradient)
    np.testing.assert_allclose(psi["w"], 0.01, rtol=1e-12)


def test_relative_steps_are_all_shares_of_the_unperturbed_norm():
    gradient = lambda weights: {"w": jnp.array([0.0, 2.0])}
    psi = moved(adversarial(0.1, 3), {"w": jnp.array([3.0, 4.0])}, gradient)
    np.testing.assert_allclose(psi["w"], [0.0, 3 * 0.5], rtol=1e-12)


def test_attack_raises_the_loss():
    def loss(weights, data):
        return jnp.mean((jnp.tanh(data @ weights["w"]) @ weights["v"] - 1) ** 2)

    @jax.jit
    def rises(key):
        keys = jax.random.split(key, 3)
        weights = {
            "w": jax.random.normal(keys[0], (4, 8)),
            "v": jax.random.normal(keys[1], (8,)),
        }
        objective = lambda weights: loss(weights, jax.random.normal(keys[2], (16, 4)))
        worse = adversarial(1e-3).apply(weights, key, jax.grad(objective))
        return objective(worse) > objective(weights)

    assert sum(rises(jax.random.key(seed)) for seed in range(10)) >= 9


def test_no_steps_change_nothing():
    def never(weights):
        raise AssertionError("the gradient is not needed")

    for perturbation in (none(), adversarial(1e-3, 0)):
        new = perturbation.apply(theta(), KEY, never)
        jax.tree.map(np.testing.assert_array_equal, new, theta())


@pytest.mark.parametrize("perturbation", [gaussian(0.1), adversarial(0.1), none()])
def test_what_is_added_is_a_constant_under_differentiation(perturbation):
    total = lambda weights: sum(
        jnp.sum(leaf) for leaf in perturbation.apply(weights, KEY, slope).values()
    )
    slopes = jax.jit(jax.grad(total))(theta())
    for leaf in slopes.values():
        np.testing.assert_array_equal(leaf, 1)


@pytest.mark.parametrize("norm", perturb.NORMS)
def test_a_gradient_of_zero_moves_nothing(norm):
    radius = 1.0 if norm in ("linf", "l2") else None
    attack = adversarial(0.1, 2, norm=norm, radius=radius)
    zero = lambda weights: jax.tree.map(jnp.zeros_like, weights)
    for leaf in moved(attack, gradient=zero).values():
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("perturbation", [gaussian(0.1), adversarial(0.1)])
def test_weights_keep_their_dtypes(perturbation):
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), theta())
    new = perturbation.apply(narrow, KEY, slope)
    assert {leaf.dtype for leaf in new.values()} == {jnp.dtype("bfloat16")}


def test_noise_may_be_drawn_at_every_step():
    assert gaussian().every == "truncation"
    assert gaussian(every="step").every == "step"


def test_raw_keys_are_refused():
    with pytest.raises(ValueError, match="gaussian\\(...\\).apply\\(key=...\\)"):
        gaussian().apply(theta(), jnp.zeros(2, jnp.uint32), slope)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: gaussian(-1e-3), "gaussian(std=...)"),
        (lambda: gaussian(every="epoch"), "gaussian(every=...)"),
        (lambda: adversarial(-1e-3), "adversarial(step_size=...)"),
        (lambda: adversarial(1e-3, -1), "adversarial(steps=...)"),
        (lambda: adversarial(1e-3, 1.5), "adversarial(steps=...)"),
        (lambda: adversarial(norm="l1"), "adversarial(norm=...)"),
        (lambda: adversarial(norm="l2"), "adversarial(radius=...)"),
        (lambda: adversarial(norm="linf", radius=0.0), "adversarial(radius=...)"),
        (lambda: adversarial(norm="sign", radius=1.0), "adversarial(radius=...)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, argument):
    with pytest.raises(ValueError, match=r"must be|belongs to") as caught:
        make()
    assert argument in str(caught.value)
