import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.base import Action
from metax.tasks import classification, controller_data, task_data
from metax.tasks.tables import Split

KEY = jax.random.key(0)
SMALL = {"num_features": 6, "sizes": (40, 40, 40, 40, 40)}


def rows_of(splits):
    inputs = np.concatenate([split.inputs for split in splits])
    return inputs, np.concatenate([split.targets for split in splits])


def drawn(seed, **settings):
    draw = jax.jit(lambda key: classification.draw(key, **settings))
    return jax.tree.map(np.asarray, draw(jax.random.key(seed)))


@functools.cache
def sets(make, separated):
    return make(3, separated=separated)


BOTH = pytest.mark.parametrize("make", [classification.generate, drawn])


@BOTH
def test_sets_have_their_sizes_and_dtypes(make):
    splits = sets(make, False)
    shapes = [split.inputs.shape for split in splits]
    assert shapes == [(200, 32), (1000, 32), (200, 32), (1000, 32), (1000, 32)]
    for split in splits:
        assert split.inputs.dtype == np.float32
        assert split.targets.dtype == np.int32
        assert (split.noise.dtype, float(split.noise)) == (np.float32, 0.0)
        assert set(np.asarray(split.targets)) == {0, 1}


@BOTH
def test_redundant_features_are_linear_in_the_informative_ones(make):
    inputs, _ = rows_of(sets(make, True))
    values = np.linalg.svd(inputs[:, :4], compute_uv=False)
    assert values[1] > 1
    assert values[2] < 1e-4 * values[0]  # float32
    # the others are noise of variance 1, without correlation; √(1/3400) = .017
    covariance = np.cov(inputs[:, 4:].T)
    np.testing.assert_allclose(covariance, np.eye(28), atol=0.12)


@BOTH
def test_four_clusters_of_equal_size_sit_at_the_corners(make, monkeypatch):
    """Without their clouds only the corners are left, each with one class."""
    features = classification._features
    flat = lambda cluster, **parts: features(
        cluster, **{**parts, "normals": 0 * parts["normals"]}
    )
    monkeypatch.setattr(classification, "_features", flat)
    monkeypatch.setattr(classification, "_REDRAWN", 0.0)
    inputs, labels = rows_of(make(2, separated=True))
    corners, which, counts = np.unique(
        inputs[:, :2], axis=0, return_inverse=True, return_counts=True
    )
    assert corners.tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert counts.tolist() == [850] * 4
    classes = [set(labels[which.ravel() == corner]) for corner in range(4)]
    assert sorted(map(list, classes)) == [[0], [0], [1], [1]]
    assert len(set(which.ravel()[:20])) > 1  # rows are shuffled


def test_each_cloud_has_a_shape_of_its_own(monkeypatch):
    monkeypatch.setattr(
        classification, "_CORNERS", 100 * np.array([[1, 2], [3, 4]] * 2)
    )
    inputs, _ = rows_of(classification.generate(2, separated=True))
    at = np.round(inputs[:, :2] / 100).astype(int)
    shapes = [np.cov(inputs[at[:, 0] == corner, :2].T) for corner in (1, 3)]
    assert np.abs(shapes[0] - shapes[1]).max() > 0.05


@BOTH
def test_one_label_in_a_hundred_is_drawn_anew(make, monkeypatch):
    settings = {"num_features": 4, "sizes": (4000,) * 5}
    _, labels = rows_of(make(1, **settings))
    assert labels.mean() == pytest.approx(0.5, abs=0.01)
    monkeypatch.setattr(classification, "_REDRAWN", 0.0)
    _, clean = rows_of(make(1, **settings))
    assert clean.mean() == 0.5
    # half of 200 come out as they were; the standard deviation is 10
    assert 60 < (labels != clean).sum() < 140


@BOTH
def test_features_are_shuffled_unless_they_are_to_be_separated(make):
    shuffled, labels = rows_of(sets(make, False))
    ordered, same = rows_of(sets(make, True))
    np.testing.assert_array_equal(labels, same)
    match = [
        np.flatnonzero((ordered == column[:, None]).all(0)) for column in shuffled.T
    ]
    order = np.concatenate(match)
    assert sorted(order) == list(range(32))
    assert order.tolist() != list(range(32))


def test_the_released_set_is_cut_in_the_order_of_its_rows():
    from sklearn.datasets import make_classification

    inputs, labels = make_classification(
        3400, 32, n_informative=2, n_redundant=2, random_state=1
    )
    splits = classification.from_arrays(inputs, labels)
    for found, given in zip(rows_of(splits), (inputs, labels), strict=True):
        np.testing.assert_allclose(found, given, rtol=1e-6)
    np.testing.assert_array_equal(splits.task_train.targets, labels[1200:1400])
    assert [len(split.targets) for split in splits] == [200, 1000, 200, 1000, 1000]


def plain_logits(params, inputs):
    model = params["model"]
    hidden = jnp.maximum(inputs @ model["w1"] + model["b1"], 0)
    return hidden @ model["w2"] + model["b2"]


def plain_loss(params, split):
    logits = plain_logits(params, split.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, split.targets).mean()


def test_loss_gradient_and_accuracies_are_those_of_two_logits():
    problem = classification.problem(num_features=6, hidden=5)
    data = controller_data(classification.generate(1, **SMALL))
    double = lambda leaf: jnp.asarray(leaf, jnp.float64)
    # large weights: both right and wrong answers, and none near ½
    params = jax.tree.map(lambda leaf: 10 * double(leaf), problem.init(KEY))

    @jax.jit
    def both(params, data):
        batch = problem.sample(data, KEY)
        own = jax.value_and_grad(problem.losses[0])(params, batch, KEY)
        plain = jax.value_and_grad(plain_loss)(params, data["train"])
        guesses = [plain_logits(params, data[name].inputs).argmax(1) for name in data]
        seen = problem.observe(params, batch, data)
        seen["metric"] = problem.metric(params, data)
        return own, plain, guesses, seen, plain_loss(params, data["valid"])

    own, plain, guesses, seen, valid_loss = both(params, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), own, plain)
    train, valid = (
        np.mean(guess == data[name].targets)
        for guess, name in zip(guesses, data, strict=True)
    )
    assert 0 < valid < 1
    np.testing.assert_allclose(seen["train_accuracy"], train, rtol=1e-6)
    np.testing.assert_allclose(seen["valid_accuracy"], valid, rtol=1e-6)
    np.testing.assert_allclose(seen["metric"], valid, rtol=1e-6)
    np.testing.assert_allclose(seen["valid_loss"], valid_loss, rtol=1e-9)


def test_a_tie_is_an_answer_for_class_zero():
    problem = classification.problem(num_features=2, hidden=3)
    params = jax.tree.map(jnp.zeros_like, problem.init(KEY))
    split = Split(jnp.ones((4, 2)), jnp.array([0, 1, 1, 1]), jnp.zeros(()))
    assert float(problem.metric(params, {"valid": split})) == 0.25
    loss = problem.losses[0](params, split, KEY)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_the_penalty_counts_biases_too():
    problem = classification.problem(lam=0.5)
    params = jax.tree.map(lambda leaf: 0 * leaf - 2, problem.init(KEY))
    penalty = jax.jit(lambda params: problem.losses[1](params, None, KEY))
    size = 32 * 32 + 32 + 32 * 2 + 2
    np.testing.assert_allclose(penalty(params), 0.5 * 2 * size, rtol=1e-6)


def test_the_loss_falls_in_full_batches():
    problem = classification.problem(num_features=6, hidden=8)
    data = task_data(classification.generate(1, **SMALL))

    @jax.jit
    def run(params, data):
        batch = problem.sample(data, KEY)

        def step(carry, _):
            params, state = carry
            grad = jax.grad(problem.losses[0])(params, batch, KEY)
            updates, state = problem.optimizers.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (params, problem.optimizers.init(params))
        params, _ = jax.lax.scan(step, start, length=500)[0]
        return problem.evaluate(params, data)

    values = run(problem.init(KEY), data)
    names = {"train_loss", "valid_loss", "test_loss"}
    assert set(values) == names | {name.replace("loss", "accuracy") for name in names}
    assert values["train_loss"] < 0.4
    assert values["train_accuracy"] > 0.8


@pytest.mark.parametrize(("reward", "expected"), [("best", -125.0), ("last", -200.0)])
def test_rewards_are_a_negative_constant_over_the_accuracy(reward, expected):
    problem = classification.problem(reward=reward, reward_constant=100.0)
    history, live = jnp.array([0.8, 0.5, 0.9]), jnp.array([True, True, False])
    np.testing.assert_allclose(problem.reward(history, live), expected, rtol=1e-6)
    assert np.isnan(problem.reward(history, live & False))
    assert problem.maximize
    assert problem.reward(history * 1.1, live) > expected


def test_the_best_accuracy_counts_as_a_half_at_least():
    problem = classification.problem(reward_constant=100.0)
    assert float(problem.reward(jnp.array([0.3, 0.4]), jnp.array([True, True]))) == -200
    # what was not reached does not count
    reward = problem.reward(jnp.array([0.625, 0.9]), jnp.array([True, False]))
    assert float(reward) == -160


def test_lambda_may_be_traced_and_a_sweep_is_a_vmap():
    params = classification.problem(num_features=6, hidden=3).init(KEY)

    def penalty(lam):
        problem = classification.problem(lam, num_features=6, hidden=3)
        return problem.losses[1](params, None, KEY)

    values = jax.jit(jax.vmap(penalty))(jnp.array([0.1, 0.4]))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values[1], 4 * values[0], rtol=1e-6)
    np.testing.assert_allclose(values[1], penalty(0.4), rtol=1e-6)


def test_parameters_start_as_published():
    problem = classification.problem(num_features=7, hidden=5)
    model = jax.jit(jax.vmap(problem.init))(jax.random.split(KEY, 200))["model"]
    shapes = {name: leaf.shape[1:] for name, leaf in model.items()}
    assert shapes == {"w1": (7, 5), "b1": (5,), "w2": (5, 2), "b2": (2,)}
    assert {leaf.dtype for leaf in model.values()} == {jnp.dtype(jnp.float32)}
    for name in ("w1", "w2"):
        assert 0.19 < jnp.abs(model[name]).max() <= 0.2
        # a normal that is cut at two standard deviations keeps .88 of one
        np.testing.assert_allclose(model[name].std(), 0.088, rtol=0.05)
    np.testing.assert_allclose(model["b1"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(model["b2"], 0.1, rtol=1e-6)


def test_the_main_loss_is_action_zero_and_both_move_everything():
    rule = optax.sgd(0.1)
    problem = classification.problem(optimizer=rule)
    assert problem.actions == (Action(0), Action(1))
    assert problem.names == ("cross_entropy", "l1")
    assert problem.full_batch
    assert problem.optimizers is rule
    assert (problem.patience, problem.validate_every) == (20, 10)
    apart = classification.problem(optimizer=rule, optimizer_sharing="action")
    assert apart.optimizers == {0: rule, 1: rule}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: classification.generate(1, num_features=3),
            r"`classification.generate\(num_features=...\)` must be at least 4.*got 3",
        ),
        (
            lambda: classification.draw(KEY, sizes=(1, 2, 3)),
            r"`classification.draw\(sizes=...\)`.*five parts.*got \(1, 2, 3\)",
        ),
        (
            lambda: classification.draw(jax.random.PRNGKey(0)),
            r"classification.draw\(key=...\)",
        ),
        (
            lambda: classification.from_arrays(np.ones((9, 2)), np.ones(9)),
            r"add up to 3400, for 9 inputs and 9 labels",
        ),
        (
            lambda: classification.problem(hidden=0),
            r"`classification.problem\(hidden=...\)` must be at least 1; got 0",
        ),
        (
            lambda: classification.problem(lam=-1.0),
            r"`classification.problem\(lam=...\)` must be at least 0; got -1.0",
        ),
        (lambda: classification.problem(reward="mean"), r"'best' or 'last'; got"),
        (lambda: classification.problem().init(0), r"problem\(...\).init\(key=...\)"),
    ],
)
def test_bad_arguments_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
