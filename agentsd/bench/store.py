"""The folder that a run writes to as it goes, and resumes from after it was cut off."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


# How long a run may take changes nothing of what it measures.
_MAY_DIFFER = ("budget_minutes",)


class BenchError(ValueError):
    """A benchmark cannot run as asked; the message says why and what to do."""


class RunFolder:
    """
    Where one run keeps its results.

    `settings.json` and `environment.json` say what was asked for and where it ran, so that a run never goes on from
    results of another one; `rounds.jsonl` has every timed round, `cases.jsonl` a row for every finished case, and
    `images/` the images. A `BenchError` says what is wrong with what lies there.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], environment: dict[str, Any], resume: bool = False
    ) -> None:
        self.path = path
        self.images = path / "images"
        headers = {path / "settings.json": settings, path / "environment.json": environment}
        logs = [path / name for name in ("rounds.jsonl", "cases.jsonl")]
        try:
            if any(log.exists() for log in logs):
                if not resume:
                    raise BenchError(
                        f"{path} holds the results of an earlier run. Resume it with --resume, or name another folder."
                    )
                self._check(headers)
            elif self.images.exists():
                raise BenchError(
                    f"{self.images} holds images, but no log says what was asked for when they were drawn. Name "
                    "another folder, or delete them."
                )
            else:
                path.mkdir(parents=True, exist_ok=True)
                for file, values in headers.items():
                    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            self.rounds, self.cases = (Log(log) for log in logs)
        except OSError as error:
            raise BenchError(f"Cannot write to {path}: {error.strerror or error}. Name another folder.") from error

    def _check(self, headers: dict[Path, dict[str, Any]]) -> None:
        changed = []
        for file, values in headers.items():
            try:
                earlier = read_object(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise BenchError(f"{file} cannot be read ({error}). Start again in another folder.") from error
            # JSON turns tuples into lists: compare what would be written.
            now = json.loads(json.dumps(values))
            changed += [name for name in _differences(earlier, now) if name not in _MAY_DIFFER]
        if changed:
            raise BenchError(
                f"{self.path} holds a different run ({', '.join(changed)} differ). Name another folder, or run with "
                "the same settings on the same machine and software."
            )


class Log:
    """A file of JSON lines, made if it is not there; a last line that was cut off in writing is taken away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.records: list[dict[str, Any]] = read_log(path)
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            path.write_text(_complete_lines(text), encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Write a record at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)

    def find(self, **values: Any) -> list[dict[str, Any]]:
        """The records with these values, in order."""
        return [record for record in self.records if all(record.get(name) == values[name] for name in values)]

    def keep(self, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The record of this key, made and written now if it is not there yet."""
        found = self.find(**key)
        if not found:
            self.append({**key, **make()})
            found = self.records[-1:]
        return found[0]

    def remove(self, is_stale: Callable[[dict[str, Any]], bool]) -> None:
        """Take records away; all others are left byte for byte."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line, record in zip(lines, self.records, strict=True) if not is_stale(record)]
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text("".join(kept), encoding="utf-8")
        unfinished.replace(self.path)
        self.records = [record for record in self.records if not is_stale(record)]


def read_log(path: Path) -> list[dict[str, Any]]:
    """
    The records of a file of JSON lines, without a last line that was cut off in writing.

    The file is left as it is: a run may be writing to it.
    """
    records = []
    try:
        lines = _complete_lines(path.read_text(encoding="utf-8")).splitlines()
    except UnicodeDecodeError as error:
        raise BenchError(f"{path} is not text ({error}). Start again in another folder.") from error
    for number, line in enumerate(lines, start=1):
        try:
            records.append(read_object(line))
        except ValueError as error:
            raise BenchError(f"Line {number} of {path} cannot be read ({error}). Delete it to resume.") from error
    return records


def read_object(text: str) -> dict[str, Any]:
    """Read JSON that must be an object; whatever else it is is a `ValueError`."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def _complete_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(prefix + key)
    return names
