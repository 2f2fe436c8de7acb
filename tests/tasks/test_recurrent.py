import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.recurrent import LSTM, LayerState, Masks

VOCAB, WIDTH, BATCH, TIME = 7, 3, 2, 5


def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, TIME))


@pytest.fixture
def state():
    return tuple(LayerState(*uniform(seed, 2, BATCH, WIDTH)) for seed in (1, 2))


@pytest.fixture
def masks():
    return Masks(
        word=uniform(3, VOCAB),
        input=uniform(4, BATCH, 1, WIDTH),
        hidden=(uniform(5, BATCH, 1, WIDTH),),
        output=uniform(6, BATCH, 1, WIDTH),
        recurrent=tuple(uniform(7, 2, WIDTH, 4 * WIDTH)),
    )


@pytest.fixture
def model(tokens, state):
    """The model with parameters in float64, none of them 0."""
    model = LSTM(VOCAB, WIDTH)
    params = jax.jit(model.init)(jax.random.key(0), tokens, state)
    return model, jax.tree.map(lambda x: np.float64(x) + 0.1, params)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_by_hand(params, x, state, mask):
    cell, hidden, outputs = *state, []
    inside, outside = params["steps"]["hidden"], params["input"]
    for t in range(x.shape[1]):
        gates = x[:, t] @ outside["kernel"] + outside["bias"]
        gates = gates + hidden @ (inside["kernel"] * mask) + inside["bias"]
        f, i, o, g = np.split(gates, 4, axis=-1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden)
    return LayerState(cell, hidden), np.stack(outputs, 1)


def test_model_is_the_recurrence_written_out(model, tokens, state, masks):
    model, variables = model
    params = variables["params"]
    table = params["embed"]["embedding"]
    x = table[tokens] * masks.word[tokens][..., None] * masks.input
    first, x = layer_by_hand(params["layer_0"], x, state[0], masks.recurrent[0])
    x = x * masks.hidden[0]
    last, raw = layer_by_hand(params["layer_1"], x, state[1], masks.recurrent[1])
    dropped = raw * masks.output
    logits = dropped @ table.T + params["decoder_bias"]["bias"]

    outputs, end = model.apply(variables, tokens, state, masks)
    np.testing.assert_allclose(outputs["raw"], raw, atol=1e-12)
    np.testing.assert_allclose(outputs["dropped"], dropped, atol=1e-12)
    np.testing.assert_allclose(outputs["logits"], logits, atol=1e-12)
    for got, wanted in zip(end, (first, last), strict=True):
        np.testing.assert_allclose(got.cell, wanted.cell, atol=1e-12)
        np.testing.assert_allclose(got.hidden, wanted.hidden, atol=1e-12)


def test_no_mask_is_a_mask_of_ones(model, tokens, state, masks):
    model, variables = model
    ones = jax.tree.map(np.ones_like, masks)
    got, _ = model.apply(variables, tokens, state)
    wanted, _ = model.apply(variables, tokens, state, ones)
    np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-12)


def test_two_segments_in_order_are_one_long_one(model, tokens, state):
    model, variables = model
    whole, end = model.apply(variables, tokens, state)
    first, middle = model.apply(variables, tokens[:, :2], state)
    second, end_of_two = model.apply(variables, tokens[:, 2:], middle)
    both = jnp.concatenate([first["logits"], second["logits"]], axis=1)
    np.testing.assert_allclose(both, whole["logits"], atol=1e-12)
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(end_of_two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def init_of(model):
    state = tuple(
        LayerState(*(jnp.zeros((1, model.width), jnp.float32),) * 2)
        for _ in range(model.layers)
    )
    tokens = jnp.zeros((1, 1), jnp.int32)
    return lambda key: model.init(key, tokens, state)["params"]


def test_published_size_has_its_number_of_parameters():
    shapes = jax.eval_shape(init_of(LSTM(10_000)), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layer = 2 * (650 * 2600 + 2600)
    assert count == 10_000 * 650 + 10_000 + 2 * layer  # 13.3 million
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_weights_begin_uniform_within_their_bounds():
    params = jax.jit(init_of(LSTM(500, 40)))(jax.random.key(0))
    bounds = {"embed": 0.1, "layer_0": 40**-0.5, "layer_1": 40**-0.5}
    assert jnp.all(params.pop("decoder_bias")["bias"] == 0)
    for name, bound in bounds.items():
        for leaf in jax.tree.leaves(params[name]):
            # the largest of at least 160 draws
            assert 0.95 * bound < jnp.abs(leaf).max() <= bound
            # four standard deviations of the mean of n draws
            assert abs(leaf.mean()) < 4 * bound / (3 * leaf.size) ** 0.5


def test_one_layer_will_do(tokens, state):
    model = LSTM(VOCAB, WIDTH, layers=1)
    params = model.init(jax.random.key(0), tokens, state[:1])
    outputs, end = model.apply(params, tokens, state[:1])
    assert outputs["logits"].shape == (BATCH, TIME, VOCAB)
    assert len(end) == 1
