"""What the benchmark draws unless told otherwise."""

import json
from pathlib import Path

from ..utils.loading import resolve_model
from .store import BenchError


def builtin_prompts() -> tuple[str, ...]:
    """
    A plain prompt for everything that the embedded model has learned to draw.

    Returns:
        `tuple[str, ...]`: Prompts.

    Examples:

    ```python
    >>> from agentsd.bench.prompts import builtin_prompts
    >>> "a red apple" in builtin_prompts()
    True
    ```
    """
    training = Path(resolve_model("emoji")) / "training.json"
    return tuple(json.loads(training.read_text(encoding="utf-8"))["prompts"])


def read_prompts(file: str | Path) -> tuple[str, ...]:
    """
    Prompts of a text file, one a line; empty lines are left out.

    Args:
        file (`str` or `Path`): The file.

    Returns:
        `tuple[str, ...]`: Prompts.

    Raises:
        BenchError: If the file cannot be read, or holds no prompt.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"Cannot read the prompts in {file}: {error}.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise BenchError(f"{file} holds no prompts: write one on each line.")
    return prompts
