"""The folder of a run's checkpoints: which are there, and which may go.

12/            a checkpoint, complete if its manifest is there
12.tmp/        one that is being written, or was when its writer was killed; or one
               that is being deleted
12.corrupt/    one that was damaged, set aside by a run that went on without it
"""

import os
import shutil
from pathlib import Path

from metax.harness.manifest import MANIFEST

__all__ = ["clear", "latest_step", "numbered", "prune", "set_aside", "unfinished"]


def latest_step(directory: str | os.PathLike) -> int | None:
    """Finds the last complete checkpoint.

    Args:
      directory: where the checkpoints of one run live.

    Returns:
      Its number of steps, None where there is no checkpoint or no folder. A folder
      without its manifest is none.
    """
    return max(complete(Path(directory)), default=None)


def set_aside(directory: str | os.PathLike, step: int) -> None:
    """Renames the checkpoints after `step` to `STEP.corrupt`: they may be saved anew.

    Args:
      directory: where the checkpoints of one run live.
      step: the number of steps done of the last one to leave as it is.
    """
    folder = Path(directory)
    for later in numbered(folder):
        if later > step:
            aside = folder / f"{later}.corrupt"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder / str(later), aside)


def numbered(directory: str | os.PathLike) -> list[int]:
    """The steps whose folders are there, damaged ones too, in order."""
    folder = Path(directory)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def complete(folder: Path) -> list[int]:
    """The steps whose folders have a manifest, in order."""
    return [n for n in numbered(folder) if (folder / str(n) / MANIFEST).is_file()]


def unfinished(path: Path) -> Path:
    """Where a checkpoint lies before it is `path`, and after it has been."""
    return path.with_name(f"{path.name}.tmp")


def clear(folder: Path) -> None:
    """Removes what writers that were stopped have left."""
    for path in folder.glob("*.tmp"):
        if path.stem.isdecimal():
            shutil.rmtree(path)


def prune(folder: Path, keep: int) -> None:
    """Deletes the oldest; each is renamed first, so that no part of one is counted."""
    for step in complete(folder)[:-keep]:
        old = unfinished(folder / str(step))
        os.replace(folder / str(step), old)
        shutil.rmtree(old)
