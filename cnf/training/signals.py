"""Interrupts: the first one asks the loop to stop after its step, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

__all__ = ["Caught", "stop_on_signals"]

_NOTICE = b"\nstopping after this step (once more to stop at once)\n"


@dataclass
class Caught:
    """The number of the signal that came first, or None as long as none came."""

    number: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Caught]:
    """Catch SIGINT and SIGTERM: the first is written down, the second raises `KeyboardInterrupt`.

    A signal that is ignored, as SIGINT is in a background job of a script, stays ignored. The
    former handlers are back when the block is left. Outside the main thread, where Python
    delivers no signals, nothing is caught.

    Example:
        >>> with stop_on_signals() as caught:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> caught.number
        15
    """
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, _: FrameType | None) -> None:
        if caught.number is not None:
            raise KeyboardInterrupt
        caught.number = int(number)
        with suppress(OSError):
            os.write(
                2, _NOTICE
            )  # print() must not be called from a handler: it may interrupt itself

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: old for number, old in former.items() if old is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
