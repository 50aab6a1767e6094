"""What the command line says and shows: one-line errors, progress bars, tables."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text


# Results go to standard output; progress, warnings and errors do not mix with them.
messages = Console(stderr=True)


@contextmanager
def errors_as_messages(debug: bool, exit_code: int = 1) -> Iterator[None]:
    """
    End with one line and an exit code instead of a traceback.

    Args:
        debug (`bool`): Let errors through as they are.
        exit_code (`int`, defaults to `1`): 2 for what was asked wrongly, 1 for what failed.

    Raises:
        typer.Exit: Instead of an error.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        messages.print("Interrupted.")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, (OSError, RuntimeError, TypeError, ValueError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        say("Error", message)
        raise typer.Exit(exit_code) from None


def at_work(what: str) -> Status:
    """
    Show that something goes on, away from the results.

    Args:
        what (`str`): What.

    Returns:
        `rich.status.Status`: A context manager.
    """
    return messages.status(Text(what))


def progress_bars() -> Progress:
    """
    Progress bars with the time that is left, away from the results.

    Returns:
        `rich.progress.Progress`: A context manager.
    """
    name = TextColumn("{task.description}", markup=False)
    return Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=messages)


def print_table(table: Table) -> None:
    """
    Print a table to standard output.

    Args:
        table (`rich.table.Table`): The table.
    """
    # In a file or a pipe there is no edge to fit a table to.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def warn(warnings: list[str]) -> None:
    """
    Print warnings, a line each.

    Args:
        warnings (`list[str]`): Sentences.
    """
    for warning in warnings:
        say("Warning", warning)


def say(kind: str, message: str) -> None:
    """
    Print a message beside the results.

    Args:
        kind (`str`): What it begins with, such as `"Error"`.
        message (`str`): The rest.
    """
    # Printed as it is: messages hold brackets and paths that rich would read as markup, colour or break.
    messages.print(f"{kind}: {message}", markup=False, highlight=False, soft_wrap=True)
