"""What is measured: generations of a pipeline, or single calls of a UNet with random weights."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel

from ..patch import remove_patch
from ..utils.calls import check_draws_from_text
from ..utils.generation import draw
from ..utils.loading import load_pipeline, own_size
from ..utils.timing import Call, Stopwatch
from .methods import find_method
from .peers import reseed
from .rows import Case
from .schedule import call_timesteps
from .schedulers import SCHEDULERS


# Latents have an eighth of the image's height and width; CLIP always gives 77 text tokens.
LATENT_SCALE = 8
_TEXT_TOKENS = 77
# Width of SDXL's pooled text state, and its six numbers on size and crop.
_POOLED_WIDTH = 1280
_TIME_IDS = 6
_MOST_VARIANTS = 10_000  # that torch.compile is to keep

# Written out rather than left to diffusers' defaults, which may change.
_COMMON: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_SD_BLOCKS: dict[str, Any] = {
    **_COMMON,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
}

# UNets of 860 million, 866 million and 2.6 billion parameters. `attention_head_dim` is their number of heads, despite
# its name.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {**_SD_BLOCKS, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        **_SD_BLOCKS,
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        **_COMMON,
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": _POOLED_WIDTH + _TIME_IDS * 256,
    },
}


@dataclass(frozen=True)
class PipelineSubject:
    """Whole generations of a pipeline. Their time does not depend on the prompt."""

    model: str
    prompt: str
    guidance_scale: float | None
    scheduler: str | None
    seed: int
    device: torch.device
    dtype: torch.dtype

    def load(self) -> Any:
        """The model, unpatched."""
        pipe = load_pipeline(self.model, device=self.device, dtype=self.dtype)
        check_draws_from_text(pipe, self._arguments(self.prompt, None, None))
        pipe.set_progress_bar_config(disable=True)
        if self.scheduler is not None:
            pipe.scheduler = SCHEDULERS[self.scheduler](pipe.scheduler)
        return pipe

    def copy(self, model: Any) -> Any:
        """A copy with modules of its own and the same weights."""
        return twin_pipeline(model)

    def compile(self, model: Any, mode: str | None) -> Any:
        """The model under `torch.compile`."""
        model.unet = _compile(model.unet, mode)
        return model

    def size(self, model: Any) -> tuple[int, int]:
        """The model's own image height and width in pixels."""
        return own_size(model)

    def draw(
        self,
        model: Any,
        case: Case,
        steps: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        end_of_step: Callable[[], None] | None = None,
    ) -> Any:
        """Generate images of the case's size, as arrays, each from a seed of its own."""
        reseed(model, seeds[0])
        # On the CPU, so that a seed means the same noise on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = self._arguments(list(prompts), case.height, case.width)
        return draw(model, call, steps, generators, end_of_step).output

    def call(self, model: Any, case: Case, steps: int) -> Call:
        """What is timed: a generation of the case's size and batch, step by step."""
        prompts = [self.prompt] * case.batch
        seeds = range(self.seed, self.seed + case.batch)
        return lambda watch: self.draw(model, case, steps, prompts, seeds, watch.mark)

    def _arguments(self, prompt: str | list[str], height: int | None, width: int | None) -> dict[str, Any]:
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"prompt": prompt, "height": height, "width": width, **guidance}


@dataclass(frozen=True)
class UNetSubject:
    """Calls of a UNet of one of the `SHAPES`, with random weights: speed does not depend on them."""

    shape: str
    seed: int
    device: torch.device
    dtype: torch.dtype

    def load(self) -> Any:
        """The model, unpatched."""
        unet = _random_unet(self.shape, self.seed).to(self.device)
        return unet if self.dtype == unet.dtype else unet.to(self.dtype)

    def copy(self, model: Any) -> Any:
        """A copy with modules of its own and the same weights."""
        return share_weights(model)

    def compile(self, model: Any, mode: str | None) -> Any:
        """The model under `torch.compile`."""
        return _compile(model, mode)

    def size(self, model: Any) -> tuple[int, int]:
        """The model's own image height and width in pixels."""
        side = model.config.sample_size * LATENT_SCALE
        return side, side

    def call(self, model: Any, case: Case, steps: int) -> Call:
        """What is timed: a call at the case's size and batch, or one for each of the first steps of a run."""
        assert case.height is not None and case.width is not None
        inputs = unet_inputs(model, case.height, case.width, case.batch, self.seed)
        if steps == 1:
            return partial(call_unet, model, inputs)
        timesteps = call_timesteps(self.device)

        def run(_watch: Stopwatch) -> None:
            # Elements of one tensor, as pipelines hand them over.
            for timestep in timesteps[:steps]:
                call_unet(model, {**inputs, "timestep": timestep})

        return run


# What is measured. It is picklable, so that another process can load the same model.
Subject: TypeAlias = PipelineSubject | UNetSubject


def switch_on(
    subject: Subject, model: Any, case: Case, options: Mapping[str, Any], compile: bool | str = False
) -> Any:
    """A copy of a model, which is left as it is, with the method of a case switched on."""
    twin = subject.copy(model)
    remove_patch(twin)
    find_method(case.method).apply(twin, case.ratio, options)
    return subject.compile(twin, compile if isinstance(compile, str) else None) if compile else twin


def twin_pipeline(pipe: Any) -> Any:
    """A copy of a pipeline to switch a method on: its UNet and scheduler are its own, all weights are shared."""
    twin = copy.copy(pipe)
    twin.unet = share_weights(pipe.unet)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return twin


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model with modules of its own and the same weights, so that several patched copies fit in memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _random_unet(shape: str, seed: int) -> UNet2DConditionModel:
    # In float32 on the CPU, so that a seed means the same weights everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**SHAPES[shape]).eval().requires_grad_(False)


def unet_inputs(unet: UNet2DConditionModel, height: int, width: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """
    Random inputs for one call of a UNet.

    Args:
        unet (`UNet2DConditionModel`): The model that will be called; inputs get its device and dtype.
        height (`int`): Image height in pixels.
        width (`int`): Image width in pixels.
        batch (`int`, defaults to `1`): Images; each is two samples, for classifier-free guidance.
        seed (`int`, defaults to `0`): Seed of the inputs.

    Returns:
        `dict[str, Any]`: Arguments of the model: latents of shape `(2 * batch, 4, height / 8, width / 8)`, text states
            of shape `(2 * batch, 77, channels)`, and what else the model takes.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2 * batch, *shape, generator=generator).to(unet.device, unet.dtype)

    inputs: dict[str, Any] = {
        "sample": noise(unet.config.in_channels, height // LATENT_SCALE, width // LATENT_SCALE),
        # The middle of the noise range; patches with a single phase do not depend on it.
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": noise(_TEXT_TOKENS, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        config = unet.config
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": noise(_TIME_IDS)}
    return inputs


@torch.no_grad()
def call_unet(unet: torch.nn.Module, inputs: Mapping[str, Any], watch: Stopwatch | None = None) -> torch.Tensor:
    """
    Call a UNet once, without gradients.

    Args:
        unet (`UNet2DConditionModel`): The model.
        inputs (`Mapping[str, Any]`): What [`unet_inputs`] returns.
        watch (`Stopwatch`, *optional*): Not used: a single call has no steps to mark.

    Returns:
        `torch.Tensor` of the shape of the latents: The predicted noise.
    """
    others = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    # These two by position, as pipelines give them: tomesd and DeepCache look for them there.
    return unet(inputs["sample"], inputs["timestep"], **others).sample


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def all_variants() -> Iterator[None]:
    """Within it, `torch.compile` keeps all variants of a model."""
    # All copies of a model count as one piece of code, and past a few variants of it Dynamo goes back to eager, in
    # silence.
    with torch._dynamo.config.patch(cache_size_limit=_MOST_VARIANTS, accumulated_cache_size_limit=_MOST_VARIANTS):
        yield


def _compile(unet: Any, mode: str | None) -> Any:
    # One size is compiled as it is, not as one of many.
    return torch.compile(unet, dynamic=False, mode=mode)
