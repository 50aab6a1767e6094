"""Keeps the tables of a document equal to recorded results: `python -m agentsd.bench.tables README.md`."""

import re
import sys
from pathlib import Path

from .report import load_result
from .store import BenchError


# <!-- results: FOLDER without COLUMN, COLUMN --> … <!-- /results -->
_BLOCK = re.compile(
    r"(?s)(?P<begin><!-- results: (?P<folder>\S+)(?: without (?P<columns>[^\n]+))? -->\n).*?(?P<end><!-- /results -->)"
)


def fill_tables(document: Path) -> str:
    """
    A document with its tables rebuilt from recorded results.

    Args:
        document (`Path`):
            A Markdown file. What stands between `<!-- results: FOLDER -->` and `<!-- /results -->` is replaced; the
            folder is one that `agentsd bench --out` wrote, seen from the document. `<!-- results: FOLDER without
            quartiles, KID -->`, in one line, leaves columns out.

    Returns:
        `str`: Its new text.

    Raises:
        BenchError: If it names no results, or they cannot be read, or have no such column.
    """
    text = document.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        raise BenchError(f"{document} has no results table: mark one with <!-- results: FOLDER -->.")

    def fill(found: re.Match[str]) -> str:
        result = load_result(document.parent / found["folder"])
        without = [name.strip() for name in (found["columns"] or "").split(",") if name.strip()]
        return f"{found['begin']}\n{result.to_markdown(without)}\n{found['end']}"

    return _BLOCK.sub(fill, text)


def main() -> None:
    """Write the tables of the documents named on the command line."""
    for name in sys.argv[1:]:
        document = Path(name)
        document.write_text(fill_tables(document), encoding="utf-8")


if __name__ == "__main__":
    main()
