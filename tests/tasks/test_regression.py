import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.base import Action
from metax.tasks import controller_data, join_splits, regression, task_data

KEY = jax.random.key(0)
SMALL = {"d": 3, "sizes": (7, 6, 5, 4, 3)}


def double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def plain_error(params, split, scale):
    """The mean square of b·u + s uᵀAu + c - target, as it is written."""
    model, u = params["model"], split.inputs
    form = jnp.einsum("ni,ij,nj->n", u, model["A"], u)
    prediction = u @ model["b"] + scale * form + model.get("c", 0.0)
    return jnp.mean(jnp.square(prediction - split.targets))


def true_params(seed, d=16):
    w = np.random.RandomState(seed).rand(d) - 0.5
    return {"model": {"b": jnp.asarray(w, jnp.float32), "A": jnp.zeros((d, d))}}


def test_the_published_sets_have_their_noise():
    splits = regression.generate(1)
    # the reference has four decimals
    np.testing.assert_allclose(
        [split.noise for split in splits],
        [3.9650, 3.8474, 3.8411, 3.3660, 3.7704],
        atol=1e-4,
    )
    for split in splits:
        assert split.inputs.shape == (200, 16)
        assert split.targets.shape == (200,)
        assert np.abs(split.inputs).max() <= 5
        assert {leaf.dtype for leaf in split} == {np.dtype(np.float32)}


@pytest.mark.parametrize("seed", [1, 5])
def test_the_true_weights_have_no_excess(seed):
    problem = regression.problem()
    data = task_data(regression.generate(seed))
    values = jax.jit(problem.evaluate)(true_params(seed), data)
    for name in ("train", "valid", "test"):
        # rounding of the targets to float32
        assert abs(values[f"{name}_excess"]) < 1e-5
        np.testing.assert_allclose(values[f"{name}_mse"], data[name].noise, rtol=1e-5)


def test_drawn_noise_has_the_variance_of_the_published_code():
    @jax.jit
    def noise(key, std):
        return jnp.stack([part.noise for part in regression.draw(key, std=std)])

    keys = jax.random.split(KEY, 5)
    # 5000 rows: the standard error of σ² = 4 is .08
    assert abs(jax.vmap(noise, (0, None))(keys, 2.0).mean() - 4) < 0.15
    np.testing.assert_array_equal(noise(KEY, 0.0), 0.0)


def test_drawn_parts_share_one_linear_map_and_hold_their_own_noise():
    splits = jax.jit(lambda key: regression.draw(key, sizes=(400,) * 5))(KEY)
    whole = join_splits(*splits)
    w, *_ = np.linalg.lstsq(whole.inputs, whole.targets)
    assert np.abs(w).max() < 0.6  # ½, and the error of the fit
    for split in splits:
        assert np.abs(split.inputs).max() <= 5
        residual = np.mean((split.targets - split.inputs @ w) ** 2)
        # the fit is off by .016 in each weight, and u² is 25/3
        np.testing.assert_allclose(residual, split.noise, rtol=0.05)
        assert {leaf.dtype for leaf in split} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("d", "intercept"), [(1, False), (2, True), (5, False)])
def test_folded_products_give_the_error_and_gradient_of_the_form(d, intercept):
    problem = regression.problem(d=d, quadratic_scale=0.3, intercept=intercept)
    data = double(controller_data(regression.generate(3, d=d, sizes=(9,) * 5)))
    params = double(problem.init(KEY))
    if intercept:
        params["model"]["c"] += 0.7

    @jax.jit
    def both(params, data):
        batch = problem.sample(data, KEY)
        folded = jax.value_and_grad(problem.losses[0])(params, batch, KEY)
        plain = jax.value_and_grad(plain_error)(params, data["train"], 0.3)
        valid = plain_error(params, data["valid"], 0.3)
        return folded, plain, problem.metric(params, data), valid

    folded, plain, metric, valid = both(params, data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), folded, plain
    )
    np.testing.assert_allclose(metric, valid, rtol=1e-10)


def numpy_run(params, split, actions, lam, rate):
    """Adam with one state for both losses, written out."""
    u, y = np.float64(split.inputs), np.float64(split.targets)
    theta = {name: np.float64(leaf) for name, leaf in params["model"].items()}
    first = {name: np.zeros_like(leaf) for name, leaf in theta.items()}
    second = {name: np.zeros_like(leaf) for name, leaf in theta.items()}
    for t, action in enumerate(actions, start=1):
        form = np.einsum("ni,ij,nj->n", u, theta["A"], u)
        residual = 2 * (u @ theta["b"] + 0.1 * form - y) / len(y)
        grads = {
            "b": residual @ u,
            "A": 0.1 * np.einsum("n,ni,nj->ij", residual, u, u),
        }
        for name in theta:
            grad = lam * np.sign(theta[name]) if action else grads[name]
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            mean, square = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
            theta[name] = theta[name] - rate * mean / (np.sqrt(square) + 1e-8)
    return theta


def test_500_steps_with_shared_adam_equal_a_numpy_reference():
    problem = regression.problem(lam=0.2, d=6, learning_rate=1e-3)
    data = double(controller_data(regression.generate(1, d=6, sizes=(40,) * 5)))
    params = double(problem.init(KEY))
    actions = np.random.default_rng(0).integers(0, 2, 500)

    @jax.jit
    def run(params, data, actions):
        batch = problem.sample(data, KEY)

        def step(carry, action):
            params, state = carry
            grads = [jax.grad(loss)(params, batch, KEY) for loss in problem.losses]
            grad = jax.tree.map(lambda a, b: jnp.where(action == 0, a, b), *grads)
            updates, state = problem.optimizers.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (params, problem.optimizers.init(params))
        return jax.lax.scan(step, start, actions)[0][0]

    result = run(params, data, jnp.asarray(actions))["model"]
    expected = numpy_run(params, data["train"], actions, 0.2, 1e-3)
    for name in expected:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-6, atol=1e-9)


def test_the_penalty_is_lambda_times_the_sum_of_magnitudes():
    problem = regression.problem(lam=0.4, d=2, intercept=True)
    model = {
        "b": jnp.array([1.0, 0.0]),
        "A": jnp.array([[-1.0, 2.0], [0, 3]]),
        "c": jnp.array(-4.0),
    }
    penalty = lambda params: problem.losses[1](params, None, KEY)
    value, grad = jax.jit(jax.value_and_grad(penalty))({"model": model})
    np.testing.assert_allclose(value, 0.4 * 11, rtol=1e-6)
    np.testing.assert_allclose(grad["model"]["b"], [0.4, 0.0], rtol=1e-6)
    np.testing.assert_allclose(grad["model"]["A"], [[-0.4, 0.4], [0, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(grad["model"]["c"], -0.4, rtol=1e-6)


@pytest.mark.parametrize(("reward", "expected"), [("best", 25.0), ("last", 20.0)])
def test_rewards_are_a_constant_over_the_error(reward, expected):
    problem = regression.problem(reward=reward, reward_constant=100.0)
    history = jnp.array([4.0, 5.0, 3.0])
    live = jnp.array([True, True, False])
    assert float(problem.reward(history, live)) == expected
    assert np.isnan(problem.reward(history, live & False))
    assert np.isnan(problem.reward(history[:0], live[:0]))
    assert not problem.maximize
    # a smaller error is a larger reward
    assert problem.reward(history / 2, live) == 2 * expected


def test_numbers_may_be_traced_and_a_sweep_is_a_vmap():
    data = controller_data(regression.generate(2, **SMALL))
    params = regression.problem(d=3).init(KEY)

    def step(lam, rate, scale):
        problem = regression.problem(
            lam, d=3, learning_rate=rate, quadratic_scale=scale, reward_constant=lam
        )
        batch = problem.sample(data, KEY)
        both = lambda params: sum(loss(params, batch, KEY) for loss in problem.losses)
        loss, grad = jax.value_and_grad(both)(params)
        state = problem.optimizers.init(params)
        updates, _ = problem.optimizers.update(grad, state, params)
        return loss, optax.apply_updates(params, updates), problem.metric(params, data)

    values = jnp.array([[0.1, 1e-3, 0.1], [0.4, 1e-2, 1.0]], jnp.float32).T
    swept = jax.jit(jax.vmap(step))(*values)
    alone = jax.jit(lambda *row: step(*row))(*values[:, 1])
    # two programs round float32 each in its own way
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6),
        swept,
        alone,
    )
    assert swept[0].dtype == jnp.float32
    assert abs(swept[0][0] - swept[0][1]) > 0.01


def test_parameters_start_as_published():
    problem = regression.problem(intercept=True)
    model = jax.jit(jax.vmap(problem.init))(jax.random.split(KEY, 100))["model"]
    assert {name: leaf.shape[1:] for name, leaf in model.items()} == {
        "b": (16,),
        "A": (16, 16),
        "c": (),
    }
    assert {leaf.dtype for leaf in model.values()} == {jnp.dtype(jnp.float32)}
    # 1600 draws: a standard error of 1.8 %
    np.testing.assert_allclose(model["b"].std(), 0.1, rtol=0.08)
    np.testing.assert_allclose(model["A"].std(), 0.01, rtol=0.08)
    np.testing.assert_array_equal(model["c"], 0)
    assert set(regression.problem().init(KEY)["model"]) == {"A", "b"}


def test_the_main_loss_is_action_zero_and_both_move_everything():
    problem = regression.problem()
    assert problem.actions == (Action(0), Action(1))
    assert problem.names == ("mse", "l1")
    assert problem.full_batch
    assert (problem.patience, problem.validate_every) == (100, 10)
    assert set(regression.problem(optimizer_sharing="action").optimizers) == {0, 1}


def test_evaluation_covers_the_splits_that_there_are():
    problem = regression.problem(d=3)
    splits = regression.generate(2, **SMALL)
    params = problem.init(KEY)
    values = jax.jit(problem.evaluate)(params, controller_data(splits))
    assert set(values) == {"train_mse", "valid_mse", "train_excess", "valid_excess"}
    np.testing.assert_allclose(
        values["valid_excess"],
        values["valid_mse"] - splits.controller_valid.noise,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: regression.generate(1, d=0), r"`regression.generate\(d=...\)`.*got 0"),
        (lambda: regression.generate(1, std=-1.0), r"generate\(std=...\)`.*got -1.0"),
        (lambda: regression.generate(1, sizes=(1, 2)), r"five parts.*got \(1, 2\)"),
        (
            lambda: regression.draw(KEY, sizes=(1, 1, 1, 1, 0)),
            r"regression.draw\(sizes",
        ),
        (lambda: regression.draw(jax.random.PRNGKey(0)), r"regression.draw\(key=...\)"),
        (lambda: regression.problem(-0.1), r"regression.problem\(lam=...\)`.*-0.1"),
        (lambda: regression.problem(d=0), r"regression.problem\(d=...\)`.*got 0"),
        (lambda: regression.problem(reward="mean"), r"'best' or 'last'; got 'mean'"),
        (lambda: regression.problem().init(0), r"regression.problem\(...\).init\(key"),
    ],
)
def test_bad_arguments_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
