"""What a patch does to each layer: tokens, agents and attention operations, before and after."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .config import AgentSDConfig
from .models.devices import device_of
from .models.unet import AttentionLayer, plain_name
from .operations import expected_speedup
from .patch import patchable_models
from .runtime.break_even import least_tokens
from .runtime.fallbacks import TOO_SMALL
from .runtime.install import ModelPatch, patch_of, replaced_reason
from .runtime.steps import Phase, running_phases
from .techniques.feature_reuse import FeatureReuseConfig


class TokenCounts(NamedTuple):
    """Tokens at a layer: all, those left after merging, keys, and agents (`None` for softmax attention)."""

    tokens: int
    merged: int
    keys: int
    agents: int | None
    # Pairs of tokens that are compared to match them.
    matched: int = 0


@dataclass(frozen=True)
class PhaseReport:
    """
    One layer in one phase.

    Args:
        merged_tokens (`int`): Tokens left after merging, each with a query.
        keys (`int`): Keys and values.
        agents (`int`, *optional*): Agent tokens, or `None` for softmax attention.
        attention_flops (`int`):
            Floating-point operations of the attention products and of the matching, for one sample, where the layer
            matches its tokens.
    """

    merged_tokens: int
    keys: int
    agents: int | None
    attention_flops: int


@dataclass(frozen=True)
class LayerReport:
    """
    One layer.

    Args:
        model (`str`): `"unet"`, or the name of the ControlNet.
        name (`str`): Name of the self-attention in its model.
        level (`int`): Down-samplings below the highest resolution that has attention.
        channels (`int`): Width of the layer.
        heads (`int`): Attention heads.
        skipped (`str`, *optional*): Why the layer is left alone.
        tokens (`int`, *optional*): Tokens, if the size is known.
        attention_flops (`int`, *optional*): Operations of the unpatched attention products, for one sample.
        phases (`dict[str, PhaseReport]`):
            By name of each phase that any step is in, if the size is known and the layer is patched: what runs, unless
            `fallbacks` says otherwise.
        fallbacks (`dict[str, str]`):
            Why parts of the block ran without agentsd when they last ran, or will: `"attn1"` (the self-attention),
            `"attn2"` and `"ff"`.
    """

    model: str
    name: str
    level: int
    channels: int
    heads: int
    skipped: str | None = None
    tokens: int | None = None
    attention_flops: int | None = None
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchReport:
    """
    What a patch does and, after a run, where it did not. Printing it gives a table.

    Args:
        config (`AgentSDConfig`): The configuration of the patch: the UNet's, if its ControlNets have others.
        rows (`list[LayerReport]`): One row per layer.
        reuse (`str`, *optional*):
            With feature reuse, which steps are full, what runs in the others, and how many were full in the last run.
        expected_speedup (`float`, *optional*):
            By how much the UNet's matrix products and convolutions get fewer over a long run, if the size is known:
            more than what is measured, since merging and the like take time too.
        matching (`str`, *optional*): Where matches are kept, in which steps tokens are matched, and for what layers.
        min_tokens (`int`):
            Layers of fewer tokens are left alone; what `config.min_tokens="auto"` is where the UNet runs.
        break_even (`int`):
            What `min_tokens="auto"` would be there. Patched layers of fewer tokens gain little time, or lose some.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji").pipe
    >>> agentsd.report(pipe, height=256, width=256).rows[0].phases["tome"].merged_tokens
    615
    ```
    """

    config: AgentSDConfig
    rows: list[LayerReport]
    reuse: str | None = None
    expected_speedup: float | None = None
    matching: str | None = None
    min_tokens: int = 0
    break_even: int = 0

    def to_dict(self) -> dict[str, Any]:
        """
        The report as plain values.

        Returns:
            `dict`: `config`, `rows`, `reuse`, `expected_speedup`, `matching`, `min_tokens` and `break_even`.

        Examples:

        ```python
        >>> from agentsd import AgentSDConfig, PatchReport
        >>> PatchReport(AgentSDConfig(), []).to_dict()["rows"]
        []
        ```
        """
        return asdict(self)

    def __str__(self) -> str:
        header = "layer level channels heads tokens phase merged keys agents".split()
        lines: list[list[Any]] = [[*header, "attention GFLOPs"]]
        for row in self.rows:
            layer = [f"{row.model}.{row.name}", row.level, row.channels, row.heads, _or_dash(row.tokens)]
            if row.skipped is not None:
                lines.append([*map(str, layer), f"skipped: {row.skipped}"])
                continue
            for name in row.phases or [phase.name for _, phase in running_phases(self.config.phases)]:
                # All phases of self-attention give way to one line.
                if "attn1" not in row.fallbacks:
                    lines.append([*map(str, layer), name, *_phase_cells(row, row.phases.get(name))])
                    layer = [""] * len(layer)
            for part, reason in row.fallbacks.items():
                lines.append([*map(str, layer), f"{part} runs without agentsd: {reason}"])
                layer = [""] * len(layer)
        # The last cell of a line that is shorter reaches over all that are left.
        columns = len(lines[0])
        widths = [max(len(line[i]) for line in lines if i < len(line) - (len(line) < columns)) for i in range(columns)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines]
        notes = [note for note in (self.matching, self.reuse) if note is not None]
        if self.expected_speedup is not None:
            expected = f"expected speed-up of a step by operations: {self.expected_speedup:.2f}x at most"
            merged = [(row.tokens, phase.keys) for row in self.rows for phase in row.phases.values()]
            if any(tokens is not None and keys < tokens < self.break_even for tokens, keys in merged):
                expected += (
                    f"; measured, layers of fewer than {self.break_even} tokens gain little or lose, "
                    'and `min_tokens="auto"` leaves them alone'
                )
            notes.append(expected)
        return "\n".join([*(line.rstrip() for line in text), *notes])


def report(pipe_or_unet: Any, height: int | None = None, width: int | None = None) -> PatchReport:
    """
    Report what the patch of a pipeline or model does to each layer and, after a run, where it did not run.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`): A patched pipeline or model.
        height (`int`, *optional*):
            Height of the image in pixels. Without height and width, the size of the last run is reported, if any.
        width (`int`, *optional*): Width of the image in pixels.

    Returns:
        `PatchReport`: One row for each layer that the patch covers or had to skip.

    Raises:
        TypeError: If it is neither a pipeline with a UNet nor a model.
        ValueError: If it is not patched, only one of `height` and `width` is given, or one is less than a token.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji").pipe
    >>> row = agentsd.report(pipe, height=256, width=256).rows[0]
    >>> row.tokens, row.phases["agent"].agents
    (1024, 64)
    ```
    """
    models = patchable_models(pipe_or_unet)
    patch = patch_of(models[0][1])
    if patch is None:
        raise ValueError("There is no patch to report. Call `agentsd.apply_patch` first.")
    if (height is None) != (width is None):
        raise ValueError("Give both `height` and `width`, or neither.")
    latent_size = None
    if height is not None and width is not None:
        # A model alone does not know its VAE; all Stable Diffusion VAEs reduce by 8.
        factor = getattr(pipe_or_unet, "vae_scale_factor", 8)
        if height < factor or width < factor:
            raise ValueError(f"`height` and `width` must be at least {factor}, but got {height} and {width}.")
        latent_size = (height // factor, width // factor)
    rows = []
    for name, model in models:
        model_patch = patch_of(model)
        if model_patch is not None:
            rows += _model_rows(name, model_patch, latent_size, device_of(model))
    unet = models[0][1]
    device = device_of(unet)
    least, break_even = least_tokens(patch.config.min_tokens, device), least_tokens("auto", device)
    size = latent_size or _last_size(patch)
    expected = None if size is None else expected_speedup(unet, patch, *size)
    reuse, matching = _reuse_text(unet, patch), _matching_text(patch.config)
    return PatchReport(patch.config, rows, reuse, expected, matching, least, break_even)


def _last_size(patch: ModelPatch) -> tuple[int, int] | None:
    """Height and width of the latents in the last run, if there was one."""
    for layer, state in patch.layers:
        if state.last_size is not None:
            height, width = state.last_size
            return height * 2**layer.depth, width * 2**layer.depth
    return None


def _matching_text(config: AgentSDConfig) -> str | None:
    interval, reuse, group = config.match_interval, config.reuse, config.share_matches
    if interval is None and group is None:
        return None
    is_every = interval in (None, 1)
    text = "matching: in every step" if is_every else f"matching: in 1 step of {interval}"
    only_whole = interval is not None and isinstance(reuse, FeatureReuseConfig) and reuse.interval > 1
    if only_whole:
        text += " that runs the whole UNet" if is_every else " that run the whole UNet"
    if group is not None:
        text += f", once for the layers of a {group}"
    return text if is_every and not only_whole else f"{text}; the others merge as it did"


def _reuse_text(unet: torch.nn.Module, patch: ModelPatch) -> str | None:
    if patch.reuse is None or not isinstance(patch.config.reuse, FeatureReuseConfig):
        return None
    config = patch.config.reuse
    if config.interval == 1:
        return "feature reuse: every step runs the whole UNet"
    calls, full_calls = patch.reuse[1].last_run
    last = f"; the whole UNet ran in {full_calls} of the {calls} calls of the last run" if calls else ""
    skipped = {inner for module in patch.reuse[0] for inner in module.modules()}
    # The largest modules of which nothing is skipped.
    running: list[str] = []
    for name, module in unet.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in running)
        if (
            name
            and not is_inside
            and skipped.isdisjoint(module.modules())
            and next(module.parameters(), None) is not None
        ):
            running.append(plain_name(name))
    done = "forecast" if config.order else "repeated"
    return (
        f"feature reuse: 1 step of {config.interval} runs the whole UNet, the first one included; the others run "
        f"{', '.join(running)}, and what these read of the rest is {done}{last}"
    )


def _model_rows(
    model: str, patch: ModelPatch, latent_size: tuple[int, int] | None, device: torch.device
) -> list[LayerReport]:
    rows = {}
    least = least_tokens(patch.config.min_tokens, device)
    for layer, reason in patch.skipped:
        row = _row(model, layer, reason)
        size = _layer_size(layer, latent_size)
        rows[layer.number] = row if size is None else _with_size(row, size)
    for layer, state in patch.layers:
        # What sizes do can be told from the numbers of tokens.
        fallbacks = {part: reason for part, reason in state.fallbacks if reason != TOO_SMALL}
        replaced = replaced_reason(layer)
        if replaced is not None:
            fallbacks["attn1"] = replaced
        row = replace(_row(model, layer, None), fallbacks=fallbacks)
        size = _layer_size(layer, latent_size) or state.last_size
        if size is not None and size[0] * size[1] < least:
            reason = f"it has {size[0] * size[1]} tokens, fewer than `min_tokens={least}`"
            if patch.config.min_tokens == "auto":
                reason += f', which is what "auto" is on {device.type}'
            row = replace(_with_size(row, size), skipped=reason)
        elif size is not None:
            phases = {phase.name: _phase_report(row, phase, size) for _, phase in running_phases(patch.config.phases)}
            row = replace(_with_size(row, size), phases=phases)
        rows[layer.number] = row
    return [rows[number] for number in sorted(rows)]


def _row(model: str, layer: AttentionLayer, skipped: str | None) -> LayerReport:
    return LayerReport(model, plain_name(layer.name), layer.level, layer.attn.inner_dim, layer.attn.heads, skipped)


def _layer_size(layer: AttentionLayer, latent_size: tuple[int, int] | None) -> tuple[int, int] | None:
    if latent_size is None:
        return None
    # Each down-sampling rounds up.
    return -(-latent_size[0] // 2**layer.depth), -(-latent_size[1] // 2**layer.depth)


def _with_size(row: LayerReport, size: tuple[int, int]) -> LayerReport:
    tokens = size[0] * size[1]
    return replace(row, tokens=tokens, attention_flops=4 * tokens**2 * row.channels)


def token_counts(phase: Phase, height: int, width: int) -> TokenCounts:
    """How many tokens self-attention runs on in one phase, at a layer of `height` by `width` tokens."""
    tokens, destinations = height * width, phase.cells.destinations(height, width)
    sources = tokens - destinations if destinations > 0 else 0
    technique = phase.tokens if phase.tokens is not None and phase.tokens.merge_attn else None
    removed = 0 if technique is None else technique.removed(tokens, sources)
    merged, operator = tokens - removed, phase.operator
    keys = merged if phase.keys is None else phase.keys.count((height, width), sources)
    for_keys = 0 if phase.keys is None else phase.keys.removed(tokens, sources)
    if removed == for_keys == 0:
        return TokenCounts(tokens, tokens, keys, None)
    has_agents = operator is not None and operator.pays(tokens, sources, merged)
    agents = tokens - operator.removed(tokens, sources) if operator and has_agents else None
    return TokenCounts(tokens, merged, keys, agents, matched=sources * destinations)


def _phase_report(row: LayerReport, phase: Phase, size: tuple[int, int]) -> PhaseReport:
    counts = token_counts(phase, *size)
    return PhaseReport(counts.merged, counts.keys, counts.agents, attention_flops(counts, row.channels))


def attention_flops(counts: TokenCounts, channels: int) -> int:
    """Floating-point operations of the attention products and of the matching, for one sample."""
    attended = 2 * counts.agents if counts.agents is not None else counts.keys
    return 2 * counts.matched * channels + 4 * counts.merged * attended * channels


def _phase_cells(row: LayerReport, phase: PhaseReport | None) -> list[str]:
    if phase is None or row.attention_flops is None:
        return ["-", "-", "-", "-"]
    flops = f"{row.attention_flops / 1e9:.3g} -> {phase.attention_flops / 1e9:.3g}"
    return [str(phase.merged_tokens), str(phase.keys), _or_dash(phase.agents), flops]


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
