"""What agentsd warns of: to Python's warnings, or to whoever collects it for people who do not read those."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


# Not by `warnings.catch_warnings`, which is one for all threads, and has other warnings shown again.
_COLLECTED: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def warn(message: str) -> None:
    """Warn, on behalf of the caller of the function that calls this."""
    collected = _COLLECTED.get()
    if collected is None:
        warnings.warn(message, stacklevel=3)
    elif message not in collected:
        collected.append(message)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """
    Collect what agentsd warns of in a `with` block, each text once, instead of handing it to Python's warnings.

    Examples:

    ```python
    >>> with collected_warnings() as said:
    ...     warn("Too few steps.")
    ...     warn("Too few steps.")
    >>> said
    ['Too few steps.']
    ```
    """
    collected: list[str] = []
    token = _COLLECTED.set(collected)
    try:
        yield collected
    finally:
        _COLLECTED.reset(token)
