"""All methods that are compared, by name: this library's own and the references, and those of `peers.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from ..config import AgentSDConfig
from ..models.unet import AttentionLayer, attended_models, find_layers, unsupported_reason
from ..patch import apply_patch
from ..presets import PRESETS, PresetName
from ..runtime.processor import AgentAttnProcessor
from ..utils.assignments import read_assignments
from .peers import DeepCache, HiDiffusion, MethodUnavailable, ToMeSD


BASELINE = "baseline"
# Options of the paper's schedule, and those that replace it.
_SCHEDULE = ("agent_until", "late_phase", "kv_ratio")
_ONE_PHASE = ("sx", "sy", "agent_ratio")
# How many of its steps the baseline takes, for a curve of what is to be had in less time.
_STEP_PERCENT = (90, 75, 60, 50, 40, 30, 25)


class Method(Protocol):
    """
    One way of running a model.

    Examples:

    ```python
    >>> from agentsd.bench import METHODS
    >>> METHODS["tomesd"].has_ratio, METHODS["tomesd"].needs_steps, METHODS["deepcache"].needs_steps
    (True, False, True)
    ```
    """

    @property
    def name(self) -> str:
        """What it is called in tables and on the command line."""

    @property
    def has_ratio(self) -> bool:
        """Whether it depends on the share of tokens to merge."""

    @property
    def needs_steps(self) -> bool:
        """Whether it shows only over several steps, not in a single call of a UNet."""

    @property
    def needs_generation(self) -> bool:
        """Whether it takes a whole pipeline, and not a UNet alone."""

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """
        Switch the method on, for good: it is given a copy that nothing else uses.

        Args:
            model (`DiffusionPipeline` or `UNet2DConditionModel`): What to run.
            ratio (`float`, *optional*): Share of tokens to merge; `None` for a method without one.
            options (`Mapping[str, Any]`):
                Fields of [`AgentSDConfig`], for the methods of this library and what others share with them.

        Raises:
            MethodUnavailable: If the method cannot run, or would silently change nothing.
        """


@dataclass(frozen=True)
class Baseline:
    """The model as it is."""

    name: str = BASELINE
    needs_steps: ClassVar[bool] = False
    needs_generation: ClassVar[bool] = False

    @property
    def has_ratio(self) -> bool:
        """See [`Method.has_ratio`]."""
        return False

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""


@dataclass(frozen=True)
class FewerSteps(Baseline):
    """The model as it is with a share of the steps; if none is given, as many as fit in the time of `reference`."""

    name: str = "fewer-steps"
    share: float | None = None
    reference: str = "agentsd"
    needs_generation: ClassVar[bool] = True

    @property
    def has_ratio(self) -> bool:
        """See [`Method.has_ratio`]."""
        return self.share is None


@dataclass(frozen=True)
class NaiveAttention:
    """Attention that writes its whole matrix to memory, in all layers: the baseline of papers on token merging."""

    name: str = "baseline-naive"
    has_ratio: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = False
    needs_generation: ClassVar[bool] = False

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        unet: Any = attended_models(model)[0][1]
        unet.set_attn_processor(AttnProcessor())


@dataclass(frozen=True)
class AgentSD:
    """This library: one of its presets, with options of its own."""

    name: str
    preset: PresetName
    own: Mapping[str, Any] = field(default_factory=dict)
    has_ratio: bool = True
    needs_generation: ClassVar[bool] = False

    @property
    def needs_steps(self) -> bool:
        """See [`Method.needs_steps`]."""
        config = self._config({})
        keeps_something = config.reuse is not None or config.match_interval is not None
        return keeps_something or (config.is_scheduled and 0 < (config.agent_until or 0) < 1)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        # Options about what a method does not have, or has of its own, are for the others.
        fixed = {**PRESETS[self.preset], **self.own}
        foreign = set(self.own) | {name for name in (*_SCHEDULE, *_ONE_PHASE) if name in fixed}
        if not self._config({}).is_scheduled:
            foreign |= set(_SCHEDULE)
        elif "agent_until" in fixed:
            foreign |= set(_ONE_PHASE)
        if fixed.get("late_phase", "kv-merged") != "kv-merged":
            foreign.add("kv_ratio")
        options = {name: value for name, value in options.items() if name not in foreign}
        apply_patch(model, config=self._config(options if ratio is None else {**options, "ratio": ratio}))

    def with_options(self, name: str, options: Mapping[str, Any]) -> "AgentSD":
        """This method with more options of its own, under another name."""
        refuse_ratio(options)
        changed = replace(self, name=name, own={**self.own, **options})
        changed._config({})  # tells what is wrong with them
        return changed

    def _config(self, options: Mapping[str, Any]) -> AgentSDConfig:
        return AgentSDConfig.preset(self.preset, **{**options, **self.own})


@dataclass(frozen=True)
class Combined:
    """Several methods at once, switched on in this order."""

    name: str
    parts: tuple[Method, ...]

    @property
    def has_ratio(self) -> bool:
        """See [`Method.has_ratio`]."""
        return any(part.has_ratio for part in self.parts)

    @property
    def needs_steps(self) -> bool:
        """See [`Method.needs_steps`]."""
        return any(part.needs_steps for part in self.parts)

    @property
    def needs_generation(self) -> bool:
        """See [`Method.needs_generation`]."""
        return any(part.needs_generation for part in self.parts)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        for part in self.parts:
            part.apply(model, ratio, options)


@dataclass(frozen=True)
class OtherProcessor:
    """Another attention processor in each layer that agentsd patches."""

    name: str
    processor: type
    has_ratio: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = False
    needs_generation: ClassVar[bool] = False

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        layers = patchable_layers(model, options)
        if not layers:
            raise MethodUnavailable("this model has no self-attention that agentsd would patch")
        for layer in layers:
            layer.attn.set_processor(self.processor())


class AttentionFreeProcessor:
    """The attention-free reference: each token gets its own value, and what happens between tokens is left out."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run the layer.

        Args:
            attn (`Attention`): The layer.
            hidden_states (`torch.Tensor` of shape `(batch, tokens, channels)`): Its input.
            encoder_hidden_states (`torch.Tensor`, *optional*): Not used.
            attention_mask (`torch.Tensor`, *optional*): Not used.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`: `to_out(to_v(x))`.
        """
        out = attn.to_v(hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out


def patchable_layers(model: Any, options: Mapping[str, Any]) -> list[AttentionLayer]:
    """The layers that agentsd patches with these options, in the UNet and in ControlNets."""
    lowest = options.get("max_downsample", AgentSDConfig.max_downsample)
    return [
        layer
        for _, attended in attended_models(model)
        for layer in find_layers(attended)
        if 2**layer.level <= lowest
        and (
            isinstance(layer.attn.processor, AgentAttnProcessor)
            or unsupported_reason(layer.attn, layer.attn.processor) is None
        )
    ]


def is_fewer_steps(name: str) -> bool:
    """Whether a method is the baseline with fewer steps."""
    return isinstance(find_method(name), FewerSteps)


def is_calibrated(name: str) -> bool:
    """Whether how many steps a method takes is measured before it is timed."""
    method = find_method(name)
    return isinstance(method, FewerSteps) and method.share is None


def varies_by_device(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a method leaves other layers alone on a GPU than on a CPU, and so draws other images there."""
    method = find_method(name)
    parts = method.parts if isinstance(method, Combined) else (method,)
    return any(
        isinstance(part, AgentSD) and {**PRESETS[part.preset], **options, **part.own}.get("min_tokens") == "auto"
        for part in parts
    )


def refuse_ratio(options: Mapping[str, Any]) -> None:
    """Say where the share of tokens to merge is named, if it is among the options."""
    if "ratio" in options:
        raise ValueError("`ratio` is not one of the options: name it among the ratios (--ratio).")


def agent_share(options: Mapping[str, Any]) -> float | None:
    """The share of the noise range in which agentsd runs agents; `None` where one phase runs at all steps."""
    config = AgentSDConfig.from_dict(dict(options))
    return config.agent_until if config.is_scheduled else None


_ALL: tuple[Method, ...] = (
    Baseline(),
    NaiveAttention(),
    AgentSD("agentsd", "paper"),
    AgentSD("agentsd-agent", "agent"),
    AgentSD("agentsd-tome", "tome"),
    ToMeSD(),
    # ToDo's down-sampling is one of this library's techniques.
    AgentSD("todo", "paper", {"agent_until": 0, "late_phase": "kv-nearest"}, has_ratio=False),
    AgentSD("kv-mean", "paper", {"agent_until": 0, "late_phase": "kv-mean"}, has_ratio=False),
    AgentSD("kv-merged", "paper", {"agent_until": 0, "late_phase": "kv-merged"}, has_ratio=False),
    AgentSD("agentsd-kv", "paper", {"late_phase": "kv-mean"}),
    AgentSD("reuse-2", "paper", {"ratio": 0, "reuse": 2}, has_ratio=False),
    AgentSD("reuse-3", "paper", {"ratio": 0, "reuse": 3}, has_ratio=False),
    AgentSD("agentsd+reuse-2", "paper", {"reuse": 2}),
    AgentSD("agentsd+reuse-3", "paper", {"reuse": 3}),
    AgentSD("balanced", "balanced", has_ratio=False),
    AgentSD("fast", "fast", has_ratio=False),
    DeepCache("deepcache-2", 2),
    DeepCache(),
    DeepCache("deepcache-5", 5),
    Combined("agentsd+deepcache", (AgentSD("agentsd", "paper"), DeepCache())),
    HiDiffusion(),
    FewerSteps(),
    *(FewerSteps(f"fewer-steps-{percent}%", percent / 100) for percent in _STEP_PERCENT),
    OtherProcessor("attention-free", AttentionFreeProcessor),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """
    The method of a name; one of this library's may set options of its own, as in `agentsd:agent_until=0.2:k_scale2=1`.

    Args:
        name (`str`): A name from `METHODS`, with any number of `:OPTION=VALUE` behind it.

    Returns:
        `Method`: The method, which has the whole text for its name.

    Raises:
        ValueError: If there is no such method, it takes no options, or these are wrong.

    Examples:

    ```python
    >>> from agentsd.bench import find_method
    >>> find_method("agentsd-agent:agent_ratio=0.9").has_ratio
    True
    ```
    """
    known, *settings = name.split(":")
    if known not in METHODS:
        raise ValueError(f"There is no method {known!r}. Known: {', '.join(METHODS)}.")
    method = METHODS[known]
    if not settings:
        return method
    if not isinstance(method, AgentSD):
        raise ValueError(f"The method {known!r} takes no options, but got {name!r}.")
    try:
        return method.with_options(name, read_assignments(settings, "each of its options"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The method {name!r} cannot be run: {error}") from error
