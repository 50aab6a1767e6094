"""A patched model cannot be traced: what its layers do is decided in Python at every step."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.fx.experimental.proxy_tensor import get_proxy_mode


Function = TypeVar("Function", bound=Callable[..., Any])

_WHY_NOT = (
    "agentsd decides at every step what its layers do, and this would keep one decision for all: remove the patch "
    "first, with `agentsd.remove_patch`"
)


def refuse_tracing(module: torch.nn.Module) -> None:
    """Refuse to run a module in an export, a trace or a `vmap`."""
    # `torch.compile` runs what must not be traced outside its graphs.
    if torch.compiler.is_dynamo_compiling():
        return
    if torch.jit.is_tracing():
        what = "torch.jit.trace"
    elif torch.compiler.is_compiling() or get_proxy_mode() is not None:
        what = "torch.export"
    elif any(transform.key() == TransformType.Vmap for transform in retrieve_all_functorch_interpreters()):
        what = "torch.vmap"
    else:
        return
    raise RuntimeError(f"{what} does not work with a patched {type(module).__name__}: {_WHY_NOT}.")


def outside_graphs(function: Function) -> Function:
    """Have `torch.compile` call a function instead of tracing it; where that is forbidden, torch says why."""
    # In its strict mode `torch.export` reads code instead of running it, and never meets `refuse_tracing`.
    try:
        return torch.compiler.disable(function, reason=_WHY_NOT)
    except TypeError:  # before torch 2.8 there is no `reason`
        return torch.compiler.disable(function)
