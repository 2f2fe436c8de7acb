import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.tasks.grids import gaussian_grid, grid_score


def every_mode():
    ticks = np.arange(-4.0, 5.0, 2.0)
    return np.stack(np.meshgrid(ticks, ticks), -1).reshape(25, 2)


def test_the_score_is_covered_modes_times_samples_on_a_mode():
    score = lambda samples: grid_score(jnp.asarray(samples, jnp.float32), 5, 2.0, 0.05)
    modes = every_mode()
    np.testing.assert_allclose(score(modes), 1.0)
    np.testing.assert_allclose(score(np.zeros((7, 2))), 1 / 25)
    half_away = np.concatenate([modes, np.full((25, 2), 100.0)])
    np.testing.assert_allclose(score(half_away), 0.5)
    five = np.concatenate([modes[:5], np.full((15, 2), 1.0)])
    np.testing.assert_allclose(score(five), 5 / 25 * 5 / 20)


@pytest.mark.parametrize(("offset", "expected"), [(0.149, 1 / 25), (0.151, 0.0)])
def test_a_sample_is_on_a_mode_within_three_deviations(offset, expected):
    samples = jnp.array([[offset, 0.0]], jnp.float32)
    np.testing.assert_allclose(grid_score(samples, 5, 2.0, 0.05), expected)


def test_real_samples_lie_on_the_modes():
    problem = gaussian_grid()
    batch = jax.jit(lambda key: problem.sample(None, key))(jax.random.key(0))
    distance = np.abs(np.asarray(batch.real)[:, None] - every_mode()).max(-1)
    nearest = distance.min(1)
    assert nearest.max() < 0.05 * 5
    assert len(np.unique(distance.argmin(1))) == 25
    deviations = np.asarray(batch.real) - every_mode()[distance.argmin(1)]
    assert 0.04 < deviations.std() < 0.06


def test_the_metric_repeats_and_alternate_steps_move_one_network_each():
    problem = gaussian_grid()
    rule = optax.with_extra_args_support(problem.optimizers)

    @jax.jit
    def run(key):
        params = problem.init(key)
        batch = problem.sample(None, key)
        moved = []
        for action in problem.actions:
            group = action.params

            def loss(leaves, group=group, action=action):
                whole = {**params, group: leaves}
                return problem.losses[action.loss](whole, batch, key)[0]

            gradient = jax.grad(loss)(params[group])
            update, _ = rule.update(gradient, rule.init(params[group]), step=0)
            moved.append(optax.tree.norm(update))
        metrics = jnp.stack([problem.metric(params, None) for _ in range(2)])
        return moved, metrics, problem.observe(params, batch, None)

    moved, metrics, seen = run(jax.random.key(0))
    assert all(norm > 0 for norm in moved)
    assert metrics[0] == metrics[1] == seen["inception_score"]
    assert 0 <= seen["discriminator_error"] <= 1
    assert problem.maximize


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"gaussian_grid.*side=0"):
        gaussian_grid(side=0)
    with pytest.raises(ValueError, match=r"std=-1"):
        gaussian_grid(std=-1)
