"""A folder that a long measurement writes to round by round, and goes on from after it was cut off."""

import json
from pathlib import Path
from typing import Any


class BenchError(ValueError):
    """A benchmark cannot run as asked; the message says why and what to do."""


class RunFolder:
    """
    Finished rounds of one run, each appended to `rounds.jsonl` at once; what was asked for and where it runs lie in
    `run.json`, so that a run never goes on from rounds of another one.

    Args:
        path (`Path`): The folder; made if it is not there.
        header (`dict[str, Any]`): What identifies the run, of plain JSON values.
        resume (`bool`, defaults to `False`): Go on from the rounds that lie there.

    Raises:
        BenchError: If rounds lie there and `resume` is off, if they come from a run with another header, or if a line
            cannot be read.

    Examples:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from agentsd.bench.store import RunFolder
    >>> folder = Path(tempfile.mkdtemp())
    >>> RunFolder(folder, {"suite": "cpu"}).append({"seconds": 1.5})
    >>> RunFolder(folder, {"suite": "cpu"}, resume=True).rounds
    [{'seconds': 1.5}]
    ```
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.rounds: list[dict[str, Any]] = []
        self._header = path / "run.json"
        self._log = path / "rounds.jsonl"
        if self._log.exists():
            if not resume:
                raise BenchError(f"{path} holds the rounds of an earlier run. Resume it, or name another folder.")
            self._check(header)
            self.rounds = self._read()
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._header.write_text(json.dumps(header, indent=2) + "\n")
            self._log.touch()

    def append(self, record: dict[str, Any]) -> None:
        """
        Keep a finished round.

        Args:
            record (`dict[str, Any]`): Plain JSON values.
        """
        with self._log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.rounds.append(record)

    def _check(self, header: dict[str, Any]) -> None:
        try:
            earlier = json.loads(self._header.read_text())
        except (OSError, ValueError) as error:
            raise BenchError(f"{self._header} cannot be read ({error}). Start again in another folder.") from error
        # JSON turns tuples into lists: compare what would be written.
        changed = _differences(earlier, json.loads(json.dumps(header)))
        if changed:
            raise BenchError(
                f"{self.path} holds another run (different: {', '.join(changed)}). Name another folder, or run with "
                "the same settings on the same machine and software."
            )

    def _read(self) -> list[dict[str, Any]]:
        text = self._log.read_text()
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # cut off in the middle of a line: that round is measured again
            self._log.write_text(complete)
        rounds = []
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                rounds.append(json.loads(line))
            except ValueError as error:
                raise BenchError(
                    f"Line {number} of {self._log} cannot be read ({error}). Delete it to resume."
                ) from error
        return rounds


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(prefix + key)
    return names
