"""Ctrl+C on the command line: in whatever moment it comes, it ends the command."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .terminal import say


@contextmanager
def ends_on_interrupt() -> Iterator[None]:
    """Exit with code 130 on Ctrl+C."""
    is_interrupted = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
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
    except (KeyboardInterrupt, SystemExit) as end:
        # typer makes an exit of an interrupt, and libraries make an error of their own of one that meets them in an
        # unlucky moment. A command that runs until it is interrupted, such as `demo`, ends with code 0.
        if not is_interrupted or (isinstance(end, SystemExit) and not end.code):
            raise
        say("Interrupted.")
        raise SystemExit(130) from None
