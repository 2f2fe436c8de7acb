import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import inner_loop, unroll
from metax.tasks import (
    MLP,
    VGG16,
    BatchNorm,
    Linear,
    Split,
    crop_and_flip,
    epochs,
    image_classification,
    load,
    normalization,
)

KEY = jax.random.key(0)


def random_split(num, shape=(4, 4, 1), seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    label = rng.integers(0, 3, num).astype(np.int32)
    return Split(image=jnp.asarray(image), label=jnp.asarray(label))


class SmallNorm(nn.Module):
    """Two convolutions with batch norm: the smallest model with a state."""

    channels: int = 8

    @nn.compact
    def __call__(self, x, *, train):
        for _ in range(2):
            x = nn.Conv(self.channels, (3, 3))(x)
            x = nn.relu(BatchNorm()(x, train=train))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Centred(nn.Module):
    """Reads its state in the training pass too, which batch norm does not."""

    @nn.compact
    def __call__(self, x, *, train):
        mean = self.variable("statistics", "mean", jnp.ones, x.shape[1:], x.dtype)
        centred = x - mean.value
        if train:
            mean.value = x.mean(0)
        return nn.Dense(3)(centred.reshape(x.shape[0], -1))


class SmallDropout(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


def in_double(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


# --- loss and evaluation ---------------------------------------------------------


def test_loss_of_softmax_regression_equals_the_formula():
    batch, l2 = random_split(5), 0.1
    task = image_classification(Linear(3), (4, 4, 1), mean=100.0, std=50.0, l2=l2)
    params = in_double(task.init(KEY))
    layer = {k: np.asarray(v) for k, v in params["params"]["Dense_0"].items()}
    x = ((np.asarray(batch.image, float) - 100.0) / 50.0).reshape(5, 16)
    logits = x @ layer["kernel"] + layer["bias"]
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    cross_entropy = -logp[np.arange(5), batch.label].mean()
    penalty = 0.5 * l2 * sum((leaf**2).sum() for leaf in layer.values())
    # images are normalised in float32
    np.testing.assert_allclose(
        task.loss(params, batch, KEY), cross_entropy + penalty, rtol=1e-6
    )


def test_gradient_of_the_penalty_is_l2_times_every_parameter():
    batch = random_split(5)
    plain, penalised = (
        image_classification(SmallNorm(), (4, 4, 1), std=100.0, l2=l2)
        for l2 in (0.0, 0.1)
    )
    params = plain.init(KEY)
    gradients = [
        jax.jit(jax.grad(task.loss))(params, batch, KEY) for task in (plain, penalised)
    ]
    difference = optax.tree.sub(gradients[1], gradients[0])
    expected = optax.tree.scale(0.1, params["params"])
    # float32 gradients of order 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        difference["params"],
        expected,
    )
    assert optax.tree.norm(difference["batch_stats"]) == 0


def test_weight_decay_before_the_rule_sees_the_gradient_of_the_penalty():
    batch, states = random_split(5), []
    for l2, rule in [
        (0.1, optax.sgd(0.5)),
        (0.0, optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))),
    ]:
        task = image_classification(Linear(3), (4, 4, 1), std=100.0, l2=l2)
        loop = inner_loop(task, rule)
        states.append(jax.jit(loop.step)(loop.init(KEY), KEY, batch)[0].params)
    # float32 steps, summed in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *states)


def test_mean_and_std_apply_to_each_channel():
    batch = random_split(4, (4, 4, 2))
    mean, std = np.array([10.0, 200.0]), np.array([5.0, 50.0])
    task = image_classification(Linear(3), (4, 4, 2), mean=mean, std=std)
    plain = image_classification(Linear(3), (4, 4, 2))
    params = task.init(KEY)
    scaled = batch._replace(image=(batch.image - mean) / std)
    np.testing.assert_allclose(
        task.loss(params, batch, KEY), plain.loss(params, scaled, KEY), rtol=1e-6
    )


@pytest.mark.parametrize("num", [7, 1000, 2003])
def test_evaluation_in_chunks_equals_that_of_the_whole(num):
    data = random_split(num)
    task = image_classification(Linear(3), (4, 4, 1), mean=127.0, std=70.0, l2=1.0)
    params = task.init(KEY)
    metrics = jax.jit(task.evaluate)(params, data)
    x = (data.image.astype(jnp.float64) - 127.0) / 70.0
    logits = Linear(3).apply(params, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.label)
    # float32 sums of 2003 terms
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    accuracy = (logits.argmax(1) == data.label).mean()
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_evaluation_needs_no_memory_for_all_activations_at_once():
    data = Split(
        jax.ShapeDtypeStruct((10_000, 8, 8, 1), jnp.uint8),
        jax.ShapeDtypeStruct((10_000,), jnp.int32),
    )
    task = image_classification(MLP(10, widths=(512,)), (8, 8, 1))
    params = jax.eval_shape(task.init, KEY)
    compiled = jax.jit(task.evaluate).lower(params, data).compile()
    hidden_bytes = 10_000 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < hidden_bytes / 2


def test_softmax_regression_learns_the_digits():
    data = load("digits")
    mean, std = normalization("digits")
    task = image_classification(Linear(10), data.train.image[0], mean=mean, std=std)
    loop = epochs(
        inner_loop(task, optax.sgd(0.5)),
        128,
        evaluate=lambda state, test: task.evaluate(state.params, test),
    )
    run = jax.jit(lambda state, keys, data: unroll(loop, state, keys, data))
    _, infos = run(loop.init(KEY), jax.random.split(jax.random.key(1), 10), data)
    assert infos.is_finite.all()
    # scikit-learn's logistic regression reaches 0.96 to 0.97 on such a division
    assert infos.metrics["accuracy"][-1] > 0.95
    assert infos.metrics["loss"][-1] < infos.metrics["loss"][0] < np.log(10)


# --- state -----------------------------------------------------------------------


def test_model_without_state_has_no_carry():
    assert image_classification(Linear(3), (4, 4, 1)).carry is None
    assert image_classification(SmallDropout(), (4, 4, 1)).carry is None
    assert image_classification(SmallNorm(), (4, 4, 1)).carry is not None


@pytest.mark.parametrize(
    ("model", "state"), [(SmallNorm(), "batch_stats"), (Centred(), "statistics")]
)
def test_no_gradient_reaches_the_state(model, state):
    task = image_classification(model, (4, 4, 1), std=100.0, l2=0.1)
    gradient = jax.jit(jax.grad(task.loss))(task.init(KEY), random_split(5), KEY)
    assert optax.tree.norm(gradient[state]) == 0
    assert optax.tree.norm(gradient["params"]) > 0


def test_a_step_writes_the_statistics_of_its_batch_whatever_the_rule_does():
    model, batch = SmallNorm(), random_split(5)
    task = image_classification(model, (4, 4, 1), mean=127.0, std=70.0)
    rule = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    loop = inner_loop(task, rule)
    state = loop.init(KEY)
    new_state, _ = jax.jit(loop.step)(state, KEY, batch)
    x = (batch.image.astype(jnp.float32) - 127.0) / 70.0
    _, expected = model.apply(state.params, x, train=True, mutable=["batch_stats"])
    # float32, compiled against eager
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
        new_state.params["batch_stats"],
        expected["batch_stats"],
    )
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_state_keeps_shapes_and_dtypes_in_a_scan():
    batch = random_split(5)
    loop = inner_loop(
        image_classification(SmallNorm(), (4, 4, 1), std=100.0), optax.sgd(0.1)
    )
    state, infos = unroll(loop, loop.init(KEY), jax.random.split(KEY, 3), batch)
    assert infos.is_finite.all()
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("float32")}


@pytest.mark.parametrize("seeds", [None, 2])
def test_carry_shares_the_forward_pass_of_the_loss(seeds):
    task = image_classification(SmallNorm(), (8, 8, 3), std=100.0, l2=1e-4)
    batch = Split(
        jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8),
        jax.ShapeDtypeStruct((16,), jnp.int32),
    )

    def flops(task):
        loop = inner_loop(task, optax.sgd(0.1))
        init, step, key = loop.init, loop.step, KEY
        if seeds is not None:
            init, step = jax.vmap(init), jax.vmap(step, (0, 0, None))
            key = jax.random.split(KEY, seeds)
        state = jax.eval_shape(init, key)
        return jax.jit(step).lower(state, key, batch).compile().cost_analysis()["flops"]

    # a forward pass of its own would add about 30 %
    assert flops(task) <= 1.01 * flops(task._replace(carry=None))


def test_dropout_follows_the_key_of_the_loss():
    task = image_classification(SmallDropout(), (4, 4, 1), std=100.0)
    batch = random_split(5)
    params = task.init(KEY)
    first, again = (task.loss(params, batch, KEY) for _ in range(2))
    assert first == again
    assert first != task.loss(params, batch, jax.random.key(1))


def augmented_vgg16_loop():
    mean, std = normalization("imagenet")
    task = image_classification(
        VGG16(10, scale=1 / 64),
        (32, 32, 3),
        batch_size=4,
        mean=mean,
        std=std,
        l2=5e-4,
        augment=crop_and_flip(),
    )
    return task, inner_loop(task, optax.sgd(0.1))


def test_vgg16_keeps_its_state_in_a_step_on_augmented_images():
    _, loop = augmented_vgg16_loop()
    state = jax.eval_shape(loop.init, KEY)
    new_state, _ = jax.eval_shape(loop.step, state, KEY, random_split(8, (32, 32, 3)))
    assert new_state == state


@pytest.mark.slow  # compiling thirteen convolutions and their gradients
def test_vgg16_takes_a_finite_step_on_augmented_images():
    data = random_split(8, (32, 32, 3))
    task, loop = augmented_vgg16_loop()
    state, info = jax.jit(loop.step)(loop.init(KEY), KEY, data)
    assert info.is_finite
    assert np.isfinite(task.evaluate(state.params, data)["loss"])


# --- sampling --------------------------------------------------------------------


def test_without_a_batch_size_the_data_are_the_batch():
    data = random_split(5)
    batch = image_classification(Linear(3), (4, 4, 1)).sample(data, KEY)
    assert batch is data


def test_with_a_batch_size_rows_are_drawn():
    data = random_split(50)
    batch = image_classification(Linear(3), (4, 4, 1), batch_size=7).sample(data, KEY)
    assert batch.image.shape == (7, 4, 4, 1)
    rows = {(bytes(np.asarray(i)), int(y)) for i, y in zip(*data, strict=True)}
    assert {(bytes(np.asarray(i)), int(y)) for i, y in zip(*batch, strict=True)} <= rows


def test_augmentation_acts_on_samples_and_not_on_evaluation():
    data = random_split(6)
    dark = lambda batch, key: batch._replace(image=0 * batch.image)
    task = image_classification(Linear(3), (4, 4, 1), augment=dark)
    plain = image_classification(Linear(3), (4, 4, 1))
    assert task.sample(data, KEY).image.max() == 0
    params = task.init(KEY)
    assert task.evaluate(params, data) == plain.evaluate(params, data)


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    "example", [(4, 4, 1), np.zeros((4, 4, 1)), random_split(2)[0]]
)
def test_example_is_a_shape_an_image_or_a_batch(example):
    params = jax.eval_shape(image_classification(Linear(3), example).init, KEY)
    assert params["params"]["Dense_0"]["kernel"].shape == (16, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, r"`image_classification\(batch_size=...\)`.*got 0"),
        ({"l2": -1e-4}, r"`image_classification\(l2=...\)`.*got -0.0001"),
        ({"std": 0.0}, r"`image_classification\(std=...\)` must be above 0"),
        ({"std": np.array([1.0, np.nan])}, r"`image_classification\(std=...\)`"),
        ({"example": (28, 28)}, r"`image_classification\(example=...\)`.*\(28, 28\)"),
        (
            {"example": np.zeros(784)},
            r"`image_classification\(example=...\)`.*\(784,\)",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        image_classification(Linear(3), **{"example": (4, 4, 1), **kwargs})


def test_raw_keys_are_refused():
    with pytest.raises(
        ValueError, match=r"image_classification\(...\).init\(key=...\)"
    ):
        image_classification(Linear(3), (4, 4, 1)).init(jax.random.PRNGKey(0))
