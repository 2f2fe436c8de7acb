"""Three tasks on German sentences as padded arrays: translation and two taggings.

Every part of a five-way split is, for each of "mt", "ner" and "pos",

    {"source": int32 [n, length], "target": int32 [n, length']}

in the marks of `metax.tasks.seq2seq`: a target ends with `END`, and `PAD` fills up.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from metax.arguments import check_count, check_has, check_one_of, refuse
from metax.tasks.corpora import (
    Words,
    read_captions,
    read_entities,
    read_parts_of_speech,
    unique,
)
from metax.tasks.data import FiveWay
from metax.tasks.seq2seq import END, NUM_MARKS, PAD, UNKNOWN
from metax.tasks.subwords import learn_merges, split_word

__all__ = ["TASKS", "load", "synthetic", "vocab_sizes"]

TASKS = ("mt", "ner", "pos")

Example = tuple[Words, Words]  # words of the source, and of the target or tags
Encoded = tuple[list[int], list[int]]
_VALID_ENTITIES = 1100  # of the 2200 sentences of the development part; the rest tests


def load(
    data_dir: str | os.PathLike,
    *,
    corpus: Literal["multi30k"] = "multi30k",
    pos_tags: Literal["upos", "stts"] = "upos",
    vocab_size: int = 10_000,
    max_length: int = 60,
    cased: bool = True,
    fraction: float = 1.0,
    seed: int = 0,
) -> FiveWay:
    """German captions with their translations, German sentences with tags.

    | task | training, 1/4 controller and 3/4 model | validation, in halves | test |
    |---|---|---|---|
    | mt | Multi30k train, 29 000 | val, 1014 | 2016 Flickr, 1000 |
    | ner | GermEval test, 5100 | dev, first 1100 | dev, last 1100 |
    | pos | 80 % of the pooled treebanks | 10 % | 10 % |

    The test part holds a fourth entry, "mt_2018", the 1071 captions of 2018. Words are
    cut into subwords that are learned from the training sentences alone, one
    vocabulary for the German of all tasks and one for English; a tag is repeated for
    each subword of its word.

    Args:
      data_dir: the folder that holds the folders `multi30k` and `german`, see
        `metax.tasks.corpora`.
      corpus: "multi30k".
      pos_tags: "upos", the 17 universal tags; "stts", the 50 of German corpora.
      vocab_size: ids of each language, marks included; above the number of its
        characters.
      max_length: of a source or target in subwords; longer sentences are dropped from
        every part, of GermEval about one in ten. Arrays are as wide as the longest
        that is kept, and captions have 15 subwords in the mean: less costs less.
      cased: whether words keep their case.
      fraction: share of the training sentences, in (0, 1].
      seed: of the shuffles.

    Returns:
      The five parts.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an argument is unknown or out of range.

    Note:
      Captions instead of talks, and the test sentences of GermEval as training ones:
      perplexities and accuracies are not those of the paper.
    """
    if corpus != "multi30k":
        raise ValueError(
            f"`translation.load(corpus=...)` must be 'multi30k'; got {corpus!r}."
        )
    check_one_of("translation.load", "pos_tags", pos_tags, ("upos", "stts"))
    check_count("translation.load", 1, vocab_size=vocab_size)
    if not 0 < fraction <= 1:
        raise ValueError(
            f"`translation.load(fraction=...)` must lie in (0, 1]; got {fraction}."
        )
    if max_length < 1:
        raise ValueError(
            f"`translation.load(max_length=...)` must be at least 1; got {max_length}."
        )
    texts = _read(data_dir, pos_tags, cased, fraction, np.random.default_rng(seed))
    later = _captions(data_dir, "test_2018_flickr", cased)
    codes = _codes(texts, vocab_size)
    arrays = {
        task: _padded([[codes[task](e) for e in part] for part in parts], max_length)
        for task, parts in texts.items()
    }
    parts = FiveWay(*({task: arrays[task][i] for task in TASKS} for i in range(5)))
    (more,) = _padded([[codes["mt"](example) for example in later]], max_length)
    return parts._replace(test={**parts.test, "mt_2018": more})


def synthetic(
    seed: int,
    *,
    vocab_size: int = 50,
    lengths: tuple[int, int] = (5, 10),
    sizes: tuple[int, int, int, int, int] = (2000, 200, 2000, 200, 200),
) -> FiveWay:
    """The three tasks without files, for trials and tests.

    Word r, counted from 0, occurs with a frequency in proportion to 1 / (r + 1).

        mt     each word by another one, a permutation of the vocabulary, in reverse
        ner    the parity of r
        pos    the class of its frequency, ⌊log₂(r + 1)⌋

    Args:
      seed: of everything.
      vocab_size: words, at least 2; ids begin after the marks.
      lengths: least and greatest number of words of a sentence.
      sizes: sentences of each part and task.

    Returns:
      The five parts, arrays of lengths[1] and, for targets, lengths[1] + 1 columns.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> from metax.tasks import translation
      >>> splits = translation.synthetic(0)
      >>> splits.test["mt"]["target"].shape, translation.vocab_sizes(splits)["mt"]
      ((200, 11), 55)
    """
    check_count("translation.synthetic", 0, seed=seed)
    if not isinstance(sizes, tuple | list) or len(sizes) != 5:
        rule = "must be the sentences of five parts"
        refuse("translation.synthetic", "sizes", rule, sizes)
    low, high = lengths
    if vocab_size < 2 or not 1 <= low <= high or min(sizes) < 1:
        raise ValueError(
            "`translation.synthetic(...)` must have vocab_size ≥ 2, 1 ≤ lengths[0] ≤ "
            f"lengths[1] and sizes ≥ 1; got vocab_size={vocab_size}, "
            f"lengths={lengths}, sizes={sizes}."
        )
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(vocab_size)
    frequency = 1 / np.arange(1, vocab_size + 1)
    codes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mt": lambda words: permutation[words][::-1],
        "ner": lambda words: words % 2,
        "pos": lambda words: np.log2(words + 1).astype(int),
    }

    def part(size: int, code: Callable[[np.ndarray], np.ndarray]) -> Any:
        rows = []
        for length in rng.integers(low, high + 1, size):
            words = rng.choice(vocab_size, length, p=frequency / frequency.sum())
            target = [*(code(words) + NUM_MARKS), END]
            rows.append((list(words + NUM_MARKS), target))
        return {"source": _rows(rows, 0, high), "target": _rows(rows, 1, high + 1)}

    return FiveWay(
        *({task: part(size, codes[task]) for task in TASKS} for size in sizes)
    )


def vocab_sizes(splits: FiveWay) -> dict[str, int]:
    """How many ids there are, marks included, as `translation.problem` wants it.

    Args:
      splits: of `load` or `synthetic`.

    Returns:
      `"source"`, of all tasks together, `"mt"`, `"ner"` and `"pos"`: one more than the
      greatest id in any part.
    """
    fields = ("controller_train", "task_train")
    check_has("translation.vocab_sizes", "splits", splits, "a `FiveWay`", *fields)
    greatest = lambda task, side: max(int(part[task][side].max()) for part in splits)
    sizes = {task: greatest(task, "target") + 1 for task in TASKS}
    return {"source": max(greatest(task, "source") for task in TASKS) + 1, **sizes}


def _read(
    data_dir: Any, tags: Any, cased: bool, fraction: float, rng: np.random.Generator
) -> dict[str, FiveWay]:
    """The sentences of each task in five parts."""
    captions = ("train", "val", "test_2016_flickr")
    train, valid, test = (_captions(data_dir, part, cased) for part in captions)
    names, rest = (read_entities(data_dir, p, cased=cased) for p in ("test", "dev"))
    tagged = unique(read_parts_of_speech(data_dir, tags, cased=cased))
    pool = [tagged[i] for i in rng.permutation(len(tagged))]
    tenth = len(pool) // 10
    divided: dict[str, tuple[Any, Any, Any]] = {
        "mt": (train, valid, test),
        "ner": (names, rest[:_VALID_ENTITIES], rest[_VALID_ENTITIES:]),
        "pos": (pool[2 * tenth :], pool[:tenth], pool[tenth : 2 * tenth]),
    }
    return {task: _five_way(*parts, fraction, rng) for task, parts in divided.items()}


def _captions(data_dir: Any, part: str, cased: bool) -> list[Example]:
    return list(zip(*read_captions(data_dir, part, cased=cased), strict=True))


def _five_way(
    train: Sequence[Any],
    valid: Sequence[Any],
    test: Sequence[Any],
    fraction: float,
    rng: np.random.Generator,
) -> FiveWay:
    """A quarter of the training part, and half of the validation, to the controller."""
    kept = rng.permutation(len(train))[: round(fraction * len(train))]
    quarter, half = len(kept) // 4, len(valid) // 2
    return FiveWay(
        controller_train=[train[i] for i in kept[:quarter]],
        controller_valid=valid[:half],
        task_train=[train[i] for i in kept[quarter:]],
        task_valid=valid[half:],
        test=test,
    )


def _codes(
    texts: Mapping[str, FiveWay], vocab_size: int
) -> dict[str, Callable[[Example], Encoded]]:
    """From an example of each task to its ids; only training parts are learned from."""
    training = {
        task: [*parts.controller_train, *parts.task_train]
        for task, parts in texts.items()
    }
    sources = (source for task in TASKS for source, _ in training[task])
    german = _subword_encoder(sources, vocab_size)
    english = _subword_encoder((target for _, target in training["mt"]), vocab_size)
    return {
        "mt": lambda example: (_join(german, example[0]), _join(english, example[1])),
        "ner": _tag_code(german, training["ner"]),
        "pos": _tag_code(german, training["pos"]),
    }


def _subword_encoder(
    texts: Iterable[Words], vocab_size: int
) -> Callable[[str], list[int]]:
    """From a word to the ids of its pieces, learned from texts."""
    counts = Counter(word for words in texts for word in words)
    segmenter = learn_merges(counts, vocab_size - NUM_MARKS)
    numbers = {piece: NUM_MARKS + i for i, piece in enumerate(segmenter.pieces)}
    known: dict[str, list[int]] = {}

    def encode(word: str) -> list[int]:
        if word not in known:
            pieces = split_word(segmenter, word)
            known[word] = [numbers.get(piece, UNKNOWN) for piece in pieces]
        return known[word]

    return encode


def _join(encode: Callable[[str], list[int]], words: Words) -> list[int]:
    return [number for word in words for number in encode(word)]


def _tag_code(
    encode: Callable[[str], list[int]], training: Iterable[Example]
) -> Callable[[Example], Encoded]:
    """Each tag as often as its word has pieces; tags not in training are unknown."""
    tags = sorted({tag for _, tags in training for tag in tags})
    numbers: Mapping[str, int] = {tag: NUM_MARKS + i for i, tag in enumerate(tags)}

    def code(example: Example) -> Encoded:
        pieces = [encode(word) for word in example[0]]
        spread = [
            numbers.get(tag, UNKNOWN)
            for word, tag in zip(pieces, example[1], strict=True)
            for _ in word
        ]
        return [number for word in pieces for number in word], spread

    return code


def _padded(
    parts: Sequence[Sequence[Encoded]], max_length: int
) -> list[dict[str, np.ndarray]]:
    """Arrays of equal width for all parts, without what is too long."""
    kept = [
        [
            (source, [*target, END])
            for source, target in part
            if max(len(source), len(target)) <= max_length
        ]
        for part in parts
    ]
    widths = [max(len(row[side]) for part in kept for row in part) for side in (0, 1)]
    return [
        {"source": _rows(part, 0, widths[0]), "target": _rows(part, 1, widths[1])}
        for part in kept
    ]


def _rows(examples: Sequence[Any], side: int, width: int) -> np.ndarray:
    array = np.full((len(examples), width), PAD, np.int32)
    for row, example in zip(array, examples, strict=True):
        row[: len(example[side])] = example[side]
    return array
