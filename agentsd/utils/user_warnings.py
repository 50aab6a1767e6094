"""Warnings that concern what the user asked for, told from the libraries' notes about their insides."""

import ast
import logging
import re
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("diffusers", "transformers")
_LONGEST = 300
# What diffusers says to every user of such a model or machine, or what agentsd says itself in better words.
_NOISE = re.compile(
    r"You have disabled the safety checker|Potential NSFW content|will not receive bug fixes or feature updates"
    r"|cannot run with `cpu` device|appears to have been deprecated|is an experimental feature|Cannot initialize model"
    r"|Defaulting to unsafe serialization|should be kept in float32"
)


def cut_text(what: str, tokens: int | str, rest: str) -> str:
    """The warning that the end of a prompt was left out."""
    end = textwrap.shorten(rest, _LONGEST, placeholder=" …")
    return f'The {what} is longer than the {tokens} tokens that the model reads. This end was left out: "{end}"'


def _cut_prompt(found: re.Match[str]) -> str:
    try:
        # The ends of all prompts of a batch.
        rest = " … ".join(ast.literal_eval(found["rest"]))
    except (SyntaxError, ValueError):
        rest = found["rest"]
    return cut_text("prompt", found["tokens"], rest)


_REWORDED: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"(?s)part of your input was truncated because .*? (?P<tokens>\d+) tokens: (?P<rest>.*)"),
        _cut_prompt,
    ),
    (
        re.compile(r"(?s)configuration file of this scheduler: .*`(?P<name>\w+)` should be set to (?P<value>\w+)"),
        lambda found: f"The scheduler's configuration is outdated: `{found['name']}` was set to {found['value']}.",
    ),
    (
        re.compile(r"configuration file of the unet has set the default `sample_size` to smaller than (?P<size>\d+)"),
        lambda found: f"The UNet's configuration is outdated: `sample_size` was set to {found['size']}.",
    ),
    (
        re.compile(r"(?s)weights of (?P<name>\w+) were not initialized|LOAD REPORT.*\bMISSING\b"),
        lambda found: (
            f"Weights of {found['name'] or 'a text encoder'} are missing in the checkpoint, and are random instead."
        ),
    ),
    (
        re.compile(r"Passing `image` as torch tensor with value range in \[-1,1\] is deprecated"),
        lambda found: "The image has values in [-1, 1], and was taken for one that was normalised already.",
    ),
)


def plain_words(message: str, is_trusted: bool) -> str | None:
    """
    A library's warning as the user should read it; `None` if it does not concern what was asked for.

    `is_trusted` says whether one that is not known counts.
    """
    text = " ".join(message.split())
    for pattern, reword in _REWORDED:
        if found := pattern.search(text):
            return reword(found)
    if not is_trusted or _NOISE.search(text):
        return None
    return textwrap.shorten(text, _LONGEST, placeholder=" …")


def plain_warning(message: Warning | str, category: type[Warning], filename: str) -> str | None:
    """The same of a warning by Python's `warnings`: agentsd's own are for the user, deprecations are not."""
    if Path(filename).resolve().is_relative_to(_PACKAGE):
        return str(message)
    return plain_words(str(message), is_trusted=category is UserWarning and "diffusers" in Path(filename).parts)


class _Listener(logging.Handler):
    """Hears what the libraries log in one thread."""

    def __init__(self, hear: Callable[[str | None], Any]) -> None:
        super().__init__(logging.WARNING)
        self._hear, self._thread = hear, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a warning; errors are printed by the libraries themselves."""
        if record.thread == self._thread and record.levelno == logging.WARNING:
            self._hear(plain_words(record.getMessage(), is_trusted=record.name.startswith("diffusers")))


@contextmanager
def user_warnings(said: list[str] | None = None) -> Iterator[list[str]]:
    """
    Collect what the user should hear of while a `with` block runs, each once, in plain words.

    Args:
        said (`list[str]`, *optional*):
            What was said already, to which the new is added. agentsd's own warnings are issued only if they are new.

    Yields:
        `list[str]`: The warnings so far.

    Examples:

    ```python
    >>> import logging
    >>> with user_warnings() as said:
    ...     logging.getLogger("diffusers").warning("`eta` is ignored.")
    ...     logging.getLogger("diffusers").warning("`eta` is ignored.")
    >>> said
    ['`eta` is ignored.']
    ```
    """
    said = [] if said is None else said
    thread, show_before = threading.get_ident(), warnings.showwarning

    def hear(text: str | None) -> bool:
        is_new = text is not None and text not in said
        if text is not None and is_new:
            said.append(text)
        return is_new

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        text = plain_warning(message, category, filename) if threading.get_ident() == thread else None
        if hear(text) or text is None:
            show_before(message, category, filename, lineno, file, line)

    listener = _Listener(hear)
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings():
            # Python shows a warning once a process; who asks a second time must hear of it, too.
            warnings.filterwarnings("always", category=UserWarning, module=r"agentsd\.|diffusers\.")
            warnings.showwarning = show
            yield said
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
