"""Words cut into pieces that are learned from their frequencies (byte pair encoding).

A word is at first a row of characters, the last of which carries the mark `</w>`. Then
the most frequent pair of neighbours becomes one piece, again and again. Of pairs that
are equally frequent the first in the order of strings is taken, so that the same counts
always give the same pieces.

Sennrich et al., "Neural machine translation of rare words with subword units", 2016,
arXiv 1508.07909.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Segmenter", "join_pieces", "learn_merges", "split_word"]

Pair = tuple[str, str]
_LAST = "</w>"  # of the last piece of a word


class Segmenter(NamedTuple):
    """How words are cut.

    Attributes:
      pieces: every piece there is: characters by frequency, then what merges made.
      ranks: the turn in which a pair was merged, from 0.
    """

    pieces: tuple[str, ...]
    ranks: Mapping[Pair, int]


def learn_merges(counts: Mapping[str, int], num_pieces: int) -> Segmenter:
    """Learns how to cut words.

    Each merge looks only at the words that hold the pair: 10 000 merges over 25 000
    words take seconds.

    Args:
      counts: how often each word occurs; words are not empty.
      num_pieces: how many pieces there may be; fewer come out when no pair is left that
        occurs twice.

    Returns:
      The segmenter.

    Raises:
      ValueError: there are more characters than pieces.

    Example:
      >>> from metax.tasks.subwords import learn_merges, split_word
      >>> counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
      >>> split_word(learn_merges(counts, 14), "lowest")
      ('lo', 'w', 'est</w>')
    """
    words = [_characters(word) for word in counts]
    weights = list(counts.values())
    pieces = _by_frequency(words, weights)
    if len(pieces) > num_pieces:
        raise ValueError(
            "`learn_merges(num_pieces=...)` must be at least the number of characters; "
            f"got {num_pieces}, {len(pieces)} characters."
        )
    frequency, places = _count_pairs(words, weights)
    heap = [(-number, pair) for pair, number in frequency.items()]
    heapq.heapify(heap)
    ranks: dict[Pair, int] = {}
    known = set(pieces)
    while len(pieces) < num_pieces and heap:
        number, pair = heapq.heappop(heap)
        if frequency[pair] < -number:  # has changed since it was put there
            heapq.heappush(heap, (-frequency[pair], pair))
            continue
        if -number < 2:
            break
        ranks[pair] = len(ranks)
        for other in _merge_everywhere(pair, words, weights, frequency, places):
            heapq.heappush(heap, (-frequency[other], other))
        # two ways of merging can make the same piece
        if pair[0] + pair[1] not in known:
            known.add(pair[0] + pair[1])
            pieces.append(pair[0] + pair[1])
    return Segmenter(pieces=tuple(pieces), ranks=ranks)


def split_word(segmenter: Segmenter, word: str) -> tuple[str, ...]:
    """Cuts a word, by the merges in the order in which they were learned.

    Args:
      segmenter: of `learn_merges`.
      word: not empty; characters never seen stay alone.

    Returns:
      Its pieces; the last ends in `</w>`.
    """
    symbols = _characters(word)
    never = len(segmenter.ranks)
    while len(symbols) > 1:
        turns = ((segmenter.ranks.get(pair, never), pair) for pair in pairwise(symbols))
        rank, pair = min(turns)
        if rank == never:
            break
        symbols = _merged(symbols, pair)
    return tuple(symbols)


def join_pieces(pieces: Iterable[str]) -> list[str]:
    """The words that pieces make, the inverse of `split_word`.

    Args:
      pieces: of any number of words, one after the other.

    Returns:
      The words; a last one without an end stays as it is.
    """
    text = "".join(pieces)
    return [word for word in text.split(_LAST) if word]


def _characters(word: str) -> list[str]:
    return [*word[:-1], word[-1] + _LAST]


def _by_frequency(words: list[list[str]], weights: list[int]) -> list[str]:
    frequency: Counter[str] = Counter()
    for symbols, weight in zip(words, weights, strict=True):
        for symbol in symbols:
            frequency[symbol] += weight
    return sorted(frequency, key=lambda symbol: (-frequency[symbol], symbol))


def _count_pairs(
    words: list[list[str]], weights: list[int]
) -> tuple[Counter[Pair], dict[Pair, set[int]]]:
    """How often each pair occurs, and in which words."""
    frequency: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = defaultdict(set)
    for i, (symbols, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in pairwise(symbols):
            frequency[pair] += weight
            places[pair].add(i)
    return frequency, places


def _merge_everywhere(
    pair: Pair,
    words: list[list[str]],
    weights: list[int],
    frequency: Counter[Pair],
    places: dict[Pair, set[int]],
) -> list[Pair]:
    """Merges a pair in all words, in place; returns the pairs that came of it."""
    change: dict[Pair, int] = defaultdict(int)
    for i in places.pop(pair):
        old, new = words[i], _merged(words[i], pair)
        for neighbours in pairwise(old):
            change[neighbours] -= weights[i]
        for neighbours in pairwise(new):
            change[neighbours] += weights[i]
            places[neighbours].add(i)
        words[i] = new
    for neighbours, number in change.items():
        frequency[neighbours] += number
    return [neighbours for neighbours, number in change.items() if number > 0]


def _merged(symbols: list[str], pair: Pair) -> list[str]:
    """The symbols with each occurrence of the pair as one, from the left."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
