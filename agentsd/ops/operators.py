"""
The kernels as operators of torch, `agentsd::match_tokens` and so on, so that whatever traces tensors keeps each as one
step. Importing this module registers them.
"""

import torch
import triton
from torch import library

from .kernels import (
    MATCH_TILE,
    MERGED_AT_A_TIME,
    ORDER_TILE,
    PARTITION_TILE,
    PLANNED_AT_A_TIME,
    TAKE_TILE,
    WIDEST,
    match_kernel,
    merge_kernel,
    order_kernel,
    partition_kernel,
    plan_kernel,
    take_kernel,
)


def _strides(index: torch.Tensor) -> tuple[int, int]:
    """Of an index `(P, K)`; all samples read the one row where `P = 1`."""
    return (index.stride(0) if index.shape[0] > 1 else 0), index.stride(1)


def _partition(key: torch.Tensor, height: int, width: int, sx: int, sy: int) -> tuple[torch.Tensor, torch.Tensor]:
    dst, src = _empty_partition(key, height, width, sx, sy)
    grid = (triton.cdiv(height * width, PARTITION_TILE["TOKENS"]), key.shape[0])
    with torch.cuda.device_of(key):
        partition_kernel[grid](key.contiguous(), dst, src, height, width, SX=sx, SY=sy, **PARTITION_TILE)
    return dst, src


def _empty_partition(
    key: torch.Tensor, height: int, width: int, sx: int, sy: int
) -> tuple[torch.Tensor, torch.Tensor]:
    cells = (height // sy) * (width // sx)
    return key.new_empty((key.shape[0], cells)), key.new_empty((key.shape[0], height * width - cells))


def _plan(
    src: torch.Tensor, dst: torch.Tensor, cell: torch.Tensor, score: torch.Tensor, count: int
) -> tuple[torch.Tensor, ...]:
    plan = _empty_plan(src, dst, cell, score, count)
    batch, sources = cell.shape
    at_a_time = min(triton.next_power_of_2(sources), PLANNED_AT_A_TIME)
    with torch.cuda.device_of(cell):
        plan_kernel[(batch,)](
            src,
            dst,
            cell.contiguous(),
            score.contiguous(),
            *plan,
            sources,
            dst.shape[1],
            count,
            *_strides(src),
            *_strides(dst),
            SOURCES=at_a_time,
            num_warps=16 if at_a_time == PLANNED_AT_A_TIME else 4,
        )
    return plan


def _empty_plan(
    src: torch.Tensor, dst: torch.Tensor, cell: torch.Tensor, score: torch.Tensor, count: int
) -> tuple[torch.Tensor, ...]:
    (batch, sources), cells = cell.shape, dst.shape[1]
    return (
        cell.new_empty((batch, sources - count + cells)),
        cell.new_empty((batch, count)),
        cell.new_empty((batch, count)),
        score.new_empty((batch, cells)),
        cell.new_empty((batch, sources + cells)),
    )


def _match(metric: torch.Tensor, dst: torch.Tensor, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cell, score = _empty_matches(metric, dst, src)
    metric = metric.contiguous()
    batch, tokens, channels = metric.shape
    if cell.numel() > 0:
        with torch.cuda.device_of(metric):
            match_kernel[(triton.cdiv(src.shape[1], MATCH_TILE["ROWS"]), batch)](
                metric,
                dst,
                src,
                cell,
                score,
                tokens,
                dst.shape[1],
                src.shape[1],
                *_strides(dst),
                *_strides(src),
                CHANNELS=channels,
                **MATCH_TILE,
                num_warps=4,
                num_stages=3,
            )
    return cell, score


def _empty_matches(metric: torch.Tensor, dst: torch.Tensor, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (metric.shape[0], src.shape[1])
    return metric.new_empty(shape, dtype=torch.int64), metric.new_empty(shape, dtype=torch.float32)


def _merge(
    x: torch.Tensor, members: torch.Tensor, merged: torch.Tensor, target: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    out = _empty_merged(x, members, merged, target, size)
    x, members, target, size = x.contiguous(), members.contiguous(), target.contiguous(), size.contiguous()
    batch, tokens, channels = x.shape
    outputs, count, cells = members.shape[1], merged.shape[1], size.shape[1]
    kept = outputs - cells
    order = members.new_empty((batch, count))
    start = members.new_empty((batch, cells), dtype=torch.int32)
    width = min(triton.next_power_of_2(channels), WIDEST)
    with torch.cuda.device_of(x):
        if order.numel() > 0:
            order_kernel[(triton.cdiv(count, ORDER_TILE["ROWS"]), batch)](
                merged, target, order, start, kept, count, cells, *_strides(merged), **ORDER_TILE
            )
        if out.numel() > 0:
            merge_kernel[(outputs, batch, triton.cdiv(channels, width))](
                x,
                members,
                size,
                order,
                start,
                out,
                tokens,
                outputs,
                kept,
                count,
                cells,
                CHANNELS=channels,
                ROWS=MERGED_AT_A_TIME,
                WIDTH=width,
            )
    return out


def _empty_merged(
    x: torch.Tensor, members: torch.Tensor, merged: torch.Tensor, target: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((x.shape[0], members.shape[1], x.shape[2]))


def _unmerge(y: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    out = _empty_unmerged(y, position)
    y = y.contiguous()
    batch, tokens, channels = y.shape
    if out.numel() > 0:
        rows = triton.cdiv(position.shape[1], TAKE_TILE["ROWS"])
        with torch.cuda.device_of(y):
            take_kernel[(rows, batch, triton.cdiv(channels, TAKE_TILE["WIDTH"]))](
                y, position, out, tokens, position.shape[1], *_strides(position), CHANNELS=channels, **TAKE_TILE
            )
    return out


def _empty_unmerged(y: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return y.new_empty((y.shape[0], position.shape[1], y.shape[2]))


# Not by `custom_op`, which adds its checks to every call.
for _name, _schema, _function, _fake in (
    (
        "random_partition",
        "(Tensor key, SymInt height, SymInt width, SymInt sx, SymInt sy) -> (Tensor, Tensor)",
        _partition,
        _empty_partition,
    ),
    (
        "plan_merging",
        "(Tensor src, Tensor dst, Tensor cell, Tensor score, SymInt count)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _plan,
        _empty_plan,
    ),
    ("match_tokens", "(Tensor metric, Tensor dst, Tensor src) -> (Tensor, Tensor)", _match, _empty_matches),
    (
        "merge_tokens",
        "(Tensor x, Tensor members, Tensor merged, Tensor target, Tensor size) -> Tensor",
        _merge,
        _empty_merged,
    ),
    ("unmerge_tokens", "(Tensor y, Tensor position) -> Tensor", _unmerge, _empty_unmerged),
):
    library.define(f"agentsd::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(f"agentsd::{_name}", "default", _function)
    library.register_fake(f"agentsd::{_name}", _fake)
