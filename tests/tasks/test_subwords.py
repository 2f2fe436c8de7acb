from itertools import pairwise

import pytest

from metax.tasks.subwords import join_pieces, learn_merges, split_word

COUNTS = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
CHARACTERS = 11  # l o w w</w> e r</w> n s t</w> i d


def test_merges_of_four_words_are_those_found_by_hand():
    segmenter = learn_merges(COUNTS, CHARACTERS + 6)
    # e s and s t</w> occur 9 times, w e 8 of which none is left; ties by the alphabet
    assert list(segmenter.ranks) == [
        ("e", "s"),
        ("es", "t</w>"),
        ("l", "o"),
        ("e", "w"),
        ("ew", "est</w>"),
        ("n", "ewest</w>"),
    ]
    assert list(segmenter.ranks.values()) == list(range(6))
    assert segmenter.pieces[CHARACTERS:] == (
        *("es", "est</w>", "lo", "ew"),
        *("ewest</w>", "newest</w>"),
    )


def test_characters_come_first_by_frequency_then_alphabet():
    segmenter = learn_merges(COUNTS, CHARACTERS)
    assert segmenter.ranks == {}
    # e 2 + 12 + 3, s and t</w> 9, w 2 + 6 + 3
    assert segmenter.pieces[:4] == ("e", "w", "s", "t</w>")
    assert split_word(segmenter, "low") == ("l", "o", "w</w>")


def test_a_pair_that_overlaps_itself_is_merged_from_the_left():
    segmenter = learn_merges({"aaaab": 3}, 3)
    assert list(segmenter.ranks) == [("a", "a")]
    assert split_word(segmenter, "aaab") == ("aa", "a", "b</w>")


def test_no_pair_that_occurs_once_is_merged():
    segmenter = learn_merges({"ab": 1, "cd": 2}, 100)
    assert list(segmenter.ranks) == [("c", "d</w>")]


def test_words_come_back_from_their_pieces():
    segmenter = learn_merges(COUNTS, CHARACTERS + 5)
    words = ["lowest", "new", "low", "würdest", "x"]
    pieces = [piece for word in words for piece in split_word(segmenter, word)]
    assert join_pieces(pieces) == words
    assert join_pieces(["lo", "w</w>", "ne"]) == ["low", "ne"]


def test_learned_pieces_are_all_that_known_words_need():
    counts = {
        f"{a}{b}{a}{c}": len(a + b) + 3 for a in "abc" for b in "dab" for c in "ce"
    }
    for size in (8, 12, 20, 40):
        segmenter = learn_merges(counts, size)
        used = {piece for word in counts for piece in split_word(segmenter, word)}
        assert used <= set(segmenter.pieces)
        assert len(segmenter.pieces) == len(set(segmenter.pieces)) <= size


def test_the_incremental_counts_equal_counting_anew():
    counts = {"banana": 4, "bandana": 3, "ananas": 5, "cabana": 2, "nab": 7, "an": 1}

    def anew(num_merges):
        words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
        merges = []
        for _ in range(num_merges):
            pairs = {}
            for word, symbols in words.items():
                for pair in pairwise(symbols):
                    pairs[pair] = pairs.get(pair, 0) + counts[word]
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            if pairs[best] < 2:
                break
            merges.append(best)
            for word, symbols in words.items():
                joined = []
                for symbol in symbols:
                    if joined and (joined[-1], symbol) == best:
                        joined[-1] += symbol
                    else:
                        joined.append(symbol)
                words[word] = joined
        return merges

    learned = list(learn_merges(counts, 30).ranks)
    assert learned == anew(len(learned))
    assert len(learned) > 8


def test_fewer_pieces_than_characters_are_refused():
    with pytest.raises(ValueError, match=r"num_pieces=...\).*got 10, 11 characters"):
        learn_merges(COUNTS, 10)
