"""The libraries around agentsd: how to get the optional ones, and how to keep them quiet."""


def how_to_install(extra: str) -> str:
    """The command that brings the packages of an extra; agentsd is not on PyPI, so it is one for a clone."""
    return f"pip install '.[{extra}]' in a clone of agentsd"


def quiet_libraries() -> None:
    """Spare the user notes about the libraries' insides, and progress bars of less than a second."""
    import transformers

    # Before diffusers is imported, which makes transformers warn.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
