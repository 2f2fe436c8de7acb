"""The best response: its algebra, its two routes, and what it refuses."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import squared_norm
from metax.stn import NoResponse, best_response, check_response
from metax.stn.penalty import ExampleWeights

BATCH, H = 4, 3
STRUCTURES = ["row", "tied_row", 2, "dense"]


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(16)(x)))
        return nn.Dense(5)(x)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(4)(nn.relu(nn.Conv(8, (3, 3))(x)))
        x = nn.Conv(6, (3, 3), strides=2)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2)(x, x)


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(7))(x)


class TiedDecoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6)
        return embed.attend(nn.Dense(6)(jnp.tanh(embed(ids))))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Dense)()(x)


class CalledTwice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(x.shape[-1])
        return layer(jnp.tanh(layer(x)))


class Masked(nn.Module):
    """A layer of one's own, with a mask on its weights as an argument."""

    @nn.compact
    def __call__(self, x, mask):
        shape = (x.shape[-1], 5)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return x @ (kernel * mask) + self.param("bias", nn.initializers.ones, (5,))


class WithMask(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = jnp.arange(x.shape[-1] * 5).reshape(-1, 5) % 3 > 0
        return Masked()(x, mask.astype(x.dtype))


IMAGES, VECTORS = (BATCH, 6, 6, 3), (BATCH, 10)
MODELS = {
    "dense": (Dense(), VECTORS),
    "conv": (Convolutional(), IMAGES),
    "attention": (Attention(), (BATCH, 5, 8)),
    "lstm": (Recurrent(nn.LSTMCell), (BATCH, 5, 4)),
    "gru": (Recurrent(nn.GRUCell), (BATCH, 5, 4)),
    "tied": (TiedDecoder(), None),
    "remat": (Remat(), VECTORS),
    "twice": (CalledTwice(), VECTORS),
    "masked": (WithMask(), VECTORS),
}


@functools.cache
def setting(name, structure="row", num_hparams=H):
    """A model on float32 inputs with a response that is not 0."""
    model, shape = MODELS[name]
    key = jax.random.key(0)
    if shape is None:
        x = jax.random.randint(key, (BATCH, 5), 0, 11)
    else:
        x = jax.random.normal(key, shape, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(1), x)
    response = best_response(num_hparams, structure=structure)
    phi = jax.jit(lambda p: randomised(response.init(jax.random.key(2), p)))(params)
    eps = jax.random.normal(jax.random.key(3), (BATCH, num_hparams), jnp.float32)
    return model, x, params, response, phi, eps


def randomised(phi):
    leaves, treedef = jax.tree.flatten(phi)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    draw = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
    return treedef.unflatten(map(draw, keys, leaves))


def layer(structure):
    """Leaves of double precision with a response that is not 0, without a model."""
    draw = np.random.default_rng(0).standard_normal
    params = {"kernel": draw((3, 2, 4)), "bias": draw(4), "gain": draw(())}
    response = best_response(H, structure=structure)
    phi = jax.jit(response.init)(jax.random.key(0), params)
    phi = jax.tree.map(lambda x: x + 0.1 * draw(x.shape), phi)
    return params, response, phi, draw((BATCH, H))


def naive_tangent(model, params, response, phi, eps, x):
    """The batch × |w| way, which must not exist outside of a test."""

    def one(x, e):
        moved = response.tangent(phi, e, params)
        fn = lambda params: model.apply(params, x[None])
        return jax.jvp(fn, (params,), (moved,))[1][0]

    return jax.vmap(one)(x, eps)


def naive_apply(model, params, response, phi, eps, x):
    def one(x, e):
        moved = jax.tree.map(jnp.add, params, response.tangent(phi, e, params))
        return model.apply(moved, x[None])[0]

    return jax.vmap(one)(x, eps)


def relative(got, wanted):
    difference = jax.tree.map(jnp.subtract, got, wanted)
    return float(optax.tree.norm(difference) / optax.tree.norm(wanted))


@pytest.mark.parametrize("name", MODELS)
def test_injected_equals_columns_equals_naive(name):
    parts = setting(name)
    value, plain, change, applied, columns, wanted, wanted_applied = every_way(*parts)
    # float32 sums in another order: 1e-7 to 4e-7 seen
    assert relative(value, plain) < 1e-6
    assert relative(change, wanted) < 5e-6
    assert relative(columns, wanted) < 5e-6
    assert relative(applied, wanted_applied) < 5e-6


def every_way(model, x, params, response, phi, eps):
    def run(x, params, phi, eps):
        fn = lambda params: model.apply(params, x)
        columns = best_response(H, route="columns")
        return (
            *response.linearize(fn, params, phi, eps)[:1],
            fn(params),
            response.linearize(fn, params, phi, eps)[1],
            response.apply(fn, params, phi, eps),
            columns.linearize(fn, params, phi, eps)[1],
            naive_tangent(model, params, response, phi, eps, x),
            naive_apply(model, params, response, phi, eps, x),
        )

    return jax.jit(run)(x, params, phi, eps)


@pytest.mark.parametrize(
    ("name", "structure"),
    [("conv", 2), ("dense", "tied_row"), ("tied", "tied_row"), ("tied", "dense")],
)
def test_other_structures_are_injected_exactly(name, structure):
    parts = setting(name, structure)
    _, _, change, applied, _, wanted, wanted_applied = every_way(*parts)
    assert relative(change, wanted) < 5e-6  # float32
    assert relative(applied, wanted_applied) < 5e-6


@pytest.mark.parametrize("name", ["dense", "lstm", "tied"])
def test_gradients_of_the_injected_network_equal_the_naive_ones(name):
    """In Φ, in the perturbation, and in w0 (the joint objective needs that)."""
    model, x, params, response, phi, eps = setting(name)

    def injected(params, phi, eps):
        fn = lambda params: model.apply(params, x)
        return jnp.sum(jnp.sin(sum(response.linearize(fn, params, phi, eps))))

    def naive(params, phi, eps):
        tangent = naive_tangent(model, params, response, phi, eps, x)
        return jnp.sum(jnp.sin(model.apply(params, x) + tangent))

    gradients = lambda fn: jax.jit(jax.grad(fn, argnums=(0, 1, 2)))(params, phi, eps)
    got, wanted = gradients(injected), gradients(naive)
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative(mine, theirs) < 5e-6  # float32


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_perturbation_for_all_equals_the_same_for_each(structure):
    model, x, params, response, phi, eps = setting("dense", structure)

    @jax.jit
    def both(params, phi, eps):
        fn = lambda params: model.apply(params, x)
        ways = response.linearize, response.apply
        return [way(fn, params, phi, eps) for way in ways]

    shared = both(params, phi, eps[0])
    each = both(params, phi, jnp.broadcast_to(eps[0], eps.shape))
    chex.assert_trees_all_close(shared, each, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("structure", STRUCTURES)
def test_contract_is_the_transpose_of_tangent_and_tangent_is_linear(structure):
    params, response, phi, eps = layer(structure)
    gradient = jax.tree.map(np.cos, params)
    tangents = jax.jit(jax.vmap(lambda e: response.tangent(phi, e, params)))
    stacked = tangents(np.stack([eps[0], eps[1], 2 * eps[0] - eps[1]]))
    moved, other, both = (jax.tree.map(lambda x, k=k: x[k], stacked) for k in range(3))
    left = optax.tree.vdot(gradient, moved)
    right = jax.jit(response.contract)(phi, gradient, params) @ eps[0]
    np.testing.assert_allclose(left, right, rtol=1e-12)
    parts = jax.tree.map(lambda a, b: 2 * a - b, moved, other)
    chex.assert_trees_all_close(both, parts, atol=1e-14)


def test_tangents_keep_the_dtype_of_each_leaf():
    _, _, params, response, phi, eps = setting("dense")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    phi = response.init(jax.random.key(0), params)
    moved = response.tangent(phi, eps[0].astype(jnp.float64))
    chex.assert_trees_all_equal_dtypes(moved, params)


@pytest.mark.parametrize("structure", [*STRUCTURES, "none"])
def test_norm_of_example_weights_equals_that_of_formed_weights(structure):
    params, response, phi, eps = layer(structure)
    kernels = lambda path, leaf: leaf.ndim > 1

    def formed(e, select):
        tangent = response.tangent(phi, e, params)
        return squared_norm(jax.tree.map(jnp.add, params, tangent), select)

    def both(eps, select):
        wanted = jax.vmap(lambda e: formed(e, select))(eps)
        return squared_norm(ExampleWeights(params, phi, eps), select), wanted

    for select in (None, kernels):
        got, wanted = jax.jit(both, static_argnums=1)(eps, select)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w["params"],
        lambda w: w.kernel,
        lambda w: 2 * w,
        lambda w: jnp.sum(w),
        lambda w: list(w),
        lambda w: jax.tree.map(jnp.sum, w),
    ],
)
def test_example_weights_refuse_all_else(use):
    _, _, params, _, phi, eps = setting("dense")
    with pytest.raises(TypeError):
        use(ExampleWeights(params, phi, eps))


def test_the_refusal_of_example_weights_says_what_to_do():
    _, _, params, _, phi, eps = setting("dense")
    with pytest.raises(TypeError, match="use `metax.squared_norm"):
        ExampleWeights(params, phi, eps)["params"]


def test_only_the_collection_params_responds_by_default():
    params = {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": jnp.ones(3)}}
    phi = best_response(2).init(jax.random.key(0), params)
    assert phi["batch_stats"]["mean"] == NoResponse((3,), "float64")
    moved = best_response(2).tangent(phi, jnp.ones(2))
    chex.assert_trees_all_equal(moved["batch_stats"]["mean"], jnp.zeros(3))


def test_structure_by_path_and_scalars_are_dense():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "c": jnp.ones(())}
    chosen = lambda path, leaf: {"a": "row", "b": 1, "c": "row"}[path[0].key]
    phi = best_response(2, structure=chosen).init(jax.random.key(0), params)
    assert [type(phi[k]).__name__ for k in "abc"] == [
        "RowResponse", "LowRankResponse", "DenseResponse",
    ]  # fmt: skip


def test_response_starts_at_zero_with_uniform_weights_of_the_layers_fan_in():
    params = MODELS["conv"][0].init(jax.random.key(0), jnp.zeros(IMAGES))
    phi = best_response(2).init(jax.random.key(0), params)
    for moved in jax.tree.leaves(best_response(2).tangent(phi, jnp.ones(2))):
        assert not moved.any()
    conv = phi["params"]["Conv_1"]
    bound = (3 * 3 * 8) ** -0.5
    for leaf in ("kernel", "bias"):
        assert float(jnp.abs(conv[leaf].weight).max()) <= bound
    assert float(jnp.abs(conv["kernel"].weight).max()) > 0.9 * bound


def test_functions_without_layers_take_the_columns():
    params = {"w": jnp.arange(3.0), "n": jnp.array(2)}
    response = best_response(2, structure="dense")
    phi = jax.tree.map(lambda c: c + 1.0, response.init(jax.random.key(0), params))
    x, eps = jnp.ones((4, 3)), jnp.arange(8.0).reshape(4, 2)
    fn = lambda params: {"y": x @ params["w"] ** 2, "n": params["n"]}
    value, change = response.linearize(fn, params, phi, eps)
    wanted = eps.sum(1) * (x @ (2 * params["w"]))
    np.testing.assert_allclose(change["y"], wanted)
    assert int(value["n"]) == int(change["n"]) == 2
    with pytest.raises(ValueError, match="apply"):
        response.apply(fn, params, phi, eps)


def test_parameters_may_be_a_single_array():
    response = best_response(1, structure="dense")
    phi = response.init(jax.random.key(0), jnp.ones(3))
    phi = jax.tree.map(lambda c: c + 2.0, phi)
    x, eps = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0], [-1.0]])
    _, change = response.linearize(lambda w: x @ w, jnp.ones(3), phi, eps)
    np.testing.assert_allclose(change, [6.0, -24.0])


def test_check_response_agrees_on_a_layer_of_ones_own():
    model, x, params, _, phi, _ = setting("masked")
    fn = lambda params: model.apply(params, x)
    assert check_response(fn, params, phi, jax.random.key(0), H) < 1e-5


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return layers()(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1])(x), None


class Curved(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 5))
        return x @ jnp.exp(kernel)


class Product(nn.Module):
    """Affine in each parameter, not in both together."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 5))
        return x @ kernel * self.param("scale", nn.initializers.ones, (5,))


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (5, x.shape[-1]))
        return x @ kernel.T


class Beside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(x) * self.param("scale", nn.initializers.ones, (5,))


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(x.reshape(-1, 2))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Stacked(), "Dense at ScanLayer_0/Dense_0"),
        (Recurrent(nn.OptimizedLSTMCell), "DenseParams"),
        (Curved(), "Curved at the root"),
        (Product(), "Product at the root"),
        (Transposed(), "Transposed at the root"),
        (Beside(), "Beside at the root"),
        (Flattened(), "Dense at Dense_0"),
    ],
)
def test_layers_that_cannot_be_injected_are_refused_by_name(model, named):
    shape = (BATCH, 5, 4) if isinstance(model, Recurrent) else VECTORS
    x = jnp.ones(shape, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)
    response = best_response(H)
    phi = jax.jit(response.init)(jax.random.key(0), params)
    fn = lambda params: model.apply(params, x)
    for run in (response.linearize, response.apply):
        with pytest.raises(ValueError, match=named) as caught:
            jax.eval_shape(lambda e, run=run: run(fn, params, phi, e), jnp.ones((4, H)))
        assert "perturbation='batch'" in str(caught.value)
    both = lambda p: (response.linearize(fn, p, phi, jnp.ones(H))[0], fn(p))
    chex.assert_trees_all_close(*jax.jit(both)(params), rtol=1e-5)  # float32


def test_leaves_that_were_not_reached_are_named():
    model, x, params, _, _, eps = setting("dense")
    params = {"params": {**params["params"], "unused": {"kernel": jnp.ones((2, 2))}}}
    response = best_response(H)
    phi = response.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="not reached: unused/kernel"):
        response.linearize(lambda p: model.apply(p, x), params, phi, eps)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: best_response(0), "num_hparams"),
        (lambda: best_response(1, structure="rows"), "structure"),
        (lambda: best_response(1, structure=0), "structure"),
        (lambda: best_response(1, route="fast"), "route"),
        (lambda: shapes((2,)), r"\(2,\)"),
        (lambda: shapes((4, 1)), r"\(4, 1\)"),
        (lambda: tied_without_params(), "params"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def shapes(shape):
    model, x, params, response, phi, _ = setting("dense")
    response.linearize(lambda p: model.apply(p, x), params, phi, jnp.ones(shape))


def tied_without_params():
    _, _, _, response, phi, eps = setting("dense", "tied_row")
    response.tangent(phi, eps[0])
