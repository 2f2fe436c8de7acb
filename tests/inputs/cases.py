"""What a row of the input table is, and the bad values that many rows share."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

NAN = float("nan")
KEY = jax.random.key(0)
RAW = jax.random.PRNGKey(0)  # uint32 [2], as keys used to be
# no folder, and none can be made there
ABSENT = Path(os.devnull) / "absent" / "trained"


class Case(NamedTuple):
    """A public function, a call that it takes, and values that it refuses.

    Attributes:
      function: takes all of `good` by keyword.
      good: the arguments of a call that is accepted.
      bad: rows (argument, value, *words): the value is put into `good` in its place,
        and the message must hold the words; without any, the function's name and the
        argument's, `name(...argument=`.
      named: other names by which messages may call the function: that of the one
        which it hands its arguments to.
      runs: whether the good call is tried as well; False where that takes seconds, or
        writes, and other tests do it.
    """

    function: Callable[..., Any]
    good: Mapping[str, Any]
    bad: tuple[tuple, ...]
    named: tuple[str, ...] = ()
    runs: bool = True


def case(function, good, *bad, named=(), runs=True):
    return Case(function, good, bad, named, runs)


def numbers(*names, bad=(NAN, -1.0)):
    """Rows for arguments that must be finite and not negative."""
    return tuple((name, value) for name in names for value in bad)


def counts(*names, bad=(0, -1)):
    """Rows for arguments that must be integers of at least 1."""
    return tuple((name, value) for name in names for value in bad)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)
