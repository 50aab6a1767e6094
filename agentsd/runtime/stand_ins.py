"""Tensors that stand for what a skipped module returns, of which only the shapes matter."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class TensorShape(NamedTuple):
    """A tensor but for its values."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device


def shapes_of(output: Any) -> Any:
    """The shape of a tensor, or of those in lists and tuples."""
    if isinstance(output, torch.Tensor):
        return TensorShape(output.shape, output.dtype, output.device)
    if output is None:
        return None
    return tuple(shapes_of(part) for part in (output.to_tuple() if hasattr(output, "to_tuple") else output))


def stand_ins(shapes: dict[int, Any], pool: dict[tuple[torch.dtype, torch.device], torch.Tensor]) -> dict[int, Any]:
    """
    What has these shapes and is read by nobody: all in the same memory, since they are many.

    Args:
        shapes (`dict[int, Any]`): By the module's number, what [`shapes_of`] gives for its output.
        pool (`dict[tuple[torch.dtype, torch.device], torch.Tensor]`): The memory, which grows as needed.

    Returns:
        `dict[int, Any]`: By the module's number, what stands for its output.
    """
    distinct = sorted(set(_tensor_shapes(shapes.values())), key=lambda shape: -shape.size.numel())
    for shape in distinct:
        kept = pool.get((shape.dtype, shape.device))
        if kept is None or kept.numel() < shape.size.numel():
            pool[shape.dtype, shape.device] = torch.zeros(shape.size.numel(), dtype=shape.dtype, device=shape.device)
    views = {shape: pool[shape.dtype, shape.device][: shape.size.numel()].view(shape.size) for shape in distinct}
    return {number: _filled(part, views) for number, part in shapes.items()}


def _tensor_shapes(shapes: Any) -> Iterator[TensorShape]:
    """Every shape in lists and tuples of them."""
    if isinstance(shapes, TensorShape):
        yield shapes
    elif shapes is not None:
        for part in shapes:
            yield from _tensor_shapes(part)


def _filled(shapes: Any, tensors: dict[TensorShape, torch.Tensor]) -> Any:
    """For every shape in lists and tuples of them, its tensor."""
    if shapes is None:
        return None
    return tensors[shapes] if isinstance(shapes, TensorShape) else tuple(_filled(part, tensors) for part in shapes)
