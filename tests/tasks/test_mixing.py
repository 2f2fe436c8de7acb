"""Mixed and smoothed labels against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.mixing import mixup, smooth_labels

KEY = jax.random.key(0)


def coded(num):
    """Image i is the number i, and label i the class i: a mix can be read off."""
    return jnp.arange(num, dtype=jnp.float32)[:, None, None, None], jnp.eye(num)


def test_mixup_mixes_image_and_label_of_one_partner_by_one_coefficient():
    images, labels = coded(64)
    stored = images.astype(jnp.uint8)
    mixed, targets = jax.jit(mixup)(stored, labels, KEY, alpha=1.0)
    assert mixed.dtype == targets.dtype == jnp.float32
    assert mixed.shape == images.shape
    np.testing.assert_allclose(mixed.ravel(), targets @ images.ravel(), rtol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert ((targets > 0).sum(1) <= 2).all()
    # each example is the partner of just one
    np.testing.assert_array_equal((targets - jnp.diag(jnp.diag(targets)) > 0).sum(0), 1)


def test_mixup_coefficients_have_the_moments_of_a_symmetric_beta():
    num = 4000
    alpha = jnp.where(jnp.arange(num) < num // 2, 0.2, 3.0)
    images, labels = jnp.zeros((num, 1)), jnp.arange(num, dtype=jnp.float32)[:, None]
    # label i is the number i: what is mixed tells the coefficient, given the partner
    partner = jax.random.permutation(jax.random.split(KEY)[1], num)
    _, mixed = jax.jit(mixup)(images, labels, KEY, alpha=alpha)
    is_moved = np.asarray(partner != jnp.arange(num))
    own, other = np.asarray(labels[:, 0]), np.asarray(labels[partner, 0])
    with np.errstate(invalid="ignore"):
        coefficient = (np.asarray(mixed[:, 0]) - other) / (own - other)
    for value in (0.2, 3.0):
        c = coefficient[is_moved & np.isclose(alpha, value)]
        variance = 1 / (4 * (2 * value + 1))
        # five standard deviations of the mean; those of the variance are below 12 %
        assert abs(c.mean() - 0.5) < 5 * (variance / len(c)) ** 0.5
        assert c.var() == pytest.approx(variance, rel=0.12)


def test_mixup_lets_no_gradient_into_alpha():
    images, labels = coded(4)

    def total(alpha):
        mixed, targets = mixup(images, labels, KEY, alpha=alpha)
        return (mixed**2).sum() + (targets**2).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.ones(4)), 0)


def test_smoothing_is_its_formula_for_each_example():
    labels, strength = jnp.eye(4)[:3], jnp.array([0.0, 0.4, 1.0])
    got = smooth_labels(labels, strength)
    assert got.dtype == jnp.float32
    expected = [[1, 0, 0, 0], [0.1, 0.7, 0.1, 0.1], [0.25] * 4]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(smooth_labels(labels, 0.4)[1], expected[1], atol=1e-6)


def test_smoothing_lets_the_gradient_through():
    first = lambda s: smooth_labels(jnp.eye(4), s)[0, 0]
    assert jax.grad(first)(0.3) == pytest.approx(1 / 4 - 1, rel=1e-6)


def test_bad_arguments_are_named():
    images, labels = coded(4)
    with pytest.raises(ValueError, match=r"mixup\(labels_onehot=...\).*3 rows for 4"):
        mixup(images, labels[:3], KEY, alpha=1.0)
    with pytest.raises(ValueError, match=r"mixup\(alpha=...\).*got shape \(3,\)"):
        mixup(images, labels, KEY, alpha=jnp.ones(3))
    with pytest.raises(ValueError, match=r"mixup\(key=...\)"):
        mixup(images, labels, jax.random.PRNGKey(0), alpha=1.0)
    with pytest.raises(ValueError, match=r"smooth_labels\(strength=...\).*\(4, 1\)"):
        smooth_labels(labels, jnp.ones((4, 1)))
