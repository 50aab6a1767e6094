"""
Partition, matching, planning, merging and unmerging of tokens on a GPU, a kernel or two each, in Triton. For half
precision and without derivatives; `partitioning.py` and `merging.py` say what they compute, and call them.

`operators.py` launches them.
"""

import triton
import triton.language as tl


# Of the tiles that the kernels work on, in elements. Tiles of the match are what tensor cores take at a time.
MATCH_TILE = {"ROWS": 64, "COLUMNS": 128, "DEPTH": 64}
ORDER_TILE = {"ROWS": 32, "COLUMNS": 128}
TAKE_TILE = {"ROWS": 64, "WIDTH": 64}
PARTITION_TILE = {"TOKENS": 1024}
# One program plans the merging of a sample, so many sources at a time.
PLANNED_AT_A_TIME = 4096
# Most cells have but a few tokens to add; where one has many, several at a time hide the time that memory takes.
MERGED_AT_A_TIME = 8
WIDEST = 512


@triton.jit
def _hashed(x):
    """The mixer of `partitioning.py`, in numbers of 32 bits."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def partition_kernel(key, dst, src, height, width, SX: tl.constexpr, SY: tl.constexpr, TOKENS: tl.constexpr):
    """
    In turn: the destination of each cell, the other members of each from there on, and the tokens that no cell covers.
    """
    sample = tl.program_id(1)
    SIZE: tl.constexpr = SX * SY
    columns, rows = width // SX, height // SY
    cells, tokens = rows * columns, height * width
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_destination = place < cells
    source = place - cells
    other = source % tl.maximum(SIZE - 1, 1) + 1
    cell = tl.where(is_destination, place, source // tl.maximum(SIZE - 1, 1))
    mixed = _hashed(_hashed(tl.load(key + sample).to(tl.uint32)) + cell.to(tl.uint32))
    chosen = ((mixed >> 8).to(tl.int64) * SIZE) >> 24
    member = (chosen + tl.where(is_destination, 0, other)) % SIZE
    in_cell = (cell // columns * SY + member // SX) * width + cell % columns * SX + member % SX
    # Those to the right of the cells, then those below.
    left_over, right = place - cells * SIZE, width - columns * SX
    beside = left_over // tl.maximum(right, 1) * width + columns * SX + left_over % tl.maximum(right, 1)
    below = left_over + rows * SY * (width - right)
    token = tl.where(place < cells * SIZE, in_cell, tl.where(left_over < rows * SY * right, beside, below))
    tl.store(dst + sample * cells + place, token, mask=is_destination)
    tl.store(src + sample * (tokens - cells) + source, token, mask=~is_destination & (place < tokens))


@triton.jit
def _ordered(score):
    """Whole numbers from 0 to 2**32 - 1 in the order of float32 numbers."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def plan_kernel(
    src,
    dst,
    cell,
    score,
    members,
    merged,
    target,
    size,
    position,
    sources,
    destinations,
    count,
    src_sample_stride,
    src_stride,
    dst_sample_stride,
    dst_stride,
    SOURCES: tl.constexpr,
):
    """How a sample's tokens merge. Of equal scores, the first are merged away."""
    sample = tl.program_id(0).to(tl.int64)
    kept_count = sources - count
    src += sample * src_sample_stride
    dst += sample * dst_sample_stride
    cell += sample * sources
    score += sample * sources
    members += sample * (kept_count + destinations)
    merged += sample * count
    target += sample * count
    size += sample * destinations
    position += sample * (sources + destinations)

    # The lowest score that is merged away, eight bits after the other, and how many of those that have it.
    lowest = tl.zeros([1], tl.int64)
    wanted = tl.zeros([1], tl.int64) + count
    digits = tl.arange(0, 512)
    for shift in tl.static_range(24, -1, -8):
        histogram = tl.zeros([512], tl.int32)
        for first in range(0, sources, SOURCES):
            index = first + tl.arange(0, SOURCES)
            key = _ordered(tl.load(score + index, mask=index < sources, other=0.0))
            is_here = (index < sources) & ((key >> (shift + 8)) == (lowest >> (shift + 8)))
            # What does not count goes past the digits.
            histogram += tl.histogram(tl.where(is_here, (key >> shift) & 255, 256).to(tl.int32), 512)
        histogram = tl.where(digits < 256, histogram, 0).to(tl.int64)
        as_high = tl.cumsum(histogram, reverse=True)
        digit = tl.max(tl.where((as_high >= wanted) & (digits < 256), digits, 0))
        wanted -= tl.sum(tl.where(digits > digit, histogram, 0))
        lowest += digit.to(tl.int64) << shift

    for first in range(0, destinations, SOURCES):
        index = first + tl.arange(0, SOURCES)
        is_destination = index < destinations
        token = tl.load(dst + index * dst_stride, mask=is_destination, other=0)
        tl.store(members + kept_count + index, token, mask=is_destination)
        tl.store(position + token, (kept_count + index).to(tl.int64), mask=is_destination)
        tl.store(size + index, 1.0, mask=is_destination)
    tl.debug_barrier()  # the sizes are there before any is added to

    kept_before = tl.zeros([1], tl.int32)
    equal_before = tl.zeros([1], tl.int32)
    for first in range(0, sources, SOURCES):
        index = first + tl.arange(0, SOURCES)
        is_source = index < sources
        key = _ordered(tl.load(score + index, mask=is_source, other=0.0))
        is_equal = (is_source & (key == lowest)).to(tl.int32)
        rank = equal_before + tl.cumsum(is_equal, 0)
        is_merged = is_source & ((key > lowest) | ((is_equal == 1) & (rank <= wanted)))
        is_kept = is_source & ~is_merged
        kept = kept_before + tl.cumsum(is_kept.to(tl.int32), 0)
        token = tl.load(src + index * src_stride, mask=is_source, other=0)
        goes_to = tl.load(cell + index, mask=is_source, other=0)
        tl.store(members + kept - 1, token, mask=is_kept)
        tl.store(merged + index - kept, token, mask=is_merged)
        tl.store(target + index - kept, goes_to + kept_count, mask=is_merged)
        tl.store(position + token, tl.where(is_merged, goes_to + kept_count, kept - 1), mask=is_source)
        # Whole numbers, whose sum does not depend on their order.
        tl.atomic_add(size + goes_to, 1.0, mask=is_merged, sem="relaxed")
        kept_before += tl.sum(is_kept.to(tl.int32), 0)
        equal_before += tl.sum(is_equal, 0)


@triton.jit
def match_kernel(
    metric,
    dst,
    src,
    cell,
    score,
    tokens,
    destinations,
    sources,
    dst_sample_stride,
    dst_stride,
    src_sample_stride,
    src_stride,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The nearest destination of `ROWS` sources: of all similarities, only those to `COLUMNS` destinations exist."""
    sample = tl.program_id(1).to(tl.int64)
    metric += sample * tokens * CHANNELS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_source = row < sources
    src_token = tl.load(src + sample * src_sample_stride + row * src_stride, mask=is_source, other=0)
    source = metric + src_token * CHANNELS

    src_squares = tl.zeros([ROWS, DEPTH], tl.float32)
    for first in range(0, CHANNELS, DEPTH):
        channel = first + tl.arange(0, DEPTH)
        wide = tl.load(source[:, None] + channel[None, :], mask=channel[None, :] < CHANNELS, other=0.0).to(tl.float32)
        src_squares += wide * wide
    src_norm = tl.maximum(tl.sqrt(tl.sum(src_squares, axis=1)), 1e-6)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int32)
    for start in range(0, destinations, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_destination = column < destinations
        dst_token = tl.load(dst + sample * dst_sample_stride + column * dst_stride, mask=is_destination, other=0)
        destination = metric + dst_token * CHANNELS
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        dst_squares = tl.zeros([COLUMNS, DEPTH], tl.float32)
        for first in range(0, CHANNELS, DEPTH):
            channel = first + tl.arange(0, DEPTH)
            inside = channel[None, :] < CHANNELS
            a = tl.load(source[:, None] + channel[None, :], mask=inside, other=0.0)
            b = tl.load(destination[:, None] + channel[None, :], mask=inside, other=0.0)
            products = tl.dot(a, tl.trans(b), products)
            dst_squares += b.to(tl.float32) * b.to(tl.float32)
        dst_norm = tl.maximum(tl.sqrt(tl.sum(dst_squares, axis=1)), 1e-6)
        similarity = tl.where(is_destination[None, :], products * (1.0 / dst_norm)[None, :], float("-inf"))
        highest = tl.max(similarity, axis=1)
        # The first of equals, here and below, as in torch.
        place = tl.min(tl.where(similarity == highest[:, None], column[None, :], destinations), axis=1)
        # Never true of NaN, so that what is written is always a cell.
        is_nearer = highest > best
        nearest = tl.where(is_nearer, place, nearest)
        best = tl.where(is_nearer, highest, best)

    tl.store(cell + sample * sources + row, nearest.to(tl.int64), mask=is_source)
    tl.store(score + sample * sources + row, best / src_norm, mask=is_source)


@triton.jit
def order_kernel(
    merged,
    target,
    order,
    start,
    kept,
    count,
    destinations,
    merged_sample_stride,
    merged_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    Write merged tokens in the order of their targets, and where those of each begin. The place of a token is the
    number of those that go before it, which is counted: faster than a sort until there are very many.
    """
    sample = tl.program_id(1).to(tl.int64)
    target += sample * count
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_merged = row < count
    own = tl.load(target + row, mask=is_merged, other=0).to(tl.int32)
    lower = tl.zeros([ROWS, COLUMNS], tl.int32)
    earlier = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, count, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        # Past the end, a target higher than all.
        other = tl.load(target + column, mask=column < count, other=2147483647).to(tl.int32)
        lower += (other[None, :] < own[:, None]).to(tl.int32)
        earlier += ((other[None, :] == own[:, None]) & (column[None, :] < row[:, None])).to(tl.int32)
    before = tl.sum(lower, axis=1)
    rank = tl.sum(earlier, axis=1)
    token = tl.load(merged + sample * merged_sample_stride + row * merged_stride, mask=is_merged, other=0)
    tl.store(order + sample * count + before + rank, token, mask=is_merged)
    tl.store(start + sample * destinations + own - kept, before, mask=is_merged & (rank == 0))


@triton.jit
def merge_kernel(
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
    destinations,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One merged token: the mean of its own row and of those merged into it, always added in the same order."""
    row = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < CHANNELS
    x += sample * tokens * CHANNELS
    token = tl.load(members + sample * outputs + row)
    own = tl.load(x + token * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    # Tokens that are kept are means of one.
    cell = sample * destinations + row - kept
    divisor = tl.load(size + cell, mask=row >= kept, other=1.0)
    others = divisor.to(tl.int32) - 1
    begin = tl.load(start + cell, mask=others > 0, other=0)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, others, ROWS):
        place = first + tl.arange(0, ROWS)
        is_here = place < others
        merged = tl.load(order + sample * count + begin + place, mask=is_here, other=0)
        addend = x + merged[:, None] * CHANNELS + channel[None, :]
        sums += tl.load(addend, mask=is_here[:, None] & inside[None, :], other=0.0).to(tl.float32)
    mean = (own + tl.sum(sums, axis=0)) / divisor
    tl.store(out + (sample * outputs + row) * CHANNELS + channel, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def take_kernel(
    y,
    position,
    out,
    tokens,
    outputs,
    position_sample_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`ROWS` tokens by index, `WIDTH` channels of them."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = row < outputs
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    mask = is_token[:, None] & (channel[None, :] < CHANNELS)
    token = tl.load(position + sample * position_sample_stride + row * position_stride, mask=is_token, other=0)
    taken = tl.load(y + (sample * tokens + token)[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
    tl.store(out + (sample * outputs + row)[:, None] * CHANNELS + channel[None, :], taken, mask=mask)
