"""SIGINT and SIGTERM: stop at the next safe point, so that no work is lost; notice every Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from toolkit.errors import Interrupted


class StopRequest:
    """Records the signal that asked the program to stop."""

    def __init__(self):
        self.signal_number: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.signal_number is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self.signal_number).name}: run the same command again",
                self.signal_number,
            )


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM for `StopRequest.check`; a second signal ends the program.

    An exception in a signal handler could leave locks held and files incomplete. Instead, the
    caller calls ``check`` at points where the program can stop safely.
    """
    stop = StopRequest()

    def record(number, _):
        stop.signal_number = number
        signal.signal(number, signal.SIG_DFL)

    earlier = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                earlier[number] = signal.signal(number, record)
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_recorded() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C has raised KeyboardInterrupt."""
    was_interrupted = False

    def interrupt(number, frame):
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    earlier = signal.getsignal(signal.SIGINT)
    is_replaced = is_main and callable(earlier)
    if is_replaced:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: was_interrupted
    finally:
        if is_replaced:
            signal.signal(signal.SIGINT, earlier)
