"""Fixtures of the tests of training; imports are inside, since what training needs may be missing."""

from pathlib import Path

import pytest


@pytest.fixture
def archive_dir(tmp_path: Path) -> Path:
    """A folder with small icon archives."""
    from toy_drawings import write_archives

    write_archives(tmp_path / "archives")
    return tmp_path / "archives"


@pytest.fixture
def icons(archive_dir: Path, tmp_path: Path) -> list:
    """What there is to learn in these archives."""
    from emoji_training.archives import gather_icons
    from emoji_training.names import HELD_OUT
    from emoji_training.recipe import FULL

    return gather_icons(FULL.styles, None, HELD_OUT, archive_dir, tmp_path)[0]
