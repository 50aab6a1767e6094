"""The schedulers that can be named in place of a model's own."""

from collections.abc import Callable
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler


def plms(scheduler: Any) -> PNDMScheduler:
    """PLMS, the half of PNDM without Runge-Kutta steps, at the noise levels of a model's own scheduler."""
    options: dict[str, Any] = {"skip_prk_steps": True}
    if scheduler.config.get("rescale_betas_zero_snr"):
        # PNDMScheduler does not rescale by itself. It divides by the signal that is left in the noise, which is none
        # at the last timestep: with leading spacing, no step starts there.
        options |= {"trained_betas": scheduler.betas.tolist(), "timestep_spacing": "leading"}
    return PNDMScheduler.from_config(scheduler.config, **options)


# By the names that other tools give them.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ddim": lambda scheduler: DDIMScheduler.from_config(scheduler.config),
    "plms": plms,
    "dpm++2m": lambda scheduler: DPMSolverMultistepScheduler.from_config(scheduler.config),
    "euler-a": lambda scheduler: EulerAncestralDiscreteScheduler.from_config(scheduler.config),
}
