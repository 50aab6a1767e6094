"""What is measured: generations of a pipeline, or single calls of a UNet with random weights."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import PNDMScheduler

from ..patch import remove_patch
from ..utils.generation import check_draws_from_text
from ..utils.loading import load_pipeline, own_size, pick_device, pick_dtype
from ..utils.timing import Call, Stopwatch
from .methods import METHODS, reseed
from .settings import BenchSettings, Case
from .shapes import LATENT_SCALE, call_unet, random_unet, share_weights, unet_inputs


_MOST_VARIANTS = 10_000  # that torch.compile is to keep


class Subject(Protocol):
    """A model to measure. It is picklable, so that another process can load the same."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""

    def load(self) -> Any:
        """The model, unpatched."""

    def copy(self, model: Any) -> Any:
        """A copy with modules of its own and the same weights."""

    def compile(self, model: Any) -> Any:
        """The model under `torch.compile`."""

    def size(self, model: Any) -> tuple[int, int]:
        """The model's own image height and width in pixels."""

    def call(self, model: Any, case: Case, steps: int) -> Call:
        """What is timed: `steps` matter only where there is a generation."""


def twin_pipeline(pipe: Any) -> Any:
    """
    A copy of a pipeline to switch a method on: its UNet and scheduler are its own, all weights are shared.

    Args:
        pipe (`DiffusionPipeline`): The pipeline, unpatched.

    Returns:
        `DiffusionPipeline`: The copy.

    Examples:

    ```python
    >>> from agentsd.bench.subjects import twin_pipeline
    >>> from agentsd.utils.loading import load_pipeline
    >>> pipe = load_pipeline("emoji")
    >>> twin = twin_pipeline(pipe)
    >>> twin.unet is pipe.unet, twin.unet.conv_in.weight is pipe.unet.conv_in.weight
    (False, True)
    ```
    """
    twin = copy.copy(pipe)
    twin.unet = share_weights(pipe.unet)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return twin


def _compile(unet: Any) -> Any:
    # All copies of a model count as one piece of code, and past a few variants of it Dynamo goes back to eager, in
    # silence. One size is compiled as it is, not as one of many.
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = _MOST_VARIANTS
    return torch.compile(unet, dynamic=False)


def compiled_graphs() -> int:
    """
    How many graphs `torch.compile` has made in this process.

    Returns:
        `int`: Their number.

    Examples:

    ```python
    >>> compiled_graphs() >= 0
    True
    ```
    """
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def plms(scheduler: Any) -> PNDMScheduler:
    """
    PLMS at the noise levels that a model was trained with.

    Args:
        scheduler (`SchedulerMixin`): The model's own scheduler.

    Returns:
        `PNDMScheduler`: Its PLMS half.

    Examples:

    ```python
    >>> from agentsd.bench.subjects import plms
    >>> from diffusers import DDIMScheduler
    >>> plms(DDIMScheduler(prediction_type="v_prediction")).config.prediction_type
    'v_prediction'
    ```
    """
    options: dict[str, Any] = {"skip_prk_steps": True}
    if scheduler.config.get("rescale_betas_zero_snr"):
        # PNDMScheduler does not rescale by itself. It divides by the signal that is left in the noise, which is none
        # at the last timestep: with leading spacing, no step starts there.
        options |= {"trained_betas": scheduler.betas.tolist(), "timestep_spacing": "leading"}
    return PNDMScheduler.from_config(scheduler.config, **options)


@dataclass(frozen=True)
class PipelineSubject:
    """
    Whole generations of a pipeline.

    Args:
        model (`str`): What [`load_pipeline`] takes.
        prompt (`str`): What is drawn; time does not depend on it.
        guidance_scale (`float`, *optional*): Strength of the prompt; the pipeline's own if not given.
        scheduler (`"plms"`, *optional*): Another scheduler than the model's own.
        seed (`int`): Seed of the noise.
        device (`torch.device`): Where it runs.
        dtype (`torch.dtype`): Its precision.
    """

    model: str
    prompt: str
    guidance_scale: float | None
    scheduler: str | None
    seed: int
    device: torch.device
    dtype: torch.dtype

    def load(self) -> Any:
        """See [`Subject.load`]."""
        pipe = load_pipeline(self.model, device=self.device, dtype=self.dtype)
        check_draws_from_text(pipe)
        pipe.set_progress_bar_config(disable=True)
        if self.scheduler == "plms":
            pipe.scheduler = plms(pipe.scheduler)
        return pipe

    def copy(self, model: Any) -> Any:
        """See [`Subject.copy`]."""
        return twin_pipeline(model)

    def compile(self, model: Any) -> Any:
        """See [`Subject.compile`]."""
        model.unet = _compile(model.unet)
        return model

    def size(self, model: Any) -> tuple[int, int]:
        """See [`Subject.size`]."""
        return own_size(model)

    def draw(
        self, model: Any, case: Case, steps: int, prompts: Sequence[str], seeds: Sequence[int], **options: Any
    ) -> Any:
        """
        Generate images, each from a seed of its own.

        Args:
            model (`DiffusionPipeline`): The pipeline.
            case (`Case`): Size of the images.
            steps (`int`): Denoising steps.
            prompts (`Sequence[str]`): What to draw.
            seeds (`Sequence[int]`): A seed for each.
            options: Passed to the pipeline.

        Returns:
            `StableDiffusionPipelineOutput`: What the pipeline returns, with arrays as images.
        """
        reseed(model, seeds[0])
        if self.guidance_scale is not None:
            options["guidance_scale"] = self.guidance_scale
        return model(
            list(prompts),
            height=case.height,
            width=case.width,
            num_inference_steps=steps,
            # On the CPU, so that a seed means the same noise on every device.
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **options,
        )

    def call(self, model: Any, case: Case, steps: int) -> Call:
        """See [`Subject.call`]."""
        prompts = [self.prompt] * case.batch
        seeds = range(self.seed, self.seed + case.batch)

        def generate(watch: Stopwatch) -> None:
            def end_of_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                watch.mark()
                return tensors

            self.draw(model, case, steps, prompts, seeds, callback_on_step_end=end_of_step)

        return generate


@dataclass(frozen=True)
class UNetSubject:
    """
    Single calls of a UNet with random weights.

    Args:
        shape (`str`): A name from `SHAPES`.
        seed (`int`): Seed of weights and inputs.
        device (`torch.device`): Where it runs.
        dtype (`torch.dtype`): Its precision.
    """

    shape: str
    seed: int
    device: torch.device
    dtype: torch.dtype

    def load(self) -> Any:
        """See [`Subject.load`]."""
        unet = random_unet(self.shape, self.seed).to(self.device)
        return unet if self.dtype == unet.dtype else unet.to(self.dtype)

    def copy(self, model: Any) -> Any:
        """See [`Subject.copy`]."""
        return share_weights(model)

    def compile(self, model: Any) -> Any:
        """See [`Subject.compile`]."""
        return _compile(model)

    def size(self, model: Any) -> tuple[int, int]:
        """See [`Subject.size`]."""
        side = model.config.sample_size * LATENT_SCALE
        return side, side

    def call(self, model: Any, case: Case, steps: int) -> Call:
        """See [`Subject.call`]."""
        assert case.height is not None and case.width is not None
        inputs = unet_inputs(model, case.height, case.width, case.batch, self.seed)
        return partial(_call_unet, model, inputs)


def _call_unet(unet: torch.nn.Module, inputs: Mapping[str, Any], _watch: Stopwatch) -> None:
    call_unet(unet, inputs)


def subject_of(model: str, settings: BenchSettings, prompt: str, device: str | None) -> PipelineSubject | UNetSubject:
    """
    What a suite measures of a model.

    Args:
        model (`str`): Its name.
        settings (`BenchSettings`): What was asked for.
        prompt (`str`): What generations draw.
        device (`str`, *optional*): Where to run; by default the GPU if there is one.

    Returns:
        `PipelineSubject` or `UNetSubject`: The subject; nothing is loaded yet.

    Raises:
        ValueError: If there is no such device, or a model cannot run in this dtype.
    """
    where = pick_device(device)
    dtype = pick_dtype(settings.dtype, where)
    if settings.kind == "call":
        return UNetSubject(model, settings.seed, where, dtype)
    return PipelineSubject(model, prompt, settings.guidance_scale, settings.scheduler, settings.seed, where, dtype)


def switch_on(subject: Subject, model: Any, case: Case, settings: BenchSettings) -> Any:
    """
    A copy of a model with the method of a case switched on.

    Args:
        subject (`Subject`): What the model is.
        model (`DiffusionPipeline` or `UNet2DConditionModel`): The model; it is left as it is.
        case (`Case`): The method and its ratio.
        settings (`BenchSettings`): The options of this library's methods, and whether to compile.

    Returns:
        `DiffusionPipeline` or `UNet2DConditionModel`: The copy; it shares the model's weights.

    Raises:
        MethodUnavailable: If the method cannot run.
    """
    twin = subject.copy(model)
    remove_patch(twin)
    METHODS[case.method].apply(twin, case.ratio, settings.options)
    return subject.compile(twin) if settings.compile else twin
