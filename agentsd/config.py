"""What a user can set, validated once."""

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args


AttnPrecision = Literal["fp32"]
PresetName = Literal["paper", "agent", "tome"]

# Upstream's defaults for whichever of `sx`, `sy` and `agent_ratio` a user leaves out after naming one of them.
_SINGLE_PHASE_DEFAULTS = {"sx": 2, "sy": 2, "agent_ratio": 0.8}


class TokenCounts(NamedTuple):
    """
    Tokens at one layer.

    Args:
        tokens (`int`): All tokens.
        destinations (`int`): Cells, each with one destination token.
        merged (`int`): Tokens left after merging.
        agents (`int`, *optional*): Agent tokens; `None` where softmax attention over the merged tokens is used.
    """

    tokens: int
    destinations: int
    merged: int
    agents: int | None


@dataclass(frozen=True)
class Phase:
    """
    The merging that one stretch of the denoising run uses.

    Args:
        sx (`int`): Width of a cell in tokens; each cell holds one destination token.
        sy (`int`): Height of a cell in tokens.
        ratio (`float`): Share of all tokens that is merged away before attention.
        agent_ratio (`float`): Share of all tokens that is merged away to leave the agent tokens.
    """

    sx: int
    sy: int
    ratio: float
    agent_ratio: float

    def token_counts(self, height: int, width: int) -> TokenCounts:
        """
        How many tokens this phase merges at a layer of `height` by `width` tokens.

        Args:
            height (`int`): Rows of tokens.
            width (`int`): Columns of tokens.

        Returns:
            `TokenCounts`: With `merged` equal to `tokens` where nothing can be merged, because the cells are larger
            than the layer or the ratio is too small for it.

        Examples:

        ```python
        >>> Phase(sx=4, sy=4, ratio=0.4, agent_ratio=0.95).token_counts(64, 64)
        TokenCounts(tokens=4096, destinations=256, merged=2458, agents=256)
        ```
        """
        tokens = height * width
        destinations = (height // self.sy) * (width // self.sx)
        if destinations == 0:
            return TokenCounts(tokens, 0, tokens, None)
        sources = tokens - destinations
        merged = tokens - min(int(tokens * self.ratio), sources)
        agents = tokens - min(int(tokens * self.agent_ratio), sources)
        # Two products with the agents only pay where they are cheaper than one over the merged tokens.
        uses_agents = merged < tokens and agents * 2 < merged
        return TokenCounts(tokens, destinations, merged, agents if uses_agents else None)


@dataclass(frozen=True)
class AgentSDConfig:
    """
    Configuration of the agentsd patch.

    If `sx`, `sy` and `agent_ratio` are all left out, the schedule of the agent attention paper applies: the first
    `agent_until` of the noise range merges in 4×4 cells and attends through agents, the rest is ToMe in 2×2 cells.
    Setting any of the three gives a single phase for all steps, with the defaults of the original code (2, 2 and 0.8)
    for those left out; `agent_until` then has no effect.

    Args:
        ratio (`float`, defaults to `0.4`):
            Share of tokens to merge, in `[0, 1)`. `0` leaves every layer as it is.
        max_downsample (`int`, defaults to `1`):
            Patch layers down-sampled by at most this factor (1, 2, 4 or 8), counted from the highest resolution that
            has attention, so that `1` finds layers in SDXL too.
        sx (`int`, *optional*): Cell width in tokens.
        sy (`int`, *optional*): Cell height in tokens.
        agent_ratio (`float`, *optional*): Share of tokens, in `[0, 1]`, merged away to form the agent tokens.
        agent_until (`float`, defaults to `0.4`):
            Fraction of the noise range that runs agents: they run while `t >= (1 - agent_until) * T`, with `T` the
            scheduler's number of training timesteps. With a scheduler whose timesteps are logarithms of noise levels
            (`EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`, `EulerDiscreteScheduler` with `"v_prediction"` and
            `timestep_type="continuous"`) no step does, and a warning says so; use the preset `"agent"` or `"tome"`.
        k_scale2 (`float`, defaults to `0.3`):
            Exponent on the softmax scale of the query–agent product (`s` becomes `s ** k_scale2`).
        k_shortcut (`float`, defaults to `0.075`): Weight of the value shortcut added to agent attention.
        attn_precision (`"fp32"`, *optional*):
            `"fp32"` computes the patched attention in float32, as Stable Diffusion 2.x needs where logits are
            materialised in half precision. No outer autocast is needed.
        use_rand (`bool`, defaults to `True`):
            Choose each cell's destination token pseudo-randomly per layer and timestep, rather than its top-left one.
        seed (`int`, defaults to `0`): Seed of that choice.
        merge_attn (`bool`, defaults to `True`):
            Merge tokens in self-attention. With this and the next two off, a patch changes nothing.
        merge_crossattn (`bool`, defaults to `False`): Merge the queries of cross-attention as well.
        merge_mlp (`bool`, defaults to `False`): Merge tokens in the feed-forward layer as well.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Examples:

    ```python
    >>> from agentsd import AgentSDConfig
    >>> AgentSDConfig(ratio=0.3).is_scheduled
    True
    >>> AgentSDConfig(sx=4).agent_phase
    Phase(sx=4, sy=2, ratio=0.4, agent_ratio=0.8)
    ```
    """

    ratio: float = 0.4
    max_downsample: int = 1
    sx: int | None = None
    sy: int | None = None
    agent_ratio: float | None = None
    agent_until: float = 0.4
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    attn_precision: AttnPrecision | None = None
    use_rand: bool = True
    seed: int = 0
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False

    def __post_init__(self) -> None:
        self._keep_number("ratio", low=0, high=1, high_open=True)
        self._keep_number("agent_until", low=0, high=1)
        self._keep_number("k_scale2")
        self._keep_number("k_shortcut")
        if self.agent_ratio is not None:
            self._keep_number("agent_ratio", low=0, high=1)
        for name in ("sx", "sy"):
            if getattr(self, name) is not None:
                self._keep_integer(name, low=1)
        self._keep_integer("seed")
        self._keep_integer("max_downsample")
        if self.max_downsample not in (1, 2, 4, 8):
            raise ValueError(f"`max_downsample` must be 1, 2, 4 or 8, but got {self.max_downsample}.")
        if self.attn_precision not in (None, *get_args(AttnPrecision)):
            raise ValueError(f"`attn_precision` must be None or 'fp32', but got {self.attn_precision!r}.")
        for name in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, but got {getattr(self, name)!r}.")

    def _keep_number(
        self, name: str, low: float | None = None, high: float | None = None, high_open: bool = False
    ) -> None:
        # NumPy's numbers, too, become plain ones, which JSON knows.
        object.__setattr__(self, name, _plain_number(name, getattr(self, name), low, high, high_open))

    def _keep_integer(self, name: str, low: int | None = None) -> None:
        object.__setattr__(self, name, _plain_integer(name, getattr(self, name), low))

    @property
    def is_scheduled(self) -> bool:
        """Whether the two-phase schedule applies, rather than one phase for all steps."""
        return self.sx is None and self.sy is None and self.agent_ratio is None

    @property
    def agent_phase(self) -> Phase:
        """The phase of the first steps; the only one when `is_scheduled` is `False`."""
        if self.is_scheduled:
            return Phase(sx=4, sy=4, ratio=self.ratio, agent_ratio=0.95)
        chosen = {name: getattr(self, name) for name in _SINGLE_PHASE_DEFAULTS}
        chosen = {name: _SINGLE_PHASE_DEFAULTS[name] if value is None else value for name, value in chosen.items()}
        return Phase(ratio=self.ratio, **chosen)

    @property
    def tome_phase(self) -> Phase:
        """The phase of the remaining steps."""
        return Phase(sx=2, sy=2, ratio=self.ratio, agent_ratio=0.5) if self.is_scheduled else self.agent_phase

    @classmethod
    def preset(cls, name: PresetName, **overrides: Any) -> "AgentSDConfig":
        """
        A named configuration.

        Args:
            name (`str`): `"paper"` (the two-phase schedule), `"agent"` (its first phase at every step) or `"tome"`
                (its second phase at every step).
            overrides: Any other field.

        Returns:
            `AgentSDConfig`: The configuration.

        Raises:
            TypeError: If another field is unknown or has the wrong type.
            ValueError: If there is no preset of that name, or a field is out of range.

        Examples:

        ```python
        >>> from agentsd import AgentSDConfig
        >>> AgentSDConfig.preset("tome", ratio=0.5).agent_phase
        Phase(sx=2, sy=2, ratio=0.5, agent_ratio=0.5)
        ```
        """
        presets: dict[str, dict[str, Any]] = {
            "paper": {},
            "agent": {"sx": 4, "sy": 4, "agent_ratio": 0.95},
            # No agents are formed when as many tokens are left for them as for the merged sequence.
            "tome": {"sx": 2, "sy": 2, "agent_ratio": 0.5},
        }
        if name not in presets:
            raise ValueError(f"There is no preset {name!r}. Choose one of {', '.join(presets)}.")
        return cls.from_dict({**presets[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AgentSDConfig":
        """
        Build a configuration from field names and values.

        Args:
            values (`dict`): Field names and values, as `to_dict` returns them; fields left out keep their defaults.

        Returns:
            `AgentSDConfig`: The configuration.

        Raises:
            TypeError: If a name is not a field, or a value has the wrong type.
            ValueError: If a value is out of range.

        Examples:

        ```python
        >>> from agentsd import AgentSDConfig
        >>> AgentSDConfig.from_dict({"ratio": 0.5}) == AgentSDConfig(ratio=0.5)
        True
        ```
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise TypeError(f"Unknown option {', '.join(map(repr, unknown))}. The options are: {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """
        All fields as a dictionary of plain values.

        Returns:
            `dict`: Field names and values.

        Examples:

        ```python
        >>> from agentsd import AgentSDConfig
        >>> AgentSDConfig().to_dict()["ratio"]
        0.4
        ```
        """
        return asdict(self)


def _plain_number(
    name: str, value: Any, low: float | None = None, high: float | None = None, high_open: bool = False
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, but got {value!r}.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, but got {value!r}.")
    if low is None or high is None:
        return number
    if not low <= number <= high or (high_open and number == high):
        raise ValueError(f"`{name}` must be in [{low}, {high}{')' if high_open else ']'}, but got {value!r}.")
    return number


def _plain_integer(name: str, value: Any, low: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, but got {value!r}.")
    if low is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {value!r}.")
    return int(value)
