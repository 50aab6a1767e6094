"""Runs the benchmark: generations of a pipeline, or a fixed suite of UNet calls."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..config import AgentSDConfig
from ..pipeline import load_pipeline
from .environment import environment
from .methods import METHODS, Method, MethodUnavailable
from .report import BenchResult, Row
from .shapes import LATENT_SCALE, sd15_unet, share_weights, unet_inputs
from .store import BenchError, RunFolder
from .timing import Sample, Variant, summarize, time_round


BASELINE = "vanilla"
DEFAULT_METHODS = ("vanilla", "agentsd", "agentsd-agent", "agentsd-tome", "tomesd", "attention-free")
SUITES = ("cpu",)

# One call of a UNet has no schedule, so the `cpu` suite times the two phases and computes the whole from them.
_CPU_ROWS = ("vanilla", "agentsd-agent", "agentsd-tome", "agentsd", "tomesd", "attention-free")
_COMPUTED = "agentsd"

# Calls done, calls in all, what is being timed now.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchSettings:
    """
    What [`run_bench`] times.

    Args:
        model (`str`, defaults to `"emoji"`): A name, folder or file that `agentsd.pipeline.load_pipeline` takes.
        methods (`tuple[str, ...]`): Names from `agentsd.bench.METHODS`.
        ratios (`tuple[float, ...]`, defaults to `(0.4,)`): Shares of tokens to merge; each is a row a method.
        prompt (`str`, defaults to `"red apple"`): What is drawn; time does not depend on it.
        height (`int`, *optional*): Picture height in pixels; the model's own if not given.
        width (`int`, *optional*): Picture width in pixels; the model's own if not given.
        steps (`int`, defaults to `20`): Denoising steps.
        batch (`int`, defaults to `1`): Pictures in one generation.
        warmup (`int`, defaults to `1`): Untimed generations each time a method is switched on.
        repeats (`int`, defaults to `5`): Timed rounds.
        seed (`int`, defaults to `0`): Seed of the noise.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; by default what suits the device.
        device (`str`, *optional*): Where to run; by default the GPU if there is one.

    Raises:
        BenchError: If a value is out of range or a method is unknown.
    """

    model: str = "emoji"
    methods: tuple[str, ...] = DEFAULT_METHODS
    ratios: tuple[float, ...] = (0.4,)
    prompt: str = "red apple"
    height: int | None = None
    width: int | None = None
    steps: int = 20
    batch: int = 1
    warmup: int = 1
    repeats: int = 5
    seed: int = 0
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check_rounds(self.ratios, self.warmup, self.repeats)
        if not self.methods:
            raise BenchError(f"`methods` is empty: name at least one of {', '.join(METHODS)}.")
        for name in self.methods:
            if name not in METHODS:
                raise BenchError(f"There is no method {name!r}. Known: {', '.join(METHODS)}.")
        if (self.height is None) != (self.width is None):
            # Pipelines silently draw their own size where only one is given.
            raise BenchError("Give both `height` and `width`, or neither.")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise BenchError(f"`{name}` must be at least 1, but got {getattr(self, name)}.")


@dataclass(frozen=True)
class SuiteSettings:
    """
    What [`run_suite`] times.

    Args:
        ratios (`tuple[float, ...]`, defaults to `(0.4,)`): Shares of tokens to merge.
        sizes (`tuple[tuple[int, int], ...]`, defaults to 512² and 768²): Picture heights and widths in pixels.
        warmup (`int`, defaults to `1`): Untimed calls of each method at each size, before the first round.
        repeats (`int`, defaults to `5`): Timed rounds a size.
        seed (`int`, defaults to `0`): Seed of weights and inputs.

    Raises:
        BenchError: If a value is out of range.
    """

    ratios: tuple[float, ...] = (0.4,)
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (768, 768))
    warmup: int = 1
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rounds(self.ratios, self.warmup, self.repeats)
        if not self.sizes:
            raise BenchError("`sizes` is empty: name at least one height and width.")
        for height, width in self.sizes:
            if min(height, width) < LATENT_SCALE or height % LATENT_SCALE or width % LATENT_SCALE:
                raise BenchError(f"Heights and widths must be multiples of {LATENT_SCALE}, but got {height}×{width}.")


@dataclass(frozen=True)
class Case:
    """
    A method at one ratio.

    Args:
        method (`Method`): The method.
        ratio (`float`, *optional*): Share of tokens merged; `None` for a method without one.
    """

    method: Method
    ratio: float | None

    @property
    def key(self) -> str:
        """Its name among the variants of a round."""
        return _key(self.method.name, self.ratio)

    def enter(self, model: Any) -> AbstractContextManager[object]:
        """
        Switch it on for the length of a `with` block.

        Args:
            model (`DiffusionPipeline` or `UNet2DConditionModel`): What to run.
        """
        return self.method.enter(model, self.ratio)


def run_bench(settings: BenchSettings | None = None, *, progress: Progress | None = None) -> BenchResult:
    """
    Time whole generations of a pipeline, with and without each method.

    Args:
        settings (`BenchSettings`, *optional*): What to time.
        progress (`Callable[[int, int, str], None]`, *optional*):
            Told before each generation how many are done, how many there are, and which method runs.

    Returns:
        `BenchResult`: A row a method and ratio.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings, run_bench
    >>> settings = BenchSettings(methods=("vanilla", "agentsd"), steps=2, warmup=0, repeats=1)
    >>> [row.method for row in run_bench(settings).rows]
    ['vanilla', 'agentsd']
    ```
    """
    settings = settings or BenchSettings()
    pipe = load_pipeline(settings.model, device=settings.device, dtype=settings.dtype)
    return bench_pipeline(pipe, settings, progress=progress)


def bench_pipeline(pipe: Any, settings: BenchSettings, *, progress: Progress | None = None) -> BenchResult:
    """
    The same as [`run_bench`] for a pipeline that is loaded already.

    Args:
        pipe (`DiffusionPipeline`): A text-to-image pipeline, where and in the precision that it is to run in.
        settings (`BenchSettings`): What to time; `model`, `dtype` and `device` only describe the pipeline.
        progress (`Callable[[int, int, str], None]`, *optional*): As for `run_bench`.

    Returns:
        `BenchResult`: A row a method and ratio.
    """
    device = torch.device(pipe._execution_device)
    pipe.set_progress_bar_config(disable=True)
    # The pipeline's own default size is known by what comes out.
    drawn: dict[str, int] = {}

    def generate() -> None:
        picture = pipe(
            [settings.prompt] * settings.batch,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(settings.seed),
        ).images[0]
        drawn["width"], drawn["height"] = picture.size

    cases = _cases(settings.methods, settings.ratios)
    able, reasons = _sort_out(cases, pipe)
    variants = _variants(able, pipe, generate)
    counter = _Counter(progress, settings.repeats * len(variants) * (settings.warmup + 1))
    rounds = [time_round(variants, device, settings.warmup, counter.step) for _ in range(settings.repeats)]
    counter.finish()
    height, width = drawn["height"], drawn["width"]
    return BenchResult(
        title=f"{settings.model}: {settings.batch} × {width}×{height}, {settings.steps} steps",
        settings=asdict(settings),
        environment=environment(device, pipe.dtype),
        rows=_rows(cases, rounds, reasons, height, width),
        notes=_notes("generation", settings.repeats, device, reasons),
    )


def run_suite(
    name: str,
    settings: SuiteSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    build_unet: Callable[[int], UNet2DConditionModel] = sd15_unet,
) -> BenchResult:
    """
    Run a fixed suite.

    `"cpu"` times single calls of Stable Diffusion 1.5's own UNet with random weights, in float32 on the CPU, with the
    batch of 2 that classifier-free guidance makes of one picture: unpatched, agentsd in each of its phases, tomesd and
    the attention-free reference. One call has no schedule; the row of the whole schedule is computed from the times of
    its phases.

    Args:
        name (`str`): `"cpu"`.
        settings (`SuiteSettings`, *optional*): What to time.
        out (`str` or `Path`, *optional*):
            Folder that gets every finished round at once (`rounds.jsonl`), since a round at 768² takes minutes.
        resume (`bool`, defaults to `False`): Go on from the rounds in `out`.
        progress (`Callable[[int, int, str], None]`, *optional*):
            Told before each call how many are done, how many there are, and what runs.
        build_unet (`Callable[[int], UNet2DConditionModel]`, *optional*):
            Makes the model from a seed; Stable Diffusion 1.5's if not given.

    Returns:
        `BenchResult`: A row a size, method and ratio.

    Raises:
        BenchError: If there is no such suite, or the rounds in `out` do not belong to this run.
    """
    if name not in SUITES:
        raise BenchError(f"There is no suite {name!r}. Known: {', '.join(SUITES)}.")
    if resume and out is None:
        raise BenchError("Resuming needs the folder of the run to resume.")
    settings = settings or SuiteSettings()
    device = torch.device("cpu")
    facts = environment(device, torch.float32)
    header = {"suite": name, "settings": asdict(settings), "environment": facts}
    folder = None if out is None else RunFolder(Path(out), header, resume=resume)
    finished = [] if folder is None else folder.rounds

    unet = build_unet(settings.seed)
    cases = _cases(_CPU_ROWS, settings.ratios)
    able, reasons = _sort_out([case for case in cases if case.method.name != _COMPUTED], unet)
    counter = _Counter(progress, len(settings.sizes) * len(able) * (settings.warmup + settings.repeats))
    rows: list[Row] = []
    with ExitStack() as patches:
        # Every variant stays patched from beginning to end, so that one warm-up of each is enough.
        twins = {case.key: share_weights(unet) for case in able}
        for case in able:
            patches.enter_context(case.enter(twins[case.key]))
        for height, width in settings.sizes:
            rounds = [
                _from_record(record) for record in finished if (record["height"], record["width"]) == (height, width)
            ]
            counter.prefix = f"{width}×{height} "
            counter.skip(len(rounds) * len(able))
            inputs = unet_inputs(unet, height, width, seed=settings.seed)
            variants = [Variant(key, nullcontext, partial(_call, twin, inputs)) for key, twin in twins.items()]
            if len(rounds) < settings.repeats:
                for _ in range(settings.warmup):
                    time_round(variants, device, warmup=0, on_call=counter.step)
            else:
                counter.skip(settings.warmup * len(able))
            while len(rounds) < settings.repeats:
                rounds.append(time_round(variants, device, warmup=0, on_call=counter.step))
                if folder is not None:
                    folder.append(_to_record(height, width, rounds[-1]))
            whole = [_whole_schedule(samples, settings.ratios) for samples in rounds]
            timed = [{**samples, **computed} for samples, computed in zip(rounds, whole, strict=True)]
            rows += _rows(cases, timed, reasons, height, width, computed=whole[0])
    counter.finish()
    share = AgentSDConfig().agent_until
    return BenchResult(
        title="UNet of Stable Diffusion 1.5, random weights, batch 2",
        settings={"suite": name, **asdict(settings)},
        environment=facts,
        rows=rows,
        notes=[
            f"†: computed, not measured: in every round {share:g} of the agent phase's time plus {1 - share:g} of the "
            "ToMe phase's, as in a generation whose steps are spread evenly over the noise range.",
            *_notes("UNet call", settings.repeats, device, reasons),
        ],
    )


@torch.no_grad()
def _call(unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    unet(*inputs)


def _key(method: str, ratio: float | None) -> str:
    return method if ratio is None else f"{method} {ratio:g}"


def _cases(methods: Sequence[str], ratios: Sequence[float]) -> list[Case]:
    """Every method at every ratio, and methods without a ratio once."""
    chosen = [METHODS[name] for name in dict.fromkeys(methods)]
    return [
        Case(method, ratio) for method in chosen for ratio in (dict.fromkeys(ratios) if method.has_ratio else [None])
    ]


def _sort_out(cases: Sequence[Case], model: Any) -> tuple[list[Case], dict[str, str]]:
    """The cases that can run, and by key why the others cannot."""
    able, reasons = [], {}
    for case in cases:
        try:
            with case.enter(model):
                able.append(case)
        except MethodUnavailable as error:
            reasons[case.key] = str(error)
    if not able:
        raise BenchError(f"None of the methods can run here: {'; '.join(dict.fromkeys(reasons.values()))}.")
    return able, reasons


def _variants(cases: Sequence[Case], model: Any, call: Callable[[], object]) -> list[Variant]:
    return [Variant(case.key, partial(case.enter, model), call) for case in cases]


def _whole_schedule(samples: Mapping[str, Sample], ratios: Sequence[float]) -> dict[str, Sample]:
    """The time of the paper's schedule from the times of its two phases, weighted by their share of the steps."""
    share = AgentSDConfig().agent_until
    whole = {}
    for ratio in ratios:
        agent, tome = samples[_key("agentsd-agent", ratio)], samples[_key("agentsd-tome", ratio)]
        whole[_key(_COMPUTED, ratio)] = Sample(share * agent.seconds + (1 - share) * tome.seconds)
    return whole


def _rows(
    cases: Sequence[Case],
    rounds: Sequence[Mapping[str, Sample]],
    reasons: Mapping[str, str],
    height: int,
    width: int,
    computed: Collection[str] = (),
) -> list[Row]:
    timed = rounds[0].keys()
    baseline = BASELINE if BASELINE in timed else None
    summaries = {key: summarize(rounds, key, baseline) for key in timed}

    def compare(case: Case, other: str) -> float | None:
        """One speed-up divided by another."""
        mine, theirs = summaries[case.key].speedup, summaries[other].speedup if other in summaries else None
        return None if mine is None or theirs is None or case.method.name == BASELINE else mine / theirs

    rows = []
    for case in cases:
        row = Row(case.method.name, case.ratio, height, width, reason=reasons.get(case.key))
        if row.reason is None:
            row = replace(
                row,
                **asdict(summaries[case.key]),
                is_computed=case.key in computed,
                of_tomesd=compare(case, _key("tomesd", case.ratio)),
                of_attention_free=compare(case, "attention-free"),
            )
        rows.append(row)
    return rows


def _notes(what: str, repeats: int, device: torch.device, reasons: Mapping[str, str]) -> list[str]:
    """How to read the table."""
    notes = [
        f"median and quartiles: seconds per {what}, over {repeats} interleaved rounds in one process.",
        "speed-up: median over the rounds of vanilla's time divided by the method's in the same round; "
        "× tomesd and × free: this speed-up divided by that of tomesd and of attention-free.",
        "attention-free: the patched layers' self-attention answered by `to_out(to_v(x))`, the reference for what "
        "faster attention can give.",
    ]
    if device.type == "cpu":
        notes.append("peak memory: of the whole process, weights and all, so only differences tell something.")
    return [*notes, *(f"{key} did not run: {reason}." for key, reason in reasons.items())]


def _to_record(height: int, width: int, samples: Mapping[str, Sample]) -> dict[str, Any]:
    return {"height": height, "width": width, "samples": {key: asdict(sample) for key, sample in samples.items()}}


def _from_record(record: Mapping[str, Any]) -> dict[str, Sample]:
    return {key: Sample(**sample) for key, sample in record["samples"].items()}


def _check_rounds(ratios: Sequence[float], warmup: int, repeats: int) -> None:
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise BenchError(f"A ratio must lie between 0 and 1, but got {ratio}. For none at all there is `vanilla`.")
    if not ratios:
        raise BenchError("`ratios` is empty: name at least one.")
    if warmup < 0:
        raise BenchError(f"`warmup` must be at least 0, but got {warmup}.")
    if repeats < 1:
        raise BenchError(f"`repeats` must be at least 1, but got {repeats}.")


class _Counter:
    """Counts calls for a progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self.prefix = ""

    def step(self, name: str) -> None:
        """A call of this variant begins."""
        if self.progress is not None:
            self.progress(self.done, self.total, self.prefix + name)
        self.done += 1

    def skip(self, calls: int) -> None:
        """Calls that an earlier run has done already."""
        self.done += calls

    def finish(self) -> None:
        """All is done."""
        if self.progress is not None:
            self.progress(self.total, self.total, "done")
