"""What a user can set, validated once."""

from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal, get_args

from .presets import PRESETS, PresetName
from .runtime.break_even import MinTokens
from .runtime.checks import check_switch, keep_integer, keep_number, shown
from .runtime.steps import Cells, Phase
from .techniques.agent_attention import AgentAttentionConfig, apply_agent_attention
from .techniques.feature_reuse import FeatureReuseConfig
from .techniques.kv_downsampling import KVDownsamplingConfig, apply_kv_downsampling
from .techniques.kv_merging import KVMergingConfig, apply_kv_merging
from .techniques.token_merging import TokenMergingConfig, apply_token_merging


AttnPrecision = Literal["fp32"]
LatePhase = Literal["tome", "kv-mean", "kv-nearest", "kv-merged"]
MatchGroup = Literal["block", "level"]

# The paper's, where none of the options that replace its schedule is given.
_AGENT_UNTIL = 0.4
# Upstream's defaults for whichever of `sx`, `sy` and `agent_ratio` a user leaves out after naming one of them.
_SX, _SY, _AGENT_RATIO = 2, 2, 0.8


@dataclass(frozen=True)
class AgentSDConfig:
    """
    Configuration of the agentsd patch.

    If `sx`, `sy` and `agent_ratio` are all left out, the schedule of the agent attention paper applies: the first
    `agent_until` of the noise range merges in 4×4 cells and attends through agents, the rest is ToMe in 2×2 cells, or
    what `late_phase` says. Setting any of the three gives a single phase for all steps, with the defaults of the
    original code (2, 2 and 0.8) for those left out; `agent_until` and `late_phase` would then have no effect, and are
    refused.

    Args:
        ratio (`float`, defaults to `0.4`):
            Share of tokens to merge, in `[0, 1)`. `0` leaves every layer as it is. A late phase that merges only keys
            and values (`"kv-..."`, in the presets `"balanced"` and `"fast"` that of all steps) has `kv_ratio` instead.
        max_downsample (`int`, defaults to `1`):
            Patch layers down-sampled by at most this factor (1, 2, 4 or 8), counted from the highest resolution that
            has attention, so that `1` finds layers in SDXL too.
        sx (`int`, *optional*): Cell width in tokens.
        sy (`int`, *optional*): Cell height in tokens.
        agent_ratio (`float`, *optional*): Share of tokens, in `[0, 1]`, merged away to form the agent tokens.
        agent_until (`float`, *optional*, defaults to `0.4` without `sx`, `sy` and `agent_ratio`):
            Fraction of the noise range that runs agents: they run while `t >= (1 - agent_until) * T`, with `T` the
            scheduler's number of training timesteps. With a scheduler whose timesteps are logarithms of noise levels
            (`EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`, `EulerDiscreteScheduler` with `"v_prediction"` and
            `timestep_type="continuous"`) no step does, and a warning says so; use the preset `"agent"` or `"tome"`.
        late_phase (`str`, *optional*, defaults to `"tome"` without `sx`, `sy` and `agent_ratio`):
            What runs in the rest of the noise range: `"tome"` merges tokens. With the others, all tokens keep their
            queries, and keys and values are fewer: one for each 2×2 cell, its mean (`"kv-mean"`) or its top-left token
            (`"kv-nearest"`, as in ToDo), or some merged by a matching in 4×4 cells, each counted as often as it stands
            for a token (`"kv-merged"`).
        kv_ratio (`float`, *optional*, defaults to `0.75` with `late_phase="kv-merged"`):
            Share of tokens, in `[0, 1)`, merged away for keys and values. No other late phase has it.
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
        merge_crossattn (`bool`, defaults to `False`):
            Merge the queries of cross-attention as well, but not in a late phase that merges only keys and values.
        merge_mlp (`bool`, defaults to `False`): Merge tokens in the feed-forward layer as well, but not there either.
        min_tokens (`int` or `"auto"`, defaults to `0`):
            Leave layers of fewer tokens alone: their attention costs less than merging would. `"auto"` is what was
            measured for the device that the model runs on: 2,048 on a CPU, 16,384 on a GPU.
        match_interval (`int`, *optional*):
            Match tokens in one of so many of the steps that run the whole UNet, and merge in those between as they
            were matched last. With a number, even 1, the steps that `reuse` skips match nothing either. Without one,
            every layer matches its tokens in every step, as it does in any case while gradients are enabled or the
            samples of a batch are at different timesteps.
        share_matches (`str`, *optional*):
            `"block"` matches tokens once for those layers of a down block, an up block or the middle one that have as
            many of them, in the first that runs; `"level"` once for all layers of a level, in which images move far
            more. As said of `match_interval`, there are calls in which every layer matches in any case.
        reuse (`FeatureReuseConfig` or `int`, *optional*):
            Skip the deep part of the UNet in all but some steps; a number is the interval, `2` for every second step.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range, or would have no effect beside others.

    Examples:

    ```python
    >>> from agentsd import AgentSDConfig
    >>> AgentSDConfig(ratio=0.3).is_scheduled
    True
    >>> [phase.cells.sx for phase in AgentSDConfig().phases], [phase.cells.sx for phase in AgentSDConfig(sx=4).phases]
    ([4, 2], [4])
    ```
    """

    ratio: float = 0.4
    max_downsample: int = 1
    sx: int | None = None
    sy: int | None = None
    agent_ratio: float | None = None
    agent_until: float | None = None
    late_phase: LatePhase | None = None
    kv_ratio: float | None = None
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    attn_precision: AttnPrecision | None = None
    use_rand: bool = True
    seed: int = 0
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    min_tokens: MinTokens = 0
    match_interval: int | None = None
    share_matches: MatchGroup | None = None
    reuse: FeatureReuseConfig | int | None = None

    def __post_init__(self) -> None:
        keep_number(self, "ratio", low=0, high=1, high_open=True)
        for name in ("sx", "sy", "match_interval"):
            if getattr(self, name) is not None:
                keep_integer(self, name, low=1)
        for name in ("agent_ratio", "agent_until", "kv_ratio"):
            if getattr(self, name) is not None:
                keep_number(self, name, low=0, high=1, high_open=name == "kv_ratio")
        keep_number(self, "k_scale2")
        keep_number(self, "k_shortcut")
        keep_integer(self, "seed")
        if isinstance(self.min_tokens, str) and self.min_tokens != "auto":
            raise ValueError(f"`min_tokens` must be an integer or 'auto', but got {shown(self.min_tokens)}.")
        if self.min_tokens != "auto":
            keep_integer(self, "min_tokens", low=0)
        keep_integer(self, "max_downsample")
        if self.max_downsample not in (1, 2, 4, 8):
            raise ValueError(f"`max_downsample` must be 1, 2, 4 or 8, but got {self.max_downsample}.")
        if self.attn_precision not in (None, *get_args(AttnPrecision)):
            raise ValueError(f"`attn_precision` must be None or 'fp32', but got {shown(self.attn_precision)}.")
        if self.share_matches not in (None, *get_args(MatchGroup)):
            raise ValueError(f"`share_matches` must be None, 'block' or 'level', but got {shown(self.share_matches)}.")
        for name in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
            check_switch(self, name)
        object.__setattr__(self, "reuse", _reuse_config(self.reuse))
        if self.late_phase not in (None, *get_args(LatePhase)):
            choices = ", ".join(map(repr, get_args(LatePhase)))
            raise ValueError(f"`late_phase` must be one of {choices}, but got {self.late_phase!r}.")
        for name, default in (("agent_until", _AGENT_UNTIL), ("late_phase", "tome")):
            if self.is_scheduled and getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif not self.is_scheduled and getattr(self, name) is not None:
                self._refuse_beside_one_phase(name)
        if self.late_phase == "kv-merged":
            if self.kv_ratio is None:
                object.__setattr__(self, "kv_ratio", KVMergingConfig().ratio)
        elif self.kv_ratio is not None:
            raise ValueError("`kv_ratio` is about `late_phase='kv-merged'`: leave it out, or name that phase.")
        if not self.merge_attn and self.late_phase not in (None, "tome"):
            raise ValueError(
                f"`late_phase={self.late_phase!r}` is about self-attention, which `merge_attn=False` leaves as it is: "
                "leave out one or the other."
            )

    def _refuse_beside_one_phase(self, name: str) -> None:
        given = ", ".join(f"`{other}`" for other in ("sx", "sy", "agent_ratio") if getattr(self, other) is not None)
        raise ValueError(
            f"`{name}` would have no effect beside {given}, which give one phase for all steps: leave out one or the "
            "other."
        )

    @property
    def is_scheduled(self) -> bool:
        """Whether the two-phase schedule applies, rather than one phase for all steps."""
        return self.sx is None and self.sy is None and self.agent_ratio is None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What runs when, from the noisy end of the noise range on."""
        if self.is_scheduled:
            agent = Phase("agent", Cells(4, 4, self.use_rand), until=self.agent_until or 0.0)
            return self._with_agents(self._with_merging(agent), 0.95), self._late_phase()
        cells = Cells(self.sx or _SX, self.sy or _SY, self.use_rand)
        agent_ratio = _AGENT_RATIO if self.agent_ratio is None else self.agent_ratio
        return (self._with_agents(self._with_merging(Phase("all steps", cells)), agent_ratio),)

    def _late_phase(self) -> Phase:
        # Of larger cells, the tokens that are least like others are left as they are.
        side = 4 if self.late_phase == "kv-merged" else 2
        phase = Phase(self.late_phase or "tome", Cells(side, side, self.use_rand))
        match self.late_phase if self.ratio > 0 else None:
            case "kv-mean":
                return apply_kv_downsampling(phase, KVDownsamplingConfig("mean"))
            case "kv-nearest":
                return apply_kv_downsampling(phase, KVDownsamplingConfig("nearest"))
            case "kv-merged":
                assert self.kv_ratio is not None
                return apply_kv_merging(phase, KVMergingConfig(self.kv_ratio))
        return self._with_merging(phase)

    def _with_merging(self, phase: Phase) -> Phase:
        config = TokenMergingConfig(self.ratio, self.merge_attn, self.merge_crossattn, self.merge_mlp)
        return apply_token_merging(phase, config)

    def _with_agents(self, phase: Phase, agent_ratio: float) -> Phase:
        # Agents are for self-attention alone.
        if not self.merge_attn:
            return phase
        return apply_agent_attention(phase, AgentAttentionConfig(agent_ratio, self.k_scale2, self.k_shortcut))

    @classmethod
    def preset(cls, name: PresetName, **overrides: Any) -> "AgentSDConfig":
        """
        A named configuration.

        Args:
            name (`str`): `"paper"` (the two-phase schedule), `"agent"` (its first phase at every step), `"tome"`
                (its second phase at every step), `"balanced"` or `"fast"` (with feature reuse in every second or third
                step; see `agentsd/presets.py`).
            overrides: Any other field.

        Returns:
            `AgentSDConfig`: The configuration.

        Raises:
            TypeError: If another field is unknown or has the wrong type.
            ValueError: If there is no preset of that name, or a field is out of range.

        Examples:

        ```python
        >>> from agentsd import AgentSDConfig
        >>> AgentSDConfig.preset("tome", ratio=0.5).agent_ratio
        0.5
        ```
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"There is no preset {shown(name)}. Choose one of {', '.join(PRESETS)}.")
        try:
            return cls.from_dict({**PRESETS[name], **overrides})
        except ValueError as error:
            cls.from_dict(overrides)  # what is wrong without the preset is said alone
            own = ", ".join(f"{field}={value!r}" for field, value in PRESETS[name].items() if field not in overrides)
            raise ValueError(f"{error} The preset {name!r} sets {own}: give None for what is in the way.") from error

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
        return cls(**_known_fields(cls, values))

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


def _known_fields(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """These values, if a configuration has a field of each name."""
    known = [field.name for field in fields(kind)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise TypeError(f"Unknown option {', '.join(map(repr, unknown))}. The options are: {', '.join(known)}.")
    return values


def _reuse_config(value: Any) -> FeatureReuseConfig | None:
    """What `reuse` was given: nothing, a configuration, its fields, or the interval alone."""
    if value is None or isinstance(value, FeatureReuseConfig):
        return value
    if isinstance(value, dict):
        return FeatureReuseConfig(**_known_fields(FeatureReuseConfig, value))
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`reuse` must be a FeatureReuseConfig or an interval such as 2, but got {shown(value)}.")
    return FeatureReuseConfig(interval=int(value))
