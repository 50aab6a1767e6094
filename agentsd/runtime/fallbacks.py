"""Why a layer that is patched ran without agentsd all the same, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..models.other_packages import PACKAGES, package_in_block, package_of_processor


# Each is to be read after "because". They are constants, since layers note them in compiled code, too.
OUTSIDE_MODEL = "`model.forward` was called and not the model, which passes over hooks"
OUTSIDE_BLOCK = "`block.forward` was called and not the block, which passes over hooks"
CHANGED_TOKENS = "something changes the tokens between block and layer, as a tiling wrapper such as HyperTile does"
CHUNKED = "`set_chunk_feed_forward`, or `enable_forward_chunking`, gives it the tokens in chunks"
REPLACED = "the attention module was replaced by another"
MASK = "an attention mask was given"
OTHER_KEYS = "keys and values from elsewhere were given (`encoder_hidden_states`)"
PERTURBED = "guidance by perturbed attention works there, which is over all tokens"
CACHED = "a cache of diffusers keeps outputs there, in the order of an older step's tokens"
MIXED = "samples of one batch are in different phases, which keep different numbers of tokens"
TOO_SMALL = "there are too few tokens for the cells and the ratio to merge any"

_REMEDIES = {
    OUTSIDE_MODEL: "Call the module itself.",
    OUTSIDE_BLOCK: "Call the module itself.",
    CHANGED_TOKENS: "Remove what changes them, or leave these layers out with `filter_fn`.",
    CHUNKED: "Switch that off (`set_chunk_feed_forward(None)`), or call `agentsd.apply_patch` with `merge_mlp=False`.",
    REPLACED: "Call `agentsd.apply_patch` again.",
    CACHED: "Remove the cache, or call `agentsd.apply_patch` with `merge_crossattn=False` and `merge_mlp=False`.",
    MIXED: 'Lower `ratio`, or use a preset of one phase, such as `"tome"`.',
    TOO_SMALL: "Use a larger image or ratio, or smaller cells.",
    **{package.does: package.remedy for package in PACKAGES},
}
_PROCESSOR_REPLACED = "the processor was replaced by"


@dataclass
class Fallbacks:
    """
    Why each layer of a patched block ran without agentsd when it last ran; `None` where it did not.

    Args:
        attn1 (`str`, *optional*): Self-attention.
        attn2 (`str`, *optional*): Cross-attention.
        ff (`str`, *optional*): The feed-forward layer.
    """

    attn1: str | None = None
    attn2: str | None = None
    ff: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether all ran as they should, as nearly always."""
        return self.attn1 is None and self.attn2 is None and self.ff is None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Those that there are, each with the layer's name in its block."""
        for part in ("attn1", "attn2", "ff"):
            reason = getattr(self, part)
            if reason is not None:
                yield part, reason

    def find_causes(self, block: Any) -> None:
        """Name what changed the tokens, where that can be recognised in the block, and what replaced its attention."""
        for part, reason in self:
            if reason == REPLACED:
                setattr(self, part, self.attn1 or REPLACED)
            if reason == CHANGED_TOKENS:
                package = package_in_block(block)
                is_chunked = part == "ff" and block._chunk_size is not None
                setattr(self, part, package.does if package is not None else CHUNKED if is_chunked else reason)


def replaced_by(processor: Any) -> str:
    """The reason where another attention processor has taken the place of the patch's."""
    package = package_of_processor(processor)
    return f"{_PROCESSOR_REPLACED} {type(processor).__name__}" if package is None else package.does


def message(names: list[str], reason: str) -> str:
    """What a user is told of layers that run without agentsd for the same reason."""
    more = f" and {len(names) - 1} more run" if len(names) > 1 else " runs"
    return f"{names[0]}{more} without agentsd, because {reason}. {remedy(reason)}".rstrip()


def remedy(reason: str) -> str:
    """What to do about a reason, if anything."""
    if reason.startswith(_PROCESSOR_REPLACED):
        return "Undo what replaced it, or call `agentsd.apply_patch` again afterwards."
    return _REMEDIES.get(reason, "")
