"""SIGTERM and Ctrl-C: a wish to stop, granted at the end of the chunk."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from metax.harness.processes import agree

__all__ = ["StopRequest", "stop_request"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody wants the run to stop.

    Attributes:
      signum: the signal that came, 0 as long as none has.
    """

    def __init__(self) -> None:
        self.signum = 0

    def exit_if_asked(self) -> None:
        """Ends the program, where a signal has come to any of the processes.

        Raises:
          SystemExit: with 128 and the signal's number: 130 for Ctrl-C, 143 for SIGTERM.
        """
        signum = agree(self.signum)
        if signum:
            raise SystemExit(128 + signum)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """The handler: notes the first signal; a second one ends the process at once.

        Args:
          signum: the signal's number.
          frame: not looked at.
        """
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum
        # not print: the signal may have come in the middle of one
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: stops after this chunk; once more: now\n".encode())


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Takes SIGTERM and SIGINT for wishes to stop, and gives them back afterwards.

    Handlers belong to the main thread; in another one nothing is taken, and signals do
    what they did before. A signal that is ignored stays ignored.

    Yields:
      What tells whether a signal came.
    """
    request = StopRequest()
    is_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in SIGNALS} if is_main else {}
    # what is ignored stays so, as Ctrl-C is by a job in the background; None, a handler
    # that was not set by Python, could not be given back
    kept = (signal.SIG_IGN, None)
    taken = {s: handler for s, handler in before.items() if handler not in kept}
    for signum in taken:
        signal.signal(signum, request.receive)
    try:
        yield request
    finally:
        for signum, handler in taken.items():
            signal.signal(signum, handler)
