"""The clock of a patched model: which phase a denoising step is in, told without stalling the device at every step."""

import math
import threading
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from ..models.unet import AttentionLayer
from ..ops.merging import Matches, Merging, plan_merging
from ..ops.partitioning import Partition
from .copies import copied
from .threads import PerThread


class Cells(NamedTuple):
    """
    The cells in which tokens are matched.

    Args:
        sx (`int`): Width of a cell in tokens; each cell holds one destination token.
        sy (`int`): Height of a cell in tokens.
        use_rand (`bool`): Whether the destination is a pseudo-random member of its cell, rather than its top-left one.
    """

    sx: int
    sy: int
    use_rand: bool = True

    def destinations(self, height: int, width: int) -> int:
        """How many cells a layer of `height` by `width` tokens has."""
        return (height // self.sy) * (width // self.sx)


@dataclass
class Match:
    """
    The matching of a block's tokens, which the techniques in all roles share, and the mergings planned by it.

    Args:
        partition (`Partition`): The sources and destinations.
        matches (`Matches`): The nearest destination of every source.
        mergings (`dict[str, Merging]`): By the role of the technique that planned them.
        is_copy (`bool`): Whether all of it is in memory of its own.
    """

    partition: Partition
    matches: Matches
    mergings: dict[str, Merging] = field(default_factory=dict)
    is_copy: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.sources + self.partition.dst.shape[1]

    @property
    def sources(self) -> int:
        """How many of them are sources."""
        return self.partition.src.shape[1]

    def merging(self, role: str, count: int) -> Merging:
        """How the technique in a role merges so many sources away: planned once, however long the match is kept."""
        if role not in self.mergings:
            self.mergings[role] = plan_merging(self.partition, self.matches, count)
            self.is_copy = False
        return self.mergings[role]

    def fits(self, x: torch.Tensor) -> bool:
        """Whether it can be that of the tokens `x`, by their number."""
        return (self.matches.cell.shape[0], self.tokens) == x.shape[:2]

    def copy(self) -> "Match":
        """The same in memory of its own."""
        partition, matches, mergings = copied((self.partition, self.matches, self.mergings))
        return Match(partition, matches, mergings, is_copy=True)


class Tokens(Protocol):
    """The role of a technique by which a block's layers run on fewer tokens."""

    @property
    def merges(self) -> bool:
        """Whether it merges anything at all."""

    @property
    def merge_attn(self) -> bool:
        """Whether self-attention is among them."""

    def removed(self, tokens: int, sources: int) -> int:
        """How many of the tokens are merged away."""

    def hook(self, layer: AttentionLayer, state: Any) -> list[RemovableHandle]:
        """Hook into the block's other layers."""


class Keys(Protocol):
    """The role of a technique by which self-attention has fewer keys and values than queries."""

    def removed(self, tokens: int, sources: int) -> int:
        """How many of the tokens are merged away for it; none where it needs no matching."""

    def count(self, size: tuple[int, int], sources: int) -> int:
        """How many keys are left at a layer of so many tokens."""

    def reduce(self, x: torch.Tensor, size: tuple[int, int], match: Match | None) -> torch.Tensor:
        """What keys and values come from, out of a layer's input `(batch, tokens, channels)`."""

    def bias(self, match: Match | None) -> torch.Tensor | None:
        """What is added to the logits of each key, `(batch, keys)`, if anything."""


class Operator(Protocol):
    """The role of a technique that attends in another way than softmax attention."""

    def removed(self, tokens: int, sources: int) -> int:
        """How many of the tokens are merged away for what stands between queries and keys."""

    def pays(self, tokens: int, sources: int, merged: int) -> bool:
        """Whether it costs less than softmax attention over the merged tokens."""

    def attend(
        self, attn: Any, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, match: Match, softmax: Any
    ) -> torch.Tensor:
        """Attention of `(batch, heads, tokens, head_dim)` in a layer whose input, before merging, is `x`."""


@dataclass(frozen=True)
class Phase:
    """
    What runs in the patched layers during one stretch of the noise range: at most one technique per role.

    Args:
        name (`str`): What a report calls it.
        cells (`Cells`): Where tokens are matched.
        until (`float`): Where it ends, as a share of the noise range counted from its noisy end.
        tokens (`Tokens`, *optional*): By which layers run on fewer tokens.
        keys (`Keys`, *optional*): By which self-attention has fewer keys and values.
        operator (`Operator`, *optional*): In place of softmax attention.
    """

    name: str
    cells: Cells
    until: float = 1.0
    tokens: Tokens | None = None
    keys: Keys | None = None
    operator: Operator | None = None

    @property
    def reduces(self) -> bool:
        """Whether any layer of a block is to run on fewer tokens or keys."""
        return self.keys is not None or (self.tokens is not None and self.tokens.merges)

    @property
    def reduces_attention(self) -> bool:
        """Whether self-attention is, and not only the layers after it."""
        return self.keys is not None or (self.tokens is not None and self.tokens.merges and self.tokens.merge_attn)

    def with_role(self, role: str, technique: Any) -> "Phase":
        """The phase with a technique in a role that is still free."""
        taken = getattr(self, role)
        if taken is not None:
            raise ValueError(f"{technique!r} and {taken!r} cannot both be the {role} of a phase: leave one out.")
        return replace(self, **{role: technique})


@dataclass(frozen=True)
class StepContext:
    """
    What all layers of a model need to know of the call that runs now.

    Args:
        phases (`tuple[int, ...]`): The phase's number: one for the whole batch, or one a sample.
        key (`torch.Tensor` of shape `(1,)` or `(batch,)`, *optional*): What random choices vary with, int64.
    """

    phases: tuple[int, ...]
    key: torch.Tensor | None = None


def phase_at(timestep: float, num_train_timesteps: int, phases: tuple[Phase, ...]) -> int:
    """
    The number of a timestep's phase: the first that ends no earlier, else the last.

    Args:
        timestep (`float`): The timestep `t`, from `T` (noise) down to 0 (image).
        num_train_timesteps (`int`): `T`.
        phases (`tuple[Phase, ...]`): The phases, from the noisy end on.

    Returns:
        `int`: Its index.

    Examples:

    ```python
    >>> from agentsd import AgentSDConfig
    >>> phases = AgentSDConfig().phases
    >>> phases[phase_at(601, 1000, phases)].name, phases[phase_at(599, 1000, phases)].name
    ('agent', 'tome')
    ```
    """
    for number, phase in enumerate(phases[:-1]):
        # Written this way round, with a little slack, so that a step exactly on the edge is inside despite rounding.
        if num_train_timesteps - timestep <= (phase.until + 1e-9) * num_train_timesteps:
            return number
    return len(phases) - 1


def running_phases(phases: tuple[Phase, ...]) -> list[tuple[float, Phase]]:
    """Those phases that any step is in, each with where it begins, as a share of the noise range."""
    starts = [0.0, *(phase.until for phase in phases[:-1])]
    return [(start, phase) for start, phase in zip(starts, phases, strict=True) if phase.until > start]


class ModelCall:
    """The last call of a model in one thread: its step, and whether it still runs."""

    def __init__(self, step: StepContext):
        self.step = step
        self.is_running = False
        self.reader = TimestepReader()


class Clock:
    """
    Where in the denoising run a model is, in each thread; its layers know nothing else of the model.

    Args:
        phases (`tuple[Phase, ...]`): What runs when, from the noisy end of the noise range on.
        num_train_timesteps (`int`): Length of the scheduler's range of timesteps.
    """

    def __init__(self, phases: tuple[Phase, ...], num_train_timesteps: int):
        self.phases = phases
        self.num_train_timesteps = num_train_timesteps
        self.has_warned = False
        self.calls = PerThread(partial(ModelCall, StepContext((len(phases) - 1,))))

    @property
    def merges(self) -> bool:
        """Whether tokens are merged in any phase."""
        return any(phase.tokens is not None and phase.tokens.merges for phase in self.phases)

    @property
    def is_elsewhere(self) -> bool:
        """Whether this thread has called no model, and only computes anew for autograd what another one's call has."""
        return self.calls.get().step.key is None

    @property
    def step(self) -> StepContext:
        """The step that the model is in."""
        return self.calls.shared.step if self.is_elsewhere else self.calls.get().step

    @property
    def is_running(self) -> bool:
        """Whether the model is in a call."""
        return self.calls.get().is_running

    def begin_step(self, timestep: torch.Tensor | float, device: torch.device) -> list[float]:
        """Note the step that begins, and return its timesteps: one, or one a sample."""
        call = self.calls.get()
        values = call.reader.read(timestep)
        key = timestep_key(timestep, device)
        if len(set(values)) == 1:
            values, key = values[:1], key[:1]
        phases = tuple(phase_at(value, self.num_train_timesteps, self.phases) for value in values)
        call.step, call.is_running = StepContext(phases, key), True
        self.calls.share()
        return values

    def end_step(self) -> None:
        """The model's call has ended. What its layers may still run by themselves is in the same step."""
        self.calls.get().is_running = False

    def warn_outside_call(self) -> None:
        """A layer runs by itself, so that nothing tells its step."""
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                "A layer with an agentsd patch ran outside a call of its model: in a backward pass, which computes it "
                "anew, or because `model.forward` was called and not the model, which passes over hooks. It runs as "
                "in the last step that is known, or without agentsd if none is.",
                stacklevel=2,
            )


class StepCounter(threading.local):
    """
    Which step of which image a thread is in, told by the timesteps that a pipeline hands to its models.

    A pipeline hands over one element after another of the scheduler's `timesteps`, made anew for each run. So a new
    image begins with a view of another tensor; where timesteps stand alone, when they go up.
    """

    def __init__(self) -> None:
        self.image = -1
        self.step = -1
        # How many steps the image has, where that can be told.
        self.steps: int | None = None
        self._run: torch.UntypedStorage | None = None
        self._place: Any = None
        self._value = 0.0

    def restart(self) -> None:
        """Begin a new image with the next step, whichever it is."""
        self._value = -math.inf

    def count(self, timestep: torch.Tensor | float, values: list[float]) -> None:
        """Count the step that a call at this timestep belongs to: the last one's if it is the very same."""
        run: torch.UntypedStorage | None = None
        place: Any = values
        value, total = max(values), 0
        if isinstance(timestep, torch.Tensor):
            storage = timestep.untyped_storage()
            total = storage.nbytes() // timestep.element_size()
            if total > 1 and len(values) == 1:
                # Second-order schedulers repeat a value, at another place.
                run, place = storage, timestep.storage_offset()
        is_same_run = (run is None) == (self._run is None) and (
            run is None or self._run is None or run.data_ptr() == self._run.data_ptr()
        )
        if self.image < 0 or not is_same_run or value > self._value:
            self.image, self.step = self.image + 1, 0
            self.steps = None if run is None else total - place
        elif place != self._place:
            self.step += 1
        # Holding it keeps its memory from being reused for another run's.
        self._run, self._place, self._value = run, place, value


class TimestepReader:
    """
    Reads timesteps as numbers, with one copy from the device for a whole generation.

    A pipeline hands its model one element after another of the scheduler's `timesteps`, each a view of one tensor. The
    first is read together with all others in that tensor, the rest from the copy.
    """

    def __init__(self) -> None:
        self._source: torch.Tensor | None = None
        self._version: int | None = None
        self._values: list[float] = []

    def read(self, timestep: torch.Tensor | float) -> list[float]:
        """
        The values of a timestep.

        Args:
            timestep (`torch.Tensor` or `float`): A number, a scalar tensor, or one timestep a sample.

        Returns:
            `list[float]`: The distinct values: one, or one a sample.

        Examples:

        ```python
        >>> import torch
        >>> timesteps = torch.tensor([801, 401])
        >>> reader = TimestepReader()
        >>> [reader.read(t) for t in timesteps]
        [[801.0], [401.0]]
        ```
        """
        if not isinstance(timestep, torch.Tensor):
            return [float(timestep)]
        if timestep.device.type == "cpu":
            # Not by `tolist`, which torch 2.6 refuses in `torch.func.grad`.
            return [float(value) for value in timestep.flatten()]
        if timestep.numel() > 1 and any(timestep.stride()):
            return [float(value) for value in timestep.flatten().tolist()]
        return [self._read_view(timestep)]

    def _read_view(self, timestep: torch.Tensor) -> float:
        storage = timestep.untyped_storage()
        # An inference tensor has no version counter. One that stands alone may be a buffer that is written anew for
        # every step; those of a whole run are not written to.
        version = None if timestep.is_inference() else timestep._version
        is_buffer = version is None and storage.nbytes() == timestep.element_size()
        is_known = (
            self._source is not None
            and not is_buffer
            and self._source.untyped_storage().data_ptr() == storage.data_ptr()
            and self._source.dtype == timestep.dtype
            and self._version == version
        )
        if not is_known:
            # Holding the tensor keeps its memory from being reused for another one.
            self._source = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)
            self._version = version
            self._values = [float(value) for value in self._source.tolist()]
        return self._values[timestep.storage_offset()]


def timestep_key(timestep: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """
    The timestep as integers to hash, without reading it.

    Args:
        timestep (`torch.Tensor` or `float`): A number, a scalar tensor, or one timestep a sample.
        device (`torch.device`): Where the key is needed.

    Returns:
        `torch.Tensor` of shape `(1,)` or `(batch,)`: The bits of the float32 timestep, int64.

    Examples:

    ```python
    >>> import torch
    >>> timestep_key(1.0, torch.device("cpu"))
    tensor([1065353216])
    ```
    """
    values = torch.as_tensor(timestep, dtype=torch.float32, device=device)
    return values.reshape(-1).view(torch.int32).to(torch.int64)
