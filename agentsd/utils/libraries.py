"""The libraries around agentsd: how to get the optional ones, and how to keep them quiet."""

import logging
from typing import Any


def how_to_install(extra: str) -> str:
    """The command that brings the packages of an extra; agentsd is not on PyPI, so it is one for a clone."""
    return f"pip install '.[{extra}]' in a clone of agentsd"


def quiet_libraries() -> None:
    """
    Spare the user notes about the libraries' insides, and progress bars of less than a second.

    Their warnings are still issued, and not printed: `user_warnings` picks out those that concern the user.
    """
    import transformers

    # Before diffusers is imported, which makes transformers warn.
    _print_errors_only(transformers.utils.logging)
    import diffusers

    _print_errors_only(diffusers.utils.logging)


def _print_errors_only(library_logging: Any) -> None:
    library_logging.set_verbosity_warning()
    for handler in library_logging.get_logger().handlers:
        handler.setLevel(logging.ERROR)
    library_logging.disable_progress_bar()
