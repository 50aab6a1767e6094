"""Agent attention for Stable Diffusion: faster self-attention for any diffusers UNet, without training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__


if TYPE_CHECKING:
    from .config import AgentSDConfig
    from .modules.agent_attention import AgentAttention
    from .ops.agent_attention import agent_attention
    from .patch import apply_patch, is_patched, patched, remove_patch
    from .patch_report import PatchReport, report
    from .pipeline import AgentSDPipeline
    from .runtime.processor import AgentAttnProcessor
    from .techniques.feature_reuse import FeatureReuseConfig

# Names are imported on first use, so that `import agentsd` (and `agentsd --help`) need not wait for torch.
_HOME = {
    "AgentAttention": "modules.agent_attention",
    "AgentAttnProcessor": "runtime.processor",
    "AgentSDConfig": "config",
    "AgentSDPipeline": "pipeline",
    "FeatureReuseConfig": "techniques.feature_reuse",
    "PatchReport": "patch_report",
    "agent_attention": "ops.agent_attention",
    "apply_patch": "patch",
    "is_patched": "patch",
    "patched": "patch",
    "remove_patch": "patch",
    "report": "patch_report",
}

__all__ = [
    "AgentAttention",
    "AgentAttnProcessor",
    "AgentSDConfig",
    "AgentSDPipeline",
    "FeatureReuseConfig",
    "PatchReport",
    "agent_attention",
    "apply_patch",
    "is_patched",
    "patched",
    "remove_patch",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
