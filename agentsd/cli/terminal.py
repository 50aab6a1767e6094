"""What the command line says and shows: one-line errors, progress bars, tables."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..utils.progress import Progress


# Results go to standard output; progress, warnings and errors do not mix with them.
_messages = Console(stderr=True)


@contextmanager
def errors_as_messages(debug: bool, exit_code: int = 1) -> Iterator[None]:
    """Exit with one line instead of a traceback: with code 2 for what was asked wrongly, 1 for what failed."""
    try:
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


def warn(warnings: list[str]) -> None:
    """Print warnings, a line each."""
    for warning in warnings:
        say(f"Warning: {warning}")


def say(message: str) -> None:
    """Print a message beside the results."""
    # Printed as it is: messages hold brackets and paths that rich would read as markup, colour or break.
    _messages.print(message, markup=False, highlight=False, soft_wrap=True)
