"""A run that was cut off: finished rows are kept byte for byte, and nothing is mixed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_runs import calls

from agentsd.bench import BenchError, load_result, run_bench
from agentsd.bench.store import RunFolder


def test_an_interrupted_run_goes_on(shape, tmp_path):
    def interrupt(what, done, total):
        if done == 22:  # in the first round of the second size
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(calls(), out=tmp_path, progress=interrupt)
    cases, rounds = tmp_path / "cases.jsonl", tmp_path / "rounds.jsonl"
    before, log = cases.read_text(), rounds.read_text()
    assert len(before.splitlines()) == 6
    assert [row.height for row in load_result(tmp_path).rows] == [64] * 6
    rounds.write_text(log + '{"height": 128, "wid')  # cut off while writing

    result = run_bench(calls(), out=tmp_path, resume=True)
    assert cases.read_text().startswith(before)
    assert rounds.read_text().startswith(log)
    assert [row.rounds for row in result.rows] == [2] * 12
    assert load_result(tmp_path) == result

    after = cases.read_text()
    assert run_bench(calls(), out=tmp_path, resume=True) == result
    assert cases.read_text() == after


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_run_goes_on(model, tmp_path):
    """As a user does it: the same command with --resume."""
    command = [sys.executable, "-m", "agentsd", "bench", model, "--methods", "baseline,agentsd-tome,tomesd"]
    command += "--steps 1 --repeats 1 --no-memory --device cpu --batch 1 --batch 2 --batch 3".split()
    command += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cases = tmp_path / "run" / "cases.jsonl"
    until = time.monotonic() + 300
    while (not cases.exists() or cases.read_text().count("\n") < 3) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = cases.read_text()
    assert 3 <= before.count("\n") < 9
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert cases.read_text().startswith(before[: before.rfind("\n") + 1])
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    assert [(row["batch"], row["method"]) for row in rows] == [
        (batch, method) for batch in (1, 2, 3) for method in ("baseline", "agentsd-tome", "tomesd")
    ]
    assert (tmp_path / "run" / "report.html").exists()


def test_what_was_left_out_is_measured_with_another_budget(shape, tmp_path):
    settings = {"methods": ("baseline", "tomesd"), "sizes": ((64, 64), (128, 64), (64, 128))}
    run_bench(calls(**settings, budget_minutes=1e-4), out=tmp_path)
    cases = tmp_path / "cases.jsonl"
    before = cases.read_text().splitlines(keepends=True)
    assert ["left out" in line for line in before] == [False, False, True, True, True, True]
    again = run_bench(calls(**settings, budget_minutes=1e-9), out=tmp_path, resume=True)
    assert [row.reason for row in again.rows] == [None] * 2 + ["left out: the 1e-09 minutes were used up"] * 4
    whole = run_bench(calls(**settings), out=tmp_path, resume=True)
    assert [row.rounds for row in whole.rows] == [2] * 6
    after = cases.read_text().splitlines(keepends=True)
    assert after[:2] == before[:2]
    assert len(after) == 6
    assert load_result(tmp_path).rows == whole.rows


def test_results_are_never_mixed_with_those_of_another_run(shape, tmp_path):
    settings = calls(methods=("baseline",), sizes=((64, 64),))
    run_bench(settings, out=tmp_path)
    with pytest.raises(BenchError, match="earlier run"):
        run_bench(settings, out=tmp_path)
    with pytest.raises(BenchError, match=r"a different run \(methods differ\)"):
        run_bench(calls(methods=("baseline", "tomesd"), sizes=((64, 64),)), out=tmp_path, resume=True)
    facts = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps({**facts, "agentsd": "0.0.1"}))
    with pytest.raises(BenchError, match=r"a different run \(agentsd differ\)"):
        run_bench(settings, out=tmp_path, resume=True)


def test_rows_that_were_changed_by_hand_are_told_before_anything_is_measured(shape, tmp_path):
    settings = calls(methods=("baseline", "tomesd"), sizes=((64, 64),))
    run_bench(settings, out=tmp_path)
    cases, rounds = tmp_path / "cases.jsonl", tmp_path / "rounds.jsonl"
    whole = cases.read_text()
    cases.write_text(whole + '{"method": "baseline"}\n')
    with pytest.raises(BenchError, match=r"cases\.jsonl has rows that no run with these settings wrote"):
        run_bench(settings, out=tmp_path, resume=True)
    # a row whose method had no part in the rounds, because it could not run
    cases.write_text(whole.splitlines(keepends=True)[0])
    records = [json.loads(line) for line in rounds.read_text().splitlines()]
    for record in records:
        del record["samples"]["tomesd 0.4"]
    rounds.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(BenchError, match=r"no row of tomesd 0\.4"):
        run_bench(settings, out=tmp_path, resume=True)
    cases.write_bytes(b"\xff\n")
    with pytest.raises(BenchError, match=r"cases\.jsonl is not text"):
        run_bench(settings, out=tmp_path, resume=True)


def test_resuming_a_folder_that_is_new_starts_there(tmp_path):
    assert RunFolder(tmp_path / "new", {}, {}, resume=True).cases.records == []
    with pytest.raises(BenchError, match="needs the folder"):
        run_bench(resume=True)


def test_a_folder_without_permission_to_write(shape, tmp_path, monkeypatch):
    """Not by a real one: whoever runs the tests may be allowed everything."""

    def refuse(self, *args, **options):
        raise PermissionError(f"[Errno 13] Permission denied: '{self}'")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(BenchError, match=r"Cannot write to .*Permission denied.*Name another folder"):
        run_bench(calls(methods=("baseline",)), out=tmp_path)
