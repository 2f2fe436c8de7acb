"""What the tests of sweeps run in other processes."""

import os
import signal
from pathlib import Path


def squared(cell):
    return {"square": cell["x"] ** 2, "of": [cell["x"]]}


def deadly(cell):
    """Ends its process, as a kernel short of memory does, where x is 1."""
    if cell["x"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return squared(cell)


def deadly_once(cell):
    """The same, but the next time all is well."""
    mark = Path(cell["mark"])
    if cell["x"] == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return squared(cell)
