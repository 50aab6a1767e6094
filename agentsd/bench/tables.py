"""Keeps the tables of documents equal to recorded results: `python -m agentsd.bench.tables README.md`."""

import re
import sys
from pathlib import Path

from .report import load_result


# <!-- results: FOLDER without COLUMN, COLUMN --> … <!-- /results -->, with the folder seen from the document. Where it
# has a *, all that match are shown, each below the name of its machine.
_BLOCK = re.compile(
    r"(?s)(?P<begin><!-- results: (?P<folder>\S+)(?: without (?P<columns>[^\n]+))? -->\n).*?(?P<end><!-- /results -->)"
)


def fill_tables(document: Path) -> str:
    """The text of a Markdown document, with the tables between its marks rebuilt from recorded results."""

    def fill(found: re.Match[str]) -> str:
        without = [name.strip() for name in (found["columns"] or "").split(",") if name.strip()]
        if "*" not in found["folder"]:
            tables = [load_result(document.parent / found["folder"]).to_markdown(without)]
        else:
            logs = sorted(document.parent.glob(f"{found['folder']}/cases.jsonl"))
            results = [load_result(log.parent) for log in logs]
            tables = [f"### {result.machine_name}\n\n{result.to_markdown(without)}" for result in results]
        return "\n".join([found["begin"], *tables, found["end"]])

    return _BLOCK.sub(fill, document.read_text(encoding="utf-8"))


def main(documents: list[str]) -> None:
    """Write the tables of some documents, and say which have any; that none has is an error."""
    filled = 0
    for name in documents:
        document = Path(name)
        before = document.read_text(encoding="utf-8")
        if _BLOCK.search(before) is None:
            continue
        document.write_text(fill_tables(document), encoding="utf-8")
        print(document)
        filled += 1
    if not filled:
        sys.exit("No results table: mark one with <!-- results: FOLDER --> and <!-- /results -->.")


if __name__ == "__main__":
    main(sys.argv[1:])
