"""What the tabs share: buttons that start and stop a generation, its progress, errors as messages, tables."""

import functools
import html
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gradio as gr

from ..utils.progress import Progress
from .engine import Engine, Stopped


# What was asked wrongly, or has to wait. Other errors, which may name files, go to the terminal only.
_EXPECTED_ERRORS = (RuntimeError, TypeError, ValueError)
# All generations share this queue, in which one runs at a time: two beside each other would spoil both times.
_QUEUE = {"concurrency_id": "generation", "concurrency_limit": 1}


def with_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a function raises into a message on the page, never a stack trace."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except _EXPECTED_ERRORS as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error(f"Something went wrong ({type(error).__name__}). The terminal has the details.") from error

    return call


def with_warnings(status: str, warnings: Iterable[str]) -> str:
    """A status with each warning once: a message that fades would not be seen by who looks elsewhere meanwhile."""
    # They may repeat a prompt, which must not become part of the page.
    texts = (html.escape(text, quote=False) for text in dict.fromkeys(warnings))
    return "\n\n".join([status, *(f"**Warning:** {text}" for text in texts)])


def stop_on_leaving(demo: gr.Blocks, engine: Engine) -> None:
    """Stop what a page has running when it is closed, and let nothing begin that Gradio has yet to drop."""

    def leave(request: gr.Request) -> None:
        engine.leave(_session(request))

    demo.unload(leave)


class GenerationButtons:
    """A button that starts one kind of generation, one that stops it, and a line that says how it went."""

    def __init__(self, engine: Engine, kind: str, label: str) -> None:
        self._engine, self._kind = engine, kind
        with gr.Row():
            self._start = gr.Button(label, variant="primary", min_width=140, elem_id=f"{kind}-start")
            self._stop = gr.Button("Stop", variant="stop", min_width=100, interactive=False, elem_id=f"{kind}-stop")
        self.status = gr.Markdown("", elem_id=f"{kind}-status")

    def on_start(
        self, run: Callable[..., list[Any]], inputs: list[Any], outputs: list[Any], watched: Any
    ) -> gr.events.Dependency:
        """Call `run(session, progress, *inputs)` at a click, and show its progress on `watched`."""

        # Gradio fills in the first two by their type and default.
        @with_messages
        def start(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> Any:  # noqa: B008
            try:
                return run(_session(request), _shown(progress), *values)
            except Stopped:
                return gr.skip()

        def stop(request: gr.Request) -> tuple[str, gr.Button]:
            self._engine.stop(_session(request), self._kind)
            return "Stopped. Anything below is from an earlier run.", gr.Button(interactive=False)

        def switch_stop(is_on: bool) -> Callable[[], gr.Button]:
            return lambda: gr.Button(interactive=is_on)

        # Past the queue, which may be full.
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self._start.click(switch_stop(True), outputs=[self._stop], **at_once)
        running = self._start.click(
            start, inputs, [self.status, *outputs], api_name=self._kind, show_progress_on=[watched], **_QUEUE
        )
        # In both cases, since `then` alone does not follow an error. A generation that is stopped while it waits shows
        # "Error" on `watched` until something else ends there, which is why these do.
        for ended in (running.then, running.failure):
            ended(switch_stop(False), outputs=[self._stop], show_progress_on=[watched], **at_once)
        self._stop.click(stop, outputs=[self.status, self._stop], cancels=[running], **at_once)
        return running


def _session(request: gr.Request) -> str:
    # A program without a page shares nothing with any other.
    return request.session_hash or uuid.uuid4().hex


def _shown(progress: gr.Progress) -> Progress:
    return lambda name, done, total: progress((done, total) if done else 0.0, desc=name, unit="steps")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table, header first, whose first column is text and whose others are numbers."""
    rule = [":--", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
