"""Fair timing: interleaved, paired, warmed up, and memory in a process of its own."""

import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from agentsd.bench.memory import peak_memory
from agentsd.utils.intervals import student_mean
from agentsd.utils.timing import (
    Sample,
    SpeedUp,
    Stopwatch,
    Variant,
    paired_speedup,
    summarize,
    time_call,
    time_round,
    time_rounds,
)


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
bytes_touched()  # the first ones still come from the system
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


# --- how many rounds --------------------------------------------------------------------------------------------


def timed(monkeypatch, seconds, call_seconds=1.0, clear_after=10**6):
    """The names in the order in which they were called, on a clock that only calls move; and when it was looked."""
    now, names, looks = 0.0, [], []
    monkeypatch.setattr("agentsd.utils.timing.time.perf_counter", lambda: now)

    def call(watch, name):
        nonlocal now
        now += call_seconds
        names.append(name)

    def is_clear():
        looks.append(len(names) // 2)
        return looks[-1] >= clear_after

    rounds = time_rounds([Variant(name, partial(call, name=name)) for name in "ab"], CPU, seconds, is_clear)
    assert [list(samples) for samples in rounds] == [list(pair) for pair in zip(names[::2], names[1::2], strict=True)]
    assert all(sample.seconds == call_seconds for samples in rounds for sample in samples.values())
    return "".join(names), looks


def test_there_are_three_rounds_in_alternating_order_at_least(monkeypatch):
    assert timed(monkeypatch, seconds=100, clear_after=0) == ("abbaab", [3])
    assert timed(monkeypatch, seconds=2)[0] == "abbaab"  # the first takes all the time there is, but not more


def test_rounds_go_on_until_a_difference_is_clear(monkeypatch):
    """Not looked at after each: what is looked at often enough differs by chance."""
    names, looks = timed(monkeypatch, seconds=100, clear_after=10)
    assert (len(names), looks) == (24, [3, 6, 12])


def test_rounds_end_when_the_time_is_over(monkeypatch):
    assert len(timed(monkeypatch, seconds=15)[0]) == 16


def test_one_round_where_that_takes_longer_than_there_is_time(monkeypatch):
    assert timed(monkeypatch, seconds=1.9) == ("ab", [])
    assert timed(monkeypatch, seconds=0) == ("ab", [])


def test_variants_are_told_apart_by_the_real_clock():
    naps = {"long": 0.06, "short": 0.02}
    variants = [Variant(name, lambda watch, nap=nap: time.sleep(nap)) for name, nap in naps.items()]
    called = []
    rounds = time_rounds(variants, CPU, 20, lambda: True, on_call=called.append)
    assert called == ["long", "short", "short", "long", "long", "short"]
    speed_up = SpeedUp.of(*([samples[name].seconds for samples in rounds] for name in naps))
    assert speed_up.value > 1
    assert speed_up.interval[0] < speed_up.value < speed_up.interval[1]


# --- how sure ---------------------------------------------------------------------------------------------------


def test_a_speed_up_is_a_mean_of_paired_ratios():
    """In logarithms: twice and half as fast cancel out, and which of the two is named first does not matter."""
    assert SpeedUp.of([2.0, 4.0, 6.0], [1.0, 8.0, 6.0]).value == pytest.approx(1)
    before, after = [1.0, 1.2, 1.1, 1.0], [0.5, 0.7, 0.5, 0.6]
    there, back = SpeedUp.of(before, after), SpeedUp.of(after, before)
    assert there.value == pytest.approx(1 / back.value)
    assert there.interval == pytest.approx([1 / end for end in reversed(back.interval)])


def test_a_speed_up_says_how_sure_it_is():
    assert str(SpeedUp(1.08, (1.03, 1.12))) == "1.08× (1.03–1.12)"
    assert str(SpeedUp(0.9, (0.85, 0.95))) == "0.90× (0.85–0.95)"
    assert str(SpeedUp(1.08, (0.97, 1.2))) == "1.08× (0.97–1.20), no difference measured"
    assert str(SpeedUp.of([1.2], [1.0])) == "1.20×, timed once"
    sure = [SpeedUp(1.0, ends).is_difference for ends in ((1.1, 1.2), (0.8, 0.9), (0.9, 1.1), None)]
    assert sure == [True, True, False, None]


@pytest.mark.parametrize(
    ("count", "reach"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228), (31, 2.042)]
)
def test_the_interval_of_a_mean_is_the_one_of_the_tables(count, reach):
    """Printed in any book: t for 95% and one degree of freedom less than there are values."""
    values = np.random.default_rng(count).normal(size=count)
    mean, low, high = student_mean(values)
    error = values.std(ddof=1) / count**0.5
    assert mean == pytest.approx(values.mean())
    assert [(mean - low) / error, (high - mean) / error] == pytest.approx([reach] * 2, abs=5e-4)


@pytest.mark.parametrize("count", [3, 8])
def test_the_interval_of_a_mean_holds_it_19_times_in_20(count):
    rng = np.random.default_rng(0)
    intervals = [student_mean(rng.normal(loc=3, size=count)) for _ in range(2000)]
    assert sum(low <= 3 <= high for _, low, high in intervals) / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("freedom", [3, 100])
def test_equal_variants_are_seldom_found_to_differ(freedom):
    """However long one goes on until they do: by intervals made for a single look, every fifth pair would."""
    rng, looks = np.random.default_rng(0), (3, 6, 12, 24, 48, 96)
    found = by_single_looks = 0
    for _ in range(400):
        logs = 0.03 * rng.standard_t(freedom, size=96)  # with few degrees of freedom, some are far off
        found += any(SpeedUp.of(np.exp(logs[:count]), np.ones(count)).is_difference for count in looks)
        by_single_looks += any(low > 0 or high < 0 for _, low, high in (student_mean(logs[:n]) for n in looks))
    assert found <= 0.07 * 400
    assert by_single_looks > 0.12 * 400


# --- memory -----------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_freed_memory_that_is_kept_is_no_part_of_the_next_peak():
    """A variant that needs less would seem to need as much as the one before."""
    code = """
import torch
from agentsd.utils.memory import keep_freed_memory, read_peak, start_peak

cpu, peaks = torch.device("cpu"), []
keep_freed_memory()
for mebibytes in (512, 64):
    start_peak(cpu)
    torch.ones(mebibytes * 2**18)
    peaks.append(read_peak(cpu))
assert peaks[0] - peaks[1] > 400 * 2**20, peaks
"""
    subprocess.run([sys.executable, "-c", code], check=True)
