"""The state of a patched layer: what was there before and, while its block runs, what is merged there."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..ops.merging import (
    Merging,
    cell_grid,
    match_tokens,
    partition_tokens,
    plan_merging,
    random_members,
)
from .steps import Clock, Keys, Match, Phase


@dataclass
class Part:
    """
    Those samples of a batch that are in the same phase, and what is merged in them.

    Args:
        phase (`Phase`): The phase.
        rows (`torch.Tensor`, *optional*): The samples' indices; `None` for the whole batch.
        size (`tuple[int, int]`): Height and width of the layer in tokens.
        match (`Match`, *optional*): The matching of their tokens, where there is one.
        merging (`Merging`, *optional*): How their tokens are merged, where they are.
        keys (`Keys`, *optional*): By which self-attention has fewer keys and values, where it has.
    """

    phase: Phase
    rows: torch.Tensor | None
    size: tuple[int, int]
    match: Match | None = None
    merging: Merging | None = None
    keys: Keys | None = None

    @property
    def is_plain(self) -> bool:
        """Whether these samples are left alone."""
        return self.merging is None and self.keys is None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """These samples of a batch."""
        return x if self.rows is None else x[self.rows]


def join(outputs: list[torch.Tensor], parts: list[Part]) -> torch.Tensor:
    """Put samples that were handled part by part back into the order of the batch."""
    if len(outputs) == 1:
        return outputs[0]
    order = torch.cat([part.rows for part in parts if part.rows is not None])
    return torch.cat(outputs)[order.argsort()]


class LayerState:
    """
    The one object of a patched self-attention layer.

    It is a plain object, so that a copied or pickled model takes along its own, and knows no module, so that a copied
    block does not take along its model.

    Args:
        clock (`Clock`): Tells the step that the model is in.
        seed (`int`): What the layer's random choices vary with.
        min_tokens (`int`): It is left alone at sizes of fewer tokens.
        in_fp32 (`bool`): Whether it attends in float32.
    """

    # The processor that the layer had before, set when the patch is installed.
    original: Any = None

    def __init__(self, clock: Clock, seed: int, min_tokens: int, in_fp32: bool):
        self.clock = clock
        self.seed = seed
        self.min_tokens = min_tokens
        self.in_fp32 = in_fp32
        self.handles: list[RemovableHandle] = []
        # While the model runs: the step, the height and width, and the mixed key.
        self.step = clock.step
        self.size: tuple[int, int] | None = None
        self.key: torch.Tensor | None = None
        # While the block runs: its input, and what is merged in it.
        self.metric: torch.Tensor | None = None
        self.parts: list[Part] | None = None

    def __getstate__(self) -> dict[str, Any]:
        step = replace(self.step, key=None)
        return {**self.__dict__, "step": step, "key": None, "metric": None, "parts": None}

    def leave_block(self) -> None:
        """Let go of the activations."""
        self.metric = self.parts = None

    def parts_of(self, x: torch.Tensor) -> list[Part] | None:
        """
        What to do with the tokens of `x`, decided once a block.

        Args:
            x (`torch.Tensor` of shape `(batch, tokens, channels)`): The input of a layer in the block.

        Returns:
            `list[Part]`, *optional*: One part for each phase in the batch, or `None` if all are left alone.
        """
        if self.metric is None or self.size is None or self.key is None or x.shape[:2] != self.metric.shape[:2]:
            return None
        if x.shape[1] != self.size[0] * self.size[1] or x.shape[1] < self.min_tokens:
            return None
        if self.parts is None:
            self.parts = self._split(self.metric, self.key.to(self.metric.device))
        return None if all(part.is_plain for part in self.parts) else self.parts

    def _split(self, metric: torch.Tensor, key: torch.Tensor) -> list[Part]:
        phases, numbers = self.clock.phases, self.step.phases
        if len(numbers) == 1:
            return [self._part(metric, key, phases[numbers[0]], None)]
        # A video model has several frames a sample, one after another.
        frames = metric.shape[0] // len(numbers)
        of_row = [number for number in numbers for _ in range(frames)]
        key = key.repeat_interleave(frames)
        parts = []
        for number in dict.fromkeys(numbers):
            rows = torch.tensor([row for row, other in enumerate(of_row) if other == number], device=metric.device)
            parts.append(self._part(metric[rows], key[rows], phases[number], rows))
        return parts

    def _part(self, metric: torch.Tensor, key: torch.Tensor, phase: Phase, rows: torch.Tensor | None) -> Part:
        height, width = size = self.size or (0, 0)
        cells = phase.cells
        destinations = cells.destinations(height, width)
        tokens = height * width
        sources = tokens - destinations if destinations > 0 else 0  # in no cells, nothing can be matched
        removed = 0 if phase.tokens is None else phase.tokens.removed(tokens, sources)
        keys = phase.keys if phase.keys is not None and phase.keys.count(size, sources) < tokens else None
        if removed == 0 and (keys is None or keys.removed(tokens, sources) == 0):
            return Part(phase, rows, size, keys=keys)
        grid, leftover = cell_grid(height, width, cells.sx, cells.sy, metric.device)
        member = random_members(destinations, cells.sx * cells.sy, key) if cells.use_rand else None
        partition = partition_tokens(grid, leftover, member)
        match = Match(partition, match_tokens(metric, partition))
        merging = plan_merging(match.partition, match.matches, removed) if removed > 0 else None
        return Part(phase, rows, size, match, merging, keys)
