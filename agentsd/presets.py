"""Named configurations: what each sets; all else keeps its default."""

from typing import Any, Literal


PresetName = Literal["paper", "agent", "tome", "balanced", "fast"]

# Where merging pays well: on the two highest resolutions, in layers of so many tokens. In Stable Diffusion the second
# has as many from 768x768 pixels on.
_LARGE_LAYERS = {"max_downsample": 2, "min_tokens": 2048}

PRESETS: dict[str, dict[str, Any]] = {
    # The schedule of the agent attention paper.
    "paper": {},
    # Its first phase at every step.
    "agent": {"sx": 4, "sy": 4, "agent_ratio": 0.95},
    # Its second phase at every step: no agents are formed when as many tokens are left for them as are merged.
    "tome": {"sx": 2, "sy": 2, "agent_ratio": 0.5},
    # In large layers the paper's agents, and then down-sampled keys and values, which cost less than ToMe there; and
    # the deep part of the UNet in every second step only. The other steps merge as the last whole one did.
    "balanced": {"late_phase": "kv-mean", **_LARGE_LAYERS, "reuse": 2, "match_interval": 1},
    # Agents at every step in large layers, and the deep part of the UNet in every third step only.
    "fast": {"sx": 4, "sy": 4, "agent_ratio": 0.95, **_LARGE_LAYERS, "reuse": 3, "match_interval": 1},
}
