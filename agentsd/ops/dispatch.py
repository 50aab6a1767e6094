"""Whether tensors go to the Triton kernels of `kernels.py` or to the functions of torch."""

from functools import cache
from importlib.util import find_spec

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad


# The oldest GPUs that Triton supports.
_KERNEL_CAPABILITY = (8, 0)


def has_kernels(x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)) -> bool:
    """Whether there are kernels for a tensor; they know no derivatives and no `vmap`."""
    return (
        x.device.type == "cuda"
        and x.dtype in dtypes
        # What `torch.compile` makes of the functions of torch has as few launches, and was faster on an H100.
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and forward_ad._current_level < 0
        and peek_interpreter_stack() is None
        and _register_kernels(x.device)
    )


@cache
def _register_kernels(device: torch.device) -> bool:
    """Whether Triton works on a device; if so, the kernels are operators of torch from then on."""
    # Fake tensors may be on a GPU that is not there.
    if find_spec("triton") is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < _KERNEL_CAPABILITY:
        return False
    from triton.runtime import driver

    try:
        # Builds what Triton talks to the GPU with: that needs a C compiler and Python's headers, which not all have.
        backend = driver.active.get_current_target().backend
    except Exception:
        return False
    if backend != "cuda":
        return False
    from . import operators  # noqa: F401

    return True
