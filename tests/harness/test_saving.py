import threading
import time

import pytest

from metax.harness.saving import Saver


def fail():
    raise OSError("the disk is gone")


def test_jobs_run_in_turn_beside_the_caller():
    order, go = [], threading.Event()

    def first():
        go.wait(10)
        order.append(threading.current_thread().name)

    with Saver() as saver:
        saver.submit(first)
        order.append("caller")
        go.set()
        saver.submit(lambda: order.append("second"))
    assert order == ["caller", "metax-saver_0", "second"]


def test_context_is_left_when_everything_is_done():
    done = []
    with Saver() as saver:
        saver.submit(lambda: (time.sleep(0.05), done.append(1)))
    assert done == [1]


def test_error_is_raised_by_the_next_job_once():
    done = []
    with Saver() as saver:
        saver.submit(fail)
        with pytest.raises(OSError, match="the disk is gone"):
            saver.submit(lambda: done.append(1))
        saver.submit(lambda: done.append(2))
    assert done == [2]


@pytest.mark.parametrize("error", [None, SystemExit(143)])
def test_error_of_the_last_job_is_raised_at_the_end(error):
    def run():
        with Saver() as saver:
            saver.submit(fail)
            if error is not None:
                raise error

    with pytest.raises(OSError, match="the disk is gone"):
        run()


def test_another_error_keeps_its_place_and_gets_a_note():
    def run():
        with Saver() as saver:
            saver.submit(fail)
            raise ValueError("worse")

    with pytest.raises(ValueError, match="worse") as caught:
        run()
    assert caught.value.__notes__ == ["Saving failed as well: the disk is gone"]
