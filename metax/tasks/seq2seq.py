"""LSTM encoder and decoders with Luong attention, as functions of their parameters.

A sentence is a row of ids, filled up with `PAD`. The first ids are marks:

    0 unknown    1 before the first target    2 end of a target    3 padding    4 unused

and symbols begin at `NUM_MARKS`. What is padding changes nothing: states stop there and
no attention goes to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.tasks.recurrent import LayerState

__all__ = [
    "END",
    "GO",
    "NUM_MARKS",
    "PAD",
    "UNKNOWN",
    "Memory",
    "Sizes",
    "decode",
    "encode",
    "init_decoder",
    "init_encoder",
]

UNKNOWN, GO, END, PAD = 0, 1, 2, 3
NUM_MARKS = 5

Params = dict[str, Any]
_DIRECTIONS = ("forward", "backward")
_FORBIDDEN = -1e9  # a score; finite, so that a row of padding alone gives no NaN


class Sizes(NamedTuple):
    """What the encoder and every decoder share.

    Attributes:
      embedding: size of the vector of a symbol.
      hidden: units of a layer; half of them for each direction of a bidirectional one.
      depth: number of layers.
      bidirectional: whether the encoder reads both ways; decoders never do.
      residual: whether a layer's input is added to its output, for which the embedded
        symbols are first projected to `hidden`.
      dropout: chance that an output of a layer is dropped in training, in 0..1.
    """

    embedding: int = 128
    hidden: int = 256
    depth: int = 2
    bidirectional: bool = True
    residual: bool = False
    dropout: float = 0.3


class Memory(NamedTuple):
    """What a decoder sees of the source.

    Attributes:
      outputs: [batch, time, hidden], of the top layer.
      mask: bool [batch, time], false where there is padding.
      states: the last state of each layer, [batch, hidden], where a decoder starts.
    """

    outputs: jax.Array
    mask: jax.Array
    states: tuple[LayerState, ...]


def init_encoder(key: jax.Array, vocab_size: int, sizes: Sizes) -> Params:
    """Draws an encoder.

    Embeddings are uniform with variance 1, other weights Glorot-uniform, biases 0.

    Args:
      key: a typed key.
      vocab_size: ids of the source, marks included.
      sizes: the sizes.

    Returns:
      `"embedding"`, `"layers"`, and with residuals `"input"`, float32.
    """
    key_input, key_layers = jax.random.split(key)
    directions = _DIRECTIONS if sizes.bidirectional else _DIRECTIONS[:1]
    width = sizes.hidden // len(directions)
    params, size = _init_input(key_input, vocab_size, sizes)
    layers = []
    for layer_key in jax.random.split(key_layers, sizes.depth):
        keys = jax.random.split(layer_key, len(directions))
        cells = [_init_cell(k, size, width) for k in keys]
        layers.append(dict(zip(directions, cells, strict=True)))
        size = sizes.hidden
    return {**params, "layers": tuple(layers)}


def init_decoder(key: jax.Array, vocab_size: int, sizes: Sizes) -> Params:
    """Draws a decoder, as `init_encoder` does.

    Args:
      key: a typed key.
      vocab_size: ids of the target, marks included.
      sizes: the sizes.

    Returns:
      `"embedding"`, `"layers"`, `"score"` and `"mix"` of the attention, `"output"`,
      and with residuals `"input"`, float32.
    """
    key_input, key_score, key_mix, key_output, key_layers = jax.random.split(key, 5)
    params, size = _init_input(key_input, vocab_size, sizes)
    layers = []
    for layer_key in jax.random.split(key_layers, sizes.depth):
        layers.append(_init_cell(layer_key, size, sizes.hidden))
        size = sizes.hidden
    return {
        **params,
        "layers": tuple(layers),
        "score": _glorot(key_score, (size, size)),
        "mix": _glorot(key_mix, (2 * size, size)),
        "output": {
            "kernel": _glorot(key_output, (size, vocab_size)),
            "bias": jnp.zeros((vocab_size,), jnp.float32),
        },
    }


def encode(
    params: Params, source: jax.Array, sizes: Sizes, key: jax.Array | None = None
) -> Memory:
    """Reads source sentences.

    Args:
      params: of `init_encoder`.
      source: int32 [batch, time].
      sizes: the same as there.
      key: for dropout; None for none.

    Returns:
      The memory.
    """
    mask = source != PAD
    states = []

    def layer(i: int, x: jax.Array) -> jax.Array:
        outputs, state = _read(params["layers"][i], x, mask)
        states.append(state)
        return outputs

    outputs = _stack(layer, _embed(params, source), sizes, key)
    return Memory(outputs=outputs, mask=mask, states=tuple(states))


def decode(
    params: Params,
    memory: Memory,
    target: jax.Array,
    sizes: Sizes,
    key: jax.Array | None = None,
) -> jax.Array:
    """Predicts each target symbol from those before it and the source.

    With h_t the top layer at target position t and m_s the memory,

        a_t = softmax_s(h_tᵀ W m_s),    c_t = Σ_s a_ts m_s
        logits_t = O tanh(V [c_t; h_t]) + b

    Args:
      params: of `init_decoder`.
      memory: of `encode`.
      target: int32 [batch, time], what is to be predicted; position t sees `GO` and
        the first t - 1 symbols.
      sizes: the same as in `init_decoder`.
      key: for dropout; None for none.

    Returns:
      Logits, [batch, time, vocab_size].

    Reference:
      Luong et al., "Effective approaches to attention-based neural machine
      translation", 2015, arXiv 1508.04025, equations 5 to 8, "general" score.

    Note:
      The attention is not fed to the next step, so that only the layers are in the
      loop over time; the released model does the same.
    """
    seen = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=GO)
    mask = seen != PAD

    def layer(i: int, x: jax.Array) -> jax.Array:
        return _lstm(params["layers"][i], x, mask, memory.states[i])[0]

    hidden = _stack(layer, _embed(params, seen), sizes, key)
    attended = _attend(params, hidden, memory)
    return attended @ params["output"]["kernel"] + params["output"]["bias"]


def _attend(params: Params, hidden: jax.Array, memory: Memory) -> jax.Array:
    keys = memory.outputs @ params["score"].T
    scores = jnp.einsum("bth,bsh->bts", hidden, keys)
    scores = jnp.where(memory.mask[:, None], scores, _FORBIDDEN)
    context = jax.nn.softmax(scores) @ memory.outputs
    return jnp.tanh(jnp.concatenate([context, hidden], -1) @ params["mix"])


def _stack(
    layer: Callable[[int, jax.Array], jax.Array],
    x: jax.Array,
    sizes: Sizes,
    key: jax.Array | None,
) -> jax.Array:
    """Layer upon layer, with dropout of the outputs and perhaps residuals."""
    for i in range(sizes.depth):
        y = layer(i, x)
        if key is not None and sizes.dropout > 0:
            kept = 1 - sizes.dropout
            mask = jax.random.bernoulli(jax.random.fold_in(key, i), kept, y.shape)
            y = jnp.where(mask, y / kept, 0)
        x = x + y if sizes.residual else y
    return x


def _read(
    directions: Params, x: jax.Array, mask: jax.Array
) -> tuple[jax.Array, LayerState]:
    """One layer of the encoder, one way or both, side by side."""
    # in this order, whatever that of the dict: tree functions sort the keys
    read = [
        _lstm(directions[name], x, mask, None, reverse=name == "backward")
        for name in _DIRECTIONS
        if name in directions
    ]
    side_by_side = lambda *parts: jnp.concatenate(parts, -1)
    outputs = side_by_side(*(part[0] for part in read))
    return outputs, jax.tree.map(side_by_side, *(part[1] for part in read))


def _lstm(
    cell: Params,
    x: jax.Array,
    mask: jax.Array,
    state: LayerState | None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, LayerState]:
    """Hidden states over time and the last state; where `mask` is false it stands."""
    if state is None:
        start = jnp.zeros((x.shape[0], cell["recurrent"].shape[0]), x.dtype)
        state = LayerState(cell=start, hidden=start)
    # one product for all times; only the recurrent one is in the loop
    gates = x @ cell["input"] + cell["bias"]

    def step(state: LayerState, turn: Any) -> tuple[LayerState, jax.Array]:
        gates, keep = turn
        gates = gates + state.hidden @ cell["recurrent"]
        enter, forget, candidate, leave = jnp.split(gates, 4, axis=-1)
        kept = jax.nn.sigmoid(forget + 1) * state.cell
        new_cell = kept + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
        new = LayerState(
            cell=new_cell, hidden=jax.nn.sigmoid(leave) * jnp.tanh(new_cell)
        )
        new = jax.tree.map(lambda a, b: jnp.where(keep[:, None], a, b), new, state)
        return new, new.hidden

    turns = (gates.swapaxes(0, 1), mask.T)
    state, hidden = jax.lax.scan(step, state, turns, reverse=reverse)
    return hidden.swapaxes(0, 1), state


def _embed(params: Params, ids: jax.Array) -> jax.Array:
    x = params["embedding"][ids]
    return x @ params["input"] if "input" in params else x


def _init_input(key: jax.Array, vocab_size: int, sizes: Sizes) -> tuple[Params, int]:
    """Embedding and projection, and the size of what comes out."""
    key_embedding, key_input = jax.random.split(key)
    shape, bound = (vocab_size, sizes.embedding), 3**0.5
    embedding = jax.random.uniform(key_embedding, shape, jnp.float32, -bound, bound)
    if not sizes.residual:
        return {"embedding": embedding}, sizes.embedding
    projection = _glorot(key_input, (sizes.embedding, sizes.hidden))
    return {"embedding": embedding, "input": projection}, sizes.hidden


def _init_cell(key: jax.Array, size: int, width: int) -> Params:
    key_input, key_recurrent = jax.random.split(key)
    return {
        "input": _glorot(key_input, (size, 4 * width)),
        "recurrent": _glorot(key_recurrent, (width, 4 * width)),
        "bias": jnp.zeros((4 * width,), jnp.float32),
    }


def _glorot(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.nn.initializers.glorot_uniform()(key, shape, jnp.float32)
