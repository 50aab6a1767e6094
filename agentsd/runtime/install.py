"""The patch of a model: its hooks, how they are put in, and how they are taken out again."""

import warnings
from copy import copy
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.hooks import RemovableHandle

from ..models.unet import AttentionLayer, plain_name, unwrap
from ..ops.partitioning import mix_key
from .fallbacks import REPLACED, message, replaced_by
from .matching import Matching
from .processor import AgentAttnProcessor
from .resets import listen_to_resets, stop_listening
from .state import LayerState
from .steps import Clock, StepContext
from .threads import CallsInThreads
from .tracing import outside_graphs, refuse_tracing


class ModelTechnique(Protocol):
    """The role of a technique by which whole modules are skipped in some calls of a model."""

    # Of the last image, how many calls there were, and in how many everything ran.
    last_run: tuple[int, int]

    def install(self, modules: list[torch.nn.Module]) -> None:
        """Make modules skippable."""

    def uninstall(self, modules: list[torch.nn.Module]) -> None:
        """Undo it."""

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code has run any of them."""

    def check(self, modules: list[torch.nn.Module]) -> None:
        """Refuse what has been put into the model since and does the same."""

    def begin_call(self, timestep: torch.Tensor | float, values: list[float], sample: torch.Tensor) -> bool:
        """A call of the model begins; whether they are skipped in it."""

    def end_call(self) -> None:
        """It has ended."""

    def reset(self) -> None:
        """Keep nothing of the calls before: the next one is the first of an image."""

    def repeat_warnings(self) -> None:
        """Say again what was said once."""


class ModelPatch:
    """
    The patch of one model: its configuration, its clock and its layers.

    It is a plain object, so that a copied or pickled model takes along its own.

    Args:
        config (`AgentSDConfig`): The configuration.
        clock (`Clock`): Where in the denoising run the model is.
    """

    def __init__(self, config: Any, clock: Clock):
        self.config = config
        self.clock = clock
        # The layers that it patches, and those that it had to leave alone, with the reason.
        self.layers: list[tuple[AttentionLayer, LayerState]] = []
        self.skipped: list[tuple[AttentionLayer, str]] = []
        # What keeps the layers' matches, from step to step or for each other.
        self.matching: Matching | None = None
        # The modules that are skipped, and what skips them.
        self.reuse: tuple[list[torch.nn.Module], ModelTechnique] | None = None
        self.threads = CallsInThreads()
        self.handles: list[RemovableHandle] = []
        self.warned: set[str] = set()

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code has run any layer of the model."""
        is_reuse_compiled = self.reuse is not None and self.reuse[1].is_compiled
        return is_reuse_compiled or any(state.calls.is_compiled for _, state in self.layers)

    # The timestep is read on the host: a compiled model is told only the phase, so that it has one graph a phase.
    @outside_graphs
    def before_model(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell the clock of the step that begins."""
        refuse_tracing(model)
        if self.reuse is not None:
            if getattr(model, "_is_replica", False):
                raise RuntimeError(
                    "Feature reuse does not run in the copies that DataParallel makes of a model. Use "
                    "DistributedDataParallel, with one process per GPU, or leave out `reuse`."
                )
            self.reuse[1].check([model, *self.reuse[0]])
        self.threads.begin(self.is_compiled)
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timesteps = self.clock.begin_step(timestep, sample.device)
        for _, state in self.layers:
            state.calls.share()
        is_skipped = self.reuse is not None and self.reuse[1].begin_call(timestep, timesteps, sample)
        if self.matching is not None:
            signature = (sample.shape, sample.dtype, sample.device, self.clock.step.phases)
            states = [state for _, state in self.layers]
            self.matching.begin_call(timestep, timesteps, signature, is_skipped, states)
        for layer, state in self.layers:
            state.fallbacks.attn1 = replaced_reason(layer) or state.fallbacks.attn1
        self._warn_if_unreadable(timesteps)

    @torch.compiler.disable
    def after_model(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        """The call has ended."""
        self.clock.end_step()
        if self.reuse is not None:
            self.reuse[1].end_call()
        if self.matching is not None:
            # There is no output after an exception.
            self.matching.end_call([state for _, state in self.layers], keep=output is not None)
        self.threads.end(self.is_compiled and output is not None)
        self._warn_of_fallbacks()

    def reset(self) -> None:
        """Begin a new image with the next call of this thread."""
        if self.reuse is not None:
            self.reuse[1].reset()
        if self.matching is not None:
            self.matching.reset()

    def _warn_of_fallbacks(self) -> None:
        names: dict[str, list[str]] = {}
        for layer, state in self.layers:
            if state.fallbacks.is_empty:
                continue
            state.fallbacks.find_causes(layer.block)
            for part, reason in state.fallbacks:
                names.setdefault(reason, []).append(plain_name(layer.name).removesuffix("attn1") + part)
        for reason in names:
            self._warn_once(reason, message(names[reason], reason))

    def _warn_if_unreadable(self, timesteps: list[float]) -> None:
        phases = self.clock.phases
        # The last steps of a schedule tell, whose noise levels are below 1: no other kind of timestep is negative.
        if len(phases) > 1 and phases[0].until > 0 and min(timesteps) < 0:
            self._warn_once(
                "unreadable",
                "The scheduler's timesteps are logarithms of noise levels, not positions in its range of timesteps "
                f'(this one is {min(timesteps):.3g}), so no step is in the phase "{phases[0].name}". Call '
                "`agentsd.apply_patch` with a preset that does the same at every step, such as "
                '`config=AgentSDConfig.preset("agent")` or `"tome"`.',
            )

    def repeat_warnings(self) -> None:
        """Say again, in the calls to come, what was said once."""
        self.warned.clear()
        if self.reuse is not None:
            self.reuse[1].repeat_warnings()

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self.warned:
            self.warned.add(topic)
            warnings.warn(message, stacklevel=2)


class StepKwargs(dict):
    """
    The `cross_attention_kwargs` of checkpointed blocks, with each layer's size, step and key.

    Such a block runs again in the backward pass, when the model may have gone on to other steps.
    """

    steps: dict[LayerState, tuple[tuple[int, int], StepContext, torch.Tensor | None]]


class LayerHooks:
    """What tells a layer's state of the call that runs."""

    def __init__(self, state: LayerState):
        self.state = state

    def before_transformer(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the step, and height and width, which the blocks inside no longer see."""
        state, call = self.state, self.state.call
        # The model has asked already, unless this is all of it that runs.
        if not (torch.compiler.is_dynamo_compiling() or state.clock.is_running):
            refuse_tracing(transformer)
            state.clock.warn_outside_call()
        x = args[0] if args else kwargs["hidden_states"]
        height, width = x.shape[-2:]
        call.size, call.step = (height, width), state.clock.step
        state.last_size = call.size
        # Here and not in the block, for blocks that differ in a number would each be compiled on their own.
        key = None if state.leaves_alone(height * width, x.device) else call.step.key
        call.key = None if key is None else mix_key(key, state.seed)
        if not (transformer.gradient_checkpointing and torch.is_grad_enabled()):
            return None
        # Those of the transformer's other blocks are in it already, and empty but for their steps.
        given = kwargs.get("cross_attention_kwargs")
        carried = StepKwargs({} if given is None else given)
        carried.steps = {**getattr(given, "steps", {}), state: (call.size, call.step, call.key)}
        return args, {**kwargs, "cross_attention_kwargs": carried}

    def before_block(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the metric: the block's input before its normalisation."""
        state, call = self.state, self.state.call
        call.leave_block()
        # Checkpointing passes them by position.
        carried = args[5] if len(args) > 5 else kwargs.get("cross_attention_kwargs")
        if isinstance(carried, StepKwargs):
            call.size, call.step, call.key = carried.steps[state]
        elif not torch.compiler.is_compiling() and state.clock.is_elsewhere:
            last = state.calls.shared
            call.size, call.step, call.key = last.size, last.step, last.key
        # Where something has replaced the processor, the whole block is as without agentsd.
        if not isinstance(block.attn1.processor, AgentAttnProcessor):
            call.is_replaced = True
            return None
        x = args[0] if args else kwargs["hidden_states"]
        # Behind a convolution the tokens are a transposed view, which each use in the block would copy once more. A
        # compiled block reads it in place, and would need one more graph for another layout.
        call.metric = x if torch.compiler.is_compiling() else x.contiguous()
        return ((call.metric, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": call.metric})

    def after_block(self, block: torch.nn.Module, args: tuple, output: Any) -> None:
        """Let go of the activations."""
        self.state.call.leave_block()


def patch_of(model: torch.nn.Module) -> ModelPatch | None:
    """The patch of an unwrapped model."""
    return getattr(model, "agentsd_patch", None)


def original_processor(attn: Any) -> Any:
    """The processor of a layer without the patch."""
    if isinstance(attn.processor, AgentAttnProcessor):
        state = getattr(attn, "agentsd_layer", None)
        # Without its state, it is one that somebody kept and put back after the patch was removed.
        return AttnProcessor2_0() if state is None else state.original
    return attn.processor


def replaced_reason(layer: AttentionLayer) -> str | None:
    """Why a patched layer runs without agentsd if its processor, or the whole of it, is another's by now."""
    attn = unwrap(layer.block.attn1)
    if attn is not layer.attn:
        return REPLACED
    return None if isinstance(attn.processor, AgentAttnProcessor) else replaced_by(attn.processor)


def replace_patches(wanted: list[tuple[torch.nn.Module, ModelPatch]]) -> None:
    """Give every model the patch wanted; put all back as they were if that fails."""
    before = [Snapshot(model) for model, _ in wanted]
    try:
        for (model, patch), snapshot in zip(wanted, before, strict=True):
            # A copy of the processor that an older patch had here keeps the attention backend that was set on it.
            ours = {layer.attn: p for layer, p in snapshot.processors if isinstance(p, AgentAttnProcessor)}
            processors = [copy(ours.get(layer.attn, AgentAttnProcessor())) for layer, _ in patch.layers]
            uninstall(model)
            install(model, patch, processors)
    except BaseException:
        for snapshot in before:
            snapshot.restore()
        raise


def install(model: torch.nn.Module, patch: ModelPatch, processors: list[Any]) -> None:
    """Hook a patch into its model, and give its layers their processors."""
    model.agentsd_patch = patch  # type: ignore[assignment]
    patch.handles.append(model.register_forward_pre_hook(patch.before_model, with_kwargs=True))
    patch.handles.append(model.register_forward_hook(patch.after_model, always_call=True))
    if patch.reuse is not None:
        modules, technique = patch.reuse
        technique.install(modules)
    if patch.reuse is not None or patch.matching is not None:
        listen_to_resets(model, patch.reset)
    mergings = {phase.tokens for phase in patch.clock.phases if phase.tokens is not None}
    for (layer, state), processor in zip(patch.layers, processors, strict=True):
        if state.original is None:
            state.original = original_processor(layer.attn)
        hooks = LayerHooks(state)
        layer.attn.agentsd_layer = state
        layer.attn.set_processor(processor)
        # Noted one by one, so that a failure on the way can be undone.
        handles = state.handles
        handles.append(layer.transformer.register_forward_pre_hook(hooks.before_transformer, with_kwargs=True))
        handles.append(layer.block.register_forward_pre_hook(hooks.before_block, with_kwargs=True))
        # Also after an exception, which stops what checkpointing computes anew at every backward pass.
        handles.append(layer.block.register_forward_hook(hooks.after_block, always_call=True))
        for merging in mergings:
            handles.extend(merging.hook(layer, state))


def uninstall(model: torch.nn.Module) -> None:
    """Take a model's patch out, and give back the original processors where ours are still in place."""
    patch = patch_of(model)
    if patch is None:
        return
    kept = _kept_processors(model)
    for layer, state in patch.layers:
        attn = layer.attn
        # Not where a patch could be put in only in part.
        if getattr(attn, "agentsd_layer", None) is not state:
            continue
        if isinstance(attn.processor, AgentAttnProcessor):
            attn.set_processor(state.original)
        del attn.agentsd_layer
        for handle in state.handles:
            handle.remove()
        state.handles.clear()
    originals = {_processor_name(layer): state.original for layer, state in patch.layers}
    for name, processor in kept.items():
        if isinstance(processor, AgentAttnProcessor) and plain_name(name) in originals:
            kept[name] = originals[plain_name(name)]
    if patch.reuse is not None:
        modules, technique = patch.reuse
        technique.uninstall(modules)
    if patch.matching is not None:
        patch.matching.forget()
    stop_listening(model)
    del model.agentsd_patch
    for handle in patch.handles:
        handle.remove()
    patch.handles.clear()


class Snapshot:
    """A model as it is, patched or not, for what a patch changes in it to be put back exactly."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.patch = patch_of(model)
        self.processors = [(layer, layer.attn.processor) for layer, _ in self.patch.layers] if self.patch else []
        self.kept = dict(_kept_processors(model))

    def restore(self) -> None:
        """Put it back. What has been replaced since by another processor than the patch's stays so."""
        uninstall(self.model)
        if self.patch is None:
            return
        processors = [
            processor if layer.attn.processor is state.original else layer.attn.processor
            for (layer, state), (_, processor) in zip(self.patch.layers, self.processors, strict=True)
        ]
        install(self.model, self.patch, processors)
        kept = _kept_processors(self.model)
        known = {
            _processor_name(layer): (state.original, processor)
            for (layer, state), (_, processor) in zip(self.patch.layers, self.processors, strict=True)
        }
        for name, processor in kept.items():
            original, ours = known.get(plain_name(name), (None, None))
            if processor is original:
                kept[name] = self.kept.get(name, ours)


def _kept_processors(model: torch.nn.Module) -> dict[str, Any]:
    """What `fuse_qkv_projections` will give back when undone."""
    return getattr(model, "original_attn_processors", None) or {}


def _processor_name(layer: AttentionLayer) -> str:
    return f"{plain_name(layer.name)}.processor"
