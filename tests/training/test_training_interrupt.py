"""Ctrl-C waits for a safe place, once."""

from __future__ import annotations

import os
import signal

import pytest

from pyft.training.interrupt import Interrupt


@pytest.fixture(autouse=True)
def usual_handler() -> object:
    """pytest may run with SIGINT ignored (in the background of a shell)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_noted_and_the_second_is_at_once() -> None:
    with Interrupt() as interrupt:
        assert not interrupt.requested
        ctrl_c()
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_immediate_raises_now_or_on_entry() -> None:
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.immediate():
        ctrl_c()
    with Interrupt() as interrupt:
        with interrupt.immediate():
            pass
        ctrl_c()
        with pytest.raises(KeyboardInterrupt), interrupt.immediate():
            pytest.fail("not interrupted")


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as interrupt:
        ctrl_c()
        assert not interrupt.requested
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
