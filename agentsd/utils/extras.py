"""How to get the optional packages."""


def how_to_install(extra: str) -> str:
    """
    The command that brings an extra's packages. agentsd is not on PyPI, so that it is one for a clone.

    Args:
        extra (`str`): `"bench"`, `"demo"` or `"quality"`.

    Returns:
        `str`: What to do, for the end of an error message.

    Examples:

    ```python
    >>> how_to_install("bench")
    "pip install '.[bench]' in a clone of agentsd"
    ```
    """
    return f"pip install '.[{extra}]' in a clone of agentsd"
