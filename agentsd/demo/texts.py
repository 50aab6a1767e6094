"""Numbers and tables as text."""

from collections.abc import Sequence


def seconds(value: float) -> str:
    """
    A time.

    Args:
        value (`float`): Seconds.

    Returns:
        `str`: For people.
    """
    return f"{value:.3f} s"


def gain(speed_up: float) -> str:
    """
    A speed-up, and that it is none where it is none.

    Args:
        speed_up (`float`): How many times faster.

    Returns:
        `str`: For people.

    Examples:

    ```python
    >>> gain(1.25), gain(0.9)
    ('1.25×', '0.90× (slower)')
    ```
    """
    text = f"{speed_up:.2f}×"
    return text if float(text[:-1]) >= 1 else f"{text} (slower)"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """
    A table whose first column is text and the others are numbers.

    Args:
        lines (`Sequence[Sequence[str]]`): Lines of cells, the header first.

    Returns:
        `str`: Markdown.

    Examples:

    ```python
    >>> print(markdown_table([("", "time"), ("per step", "1 s")]))
    |  | time |
    | :-- | --: |
    | per step | 1 s |
    ```
    """
    rule = [":--", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
