"""Text as token arrays: the Penn Treebank from files, a Markov chain from a key.

A language model reads a long stream in several places at once. `batchify` lays the
stream out in rows that are read in parallel, and `segments` cuts the rows into pieces
of equal length, in order, so that the state at the end of one starts the next:

    tokens (N,)  ->  rows (batch, length)  ->  input, target (num, batch, time)

The target of a token is the one after it.
"""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metax.arguments import check_axes
from metax.base import check_key

__all__ = ["TextData", "batchify", "load_ptb", "segments", "synthetic_text"]

_END = "<eos>"  # ends a line
_UNKNOWN = "<unk>"  # stands for a rare word


class TextData(NamedTuple):
    """A text with its division.

    Attributes:
      train: int32 [N], what is learned from.
      valid: int32 [N], what hyperparameters are tuned on.
      test: int32 [N], what is read once at the end.
      vocabulary: the word of each token.
    """

    train: Any
    valid: Any
    test: Any
    vocabulary: tuple[str, ...]


def load_ptb(data_dir: str | os.PathLike | None = None) -> TextData:
    """Loads the Penn Treebank as prepared for language models.

    929 589, 73 760 and 82 430 tokens of 10 000 words; each line ends with the mark
    `<eos>`, and the words are numbered by first occurrence in the training text.

    Mikolov et al., "Recurrent neural network based language model", Interspeech 2010.

    Args:
      data_dir: the folder that holds `ptb.train.txt`, `ptb.valid.txt` and
        `ptb.test.txt`, plain or with `.gz` at the end, in itself or in a folder `ptb`;
        by default `$TEXT_DATA_DIR`, and without it `~/metax_text`.

    Returns:
      The text, as numpy arrays.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a word of the validation or test text is not in the training text,
        and that has no `<unk>` either.
    """
    default = os.environ.get("TEXT_DATA_DIR") or "~/metax_text"
    root = Path(default if data_dir is None else data_dir).expanduser()
    train, valid, test = (
        list(_words(_find(root, f"ptb.{part}.txt")))
        for part in ("train", "valid", "test")
    )
    numbers = {word: i for i, word in enumerate(dict.fromkeys(train))}
    encode = lambda words: np.array([_number(numbers, w) for w in words], np.int32)
    return TextData(
        train=encode(train),
        valid=encode(valid),
        test=encode(test),
        vocabulary=tuple(numbers),
    )


def synthetic_text(key: jax.Array, num_tokens: int, vocab: int) -> TextData:
    """A text from a Markov chain, for trials without files.

        P(next = j | word = i) = softmax_j(2 z_ij),    z_ij normal

    So the word before tells something of the next, and a model that has learned the
    chain has a lower perplexity than `vocab`.

    Args:
      key: draws the chain and the text.
      num_tokens: of all parts together: 80 % train, 10 % valid, the rest test.
      vocab: the number of words, at least 2.

    Returns:
      The text, as jax arrays.

    Raises:
      ValueError: fewer than 10 tokens or 2 words.

    Example:
      >>> import jax
      >>> from metax.tasks import synthetic_text
      >>> text = synthetic_text(jax.random.key(0), 1000, 5)
      >>> text.train.shape, text.valid.shape, text.test.shape, text.vocabulary[0]
      ((800,), (100,), (100,), 'w0')
    """
    check_key(key, "synthetic_text(key=...)")
    if num_tokens < 10 or vocab < 2:
        raise ValueError(
            "`synthetic_text(...)` must have num_tokens ≥ 10 and vocab ≥ 2; got "
            f"num_tokens={num_tokens}, vocab={vocab}."
        )
    key_chain, key_text = jax.random.split(key)
    logits = 2 * jax.random.normal(key_chain, (vocab, vocab), jnp.float32)

    def next_word(word: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        word = jax.random.categorical(key, logits[word]).astype(jnp.int32)
        return word, word

    keys = jax.random.split(key_text, num_tokens)
    _, tokens = jax.lax.scan(next_word, jnp.int32(0), keys)
    tenth = num_tokens // 10
    return TextData(
        train=tokens[: num_tokens - 2 * tenth],
        valid=tokens[num_tokens - 2 * tenth : num_tokens - tenth],
        test=tokens[num_tokens - tenth :],
        vocabulary=tuple(f"w{i}" for i in range(vocab)),
    )


def batchify(tokens: Any, batch_size: int) -> Any:
    """Lays a stream out in rows of equal length; what is left over is dropped.

    Args:
      tokens: [N], numpy or jax.
      batch_size: the number of rows, read in parallel.

    Returns:
      (batch_size, N // batch_size), of the same kind; row 0 is the start of the text.

    Raises:
      ValueError: `batch_size` is below 1 or above N.
    """
    check_axes("batchify", "tokens", tokens, "tokens")
    if not 1 <= batch_size <= len(tokens):
        raise ValueError(
            "`batchify(batch_size=...)` must lie between 1 and the number of tokens; "
            f"got batch_size={batch_size}, {len(tokens)} tokens."
        )
    length = len(tokens) // batch_size
    return tokens[: batch_size * length].reshape(batch_size, length)


def segments(rows: Any, length: int) -> dict[str, Any]:
    """Cuts rows into batches for a scan, in the order of the text.

    Args:
      rows: (batch, total), of `batchify`.
      length: tokens of a segment, at most total - 1; a shorter rest is dropped.

    Returns:
      `"input"` and `"target"`, of shape (num, batch, length) with
      num = (total - 1) // length; `"starts"`, bool (num, batch), true in the first
      segment, where a model begins anew.

    Raises:
      ValueError: no segment of that length fits.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.tasks import batchify, segments
      >>> pieces = segments(batchify(jnp.arange(10), 2), 2)
      >>> pieces["input"].tolist()
      [[[0, 1], [5, 6]], [[2, 3], [7, 8]]]
      >>> pieces["target"].tolist()
      [[[1, 2], [6, 7]], [[3, 4], [8, 9]]]
    """
    check_axes("segments", "rows", rows, "batch, total")
    batch, total = rows.shape
    num = (total - 1) // length if length >= 1 else 0
    if num < 1:
        raise ValueError(
            "`segments(length=...)` must lie between 1 and the length of the rows less "
            f"1; got length={length}, rows of {total}."
        )

    def cut(offset: int) -> Any:
        whole = rows[:, offset : offset + num * length]
        return whole.reshape(batch, num, length).swapaxes(0, 1)

    starts = jnp.broadcast_to(jnp.arange(num)[:, None] == 0, (num, batch))
    return {"input": cut(0), "target": cut(1), "starts": starts}


def _find(root: Path, name: str) -> Path:
    folders = (root, root / "ptb")
    for path in (folder / file for folder in folders for file in (name, f"{name}.gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"`load_ptb` looked for {name} and {name}.gz in {folders[0]} and {folders[1]} "
        "and found neither. If the text is elsewhere, set TEXT_DATA_DIR or pass "
        "data_dir. If not, take the folder `data` of simple-examples.tgz, published "
        "with the RNNLM toolkit of T. Mikolov; `synthetic_text` needs no files."
    )


def _words(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield from line.split()
            yield _END


def _number(numbers: dict[str, int], word: str) -> int:
    number = numbers.get(word, numbers.get(_UNKNOWN))
    if number is None:
        raise ValueError(
            f"`load_ptb` found the word {word!r} outside of the training text, which "
            f"has no {_UNKNOWN!r} to stand for it."
        )
    return number
