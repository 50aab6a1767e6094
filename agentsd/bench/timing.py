"""Fair timing of several variants in one process: interleaved rounds, medians of paired ratios, peak memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch


# Linux keeps the peak of a process' resident memory (VmHWM), and writing 5 to clear_refs sets it back.
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Variant:
    """
    Something to time.

    Args:
        name (`str`): Unique among the variants timed together.
        enter (`Callable`): Returns a context manager that switches the variant on and, on leaving, off again.
        call (`Callable`): What is timed, while the variant is on.
    """

    name: str
    enter: Callable[[], AbstractContextManager[object]]
    call: Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """
    One timed call.

    Args:
        seconds (`float`): Wall-clock time, the device's queue drained before and after.
        peak_bytes (`int`, *optional*): See [`PeakMemory`]; `None` where it cannot be measured.
    """

    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """
    What is reported of a variant's samples.

    Args:
        rounds (`int`): Number of samples.
        median (`float`): Median time in seconds.
        q1 (`float`): Lower quartile in seconds.
        q3 (`float`): Upper quartile in seconds.
        speedup (`float`, *optional*): Median over the rounds of the baseline's time divided by this one's.
        peak_bytes (`int`, *optional*): Highest peak memory of any round.
    """

    rounds: int
    median: float
    q1: float
    q3: float
    speedup: float | None
    peak_bytes: int | None


class PeakMemory:
    """
    Highest memory use between `reset` and `read`.

    On CUDA it is what torch had allocated. On Linux CPUs it is the resident memory of the *whole process*: weights,
    libraries and memory that an earlier variant freed but the allocator kept all count, so that only differences
    between variants tell something. Elsewhere it is not measured.

    Args:
        device (`torch.device`): Where the variants run.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.bench.timing import PeakMemory
    >>> memory = PeakMemory(torch.device("cpu"))
    >>> memory.reset()
    >>> peak = memory.read()
    ```
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_reset = False

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            try:
                _CLEAR_REFS.write_text("5")
                self._is_reset = True
            except OSError:  # not Linux, or a sandbox that forbids it
                self._is_reset = False

    def read(self) -> int | None:
        """
        The peak since `reset`.

        Returns:
            `int`, *optional*: Bytes, or `None` where it cannot be measured.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self._is_reset:
            return None
        peaks = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else None


def synchronize(device: torch.device) -> None:
    """
    Wait until the device has done all that was asked of it.

    Args:
        device (`torch.device`): Nothing to wait for on a CPU.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_call(call: Callable[[], object], device: torch.device) -> Sample:
    """
    Time one call.

    Args:
        call (`Callable`): What to time.
        device (`torch.device`): Where it runs.

    Returns:
        `Sample`: Seconds and peak memory.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.bench.timing import time_call
    >>> time_call(lambda: None, torch.device("cpu")).seconds < 1
    True
    ```
    """
    memory = PeakMemory(device)
    synchronize(device)
    memory.reset()
    start = time.perf_counter()
    call()
    synchronize(device)
    seconds = time.perf_counter() - start
    return Sample(seconds, memory.read())


def time_round(
    variants: Sequence[Variant],
    device: torch.device,
    warmup: int = 1,
    on_call: Callable[[str], None] | None = None,
) -> dict[str, Sample]:
    """
    Time every variant once, in turn. Calling this again and again gives the order A B C A B C, in which a slow drift
    of the machine (heat, a neighbour's load) meets all variants alike.

    Args:
        variants (`Sequence[Variant]`): What to time.
        device (`torch.device`): Where it runs.
        warmup (`int`, defaults to `1`):
            Untimed calls each time a variant has been switched on, so that nobody pays for another one's caches.
        on_call (`Callable`, *optional*): Told the variant's name before each call, timed or not.

    Returns:
        `dict[str, Sample]`: A sample by variant name.

    Examples:

    ```python
    >>> import torch
    >>> from contextlib import nullcontext
    >>> from agentsd.bench.timing import Variant, time_round
    >>> samples = time_round([Variant("nothing", nullcontext, lambda: None)], torch.device("cpu"))
    >>> list(samples)
    ['nothing']
    ```
    """
    samples: dict[str, Sample] = {}
    for variant in variants:
        with variant.enter():
            for _ in range(warmup):
                if on_call is not None:
                    on_call(variant.name)
                variant.call()
            if on_call is not None:
                on_call(variant.name)
            samples[variant.name] = time_call(variant.call, device)
    return samples


def summarize(rounds: Sequence[Mapping[str, Sample]], name: str, baseline: str | None = None) -> Summary:
    """
    Summarise one variant over all rounds.

    Args:
        rounds (`Sequence[Mapping[str, Sample]]`): What `time_round` returned, round by round.
        name (`str`): The variant.
        baseline (`str`, *optional*):
            The variant to compare with. The ratio is taken within each round before the median, because two times
            measured one after the other share the machine's momentary state.

    Returns:
        `Summary`: Median, quartiles, speed-up and peak memory.

    Raises:
        ValueError: If there is no round.

    Examples:

    ```python
    >>> from agentsd.bench.timing import Sample, summarize
    >>> rounds = [{"a": Sample(4.0), "b": Sample(2.0)}, {"a": Sample(9.0), "b": Sample(3.0)}]
    >>> summarize(rounds, "b", baseline="a").speedup
    2.5
    ```
    """
    if not rounds:
        raise ValueError("There is no finished round to summarise.")
    seconds = [samples[name].seconds for samples in rounds]
    if len(seconds) > 1:
        q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    else:
        q1 = q3 = seconds[0]
    peaks = [samples[name].peak_bytes for samples in rounds]
    speedup = None
    if baseline is not None:
        speedup = statistics.median(samples[baseline].seconds / samples[name].seconds for samples in rounds)
    return Summary(
        rounds=len(seconds),
        median=statistics.median(seconds),
        q1=q1,
        q3=q3,
        speedup=speedup,
        peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
    )
