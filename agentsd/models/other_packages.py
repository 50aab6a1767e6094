"""Recognises what other packages that change a model's attention have put into it."""

from typing import Any, NamedTuple


class OtherPackage(NamedTuple):
    """
    Another package, found in a model.

    Args:
        name (`str`): Its name.
        does (`str`): What it does to a layer, to be read after "because".
        remedy (`str`): What to do about it.
    """

    name: str
    does: str
    remedy: str


TOMESD = OtherPackage(
    "tomesd",
    "tomesd merges tokens in the block, too",
    "Use one of the two: call `tomesd.remove_patch` or `agentsd.remove_patch`.",
)
HIDIFFUSION = OtherPackage(
    "hidiffusion",
    "hidiffusion attends there in windows",
    "For agentsd in these layers, too, call `remove_hidiffusion`, and then `apply_hidiffusion` with "
    "`apply_window_attn=False`.",
)
TOKEN_DOWNSAMPLING = OtherPackage(
    "ToDo",
    "ToDo attends there to fewer tokens (TokenMergeAttentionProcessor)",
    "Use one of the two: call ToDo's `remove_patch`, and then `agentsd.apply_patch` again.",
)
PACKAGES = (TOMESD, HIDIFFUSION, TOKEN_DOWNSAMPLING)


def package_in_block(block: Any) -> OtherPackage | None:
    """The package that has given a transformer block another class, in whose forward it changes the tokens."""
    for kind in type(block).__mro__:
        if kind.__name__ == "ToMeBlock":
            return TOMESD
        if kind.__name__ == "transformer_block" and kind.__module__.startswith("hidiffusion"):
            return HIDIFFUSION
    return None


def package_of_processor(processor: Any) -> OtherPackage | None:
    """The package that an attention processor comes from."""
    return TOKEN_DOWNSAMPLING if type(processor).__name__ == "TokenMergeAttentionProcessor" else None


def is_deepcached(module: Any) -> bool:
    """Whether the DeepCache package is enabled on a module: it has replaced its forward."""
    return "DeepCache" in getattr(module.__dict__.get("forward"), "__qualname__", "")
