"""Where a model runs."""

from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """The device that a model runs on, though its weights may be elsewhere until then."""
    for module in model.modules():
        # Accelerate's, of models that are offloaded as a whole or part by part.
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    # Diffusers' own models know when it offloads them in groups.
    return getattr(model, "device", None) or next(model.parameters()).device
