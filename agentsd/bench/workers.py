"""Several processes that share the drawing of pictures, started by `accelerate launch`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


Item = TypeVar("Item")


class Workers:
    """
    The processes of this run; a run that was not started by `accelerate launch` is the only one.

    Examples:

    ```python
    >>> from agentsd.bench.workers import Workers
    >>> Workers().count
    1
    ```
    """

    def __init__(self) -> None:
        # The others wait while the main process times, which can take hours.
        self._state = PartialState(timeout=timedelta(days=2))

    @property
    def count(self) -> int:
        """Number of processes."""
        return self._state.num_processes

    @property
    def device(self) -> str | None:
        """The GPU of this process, where several share the work; else `None`."""
        return str(self._state.device) if self.count > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process times and writes."""
        return self._state.is_main_process

    def wait(self) -> None:
        """Wait until every process is here."""
        self._state.wait_for_everyone()

    def agree(self, value: Any) -> Any:
        """
        What the main process says.

        Args:
            value (`Any`): Something picklable; what the other processes give does not matter.

        Returns:
            `Any`: The main process' value, in every process.
        """
        return value if self.count == 1 else broadcast_object_list([value], from_process=0)[0]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """
        This process' part of some work.

        Args:
            items (`Sequence`): All of it.

        Returns:
            `Sequence`: Every `count`-th item.
        """
        return items[self._state.process_index :: self.count]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go through a `with` block before the others."""
        with self._state.main_process_first():
            yield
