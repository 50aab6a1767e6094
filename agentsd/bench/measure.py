"""Times the cases of one model that share size and batch, in interleaved rounds that are kept one by one."""

import math
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch._inductor import list_mode_options
from torch.profiler import ProfilerActivity, profile

from ..utils.timing import Sample, Stopwatch, Variant, paired_speedup, summarize, time_round
from .memory import allocated_bytes, is_out_of_memory, peak_memory
from .methods import BASELINE, FewerSteps, agent_share, find_method
from .models import Subject, all_variants, compiled_graphs, switch_on
from .peers import MethodUnavailable
from .rows import OUT_OF_MEMORY, Case, named
from .schedule import CALL_STEPS
from .settings import BenchSettings
from .store import BenchError, RunFolder


# Single calls follow no schedule: there, the whole of agentsd is computed from the times of its two phases.
_COMPUTED, _PHASES = "agentsd", ("agentsd-agent", "agentsd-tome")
_PROFILED_STEPS = 10  # few, as each launch is recorded, and in the shares of the schedule's phases
# How CUDA's profiler calls a launch; a whole CUDA graph is one.
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch")
# Enough for DeepCache and feature reuse to keep and read what they keep: memory is measured, and calls are warmed up,
# over no more steps.
_SHORT_RUN = 4


class CaseTimer:
    """
    The timed calls of one model, which is loaded when first needed.

    `on_call` gets the name of a case, and what is done for it, before each call; `on_failure` a case that cannot run,
    and why.
    """

    def __init__(
        self,
        subject: Subject,
        settings: BenchSettings,
        folder: RunFolder,
        on_call: Callable[[str, str], None],
        on_failure: Callable[[Case, str], None],
    ) -> None:
        self.subject, self.settings, self.folder = subject, settings, folder
        self.on_call, self.on_failure = on_call, on_failure
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
        """Let go of the model and its copies: the next one needs the memory."""
        self._model, self._twins = None, {}

    def twin(self, case: Case) -> Any:
        """The copy on which this case's method is on, the same one each time: one warm-up of each is enough."""
        if case.name not in self._twins:
            self._twins[case.name] = switch_on(
                self.subject, self.model, case, self.settings.options, self.settings.compile
            )
        return self._twins[case.name]

    def time(self, cases: list[Case]) -> None:
        """Time all cases of one size and batch in interleaved rounds; what is on record is not timed again."""
        rounds = self.rounds(cases[0])
        if len(rounds) >= self.settings.repeats:
            return
        variants: list[Variant] = []
        _ = self.model  # what is wrong with it is wrong for all cases, of which each would fail by itself

        def drop(name: str, error: Exception) -> None:
            self.on_failure(next(case for case in cases if case.name == name), reason_of(error))
            variants[:] = [variant for variant in variants if variant.name != name]
            # What did not fit must not stand in the way of the next one.
            self._twins.pop(name, None)
            traceback.clear_frames(error.__traceback__)
            if self.subject.device.type == "cuda":
                torch.cuda.empty_cache()

        for case in self._runnable(cases):
            try:
                self._measure_memory(case)
                steps = self.steps(case)
                others = allocated_bytes(self.subject.device) - self._model_bytes  # what earlier methods keep
                variants.append(Variant(case.name, self.subject.call(self.twin(case), case, steps)))
                short = self.subject.call(self.twin(case), case, self._warm_up_steps(steps))
                self._warm_up(Variant(case.name, short), partial(self.on_call, case.name, ""))
                self._profile(case, variants[-1], others)
            except Exception as error:
                drop(case.name, error)
        while variants and len(rounds) < self.settings.repeats:
            in_turn = variants[::-1] if len(rounds) % 2 else list(variants)
            samples = time_round(in_turn, self.subject.device, lambda name: self.on_call(name, ""), drop)
            if self.settings.kind == "call":
                calls = {case.name: self.steps(case) for case in cases}
                samples = {name: Sample(sample.seconds / calls[name]) for name, sample in samples.items()}
            record = {name: asdict(sample) for name, sample in samples.items()}
            self.folder.rounds.append({"kind": "round", **_group(cases[0]), "samples": record})
            rounds.append(samples)

    def rounds(self, case: Case) -> list[dict[str, Sample]]:
        """The finished rounds in which a case was, or will be, timed: samples by the names of cases."""
        return [
            {name: Sample(**sample) for name, sample in record["samples"].items()}
            for record in self.folder.rounds.find(kind="round", **_group(case))
        ]

    def steps(self, case: Case) -> int:
        """How many steps are timed at once: for `fewer-steps`, what was measured to fit, and kept."""
        if self.settings.kind == "call":
            return call_steps(case, self.settings)
        method = find_method(case.method)
        if not isinstance(method, FewerSteps):
            return self.settings.steps
        if method.share is not None:
            return max(1, round(self.settings.steps * method.share))
        record = self.folder.rounds.keep(lambda: {"steps": self._fitting_steps(method, case)}, **_key("steps", case))
        return record["steps"]

    def numbers(self, case: Case) -> dict[str, Any]:
        """What was measured of a case, as the fields of its row, or under `"reason"` why there is nothing."""
        rounds = self.rounds(case)
        computed = is_computed(case, self.settings)
        if computed:
            if not rounds or not all(named(phase, case.ratio) in rounds[-1] for phase in _PHASES):
                return {"reason": f"computed from {' and '.join(_PHASES)}, which did not both run"}
            rounds = [{**samples, case.name: whole_schedule(samples, case, self.settings)} for samples in rounds]
        elif any(case.name not in samples for samples in rounds):
            raise BenchError(
                f"{self.folder.path} has no row of {case.name}, and its rounds were timed without it: rows have been "
                "deleted. Start again in another folder."
            )
        if not rounds:  # none was asked for
            return {"steps": self.steps(case)}
        numbers = asdict(summarize(rounds, case.name))
        for kind, value in (("memory", "peak_bytes"), ("launches", "launches")):
            for record in self.folder.rounds.find(**_key(kind, case)):
                numbers[value] = record[value]
        is_call = self.settings.kind == "call"
        steps = None if is_call and self.steps(case) == 1 else self.steps(case)
        return {**numbers, **_compared(case, rounds, not is_call), "steps": steps, "is_computed": computed}

    def _runnable(self, cases: list[Case]) -> list[Case]:
        """The cases that may be called; the others are computed or get a row that says why."""
        able = []
        for case in cases:
            if self.folder.cases.find(**asdict(case)):
                continue
            if can_call(case, self.settings):
                able.append(case)
            elif not is_computed(case, self.settings):
                self.on_failure(case, "takes effect only in a generation, and this calls a UNet alone")
        return able

    def _warm_up_steps(self, steps: int) -> int:
        """How many of these steps a warm-up takes: all where something is compiled for each phase, or drawn."""
        is_short = self.settings.kind == "call" and not self.settings.compile
        return min(steps, _SHORT_RUN) if is_short else steps

    def _warm_up(self, variant: Variant, on_call: Callable[[], None]) -> None:
        done, graphs = 0, -1
        # DeepCache compiles one more graph in the second call.
        while done < self.settings.warmup or (self.settings.compile and graphs != compiled_graphs()):
            graphs = compiled_graphs()
            on_call()
            variant.call(Stopwatch(self.subject.device))
            done += 1

    def _fitting_steps(self, method: FewerSteps, case: Case) -> int:
        """How many steps of the baseline take as long as all steps of another method."""
        pair = [replace(case, method=BASELINE, ratio=None), replace(case, method=method.reference)]
        variants = [Variant(one.name, self.subject.call(self.twin(one), one, self.settings.steps)) for one in pair]

        def on_call(name: str) -> None:
            self.on_call(case.name, f"({name})")

        for variant in variants:
            self._warm_up(variant, partial(on_call, variant.name))
        baseline, other = variants
        rounds = []
        for _ in range(self.settings.repeats):
            rounds.append(time_round(variants, self.subject.device, on_call))
            variants.reverse()
        shares = [
            (samples[other.name].step_seconds or 0) / (samples[baseline.name].step_seconds or 1) for samples in rounds
        ]
        fitting = math.floor(self.settings.steps * statistics.median(shares))
        return min(max(1, fitting), self.settings.steps)  # of fewer steps, or of all where the other is slower

    def _measure_memory(self, case: Case) -> None:
        """On a CPU, before anything else: a case that needs too much ends a process of its own, not this one."""
        if not self.settings.memory or self.subject.device.type != "cpu":
            return

        def measure() -> dict[str, Any]:
            self.on_call(case.name, "(memory)")
            return {
                "peak_bytes": peak_memory(self.subject.device, partial(_prepare, self.subject, case, self.settings))
            }

        self.folder.rounds.keep(measure, **_key("memory", case))

    def _profile(self, case: Case, variant: Variant, others: int) -> None:
        """On a GPU, kernel launches and, but of CUDA graphs, memory of one call, less what other methods keep."""
        device = self.subject.device
        if device.type != "cuda":
            return
        if self.settings.memory and not _has_cuda_graphs(self.settings.compile):
            call = partial(variant.call, Stopwatch(device))
            self.folder.rounds.keep(
                lambda: {"peak_bytes": peak_memory(device, lambda: call, others)}, **_key("memory", case)
            )
        steps = _PROFILED_STEPS if self.settings.kind == "generation" else self.steps(case)
        short = partial(self.subject.call(self.twin(case), case, steps), Stopwatch(device))
        self.folder.rounds.keep(lambda: {"launches": count_launches(short) / steps}, **_key("launches", case))


def _has_cuda_graphs(compile: bool | str) -> bool:
    """Whether models run as CUDA graphs: once recorded, these allocate nothing that could be counted."""
    return isinstance(compile, str) and bool(list_mode_options(compile).get("triton.cudagraphs"))


def is_computed(case: Case, settings: BenchSettings) -> bool:
    """Whether times follow from those of the schedule's phases: of `agentsd` where single calls are measured."""
    is_phases = agent_share(settings.options) is not None and not _keep_something(settings)
    return settings.kind == "call" and case.method == _COMPUTED and is_phases


def can_call(case: Case, settings: BenchSettings) -> bool:
    """Whether a case shows in what its suite calls; some methods do only in a generation."""
    if settings.kind == "generation":
        return True
    return not find_method(case.method).needs_generation and not is_computed(case, settings)


def call_steps(case: Case, settings: BenchSettings) -> int:
    """How many calls of a UNet are timed at once: those of a whole run, for what shows only over several of them."""
    if is_computed(case, settings):
        return 1
    return CALL_STEPS if find_method(case.method).needs_steps or _keep_something(settings) else 1


def _keep_something(settings: BenchSettings) -> bool:
    """Whether by the options something is kept from step to step, which shows only over several."""
    return any(settings.options.get(name) for name in ("reuse", "match_interval"))


def whole_schedule(samples: Mapping[str, Sample], case: Case, settings: BenchSettings) -> Sample:
    """
    The time of the paper's schedule in one round: those of its two phases, weighted by their share of the steps.

    Examples:

    ```python
    >>> samples = {"agentsd-agent 0.4": Sample(1.0), "agentsd-tome 0.4": Sample(2.0)}
    >>> whole_schedule(samples, Case("sd15", "agentsd", 0.4, 512, 512, 1), BenchSettings.of_suite("cpu")).seconds
    1.6
    ```
    """
    share = agent_share(settings.options)
    assert share is not None
    agent, tome = (samples[named(phase, case.ratio)].seconds for phase in _PHASES)
    return Sample(share * agent + (1 - share) * tome)


def reason_of(error: Exception) -> str:
    """Why a case could not run, in a line."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    message = " ".join(str(error).split())
    if isinstance(error, MethodUnavailable):
        return message
    return f"{type(error).__name__}: {message[:200]}"


def count_launches(call: Callable[[], object]) -> int:
    """How many kernels a call launches on a GPU: small kernels cost more in launching than in running."""
    # What runs on the CPU itself is far more, and takes minutes to go through.
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(_LAUNCHES))


def _compared(case: Case, rounds: list[dict[str, Sample]], has_steps: bool) -> dict[str, list[float]]:
    """How a case compares with the references that were timed in the same rounds."""
    if case.method == BASELINE:
        return {"of_baseline": [1.0], **({"step_of_baseline": [1.0]} if has_steps else {})}
    others = {"of_baseline": BASELINE, "of_tomesd": named("tomesd", case.ratio), "of_free": "attention-free"}
    compared = {
        name: paired_speedup(rounds, case.name, other)
        for name, other in others.items()
        if other != case.name and other in rounds[-1]
    }
    if has_steps and "of_baseline" in compared:
        compared["step_of_baseline"] = paired_speedup(rounds, case.name, BASELINE, attrgetter("step_seconds"))
    return compared


def _group(case: Case) -> dict[str, Any]:
    """What the cases that are timed together have in common."""
    return {"model": case.model, "height": case.height, "width": case.width, "batch": case.batch}


def _key(kind: str, case: Case) -> dict[str, Any]:
    """What identifies a record of a case beside its rounds."""
    return {"kind": kind, **_group(case), "name": case.name}


def _prepare(subject: Subject, case: Case, settings: BenchSettings) -> Callable[[], object]:
    """One call of a case from nothing, for a process of its own."""
    model = switch_on(subject, subject.load(), case, settings.options, settings.compile)
    steps = call_steps(case, settings) if settings.kind == "call" else min(settings.steps, _SHORT_RUN)
    return all_variants()(partial(subject.call(model, case, steps), Stopwatch(subject.device)))
