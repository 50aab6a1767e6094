"""The steps that calls of a UNet alone are made of, for what makes a difference only over several of them."""

import torch
from diffusers import DDIMScheduler


CALL_STEPS = 12


def call_timesteps(device: torch.device | str) -> torch.Tensor:
    """
    The timesteps of a run of `CALL_STEPS` steps, from noise to image, as one tensor.

    They are spread evenly over the whole noise range, so that agents run in as large a share of them as in long runs.

    Examples:

    ```python
    >>> call_timesteps("cpu").tolist()
    [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82]
    ```
    """
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(CALL_STEPS, device=device)
    return scheduler.timesteps
