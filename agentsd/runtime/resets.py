"""Lets diffusers' `reset_stateful_hooks` reach what a patch keeps from step to step."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.hooks import HookFunctionReference, HookRegistry, ModelHook


_NAME = "agentsd"


class ResetHook(ModelHook):
    """Listens to resets, and to nothing else."""

    _is_stateful = True

    def __init__(self, reset: Callable[[], None]):
        super().__init__()
        self.reset = reset

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """See `ModelHook`."""
        self.reset()
        return module


def listen_to_resets(model: Any, reset: Callable[[], None]) -> None:
    """Call `reset` whenever diffusers resets the stateful hooks of a model."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    # Not by `register_hook`, which puts a function around the model's forward that no copy could take along. In the
    # first place, it is in the chain of no other hook.
    registry.hooks[_NAME] = ResetHook(reset)
    registry._hook_order.insert(0, _NAME)
    registry._fn_refs.insert(0, HookFunctionReference())


def stop_listening(model: Any) -> None:
    """Undo it. A registry that has nothing left is taken away, too."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is None or _NAME not in registry.hooks:
        return
    place = registry._hook_order.index(_NAME)
    for kept in (registry._hook_order, registry._fn_refs):
        kept.pop(place)
    del registry.hooks[_NAME]
    if not registry.hooks:
        del model._diffusers_hook
