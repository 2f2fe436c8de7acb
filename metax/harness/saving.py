"""One save at a time, beside the training.

A thread of our own rather than Orbax's asynchronous checkpointer: rows, arrays, hashes
and manifest go to disk in an order that a kill may cut anywhere, which is one job, not
the part of it that Orbax knows; and where a job fails there is one place to look.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from metax.harness.processes import is_single

__all__ = ["Saver"]


class Saver:
    """Runs jobs in one background thread, at most one of them unfinished.

    With several processes a job runs at once instead: Orbax waits for the others by
    collectives, which from a thread would race with those of the run.

    As a context it is left when everything is written. A job's error is raised by the
    next `submit`, or when the context is left; beside another error it becomes a note
    of that one.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metax-saver")
        self._job: Future | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Waits for the job before, then starts this one.

        Args:
          job: called once, without arguments.
        """
        self.wait()
        if is_single():
            self._job = self._thread.submit(job)
        else:
            job()

    def wait(self) -> None:
        """Returns when the last job is done, and raises its error."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if not isinstance(error, Exception):
                raise
            error.add_note(f"Saving failed as well: {failure}")
        finally:
            self._thread.shutdown()
