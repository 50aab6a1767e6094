"""What the command line says and shows: one-line errors and warnings, progress bars, tables, in any encoding."""

import codecs
import io
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..utils.progress import Progress
from ..utils.user_warnings import plain_warning


# Results go to standard output; progress, warnings and errors do not mix with them.
_messages = Console(stderr=True)
# What agentsd itself writes, and not every encoding has; in tables one character for one, so that columns stay.
_LOOKALIKES = {
    "×": "x",
    "–": "-",
    "−": "-",
    "…": "...",
    "†": "+",
    "Δ": "D",
    "·": ".",
    "\N{NO-BREAK SPACE}": " ",
    **dict.fromkeys("━─╸╺", "-"),
}
# Warnings that this command has shown.
_said: set[str] = set()


def allow_any_text() -> None:
    """
    Have both streams take any text, also what their encoding lacks: a Windows code page, ASCII in a pipe.

    A finished run must not fail in the end for a "×", or for a letter of the user's own prompt.
    """
    codecs.register_error("lookalikes", _lookalikes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lookalikes")


def _lookalikes(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: what looks alike, or else its number as Python does."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (_LOOKALIKES.get(character, ascii(character)[1:-1]) for character in lacking)
    return "".join(escaped), error.end


@contextmanager
def errors_as_messages(debug: bool, exit_code: int = 1) -> Iterator[None]:
    """
    Exit with one line instead of a traceback: with code 2 for what was asked wrongly, 1 for what failed.

    Warnings are a line each, too, and only those that concern the user.
    """
    try:
        with _warnings_as_messages(debug):
            yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, (OSError, RuntimeError, TypeError, ValueError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        say(f"Error: {message}")
        raise typer.Exit(exit_code) from None


@contextmanager
def _warnings_as_messages(debug: bool) -> Iterator[None]:
    before = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
        text = plain_warning(message, category, filename)
        warn([] if text is None else [text])

    _said.clear()
    if not debug:
        warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def at_work(what: str) -> Status:
    """Show what goes on for as long as a `with` block runs."""
    return _messages.status(Text(what))


def progress_bars() -> ProgressBars:
    """Progress bars with the time that is left, away from the results."""
    name = TextColumn("{task.description}", markup=False)
    return ProgressBars(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=_messages)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar labelled with what runs now, which starts again when the next thing does."""
    with progress_bars() as bars:
        task = bars.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            if done == 0:
                bars.reset(task)
            bars.update(task, description=what, completed=done, total=total)

        yield show


def print_table(table: Table) -> None:
    """Print a table to standard output."""
    # In a file or a pipe there is no edge to fit a table to.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def warn(messages: Iterable[str]) -> None:
    """Print warnings, a line each, that were not printed yet."""
    for message in messages:
        if message not in _said:
            _said.add(message)
            say(f"Warning: {message}")


def say(message: str) -> None:
    """Print a message beside the results."""
    # Printed as it is: messages hold brackets, colons and paths that rich would read as markup, colour or break.
    _messages.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)
