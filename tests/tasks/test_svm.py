"""The smoothed SVM is the function it says it is, and as badly conditioned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks import census_like, smoothed_svm


def test_loss_is_half_the_sum_of_squared_hinges():
    rows = jnp.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])
    # margins 0.5, 2, −0.5: hinges 0.5, 0, 1.5
    value = smoothed_svm(2).loss(jnp.array([0.5, 1.0]), rows, jax.random.key(0))
    np.testing.assert_allclose(value, 0.5 * (0.25 + 0 + 2.25))


def test_evaluation_reports_the_largest_entry_of_the_gradient():
    rows, task = jnp.asarray(census_like(30, 4)), smoothed_svm(5)
    w = task.init(jax.random.key(0))
    grad = jax.grad(task.loss)(w, rows, jax.random.key(0))
    metrics = task.evaluate(w, rows)
    np.testing.assert_allclose(metrics["max_gradient"], np.abs(grad).max())


def test_starts_are_unit_vectors():
    w = jax.vmap(smoothed_svm(7).init)(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_allclose(jnp.linalg.norm(w, axis=1), 1)


def test_examples_are_balanced_binary_and_range_from_common_to_rare():
    rows = census_like()
    assert rows.shape == (400, 51)
    assert set(np.unique(rows)) == {-1.0, 0.0, 1.0}
    assert (rows[:, -1] < 0).sum() == 200  # the constant −1 times the label +1
    counts = np.abs(rows[:, :-1]).mean(0)
    assert counts[:5].mean() > 0.6
    assert counts[-5:].mean() < 0.03


def test_raw_key_is_refused():
    with pytest.raises(ValueError, match=r"smoothed_svm.*jax.random.key"):
        smoothed_svm(3).init(jnp.zeros(2, jnp.uint32))
