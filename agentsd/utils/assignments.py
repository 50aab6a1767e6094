"""Values of options that are written as text, such as `agent_until=0.3`."""

import ast
from collections.abc import Sequence
from typing import Any


def read_assignments(settings: Sequence[str], taker: str) -> dict[str, Any]:
    """
    The values of `NAME=VALUE` texts: numbers, `True`, `False`, `None`, or else text.

    Args:
        settings (`Sequence[str]`): The texts, a name in no more than one of them.
        taker (`str`): What takes them, for messages: `--set`, say.

    Returns:
        `dict[str, Any]`: Names and values.

    Raises:
        ValueError: If a text has no `=`, or a name is given twice.

    Examples:

    ```python
    >>> read_assignments(["agent_until=0.3", "merge_mlp=true", "late_phase=kv-mean"], "--set")
    {'agent_until': 0.3, 'merge_mlp': True, 'late_phase': 'kv-mean'}
    ```
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{taker} takes NAME=VALUE, such as agent_until=0.3, but got {setting!r}.")
        if name in values:
            raise ValueError(f"{name} is given twice.")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
