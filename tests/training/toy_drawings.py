"""Toy archives of drawings for the tests of training. Importing this skips a test file where a package is missing."""

import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest


pytest.importorskip("resvg_py", reason="training renders SVG with resvg-py")
pytest.importorskip("matplotlib", reason="the export stage plots losses")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps"))

from emoji_training.archives import PACKAGES, Icon
from emoji_training.scenes import Background


DRAWINGS = {
    "red-heart": '<circle cx="64" cy="64" r="40" fill="#f44336"/>',
    "blue-book": '<path d="M20 20h88v88H20z" fill="#1565c0"/>',
    "star": '<path d="M64 10l50 100H14z" fill="#fdd835"/>',
    "mango": '<path d="M64 10l50 100H14z" fill="#ff8f00"/>',
    "flag-of-nowhere": '<path d="M0 0h128v128H0z"/>',
}
TAUGHT = ("blue-book", "red-heart", "star")

PLAIN = Background("plain", ("teal",), 0.0, 0.1)


def write_archives(folder: Path, drawings: Mapping[str, str] = DRAWINGS) -> None:
    """Small icon archives of all styles, in the form `npm pack` leaves."""
    folder.mkdir()
    table = {"width": 128, "height": 128, "icons": {name: {"body": body} for name, body in drawings.items()}}
    raw = json.dumps(table).encode()
    for package in PACKAGES.values():
        with tarfile.open(folder / f"{package[1:].replace('/', '-')}-1.0.0.tgz", "w:gz") as tar:
            info = tarfile.TarInfo("package/icons.json")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def icons_called(*names: str) -> list[Icon]:
    """Drawings that only have names."""
    return [Icon("noto", name, "", 1, 1) for name in names]
