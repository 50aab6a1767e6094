"""The state of a patched layer: what was there before and, while its block runs, what is merged there."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..ops.merging import Merging, match_tokens
from ..ops.partitioning import cell_grid, partition_tokens, random_partition
from .break_even import MinTokens, least_tokens
from .fallbacks import CHANGED_TOKENS, OUTSIDE_BLOCK, OUTSIDE_MODEL, REPLACED, TOO_SMALL, Fallbacks
from .steps import Clock, Keys, Match, Phase, StepContext
from .threads import PerThread


@dataclass
class KeptMatch:
    """What a layer has matched last, for the steps in which it does not match anew."""

    match: Match | None = None

    def leave_graphs(self) -> None:
        """Copy what compiled code gave, unless it was copied before."""
        if self.match is not None and not self.match.is_copy:
            self.match = self.match.copy()


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


@dataclass
class LayerCall:
    """
    What a layer knows of the call that runs in one thread.

    Args:
        step (`StepContext`): While the model runs: the step.
        size (`tuple[int, int]`, *optional*): Height and width in tokens.
        key (`torch.Tensor`, *optional*): The layer's own key, for its random choices.
        metric (`torch.Tensor` of shape `(batch, tokens, channels)`, *optional*): While the block runs: its input.
        parts (`list[Part]`, *optional*): What is merged in it.
        kept (`KeptMatch`, *optional*): Where matches are kept: what was matched before, or is to be kept.
        is_replaced (`bool`): Whether it runs without agentsd, since its attention is another's.
        entered (`list[Part]`, *optional*): While cross-attention or feed-forward runs: what was merged before it.
    """

    step: StepContext = field(default_factory=lambda: StepContext(()))
    size: tuple[int, int] | None = None
    key: torch.Tensor | None = None
    metric: torch.Tensor | None = None
    parts: list[Part] | None = None
    kept: KeptMatch | None = None
    is_replaced: bool = False
    entered: list[Part] | None = None

    def leave_block(self) -> None:
        """Let go of the activations."""
        self.metric = self.parts = None
        self.is_replaced = False


class LayerState:
    """
    The one object of a patched self-attention layer.

    It is a plain object, so that a copied or pickled model takes along its own, and knows no module, so that a copied
    block does not take along its model.

    Args:
        clock (`Clock`): Tells the step that the model is in.
        seed (`int`): What the layer's random choices vary with.
        min_tokens (`int` or `"auto"`): It is left alone at sizes of fewer tokens.
        in_fp32 (`bool`): Whether it attends in float32.
    """

    # The processor that the layer had before, set when the patch is installed.
    original: Any = None

    def __init__(self, clock: Clock, seed: int, min_tokens: MinTokens, in_fp32: bool):
        self.clock = clock
        self.seed = seed
        self.min_tokens = min_tokens
        self.in_fp32 = in_fp32
        self.handles: list[RemovableHandle] = []
        self.calls = PerThread(LayerCall)
        # For reports: of the last call in any thread, the height and width, and why the layer ran without agentsd.
        self.last_size: tuple[int, int] | None = None
        self.fallbacks = Fallbacks()

    @property
    def call(self) -> LayerCall:
        """The call that this thread runs."""
        return self.calls.get()

    @property
    def reduces_attention(self) -> bool:
        """Whether self-attention is to be on fewer tokens, and not only the layers after it."""
        return any(phase.reduces_attention for phase in self.clock.phases)

    def leaves_alone(self, tokens: int, device: torch.device) -> bool:
        """Whether the layer is too small to pay, as configured."""
        return tokens < least_tokens(self.min_tokens, device)

    def parts_of(self, x: torch.Tensor) -> tuple[list[Part] | None, str | None]:
        """
        What to do with the tokens of `x`, decided once a block.

        Args:
            x (`torch.Tensor` of shape `(batch, tokens, channels)`): The input of a layer in the block.

        Returns:
            `tuple[list[Part] | None, str | None]`: One part for each phase in the batch, or `None` if all are left
            alone; then the reason, unless that is as configured.
        """
        call = self.call
        if call.metric is None:
            return None, REPLACED if call.is_replaced else OUTSIDE_BLOCK
        if call.size is None:
            return None, OUTSIDE_MODEL
        tokens = call.size[0] * call.size[1]
        if self.leaves_alone(tokens, call.metric.device):
            return None, None
        if call.key is None:
            return None, OUTSIDE_MODEL
        if x.shape[:2] != call.metric.shape[:2] or x.shape[1] != tokens:
            return None, CHANGED_TOKENS
        if call.parts is None:
            call.parts = self._split(call.metric, call.key.to(call.metric.device), call.size, call.step.phases)
        if not all(part.is_plain for part in call.parts):
            return call.parts, None
        return None, TOO_SMALL if any(part.phase.reduces for part in call.parts) else None

    def _split(
        self, metric: torch.Tensor, key: torch.Tensor, size: tuple[int, int], numbers: tuple[int, ...]
    ) -> list[Part]:
        phases = self.clock.phases
        if len(numbers) == 1:
            return [_part(metric, key, phases[numbers[0]], size, None, self.call.kept)]
        # A video model has several frames a sample, one after another.
        frames = metric.shape[0] // len(numbers)
        of_row = [number for number in numbers for _ in range(frames)]
        key = key.repeat_interleave(frames)
        parts = []
        for number in dict.fromkeys(numbers):
            rows = torch.tensor([row for row, other in enumerate(of_row) if other == number], device=metric.device)
            parts.append(_part(metric[rows], key[rows], phases[number], size, rows, None))
        return parts


def _part(
    metric: torch.Tensor,
    key: torch.Tensor,
    phase: Phase,
    size: tuple[int, int],
    rows: torch.Tensor | None,
    kept: KeptMatch | None,
) -> Part:
    height, width = size
    cells = phase.cells
    destinations = cells.destinations(height, width)
    tokens = height * width
    sources = tokens - destinations if destinations > 0 else 0  # in no cells, nothing can be matched
    removed = 0 if phase.tokens is None else phase.tokens.removed(tokens, sources)
    keys = phase.keys if phase.keys is not None and phase.keys.count(size, sources) < tokens else None
    if removed == 0 and (keys is None or keys.removed(tokens, sources) == 0):
        return Part(phase, rows, size, keys=keys)
    match = None if kept is None else kept.match
    if match is None or not match.fits(metric):
        if cells.use_rand:
            partition = random_partition(height, width, cells.sx, cells.sy, key)
        else:
            partition = partition_tokens(*cell_grid(height, width, cells.sx, cells.sy, metric.device))
        match = Match(partition, match_tokens(metric, partition))
        if kept is not None:
            kept.match = match
    merging = match.merging("tokens", removed) if removed > 0 else None
    return Part(phase, rows, size, match, merging, keys)
