"""Ctrl+C on the command line: in whatever moment it comes, it ends the command, with exit code 130."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .terminal import messages


@contextmanager
def ends_on_interrupt() -> Iterator[None]:
    """
    End the program where it is interrupted, and say so in one line. For the whole program, as it handles the signal.

    Raises:
        SystemExit: With code 130, which shells give to what was interrupted.
    """
    interrupts: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    def interrupt_again(lost: Any) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(lost)
            return
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, interrupt)
    # Python only prints an interrupt that comes while an object is being deleted, and goes on as if there were none.
    sys.unraisablehook = interrupt_again
    try:
        yield
    except KeyboardInterrupt:  # where no command was at work
        messages.print("Interrupted.")
        raise SystemExit(130) from None
    except SystemExit as end:
        # Libraries turn an interrupt into an error of their own where it meets them in an unlucky moment.
        if interrupts and end.code not in (0, 130):
            messages.print("Interrupted.")
            raise SystemExit(130) from None
        raise
