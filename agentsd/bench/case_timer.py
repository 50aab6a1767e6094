"""Times the cases of one model that share size and batch, in interleaved rounds that are kept one by one."""

import math
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ..utils.timing import Sample, Stopwatch, Variant, time_round
from .computed import can_call, is_computed
from .counter import Counter
from .launches import count_launches
from .memory import allocated_bytes, is_out_of_memory, peak_memory
from .methods import BASELINE, METHODS, FewerSteps, MethodUnavailable
from .rows import OUT_OF_MEMORY
from .settings import BenchSettings, Case
from .store import RunFolder
from .subjects import Subject, compiled_graphs, switch_on


_PROFILED_STEPS = 10  # few, as each launch is recorded, and in the shares of the schedule's phases
# Enough for both phases of agentsd, and for DeepCache to keep and read what it keeps.
_MEMORY_STEPS = 4


class CaseTimer:
    """
    The timed calls of one model, which is loaded when first needed.

    Args:
        subject (`Subject`): What is called.
        settings (`BenchSettings`): What is measured.
        folder (`RunFolder`): Keeps rounds, memory and launches as soon as they are known.
        counter (`Counter`): Told of each call.
        keep (`Callable[[Case, Mapping[str, Any]], None]`): Keeps the row of a case that cannot run.
    """

    def __init__(
        self,
        subject: Subject,
        settings: BenchSettings,
        folder: RunFolder,
        counter: Counter,
        keep: Callable[[Case, Mapping[str, Any]], None],
    ) -> None:
        self.subject, self.settings, self.folder, self.counter = subject, settings, folder, counter
        self._keep = keep
        self._model: Any = None
        self._model_bytes = 0
        self._twins: dict[str, Any] = {}

    @property
    def model(self) -> Any:
        """The model, unpatched."""
        if self._model is None:
            before = allocated_bytes(self.subject.device)
            self._model = self.subject.load()
            self._model_bytes = allocated_bytes(self.subject.device) - before
        return self._model

    def forget_model(self) -> None:
        """Let go of the model and its copies."""
        self._model, self._twins = None, {}

    def twin(self, case: Case) -> Any:
        """
        The copy on which this case's method is on, from beginning to end: one warm-up of each is enough.

        Args:
            case (`Case`): The case.

        Returns:
            `DiffusionPipeline` or `UNet2DConditionModel`: The same object each time.
        """
        if case.name not in self._twins:
            self._twins[case.name] = switch_on(self.subject, self.model, case, self.settings)
        return self._twins[case.name]

    def time(self, cases: list[Case]) -> None:
        """
        Time cases in interleaved rounds, and keep the rounds; a case that fails gets its row at once.

        Args:
            cases (`list[Case]`): All cases of one size and batch. What is on record is not timed again.
        """
        rounds = self.rounds(cases[0])
        if len(rounds) >= self.settings.repeats:
            return
        variants: list[Variant] = []

        def drop(name: str, error: Exception) -> None:
            self._keep(next(case for case in cases if case.name == name), {"reason": reason_of(error)})
            variants[:] = [variant for variant in variants if variant.name != name]
            # What did not fit must not stand in the way of the next one.
            self._twins.pop(name, None)
            traceback.clear_frames(error.__traceback__)
            if self.subject.device.type == "cuda":
                torch.cuda.empty_cache()

        for case in self._runnable(cases):
            try:
                self._check_memory(case)
                steps = self.steps(case)
                others = allocated_bytes(self.subject.device) - self._model_bytes  # what earlier methods keep
                variants.append(Variant(case.name, self.subject.call(self.twin(case), case, steps)))
                self._warm_up(variants[-1])
                self._profile(case, variants[-1], others)
            except Exception as error:
                drop(case.name, error)
        while variants and len(rounds) < self.settings.repeats:
            in_turn = variants[::-1] if len(rounds) % 2 else list(variants)
            samples = time_round(in_turn, self.subject.device, self.counter.step, drop)
            record = {name: asdict(sample) for name, sample in samples.items()}
            self.folder.rounds.append({"kind": "round", **group_of(cases[0]), "samples": record})
            rounds.append(samples)

    def _runnable(self, cases: list[Case]) -> list[Case]:
        """The cases that may be called; the others are computed or get a row that says why."""
        able = []
        for case in cases:
            if self.folder.cases.find(**asdict(case)):
                continue
            if can_call(case, self.settings):
                able.append(case)
            elif not is_computed(case, self.settings):
                self._keep(case, {"reason": "takes effect only over a generation's steps, and this is a single call"})
        return able

    def _warm_up(self, variant: Variant) -> None:
        done, graphs = 0, -1
        # DeepCache compiles one more graph in the second call.
        while done < self.settings.warmup or (self.settings.compile and graphs != compiled_graphs()):
            graphs = compiled_graphs()
            self.counter.step(variant.name)
            variant.call(Stopwatch(self.subject.device))
            done += 1

    def steps(self, case: Case) -> int:
        """
        How many denoising steps a case takes: for `fewer-steps`, what was measured to fit, and kept.

        Args:
            case (`Case`): The case.

        Returns:
            `int`: Steps.
        """
        method = METHODS[case.method]
        if not isinstance(method, FewerSteps):
            return self.settings.steps
        key = {"kind": "steps", **group_of(case), "name": case.name}
        with self.counter.charge(case.name):
            return self.folder.keep(self.folder.rounds, lambda: {"steps": self._fitting_steps(method, case)}, **key)[
                "steps"
            ]

    def _fitting_steps(self, method: FewerSteps, case: Case) -> int:
        """How many steps of the baseline take as long as all steps of another method."""
        pair = [replace(case, method=BASELINE, ratio=None), replace(case, method=method.reference)]
        variants = [Variant(one.name, self.subject.call(self.twin(one), one, self.settings.steps)) for one in pair]
        for variant in variants:
            self._warm_up(variant)
        baseline, other = variants
        rounds = []
        for _ in range(self.settings.repeats):
            rounds.append(time_round(variants, self.subject.device, self.counter.step))
            variants.reverse()
        shares = [
            (samples[other.name].step_seconds or 0) / (samples[baseline.name].step_seconds or 1) for samples in rounds
        ]
        fitting = math.floor(self.settings.steps * statistics.median(shares))
        return min(max(1, fitting), self.settings.steps)  # of fewer steps, or of all where the other is slower

    def _check_memory(self, case: Case) -> None:
        """Measure memory before anything else: a case that needs too much ends a process of its own, not this one."""
        if not self.settings.memory or self.subject.device.type != "cpu":
            return
        key = {"kind": "memory", **group_of(case), "name": case.name}
        if not self.folder.rounds.find(**key):
            self.counter.step(case.name, "(memory)")
            peak = peak_memory(self.subject.device, partial(_prepare, self.subject, case, self.settings))
            self.folder.rounds.append({**key, "peak_bytes": peak})

    def _profile(self, case: Case, variant: Variant, others: int) -> None:
        """On a GPU, memory of one call, less what other methods keep there, and kernel launches."""
        device = self.subject.device
        if device.type != "cuda":
            return
        if self.settings.memory:
            call = partial(variant.call, Stopwatch(device))
            key = {"kind": "memory", **group_of(case), "name": case.name}
            self.folder.keep(
                self.folder.rounds, lambda: {"peak_bytes": peak_memory(device, lambda: call, others)}, **key
            )
        key = {"kind": "launches", **group_of(case), "name": case.name}
        steps = _PROFILED_STEPS if self.settings.kind == "generation" else 1
        short = partial(self.subject.call(self.twin(case), case, steps), Stopwatch(device))
        self.folder.keep(self.folder.rounds, lambda: {"launches": count_launches(short) / steps}, **key)

    def rounds(self, case: Case) -> list[dict[str, Sample]]:
        """
        The finished rounds in which a case was, or will be, timed.

        Args:
            case (`Case`): The case.

        Returns:
            `list[dict[str, Sample]]`: Samples by the names of cases, round by round.
        """
        return [
            {name: Sample(**sample) for name, sample in record["samples"].items()}
            for record in self.folder.rounds.find(kind="round", **group_of(case))
        ]


def reason_of(error: Exception) -> str:
    """
    Why a case could not run, in a line.

    Args:
        error (`Exception`): What it raised.

    Returns:
        `str`: The reason.

    Examples:

    ```python
    >>> reason_of(MemoryError())
    'out of memory'
    ```
    """
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    message = " ".join(str(error).split())
    if isinstance(error, MethodUnavailable):
        return message
    return f"{type(error).__name__}: {message[:200]}"


def group_of(case: Case) -> dict[str, Any]:
    """
    What the cases that are timed together have in common.

    Args:
        case (`Case`): One of them.

    Returns:
        `dict[str, Any]`: Its model, height, width and batch.

    Examples:

    ```python
    >>> group_of(Case("emoji", "agentsd", 0.4, 256, 256, 1))
    {'model': 'emoji', 'height': 256, 'width': 256, 'batch': 1}
    ```
    """
    return {name: getattr(case, name) for name in ("model", "height", "width", "batch")}


def _prepare(subject: Subject, case: Case, settings: BenchSettings) -> Callable[[], object]:
    """One call of a case from nothing, for a process of its own."""
    model = switch_on(subject, subject.load(), case, settings)
    call = subject.call(model, case, min(settings.steps, _MEMORY_STEPS))
    return partial(call, Stopwatch(subject.device))
