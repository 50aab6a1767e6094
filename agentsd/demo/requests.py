"""What a session of the web page may ask for, and what it does ask for."""

from dataclasses import dataclass
from typing import Any

from ..utils.calls import pipeline_call


# Sides of images are multiples of what the VAE shrinks them by.
SIDE_UNIT = 8
SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Limits:
    """
    What a session may ask for.

    Args:
        side (`int`): Longest side of an image in pixels.
        steps (`int`): Denoising steps.
        sweep (`int`): Runs in a sweep.
        waiting (`int`): Generations that may wait in the queue.
        prompt (`int`): Characters of a prompt.
        seconds (`int`): Seconds that a comparison may take to time both variants.
    """

    side: int = 1024
    steps: int = 100
    sweep: int = 16
    waiting: int = 8
    prompt: int = 2000
    seconds: int = 30

    def __post_init__(self) -> None:
        lowest = {"side": SMALLEST_SIDE, "steps": 1, "sweep": 1, "waiting": 1, "prompt": 1, "seconds": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"The limit on {name} must be at least {low}, but got {getattr(self, name)}.")
        if self.side % SIDE_UNIT:
            raise ValueError(f"The limit on side must be a multiple of {SIDE_UNIT}, but got {self.side}.")


@dataclass(frozen=True)
class ImageRequest:
    """The image to draw: everything that determines it, apart from the patch."""

    prompt: str
    negative_prompt: str
    model: str
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int

    @property
    def call(self) -> dict[str, Any]:
        """The arguments that the pipeline is called with."""
        return pipeline_call(self.prompt, self.guidance_scale, self.height, self.width, self.negative_prompt or None)

    def check(self, limits: Limits) -> None:
        """Raise `TypeError` or `ValueError` for what cannot be drawn, or is beyond the limits."""
        if not isinstance(self.prompt, str) or not isinstance(self.negative_prompt, str):
            raise TypeError("Prompts must be text.")
        if max(len(self.prompt), len(self.negative_prompt)) > limits.prompt:
            raise ValueError(f"Prompts may have {limits.prompt} characters at most.")
        for name, value, low, high in (
            ("seed", self.seed, 0, 2**63 - 1),
            ("number of steps", self.steps, 1, limits.steps),
            ("height", self.height, SMALLEST_SIDE, limits.side),
            ("width", self.width, SMALLEST_SIDE, limits.side),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"The {name} must be a whole number, but got {value!r}.")
            if not low <= value <= high:
                raise ValueError(f"The {name} must be from {low} to {high}, but got {value}.")
        if self.height % SIDE_UNIT or self.width % SIDE_UNIT:
            raise ValueError(f"Height and width must be multiples of {SIDE_UNIT}.")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"The guidance must be from 0 to 100, but got {self.guidance_scale}.")
