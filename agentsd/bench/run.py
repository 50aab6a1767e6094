"""Runs the benchmark: times cases in interleaved rounds, judges their images, and keeps what is finished."""

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..utils.environment import environment
from ..utils.loading import pick_device, pick_dtype
from ..utils.memory import keep_freed_memory
from ..utils.progress import Progress
from ..utils.user_warnings import user_warnings
from .earlier_images import EarlierImages
from .images import ImageJudge, builtin_prompts, check_metrics
from .measure import CaseTimer, can_call, reason_of
from .memory import is_out_of_memory
from .methods import BASELINE, is_calibrated
from .models import PipelineSubject, Subject, UNetSubject, all_variants
from .peers import MethodUnavailable
from .report import BenchResult, result_of
from .rows import Case, image_folder, short_name
from .settings import BenchSettings
from .store import BenchError, RunFolder
from .workers import Workers


_LATE = "left out"
_MOST_WARNINGS = 5


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
        progress (`Callable[[str, int, int], None]`, *optional*):
            Called before each call with what runs next, how many calls and images are done, and how many there are.

    Returns:
        `BenchResult`: A row for every case; one that could not run says why.

    Raises:
        BenchError: If `out` holds the results of another run, or no method can run.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings, run_bench
    >>> methods, sizes = ("baseline", "agentsd"), ((256, 256),)
    >>> settings = BenchSettings(methods=methods, sizes=sizes, steps=2, repeats=1, memory=False)
    >>> [row.method for row in run_bench(settings).rows]
    ['baseline', 'agentsd']
    ```
    """
    with user_warnings() as said:
        result = _run(settings or BenchSettings(), out, resume, progress)
    # A long list of prompts may have many that are too long.
    more = [f"{len(said) - _MOST_WARNINGS} more warnings of this kind were left out."] if said[_MOST_WARNINGS:] else []
    return replace(result, warnings=[*said[:_MOST_WARNINGS], *more])


def _run(settings: BenchSettings, out: str | Path | None, resume: bool, progress: Progress | None) -> BenchResult:
    workers = Workers(settings.device)
    if resume and out is None:
        raise BenchError("Resuming needs the folder of the run to resume.")
    if out is None and workers.count > 1:
        raise BenchError("Several processes need a folder that they share: name one with --out.")
    if settings.images_of is None:
        check_metrics(settings)
    prompts = settings.prompts or builtin_prompts()
    subjects = [
        subject_of(model, settings, prompts[0], settings.device or workers.device)
        for model in dict.fromkeys(settings.models)
    ]
    facts = environment(subjects[0].device, subjects[0].dtype)
    if subjects[0].device.type == "cpu" and keep_freed_memory():
        facts["malloc"] = "keeps freed memory"
    earlier = None
    if settings.images_of is not None:
        earlier = EarlierImages(settings.images_of, settings, facts)
        facts["images"] = earlier.machine
    # The main process' facts, for each GPU has another name.
    facts = workers.agree(facts)
    with ExitStack() as stack:
        stack.enter_context(all_variants())
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
            bench = _ModelBench(subject, settings, folder, workers, counter, prompts, earlier)
            for cases in groups:
                is_late = (
                    settings.budget_minutes is not None and time.monotonic() - started > 60 * settings.budget_minutes
                )
                bench.run_group(cases, is_late=workers.agree(is_late))
            bench.timer.forget_model()
        counter.finish()
        records = folder.cases.records
        failures = [record["reason"] for record in records if record.get("reason") and not _is_left_out(record)]
        if failures and all(record.get("reason") for record in records):
            raise BenchError(f"None of the methods can run here: {'; '.join(dict.fromkeys(failures))}.")
        return result_of(records, settings.to_dict(), facts)


def subject_of(model: str, settings: BenchSettings, prompt: str, device: str | None) -> Subject:
    """What a suite measures of a model: a generation of the prompt, or a call. Nothing is loaded yet."""
    where = pick_device(device)
    dtype = pick_dtype(settings.dtype, where)
    if settings.kind == "call":
        return UNetSubject(model, settings.seed, where, dtype)
    return PipelineSubject(model, prompt, settings.guidance_scale, settings.scheduler, settings.seed, where, dtype)


class _ModelBench:
    """The measurements of one model."""

    def __init__(
        self,
        subject: Subject,
        settings: BenchSettings,
        folder: RunFolder,
        workers: Workers,
        counter: "Counter",
        prompts: tuple[str, ...],
        earlier: EarlierImages | None,
    ) -> None:
        self.subject, self.settings, self.folder = subject, settings, folder
        self.workers, self.counter, self.earlier = workers, counter, earlier
        self.timer = CaseTimer(
            subject, settings, folder, counter.step, lambda case, reason: self._keep(case, {"reason": reason})
        )
        self.judge = ImageJudge(subject, settings, folder.images, workers, prompts, self._count_images)

    def run_group(self, cases: list[Case], is_late: bool) -> None:
        """Measure the cases of one size and batch, and keep a row for each."""
        if cases[0].height is None:
            height, width = self.subject.size(self.timer.model)
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
            self.timer.time(cases)
        # The other processes have not seen the rows of what could not run.
        self.folder.cases.records = self.workers.agree(self.folder.cases.records)
        for case in cases:
            if not self.folder.cases.find(**asdict(case)):
                self._finish(case)

    def _left(self, case: Case, calls: int, images: int) -> int:
        """How many of these calls and images are not on record."""
        if self.folder.cases.find(**asdict(case)):
            return 0
        rounds = len(self.timer.rounds(case))
        called = calls if rounds >= self.settings.repeats else min(rounds, calls)
        drawn = len(list((self.folder.images / image_folder(case)).glob("*.png")))
        return calls - called + images - min(drawn, images)

    def _finish(self, case: Case) -> None:
        """Keep the row of a case that could run."""
        numbers = self.workers.agree(self.timer.numbers(case) if self.workers.is_main else {})
        if self.earlier is not None and numbers.get("reason") is None:
            numbers |= self.earlier.numbers(case)
        elif self.settings.has_images and numbers.get("reason") is None:
            baseline = replace(case, method=BASELINE, ratio=None)
            models = partial(self.timer.twin, case), partial(self.timer.twin, baseline)
            try:
                numbers |= self.judge.judge(case, baseline, numbers["steps"], *models)
            except Exception as error:
                # Compiled code may refuse what a method does: DeepCache keeps what CUDA graphs write over.
                is_its_own = self.settings.compile or is_out_of_memory(error) or isinstance(error, MethodUnavailable)
                # With several processes, the others wait for this one's images.
                if self.workers.count > 1 or not is_its_own:
                    raise
                numbers = {"reason": reason_of(error)}
        self._keep(case, numbers)

    def _count_images(self, name: str, count: int) -> None:
        self.counter.step(name, "images", count * self.workers.count)  # the others draw as many at the same time

    def _keep(self, case: Case, numbers: Mapping[str, Any]) -> None:
        record = {**asdict(case), **numbers}
        if self.workers.is_main:
            self.folder.cases.append(record)
        else:
            self.folder.cases.records.append(record)
        self.counter.end(case.name)


class Counter:
    """
    Counts the calls and images of a run, in groups of cases that each have a name.

    A case that has ended counts as a whole, whatever it left out, so that what cannot run does not spoil the estimate
    of the time that is left.

    Examples:

    ```python
    >>> counter = Counter(print, total=3)
    >>> counter.begin("64×64 ", {"baseline": 1, "agentsd": 2}, left={"baseline": 0, "agentsd": 2})
    >>> counter.step("agentsd")
    64×64 agentsd 1 3
    >>> counter.end("agentsd")
    >>> counter.finish()
    done 3 3
    ```
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self._prefix = ""
        self._left: dict[str, int] = {}

    def begin(self, prefix: str, work: Mapping[str, int], left: Mapping[str, int]) -> None:
        """A group of cases begins: the work of each by its name, and how much of it an earlier run has left to do."""
        self._prefix, self._left = prefix, dict(left)
        self._done += sum(work.values()) - sum(left.values())

    def step(self, name: str, what: str = "", count: int = 1) -> None:
        """A call of a case begins; `what` is shown behind its name."""
        if self._progress is not None:
            self._progress(f"{self._prefix}{name} {what}".rstrip(), self._done, self._total)
        self._count(name, count)

    def end(self, name: str) -> None:
        """A case has its row."""
        self._count(name, self._left[name])

    def finish(self) -> None:
        """All is done."""
        if self._progress is not None:
            self._progress("done", self._total, self._total)

    def _count(self, name: str, count: int) -> None:
        counted = min(count, self._left[name])
        self._left[name] -= counted
        self._done += counted


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


def _is_left_out(record: Mapping[str, Any]) -> bool:
    """Whether a row says that there was no time for its case: another run may have it."""
    return (record.get("reason") or "").startswith(_LATE)


def _work(cases: list[Case], settings: BenchSettings) -> dict[Case, tuple[int, int]]:
    """How many calls each case of a group takes, and how many images; those of the baseline are always needed."""
    images = settings.images if settings.has_images and settings.images_of is None else 0
    work = {replace(cases[0], method=BASELINE, ratio=None): (0, images)}
    for case in cases:
        runs = settings.warmup + settings.repeats
        calls = settings.memory + runs + (2 * runs if is_calibrated(case.method) else 0) if settings.repeats else 0
        work[case] = (calls, images) if can_call(case, settings) else (0, 0)
    return work
