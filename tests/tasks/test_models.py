import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks import CNN, MLP, VGG16, BatchNorm, Linear

KEY = jax.random.key(0)


def init_shapes(model, shape):
    x = jnp.zeros((1, *shape), jnp.float32)
    return jax.eval_shape(lambda key: model.init(key, x, train=False), KEY)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (Linear(10), (28, 28, 1), 7_850),
        (MLP(10), (28, 28, 1), 785_000 + 1_001_000 + 10_010),
        (CNN(10), (28, 28, 1), 416 + 12_832 + 1568 * 128 + 128 + 1_290),
        # convolutions 14 714 688, norms 8 448, dense 2 · 262 656 + 5 130
        (VGG16(10), (32, 32, 3), 15_253_578),
    ],
)
def test_number_of_parameters_is_that_of_the_published_model(model, shape, expected):
    assert count(init_shapes(model, shape)["params"]) == expected


def test_vgg16_keeps_statistics_for_every_convolution():
    statistics = init_shapes(VGG16(10), (32, 32, 3))["batch_stats"]
    assert len(statistics) == 13
    assert count(statistics) == 2 * 4_224


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Linear(7), (5, 4, 2)),
        (MLP(7, widths=(3,)), (5, 4, 2)),
        (CNN(7, channels=(2, 3), width=4), (9, 8, 1)),
        (VGG16(7, scale=1 / 64), (32, 32, 3)),
        (VGG16(7, scale=1 / 64), (65, 40, 1)),
    ],
)
def test_logits_have_one_row_an_image_and_one_column_a_class(model, shape):
    x = jax.random.normal(KEY, (3, *shape), jnp.float32)
    logits = jax.eval_shape(
        lambda x: model.apply(model.init(KEY, x, train=False), x, train=False), x
    )
    assert logits.shape == (3, 7)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("model", [Linear(10), MLP(10, widths=(64, 64)), CNN(10)])
def test_weights_and_biases_start_uniform_in_the_inverse_root_of_fan_in(model):
    x = jnp.zeros((1, 16, 16, 1))
    params = jax.jit(lambda: model.init(KEY, x, train=False))()["params"]
    for layer in params.values():
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        for leaf in layer.values():
            assert jnp.abs(leaf).max() <= bound
            # the extreme of n uniform draws is below .5 with chance 2^-n, n >= 10
            assert jnp.abs(leaf).max() > bound / 2
        if layer["kernel"].size > 1000:
            # U(-b, b) has standard deviation b/√3; 1000 draws tell it to 3 %
            assert layer["kernel"].std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_linear_is_the_affine_map_of_the_pixels():
    x = jax.random.normal(KEY, (2, 3, 3, 1))
    variables = Linear(4).init(KEY, x, train=False)
    layer = variables["params"]["Dense_0"]
    expected = x.reshape(2, 9) @ layer["kernel"] + layer["bias"]
    logits = Linear(4).apply(variables, x, train=False)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)


def test_cnn_equals_flax_layers_with_windowed_pooling():
    x = jax.random.normal(KEY, (2, 9, 8, 1))
    model = CNN(5, channels=(2, 3), width=4)
    variables = model.init(KEY, x, train=False)
    params = variables["params"]

    y = x
    for i, channels in enumerate((2, 3)):
        conv = nn.Conv(channels, (5, 5))
        y = nn.relu(conv.apply({"params": params[f"Conv_{i}"]}, y))
        y = nn.max_pool(y, (2, 2), (2, 2))
    y = nn.relu(nn.Dense(4).apply({"params": params["Dense_0"]}, y.reshape(2, -1)))
    y = nn.Dense(5).apply({"params": params["Dense_1"]}, y)
    np.testing.assert_allclose(model.apply(variables, x, train=False), y, rtol=1e-9)


def batch_norm_variables(x, momentum=0.9):
    norm = BatchNorm(momentum=momentum)
    variables = norm.init(KEY, x, train=False)
    params = {"scale": jnp.array([2.0, 0.5]), "bias": jnp.array([1.0, -1.0])}
    return norm, {**variables, "params": params}


def test_batch_norm_in_training_standardises_each_channel():
    x = 3 + 2 * jax.random.normal(KEY, (4, 3, 3, 2))
    norm, variables = batch_norm_variables(x)
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), [1.0, -1.0], atol=1e-12)
    # epsilon = 1e-5 in the variance makes them a little smaller
    np.testing.assert_allclose(y.std((0, 1, 2)), [2.0, 0.5], rtol=1e-5)


def test_batch_norm_equals_that_of_flax():
    x = 3 + 2 * jax.random.normal(KEY, (4, 3, 3, 2))
    norm, variables = batch_norm_variables(x)
    theirs = nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    y, changed = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    expected, _ = theirs.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y, expected, rtol=1e-10)
    variables = {**variables, **changed}
    np.testing.assert_allclose(
        norm.apply(variables, x, train=False),
        theirs.apply(variables, x, use_running_average=True),
        rtol=1e-10,
    )


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_without_scale_and_bias_does_the_rest_alike(train):
    x = 3 + 2 * jax.random.normal(KEY, (4, 3, 3, 2))
    norm, variables = batch_norm_variables(x)
    plain = BatchNorm(affine=False)
    statistics = {"batch_stats": variables["batch_stats"]}
    assert set(plain.init(KEY, x, train=False)) == set(statistics)
    y, changed = plain.apply(statistics, x, train=train, mutable=["batch_stats"])
    expected, theirs = norm.apply(variables, x, train=train, mutable=["batch_stats"])
    params = variables["params"]
    np.testing.assert_allclose(
        y * params["scale"] + params["bias"], expected, rtol=1e-10
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, changed, theirs))


def test_batch_norm_averages_mean_and_unbiased_variance():
    x = 3 + 2 * jax.random.normal(KEY, (4, 3, 3, 2))
    norm, variables = batch_norm_variables(x, momentum=0.8)
    _, changed = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.2 * mean, rtol=1e-6)
    # flax's variables start in float32
    np.testing.assert_allclose(
        changed["batch_stats"]["var"], 0.8 + 0.2 * var, rtol=1e-6
    )


def test_vgg16_drops_units_in_training_alone():
    x = jnp.zeros((2, 32, 32, 3), jnp.float32)
    variables = init_shapes(VGG16(10, scale=1 / 64), (32, 32, 3))

    def is_random(dropout, **kwargs):
        model = VGG16(10, scale=1 / 64, dropout=dropout)
        program = jax.make_jaxpr(lambda variables: model.apply(variables, x, **kwargs))
        return "random_bits" in str(program(variables))

    training = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
    assert is_random(0.5, **training)
    assert not is_random(0.0, **training)
    assert not is_random(0.5, train=False)


def test_vgg16_refuses_images_that_vanish():
    with pytest.raises(ValueError, match="at least 32 × 32; got 28 × 28"):
        init_shapes(VGG16(10), (28, 28, 1))
