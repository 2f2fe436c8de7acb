import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.implicit.linear_solve import conjugate_gradient, neumann_series

EIGENVALUES = jnp.array([0.2, 0.5, 1.0, 2.0, 3.0])
BASIS = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (5, 5)))[0]
MATRIX = BASIS @ jnp.diag(EIGENVALUES) @ BASIS.T
RHS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5], [3.0], [-1.0]])}


def flatten(tree):
    return jnp.concatenate([tree["a"], tree["b"][:, 0]])


def matvec_of(matrix):
    def matvec(tree):
        product = matrix @ flatten(tree)
        return {"a": product[:2], "b": product[2:, None]}

    return matvec


def test_cg_is_exact_after_as_many_steps_as_eigenvalues():
    v, count = conjugate_gradient(matvec_of(MATRIX), RHS, 5)
    expected = jnp.linalg.solve(MATRIX, flatten(RHS))
    np.testing.assert_allclose(flatten(v), expected, rtol=1e-10)
    assert count == 5


def test_cg_of_two_distinct_eigenvalues_takes_two_steps():
    matrix = BASIS @ jnp.diag(jnp.array([1.0, 1, 1, 4, 4])) @ BASIS.T
    v, _ = conjugate_gradient(matvec_of(matrix), RHS, 2)
    expected = jnp.linalg.solve(matrix, flatten(RHS))
    np.testing.assert_allclose(flatten(v), expected, rtol=1e-12)


def test_cg_one_step_is_steepest_descent():
    v, _ = conjugate_gradient(matvec_of(MATRIX), RHS, 1)
    b = flatten(RHS)
    np.testing.assert_allclose(flatten(v), b @ b / (b @ MATRIX @ b) * b, rtol=1e-12)


def test_cg_stops_at_rounding_error():
    v, count = conjugate_gradient(matvec_of(MATRIX), RHS, 200)
    expected = jnp.linalg.solve(MATRIX, flatten(RHS))
    np.testing.assert_allclose(flatten(v), expected, rtol=1e-12)
    assert count < 15


def test_cg_of_zero_is_zero_without_a_step():
    zero = jax.tree.map(jnp.zeros_like, RHS)
    v, count = conjugate_gradient(matvec_of(MATRIX), zero, 3)
    assert not np.any(flatten(v))
    assert count == 0


def test_cg_ignores_directions_in_which_nothing_is_asked():
    matrix = jnp.diag(jnp.array([1.0, 0.0, 2.0, 3.0, 0.0]))
    rhs = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([[1.0], [1.0], [0.0]])}
    v, _ = conjugate_gradient(matvec_of(matrix), rhs, 10)
    np.testing.assert_allclose(flatten(v), [1, 0, 1 / 2, 1 / 3, 0], rtol=1e-12)


def test_cg_stops_before_a_direction_without_positive_curvature():
    matrix = jnp.diag(jnp.array([-1.0, -1.0, -1.0, -1.0, -1.0]))
    v, count = conjugate_gradient(matvec_of(matrix), RHS, 4)
    assert not np.any(flatten(v))
    assert count == 0


@pytest.mark.parametrize("iterations", [1, 7, 30])
def test_neumann_error_shrinks_in_each_direction_by_its_own_rate(iterations):
    alpha = 0.4
    v, count = neumann_series(matvec_of(MATRIX), RHS, iterations, alpha)
    exact = BASIS.T @ jnp.linalg.solve(MATRIX, flatten(RHS))
    rate = (1 - alpha * EIGENVALUES) ** (iterations + 1)
    found = BASIS.T @ flatten(v)
    np.testing.assert_allclose(found, (1 - rate) * exact, rtol=1e-10)
    assert count == iterations


def test_solvers_keep_single_precision():
    rhs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), RHS)
    matvec = matvec_of(MATRIX.astype(jnp.float32))
    for v, _ in (
        conjugate_gradient(matvec, rhs, 5),
        neumann_series(matvec, rhs, 5, jnp.float64(0.4)),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(v)} == {jnp.dtype("float32")}
