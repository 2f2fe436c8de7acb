import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.tunable import (
    AlexNet,
    ResNet18,
    SimpleCNN,
    TunableMLP,
    TunableVGG16,
)

KEY = jax.random.key(0)
SMALL = {
    "mlp": (TunableMLP(3, (16, 16)), (4, 4, 1)),
    "cnn": (SimpleCNN(3, channels=(2, 3), width=4), (8, 8, 1)),
    "alexnet": (AlexNet(3, scale=1 / 64), (16, 16, 3)),
    "vgg16": (TunableVGG16(3, scale=1 / 64), (32, 32, 3)),
    "resnet18": (ResNet18(3, scale=1 / 16), (8, 8, 3)),
    "resnet18_batch": (ResNet18(3, norm="batch", scale=1 / 16), (8, 8, 3)),
}
KINDS = ("mlp", "cnn", "resnet18_batch")  # dense, convolutional, with statistics


def init_shapes(model, shape):
    x = jnp.zeros((1, *shape), jnp.float32)
    return jax.eval_shape(lambda key: model.init(key, x, {}, False), KEY)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def start(name):
    """Model, variables and a batch of four random images.

    The variables are drawn by numpy, which compiles nothing.
    """
    model, shape = SMALL[name]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        bound = (6 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.1
        middle = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return jnp.asarray(rng.uniform(-bound, bound, leaf.shape) + middle, leaf.dtype)

    shapes = init_shapes(model, shape)
    x = jnp.asarray(rng.standard_normal((4, *shape)), jnp.float32)
    return model, jax.tree_util.tree_map_with_path(draw, shapes), x


def init_layers(model, shape, names):
    """Initial values of some layers; under jit the others are not even drawn."""
    x = jnp.zeros((1, *shape), jnp.float32)

    def some(key):
        params = model.init(key, x, {}, False)["params"]
        return [functools.reduce(dict.get, name.split("/"), params) for name in names]

    return jax.jit(some)(KEY)


def run(model, variables, x, rates, key=None, train=True):
    """Logits and statistics; without jit, for layers of one shape compile once."""
    mutable = [name for name in variables if name != "params"]
    rngs = None if key is None else {"dropout": key}
    return model.apply(variables, x, rates, train, mutable=mutable, rngs=rngs)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (TunableMLP(10), (28, 28, 1), 942_000 + 2 * 1_441_200 + 12_010),
        (TunableMLP(10, (1200, 1200)), (28, 28, 1), 942_000 + 1_441_200 + 12_010),
        (SimpleCNN(10), (28, 28, 1), 416 + 12_832 + 1568 * 1569 + 15_690),
        # convolutions 2 251 584, dense 4 198 400 + 16 781 312 + 40 970
        (AlexNet(10), (32, 32, 3), 23_272_266),
        # convolutions 14 714 688, dense 2 · 262 656 + 5 130
        (TunableVGG16(10), (32, 32, 3), 15_245_130),
        # stem 1 728, stages 147 456 + 524 288 + 2 097 152 + 8 388 608, norms 9 600,
        # output 5 130
        (ResNet18(10), (32, 32, 3), 11_173_962),
        (ResNet18(10, norm="batch"), (32, 32, 3), 11_173_962),
    ],
)
def test_number_of_parameters_is_that_of_the_published_model(model, shape, expected):
    assert count(init_shapes(model, shape)["params"]) == expected


def test_running_statistics_are_kept_for_every_batch_norm_and_only_there():
    shapes = init_shapes(ResNet18(10, norm="batch"), (32, 32, 3))
    assert count(shapes["batch_stats"]) == 9_600
    assert set(init_shapes(ResNet18(10), (32, 32, 3))) == {"params"}


@pytest.mark.parametrize(
    ("name", "num"),
    [("mlp", 3), ("cnn", 4), ("alexnet", 8), ("vgg16", 16), ("resnet18", 6)],
)
def test_number_of_rates_is_that_of_the_published_experiments(name, num):
    assert len(set(SMALL[name][0].rate_names)) == num


@pytest.mark.parametrize("name", SMALL)
def test_logits_have_one_row_an_image_in_single_precision(name):
    model, shape = SMALL[name]
    x = jnp.zeros((5, *shape), jnp.float32)
    rates = {name: jnp.zeros(5, jnp.float64) for name in model.rate_names}
    rates = {**rates, "norm_epsilon": jnp.float64(1e-4)} if "resnet" in name else rates
    shapes = init_shapes(model, shape)
    apply = lambda variables: model.apply(
        variables, x, rates, True, mutable=list(variables), rngs={"dropout": KEY}
    )
    logits, _ = jax.eval_shape(apply, shapes)
    assert (logits.shape, logits.dtype) == ((5, 3), jnp.float32)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp", ["fc_1", "output"]),
        ("cnn", ["conv_2", "fc_1"]),
        ("alexnet", ["conv_5", "fc_2"]),
        ("vgg16", ["fc_2"]),
        ("resnet18", ["stage_4/conv_2_1", "stage_4/shortcut", "output"]),
    ],
)
def test_weights_and_biases_start_uniform_in_the_inverse_root_of_fan_in(name, layers):
    for layer in init_layers(*SMALL[name], layers):
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        for leaf in layer.values():
            assert jnp.abs(leaf).max() <= bound
        if layer["kernel"].size > 250:
            # U(-b, b) has standard deviation b/√3; 250 draws tell it to 3 %
            assert layer["kernel"].std() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert jnp.unique(layer.get("bias", jnp.arange(2.0))).size > 1


def test_vgg16_convolutions_start_normal_with_two_over_fan_out_and_no_bias():
    (layer,) = init_layers(TunableVGG16(3, scale=1 / 8), (32, 32, 3), ["conv_13"])
    assert layer["kernel"].shape == (3, 3, 64, 64)
    # 36864 draws tell a standard deviation to .4 %
    assert layer["kernel"].std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert not layer["bias"].any()


@pytest.mark.parametrize("name", ["resnet18", "resnet18_batch"])
def test_norms_start_as_they_find_it(name):
    (layer,) = init_layers(*SMALL[name], ["stage_3/norm_2_2"])
    assert jnp.array_equal(layer["scale"], jnp.ones(16))
    assert jnp.array_equal(layer["bias"], jnp.zeros(16))


def test_mlp_without_dropout_is_the_composition_of_its_layers():
    model, variables, x = start("mlp")
    h = x.reshape(4, -1)
    for name in ("fc_1", "fc_2"):
        layer = variables["params"][name]
        h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
    layer = variables["params"]["output"]
    logits = model.apply(variables, x, {}, True)
    np.testing.assert_allclose(
        logits,
        h @ layer["kernel"] + layer["bias"],
        rtol=1e-5,  # two orders of summing in single precision
        atol=1e-6,
    )


def rated(model):
    return [name for name in model.rate_names if name != "norm_epsilon"]


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_ignores_rates_and_needs_no_key(name):
    model, variables, x = start(name)
    plain, _ = run(model, variables, x, {}, train=False)
    rates = {rate: jnp.full(4, 0.5) for rate in rated(model)}
    tuned, state = run(model, variables, x, rates, train=False)
    assert jnp.array_equal(tuned, plain)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, _state(variables)))


def _state(variables):
    return {name: tree for name, tree in variables.items() if name != "params"}


@pytest.mark.parametrize("name", KINDS)
def test_rate_zero_is_no_dropout(name):
    model, variables, x = start(name)
    plain, _ = run(model, variables, x, {})
    rates = {rate: jnp.zeros(4) for rate in rated(model)}
    tuned, _ = run(model, variables, x, rates, KEY)
    assert jnp.array_equal(tuned, plain)


@pytest.mark.parametrize("name", ["mlp", "cnn", "alexnet", "vgg16", "resnet18"])
def test_every_rate_reaches_its_example_and_no_other(name):
    model, variables, x = start(name)
    plain, _ = run(model, variables, x, {})

    for rate in rated(model):
        # at rate 1 the layer is blank, and the change is certain
        rates = {rate: jnp.array([0.0, 0.0, 1.0, 0.0])}
        change = jnp.abs(run(model, variables, x, rates, KEY)[0] - plain).max(-1)
        # in single precision the others agree to the last places
        np.testing.assert_allclose(change[jnp.array([0, 1, 3])], 0, atol=1e-5)
        assert change[2] > 1e-4, rate


def test_channelwise_input_dropout_blanks_whole_images():
    _, variables, _ = start("cnn")
    x = jnp.ones((64, 8, 8, 1), jnp.float32)

    def num_distinct(channelwise):
        model = SimpleCNN(3, channels=(2, 3), width=4, channelwise=channelwise)
        logits, _ = run(model, variables, x, {"input_dropout": jnp.float32(0.5)}, KEY)
        return len(np.unique(np.round(logits, 4), axis=0))

    assert num_distinct(True) == 2
    assert num_distinct(False) > 30


@pytest.mark.parametrize("name", ["resnet18", "resnet18_batch"])
@pytest.mark.parametrize("train", [True, False])
def test_norm_epsilon_replaces_the_default_in_training_and_evaluation(name, train):
    model, variables, x = start(name)
    plain, _ = run(model, variables, x, {}, train=train)
    epsilon = lambda value: {"norm_epsilon": jnp.float64(value)}
    same, _ = run(model, variables, x, epsilon(1e-5), train=train)
    other, _ = run(model, variables, x, epsilon(0.1), train=train)
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-6)  # single precision
    assert jnp.abs(other - plain).max() > 1e-4


def test_batch_norm_statistics_change_in_training_only():
    model, variables, x = start("resnet18_batch")
    _, after_training = run(model, variables, x, {})
    _, after_evaluation = run(model, variables, x, {}, train=False)
    equal = lambda state: jax.tree.map(jnp.array_equal, state, _state(variables))
    assert not any(jax.tree.leaves(equal(after_training)))
    assert all(jax.tree.leaves(equal(after_evaluation)))


def test_stages_of_resnet18_halve_the_image_three_times():
    model = ResNet18(3, scale=1 / 16)
    x = jnp.zeros((2, 32, 32, 3), jnp.float32)
    variables = init_shapes(model, (32, 32, 3))
    seen = lambda variables: model.apply(
        variables, x, {}, False, capture_intermediates=True
    )[1]["intermediates"]
    stages = jax.eval_shape(seen, variables)
    shapes = [stages[f"stage_{i}"]["__call__"][0].shape for i in (1, 2, 3, 4)]
    assert shapes == [(2, 32, 32, 4), (2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 32)]


@pytest.mark.parametrize("name", SMALL)
def test_unknown_rates_are_named(name):
    model, shape = SMALL[name]
    x = jnp.zeros((1, *shape), jnp.float32)
    with pytest.raises(ValueError, match=r"rates=.*got 'dropout_99'"):
        model.init(KEY, x, {"dropout_99": jnp.zeros(())}, False)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (SimpleCNN(3), (3, 8, 1)),
        (AlexNet(3), (14, 32, 3)),
        (TunableVGG16(3), (28, 28, 1)),
    ],
)
def test_images_too_small_for_the_poolings_are_refused(model, shape):
    with pytest.raises(ValueError, match="at least"):
        init_shapes(model, shape)


def test_bad_norms_are_named():
    with pytest.raises(ValueError, match=r"ResNet18\(norm=...\).*'layer'"):
        init_shapes(ResNet18(3, norm="layer"), (8, 8, 3))
    x = jnp.zeros((2, 8, 8, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"norm_epsilon.*got shape \[2\]"):
        ResNet18(3, scale=1 / 16).init(KEY, x, {"norm_epsilon": jnp.ones(2)}, False)
