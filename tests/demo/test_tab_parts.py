"""What the tabs of the web page share."""

from pathlib import Path

import gradio as gr
import pytest

from agentsd.demo.tab_parts import markdown_table, show_warnings, with_messages


def test_the_page_does_not_show_paths_of_the_server():
    with pytest.raises(gr.Error) as shown:
        with_messages(lambda: Path("/no/such/secret").read_text())()
    assert "secret" not in shown.value.message


def test_a_warning_is_shown_once_and_as_text(monkeypatch):
    """It may repeat a prompt, which must not become part of the page."""
    shown = []
    monkeypatch.setattr(gr, "Warning", shown.append)
    show_warnings(['left out: "<b>red</b> & blue"', "another", "another"])
    assert shown == ['left out: "&lt;b&gt;red&lt;/b&gt; &amp; blue"', "another"]


def test_tables_have_text_first_and_then_numbers():
    assert markdown_table([("", "time"), ("per step", "1 s")]) == "|  | time |\n| :-- | --: |\n| per step | 1 s |"
