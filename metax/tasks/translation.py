"""Translation with two taggings beside it, as a problem of alternating steps.

One encoder serves three decoders. What the taggings teach the encoder may help the
translation, and when to step on which task is the choice:

    action 0, "MT"    the loss of the translation on the groups encoder and mt
    action 1, "NER"   names, on encoder and ner
    action 2, "POS"   parts of speech, on encoder and pos

The score is that of the translation alone.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_count, check_number, check_one_of
from metax.base import Action, AlternatingProblem, check_key
from metax.tasks.batching import minibatch
from metax.tasks.multitask_text import TASKS, load, synthetic, vocab_sizes
from metax.tasks.seq2seq import (
    END,
    PAD,
    Sizes,
    decode,
    encode,
    init_decoder,
    init_encoder,
)

__all__ = ["load", "problem", "synthetic", "vocab_sizes"]

Groups = dict[str, Any]
Pairs = dict[str, jax.Array]

_REWARD = 100.0  # of a perplexity of 1


class _Sums(NamedTuple):
    """Over the tokens of a block; the mark at the end has a loss and no accuracy."""

    loss: jax.Array
    tokens: jax.Array
    right: jax.Array
    words: jax.Array


def problem(
    vocab_sizes: Mapping[str, int],
    *,
    embedding: int = 128,
    hidden: int = 256,
    depth: int = 2,
    bidirectional: bool = True,
    residual: bool = False,
    dropout: float = 0.3,
    learning_rate: Any = 5e-4,
    clip_norm: float = 1.0,
    batch_size: int = 128,
    optimizer_sharing: Literal["variable", "action"] = "variable",
    patience: int | None = 50,
    validate_every: int = 50,
) -> AlternatingProblem:
    """Three sequence-to-sequence tasks on one encoder.

        ℓ_task = - (1 / tokens) Σ_i Σ_t log p(y_it | y_i<t, x_i)

    with LSTM layers and Luong attention, see `metax.tasks.seq2seq`. The taggers, too,
    see the gold tags before the one that they predict. Rule: gradients clipped to
    `clip_norm`, then Adam. Metric, to be minimised: ℓ_mt on all validation sentences;
    reward: 100 / PPL, PPL = exp of the least metric.

    The output of the translation dominates the cost, 12 MFLOP a token forward at the
    defaults and 10 000 ids: use dispatch "switch", and a GPU.

    Args:
      vocab_sizes: ids of "source", "mt", "ner" and "pos", of the function of this name.
      embedding: size of the vector of a symbol.
      hidden: units of a layer.
      depth: layers of the encoder and of each decoder.
      bidirectional: whether the encoder reads both ways, each with half of the units;
        False as released.
      residual: residual layers; True as released.
      dropout: of each layer's outputs in training, in [0, 1).
      learning_rate: of Adam, a number or a scalar array; 1e-3 as released.
      clip_norm: greatest norm of a gradient.
      batch_size: sentences of a step.
      optimizer_sharing: one state of the rule for each group or for each action.
      patience: checks without a better metric after which a run ends; None for never.
      validate_every: steps between two checks.

    Returns:
      The problem; its data are `controller_data` or `task_data` of the five parts. Each
      loss gives `"accuracy"`, of symbols but the last mark. `observe` gives
      `"valid_loss"` and `"valid_accuracy"`, [3] each, `evaluate` for each part present
      `"valid_loss"`, `"valid_perplexity"`, `"valid_ner_accuracy"`,
      `"valid_pos_accuracy"`, and for "test" likewise.

    Raises:
      ValueError: an argument is missing or out of range.

    Example:
      >>> import jax
      >>> from metax.tasks import translation
      >>> splits = translation.synthetic(0, sizes=(20, 10, 20, 10, 10))
      >>> problem = translation.problem(translation.vocab_sizes(splits), hidden=8)
      >>> sorted(jax.eval_shape(problem.init, jax.random.key(0)))
      ['encoder', 'mt', 'ner', 'pos']

    Reference:
      Xu et al., "AutoLoss: learning discrete schedules for alternate optimization",
      ICLR 2019, arXiv 1810.02442, section 4.3.

    Note:
      Decoders read one way, since one that translates cannot see what follows. With
      "variable" the norm is clipped in each group by itself, in the released code over
      the groups of an action together, as it is here with "action". Patience counts on
      the translation alone, there on any of the three tasks.
    """
    _check_arguments(vocab_sizes, hidden, depth, bidirectional, dropout, batch_size)
    name = "translation.problem"
    check_count(name, 1, embedding=embedding, hidden=hidden)
    check_count(name, 1, validate_every=validate_every)
    if patience is not None:
        check_count(name, 0, patience=patience)
    check_number(name, "learning_rate", learning_rate, least=0)
    check_number(name, "clip_norm", clip_norm, above=0)
    check_one_of(name, "optimizer_sharing", optimizer_sharing, ("variable", "action"))
    sizes = Sizes(embedding, hidden, depth, bidirectional, residual, dropout)

    def init(key: jax.Array) -> Groups:
        check_key(key, "translation.problem(...).init(key=...)")
        key_encoder, *keys = jax.random.split(key, 1 + len(TASKS))
        decoders = {
            task: init_decoder(k, vocab_sizes[task], sizes)
            for task, k in zip(TASKS, keys, strict=True)
        }
        return {
            "encoder": init_encoder(key_encoder, vocab_sizes["source"], sizes),
            **decoders,
        }

    def sample(data: Any, key: jax.Array) -> dict[str, Pairs]:
        keys = jax.random.split(key, len(TASKS))
        return {
            task: minibatch(data["train"][task], k, batch_size)
            for task, k in zip(TASKS, keys, strict=True)
        }

    def loss_of(task: str) -> Any:
        def loss(params: Groups, batch: dict[str, Pairs], key: jax.Array) -> Any:
            sums = _sums(params, task, batch[task], sizes, key)
            return sums.loss / sums.tokens, {"accuracy": sums.right / sums.words}

        return loss

    def average(params: Groups, task: str, pairs: Pairs) -> tuple[Any, Any]:
        """Loss and accuracy over all of the sentences."""
        of = lambda block: _sums(params, task, block, sizes, None)
        sums = jax.tree.map(jnp.sum, jax.lax.map(of, _blocks(pairs, batch_size)))
        return sums.loss / sums.tokens, sums.right / sums.words

    def metric(params: Groups, data: Any) -> jax.Array:
        return average(params, "mt", data["valid"]["mt"])[0]

    def observe(params: Groups, batch: Any, data: Any) -> dict[str, jax.Array]:
        seen = [average(params, task, data["valid"][task]) for task in TASKS]
        losses, accuracies = zip(*seen, strict=True)
        return {
            "valid_loss": jnp.stack(losses),
            "valid_accuracy": jnp.stack(accuracies),
        }

    def evaluate(params: Groups, data: Any) -> dict[str, jax.Array]:
        report = {}
        for part in ("valid", "test"):
            for name, pairs in data.get(part, {}).items():
                task, _, year = name.partition("_")
                loss, accuracy = average(params, task, pairs)
                prefix = f"{part}_{year}" if year else part
                report |= _report(task, prefix, loss, accuracy)
        return report

    adam = optax.adam(learning_rate)
    return AlternatingProblem(
        init=init,
        losses=tuple(loss_of(task) for task in TASKS),
        actions=tuple(Action(i, ("encoder", task)) for i, task in enumerate(TASKS)),
        optimizers=optax.chain(optax.clip_by_global_norm(clip_norm), adam),
        sample=sample,
        metric=metric,
        reward=_reward,
        optimizer_sharing=optimizer_sharing,
        validate_every=validate_every,
        patience=patience,
        observe=observe,
        evaluate=evaluate,
        names=tuple(task.upper() for task in TASKS),
        has_aux=True,
    )


def _sums(
    params: Groups, task: str, pairs: Pairs, sizes: Sizes, key: jax.Array | None
) -> _Sums:
    keys = (None, None) if key is None else jax.random.split(key)
    memory = encode(params["encoder"], pairs["source"], sizes, keys[0])
    target = pairs["target"]
    logits = decode(params[task], memory, target, sizes, keys[1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    counted = target != PAD
    is_word = counted & (target != END)
    right = is_word & (logits.argmax(-1) == target)
    total = lambda x: jnp.sum(x, dtype=jnp.float32)
    return _Sums(
        loss=total(jnp.where(counted, losses, 0)),
        tokens=total(counted),
        right=total(right),
        words=total(is_word),
    )


def _blocks(pairs: Pairs, size: int) -> Pairs:
    """Blocks for a map; rows of padding, which count nothing, fill up the last."""
    num = len(pairs["source"])
    size = min(size, num)
    blocks = -(-num // size)

    def cut(rows: jax.Array) -> jax.Array:
        filler = ((0, blocks * size - num), (0, 0))
        rows = jnp.pad(jnp.asarray(rows), filler, constant_values=PAD)
        return rows.reshape(blocks, size, -1)

    return jax.tree.map(cut, pairs)


def _report(task: str, prefix: str, loss: Any, accuracy: Any) -> dict[str, jax.Array]:
    if task == "mt":
        return {f"{prefix}_loss": loss, f"{prefix}_perplexity": jnp.exp(loss)}
    return {f"{prefix}_{task}_accuracy": accuracy}


def _reward(history: jax.Array, live: jax.Array) -> jax.Array:
    least = jnp.min(jnp.where(live, history, jnp.inf), initial=jnp.inf)
    return _REWARD * jnp.exp(-jnp.where(live.any(), least, jnp.nan))


def _check_arguments(
    sizes: Mapping[str, int],
    hidden: int,
    depth: int,
    bidirectional: bool,
    dropout: float,
    batch_size: int,
) -> None:
    missing = [name for name in ("source", *TASKS) if name not in sizes]
    if missing:
        raise ValueError(
            "`translation.problem(vocab_sizes=...)` must name 'source', 'mt', 'ner' "
            f"and 'pos'; got {sorted(sizes)}."
        )
    if bidirectional and hidden % 2:
        raise ValueError(
            "`translation.problem(hidden=...)` must be even where the encoder is "
            f"bidirectional; got {hidden}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(
            f"`translation.problem(dropout=...)` must lie in [0, 1); got {dropout}."
        )
    for name, count in (("depth", depth), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(
                f"`translation.problem({name}=...)` must be at least 1; got {count}."
            )
