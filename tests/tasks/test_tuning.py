import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Hyperparameter
from metax.tasks import BatchNorm, Split, load, normalization
from metax.tasks.holdout import TuningData, hold_out
from metax.tasks.ranges import stock_hparams
from metax.tasks.tunable import SimpleCNN, TunableMLP
from metax.tasks.tuning import image_tuning

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
MEAN, STD = 100.0, 50.0
SMALL = TunableMLP(3, (5,))


class SmallNorm(nn.Module):
    """A dense layer between two norms: the smallest model with statistics."""

    num_classes: int = 3
    rate_names = ("norm_epsilon",)

    @nn.compact
    def __call__(self, x, rates, train):
        x = x.reshape(x.shape[0], -1)
        for i in (1, 2):
            epsilon = rates.get("norm_epsilon", 1e-5)
            x = BatchNorm(epsilon=epsilon, name=f"norm_{i}")(x, train=train)
            x = nn.Dense(3, name=f"fc_{i}")(x)
        return x


def random_split(num=8, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (num, *SHAPE), dtype=np.uint8)
    label = rng.integers(0, 3, num).astype(np.int32)
    return Split(image=jnp.asarray(image), label=jnp.asarray(label))


@functools.cache
def start(names=(), model=SMALL):
    """Problem, variables and a batch of eight."""
    hparams = stock_hparams(names)
    problem = image_tuning(model, SHAPE, hparams, mean=MEAN, std=STD).problem
    return problem, problem.init(KEY), random_split()


def loss_at(names, values, model=SMALL, key=KEY):
    """Per-example training losses, and the parts they are made of."""
    problem, params, batch = start(names, model)
    outputs = problem.predict(params, batch, values, key)
    return problem.train_loss(outputs, batch, values, params), outputs, params, batch


def cross_entropy(logits, target):
    return -(target * jax.nn.log_softmax(logits)).sum(-1)


def test_without_hyperparameters_the_loss_is_cross_entropy_of_normalised_images():
    losses, outputs, params, batch = loss_at((), {})
    x = (np.asarray(batch.image, np.float32) - MEAN) / STD
    logits = SMALL.apply(params, jnp.asarray(x), {}, False)
    # numpy and XLA divide differently in the last place
    np.testing.assert_allclose(outputs["logits"], logits, atol=1e-6)
    expected = cross_entropy(outputs["logits"], jnp.eye(3)[batch.label])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    problem, *_ = start()
    assert problem.valid_loss(outputs, batch) == pytest.approx(expected.mean())
    assert problem.carry is None


def test_label_smoothing_equals_the_closed_form():
    strength = jnp.linspace(0.0, 0.5, 8)
    losses, outputs, _, batch = loss_at(
        ("label_smoothing",), {"label_smoothing": strength}
    )
    hard = cross_entropy(outputs["logits"], jnp.eye(3)[batch.label])
    flat = -jax.nn.log_softmax(outputs["logits"]).mean(-1)
    expected = (1 - strength) * hard + strength * flat
    # single precision
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_label_smoothing_has_the_gradient_of_the_closed_form():
    def mean_loss(strength):
        return loss_at(("label_smoothing",), {"label_smoothing": strength})[0].sum()

    strength = jnp.full(8, 0.1)
    _, outputs, _, batch = loss_at(("label_smoothing",), {"label_smoothing": strength})
    hard = cross_entropy(outputs["logits"], jnp.eye(3)[batch.label])
    flat = -jax.nn.log_softmax(outputs["logits"]).mean(-1)
    # single precision
    np.testing.assert_allclose(jax.grad(mean_loss)(strength), flat - hard, atol=1e-5)


def test_mixup_mixes_images_and_labels_alike():
    names, values = ("mixup",), {"mixup": jnp.full(8, 2.0)}
    linear = TunableMLP(3, ())
    losses, outputs, params, batch = loss_at(names, values, linear)
    # the logits of softmax regression are affine, so they are mixed as the labels are
    pure = linear.apply(params, (batch.image - MEAN) / STD, {}, False)
    target = outputs["target"]
    np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-6)
    assert 0 < target.max(-1).min() < 1
    np.testing.assert_allclose(losses, cross_entropy(outputs["logits"], target), 1e-5)
    c, partner = _coefficients(pure, outputs["logits"])
    labels = jnp.eye(3)[batch.label]
    expected = c[:, None] * labels + (1 - c[:, None]) * labels[partner]
    # three orders of rounding in single precision
    np.testing.assert_allclose(target, expected, atol=1e-3)


def _coefficients(pure, mixed):
    """c and π with mixed_i = c_i pure_i + (1 - c_i) pure_π(i), by least squares."""
    pure, mixed = np.asarray(pure, float), np.asarray(mixed, float)
    cs, partners = [], []
    for i in range(len(pure)):
        span = pure - pure[i]
        share = (span @ (mixed[i] - pure[i])) / np.maximum((span**2).sum(-1), 1e-12)
        misfit = np.linalg.norm(pure[i] + share[:, None] * span - mixed[i], axis=-1)
        cs.append(1 - share[misfit.argmin()])
        partners.append(misfit.argmin())
    return jnp.array(cs), jnp.array(partners)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("weight_decay", ["fc_1", "output"]),
        ("weight_decay_fc_1", ["fc_1"]),
        ("weight_decay_output", ["output"]),
    ],
)
def test_weight_decay_is_half_the_squared_norm_of_its_kernels(name, kernels):
    decay = jnp.linspace(0.0, 10.0, 8)
    plain, _, params, _ = loss_at((), {})
    losses, *_ = loss_at((name,), {name: decay})
    size = sum((params["params"][k]["kernel"] ** 2).sum() for k in kernels)
    # single precision
    np.testing.assert_allclose(losses - plain, 0.5 * decay * size, rtol=1e-5, atol=1e-6)


def test_decays_of_layers_add_up_to_that_of_all():
    decay = jnp.linspace(0.0, 10.0, 8)
    parts = ("weight_decay_fc_1", "weight_decay_output")
    together, *_ = loss_at(parts, dict.fromkeys(parts, decay))
    whole, *_ = loss_at(("weight_decay",), {"weight_decay": decay})
    np.testing.assert_allclose(together, whole, rtol=1e-6)


def test_norm_decay_acts_on_scales_and_biases_of_norms_alone():
    model = SmallNorm()
    plain, *_ = loss_at((), {}, model)
    losses, _, params, _ = loss_at(("norm_decay",), {"norm_decay": jnp.ones(8)}, model)
    norms = [params["params"][k] for k in ("norm_1", "norm_2")]
    size = sum((leaf**2).sum() for leaf in jax.tree.leaves(norms))
    assert size > 1
    np.testing.assert_allclose(losses - plain, 0.5 * size * jnp.ones(8), rtol=1e-5)


def test_weight_decay_is_asked_of_a_view_that_stands_for_the_weights():
    problem, params, batch = start(("weight_decay", "weight_decay_fc_1"))
    chosen = []

    class View:
        def squared_norm(self, select):
            leaves = jax.tree_util.tree_leaves_with_path(params)
            chosen.append([path for path, leaf in leaves if select(path, leaf)])
            return jnp.arange(8.0)

    values = {"weight_decay": jnp.full(8, 2.0), "weight_decay_fc_1": jnp.full(8, 4.0)}
    outputs = {"logits": jnp.zeros((8, 3))}
    losses = problem.train_loss(outputs, batch, values, View())
    np.testing.assert_allclose(losses, np.log(3) + 3 * np.arange(8.0), rtol=1e-6)
    assert [[path[1].key for path in paths] for paths in chosen] == [
        ["fc_1", "output"],
        ["fc_1"],
    ]


def test_a_dropout_rate_reaches_its_example_in_training():
    names = ("input_dropout",)
    rate = jnp.zeros(8).at[3].set(1.0)
    changed = lambda key: loss_at(names, {"input_dropout": rate}, key=key)[1]["logits"]
    plain = loss_at((), {})[1]["logits"]
    differs = jnp.abs(changed(KEY) - plain).max(-1) > 1e-5
    assert jnp.array_equal(differs, jnp.arange(8) == 3)
    assert jnp.array_equal(changed(None), plain)


def test_an_augmentation_strength_reaches_its_example_in_training():
    names = ("cutout_length",)
    length = jnp.zeros(8).at[5].set(24.0)
    values = {"cutout_length": length}
    _, plain, params, _ = loss_at((), {})
    blank = SMALL.apply(params, jnp.zeros((1, *SHAPE), jnp.float32), {}, False)
    logits = loss_at(names, values)[1]["logits"]
    expected = plain["logits"].at[5].set(blank[0])
    # 255 · (x / 255) in single precision
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    still = loss_at(names, values, key=None)[1]["logits"]
    assert jnp.array_equal(still, loss_at((), {}, key=None)[1]["logits"])


@pytest.mark.parametrize("key", [None, KEY])
def test_what_is_tuned_has_the_shapes_and_dtypes_of_a_batch(key):
    names = (
        *("input_dropout", "dropout_1", "dropout_2", "dropout_fc"),
        *("rotation", "shear", "translate", "zoom", "brightness", "contrast"),
        *("input_scale", "cutout_length", "cutout_holes"),
        *("label_smoothing", "mixup", "weight_decay", "weight_decay_conv_1"),
    )
    model = SimpleCNN(3, channels=(2, 3), width=4)
    problem = image_tuning(model, SHAPE, stock_hparams(names)).problem
    values = {name: jnp.full(8, spec.init) for name, spec in problem.hparams.items()}

    def losses(params):
        outputs = problem.predict(params, random_split(), values, key)
        assert outputs["logits"].dtype == jnp.float32
        assert ("target" in outputs) == (key is not None)
        return problem.train_loss(outputs, random_split(), values, params)

    assert jax.eval_shape(losses, jax.eval_shape(problem.init, KEY)).shape == (8,)


def test_statistics_change_in_training_only_and_are_carried():
    problem, params, batch = start((), SmallNorm())
    still = problem.predict(params, batch, {}, None)
    moved = problem.predict(params, batch, {}, KEY)
    equal = lambda tree: jax.tree.map(jnp.array_equal, tree, params["batch_stats"])
    assert all(jax.tree.leaves(equal(still["batch_stats"])))
    assert not any(jax.tree.leaves(equal(moved["batch_stats"])))
    carried = problem.carry(params, moved)
    assert set(carried) == {"params", "batch_stats"}
    assert carried["params"] is params["params"]
    assert carried["batch_stats"] is moved["batch_stats"]


def test_no_gradient_reaches_statistics_nor_comes_from_them():
    problem, params, batch = start((), SmallNorm())

    def loss(params, key, weight):
        outputs = problem.predict(params, batch, {}, key)
        means = jax.tree.leaves(outputs["batch_stats"])
        return outputs["logits"].sum() + weight * sum(leaf.sum() for leaf in means)

    grad = jax.jit(jax.grad(loss))
    for key in (KEY, None):
        grads, expected = grad(params, key, 1.0), grad(params, key, 0.0)
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads["batch_stats"]))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, grads, expected))


def test_norm_epsilon_acts_in_evaluation_and_is_asked_for():
    tuning = image_tuning(SmallNorm(), SHAPE, stock_hparams(["norm_epsilon"]), std=STD)
    params, data = tuning.problem.init(KEY), random_split()
    values = [{"norm_epsilon": jnp.float32(value)} for value in (1e-5, 0.1)]
    losses = [tuning.evaluate(params, data, value)["loss"] for value in values]
    direct = [
        tuning.problem.valid_loss(
            tuning.problem.predict(params, data, value, None), data
        )
        for value in values
    ]
    np.testing.assert_allclose(losses, direct, rtol=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-4
    with pytest.raises(ValueError, match=r"evaluate\(hparams=...\).*norm_epsilon"):
        tuning.evaluate(params, data)


def test_each_split_has_its_purpose():
    part = lambda value: Split(
        jnp.full((6, *SHAPE), value, jnp.uint8), jnp.full(6, value, jnp.int32)
    )
    problem = image_tuning(TunableMLP(3), SHAPE, {}, batch_size=4).problem
    data = TuningData(train=part(0), valid=part(1), test=part(2))
    for sample, value in ((problem.sample_train, 0), (problem.sample_valid, 1)):
        batch = sample(data, KEY)
        assert batch.image.shape == (4, *SHAPE)
        assert jnp.all(batch.image == value)
        assert jnp.all(batch.label == value)


def test_half_of_the_training_images_are_flipped_and_no_validation_image():
    image = jnp.zeros((3, *SHAPE), jnp.uint8).at[:, :, 0].set(9)
    split = Split(image=image, label=jnp.arange(3, dtype=jnp.int32))
    data = TuningData(train=split, valid=split, test=split)
    problem = image_tuning(TunableMLP(3), SHAPE, {}, batch_size=400, flip=True).problem
    is_flipped = problem.sample_train(data, KEY).image[:, 0, -1, 0] == 9
    # 400 draws: a standard deviation of .025
    assert abs(is_flipped.mean() - 0.5) < 0.1
    assert jnp.all(problem.sample_valid(data, KEY).image[:, 0, 0, 0] == 9)
    plain = image_tuning(TunableMLP(3), SHAPE, {}, batch_size=400).problem
    assert jnp.all(plain.sample_train(data, KEY).image[:, 0, 0, 0] == 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hparams": stock_hparams(["dropout_9"])}, "among.*dropout_1.*'dropout_9'"),
        ({"hparams": stock_hparams(["norm_decay"])}, "got 'norm_decay'"),
        ({"hparams": stock_hparams(["weight_decay_fc_2"])}, "got 'weight_decay_fc_2'"),
        ({"hparams": {"rotation": Hyperparameter(jnp.ones(2))}}, "must be a scalar"),
        ({"hparams": stock_hparams(["cutout_holes"])}, "without 'cutout_length'"),
        (
            {"model": SmallNorm(), "hparams": {"norm_epsilon": Hyperparameter(1e-5)}},
            "norm_epsilon.*shared",
        ),
        ({"batch_size": 0}, r"image_tuning\(batch_size=...\).*got 0"),
        ({"std": 0.0}, r"image_tuning\(std=...\)"),
        ({"example": (4, 4)}, r"image_tuning\(example=...\)"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    kwargs = {"model": SMALL, "example": SHAPE, "hparams": {}, **changes}
    with pytest.raises(ValueError, match=message):
        image_tuning(**kwargs)


def test_augmentation_of_floats_is_refused():
    problem, params, batch = start(("rotation",))
    batch = batch._replace(image=jnp.asarray(batch.image, jnp.float32))
    with pytest.raises(ValueError, match="integer images.*float32"):
        problem.predict(params, batch, {"rotation": jnp.ones(8)}, KEY)


def test_raw_keys_are_refused():
    problem, *_ = start()
    with pytest.raises(ValueError, match=r"init\(key=...\)"):
        problem.init(jax.random.PRNGKey(0))


def test_gradient_descent_learns_the_digits_with_fixed_hyperparameters():
    digits = load("digits")
    data = jax.tree.map(jnp.asarray, hold_out(digits, 0.15))
    mean, std = normalization("digits")
    specs = stock_hparams(["input_dropout", "dropout_1", "weight_decay"])
    problem, evaluate = image_tuning(
        TunableMLP(10, (32,)), digits.train.image, specs, mean=mean, std=std
    )
    rule = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def run(params, data):
        def step(carry, key):
            params, state = carry
            key_batch, key_loss = jax.random.split(key)
            batch = problem.sample_train(data, key_batch)
            values = {name: jnp.full(128, spec.init) for name, spec in specs.items()}

            def loss(params):
                outputs = problem.predict(params, batch, values, key_loss)
                return problem.train_loss(outputs, batch, values, params).mean()

            updates, state = rule.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(KEY, 100)
        (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), keys)
        return evaluate(params, data.valid)

    assert run(jax.jit(problem.init)(KEY), data)["accuracy"] > 0.85
