"""What the training stages share: the clock, checkpoints, the loss log."""

import functools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .archives import DataError


class Clock:
    """
    Training time as a part of the minutes given; the learning rate follows it, so any budget ends annealed.

    On a CPU, a step counts for no more than the processor time that it took: a process that was stopped for a while,
    or that others left little time to, goes on where it was.
    """

    def __init__(self, minutes: float, elapsed: float = 0.0):
        self.budget = minutes * 60.0
        self.elapsed = elapsed  # seconds trained so far, earlier runs included
        self.last = self.now()

    @staticmethod
    def now() -> tuple[float, ...]:
        """What the clocks show that a step's time is taken by, the least of them counting."""
        return (time.monotonic(), time.process_time()) if pick_device().type == "cpu" else (time.monotonic(),)

    def end_step(self) -> None:
        """Count the time since the last step."""
        now = self.now()
        self.elapsed += min(after - before for after, before in zip(now, self.last, strict=True))
        self.last = now

    @property
    def fraction(self) -> float:
        """From 0 to 1 over the budget."""
        return min(1.0, self.elapsed / self.budget) if self.budget > 0 else 1.0


def learning_rate(peak: float, fraction: float, step: int, warmup: int, hold: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, the peak until `hold`, then a cosine over the rest, down to 1 %."""
    fraction = max(0.0, fraction - hold) / (1.0 - hold)
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * fraction)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step down the gradient of `loss`, of norm 1 at most; none where it is not finite, which would be the end."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    # As a GradScaler tells fused optimizers to leave a step out: looking at the norm would make a GPU wait.
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()


def new_state() -> dict:
    """The state of a stage that has not begun."""
    return {"step": 0, "elapsed": 0.0, "log": []}


class Progress:
    """
    A stage's steps until its time is up, with a bar that counts percent of the time, and the loss log.

    Iterating gives the part of the time that is over; [`Progress.end_step`] is to be called at the end of each step.
    """

    def __init__(self, label: str, state: dict, minutes: float, log_steps: int):
        self.label, self.state, self.log_steps = label, state, log_steps
        self.clock = Clock(minutes, state["elapsed"])
        self.recent: list[dict[str, torch.Tensor]] = []
        state["budget"] = minutes

    def __iter__(self) -> Iterator[float]:
        with tqdm(total=100, desc=self.label, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as self.bar:
            while self.clock.fraction < 1.0:
                self.bar.update(round(self.clock.fraction * 100, 1) - self.bar.n)
                yield self.clock.fraction
            self.bar.update(100 - self.bar.n)

    def end_step(self, losses: dict[str, torch.Tensor]) -> None:
        """Count a step; now and then log the mean losses. Only then are they read, since a GPU waits for that."""
        self.state["step"] += 1
        self.clock.end_step()
        self.state["elapsed"] = self.clock.elapsed
        self.recent.append({name: loss.detach() for name, loss in losses.items()})
        if self.state["step"] % self.log_steps == 0 or self.state["step"] == 1:
            means = {name: torch.stack([row[name] for row in self.recent]).mean().item() for name in losses}
            self.recent = []
            self.state["log"].append({"step": self.state["step"], "minutes": self.clock.elapsed / 60} | means)
            self.bar.set_postfix(step=self.state["step"], **{name: f"{mean:.4f}" for name, mean in means.items()})


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
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
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
                return json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return None


def load_weights(model: nn.Module, stage_folder: Path, name: str, unfinished: bool = False) -> dict:
    """Load one model of a finished stage, or of one that is under way if that will do; return the stage's state."""
    stage = stage_folder.name
    if not (stage_folder / "state.json").is_file():
        raise DataError(f"nothing trained in {stage_folder}: run --stage {stage} first")
    state = json.loads((stage_folder / "state.json").read_text(encoding="utf-8"))
    if not state.get("finished") and not unfinished:
        raise DataError(f"the training in {stage_folder} was interrupted: run --stage {stage} --resume first")
    model.load_state_dict(load_file(stage_folder / f"{name}.safetensors"))
    return state


@functools.cache
def half_pays() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in fp32: of those that can do both, not all do."""
    best: dict[torch.dtype, float] = {}
    for dtype in [torch.float32, torch.bfloat16] * 20:
        matrix = torch.ones(512, 512, dtype=dtype)
        started = time.process_time()  # not the time of day: the machine may have other work to do
        matrix @ matrix
        best[dtype] = min(best.get(dtype, math.inf), time.process_time() - started)
    return best[torch.bfloat16] < best[torch.float32]


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where it pays: two to three times faster than fp32 on CPUs that have the instructions, and on GPUs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or half_pays())


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
