"""An interrupt that Python drops is noted all the same."""

import os
import signal

import pytest

from puna.cli import interrupts

pytestmark = pytest.mark.backend_free


@pytest.fixture(autouse=True)
def installed():
    before = signal.getsignal(signal.SIGINT)
    interrupts.install()
    yield
    signal.signal(signal.SIGINT, before)
    interrupts.clear()


class Interrupted:
    """Its destructor is interrupted; there Python prints the exception and goes on."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_inside_a_destructor_is_raised_later_and_once():
    lost = Interrupted()
    del lost
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()


def test_an_interrupt_that_was_caught_is_not_raised_again():
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    interrupts.clear()
    interrupts.check()
