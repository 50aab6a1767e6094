"""The page as a server: one queue for all, what it must not give away, programs, and the command that starts it."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import PIL.Image
import pytest
from browser import choose_preset, compare, is_running, open_tab, set_number, start_long, wait_for_end
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from playwright.sync_api import expect
from typer.testing import CliRunner

import agentsd
from agentsd.cli import app


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results" / "cpu"


def test_one_generation_runs_at_a_time(open_page):
    mine, yours = open_page(), open_page()
    start_long(mine)
    set_number(yours, "Steps", 1)
    choose_preset(yours, "paper")
    open_tab(yours, "Tokens")
    yours.locator("#tokens-start").click()
    expect(yours.get_by_text("queue: 1/1")).to_be_visible()
    mine.locator("#compare-stop").click()
    expect(yours.locator("#tokens-status")).to_contain_text("tokens merged")
    expect(mine.locator("#compare-status")).to_contain_text("Stopped")
    expect(mine.locator("#compare-slider img")).to_have_count(0)


def test_what_waits_can_be_stopped(open_page):
    mine, yours = open_page(), open_page()
    set_number(yours, "Steps", 800)
    start_long(mine)
    yours.locator("#compare-start").click()
    expect(yours.get_by_text("queue: 1/1")).to_be_visible()
    yours.locator("#compare-stop").click()
    expect(yours.locator("#compare-status")).to_contain_text("Stopped", timeout=10_000)
    expect(yours.locator("#compare-stop")).to_be_disabled()
    expect(yours.locator("#compare-slider")).not_to_contain_text(re.compile("queue|Error"))
    is_running(mine)
    wait_for_end(yours)
    # What was stopped is out of the queue: the same page can ask again.
    set_number(yours, "Steps", 1)
    yours.locator("#compare-start").click()
    expect(yours.get_by_text("queue: 1/1")).to_be_visible()
    mine.locator("#compare-stop").click()
    expect(yours.locator("#compare-status")).to_contain_text("Speed-up per step")


def test_the_queue_has_an_end(open_page):
    running, waiting, refused = open_page(), open_page(), open_page()
    for page in (waiting, refused):
        set_number(page, "Steps", 800)
    start_long(running)
    waiting.locator("#compare-start").click()
    expect(waiting.get_by_text("queue: 1/1")).to_be_visible()
    refused.locator("#compare-start").click()
    expect(refused.get_by_text("currently busy")).to_be_visible()
    expect(refused.locator("#compare-stop")).to_be_disabled()
    # Whoever leaves makes room.
    waiting.close()
    running.close()
    set_number(refused, "Steps", 1)
    compare(refused)


def test_closing_the_page_stops_what_it_asked_for(open_page, engine):
    page = open_page()
    start_long(page)
    ((session, _),) = engine._stops.values()
    page.close()
    deadline = time.monotonic() + 8  # the run itself would take more than twenty
    while engine._stops and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not engine._stops
    assert session in engine._left  # so that nothing begins for it


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", str(ROOT / "README.md"), str(RESULTS / "cases.jsonl"), "agentsd/demo.py", "../../etc/passwd"],
)
def test_no_file_can_be_read_through_the_page(address, path):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{address}gradio_api/file={path}")
    assert refusal.value.code in (403, 404)


def test_an_uploaded_result_cannot_name_files_of_the_server(open_page, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    PIL.Image.new("RGB", (64, 64), "red").save(secret / "image.png")
    upload = tmp_path / "upload"
    upload.mkdir()
    for name in ("settings.json", "environment.json", "cases.jsonl"):
        shutil.copy(RESULTS / name, upload)
    row = json.loads((upload / "cases.jsonl").read_text().splitlines()[0])
    page = open_page()
    open_tab(page, "Benchmark")
    field = page.locator("#benchmark-upload input[type=file]")
    with (upload / "cases.jsonl").open("a") as file:
        file.write(json.dumps({**row, "method": str(secret)}) + "\n")
    field.set_input_files(upload)
    expect(page.get_by_text("there is no method")).to_be_visible()
    assert page.locator("#benchmark-plots img").count() == 0


def test_the_queue_cannot_be_skipped(address):
    request = urllib.request.Request(
        f"{address}gradio_api/run/compare", data=b'{"data": []}', headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    assert refusal.value.code in (401, 403, 404)


def test_programs_get_messages_too(address):
    client = Client(address, verbose=False, download_files=tempfile.mkdtemp())
    asked = ["red apple", "", "emoji", 0, 1, 4.0, 128, 128]
    patch = [0.4, 0.4, "tome", 0, 1, 0.3, 0.075, 0, True, False, False, 1, 1, 0]
    status, images, *_ = client.predict(*asked, *patch, 0, api_name="/compare")
    assert "Speed-up per step" in status
    *_, report = client.predict(*asked, 0.5, 0, "kv-merged", *patch[3:], 0, api_name="/compare")
    assert re.search(r" kv-merged +256 +128 ", report), "half of the keys"
    assert PIL.Image.open(images[0]).size == (128, 128)
    for values, message in (
        ([*asked[:4], 801, *asked[5:], *patch, 0], "801 is greater"),
        ([*asked, 1.5, *patch[1:], 0], "1.5 is greater"),
        ([*asked[:2], "/etc", *asked[3:], *patch, 0], "/etc"),
        ([*asked, *patch, 31], "31 is greater"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(*values, api_name="/compare")


def test_the_page_listens_to_this_machine_only(address):
    assert address.startswith("http://127.0.0.1:")


def test_a_space_can_be_made_of_the_folder():
    card = SpaceCard.load(ROOT / "apps" / "README.md").data.to_dict()
    assert (ROOT / "apps" / card["app_file"]).is_file()
    assert f"gradio=={card['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    wheel = f"./agentsd-{agentsd.__version__}-py3-none-any.whl[demo]"
    assert wheel in (ROOT / "apps" / "requirements.txt").read_text().splitlines()


def test_the_command_of_the_readme_serves_the_page_until_it_is_interrupted():
    (line,) = re.findall(r"(?m)^agentsd (demo .*)$", (ROOT / "README.md").read_text(encoding="utf-8"))
    command = [sys.executable, "-c", "from agentsd.cli import main; main()", *shlex.split(line)]
    # A port that is free, beside others that test this just now.
    command[-1] = str(free_port())
    assert command[-2] == "--port"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = iter(process.stdout.readline, "")
            address = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            assert address.endswith(command[-1])
            assert b"agentsd" in urllib.request.urlopen(address).read()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 130)
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--results", "nowhere"], "nowhere is not a results folder"),
        (["--model", "nowhere"], "There is no model 'nowhere'"),
        (["--max-side", "8"], "limit on side must be at least 64"),
        (["--model", "emoji", "--model", "emoji"], "same name"),
    ],
)
def test_bad_options_of_the_command(options, message):
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert message in result.stderr
