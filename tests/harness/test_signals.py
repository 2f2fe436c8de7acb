import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from metax import Loop
from metax.harness import latest_step, read_metrics, record_run
from metax.harness.signals import stop_request

KEY = jax.random.key(0)
COUNTER = Loop(lambda key: jnp.array(0), lambda s, key, data: (s + 1, jnp.sqrt(s)))
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(autouse=True)
def heed_interrupts():
    """A shell has SIGINT ignored by what runs in the background: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signal_at(signum, at):
    """Rows of one value, and a signal to this process while those of `at` are made."""

    def rows(step, state, infos):
        if step == at:
            os.kill(os.getpid(), signum)
        return [{"step": step, "value": float(infos[-1])}]

    return rows


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_run_stops_when_its_chunk_is_saved_and_goes_on_later(tmp_path, signum, code):
    before = [signal.getsignal(s) for s, _ in CODES]
    whole = tmp_path / "whole"
    record_run(whole, COUNTER, None, KEY, 12, chunk=2, rows=signal_at(signum, -1))
    with pytest.raises(SystemExit) as caught:
        record_run(tmp_path, COUNTER, None, KEY, 12, chunk=2, rows=signal_at(signum, 6))
    assert caught.value.code == code
    assert [signal.getsignal(s) for s, _ in CODES] == before
    assert latest_step(tmp_path / "checkpoints") == 6
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 6]
    state, infos = record_run(
        tmp_path, COUNTER, None, KEY, 12, chunk=2, rows=signal_at(signum, -1),
        resume=True,
    )  # fmt: skip
    assert (int(state), len(infos)) == (12, 6)
    assert read_metrics(tmp_path) == read_metrics(whole)


def test_signal_in_the_last_chunk_ends_the_program_as_well(tmp_path):
    with pytest.raises(SystemExit) as caught:
        record_run(tmp_path, COUNTER, None, KEY, 4, rows=signal_at(signal.SIGTERM, 4))
    assert caught.value.code == 143
    assert latest_step(tmp_path / "checkpoints") == 4


def test_signal_that_comes_when_all_is_written_is_not_lost():
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as caught:
            stop.exit_if_asked()
    assert caught.value.code == 130


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_take_no_signals(tmp_path):
    seen = []

    def run():
        with stop_request():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


# the second signal comes while the chunk of the first is not yet done
TWICE = """
import os, signal, time
from metax.harness.signals import stop_request

signal.signal(signal.SIGINT, signal.default_int_handler)
with stop_request() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signum == signal.SIGINT
    os.kill(os.getpid(), signal.SIGTERM)
    print("too late")
"""


def test_second_signal_ends_the_process_at_once():
    done = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, "")
    assert "SIGINT: stops after this chunk" in done.stderr


def test_no_row_is_lost_or_doubled_whatever_chunk_a_signal_came_in(tmp_path):
    whole = tmp_path / "whole"
    rows = signal_at(signal.SIGTERM, -1)
    record_run(whole, COUNTER, None, KEY, 8, chunk=1, rows=rows)
    for step in range(1, 9):
        with pytest.raises(SystemExit):
            record_run(
                tmp_path / "run", COUNTER, None, KEY, 8, chunk=1, resume=True,
                rows=signal_at(signal.SIGTERM, step),
            )  # fmt: skip
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
