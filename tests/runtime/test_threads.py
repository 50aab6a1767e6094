"""What belongs to one thread, and who is in a call."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentsd.runtime.threads import CallsInThreads, PerThread


def in_a_thread(work):
    """What a function returns in a thread of its own, or what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_each_thread_has_an_object_of_its_own():
    own = PerThread(list)
    own.get().append("here")
    assert in_a_thread(own.get) == []
    assert own.get() is own.get() and own.get() == ["here"]


def test_the_object_shared_last_is_what_compiled_code_sees(monkeypatch):
    own = PerThread(list)
    in_a_thread(lambda: (own.get().append("there"), own.share()))
    assert not own.is_compiled
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert own.get() == ["there"]
    assert own.is_compiled


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_starts_with_nothing(twin_of):
    own = PerThread(list)
    own.get().append("here")
    own.share()
    twin = twin_of(own)
    assert twin.get() == twin.shared == []


def test_calls_one_after_another_may_be_compiled():
    calls = CallsInThreads()
    for _ in range(2):
        calls.begin(is_compiled=True)
        calls.end(is_compiled=True)
        in_a_thread(lambda: (calls.begin(is_compiled=True), calls.end(is_compiled=True)))


def test_a_second_call_of_compiled_code_is_refused_and_the_first_is_not():
    calls = CallsInThreads()
    calls.begin(is_compiled=True)
    with pytest.raises(RuntimeError, match="at the same time"):
        in_a_thread(lambda: calls.begin(is_compiled=True))
    calls.end(is_compiled=True)


def test_what_only_turns_out_to_be_compiled_is_refused_at_the_end():
    calls = CallsInThreads()
    calls.begin(is_compiled=False)
    with pytest.raises(RuntimeError, match="at the same time"):
        in_a_thread(lambda: (calls.begin(is_compiled=False), calls.end(is_compiled=True)))
    with pytest.raises(RuntimeError, match="at the same time"):
        calls.end(is_compiled=True)


def test_what_is_not_compiled_may_overlap():
    calls = CallsInThreads()
    calls.begin(is_compiled=False)
    in_a_thread(lambda: (calls.begin(is_compiled=False), calls.end(is_compiled=False)))
    calls.end(is_compiled=False)


def test_a_call_that_was_interrupted_does_not_count_for_the_next():
    """A keyboard interrupt passes over the end of a call."""
    calls = CallsInThreads()
    calls.begin(is_compiled=False)
    in_a_thread(lambda: (calls.begin(is_compiled=False), calls.end(is_compiled=False)))
    calls.begin(is_compiled=False)
    calls.end(is_compiled=True)
