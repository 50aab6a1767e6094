"""Runs the benchmark: times cases in interleaved rounds, judges their pictures, and keeps what is finished."""

import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import AgentSDConfig
from .allocator import keep_freed_memory
from .counter import Counter, Progress
from .environment import environment
from .features import PerceptualDistance, load_extractor
from .judge import PictureJudge
from .launches import count_launches
from .memory import allocated_bytes, is_out_of_memory, peak_memory
from .methods import BASELINE, METHODS, FewerSteps, MethodUnavailable
from .prompts import builtin_prompts
from .reference import check_reference
from .report import BenchResult, result_of
from .rows import OUT_OF_MEMORY
from .settings import BenchSettings, Case, picture_folder
from .store import BenchError, RunFolder
from .subjects import Subject, compiled_graphs, subject_of, switch_on
from .timing import Sample, Stopwatch, Variant, paired_speedup, summarize, time_round
from .workers import Workers


# One call has no schedule: there, the whole of agentsd is computed from the times of its two phases.
_COMPUTED, _PHASES = "agentsd", ("agentsd-agent", "agentsd-tome")
_PROFILED_STEPS = 10  # few, as each launch is recorded, and in the shares of the schedule's phases
# Enough for both phases of agentsd, and for DeepCache to keep and read what it keeps.
_MEMORY_STEPS = 4

_LATE = "left out"


def run_bench(
    settings: BenchSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """
    Run a benchmark.

    On a CPU, this process keeps the memory that it frees from then on: see [`keep_freed_memory`]. Memory is measured
    in processes of their own, which import the script that calls this: there, call it under `if __name__ ==
    "__main__":`.

    Args:
        settings (`BenchSettings`, *optional*): What to measure; by default the speed of the embedded model.
        out (`str` or `Path`, *optional*): Folder that gets everything as soon as it is known.
        resume (`bool`, defaults to `False`):
            Go on from what lies in `out`; finished rows are not measured again. What `budget_minutes` had no time for
            is tried again, and they may be others than before.
        progress (`Callable[[int, int, str], None]`, *optional*):
            Told before each call how many calls and pictures are done, how many there are, and what runs.

    Returns:
        `BenchResult`: A row for every case; one that could not run says why.

    Raises:
        BenchError: If `out` holds the results of another run, or no method can run.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings, run_bench
    >>> settings = BenchSettings(methods=("vanilla", "agentsd"), steps=2, repeats=1, memory=False)
    >>> [row.method for row in run_bench(settings).rows]
    ['vanilla', 'agentsd']
    ```
    """
    settings = settings or BenchSettings()
    workers = Workers(settings.device)
    if resume and out is None:
        raise BenchError("Resuming needs the folder of the run to resume.")
    if out is None and workers.count > 1:
        raise BenchError("Several processes need a folder that they share: name one with --out.")
    # Better now than after hours of drawing.
    if settings.lpips:
        PerceptualDistance()
    if settings.features is not None:
        load_extractor(settings.features)
    if settings.reference is not None:
        check_reference(settings.reference)
    prompts = settings.prompts or builtin_prompts()
    subjects = [
        subject_of(model, settings, prompts[0], settings.device or workers.device)
        for model in dict.fromkeys(settings.models)
    ]
    facts = environment(subjects[0].device, subjects[0].dtype)
    if subjects[0].device.type == "cpu" and keep_freed_memory():
        facts["malloc"] = "keeps freed memory"
    # The main process' facts, for each GPU has another name.
    facts = workers.agree(facts)
    with ExitStack() as stack:
        path = Path(out or stack.enter_context(tempfile.TemporaryDirectory()))
        # Only one process writes; the others read its folder once it is there.
        with workers.main_first():
            folder = RunFolder(path, settings.to_dict(), facts, resume=resume or not workers.is_main)
            _check_rows(folder, settings, facts)
            if workers.is_main:
                folder.cases.remove(_is_left_out)
        total = sum(sum(numbers) for cases in settings.groups() for numbers in _work(cases, settings).values())
        counter = Counter(progress if workers.is_main else None, total)
        started = time.monotonic()
        for subject, groups in zip(subjects, _by_model(settings), strict=True):
            bench = _ModelBench(subject, settings, folder, workers, counter, prompts)
            for cases in groups:
                is_late = (
                    settings.budget_minutes is not None and time.monotonic() - started > 60 * settings.budget_minutes
                )
                bench.run_group(cases, is_late=workers.agree(is_late))
        counter.finish()
        records = folder.cases.records
        failures = [record["reason"] for record in records if record.get("reason") and not _is_left_out(record)]
        if failures and all(record.get("reason") for record in records):
            raise BenchError(f"None of the methods can run here: {'; '.join(dict.fromkeys(failures))}.")
        return result_of(records, settings.to_dict(), facts)


def _check_rows(folder: RunFolder, settings: BenchSettings, facts: dict[str, Any]) -> None:
    """Better now than after hours of measuring."""
    try:
        result_of(folder.cases.records, settings.to_dict(), facts)
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(
            f"{folder.cases.path} has rows that no run with these settings wrote ({error}). Delete them to resume, or "
            "name another folder."
        ) from error


def _by_model(settings: BenchSettings) -> list[list[list[Case]]]:
    groups: dict[str, list[list[Case]]] = {}
    for cases in settings.groups():
        groups.setdefault(cases[0].model, []).append(cases)
    return list(groups.values())


class _ModelBench:
    """The measurements of one model, which is loaded when first needed."""

    def __init__(
        self,
        subject: Subject,
        settings: BenchSettings,
        folder: RunFolder,
        workers: Workers,
        counter: Counter,
        prompts: tuple[str, ...],
    ) -> None:
        self.subject, self.settings, self.folder = subject, settings, folder
        self.workers, self.counter = workers, counter
        self._model: Any = None
        self._model_bytes = 0
        self._twins: dict[str, Any] = {}
        self._judge = PictureJudge(subject, settings, folder.images, workers, prompts, self._tell_of_pictures)

    def run_group(self, cases: list[Case], is_late: bool) -> None:
        """Measure the cases of one size and batch, and keep a row for each."""
        if cases[0].height is None:
            height, width = self.subject.size(self.model)
            cases = [replace(case, height=height, width=width) for case in cases]
        prefix = f"{cases[0].model} {cases[0].width}×{cases[0].height} "
        work = _work(cases, self.settings)
        self.counter.begin(
            prefix,
            {case.name: sum(numbers) for case, numbers in work.items()},
            {case.name: self._left(case, *numbers) for case, numbers in work.items()},
        )
        missing = [case for case in cases if not self.folder.cases.find(**asdict(case))]
        if is_late:
            for case in missing:
                self._keep(case, {"reason": f"{_LATE}: the {self.settings.budget_minutes:g} minutes were spent"})
            return
        if missing and self.workers.is_main:
            self._time_group(cases)
        # The other processes have not seen the rows of what could not run.
        self.folder.cases.records = self.workers.agree(self.folder.cases.records)
        for case in cases:
            if not self.folder.cases.find(**asdict(case)):
                self._finish(case)

    def _left(self, case: Case, calls: int, pictures: int) -> int:
        """How many of these calls and pictures are not on record."""
        if self.folder.cases.find(**asdict(case)):
            return 0
        rounds = len(self._rounds(case))
        called = calls if rounds >= self.settings.repeats else min(rounds, calls)
        drawn = len(list((self.folder.images / picture_folder(case)).glob("*.png")))
        return calls - called + pictures - min(drawn, pictures)

    @property
    def model(self) -> Any:
        """The model, unpatched."""
        if self._model is None:
            before = allocated_bytes(self.subject.device)
            self._model = self.subject.load()
            self._model_bytes = allocated_bytes(self.subject.device) - before
        return self._model

    def _twin(self, case: Case) -> Any:
        """The copy on which this case's method is on, from beginning to end: one warm-up of each is enough."""
        if case.name not in self._twins:
            self._twins[case.name] = switch_on(self.subject, self.model, case, self.settings)
        return self._twins[case.name]

    # Timing

    def _time_group(self, cases: list[Case]) -> None:
        """Time the cases in interleaved rounds, and keep the rounds; a case that fails gets its row at once."""
        rounds = self._rounds(cases[0])
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
                steps = self._steps(case)
                others = allocated_bytes(self.subject.device) - self._model_bytes  # what earlier methods keep
                variants.append(Variant(case.name, self.subject.call(self._twin(case), case, steps)))
                self._warm_up(variants[-1])
                self._profile(case, variants[-1], others)
            except Exception as error:
                drop(case.name, error)
        while variants and len(rounds) < self.settings.repeats:
            in_turn = variants[::-1] if len(rounds) % 2 else list(variants)
            samples = time_round(in_turn, self.subject.device, self.counter.step, drop)
            record = {name: asdict(sample) for name, sample in samples.items()}
            self.folder.rounds.append({"kind": "round", **_group(cases[0]), "samples": record})
            rounds.append(samples)

    def _runnable(self, cases: list[Case]) -> list[Case]:
        """The cases that may be called; the others are computed or get a row that says why."""
        able = []
        for case in cases:
            if self.folder.cases.find(**asdict(case)):
                continue
            if _can_call(case, self.settings):
                able.append(case)
            elif not _is_computed(case, self.settings):
                self._keep(case, {"reason": "shows only over the steps of a generation, and this is a single call"})
        return able

    def _warm_up(self, variant: Variant) -> None:
        done, graphs = 0, -1
        # DeepCache compiles one more graph in the second call.
        while done < self.settings.warmup or (self.settings.compile and graphs != compiled_graphs()):
            graphs = compiled_graphs()
            self.counter.step(variant.name)
            variant.call(Stopwatch(self.subject.device))
            done += 1

    def _steps(self, case: Case) -> int:
        method = METHODS[case.method]
        if not isinstance(method, FewerSteps):
            return self.settings.steps
        key = {"kind": "steps", **_group(case), "name": case.name}
        with self.counter.charge(case.name):
            return self.folder.keep(self.folder.rounds, lambda: {"steps": self._fitting_steps(method, case)}, **key)[
                "steps"
            ]

    def _fitting_steps(self, method: FewerSteps, case: Case) -> int:
        """How many steps of vanilla take as long as all steps of another method."""
        pair = [replace(case, method=BASELINE, ratio=None), replace(case, method=method.reference)]
        variants = [Variant(one.name, self.subject.call(self._twin(one), one, self.settings.steps)) for one in pair]
        for variant in variants:
            self._warm_up(variant)
        vanilla, other = variants
        rounds = []
        for _ in range(self.settings.repeats):
            rounds.append(time_round(variants, self.subject.device, self.counter.step))
            variants.reverse()
        shares = [
            (samples[other.name].step_seconds or 0) / (samples[vanilla.name].step_seconds or 1) for samples in rounds
        ]
        fitting = math.floor(self.settings.steps * statistics.median(shares))
        return min(max(1, fitting), self.settings.steps)  # of fewer steps, or of all where the other is slower

    def _check_memory(self, case: Case) -> None:
        """Measure memory before anything else: a case that needs too much ends a process of its own, not this one."""
        if not self.settings.memory or self.subject.device.type != "cpu":
            return
        key = {"kind": "memory", **_group(case), "name": case.name}
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
            key = {"kind": "memory", **_group(case), "name": case.name}
            self.folder.keep(
                self.folder.rounds, lambda: {"peak_bytes": peak_memory(device, lambda: call, others)}, **key
            )
        key = {"kind": "launches", **_group(case), "name": case.name}
        steps = _PROFILED_STEPS if self.settings.kind == "generation" else 1
        short = partial(self.subject.call(self._twin(case), case, steps), Stopwatch(device))
        self.folder.keep(self.folder.rounds, lambda: {"launches": count_launches(short) / steps}, **key)

    # Rows

    def _finish(self, case: Case) -> None:
        """Keep the row of a case that could run."""
        row = self.workers.agree(self._numbers(case, self._rounds(case)) if self.workers.is_main else {})
        if self.settings.has_pictures and row.get("reason") is None:
            baseline = replace(case, method=BASELINE, ratio=None)
            try:
                row |= self._judge.judge(
                    case, baseline, row["steps"], partial(self._twin, case), partial(self._twin, baseline)
                )
            except Exception as error:
                # With several processes, the others wait for this one's pictures.
                if self.workers.count > 1 or not is_out_of_memory(error):
                    raise
                row = {"reason": reason_of(error)}
        self._keep(case, row)

    def _tell_of_pictures(self, name: str, count: int) -> None:
        self.counter.step(name, "pictures", count * self.workers.count)  # the others draw as many at the same time

    def _numbers(self, case: Case, rounds: list[dict[str, Sample]]) -> dict[str, Any]:
        is_computed = _is_computed(case, self.settings)
        if is_computed:
            if not rounds or not all(f"{phase} {case.ratio:g}" in rounds[-1] for phase in _PHASES):
                return {"reason": f"computed from {' and '.join(_PHASES)}, which did not both run"}
            rounds = [{**samples, case.name: _whole_schedule(samples, case, self.settings)} for samples in rounds]
        elif any(case.name not in samples for samples in rounds):
            raise BenchError(
                f"{self.folder.path} has no row of {case.name}, and its rounds were timed without it: rows were taken "
                "away. Start again in another folder."
            )
        summary = summarize(rounds, case.name)
        key = {**_group(case), "name": case.name}
        kept: dict[str, Any] = {}
        for kind, value in (("memory", "peak_bytes"), ("launches", "launches")):
            for record in self.folder.rounds.find(kind=kind, **key):
                kept[value] = record[value]
        steps = None if self.settings.kind == "call" else self._steps(case)
        others = {
            "of_vanilla": BASELINE,
            "of_tomesd": f"tomesd {case.ratio:g}" if case.ratio is not None else "",
            "of_free": "attention-free",
        }
        compared = {
            key: paired_speedup(rounds, case.name, other)
            for key, other in others.items()
            if case.method != BASELINE and other != case.name and other in rounds[-1]
        }
        if case.method == BASELINE:
            compared["of_vanilla"] = [1.0]
        return {**asdict(summary), **compared, **kept, "steps": steps, "is_computed": is_computed}

    def _rounds(self, case: Case) -> list[dict[str, Sample]]:
        return [
            {name: Sample(**sample) for name, sample in record["samples"].items()}
            for record in self.folder.rounds.find(kind="round", **_group(case))
        ]

    def _keep(self, case: Case, row: Mapping[str, Any]) -> None:
        record = {**asdict(case), **row}
        if self.workers.is_main:
            self.folder.cases.append(record)
        else:
            self.folder.cases.records.append(record)
        self.counter.end(case.name)


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


def _is_left_out(record: Mapping[str, Any]) -> bool:
    """Whether a row says that there was no time for its case: another run may have it."""
    return (record.get("reason") or "").startswith(_LATE)


def _group(case: Case) -> dict[str, Any]:
    """What the cases that are timed together have in common."""
    return {name: getattr(case, name) for name in ("model", "height", "width", "batch")}


def _prepare(subject: Subject, case: Case, settings: BenchSettings) -> Callable[[], object]:
    """One call of a case from nothing, for a process of its own."""
    model = switch_on(subject, subject.load(), case, settings)
    call = subject.call(model, case, min(settings.steps, _MEMORY_STEPS))
    return partial(call, Stopwatch(subject.device))


def _is_computed(case: Case, settings: BenchSettings) -> bool:
    """Whether the times of a case follow from those of the schedule's phases; one phase for all steps is called."""
    is_scheduled = AgentSDConfig.from_dict(settings.options).is_scheduled
    return settings.kind == "call" and case.method == _COMPUTED and is_scheduled


def _can_call(case: Case, settings: BenchSettings) -> bool:
    """Whether a case shows in what this suite calls."""
    if settings.kind == "generation" or not METHODS[case.method].needs_generation:
        return True
    return case.method == _COMPUTED and not _is_computed(case, settings)


def _whole_schedule(samples: Mapping[str, Sample], case: Case, settings: BenchSettings) -> Sample:
    """The time of the paper's schedule from the times of its two phases, weighted by their share of the steps."""
    share = AgentSDConfig.from_dict(settings.options).agent_until
    agent, tome = (samples[f"{phase} {case.ratio:g}"].seconds for phase in _PHASES)
    return Sample(share * agent + (1 - share) * tome)


def _work(cases: list[Case], settings: BenchSettings) -> dict[Case, tuple[int, int]]:
    """How many calls each case of a group takes, and how many pictures; those of vanilla are always needed."""
    pictures = settings.pictures if settings.has_pictures else 0
    work = {replace(cases[0], method=BASELINE, ratio=None): (0, pictures)}
    for case in cases:
        is_calibrated = isinstance(METHODS[case.method], FewerSteps)
        calibration = 2 * (settings.warmup + settings.repeats) if is_calibrated else 0
        calls = settings.memory + calibration + settings.warmup + settings.repeats
        work[case] = (calls, pictures) if _can_call(case, settings) else (0, 0)
    return work
