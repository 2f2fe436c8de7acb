"""An LSTM language model in flax.linen whose dropout masks come in from outside.

Every weight is in a layer of its own, `layer(x, ...)`, with the batch as leading axis
of x and with its mask among the arguments: a method that displaces weights layer by
layer sees the same masks as the model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.tasks.masked import MaskedDense, MaskedEmbed

__all__ = ["LSTM", "LayerState", "Masks"]


class Masks(NamedTuple):
    """What is dropped in one pass; None for nothing.

    Attributes:
      word: (vocab,), rows of the embedding, but not of the decoder tied to it.
      input: (batch, 1, width), of the embedded words.
      hidden: (batch, 1, width) for each layer but the last, of what it hands on.
      output: (batch, 1, width), of the last layer.
      recurrent: (width, 4 width) for each layer, of its hidden-to-gates weights.
    """

    word: jax.Array | None = None
    input: jax.Array | None = None
    hidden: tuple[jax.Array | None, ...] | None = None
    output: jax.Array | None = None
    recurrent: tuple[jax.Array | None, ...] | None = None


class LayerState(NamedTuple):
    """What a layer carries from one token to the next.

    Attributes:
      cell: c, float32 (batch, width).
      hidden: h, float32 (batch, width).
    """

    cell: jax.Array
    hidden: jax.Array


class _Bias(nn.Module):
    """A bias in a layer of its own, since the tied decoder has none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The bias in the shape of x, for the caller to add."""
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return jnp.broadcast_to(bias, x.shape)


class LSTM(nn.Module):
    """A language model: embedding, LSTM layers, and a decoder tied to the embedding.

        f, i, o, g = split(W x_t + b + (U ⊙ mask) h_{t-1} + d, 4)
        c_t = σ(f) c_{t-1} + σ(i) tanh(g),    h_t = σ(o) tanh(c_t)
        logits_t = E h_t + e

    E, the table of the embedding, begins uniform in ±0.1, W, U, b and d in ±1/√fan_in,
    e at 0. W x is one product for all times; only U h is in the loop over them.

    Hochreiter & Schmidhuber, "Long short-term memory", 1997; the tie: Press & Wolf,
    "Using the output embedding to improve language models", 2017, arXiv 1608.05859.

    Attributes:
      vocab: number of words.
      width: units of the embedding and of each layer.
      layers: number of layers, at least 1.
    """

    vocab: int
    width: int = 650
    layers: int = 2

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        state: tuple[LayerState, ...],
        masks: Masks | None = None,
    ) -> tuple[dict[str, jax.Array], tuple[LayerState, ...]]:
        """Reads int tokens (batch, time), from the state of each layer.

        Returns `{"logits": (batch, time, vocab), "raw": h of the last layer (batch,
        time, width), "dropped": the same after dropout}` and the new state.
        """
        embed = MaskedEmbed(self.vocab, self.width, _uniform(0.1), name="embed")
        masks = Masks() if masks is None else masks
        between = masks.hidden or (None,) * (self.layers - 1)
        recurrent = masks.recurrent or (None,) * self.layers
        x = _masked(embed(tokens, masks.word), masks.input)
        new_state = []
        for i in range(self.layers):
            if i > 0:
                x = _masked(x, between[i - 1])
            layer = _Layer(self.width, name=f"layer_{i}")
            layer_state, x = layer(x, state[i], recurrent[i])
            new_state.append(layer_state)
        dropped = _masked(x, masks.output)
        logits = embed.attend(dropped)
        logits = logits + _Bias(name="decoder_bias")(logits)
        outputs = {"logits": logits, "raw": x, "dropped": dropped}
        return outputs, tuple(new_state)


class _Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(
        self, x: jax.Array, state: LayerState, mask: jax.Array | None
    ) -> tuple[LayerState, jax.Array]:
        init = _uniform(x.shape[-1] ** -0.5)
        gates = nn.Dense(4 * self.width, kernel_init=init, bias_init=init, name="input")
        axes: Any = (1, nn.broadcast)  # typed as one number in flax
        steps = nn.scan(
            _Step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=axes,
            out_axes=1,
        )
        return steps(self.width, name="steps")(state, gates(x), mask)


class _Step(nn.Module):
    width: int

    @nn.compact
    def __call__(
        self, state: LayerState, gates: jax.Array, mask: jax.Array | None
    ) -> tuple[LayerState, jax.Array]:
        init = _uniform(self.width**-0.5)
        layer = MaskedDense(
            4 * self.width, kernel_init=init, bias_init=init, name="hidden"
        )
        gates = gates + layer(state.hidden, mask)
        forget, enter, leave, candidate = jnp.split(gates, 4, axis=-1)
        kept = nn.sigmoid(forget) * state.cell
        cell = kept + nn.sigmoid(enter) * jnp.tanh(candidate)
        hidden = nn.sigmoid(leave) * jnp.tanh(cell)
        return LayerState(cell=cell, hidden=hidden), hidden


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else x * mask


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in ±bound."""

    def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init
