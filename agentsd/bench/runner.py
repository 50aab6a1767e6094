"""Runs the benchmark: times cases in interleaved rounds, judges their images, and keeps what is finished."""

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..utils.environment import environment
from ..utils.memory import keep_freed_memory
from ..utils.timing import Sample, paired_speedup, summarize
from .case_timer import CaseTimer, group_of, reason_of
from .computed import PHASES, can_call, is_computed, whole_schedule
from .counter import Counter, Progress
from .features import load_extractor
from .judge import ImageJudge
from .lpips import PerceptualDistance
from .memory import is_out_of_memory
from .methods import BASELINE, METHODS, FewerSteps
from .prompts import builtin_prompts
from .reference import check_reference
from .report import BenchResult, result_of
from .rows import named
from .settings import BenchSettings, Case, image_folder, short_name
from .store import BenchError, RunFolder
from .subjects import Subject, subject_of
from .workers import Workers


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
    in separate processes, which import the script that calls this function: in a script, call it under
    `if __name__ == "__main__":`.

    Args:
        settings (`BenchSettings`, *optional*): What to measure; by default the speed of the embedded model.
        out (`str` or `Path`, *optional*): Folder to which every result is written as soon as it is known.
        resume (`bool`, defaults to `False`):
            Continue from the results in `out`; finished rows are not measured again. What `budget_minutes` left out is
            tried again, and `budget_minutes` may differ from before.
        progress (`Callable[[int, int, str], None]`, *optional*):
            Called before each call with how many calls and images are done, how many there are, and what runs next.

    Returns:
        `BenchResult`: A row for every case; one that could not run says why.

    Raises:
        BenchError: If `out` holds the results of another run, or no method can run.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings, run_bench
    >>> settings = BenchSettings(methods=("baseline", "agentsd"), steps=2, repeats=1, memory=False)
    >>> [row.method for row in run_bench(settings).rows]
    ['baseline', 'agentsd']
    ```
    """
    settings = settings or BenchSettings()
    workers = Workers(settings.device)
    if resume and out is None:
        raise BenchError("Resuming needs the folder of the run to resume.")
    if out is None and workers.count > 1:
        raise BenchError("Several processes need a folder that they share: name one with --out.")
    _check_metrics(settings)
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
            bench.forget_model()
        counter.finish()
        records = folder.cases.records
        failures = [record["reason"] for record in records if record.get("reason") and not _is_left_out(record)]
        if failures and all(record.get("reason") for record in records):
            raise BenchError(f"None of the methods can run here: {'; '.join(dict.fromkeys(failures))}.")
        return result_of(records, settings.to_dict(), facts)


def _check_metrics(settings: BenchSettings) -> None:
    """Better now than after hours of drawing."""
    if settings.lpips:
        PerceptualDistance()
    if settings.features is not None:
        extractor = load_extractor(settings.features)
        if settings.reference is not None:
            check_reference(settings.reference, extractor)


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
        self._timer = CaseTimer(subject, settings, folder, counter, self._keep)
        self._judge = ImageJudge(subject, settings, folder.images, workers, prompts, self._tell_of_images)

    def forget_model(self) -> None:
        """Let go of the model and its copies: the next one needs the memory."""
        self._timer.forget_model()

    def run_group(self, cases: list[Case], is_late: bool) -> None:
        """Measure the cases of one size and batch, and keep a row for each."""
        if cases[0].height is None:
            height, width = self.subject.size(self._timer.model)
            cases = [replace(case, height=height, width=width) for case in cases]
        prefix = f"{short_name(cases[0].model)} {cases[0].width}×{cases[0].height} "
        work = _work(cases, self.settings)
        self.counter.begin(
            prefix,
            {case.name: sum(numbers) for case, numbers in work.items()},
            {case.name: self._left(case, *numbers) for case, numbers in work.items()},
        )
        missing = [case for case in cases if not self.folder.cases.find(**asdict(case))]
        if is_late:
            for case in missing:
                self._keep(case, {"reason": f"{_LATE}: the {self.settings.budget_minutes:g} minutes were used up"})
            return
        if missing and self.workers.is_main:
            self._timer.time(cases)
        # The other processes have not seen the rows of what could not run.
        self.folder.cases.records = self.workers.agree(self.folder.cases.records)
        for case in cases:
            if not self.folder.cases.find(**asdict(case)):
                self._finish(case)

    def _left(self, case: Case, calls: int, images: int) -> int:
        """How many of these calls and images are not on record."""
        if self.folder.cases.find(**asdict(case)):
            return 0
        rounds = len(self._timer.rounds(case))
        called = calls if rounds >= self.settings.repeats else min(rounds, calls)
        drawn = len(list((self.folder.images / image_folder(case)).glob("*.png")))
        return calls - called + images - min(drawn, images)

    # Rows

    def _finish(self, case: Case) -> None:
        """Keep the row of a case that could run."""
        row = self.workers.agree(self._numbers(case, self._timer.rounds(case)) if self.workers.is_main else {})
        if self.settings.has_images and row.get("reason") is None:
            baseline = replace(case, method=BASELINE, ratio=None)
            try:
                row |= self._judge.judge(
                    case, baseline, row["steps"], partial(self._timer.twin, case), partial(self._timer.twin, baseline)
                )
            except Exception as error:
                # With several processes, the others wait for this one's images.
                if self.workers.count > 1 or not is_out_of_memory(error):
                    raise
                row = {"reason": reason_of(error)}
        self._keep(case, row)

    def _tell_of_images(self, name: str, count: int) -> None:
        self.counter.step(name, "images", count * self.workers.count)  # the others draw as many at the same time

    def _numbers(self, case: Case, rounds: list[dict[str, Sample]]) -> dict[str, Any]:
        computed = is_computed(case, self.settings)
        if computed:
            if not rounds or not all(named(phase, case.ratio) in rounds[-1] for phase in PHASES):
                return {"reason": f"computed from {' and '.join(PHASES)}, which did not both run"}
            rounds = [{**samples, case.name: whole_schedule(samples, case, self.settings)} for samples in rounds]
        elif any(case.name not in samples for samples in rounds):
            raise BenchError(
                f"{self.folder.path} has no row of {case.name}, and its rounds were timed without it: rows have been "
                "deleted. Start again in another folder."
            )
        summary = summarize(rounds, case.name)
        key = {**group_of(case), "name": case.name}
        kept: dict[str, Any] = {}
        for kind, value in (("memory", "peak_bytes"), ("launches", "launches")):
            for record in self.folder.rounds.find(kind=kind, **key):
                kept[value] = record[value]
        steps = None if self.settings.kind == "call" else self._timer.steps(case)
        others = {
            "of_baseline": BASELINE,
            "of_tomesd": named("tomesd", case.ratio),
            "of_free": "attention-free",
        }
        compared = {
            key: paired_speedup(rounds, case.name, other)
            for key, other in others.items()
            if case.method != BASELINE and other != case.name and other in rounds[-1]
        }
        if "of_baseline" in compared and steps is not None:
            compared["step_of_baseline"] = paired_speedup(rounds, case.name, BASELINE, attrgetter("step_seconds"))
        if case.method == BASELINE:
            compared["of_baseline"] = [1.0]
            compared |= {"step_of_baseline": [1.0]} if steps is not None else {}
        return {**asdict(summary), **compared, **kept, "steps": steps, "is_computed": computed}

    def _keep(self, case: Case, row: Mapping[str, Any]) -> None:
        record = {**asdict(case), **row}
        if self.workers.is_main:
            self.folder.cases.append(record)
        else:
            self.folder.cases.records.append(record)
        self.counter.end(case.name)


def _is_left_out(record: Mapping[str, Any]) -> bool:
    """Whether a row says that there was no time for its case: another run may have it."""
    return (record.get("reason") or "").startswith(_LATE)


def _work(cases: list[Case], settings: BenchSettings) -> dict[Case, tuple[int, int]]:
    """How many calls each case of a group takes, and how many images; those of the baseline are always needed."""
    images = settings.images if settings.has_images else 0
    work = {replace(cases[0], method=BASELINE, ratio=None): (0, images)}
    for case in cases:
        is_calibrated = isinstance(METHODS[case.method], FewerSteps)
        calibration = 2 * (settings.warmup + settings.repeats) if is_calibrated else 0
        calls = settings.memory + calibration + settings.warmup + settings.repeats
        work[case] = (calls, images) if can_call(case, settings) else (0, 0)
    return work
