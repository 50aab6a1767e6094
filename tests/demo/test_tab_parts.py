"""What the tabs of the web page share."""

from pathlib import Path

import gradio as gr
import pytest

from agentsd.demo.tab_parts import markdown_table, with_messages, with_warnings


def test_the_page_does_not_show_paths_of_the_server():
    with pytest.raises(gr.Error) as shown:
        with_messages(lambda: Path("/no/such/secret").read_text())()
    assert "secret" not in shown.value.message


def test_a_status_has_each_warning_once_and_as_text():
    """It may repeat a prompt, which must not become part of the page."""
    assert with_warnings("5 runs.", []) == "5 runs."
    assert with_warnings("5 runs.", ["a", "b", "a"]) == "5 runs.\n\n**Warning:** a\n\n**Warning:** b"
    assert with_warnings("", ['left out: "<b>red</b> & blue"']).endswith('"&lt;b&gt;red&lt;/b&gt; &amp; blue"')


def test_tables_have_text_first_and_then_numbers():
    assert markdown_table([("", "time"), ("per step", "1 s")]) == "|  | time |\n| :-- | --: |\n| per step | 1 s |"
