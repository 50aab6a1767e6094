"""Fair timing of several variants in one process: interleaved rounds, and ratios of the times within a round."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from .intervals import bootstrap_median, student_mean


# The fewest rounds that say how far apart rounds are.
FEWEST_ROUNDS = 3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Takes times: on CUDA as events in the device's queue, so that taking one waits for nothing; else by a clock."""

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
        """The time between each mark and the next."""
        synchronize(self.device)
        if self.device.type == "cuda":
            pairs = zip(self._events, self._events[1:], strict=False)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in zip(self._times, self._times[1:], strict=False)]


# What is timed. It may mark the end of every step.
Call = Callable[[Stopwatch], object]


@dataclass(frozen=True)
class Variant:
    """Something to time, under a name of its own."""

    name: str
    call: Call


@dataclass(frozen=True)
class Sample:
    """One timed call: all of it, and from its beginning to the end of its last step, divided by the steps."""

    seconds: float
    step_seconds: float | None = None


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of a variant's samples, and of their steps if they had any."""

    rounds: int
    seconds: float
    q1: float
    q3: float
    step_seconds: float | None = None
    step_q1: float | None = None
    step_q3: float | None = None


def time_call(call: Call, device: torch.device) -> Sample:
    """Time one call."""
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
    """Time every variant once, in turn; `on_call` hears of each before, `on_error` of errors instead of the caller."""
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


def time_rounds(
    variants: Sequence[Variant],
    device: torch.device,
    seconds: float,
    is_clear: Callable[[], bool],
    on_call: Callable[[str], None] | None = None,
) -> list[dict[str, Sample]]:
    """Time variants that are warm in rounds A B, B A, A B, … until `is_clear()`, or `seconds` have gone into it."""
    # In alternating order a slow drift of the machine (heat, a neighbour's load) meets all variants alike, and so does
    # what the one before left behind in caches and memory.
    rounds: list[dict[str, Sample]] = []
    start = time.perf_counter()
    while True:
        rounds.append(time_round(variants[::-1] if len(rounds) % 2 else variants, device, on_call))
        spent = time.perf_counter() - start
        if len(rounds) == 1 and spent > seconds:
            return rounds
        if len(rounds) >= FEWEST_ROUNDS and (spent >= seconds or (_is_look(len(rounds)) and is_clear())):
            return rounds


def _looks(rounds: int) -> int:
    """How often the result was looked at: after 3, 6, 12, … rounds, and after the last one."""
    return 1 + max(0, math.ceil(math.log2(rounds / FEWEST_ROUNDS)))


def _is_look(rounds: int) -> bool:
    return rounds == FEWEST_ROUNDS * 2 ** (_looks(rounds) - 1)


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster something is, with a 95% interval from three rounds on."""

    value: float
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> "SpeedUp":
        """The geometric mean over rounds of the ratio of two times, paired as they share the machine's state."""
        logs = [math.log(slow / fast) for slow, fast in zip(before, after, strict=True)]
        # Fewer rounds than three are only ever one.
        value, *ends = student_mean(logs, _looks(len(logs))) if len(logs) >= FEWEST_ROUNDS else logs[:1]
        return cls(math.exp(value), (math.exp(ends[0]), math.exp(ends[1])) if ends else None)

    @property
    def is_difference(self) -> bool | None:
        """Whether it is faster or slower beyond doubt; `None` if it was timed once."""
        return None if self.interval is None else not self.interval[0] <= 1 <= self.interval[1]

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.2f}×, timed once"
        text = "{:.2f}× ({:.2f}–{:.2f})".format(self.value, *self.interval)
        return text if self.is_difference else f"{text}, no difference measured"


def paired_speedup(
    rounds: Sequence[Mapping[str, Sample]],
    name: str,
    other: str,
    time_of: Callable[[Sample], float] = attrgetter("seconds"),
) -> list[float]:
    """The median over rounds of how many times faster a variant is than another, and from five on its 95% interval."""
    return bootstrap_median([time_of(samples[other]) / time_of(samples[name]) for samples in rounds])


def summarize(rounds: Sequence[Mapping[str, Sample]], name: str) -> Summary:
    """Median and quartiles of one variant over all rounds."""
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
