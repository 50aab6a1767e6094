"""What can be asked of the benchmark: suites, their defaults, and the cases they are made of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import AgentSDConfig
from ..utils.metrics import SSIM_SIDE
from .methods import METHODS, find_method, is_calibrated, refuse_ratio
from .models import LATENT_SCALE, SHAPES
from .rows import Case, short_name
from .schedulers import SCHEDULERS
from .store import BenchError


# What a suite runs: generations of a pipeline, or calls of a UNet with random weights.
Kind = Literal["generation", "call"]

_SPEED_METHODS = ("baseline", "agentsd", "agentsd-agent", "agentsd-tome", "tomesd", "attention-free")
_QUALITY_METHODS = ("baseline", "agentsd", "tomesd", "fewer-steps")
_CPU_METHODS = ("baseline", "agentsd-agent", "agentsd-tome", "agentsd", "tomesd", "attention-free")
# What needs several calls takes so many times as long, and is left out by default, save agentsd, which is computed.
_CALL_METHODS = tuple(
    name
    for name, method in METHODS.items()
    if not (method.needs_steps or method.needs_generation) or name == "agentsd"
)


@dataclass(frozen=True)
class Suite:
    """A kind of measurement, and values of [`BenchSettings`]: those it has by default, and those it always has."""

    kind: Kind
    has_images: bool = False  # whether a set of images is drawn and judged
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)


SUITES: dict[str, Suite] = {
    "speed": Suite("generation", defaults={"methods": _SPEED_METHODS}),
    "quality": Suite("generation", True, {"methods": _QUALITY_METHODS, "images": 64}),
    # Table 7 of the paper on agent attention: FID, seconds and memory over the ratio, 50 PLMS steps. It draws the
    # classes of ImageNet, whose names do not come with this library; `emoji` draws what it was taught.
    "paper": Suite(
        "generation",
        True,
        {
            "methods": ("baseline", "tomesd", "agentsd"),
            "ratios": (0.1, 0.2, 0.3, 0.4, 0.5),
            "steps": 50,
            "images": 64,
            "scheduler": "plms",
        },
    ),
    "shapes": Suite(
        "call",
        defaults={
            "models": ("sd15", "sd21", "sdxl"),
            "methods": _CALL_METHODS,
            "sizes": ((512, 512), (768, 768), (1024, 1024), (1536, 1536), (2048, 2048)),
        },
    ),
    "cpu": Suite(
        "call",
        defaults={"methods": _CPU_METHODS, "sizes": ((512, 512), (768, 768))},
        fixed={"models": ("sd15",), "device": "cpu", "dtype": "float32"},
    ),
}


@dataclass(frozen=True)
class BenchSettings:
    """
    What [`run_bench`] measures. [`BenchSettings.of_suite`] fills in what a suite is made of.

    Args:
        suite (`str`, defaults to `"speed"`): A name from `SUITES`.
        models (`tuple[str, ...]`, defaults to `("emoji",)`):
            What `agentsd.utils.loading.load_pipeline` takes or, for the suites of UNet calls, names from `SHAPES`.
        methods (`tuple[str, ...]`): What [`find_method`] takes.
        ratios (`tuple[float, ...]`, defaults to `(0.4,)`): Shares of tokens to merge.
        sizes (`tuple[tuple[int, int], ...]`): Image heights and widths in pixels; the model's own if empty.
        batches (`tuple[int, ...]`, defaults to `(1,)`): Images in one generation.
        steps (`int`, defaults to `20`): Denoising steps.
        warmup (`int`, defaults to `1`): Untimed runs of every case before its first round.
        repeats (`int`, defaults to `5`):
            Timed rounds. A suite that draws images may have none: then it only draws and judges them.
        prompts (`tuple[str, ...]`):
            What is drawn, in turn; the built-in list if empty. The suite `"paper"` needs them for any model but emoji:
            the paper's are of ImageNet's classes, whose names do not come with this library.
        images (`int`, defaults to `1`): Images in a set, for the suites that draw one.
        images_of (`str`, *optional*):
            The results folder of an earlier run that drew the same images, on a GPU say: what it found of them is
            taken over, and this run only times.
        guidance_scale (`float`, *optional*): Strength of the prompt; the pipeline's own if not given.
        scheduler (`str`, *optional*):
            Another scheduler than the model's own: `"ddim"`, `"plms"`, `"dpm++2m"` or `"euler-a"`.
        seed (`int`, defaults to `0`): Seed of the first image; each further one has the next.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; by default what suits the device.
        device (`str`, *optional*): Where to run; by default the GPU if there is one.
        compile (`bool` or `str`, defaults to `False`):
            Run every method, baseline too, through `torch.compile`, and in which mode if not its default. With
            `"reduce-overhead"`, CUDA graphs run on a GPU what was compiled; methods that keep what a graph writes over
            get a row that says so, and peak memory is not measured.
        memory (`bool`, defaults to `True`): Measure peak memory; on a CPU each case then runs once more, by itself.
        budget_minutes (`float`, *optional*): Start no further group of cases after this time.
        options (`dict[str, Any]`): Fields of [`AgentSDConfig`] for the methods of this library.
        lpips (`bool`, defaults to `False`): Judge pairs by LPIPS too; it fetches weights.
        features (`str`, *optional*):
            Extractor for FID, KID and CLIP score, see `agentsd.bench.features`. A suite that draws images of the
            embedded model alone takes that model's own, `"emoji"`, unless told otherwise.
        reference (`str`, *optional*):
            What to compare sets with instead of the baseline's images: a folder of images, a file of features, or
            `"emoji"`, see `agentsd.bench.set_metrics`. Where `features` is `"emoji"` by default, so is this.

    Raises:
        BenchError: If a value is out of range, or a name is unknown.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings
    >>> BenchSettings.of_suite("cpu").sizes
    ((512, 512), (768, 768))
    ```
    """

    suite: str = "speed"
    models: tuple[str, ...] = ("emoji",)
    methods: tuple[str, ...] = _SPEED_METHODS
    ratios: tuple[float, ...] = (0.4,)
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: int = 20
    warmup: int = 1
    repeats: int = 5
    prompts: tuple[str, ...] = ()
    images: int = 1
    images_of: str | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    compile: bool | str = False
    memory: bool = True
    budget_minutes: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lpips: bool = False
    features: str | None = None
    reference: str | None = None

    @classmethod
    def of_suite(cls, suite: str, **values: Any) -> "BenchSettings":
        """
        The settings of a suite, with some values of one's own.

        Args:
            suite (`str`): A name from `SUITES`.
            values: Any other field.

        Returns:
            `BenchSettings`: The settings.

        Raises:
            BenchError: If there is no such suite, or a value does not go with it.
        """
        known = _suite(suite)
        given = {"suite": suite, **known.defaults, **known.fixed, **values}
        if known.has_images and set(given.get("models", ("emoji",))) == {"emoji"}:
            given.setdefault("features", "emoji")
            if given["features"] == "emoji":
                given.setdefault("reference", "emoji")
        return cls(**given)

    def __post_init__(self) -> None:
        suite = _suite(self.suite)
        for name, value in suite.fixed.items():
            if getattr(self, name) != value:
                raise BenchError(f"The suite {self.suite!r} is about {name}={value!r}, not {getattr(self, name)!r}.")
        for name in ("models", "methods", "ratios", "batches"):
            if not getattr(self, name):
                raise BenchError(f"`{name}` is empty: name at least one.")
        self._check_methods()
        self._check_sizes(suite)
        self._check_models(suite)
        self._check_numbers()
        self._check_calibrated()
        self._refuse_unused(suite)
        if self.scheduler is not None:
            _check_names("scheduler", (self.scheduler,), SCHEDULERS)
        if isinstance(self.compile, str):
            _check_names("mode of torch.compile", (self.compile,), torch._inductor.list_mode_options())
        if self.reference is not None and self.features is None:
            raise BenchError(
                "Comparing with a `reference` needs a feature extractor: name one as `features` (--features), either "
                "'inception' or a CLIP model."
            )
        try:
            refuse_ratio(self.options)
            AgentSDConfig.from_dict(self.options)
        except (TypeError, ValueError) as error:
            raise BenchError(str(error)) from error

    def _check_methods(self) -> None:
        for name in self.methods:
            try:
                find_method(name)
            except ValueError as error:
                raise BenchError(str(error)) from error

    def _check_calibrated(self) -> None:
        """How many steps fit in a time is measured, here and now."""
        calibrated = [name for name in self.methods if is_calibrated(name)]
        if calibrated and (self.repeats == 0 or self.images_of is not None):
            raise BenchError(
                f"How many steps `{calibrated[0]}` takes follows from times, so that it has no images that could be "
                "drawn without them: leave it out, or name `fewer-steps-50%` and others of its kind."
            )

    def _check_models(self, suite: Suite) -> None:
        if self.suite == "paper" and set(self.models) != {"emoji"} and not self.prompts:
            raise BenchError(
                "With any model but emoji, the suite 'paper' draws the classes of ImageNet, whose names do not come "
                "with agentsd: give a file with one prompt per line, such as 'a photo of a goldfish', as --prompts "
                "FILE, or the prompts themselves as `prompts`."
            )
        by_name: dict[str, str] = {}
        for model in self.models:
            other = by_name.setdefault(short_name(model), model)
            if other != model:
                raise BenchError(
                    f"{other} and {model} are both called {short_name(model)} in tables and folders of images: "
                    "rename one, or run one after the other, each with a folder of its own."
                )
            if suite.kind == "generation" and model in SHAPES and not Path(model).exists():
                raise BenchError(f"{model} is the shape of a UNet with random weights: use the suite 'shapes'.")
        if suite.kind == "call":
            _check_names("shape", self.models, SHAPES)

    def _check_sizes(self, suite: Suite) -> None:
        if suite.kind == "call" and not self.sizes:
            raise BenchError("`sizes` is empty: name at least one height and width.")
        for height, width in self.sizes:
            if suite.has_images and min(height, width) < SSIM_SIDE:
                raise BenchError(f"SSIM needs at least {SSIM_SIDE} pixels per side, but got {height}×{width}.")
            if min(height, width) < LATENT_SCALE or height % LATENT_SCALE or width % LATENT_SCALE:
                raise BenchError(f"Heights and widths must be multiples of {LATENT_SCALE}, but got {height}×{width}.")

    def _check_numbers(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise BenchError(
                    f"A ratio must lie between 0 and 1, but got {ratio}. To merge nothing, use `baseline`."
                )
        for name in ("steps", "warmup", "repeats", "images"):
            least = 0 if name == "repeats" and self.has_images else 1
            if getattr(self, name) < least:
                raise BenchError(f"`{name}` must be at least {least}, but got {getattr(self, name)}.")
        if min(self.batches) < 1:
            raise BenchError(f"A batch must be at least 1, but got {min(self.batches)}.")
        if not 0 <= self.seed < 2**63:
            raise BenchError(f"`seed` must lie between 0 and 2⁶³ − 1, but got {self.seed}.")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise BenchError(f"`budget_minutes` must be above 0, but got {self.budget_minutes}.")

    def _refuse_unused(self, suite: Suite) -> None:
        """What would have no effect was meant for another suite."""
        unused: tuple[str, ...] = () if suite.has_images else ("images", "images_of", "features", "reference", "lpips")
        if suite.kind == "call":
            unused += ("steps", "prompts", "guidance_scale", "scheduler")
        standard = {item.name: item.default for item in fields(self)}
        given = [name for name in unused if getattr(self, name) != standard[name]]
        if given or (not suite.has_images and len(self.prompts) > 1):
            what = "times calls of UNets" if suite.kind == "call" else "judges no images"
            names = ", ".join(f"`{name}`" for name in given or ["prompts"])
            raise BenchError(
                f"The suite {self.suite!r} {what}, so it has no use for {names}: leave that out, or ask for the suite "
                "'quality'."
            )

    @property
    def kind(self) -> Kind:
        """Whether generations or calls of a UNet are measured."""
        return SUITES[self.suite].kind

    @property
    def has_images(self) -> bool:
        """Whether a set of images is drawn and judged."""
        return SUITES[self.suite].has_images

    def groups(self) -> list[list[Case]]:
        """The cases, those together that are timed together: every method and ratio for one model, size and batch."""
        sizes: Sequence[tuple[int | None, int | None]] = self.sizes or ((None, None),)
        return [
            [
                Case(model, name, ratio, height, width, batch)
                for name in dict.fromkeys(self.methods)
                for ratio in (dict.fromkeys(self.ratios) if find_method(name).has_ratio else [None])
            ]
            for model in dict.fromkeys(self.models)
            for height, width in dict.fromkeys(sizes)
            for batch in dict.fromkeys(self.batches)
        ]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, with lists for tuples: equal to what is read back."""
        return json.loads(json.dumps(asdict(self)))


def _suite(name: str) -> Suite:
    _check_names("suite", (name,), SUITES)
    return SUITES[name]


def _check_names(kind: str, names: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise BenchError(f"There is no {kind} {name!r}. Known: {', '.join(known)}.")
