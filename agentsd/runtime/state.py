"""The thin layer between a diffusers model and the mathematics: what its hooks remember, and when they merge."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..config import AgentSDConfig, Phase
from ..models.unet import AttentionLayer, inner_hooks, patched_layers
from ..ops.merging import (
    Matches,
    Merging,
    Partition,
    cell_grid,
    match_tokens,
    merge_tokens,
    mix_key,
    partition_tokens,
    plan_merging,
    random_members,
    unmerge_tokens,
)
from .processor import AgentAttnProcessor
from .steps import TimestepReader, phase_at, timestep_key


@dataclass
class TokenPlan:
    """
    What is merged in a block.

    Args:
        partition (`Partition`): Destinations and sources.
        matches (`Matches`): The nearest destination of every source.
        merging (`Merging`): The merging of the tokens.
        agent_count (`int`, *optional*): Sources to merge away to leave the agents; `None` for softmax attention.
    """

    partition: Partition
    matches: Matches
    merging: Merging
    agent_count: int | None


@dataclass
class RowPlan:
    """
    What is merged in those samples of a batch that are in the same phase.

    Args:
        rows (`torch.Tensor`, *optional*): Their indices; `None` for the whole batch.
        tokens (`TokenPlan`, *optional*): What is merged; `None` where these samples are left alone.
    """

    rows: torch.Tensor | None
    tokens: TokenPlan | None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """These samples of a batch."""
        return x if self.rows is None else x[self.rows]


class StepKwargs(dict):
    """
    The `cross_attention_kwargs` of checkpointed blocks, with each one's size, phases and key in its own step.

    Such a block runs again in the backward pass, when the model may have gone on to other steps.
    """

    steps: "dict[SitePatch, tuple[tuple[int, int], list[Phase], torch.Tensor | None]]"


class ModelPatch:
    """
    The patch of one model: its configuration, and where in the denoising run it is.

    It and its sites are plain objects, so that a copied or pickled model takes along its own.

    Args:
        config (`AgentSDConfig`): The configuration.
        num_train_timesteps (`int`): Length of the scheduler's range of timesteps.
        skipped (`dict[str, str]`): Layers that could not be patched, and why.
    """

    def __init__(self, config: AgentSDConfig, num_train_timesteps: int, skipped: dict[str, str]):
        self.config = config
        self.num_train_timesteps = num_train_timesteps
        self.skipped = skipped
        # The patched layers, looked for at the first step: the only modules it knows, and not in a copy.
        self.layers: list[Any] | None = None
        self.handle: RemovableHandle | None = None
        self.warned: set[str] = set()
        self.reader = TimestepReader()
        # One phase and one key for the whole batch, or one a sample where the samples are at different timesteps.
        self.phases: list[Phase] = [config.tome_phase]
        self.key: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "key": None, "layers": None}

    def install(self, model: torch.nn.Module) -> None:
        """Hook into the model."""
        model.agentsd_patch = self  # type: ignore[assignment]
        self.handle = model.register_forward_pre_hook(self.before_model, with_kwargs=True)

    def uninstall(self, model: torch.nn.Module) -> None:
        """Unhook from the model."""
        del model.agentsd_patch
        if self.handle is not None:
            self.handle.remove()

    # The timestep is read on the host: a compiled model is told only the phase, so that it has one graph a phase.
    @torch.compiler.disable
    def before_model(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the phase of the step that begins."""
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        values = self.reader.read(timestep)
        key = timestep_key(timestep, sample.device)
        if len(set(values)) == 1:
            values, key = values[:1], key[:1]
        self.phases = [phase_at(value, self.num_train_timesteps, self.config) for value in values]
        self.key = key
        self._warn_if_replaced(model)
        self._warn_if_unreadable(values)

    def _warn_if_replaced(self, model: torch.nn.Module) -> None:
        if "replaced" in self.warned:
            return
        if self.layers is None:
            self.layers = [site.attn for site in patched_layers(model)]
        processors = [attn.processor for attn in self.layers]
        replaced = {type(processor) for processor in processors if not isinstance(processor, AgentAttnProcessor)}
        if replaced:
            names = ", ".join(sorted(kind.__name__ for kind in replaced))
            self._warn_once(
                "replaced",
                f"The attention processors of patched layers were replaced by {names}: those layers now run without "
                "agentsd. Undo what replaced them, or call `agentsd.apply_patch` again afterwards.",
            )

    def _warn_if_unreadable(self, timesteps: list[float]) -> None:
        # The last steps of a schedule tell, whose noise levels are below 1: no other kind of timestep is negative.
        if self.config.is_scheduled and self.config.agent_until > 0 and min(timesteps) < 0:
            self._warn_once(
                "unreadable",
                "The scheduler's timesteps are logarithms of noise levels, not positions in its range of timesteps "
                f"(this one is {min(timesteps):.3g}), so no step runs agents. For agents at every step, call "
                '`agentsd.apply_patch` with `config=AgentSDConfig.preset("agent")`; for none, without this warning, '
                "with `agent_until=0`.",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self.warned:
            self.warned.add(topic)
            warnings.warn(message, stacklevel=2)


class SitePatch:
    """
    The patch of one self-attention layer: its original processor and, while its block runs, what is merged there.

    Args:
        patch (`ModelPatch`): The patch of the model.
        layer (`int`): The layer's number in the model, which its random choices vary with.
        original: The layer's processor before patching.
    """

    def __init__(self, patch: ModelPatch, layer: int, original: Any):
        self.patch = patch
        self.config = patch.config
        self.original = original
        self.merges = (self.config.merge_attn, self.config.merge_crossattn, self.config.merge_mlp)
        self.seed = (self.config.seed * 0x9E3779B1 + layer) & 0xFFFFFFFF
        self.size: tuple[int, int] | None = None
        self.phases: list[Phase] = []
        self.key: torch.Tensor | None = None
        self.metric: torch.Tensor | None = None
        self.current: list[RowPlan] | None = None
        self.handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "key": None, "metric": None, "current": None}

    def install(self, site: AttentionLayer, processor: Any) -> None:
        """Hook into the layer and its surroundings, and give it a processor."""
        site.attn.agentsd_site = self
        site.attn.set_processor(processor)
        # Noted one by one, so that a failure on the way can be undone.
        self.handles.append(site.transformer.register_forward_pre_hook(self.before_transformer, with_kwargs=True))
        self.handles.append(site.block.register_forward_pre_hook(self.before_block, with_kwargs=True))
        # Also after an exception, which stops what checkpointing computes anew at every backward pass.
        self.handles.append(site.block.register_forward_hook(self.after_block, always_call=True))
        layers = []
        if self.config.merge_crossattn and site.block.attn2 is not None:
            layers.append(site.block.attn2)
        if self.config.merge_mlp:
            layers.append(site.block.ff)
        for layer in layers:
            merged = MergedLayer(self)
            self.handles.append(layer.register_forward_pre_hook(merged.before_layer, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(merged.after_layer, always_call=True))

    def uninstall(self, site: AttentionLayer) -> None:
        """Unhook, and give back the original processor where ours is still in place."""
        if isinstance(site.attn.processor, AgentAttnProcessor):
            site.attn.set_processor(self.original)
        del site.attn.agentsd_site
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def before_transformer(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the step, and height and width, which the blocks inside no longer see."""
        height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
        self.size, self.phases = (height, width), self.patch.phases
        # Here and not in the block, for blocks that differ in a number would each be compiled on their own.
        self.key = None if self.patch.key is None else mix_key(self.patch.key, self.seed)
        if not (transformer.gradient_checkpointing and torch.is_grad_enabled()):
            return None
        # Those of the transformer's other blocks are in it already, and empty but for their steps.
        given = kwargs.get("cross_attention_kwargs")
        carried = StepKwargs({} if given is None else given)
        carried.steps = {**getattr(given, "steps", {}), self: (self.size, self.phases, self.key)}
        return args, {**kwargs, "cross_attention_kwargs": carried}

    def before_block(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the metric: the block's input before its normalisation."""
        self.metric = self.current = None
        # Checkpointing passes them by position.
        carried = args[5] if len(args) > 5 else kwargs.get("cross_attention_kwargs")
        if isinstance(carried, StepKwargs):
            self.size, self.phases, self.key = carried.steps[self]
        # Where something has replaced the processor, the whole block is as without agentsd.
        if not isinstance(block.attn1.processor, AgentAttnProcessor):
            return None
        x = args[0] if args else kwargs["hidden_states"]
        # Behind a convolution the tokens are a transposed view, which each use in the block would copy once more. A
        # compiled block reads it in place, and would need one more graph for another layout.
        self.metric = x if torch.compiler.is_compiling() else x.contiguous()
        return ((self.metric, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.metric})

    def after_block(self, block: torch.nn.Module, args: tuple, output: Any) -> None:
        """Let go of the activations."""
        self.metric = None
        self.current = None

    def plans(self, x: torch.Tensor) -> list[RowPlan] | None:
        """
        What to merge in `x`, decided once a block.

        Args:
            x (`torch.Tensor` of shape `(batch, tokens, channels)`): The input of a layer in the block.

        Returns:
            `list[RowPlan]`, *optional*: One plan for each phase in the batch, or `None` if nothing is to be merged.
        """
        # Compiled code does not notice that hooks were put in or taken out, but it does notice another value here.
        if self.merges == (False, False, False):
            return None
        if self.metric is None or self.size is None or self.key is None or x.shape[:2] != self.metric.shape[:2]:
            return None
        if x.shape[1] != self.size[0] * self.size[1]:
            return None
        if self.current is None:
            self.current = self._make_plans(self.metric, self.key.to(self.metric.device))
        return None if all(plan.tokens is None for plan in self.current) else self.current

    def _make_plans(self, metric: torch.Tensor, key: torch.Tensor) -> list[RowPlan]:
        phases = self.phases
        if len(phases) == 1:
            return [self._make_plan(metric, key, phases[0], None)]
        # A video model has several frames a sample, one after another.
        frames = metric.shape[0] // len(phases)
        of_row = [phase for phase in phases for _ in range(frames)]
        key = key.repeat_interleave(frames)
        plans = []
        for phase in dict.fromkeys(phases):
            rows = torch.tensor([row for row, other in enumerate(of_row) if other == phase], device=metric.device)
            plans.append(self._make_plan(metric[rows], key[rows], phase, rows))
        return plans

    def _make_plan(self, metric: torch.Tensor, key: torch.Tensor, phase: Phase, rows: torch.Tensor | None) -> RowPlan:
        height, width = self.size or (0, 0)
        counts = phase.token_counts(height, width)
        if counts.merged == counts.tokens:
            return RowPlan(rows, None)
        cells, leftover = cell_grid(height, width, phase.sx, phase.sy, metric.device)
        member = None
        if self.config.use_rand:
            member = random_members(counts.destinations, phase.sx * phase.sy, key)
        partition = partition_tokens(cells, leftover, member)
        matches = match_tokens(metric, partition)
        merging = plan_merging(partition, matches, counts.tokens - counts.merged)
        # Agents are for self-attention alone.
        agents = counts.agents if self.config.merge_attn else None
        agent_count = None if agents is None else counts.tokens - agents
        return RowPlan(rows, TokenPlan(partition, matches, merging, agent_count))

    @staticmethod
    def join(parts: list[torch.Tensor], plans: list[RowPlan]) -> torch.Tensor:
        """Put samples that were handled phase by phase back into the order of the batch."""
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([plan.rows for plan in plans if plan.rows is not None])
        return torch.cat(parts)[order.argsort()]


class MergedLayer:
    """
    Merges the tokens that enter a layer and unmerges those that leave it.

    Args:
        site (`SitePatch`): The patch of the block's self-attention, which knows what to merge.
    """

    def __init__(self, site: SitePatch):
        self.site = site
        self.plans: list[RowPlan] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": None}

    def before_layer(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Merge the layer's input."""
        self.plans = None
        x = args[0] if args else kwargs["hidden_states"]
        plans = self.site.plans(x)
        # A layer takes one tensor: samples in different phases only fit into it if as many tokens are left of each.
        if plans is None or len({plan.tokens and plan.tokens.merging.members.shape[1] for plan in plans}) > 1:
            return None
        # A cache inside the layer gives back what an older step computed, in that step's order of tokens.
        if any(hook._is_stateful for hook in inner_hooks(layer)):
            return None
        if kwargs.get("ip_adapter_masks") is not None:
            raise ValueError(
                "`merge_crossattn` cannot be combined with IP-Adapter masks, which apply to unmerged tokens. "
                "Call `agentsd.apply_patch` with `merge_crossattn=False`."
            )
        self.plans = plans
        merged = self.site.join([merge_tokens(p.take(x), p.tokens.merging) for p in plans if p.tokens], plans)
        return ((merged, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": merged})

    def after_layer(self, layer: torch.nn.Module, args: tuple, output: torch.Tensor | None) -> torch.Tensor | None:
        """Unmerge the layer's output."""
        plans, self.plans = self.plans, None
        # There is no output after an exception.
        if plans is None or output is None:
            return None
        return self.site.join([unmerge_tokens(p.take(output), p.tokens.merging) for p in plans if p.tokens], plans)
