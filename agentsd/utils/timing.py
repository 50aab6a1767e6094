"""Fair timing of several variants in one process: interleaved rounds and medians of paired ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from .generation import synchronize
from .intervals import bootstrap_median


class Stopwatch:
    """
    Takes times: on CUDA as events in the device's queue, so that taking one waits for nothing; elsewhere by the clock.

    Args:
        device (`torch.device`): Where the work runs.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.timing import Stopwatch
    >>> watch = Stopwatch(torch.device("cpu"))
    >>> watch.mark()
    >>> watch.mark()
    >>> len(watch.seconds())
    1
    ```
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Take a time."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._events.append(event)
        else:
            synchronize(self.device)
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """
        The time between each mark and the next.

        Returns:
            `list[float]`: Seconds; one less than there were marks.
        """
        synchronize(self.device)
        if self.device.type == "cuda":
            pairs = zip(self._events, self._events[1:], strict=False)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in zip(self._times, self._times[1:], strict=False)]


# What is timed. It may mark the end of every step.
Call = Callable[[Stopwatch], object]


@dataclass(frozen=True)
class Variant:
    """
    Something to time.

    Args:
        name (`str`): Unique among the variants timed together.
        call (`Callable[[Stopwatch], object]`): What is timed; it may mark the end of every step.
    """

    name: str
    call: Call


@dataclass(frozen=True)
class Sample:
    """
    One timed call.

    Args:
        seconds (`float`): From its beginning to its end, the device's queue drained.
        step_seconds (`float`, *optional*): From its beginning to the end of the last step, divided by the steps.
    """

    seconds: float
    step_seconds: float | None = None


@dataclass(frozen=True)
class Summary:
    """
    What is reported of a variant's samples.

    Args:
        rounds (`int`): Number of samples.
        seconds (`float`): Median time in seconds.
        q1 (`float`): Lower quartile in seconds.
        q3 (`float`): Upper quartile in seconds.
        step_seconds (`float`, *optional*): Median time of a step in seconds.
        step_q1 (`float`, *optional*): Its lower quartile.
        step_q3 (`float`, *optional*): Its upper quartile.
    """

    rounds: int
    seconds: float
    q1: float
    q3: float
    step_seconds: float | None = None
    step_q1: float | None = None
    step_q3: float | None = None


def time_call(call: Call, device: torch.device) -> Sample:
    """
    Time one call.

    Args:
        call (`Callable[[Stopwatch], object]`): What to time.
        device (`torch.device`): Where it runs.

    Returns:
        `Sample`: Seconds of the call and, if it marked its steps, of a step.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.timing import time_call
    >>> time_call(lambda watch: None, torch.device("cpu")).seconds < 1
    True
    ```
    """
    synchronize(device)
    watch = Stopwatch(device)
    watch.mark()
    call(watch)
    watch.mark()
    *steps, rest = watch.seconds()
    return Sample(sum(steps) + rest, sum(steps) / len(steps) if steps else None)


def time_round(
    variants: Sequence[Variant],
    device: torch.device,
    on_call: Callable[[str], None] | None = None,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, Sample]:
    """
    Time every variant once, in turn. Calling this again and again, each time in the reverse of the last order, gives
    A B C C B A: a slow drift of the machine (heat, a neighbour's load) meets all variants alike, and so does what the
    one before left behind in caches and memory.

    Args:
        variants (`Sequence[Variant]`): What to time; each has been called before, so that nothing is set up now.
        device (`torch.device`): Where it runs.
        on_call (`Callable`, *optional*): Told the variant's name before each call.
        on_error (`Callable`, *optional*): Told the name and error of a variant that fails, instead of raising it.

    Returns:
        `dict[str, Sample]`: A sample by variant name.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.timing import Variant, time_round
    >>> list(time_round([Variant("nothing", lambda watch: None)], torch.device("cpu")))
    ['nothing']
    ```
    """
    samples: dict[str, Sample] = {}
    for variant in variants:
        if on_call is not None:
            on_call(variant.name)
        try:
            samples[variant.name] = time_call(variant.call, device)
        except Exception as error:
            if on_error is None:
                raise
            on_error(variant.name, error)
    return samples


def paired_speedup(
    rounds: Sequence[Mapping[str, Sample]],
    name: str,
    other: str,
    time_of: Callable[[Sample], float] = attrgetter("seconds"),
) -> list[float]:
    """
    How much faster one variant is than another: the median over the rounds of the ratio within a round, because two
    times measured one after the other share the machine's momentary state.

    Args:
        rounds (`Sequence[Mapping[str, Sample]]`): What `time_round` returned, round by round.
        name (`str`): The variant.
        other (`str`): The variant to compare with.
        time_of (`Callable[[Sample], float]`, *optional*): Which of its times to compare; by default the seconds.

    Returns:
        `list[float]`: The median and, from five rounds on, the ends of its 95 % interval.

    Examples:

    ```python
    >>> from agentsd.utils.timing import Sample, paired_speedup
    >>> rounds = [{"a": Sample(4.0), "b": Sample(2.0)}, {"a": Sample(9.0), "b": Sample(3.0)}]
    >>> paired_speedup(rounds, "b", "a")
    [2.5]
    ```
    """
    return bootstrap_median([time_of(samples[other]) / time_of(samples[name]) for samples in rounds])


def summarize(rounds: Sequence[Mapping[str, Sample]], name: str) -> Summary:
    """
    Summarise one variant over all rounds.

    Args:
        rounds (`Sequence[Mapping[str, Sample]]`): What `time_round` returned, round by round.
        name (`str`): The variant.

    Returns:
        `Summary`: Median and quartiles.

    Raises:
        ValueError: If there is no round.

    Examples:

    ```python
    >>> from agentsd.utils.timing import Sample, summarize
    >>> summarize([{"a": Sample(4.0)}, {"a": Sample(9.0)}], "a").seconds
    6.5
    ```
    """
    if not rounds:
        raise ValueError("There is no finished round to summarise.")
    q1, median, q3 = _quartiles([samples[name].seconds for samples in rounds])
    steps = [samples[name].step_seconds for samples in rounds]
    known = [value for value in steps if value is not None]
    if not known:
        return Summary(len(rounds), median, q1, q3)
    step_q1, step_median, step_q3 = _quartiles(known)
    return Summary(len(rounds), median, q1, q3, step_median, step_q1, step_q3)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
