from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.seq2seq import (
    END,
    GO,
    NUM_MARKS,
    PAD,
    Memory,
    Sizes,
    decode,
    encode,
    init_decoder,
    init_encoder,
)

SMALL = Sizes(embedding=3, hidden=4, depth=2)
KINDS = {
    "bidirectional": SMALL,
    "one way, residual": SMALL._replace(bidirectional=False, residual=True, depth=1),
}
SOURCE = jnp.array([[5, 6, 7, PAD], [8, 5, PAD, PAD]], jnp.int32)
TARGET = jnp.array([[5, 7, END], [6, END, PAD]], jnp.int32)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def drawn(shapes, scale):
    """Normal parameters from numpy: to compile jax's draws takes longer than a test."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
    return jax.tree.map(draw, shapes)


def both(sizes):
    init = lambda key: (init_encoder(key, 9, sizes), init_decoder(key, 8, sizes))
    return drawn(jax.eval_shape(init, jax.random.key(0)), 0.5)


@cache
def program(sizes):
    """Logits of a model, compiled once for each shape."""
    encoder, decoder = both(sizes)
    return jax.jit(
        lambda source, target: decode(
            decoder, encode(encoder, source, sizes), target, sizes
        )
    )


def logits_of(sizes, source, target):
    return program(sizes)(source, target)


def test_parameters_of_the_published_sizes_are_counted_by_hand():
    shapes = jax.eval_shape(
        lambda key: (
            init_encoder(key, 10_000, Sizes()),
            init_decoder(key, 29, Sizes()),
            init_encoder(key, 10_000, Sizes(bidirectional=False, residual=True)),
        ),
        jax.random.key(0),
    )
    encoder, decoder, released = (size(tree) for tree in shapes)
    cell = lambda inputs, width: (inputs + width + 1) * 4 * width
    table = 10_000 * 128
    assert encoder == table + 2 * cell(128, 128) + 2 * cell(256, 128)
    assert released == table + 128 * 256 + 2 * cell(256, 256)
    layers = cell(128, 256) + cell(256, 256)
    assert decoder == 29 * 128 + layers + 256**2 + 512 * 256 + 257 * 29


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    wide_source = jnp.pad(SOURCE, ((0, 0), (0, 3)), constant_values=PAD)
    wide_target = jnp.pad(TARGET, ((0, 0), (0, 2)), constant_values=PAD)
    short = logits_of(KINDS[kind], SOURCE, TARGET)
    long = logits_of(KINDS[kind], wide_source, wide_target)
    assert short.shape == (2, 3, 8)
    # float32
    np.testing.assert_allclose(short, long[:, :3], atol=1e-6)


def test_what_comes_later_in_the_target_is_not_seen():
    changed = TARGET.at[0, 1:].set(6)
    before, after = (logits_of(SMALL, SOURCE, t) for t in (TARGET, changed))
    np.testing.assert_allclose(before[0, :2], after[0, :2], atol=1e-6)  # float32
    assert jnp.abs(before[0, 2] - after[0, 2]).max() > 1e-4


def test_the_first_symbol_is_predicted_from_the_mark():
    # with the embedding of the mark changed, and no other, the first step changes
    sizes = SMALL._replace(depth=1)

    encoder, decoder = both(sizes)
    tables = jnp.stack([decoder["embedding"], decoder["embedding"].at[GO].add(1.0)])

    @jax.jit
    def first(table):
        memory = encode(encoder, SOURCE, sizes)
        return decode({**decoder, "embedding": table}, memory, TARGET, sizes)[:, 0]

    plain, moved = jax.vmap(first)(tables)
    assert jnp.abs(plain - moved).max() > 1e-3


def test_the_state_of_a_bidirectional_encoder_is_both_ends():
    sizes = SMALL._replace(depth=1)

    memory = jax.jit(lambda params: encode(params, SOURCE, sizes))(both(sizes)[0])
    (state,) = memory.states
    assert memory.outputs.shape == (2, 4, 4)
    for row, length in enumerate((3, 2)):
        forward, backward = jnp.split(memory.outputs[row], 2, -1)
        np.testing.assert_array_equal(state.hidden[row, :2], forward[length - 1])
        np.testing.assert_array_equal(state.hidden[row, 2:], backward[0])


def test_one_layer_equals_the_equations_written_out():
    sizes = Sizes(embedding=2, hidden=2, depth=1, bidirectional=False)
    encoder, decoder = both(sizes)

    @jax.jit
    def run(encoder, decoder):
        memory = encode(encoder, SOURCE, sizes)
        return memory, decode(decoder, memory, TARGET, sizes)

    memory, logits = run(encoder, decoder)
    as_numpy = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, float), tree)
    encoder, decoder = as_numpy(encoder), as_numpy(decoder)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))

    def cell_step(cell, x, c, h):
        gates = x @ cell["input"] + h @ cell["recurrent"] + cell["bias"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        return c, sigmoid(o) * np.tanh(c)

    c, h, outputs = np.zeros(2), np.zeros(2), []
    for word in (5, 6, 7):
        c, h = cell_step(
            encoder["layers"][0]["forward"], encoder["embedding"][word], c, h
        )
        outputs.append(h)
    np.testing.assert_allclose(memory.outputs[0, :3], outputs, atol=1e-6)
    outputs = np.stack(outputs)
    for t, word in enumerate((GO, 5, 7)):
        c, h = cell_step(decoder["layers"][0], decoder["embedding"][word], c, h)
        scores = np.array([h @ decoder["score"] @ m for m in outputs])
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed = np.tanh(np.concatenate([weights @ outputs, h]) @ decoder["mix"])
        expected = mixed @ decoder["output"]["kernel"] + decoder["output"]["bias"]
        np.testing.assert_allclose(logits[0, t], expected, atol=1e-6)  # float32


def test_dropout_keeps_the_mean_and_needs_a_key():
    sizes = Sizes(embedding=4, hidden=64, depth=1, bidirectional=False, dropout=0.25)
    source = jnp.full((64, 4), NUM_MARKS, jnp.int32)

    @jax.jit
    def run(params, key):
        return [encode(params, source, sizes, k).outputs for k in (None, key)]

    plain, dropped = run(both(sizes)[0], jax.random.key(0))
    share = np.mean(np.asarray(dropped) == 0)
    assert 0.23 < share < 0.27  # 16384 draws
    kept = np.asarray(dropped) != 0
    np.testing.assert_allclose(
        np.asarray(dropped)[kept], np.asarray(plain)[kept] / 0.75, rtol=1e-5
    )


def test_a_row_of_padding_alone_gives_numbers():
    nothing = (jnp.full_like(SOURCE, PAD), jnp.full_like(TARGET, PAD))
    assert jnp.isfinite(logits_of(SMALL, *nothing)).all()


def test_memory_names_what_it_holds():
    assert Memory._fields == ("outputs", "mask", "states")


def test_the_order_of_a_dict_does_not_swap_the_directions():
    sizes = SMALL._replace(depth=1)
    encoder, _ = both(sizes)
    (layer,) = encoder["layers"]
    swapped = {**encoder, "layers": (dict(reversed(layer.items())),)}
    # without jit, which would sort the keys
    outputs = [encode(params, SOURCE, sizes).outputs for params in (encoder, swapped)]
    np.testing.assert_array_equal(*outputs)


def test_layers_that_say_nothing_leave_the_input_where_they_are_residual():
    sizes = SMALL._replace(bidirectional=False, residual=True, depth=1)
    encoder, _ = both(sizes)
    silent = {**encoder, "layers": jax.tree.map(jnp.zeros_like, encoder["layers"])}
    embedded = encoder["embedding"][SOURCE] @ encoder["input"]
    outputs = jax.jit(lambda params: encode(params, SOURCE, sizes).outputs)(silent)
    np.testing.assert_allclose(outputs, embedded, rtol=1e-6)
