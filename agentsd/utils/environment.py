"""What a measurement ran on: without it, a number of seconds says nothing."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..version import __version__


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "tomesd", "DeepCache", "hidiffusion")


def environment(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Machine and software as plain values, ready for JSON; `None` for a package that is not installed."""
    facts: dict[str, Any] = {
        "agentsd": __version__,
        "commit": _commit(),
        **{name: _version(name) for name in PACKAGES},
        "torch": str(torch.__version__),  # which build it is, too, as its metadata need not say
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device),
        "cuda": torch.version.cuda,
    }
    if device is not None:
        facts["device"] = str(device)
    if dtype is not None:
        facts["dtype"] = str(dtype).removeprefix("torch.")
    if device is not None and dtype is not None:
        facts["sdpa"] = _attention_backend(torch.device(device), dtype)
    return facts


def _attention_backend(device: torch.device, dtype: torch.dtype) -> str | None:
    """Which of its kernels torch chooses for the largest self-attention of Stable Diffusion 1.5; not known on MPS."""
    query = torch.empty(2, 8, 4096, 40, device=device, dtype=dtype)
    # There is no public way to ask, only ways to forbid.
    try:
        return SDPBackend(torch._fused_sdp_choice(query, query, query)).name.lower().replace("_", " ")
    except RuntimeError:
        return None


def _gpu(device: torch.device | str | None) -> str | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device if device is not None and torch.device(device).type == "cuda" else None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that agentsd was imported from, marked when files differ from it."""
    package = Path(__file__).resolve().parents[1]
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != package.parent:  # installed below somebody else's repository
            return None
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", str(package))
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} (with local changes)" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    run = subprocess.run(command, check=True, capture_output=True, timeout=30, encoding="utf-8", errors="replace")
    return run.stdout.strip()
