"""Named configurations: what each sets; all else keeps its default."""

from typing import Any, Literal


PresetName = Literal["paper", "agent", "tome", "balanced", "fast"]

# Where merging pays: on the two highest resolutions, in layers of so many tokens as that takes on the device. On a CPU
# the second has as many from 768x768 pixels on in Stable Diffusion.
_LARGE_LAYERS = {"max_downsample": 2, "min_tokens": "auto"}
# Of all ways to attend to less, the closest to the baseline's images for the time that it saves; at every step.
_MERGED_KEYS = {"agent_until": 0, "late_phase": "kv-merged"}

PRESETS: dict[str, dict[str, Any]] = {
    # The schedule of the agent attention paper.
    "paper": {},
    # Its first phase at every step.
    "agent": {"sx": 4, "sy": 4, "agent_ratio": 0.95},
    # Its second phase at every step: no agents are formed when as many tokens are left for them as are merged.
    "tome": {"sx": 2, "sy": 2, "agent_ratio": 0.5},
    # In large layers a quarter of the keys and values, and the deep part of the UNet in every second step only. The
    # other steps merge as the last whole one did.
    "balanced": {**_MERGED_KEYS, **_LARGE_LAYERS, "reuse": 2, "match_interval": 1},
    # A tenth of them, and every third step.
    "fast": {**_MERGED_KEYS, "kv_ratio": 0.9, **_LARGE_LAYERS, "reuse": 3, "match_interval": 1},
}
