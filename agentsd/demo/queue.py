"""A line in which generations wait for their turn, and from which their owner can stop them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


# Told what goes on, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]

# Each that waits keeps one of the web server's 40 threads, and others are needed to stop them.
MOST_WAITING = 24
# How often a generation that waits looks whether it was stopped.
_WAIT_SECONDS = 0.2


class Stopped(Exception):
    """A generation was stopped by its owner."""


class WaitingLine:
    """
    Lets one generation run at a time, in the order in which they came.

    Args:
        length (`int`): How many may wait; more are refused.

    Examples:

    ```python
    >>> from agentsd.demo.queue import WaitingLine
    >>> line = WaitingLine(length=2)
    >>> with line.turn("one visitor", print) as told:
    ...     told("drawing", 1, 20)
    starting 0 1
    drawing 1 20
    ```
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._line: deque[threading.Event] = deque()
        self._stops: dict[str, set[threading.Event]] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many run or wait."""
        return len(self._line)

    def stop(self, visitor: str) -> int:
        """
        Stop what a visitor has in the line, running or waiting; it ends at its next step.

        Args:
            visitor (`str`): Whose.

        Returns:
            `int`: How many there were.
        """
        with self._changed:
            stops = self._stops.get(visitor, set())
            for stop in stops:
                stop.set()
            return len(stops)

    @contextmanager
    def turn(self, visitor: str, progress: Progress) -> Iterator[Progress]:
        """
        Wait for one's turn, and have it for as long as a `with` block runs.

        Args:
            visitor (`str`): Who waits.
            progress (`Callable[[str, int, int], None]`): Told what goes on, the steps done and the steps in all.

        Yields:
            `Callable[[str, int, int], None]`: Another `progress`, which raises once the visitor has asked to stop.

        Raises:
            RuntimeError: If too many wait already.
            Stopped: If the visitor asked to stop while it waited.
        """
        stop = threading.Event()

        def told(what: str, done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped("The generation was stopped.")
            progress(what, done, total)

        with self._changed:
            if len(self._line) > self._length:
                raise RuntimeError("Too many generations are waiting already. Please try again later.")
            self._line.append(stop)
            self._stops.setdefault(visitor, set()).add(stop)
        try:
            with self._changed:
                while self._line[0] is not stop:
                    told("waiting for another generation", 0, self._line.index(stop))
                    self._changed.wait(_WAIT_SECONDS)
            told("starting", 0, 1)
            yield told
        finally:
            with self._changed:
                self._line.remove(stop)
                self._stops[visitor].discard(stop)
                if not self._stops[visitor]:
                    del self._stops[visitor]
                self._changed.notify_all()
