"""Several processes that share the drawing of images, started by `accelerate launch`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..utils.loading import pick_device


Item = TypeVar("Item")


class Workers:
    """
    The processes of this run; a run that was not started by `accelerate launch` is the only one.

    `accelerate launch --multi_gpu --num_processes 2` starts two, on a machine without a GPU too, where `--cpu` would
    start a single one.
    """

    def __init__(self, device: str | None = None) -> None:
        self._is_cuda = pick_device(device).type == "cuda"
        # Without `cpu=True` where there is no GPU, accelerate takes each process for the only one. The others wait
        # while the main process times, which can take hours.
        self._state = PartialState(cpu=not self._is_cuda, timeout=timedelta(days=2))

    @property
    def count(self) -> int:
        """Number of processes."""
        return self._state.num_processes

    @property
    def device(self) -> str | None:
        """The GPU of this process, where several share the work on GPUs; else `None`."""
        return str(self._state.device) if self.count > 1 and self._is_cuda else None

    @property
    def is_main(self) -> bool:
        """Whether this process times and writes."""
        return self._state.is_main_process

    def wait(self) -> None:
        """Wait until every process is here."""
        self._state.wait_for_everyone()

    def agree(self, value: Any) -> Any:
        """The main process' value, in every process; it must be picklable."""
        return value if self.count == 1 else broadcast_object_list([value], from_process=0)[0]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process' part of some work: every `count`-th item."""
        return items[self._state.process_index :: self.count]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go through a `with` block before the others, and wait for them at its end."""
        with self._state.main_process_first():
            yield
        self.wait()
