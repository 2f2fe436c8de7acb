"""Sentences from the files of parallel and tagged corpora.

Four formats, each file plain or packed with `.gz` at the end:

    Multi30k    one caption a line, a file for each language and part
    GermEval    index, token, outer tag, inner tag; tabs; comments begin with `#`, tab
    Europarl    token, lemma, part of speech, chunk, name tag; tabs
    CoNLL-U     ten columns, of which 2 is the token, 4 UPOS, 5 XPOS; tabs

In the last three a line is a token and an empty line ends a sentence. Digits become 0.

Elliott et al., "Multi30K", 2016, arXiv 1605.00459; Benikova et al., "NoSta-D", LREC
2014; Faruqui & Padó, KONVENS 2010; Nivre et al., "Universal Dependencies", LREC 2016.
"""

import gzip
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = [
    "Sentence",
    "read_captions",
    "read_entities",
    "read_parts_of_speech",
    "split_punctuation",
    "unique",
]

Words = tuple[str, ...]

_TOKEN = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]")
_DIGIT = re.compile(r"\d")
_TREEBANKS = ("de_gsd-ud-dev", "de_gsd-ud-test", "de_lit-ud-test", "de_pud-ud-test")
_CONLLU_TOKEN, _UPOS, _XPOS = 1, 3, 4
_GERMEVAL_TOKEN, _GERMEVAL_OUTER = 1, 2
_EUROPARL_TOKEN, _EUROPARL_POS = 0, 2
_RENAMED = {"PROAV": "PAV"}  # two names of one tag of the STTS


class Sentence(NamedTuple):
    """Words and what each is.

    Attributes:
      words: with digits as 0.
      tags: one for each word.
    """

    words: Words
    tags: tuple[str, ...]


def read_captions(
    data_dir: str | os.PathLike, part: str, *, cased: bool = True
) -> tuple[list[Words], list[Words]]:
    """German and English captions of Multi30k, line by line.

    Args:
      data_dir: the folder that holds the folder `multi30k`.
      part: "train", "val", "test_2016_flickr" or "test_2018_flickr".
      cased: whether the raw text is read and cut by `split_punctuation`; else the
        lower-cased, tokenised one (`.lc.norm.tok`).

    Returns:
      The words of each caption, German and English.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the two files are not of equal length.
    """
    form = "" if cased else ".lc.norm.tok"
    cut = split_punctuation if cased else lambda line: tuple(line.split())
    german, english = (
        [
            cut(_DIGIT.sub("0", line))
            for line in _lines(_find(data_dir, f"multi30k/{part}{form}.{language}"))
        ]
        for language in ("de", "en")
    )
    if len(german) != len(english):
        raise ValueError(
            f"`read_captions` found {len(german)} German and {len(english)} English "
            f"captions in {part!r} of {data_dir}; they must be pairs."
        )
    return german, english


def read_entities(
    data_dir: str | os.PathLike, part: Literal["dev", "test"], *, cased: bool = True
) -> list[Sentence]:
    """Sentences of GermEval 2014 with their outer names, tags in the IOB2 form.

    Args:
      data_dir: the folder that holds the folder `german`.
      part: "dev" or "test".
      cased: whether words keep their case.

    Returns:
      The sentences.

    Raises:
      FileNotFoundError: the file is missing.
    """
    lines = _lines(_find(data_dir, f"german/germeval2014.{part}.tsv"))
    rows = (line for line in lines if not line.startswith("#\t"))
    return list(_sentences(rows, _GERMEVAL_TOKEN, _GERMEVAL_OUTER, cased))


def read_parts_of_speech(
    data_dir: str | os.PathLike,
    tags: Literal["upos", "stts"] = "upos",
    *,
    cased: bool = True,
) -> list[Sentence]:
    """German sentences with parts of speech, from all files there are.

    "upos": the 17 universal tags of the treebanks GSD (development and test), LIT and
    PUD. "stts": the tags of the STTS in GSD, which splits contractions and so lacks
    APPRART, and in Europarl, there by machine.

    Args:
      data_dir: the folder that holds the folder `german`.
      tags: which tags.
      cased: whether words keep their case.

    Returns:
      The sentences, file after file.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: `tags` is unknown.
    """
    if tags not in ("upos", "stts"):
        raise ValueError(
            f"`read_parts_of_speech(tags=...)` must be 'upos' or 'stts'; got {tags!r}."
        )
    column, files = (_UPOS, _TREEBANKS) if tags == "upos" else (_XPOS, _TREEBANKS[:2])
    sentences: list[Sentence] = []
    for name in files:
        lines = _lines(_find(data_dir, f"german/{name}.conllu"))
        rows = (line for line in lines if _is_word(line))
        sentences += _sentences(rows, _CONLLU_TOKEN, column, cased)
    for part in () if tags == "upos" else ("train", "dev", "test"):
        rows = _lines(_find(data_dir, f"german/europarl_ner.{part}.tsv"))
        sentences += _sentences(rows, _EUROPARL_TOKEN, _EUROPARL_POS, cased)
    return sentences


def split_punctuation(line: str) -> Words:
    """Words, numbers and signs of a line; hyphens and dots within a word stay.

    Args:
      line: any text.

    Returns:
      Its tokens.

    Example:
      >>> from metax.tasks.corpora import split_punctuation
      >>> split_punctuation('Ein T-Shirt, "neu".')
      ('Ein', 'T-Shirt', ',', '"', 'neu', '"', '.')
    """
    return tuple(_TOKEN.findall(line))


def unique(sentences: Iterable[Sentence]) -> list[Sentence]:
    """The first of all sentences that have the same words, in order.

    A sentence that occurs in two parts of a set would be learned and then asked.

    Args:
      sentences: any.

    Returns:
      The sentences without repetition.
    """
    first: dict[Words, Sentence] = {}
    for sentence in sentences:
        first.setdefault(sentence.words, sentence)
    return list(first.values())


def _is_word(line: str) -> bool:
    """Whether a line of CoNLL-U is a word or empty: no comment, range, empty node."""
    return not line or line.split("\t")[0].isdigit()


def _sentences(
    lines: Iterable[str], token_column: int, tag_column: int, cased: bool
) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    for line in (*lines, ""):
        if line:
            fields = line.split("\t")
            word = _DIGIT.sub("0", fields[token_column])
            words.append(word if cased else word.lower())
            tag = fields[tag_column]
            tags.append(_RENAMED.get(tag, tag))
        elif words:
            yield Sentence(words=tuple(words), tags=tuple(tags))
            words, tags = [], []


def _find(data_dir: str | os.PathLike, name: str) -> Path:
    root = Path(data_dir).expanduser()
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"The corpora were looked for in {root}, which has neither {name} nor "
        f"{name}.gz. Multi30k is published at github.com/multi30k/dataset, GermEval "
        "2014 by its shared task, the treebanks by universaldependencies.org; "
        "`translation.synthetic` needs no files."
    )


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield line.rstrip("\r\n")
