"""What belongs to one thread: servers run pipelines that share a model in several threads."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch


Own = TypeVar("Own")


class PerThread(Generic[Own]):
    """
    One object for each thread. A copy starts with none.

    Compiled code cannot look up what is a thread's own. It sees the object that was shared last, which is right for as
    long as one thread at a time runs it: [`CallsInThreads`] sees to that.

    Args:
        make (`Callable[[], Any]`): Makes a thread's object.
    """

    def __init__(self, make: Callable[[], Own]):
        self.make = make
        self.shared = make()
        # Whether compiled code has looked.
        self.is_compiled = False
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self) -> Own:
        """This thread's object; in compiled code, the one shared last."""
        if torch.compiler.is_compiling():
            self.is_compiled = True
            return self.shared
        try:
            own: Own = self._local.own
        except AttributeError:
            own = self._local.own = self.make()
        return own

    def share(self) -> None:
        """Show this thread's object to compiled code."""
        self.shared = self.get()


class CallsInThreads:
    """Which threads are in a call of a model now, and which of them have not been alone in it."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._overlapping: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def begin(self, is_compiled: bool) -> None:
        """A call begins in this thread; an error if another runs that compiled code would mistake it for."""
        thread = threading.get_ident()
        # One that was interrupted has not ended.
        self._overlapping.discard(thread)
        # Before looking for others: of two that begin at the same time, at least one sees the other.
        self._running.add(thread)
        if len(self._running) == 1:
            return
        if is_compiled:
            self._running.discard(thread)
            raise _two_calls()
        self._overlapping.update(self._running)

    def end(self, is_compiled: bool) -> None:
        """This thread's call has ended; an error if compiled code may have mistaken it for another."""
        thread = threading.get_ident()
        self._running.discard(thread)
        if thread in self._overlapping:
            self._overlapping.discard(thread)
            if is_compiled:
                raise _two_calls()


def _two_calls() -> RuntimeError:
    return RuntimeError(
        "Two threads called a compiled model with an agentsd patch at the same time, whose calls compiled code cannot "
        "tell apart. Let one thread wait for the other (`threading.Lock`), give each a model of its own, or leave the "
        "model uncompiled."
    )
