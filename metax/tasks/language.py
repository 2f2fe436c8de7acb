"""Language modelling by an LSTM whose regularisation is to be tuned.

The model reads a text in several rows at once, a segment after the other, and the state
at the end of a segment starts the next. So the parameters of the problem are two trees,

    {"params": the weights, "state": {"train": ..., "valid": ...}}

one state for the training text and one for the validation text, through both of which
the gradient is stopped.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.base import BilevelProblem, Hyperparameter, check_key, squared_norm
from metax.tasks.dropout import dropout
from metax.tasks.masked import dropconnect_mask, word_mask
from metax.tasks.recurrent import LSTM, LayerState, Masks
from metax.tasks.text import segments

__all__ = [
    "LanguageData",
    "LanguageTuning",
    "language_tuning",
    "stock_language_hparams",
]


class LanguageData(NamedTuple):
    """Rows of text, of `batchify`, to draw segments from.

    Attributes:
      train: int32 (batch_size, length).
      valid: int32 (valid_batch_size, length).
    """

    train: Any
    valid: Any


class LanguageTuning(NamedTuple):
    """A problem and how its weights are judged.

    Attributes:
      problem: what a tuner takes.
      evaluate: `evaluate(params, tokens) -> {"loss", "perplexity"}`, in nats a token
        and its exponential, of a whole text: int (N,), or (batch, length) for `batch`
        texts read side by side. Every token but the first of a row is predicted, from
        all before it in the row; nothing is dropped.
    """

    problem: BilevelProblem
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]


_SHARED = {"word_dropout", "dropconnect"}  # they act on weights
_KNOWN = (
    "output_dropout",
    "input_dropout",
    "hidden_dropout",
    "word_dropout",
    "dropconnect",
    "activation_reg",
    "temporal_reg",
    "weight_decay",
)


def stock_language_hparams() -> dict[str, Hyperparameter]:
    """All that `language_tuning` knows, with customary ranges and starts.

    Five dropout rates in (0, 1) from 0.05, `activation_reg` α and `temporal_reg` β in
    [0, ∞) from 0.05, and `weight_decay` in 1e-7..10 from 1e-4. Self-Tuning Networks
    tuned all but the last.

    Returns:
      A new dict, to take names from and to replace fields in.

    Example:
      >>> from metax.tasks import stock_language_hparams
      >>> specs = stock_language_hparams()
      >>> specs["output_dropout"] = specs["output_dropout"]._replace(init=0.5)
      >>> len(specs), [name for name, spec in specs.items() if spec.shared]
      (8, ['word_dropout', 'dropconnect'])
    """
    rates = {
        name: Hyperparameter(0.05, 0.0, 1.0, "logit", shared=name in _SHARED)
        for name in _KNOWN[:5]
    }
    penalties = {
        name: Hyperparameter(0.05, 0.0, scale="softplus") for name in _KNOWN[5:7]
    }
    return {
        **rates,
        **penalties,
        "weight_decay": Hyperparameter(1e-4, 1e-7, 10.0, "log"),
    }


def language_tuning(
    hparams: Mapping[str, Hyperparameter],
    *,
    vocab: int,
    width: int = 650,
    layers: int = 2,
    batch_size: int = 40,
    valid_batch_size: int | None = None,
    segment: int = 70,
) -> LanguageTuning:
    """The problem of tuning an LSTM language model while it learns.

        L_T = CE + α mean(m ⊙ h)² + β mean (h_{t+1} - h_t)² + ½ γ ‖w‖²,    L_V = CE

    for each row of a batch, h the last layer's, m its dropout mask, CE the mean over
    time of -log p(target). Names of `hparams` and what they are:

        output_dropout, input_dropout, hidden_dropout   rates of units, one mask a pass
        word_dropout                rate of rows of the embedding; shared
        dropconnect                 rate of hidden-to-gates weights; shared
        activation_reg, temporal_reg, weight_decay      α, β, γ

    What is not named is 0. The validation loss has no penalty (STN's code adds α's and
    β's to it as well).

    A batch is `{"input", "target"}`, int (batch, time) each, and optionally `"starts"`,
    bool (batch,): rows that begin from a zero state and not from the carried one.

    Two ways to feed it. In the order of the text, as published: scan the tuner's
    `train_step` and `valid_step` over `segments(rows, segment)`. Or as any Loop: `step`
    with a `LanguageData`, from whose rows a segment is drawn at random; no state is
    known at such a place, so it begins from zero, and its first words are guessed with
    less context than they have in the text.

    MacKay et al., "Self-Tuning Networks", ICLR 2019, arXiv 1903.03088, section 4.3;
    Merity et al., "Regularizing and optimizing LSTM language models", ICLR 2018, arXiv
    1708.02182, for the regularisers.

    Args:
      hparams: some of the names above; `stock_language_hparams()` has all.
      vocab: number of words.
      width: units a layer and of the embedding.
      layers: number of layers.
      batch_size: rows of the training text, fixed by the carried state.
      valid_batch_size: rows of the validation text; by default `batch_size`.
      segment: tokens of a segment that is drawn, and of one step of `evaluate`.

    Returns:
      A `LanguageTuning`.

    Raises:
      ValueError: an unknown name; `word_dropout` or `dropconnect` not shared; a count
        below 1; at trace time, a batch of another number of rows.

    Example:
      >>> import jax
      >>> from metax.tasks import language_tuning, stock_language_hparams
      >>> problem, evaluate = language_tuning(
      ...     stock_language_hparams(), vocab=5, width=4, batch_size=2, segment=3
      ... )
      >>> params = problem.init(jax.random.key(0))
      >>> tokens = jax.random.randint(jax.random.key(1), (50,), 0, 5)
      >>> round(float(evaluate(params, tokens)["perplexity"]))
      5
    """
    _check_specs(hparams)
    if valid_batch_size is None:
        valid_batch_size = batch_size
    sizes = {"train": batch_size, "valid": valid_batch_size}
    counts = {"vocab": vocab, "width": width, "layers": layers, "segment": segment}
    rows = {"batch_size": batch_size, "valid_batch_size": valid_batch_size}
    _check_counts({**counts, **rows})
    model = LSTM(vocab, width, layers)

    def init(key: jax.Array) -> Any:
        check_key(key, "language_tuning(...).problem.init(key=...)")
        tokens = jnp.zeros((1, 1), jnp.int32)
        weights = model.init(key, tokens, _zero_state(model, 1))["params"]
        state = {slot: _zero_state(model, size) for slot, size in sizes.items()}
        return {"params": weights, "state": state}

    def predict(params: Any, batch: Any, hparams: Any, key: jax.Array | None) -> Any:
        slot = "valid" if key is None else "train"
        tokens = batch["input"]
        _check_rows(slot, tokens, sizes[slot])
        state = jax.lax.stop_gradient(params["state"])
        begin = _restart(state[slot], batch.get("starts"))
        masks = (
            Masks() if key is None else _draw_masks(model, hparams, key, len(tokens))
        )
        outputs, end = model.apply({"params": params["params"]}, tokens, begin, masks)
        return {**outputs, "state": {**state, slot: jax.lax.stop_gradient(end)}}

    def train_loss(outputs: Any, batch: Any, hparams: Any, params: Any) -> jax.Array:
        loss = _cross_entropy(outputs["logits"], batch["target"]).mean(1)
        if "activation_reg" in hparams:
            square = jnp.square(outputs["dropped"]).mean((1, 2))
            loss += (hparams["activation_reg"] * square).astype(loss.dtype)
        if "temporal_reg" in hparams:
            square = _mean_squared_step(outputs["raw"])
            loss += (hparams["temporal_reg"] * square).astype(loss.dtype)
        if "weight_decay" in hparams:
            square = 0.5 * squared_norm(params, _is_weight)
            loss += (hparams["weight_decay"] * square).astype(loss.dtype)
        return loss

    def evaluate(params: Any, tokens: Any) -> dict[str, jax.Array]:
        rows = jnp.atleast_2d(tokens)
        loss = _mean_loss(model, params["params"], rows, segment)
        return {"loss": loss, "perplexity": jnp.exp(loss)}

    problem = BilevelProblem(
        init=init,
        predict=predict,
        train_loss=train_loss,
        valid_loss=lambda outputs, batch: _cross_entropy(
            outputs["logits"], batch["target"]
        ).mean(),
        sample_train=lambda data, key: _sample(data, "train", key, segment),
        sample_valid=lambda data, key: _sample(data, "valid", key, segment),
        hparams=dict(hparams),
        carry=lambda params, outputs: {**params, "state": outputs["state"]},
    )
    return LanguageTuning(problem=problem, evaluate=evaluate)


def _draw_masks(model: LSTM, hparams: Any, key: jax.Array, batch: int) -> Masks:
    key_word, key_input, key_hidden, key_output, key_recurrent = jax.random.split(
        key, 5
    )
    ones = jnp.ones((batch, 1, model.width), jnp.float32)
    shape = model.width, 4 * model.width
    rows = lambda rate, key: word_mask(key, model.vocab, rate)
    units = lambda rate, key: dropout(ones, rate, key)
    weights = lambda rate, key: dropconnect_mask(key, shape, rate)

    def draw(name: str, mask: Callable, key: jax.Array) -> Any:
        return mask(hparams[name], key) if name in hparams else None

    split = jax.random.split
    hidden_keys = split(key_hidden, model.layers - 1)
    weight_keys = split(key_recurrent, model.layers)
    return Masks(
        word=draw("word_dropout", rows, key_word),
        input=draw("input_dropout", units, key_input),
        hidden=tuple(draw("hidden_dropout", units, key) for key in hidden_keys),
        output=draw("output_dropout", units, key_output),
        recurrent=tuple(draw("dropconnect", weights, key) for key in weight_keys),
    )


def _zero_state(model: LSTM, batch: int) -> tuple[LayerState, ...]:
    # an array for each place, since what is donated must not be held twice
    zeros = lambda: jnp.zeros((batch, model.width), jnp.float32)
    return tuple(LayerState(cell=zeros(), hidden=zeros()) for _ in range(model.layers))


def _restart(state: Any, starts: jax.Array | None) -> Any:
    if starts is None:
        return state
    return jax.tree.map(lambda leaf: jnp.where(starts[:, None], 0, leaf), state)


def _sample(data: Any, part: str, key: jax.Array, segment: int) -> Any:
    """A segment at a random place of the rows; a batch is returned as it is."""
    if not isinstance(data, LanguageData):
        return data
    rows = jnp.asarray(getattr(data, part))
    places = rows.shape[1] - segment
    if places < 1:
        raise ValueError(
            "`language_tuning(segment=...)` must be below the length of the rows of "
            f"`LanguageData.{part}`; got segment={segment}, rows of {rows.shape[1]}."
        )
    start = jax.random.randint(key, (), 0, places)
    piece = jax.lax.dynamic_slice_in_dim(rows, start, segment + 1, axis=1)
    starts = jnp.ones(len(rows), bool)
    return {"input": piece[:, :-1], "target": piece[:, 1:], "starts": starts}


def _mean_loss(model: LSTM, weights: Any, rows: jax.Array, segment: int) -> jax.Array:
    """Mean cross-entropy of whole rows, a segment after the other."""
    batch, num = rows.shape[0], rows.shape[1] - 1
    if num < 1:
        raise ValueError(
            "`language_tuning(...).evaluate(tokens=...)` must have rows of at least 2 "
            f"tokens; got shape {rows.shape}."
        )
    segment = min(segment, num)
    whole = num // segment * segment

    def read(state: Any, piece: Any) -> tuple[Any, jax.Array]:
        outputs, state = model.apply({"params": weights}, piece["input"], state)
        return state, _cross_entropy(outputs["logits"], piece["target"]).sum()

    state = _zero_state(model, batch)
    state, losses = jax.lax.scan(read, state, segments(rows, segment))
    total = losses.sum()
    if whole < num:
        rest = {"input": rows[:, whole:-1], "target": rows[:, whole + 1 :]}
        total += read(state, rest)[1]
    return total / (batch * num)


def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log softmax(logits)_target, (batch, time)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


def _mean_squared_step(raw: jax.Array) -> jax.Array:
    """mean (h_{t+1} - h_t)² of each example; 0 where there is one time alone."""
    square = jnp.square(raw[:, 1:] - raw[:, :-1]).sum((1, 2))
    return square / max(raw[0, 1:].size, 1)


def _is_weight(path: tuple[Any, ...], leaf: Any) -> bool:
    return path[0].key == "params"


def _check_specs(hparams: Mapping[str, Hyperparameter]) -> None:
    for name, spec in hparams.items():
        if name not in _KNOWN:
            raise ValueError(
                f"`language_tuning(hparams=...)` must have names among "
                f"{', '.join(_KNOWN)}; got {name!r}."
            )
        if name in _SHARED and not spec.shared:
            raise ValueError(
                f"`language_tuning(hparams=...)[{name!r}]` acts on weights, which the "
                "batch shares, so it must have shared=True; got shared=False."
            )


def _check_counts(counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(
                f"`language_tuning({name}=...)` must be at least 1; got {count}."
            )


def _check_rows(slot: str, tokens: jax.Array, size: int) -> None:
    if tokens.ndim != 2 or tokens.shape[0] != size:
        argument = "batch_size" if slot == "train" else "valid_batch_size"
        raise ValueError(
            f"`language_tuning({argument}=...)` must be the number of rows of a batch, "
            f"since their state is carried; got {argument}={size}, input of shape "
            f"{tokens.shape}. Where a tuner cuts the batch (perturbation='group') it "
            "cannot be."
        )
