"""What an earlier run found of its images, on a faster machine say, in place of drawing them once more."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..runtime.break_even import least_tokens
from .methods import varies_by_device
from .report import load_result
from .rows import Case
from .settings import BenchSettings
from .store import BenchError, read_log


# None of these changes an image by more than its rounding; precision and device are compared by what came of them.
_MAY_DIFFER = (
    *("methods", "batches", "warmup", "repeats", "device", "dtype"),
    *("compile", "memory", "budget_minutes", "images_of"),
)


class EarlierImages:
    """
    The figures of the images of a finished run.

    Args:
        folder (`str` or `Path`): The results folder of that run.
        settings (`BenchSettings`): What is asked for now: it must draw the same images.
        facts (`Mapping[str, Any]`): Where, and in which precision, it would draw them, as `agentsd env` says it.
    """

    def __init__(self, folder: str | Path, settings: BenchSettings, facts: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        earlier = load_result(self._folder)
        self.machine = earlier.machine()
        # Not the result's rows: they have numbers that depend on times, too.
        self._rows = [row for row in read_log(self._folder / "cases.jsonl") if row.get("reason") is None]
        differ = [
            name
            for name, value in settings.to_dict().items()
            if name not in _MAY_DIFFER and earlier.settings.get(name) != value
        ]
        if earlier.environment.get("dtype") != facts["dtype"]:
            differ.append("dtype")
        if differ:
            raise BenchError(f"The run in {folder} drew other images: {', '.join(differ)} differ. Ask for the same.")
        self._check_devices(settings, earlier.environment.get("device", "cpu"), facts["device"])
        cases = [case for group in settings.groups() for case in group]
        missing = list(dict.fromkeys(case.name for case in cases if self._find(case) is None))
        if missing:
            raise BenchError(f"The run in {folder} has no images of {', '.join(missing)}. Draw them there first.")

    def numbers(self, case: Case) -> dict[str, Any]:
        """The fields of a case's row that are about images."""
        row = self._find(case)
        assert row is not None  # all have been looked for
        return {name: row[name] for name in ("images", "blank", "identical", "quality")}

    def _check_devices(self, settings: BenchSettings, *devices: str) -> None:
        """See that every method leaves the same layers alone there and here."""
        numbers = [least_tokens("auto", torch.device(device)) for device in devices]
        varying = [name for name in settings.methods if varies_by_device(name, settings.options)]
        if numbers[0] != numbers[1] and varying:
            raise BenchError(
                f"The run in {self._folder} drew other images: with min_tokens='auto', layers of fewer than "
                f"{numbers[0]} tokens are left alone there, and of fewer than {numbers[1]} here, by "
                f"{', '.join(varying)}. Name a number in both runs (--set min_tokens=…)."
            )

    def _find(self, case: Case) -> dict[str, Any] | None:
        """The row of the same images, in whatever batches they were drawn; a size that is the model's own fits any."""
        keys: Sequence[str] = ("model", "method", "ratio", *(("height", "width") if case.height is not None else ()))
        return next((row for row in self._rows if all(row[key] == getattr(case, key) for key in keys)), None)
