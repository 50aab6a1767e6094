"""
A device without hardware: its tensors lie in ordinary memory, but must not meet those of the CPU, as on a GPU.

Run as a script, in a process of its own, since a device stays known to torch: it compares what patched models compute
there with what they compute on the CPU, and prints it as JSON.
"""

import json
from typing import ClassVar

import torch
from models import tiny_unet
from runs import EARLY, LATE, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from agentsd import report
from agentsd.bench import METHODS


NAME = "pretend"


class PretendTensor(torch.Tensor):
    """A tensor there, which holds the one that does the work."""

    @staticmethod
    def __new__(cls, held):
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **options, device=f"{NAME}:0")

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `PretendDevice`")

    def tolist(self):
        """Torch itself reads no values of a tensor of another class."""
        PretendDevice.reads.append("tolist")
        return self.held.tolist()


class PretendDevice(TorchDispatchMode):
    """While it is entered, the device works. It notes what is read from there, for which a GPU would be waited for."""

    reads: ClassVar[list[str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        are_there = [isinstance(tensor, PretendTensor) for tensor in tensors]
        target = kwargs.get("device")
        stays = any(are_there) if target is None else torch.device(target).type == NAME
        is_copy = name in ("_to_copy", "copy_")
        if any(are_there) and not is_copy and any(tensor.ndim for tensor in tensors if tensor.device.type == "cpu"):
            raise RuntimeError(f"{name} meets tensors of two devices")
        if any(are_there) and (name in ("_local_scalar_dense", "nonzero") or (is_copy and not stays)):
            self.reads.append(name)
        if target is not None:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(PretendTensor, lambda tensor: tensor.held, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, PretendTensor, result) if stays else result


class BackendModule(_DummyBackendModule):
    """What torch asks the module of a device for."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device):
        return torch.empty(0)

    def set_rng_state(self, state, device):
        pass


def move(module):
    """Put weights there; `Module.to` does so only for tensors of torch's own class."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(PretendTensor(weight.detach()))
        for name, buffer in part._buffers.items():
            part._buffers[name] = PretendTensor(buffer)
    return module


def distance(one, other):
    return float((one - other).norm() / other.norm())


def compare(method, timesteps, **options):
    """How far the method's prediction there is from that on the CPU, the same of a gradient, and what was read."""
    here, there = tiny_unet(), tiny_unet()
    sample, text = inputs(here, height=17, width=24)
    with torch.no_grad():
        plain = here(sample, torch.tensor(timesteps), text).sample
    METHODS[method].apply(here, 0.4, options)
    expected = here(sample, torch.tensor(timesteps), text).sample
    expected.square().sum().backward()
    METHODS[method].apply(there, 0.4, options)
    with PretendDevice():
        move(there)
        PretendDevice.reads.clear()
        # One number, or one a sample.
        given = timesteps if isinstance(timesteps, int) else PretendTensor(torch.tensor(timesteps))
        result = there(PretendTensor(sample), given, PretendTensor(text)).sample
        reads = list(PretendDevice.reads)
        result.square().sum().backward()
    with torch.no_grad():
        gradient = distance(there.conv_in.weight.grad.held, here.conv_in.weight.grad)
        return {
            "device": str(result.device),
            "changed": distance(expected, plain),
            "error": distance(result.held, expected),
            "gradient_error": gradient,
            "reads": reads,
        }


def merges_there(height, width):
    """Whether a preset merges tokens at this size, here and there, and what the report says of the layer there."""
    unet = tiny_unet()
    sample, text = inputs(unet, height=height, width=width)
    with torch.no_grad():
        plain = unet(sample, LATE, text).sample
        METHODS["balanced"].apply(unet, None, {"reuse": None})
        here = unet(sample, LATE, text).sample
        with PretendDevice():
            move(unet)
            there = unet(PretendTensor(sample), LATE, PretendTensor(text)).sample
    # Up to rounding: a tensor there has another layout.
    changed = [distance(output, plain) > 1e-4 for output in (here, there.held)]
    return {"changed": changed, "reason": report(unet).rows[0].skipped}


def mix():
    """What comes of a tensor there and one on the CPU."""
    try:
        with PretendDevice():
            PretendTensor(torch.ones(2)) + torch.ones(2)
    except RuntimeError as error:
        return str(error)
    return None


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME, backend_module=BackendModule())
    # Numbers and lists become tensors of the CPU first, as where torch knows its device.
    torch._C._set_only_lift_cpu_tensors(True)
    everything = {"merge_mlp": True, "merge_crossattn": True}
    print(
        json.dumps(
            {
                "agents": compare("agentsd", EARLY),
                "merging": compare("agentsd", LATE),
                "everything": compare("agentsd", EARLY, **everything),
                "without randomness": compare("agentsd", LATE, use_rand=False),
                "in float32": compare("agentsd", EARLY, attn_precision="fp32"),
                "a timestep each": compare("agentsd", [EARLY, LATE], **everything),
                "attention-free": compare("attention-free", EARLY),
                "baseline-naive": compare("baseline-naive", EARLY),
                "todo": compare("todo", EARLY),
                "at 2,304 tokens": merges_there(48, 48),
                "mixed": mix(),
            }
        )
    )
