"""Peak memory of a method: the device's own count, or the peak of a process of its own."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..utils.memory import can_watch_peak, read_peak, start_peak
from .peers import MethodUnavailable


_OOM_SCORE = Path("/proc/self/oom_score_adj")
# What torch's allocators say where they raise a plain RuntimeError: on Linux, Windows, and GPUs.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def allocated_bytes(device: torch.device) -> int:
    """What torch has allocated on a GPU at present; 0 where it is not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(device: torch.device, prepare: Callable[[], Callable[[], object]], others: int = 0) -> int | None:
    """
    The highest memory use, in bytes, during the call that `prepare` returns; `None` where it cannot be measured.

    On CUDA it is what torch had allocated, less the bytes of others. On Linux CPUs it is the resident memory of a
    process of its own, weights and libraries included, so that memory which other methods left behind does not count:
    there, `prepare` must be picklable, and whatever goes wrong comes back as `MemoryError` or `RuntimeError`.
    """
    if not can_watch_peak(device):
        return None
    if device.type == "cpu":
        return _in_own_process(prepare)
    peak = _watch(device, prepare())
    return None if peak is None else peak - others


def _watch(device: torch.device, call: Callable[[], object]) -> int | None:
    is_watched = start_peak(device)
    call()
    return read_peak(device) if is_watched else None


def _in_own_process(prepare: Callable[[], Callable[[], object]]) -> int | None:
    # A fork of this process would inherit its memory, and OpenMP's threads do not survive a fork. The fork server has
    # imported the libraries once and done nothing with them.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["agentsd.utils.quiet", "agentsd.bench.models"])
    here, there = server.Pipe(duplex=False)
    child = server.Process(target=_measure, args=(prepare, torch.get_num_threads(), there), daemon=True)
    child.start()
    there.close()
    try:
        answer: Any = here.recv()
    except EOFError:
        child.join()
        # Where memory runs out, Linux kills a process, and this one asked to be the first.
        if child.exitcode == -signal.SIGKILL:
            answer = MemoryError()
        else:
            answer = RuntimeError(
                f"the process that measures memory ended with exit code {child.exitcode}; if a script of yours calls "
                'this, do it under `if __name__ == "__main__":`'
            )
    child.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _measure(prepare: Callable[[], Callable[[], object]], threads: int, answer: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        # If memory runs out, let it be this process that is ended.
        _OOM_SCORE.write_text("1000", encoding="utf-8")
        answer.send(_watch(torch.device("cpu"), prepare()))
    except MethodUnavailable as error:
        answer.send(error)
    except Exception as error:
        answer.send(MemoryError() if is_out_of_memory(error) else RuntimeError(f"{type(error).__name__}: {error}"))
