"""What happens at a click: a generation with its progress, a stop, an error as a message."""

import functools
import uuid
from collections.abc import Callable
from typing import Any

import gradio as gr

from .engine import Engine
from .queue import Progress


# What visitors asked wrongly, or have to wait for. Other errors, which may name files, are told to the terminal only.
_EXPECTED_ERRORS = (RuntimeError, TypeError, ValueError)


def answered(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Turn an error into a message on the page, never a stack trace.

    Args:
        function (`Callable`): What answers an event.

    Returns:
        `Callable`: The same, with other errors.
    """

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except _EXPECTED_ERRORS as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error(f"Something went wrong ({type(error).__name__}). The terminal has the details.") from error

    return answer


def forget_on_leaving(demo: gr.Blocks, engine: Engine) -> None:
    """
    Stop what a page has running when it is closed, and drop its images.

    Args:
        demo (`gradio.Blocks`): The page.
        engine (`Engine`): What generates.
    """

    def forget(request: gr.Request) -> None:
        engine.forget(_visitor(request))

    demo.unload(forget)


def buttons(engine: Engine, label: str, name: str) -> tuple[gr.Button, gr.Markdown]:
    """
    A button that starts a generation, one that stops it, and a line that says how it went.

    Args:
        engine (`Engine`): What generates.
        label (`str`): What the first one says.
        name (`str`): Begin of their ids.

    Returns:
        `tuple[gradio.Button, gradio.Markdown]`: The first button, for [`on_start`], and the line.
    """
    with gr.Row():
        start = gr.Button(label, variant="primary", min_width=140, elem_id=f"{name}-start")
        stop = gr.Button("Stop", variant="stop", min_width=100, elem_id=f"{name}-stop")
    status = gr.Markdown("", elem_id=f"{name}-status")

    def ask_to_stop(request: gr.Request) -> Any:
        # The generation itself says that it was stopped, once it was.
        return gr.skip() if engine.stop(_visitor(request)) else "You have nothing running."

    # Past the queue, which may be full.
    stop.click(ask_to_stop, outputs=[status], queue=False, show_progress="hidden", api_visibility="private")
    return start, status


def _visitor(request: gr.Request) -> str:
    # A caller without a page shares nothing with any other.
    return request.session_hash or uuid.uuid4().hex


def _shown(progress: gr.Progress) -> Progress:
    def show(what: str, done: int, total: int) -> None:
        if done:
            progress((done, total), desc=what, unit="steps")
        elif what.startswith("waiting"):
            progress(0.0, desc=f"{what}, {total} ahead of yours")
        else:
            progress(0.0, desc=what if what == "starting" else f"{what}: warming up")

    return show


def on_start(
    button: gr.Button,
    run: Callable[..., list[Any]],
    inputs: list[Any],
    outputs: list[Any],
    watched: Any,
    name: str,
) -> gr.events.Dependency:
    """
    Run a generation at a click.

    Args:
        button (`gradio.Button`): What is clicked.
        run (`Callable`): Takes the visitor, a `Progress` and the values of the inputs; returns those of the outputs.
        inputs (`list[Component]`): What it depends on.
        outputs (`list[Component]`): What it changes.
        watched (`Component`): The output that shows its progress.
        name (`str`): Its name for programs that use the page.

    Returns:
        `gradio.events.Dependency`: The event, for what comes after it.
    """

    # Gradio fills in the first two by their type and default.
    @answered
    def started(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> list[Any]:  # noqa: B008
        return run(_visitor(request), _shown(progress), *values)

    return button.click(started, inputs, outputs, api_name=name, show_progress_on=[watched])
