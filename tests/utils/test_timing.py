"""Fair timing: interleaved, paired, warmed up, and memory in a process of its own."""

import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from agentsd.bench.memory import peak_memory
from agentsd.utils.timing import Sample, Stopwatch, Variant, paired_speedup, summarize, time_call, time_round


CPU = torch.device("cpu")


def test_variants_are_interleaved():
    events = []
    variants = [Variant(name, lambda watch, name=name: events.append(name)) for name in "abc"]
    for _ in range(2):
        time_round(variants, CPU)
    assert events == list("abcabc")


def test_every_call_is_announced():
    told = []
    time_round([Variant("a", lambda watch: None)], CPU, on_call=told.append)
    assert told == ["a"]


def test_a_variant_that_fails_does_not_end_the_round():
    failed = []

    def fail(watch):
        raise MemoryError

    variants = [Variant("bad", fail), Variant("good", lambda watch: None)]
    samples = time_round(variants, CPU, on_error=lambda name, error: failed.append((name, type(error))))
    assert list(samples) == ["good"]
    assert failed == [("bad", MemoryError)]
    with pytest.raises(MemoryError):
        time_round(variants, CPU)


def test_steps_and_the_whole_are_both_timed():
    def call(watch):
        for _ in range(2):
            time.sleep(0.02)
            watch.mark()
        time.sleep(0.1)

    sample = time_call(call, CPU)
    assert sample.step_seconds >= 0.02
    # The first step and what follows the last are in the whole alone, however slow the machine is.
    assert sample.seconds - sample.step_seconds >= 0.12
    assert time_call(lambda watch: None, CPU).step_seconds is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_freed_memory_is_used_again():
    """Fresh pages are cleared by the system when first touched, at the mercy of whatever else the machine does."""
    script = """
import resource, torch
from agentsd.utils.memory import keep_freed_memory

def bytes_touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16, 2**20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

given_back = bytes_touched()
assert keep_freed_memory()
print(given_back, bytes_touched())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    one = 64 * 2**20
    assert given_back > 7 * one
    assert kept < 4 * one


def test_a_stopwatch_measures_between_marks():
    watch = Stopwatch(CPU)
    assert watch.seconds() == []
    for _ in range(3):
        watch.mark()
    assert len(watch.seconds()) == 2


def test_speedup_is_the_median_of_paired_ratios():
    # The second round is disturbed for both alike: the ratio of the medians would be 2.5, no round shows that.
    rounds = [
        {"baseline": Sample(1.0), "fast": Sample(0.5, 0.1)},
        {"baseline": Sample(9.0), "fast": Sample(4.5, 0.3)},
        {"baseline": Sample(2.5), "fast": Sample(1.0, 0.2)},
    ]
    assert paired_speedup(rounds, "fast", "baseline") == [2.0]
    summary = summarize(rounds, "fast")
    assert (summary.q1, summary.seconds, summary.q3) == (0.75, 1.0, 2.75)
    assert (summary.step_q1, summary.step_seconds, summary.step_q3) == pytest.approx((0.15, 0.2, 0.25))
    assert summarize(rounds, "baseline").step_q1 is None
    assert summary.rounds == 3
    assert summarize(rounds[:1], "fast").q1 == summarize(rounds[:1], "fast").q3 == 0.5


def test_steps_are_compared_round_by_round_too():
    rounds = [{"baseline": Sample(9.0, step), "fast": Sample(9.0, step / 2)} for step in (1.0, 7.0, 2.0)]
    assert paired_speedup(rounds, "fast", "baseline", lambda sample: sample.step_seconds) == [2.0]


def test_a_summary_needs_a_round():
    with pytest.raises(ValueError, match="no finished round"):
        summarize([], "baseline")


def allocate(mebibytes):
    return lambda: torch.ones(mebibytes * 2**18)


def prepare(mebibytes):
    return allocate(mebibytes)


def run_out():
    return partial(torch.empty, 2**46, dtype=torch.uint8)  # 64 TiB


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)  # as Linux does where memory runs out


def end():
    os._exit(3)


def fail():
    raise ValueError("a wrong shape")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from Linux' /proc")
def test_peak_memory_is_that_of_the_call_alone():
    """What this process holds, or another measurement took, does not count."""
    held = torch.ones(512 * 2**18)
    large, small = (peak_memory(CPU, partial(prepare, size)) for size in (400, 1))
    assert 350 * 2**20 < large - small < 450 * 2**20
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from Linux' /proc")
def test_an_error_in_the_process_that_measures_comes_back():
    for prepare, error, message in (
        (run_out, MemoryError, None),
        (be_killed, MemoryError, None),
        (end, RuntimeError, "ended with exit code 3"),
        (fail, RuntimeError, "ValueError: a wrong shape"),
    ):
        with pytest.raises(error, match=message):
            peak_memory(CPU, prepare)


def test_memory_of_other_methods_is_not_counted_on_a_gpu(monkeypatch):
    for name, value in (("can_watch_peak", True), ("start_peak", True), ("read_peak", 100)):
        monkeypatch.setattr(f"agentsd.bench.memory.{name}", lambda *_, value=value: value)
    assert peak_memory(torch.device("cuda"), lambda: lambda: None, others=30) == 70


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak is forgotten on Linux only")
def test_an_earlier_peak_is_forgotten():
    """In a process of its own, which keeps no freed memory."""
    code = """
import torch
from agentsd.utils.memory import read_peak, start_peak

cpu = torch.device("cpu")
torch.ones(512 * 2**18)
before = read_peak(cpu)
assert start_peak(cpu)
assert read_peak(cpu) < before - 400 * 2**20
"""
    subprocess.run([sys.executable, "-c", code], check=True)
