import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.ridge import RidgeData, diabetes_ridge, ridge_regression

KINDS = ["global", "feature", "input_dropout"]
NAMES = {
    "global": "weight_decay",
    "feature": "weight_decay",
    "input_dropout": "rate",
}
DATA = diabetes_ridge()


def natural(kind, lam):
    return jax.nn.sigmoid(lam) if kind == "input_dropout" else jnp.exp(lam)


def train_loss(problem, params, hparams, batch):
    """As a tuner calls it: one value per example."""
    size = len(batch.y)
    spread = {
        name: jnp.broadcast_to(value, (size, *jnp.shape(value)))
        for name, value in hparams.items()
    }
    outputs = problem.predict(params, batch, spread, None)
    return problem.train_loss(outputs, batch, spread, params)


def test_the_split_is_the_one_of_the_reference():
    order = np.random.default_rng(0).permutation(442)
    assert order[:5].tolist() == [203, 232, 262, 242, 2]
    x = np.concatenate([DATA.train.x, DATA.valid.x])
    assert (DATA.train.x.shape, DATA.valid.x.shape) == ((300, 10), (142, 10))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(0), 1, rtol=1e-12)


def test_the_conditioning_is_the_one_of_the_reference():
    gram = DATA.train.x.T @ DATA.train.x / 300
    extremes = np.linalg.eigvalsh(gram)[[0, -1]]
    # the reference has seven decimals
    np.testing.assert_allclose(extremes, [0.0071945, 4.3390854], atol=5e-8)


@pytest.mark.parametrize(
    ("kind", "lam"),
    [
        ("global", -1.3),
        ("feature", np.linspace(-2, 1, 10)),
        ("input_dropout", -1.3),
        ("input_dropout", np.linspace(-2, 1, 10)),
    ],
)
def test_the_training_loss_is_squared_error_and_penalty(kind, lam):
    problem = ridge_regression(10, kind=kind)
    w = jnp.linspace(-1, 1, 10)
    hparams = {NAMES[kind]: natural(kind, lam)}
    losses = train_loss(problem, {"w": w}, hparams, DATA.train)
    scale = (DATA.train.x**2).mean(0) if kind == "input_dropout" else 1.0
    penalty = 0.5 * np.sum(np.exp(lam) * scale * w**2)
    expected = 0.5 * np.mean((DATA.train.x @ w - DATA.train.y) ** 2) + penalty
    assert losses.shape == (300,)
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-12)


def test_input_dropout_is_the_expectation_over_masks():
    problem = ridge_regression(10, kind="input_dropout")
    w = jnp.linspace(-1, 1, 10)
    batch = jax.tree.map(lambda leaf: leaf[:5], DATA.train)
    rate = jnp.linspace(0.05, 0.5, 10)
    kept = jax.random.bernoulli(jax.random.key(0), 1 - rate, (20_000, 5, 10))
    prediction = (kept / (1 - rate) * batch.x) @ w
    sampled = 0.5 * ((prediction - batch.y) ** 2).mean(0)
    exact = train_loss(problem, {"w": w}, {"rate": rate}, batch)
    # standard error of the mean over 20000 draws: 1 %
    np.testing.assert_allclose(exact, sampled, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_per_example_acts_on_its_example_alone(kind):
    problem = ridge_regression(10, kind=kind)
    params = {"w": jnp.linspace(-1, 1, 10)}
    batch = jax.tree.map(lambda leaf: leaf[:3], DATA.train)
    tail = (10,) if kind == "feature" else ()
    values = jnp.broadcast_to(
        jnp.array([0.1, 0.5, 0.9]).reshape(3, *(1 for _ in tail)), (3, *tail)
    )
    outputs = problem.predict(params, batch, {NAMES[kind]: values}, None)
    losses = problem.train_loss(outputs, batch, {NAMES[kind]: values}, params)
    for i, value in enumerate(values):
        alone = train_loss(problem, params, {NAMES[kind]: value}, batch)[i]
        np.testing.assert_allclose(losses[i], alone, rtol=1e-12)


def test_each_group_of_a_tiled_batch_is_the_whole_training_set():
    problem = ridge_regression(10, draws=4)
    batch = problem.sample_train(DATA, jax.random.key(0))
    groups = jax.tree.map(lambda leaf: leaf.reshape(4, 300, *leaf.shape[1:]), batch)
    for group in range(4):
        np.testing.assert_array_equal(groups.x[group], DATA.train.x)
        np.testing.assert_array_equal(groups.y[group], DATA.train.y)


def test_the_validation_batch_is_the_validation_set():
    problem = ridge_regression(10, draws=4)
    batch = problem.sample_valid(DATA, jax.random.key(0))
    assert batch is DATA.valid


def test_hyperparameters_carry_their_bounds():
    decay = ridge_regression(10, kind="feature", init=0.5).hparams["weight_decay"]
    assert (decay.scale, decay.lower, decay.upper) == ("log", 0.0, np.inf)
    np.testing.assert_array_equal(decay.init, np.full(10, 0.5))
    problem = ridge_regression(10, kind="input_dropout", perturbation=0.3)
    rate = problem.hparams["rate"]
    assert (rate.scale, rate.lower, rate.upper) == ("logit", 0.0, 1.0)
    assert rate.perturbation == 0.3


def test_weights_start_at_zero():
    problem = ridge_regression(7)
    np.testing.assert_array_equal(problem.init(jax.random.key(0))["w"], np.zeros(7))
    with pytest.raises(ValueError, match=r"ridge_regression.*key"):
        problem.init(jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lasso"}, r"kind=\.\.\..*lasso"),
        ({"draws": 0}, r"draws=\.\.\..*at least 1; got 0"),
        ({"num_features": 0}, r"num_features=\.\.\..*at least 1; got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ridge_regression(**{"num_features": 10, **arguments})


def test_data_is_a_tree_of_two_sets():
    assert len(jax.tree.leaves(DATA)) == 4
    assert isinstance(jax.tree.map(jnp.asarray, DATA), RidgeData)
