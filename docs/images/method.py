"""Draws `method.svg` by the package's own merging, on the image of the quickstart: `python docs/images/method.py`."""

from pathlib import Path

import torch
from PIL import Image

from agentsd.ops.merging import match_tokens, merge_tokens, plan_merging, unmerge_tokens
from agentsd.ops.partitioning import cell_grid, mix_key, partition_tokens, random_members


HERE = Path(__file__).parent
IMAGE = HERE.parents[1] / "notebooks" / "results" / "quickstart" / "baseline.png"
SIDE, CELL = 16, 4
BLUE, RED, GREY, INK = "#2563a8", "#c2410c", "#6b7280", "#111827"

STYLE = f"""
text {{ font-family: -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; font-size: 15px;
  fill: {INK}; text-anchor: middle; }}
.title {{ font-weight: 600; font-size: 16px; }}
.small {{ fill: {GREY}; font-size: 13.5px; }}
.token {{ stroke: #9ca3af; stroke-width: 0.7; }}
.cell {{ fill: none; stroke: {INK}; stroke-width: 1.1; }}
.agent {{ stroke: {INK}; stroke-width: 1.1; }}
.box {{ fill: #f8fafc; stroke: #cbd5e1; stroke-width: 1.2; }}
.first {{ fill: {BLUE}; }}
.second {{ fill: {RED}; }}
.start {{ text-anchor: start; }}
.end {{ text-anchor: end; }}
.chosen {{ fill: {INK}; stroke: white; stroke-width: 1.2; }}
.arrow {{ fill: none; stroke: {GREY}; stroke-width: 2; marker-end: url(#head); }}
"""


def rectangle(x, y, width, height, **attributes):
    """One box."""
    extra = "".join(f' {name.rstrip("_")}="{value}"' for name, value in attributes.items())
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{extra}/>'


def text(x, y, words, kind=""):
    """One line of text, centred unless its kind says otherwise."""
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{words}</text>'.replace("'", '"')


def arrow(*points):
    """A line through points, with a head."""
    start, *others = (f"{x:g},{y:g}" for x, y in points)
    return f'<path class="arrow" d="M{start} L{" ".join(others)}"/>'


def hexadecimal(colour):
    """A colour between 0 and 1 as SVG writes it."""
    return "#" + "".join(f"{round(float(value) * 255):02x}" for value in colour.clamp(0, 1))


def tokens(x, y, side, colours, shown=None, dots=()):
    """A grid of tokens; those not `shown` are left out, and `dots` are marked."""
    step = side / SIDE
    parts = [rectangle(x, y, side, side, fill="#f3f4f6")]
    for i in range(SIDE * SIDE) if shown is None else shown:
        place = x + i % SIDE * step, y + i // SIDE * step
        parts.append(rectangle(*place, step, step, fill=hexadecimal(colours[i]), class_="token"))
    for i in range(SIDE // CELL):
        for j in range(SIDE // CELL):
            size = CELL * step
            parts.append(rectangle(x + j * size, y + i * size, size, size, class_="cell"))
    for i in dots:
        centre = x + (i % SIDE + 0.5) * step, y + (i // SIDE + 0.5) * step
        parts.append(f'<circle class="chosen" cx="{centre[0]:g}" cy="{centre[1]:g}" r="{step * 0.33:.3g}"/>')
    return parts


def hourglass(x, y, many, few):
    """Values on the left, agents in the middle, queries on the right, and who reads whom."""
    gap, height = 118, 172
    rows = [[y + height * (i + 0.5) / len(c) for i in range(len(c))] for c in (many, few, many)]
    parts = []
    for (left, right), colour, first in ((rows[:2], BLUE, x), (rows[1:], RED, x + gap)):
        for a in left:
            for b in right:
                parts.append(
                    f'<path d="M{first + 7:g},{a:.4g} L{first + gap - 9:g},{b:.4g}" stroke="{colour}" '
                    'stroke-width="0.9" opacity="0.5"/>'
                )
    for column, (colours, places, size) in enumerate(((many, rows[0], 13), (few, rows[1], 22), (many, rows[2], 13))):
        for colour, centre in zip(colours, places, strict=True):
            corner = x + column * gap - size / 2, centre - size / 2
            parts.append(rectangle(*corner, size, size, fill=hexadecimal(colour), class_="token"))
    return parts


def draw():
    """Write the file."""
    with Image.open(IMAGE) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    colours = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(1, -1, 3) / 255
    # Colours alone would match across the whole image; where a token is says something too, as in a real layer.
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).unsqueeze(0) / SIDE
    metric = torch.cat([colours - 0.6, 0.35 * (places - 0.5)], dim=2)

    cells, leftover = cell_grid(SIDE, SIDE, sx=CELL, sy=CELL, device=torch.device("cpu"))
    partition = partition_tokens(cells, leftover, random_members(len(cells), CELL**2, mix_key(torch.tensor([601]), 0)))
    matches = match_tokens(metric, partition)
    merging = plan_merging(partition, matches, int(0.4 * SIDE**2))
    to_agents = plan_merging(partition, matches, partition.src.shape[1])
    kept, dots = merging.members[0].tolist(), partition.dst[0].tolist()
    means = torch.zeros_like(colours[0])
    means[kept] = merge_tokens(colours, merging)[0]
    agents = merge_tokens(colours, to_agents)[0]
    back = unmerge_tokens(merge_tokens(colours, merging), merging)[0]

    parts = [
        text(112, 92, "tokens", "title"),
        *tokens(24, 104, 176, colours[0], dots=dots),
        text(112, 302, f"cells of {CELL}×{CELL} tokens,", "small"),
        text(112, 320, "one destination (●) in each", "small"),
        arrow((206, 150), (262, 116)),
        arrow((206, 234), (262, 268)),
        text(332, 30, "merged tokens", "title"),
        *tokens(268, 42, 128, means, shown=kept, dots=dots),
        text(332, 189, "the most similar 40%", "small"),
        text(332, 206, "join a destination", "small"),
        text(332, 236, "agents", "title"),
    ]
    size = 32
    for i, agent in enumerate(agents):
        x, y = 268 + i % 4 * size, 246 + i // 4 * size
        parts.append(rectangle(x + 3, y + 3, size - 6, size - 6, fill=hexadecimal(agent), class_="agent"))
    parts += [
        text(332, 394, "all join: one agent per cell", "small"),
        arrow((404, 106), (440, 130)),
        arrow((404, 310), (440, 286)),
        rectangle(446, 60, 318, 318, rx=10, class_="box"),
        text(605, 50, "agent attention", "title"),
    ]
    many = means[[kept[i] for i in torch.linspace(5, len(kept) - 18, 12).long().tolist()]]
    few = agents[[1, 5, 10, 13]]
    parts += hourglass(487, 112, many, few)
    parts += [
        text(487, 84, "values", "small"),
        text(605, 84, "agents", "small"),
        text(723, 84, "queries", "small"),
        text(546, 312, "① agents", "first"),
        text(546, 331, "read values", "first"),
        text(664, 312, "② queries", "second"),
        text(664, 331, "read agents", "second"),
        text(605, 362, "instead of every query reading every value", "small"),
        arrow((770, 192), (802, 192)),
        text(890, 92, "unmerge", "title"),
        *tokens(810, 104, 160, back),
        text(890, 286, "each token gets the output", "small"),
        text(890, 303, "of the one it joined", "small"),
    ]
    # The schedule.
    left, right, top = 24, 968, 416
    middle = left + 0.4 * (right - left)
    parts += [
        rectangle(left, top, middle - left - 2, 34, rx=6, fill="#fde8dc"),
        rectangle(middle + 2, top, right - middle - 2, 34, rx=6, fill="#e0ecf8"),
        text((left + middle) / 2, top + 22, "first 40% of the noise: agents, as above"),
        text((middle + right) / 2, top + 22, "the rest: softmax attention over tokens merged in 2×2 cells"),
        text(left, top + 53, "noise", "small start"),
        text(right, top + 53, "image", "small end"),
    ]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 Z" fill="{GREY}"/></marker>'
    )
    title = "Agent attention in one self-attention layer: merge tokens, attend through agents, unmerge"
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 992 484" width="992" height="484" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{head}</defs>",
        rectangle(0.5, 0.5, 991, 483, rx=12, fill="white", stroke="#d1d5db"),
        *parts,
        "</svg>",
    ]
    (HERE / "method.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw()
