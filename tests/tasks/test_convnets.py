import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.convnets import ConvNet, Layer, OneHidden, ResNet

KEY = jax.random.key(0)


def test_pooling_before_relu_changes_neither_value_nor_gradient():
    model = ConvNet((Layer(3, 2, pool=True),), num_classes=4)
    x = jax.random.normal(KEY, (5, 7, 7, 2))
    variables = jax.jit(lambda: model.init(KEY, x, train=True))()

    def reference(variables):
        conv, dense = (variables["params"][n] for n in ("Conv_0", "Dense_0"))
        y = nn.Conv(3, (2, 2), padding="VALID").apply({"params": conv}, x)
        y = nn.max_pool(nn.relu(y), (2, 2), (2, 2))
        return y.reshape(5, -1) @ dense["kernel"] + dense["bias"]

    @jax.jit
    def both(variables):
        own = lambda variables: model.apply(variables, x, train=True)
        loss = lambda f: jax.value_and_grad(lambda v: jnp.sum(jnp.sin(f(v))))
        return loss(own)(variables), loss(reference)(variables)

    own, other = map(jax.tree.leaves, both(variables))
    for a, b in zip(own, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "size", "seen"),
    [
        ((Layer(2, 3, pool=True), Layer(3, 5, pool=True)), 28, 26),
        ((Layer(2, 3), Layer(3, 3, stride=2), Layer(2, 2, pool=True)), 14, 13),
        ((Layer(2, 3, stride=3),), 11, 9),
        ((Layer(2, 3),), 6, 6),
    ],
)
def test_rows_and_columns_that_no_output_sees_are_not_computed(layers, size, seen):
    model = ConvNet(layers, num_classes=3)
    x = jax.random.normal(KEY, (2, size, size + 3, 1))

    def whole(variables, x):
        for i, layer in enumerate(layers):
            params = {"params": variables["params"][f"Conv_{i}"]}
            how = {"strides": layer.stride, "padding": "VALID"}
            x = nn.Conv(layer.features, (layer.size,) * 2, **how).apply(params, x)
            x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)) if layer.pool else x)
        dense = variables["params"]["Dense_0"]
        return x.reshape(2, -1) @ dense["kernel"] + dense["bias"]

    @jax.jit
    def both():
        variables = model.init(KEY, x, train=True)
        own = lambda v, x: model.apply(v, x, train=True)
        find = lambda f: jax.value_and_grad(
            lambda v, x: jnp.sum(jnp.sin(f(v, x))), (0, 1)
        )(variables, x)
        return find(own), find(whole)

    own, other = both()
    for a, b in zip(*map(jax.tree.leaves, (own, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    by_pixel = jnp.abs(own[1][1]).max((0, 2, 3))
    assert (by_pixel[:seen] > 0).all()
    assert (by_pixel[seen:] == 0).all()


def test_one_hidden_layer_is_two_affine_maps():
    model = OneHidden(3, nn.sigmoid, num_classes=2)
    x = jax.random.normal(KEY, (4, 2, 2, 1))
    variables = model.init(KEY, x, train=True)
    first, last = (variables["params"][f"Dense_{i}"] for i in range(2))
    hidden = 1 / (1 + jnp.exp(-(x.reshape(4, 4) @ first["kernel"] + first["bias"])))
    expected = hidden @ last["kernel"] + last["bias"]
    logits = model.apply(variables, x, train=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)


def residual_shapes(blocks, x):
    model = ResNet(blocks, num_classes=3)
    return jax.eval_shape(lambda: model.init(KEY, x, train=False))


def test_a_block_with_dead_branches_is_its_projection():
    # batch norm with scale and bias 0 gives 0: the first group passes on zeros, and of
    # the two later blocks the linear projections are left, without ReLU
    x = jnp.ones((1, 4, 4, 3), jnp.float32)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        is_norm = "'params'" in name and "BatchNorm" in name
        return np.zeros(leaf.shape) if is_norm else rng.uniform(-1, 1, leaf.shape) ** 2

    variables = jax.tree_util.tree_map_with_path(fill, residual_shapes(1, x))
    layers = variables["params"]
    to_32, to_64 = sorted(
        (p for p in layers.values() if p.get("kernel", x).shape[:2] == (1, 1)),
        key=lambda p: p["bias"].size,
    )
    to_32["bias"] -= 0.5  # so that a ReLU would show
    hidden = to_32["bias"] @ to_64["kernel"][0, 0] + to_64["bias"]
    expected = hidden @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]
    apply = jax.jit(lambda v: ResNet(1, num_classes=3).apply(v, x, train=False))
    np.testing.assert_allclose(apply(variables)[0], expected, rtol=1e-10)


def test_a_resnet_has_a_norm_for_every_convolution_but_projections():
    for blocks in (1, 2):
        shapes = residual_shapes(blocks, jnp.zeros((1, 4, 4, 3)))
        names = [name.split("_")[0] for name in shapes["params"]]
        assert names.count("BatchNorm") == 6 * blocks + 1
        assert names.count("Conv") == 6 * blocks + 1 + 2
        assert names.count("Dense") == 1


def test_coloured_images_are_not_unfolded_unless_told_to():
    x = jnp.zeros((1, 6, 6, 3))

    def num_convolutions(conv):
        model = ConvNet((Layer(2, 3), Layer(2, 3)), conv=conv)
        variables = jax.eval_shape(lambda: model.init(KEY, x, train=False))
        apply = lambda variables: model.apply(variables, x, train=False)
        return jax.jit(apply).lower(variables).as_text().count("stablehlo.convolution")

    assert num_convolutions("auto") == 2
    assert num_convolutions("gemm") == 0


@pytest.mark.parametrize(
    "make", [lambda c: ConvNet((), conv=c), lambda c: ResNet(1, conv=c)]
)
def test_an_unknown_way_to_convolve_is_refused_at_once(make):
    with pytest.raises(ValueError, match=r"Net\(conv=...\).*got 'fft'"):
        make("fft")
