"""What both training stages share: the clock, checkpoints, the loss log."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .data import DataError


class Clock:
    """Training time as a part of the minutes given; the learning rate follows it, so any budget ends annealed."""

    def __init__(self, minutes: float, elapsed: float = 0.0):
        self.budget = minutes * 60.0
        self.started = time.monotonic() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds trained so far, earlier runs included."""
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """From 0 to 1 over the budget."""
        return min(1.0, self.elapsed / self.budget) if self.budget > 0 else 1.0


def learning_rate(peak: float, fraction: float, step: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine over the time budget, down to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * fraction)))


class Checkpoint:
    """One stage's state on disk: weights as safetensors, optimizer, step, elapsed time and loss log.

    It is written to a folder beside and then renamed, so that a crash while saving costs nothing.
    """

    def __init__(self, folder: Path, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer, every: float):
        self.folder, self.models, self.optimizer, self.every = folder, models, optimizer, every
        self.last = time.monotonic()

    def save(self, state: dict) -> None:
        """Write everything now."""
        new, old = self.folder.with_name(self.folder.name + ".new"), self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, model in self.models.items():
            save_file(
                {key: value.contiguous() for key, value in model.state_dict().items()}, new / f"{name}.safetensors"
            )
        torch.save(self.optimizer.state_dict(), new / "optimizer.pt")
        (new / "state.json").write_text(json.dumps(state))
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(new, self.folder)
        self.last = time.monotonic()

    def save_if_due(self, state: dict) -> None:
        """Write when the last checkpoint is old enough."""
        if time.monotonic() - self.last >= self.every:
            self.save(state)

    def load(self) -> dict | None:
        """Restore the newest whole checkpoint and return its state; None when there is none."""
        for folder in (self.folder, self.folder.with_name(self.folder.name + ".old")):
            if (folder / "state.json").is_file():
                for name, model in self.models.items():
                    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
                self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
                return json.loads((folder / "state.json").read_text())
        return None


def load_weights(model: nn.Module, stage_folder: Path, name: str) -> dict:
    """Load one model of a stage's checkpoint, return the stage's state."""
    if not (stage_folder / "state.json").is_file():
        raise DataError(f"nothing trained in {stage_folder}: run --stage {stage_folder.name} first")
    model.load_state_dict(load_file(stage_folder / f"{name}.safetensors"))
    return json.loads((stage_folder / "state.json").read_text())


def ticks(clock: Clock, label: str) -> Iterator[tqdm]:
    """Yield the progress bar once a training step until the time is up; the bar counts percent of the budget."""
    with tqdm(total=100, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while clock.fraction < 1.0:
            bar.n = round(clock.fraction * 100, 1)
            yield bar
        bar.n = 100
        bar.refresh()


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where it pays: two to three times faster than fp32 on CPUs with AVX512-bf16 and on GPUs."""
    return torch.autocast(device.type, torch.bfloat16) if device.type != "mps" else nullcontext()


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
