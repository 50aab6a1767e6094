"""What agentsd warns of: to Python's warnings, or to whoever collects it."""

import threading
import warnings

import pytest

from agentsd.runtime.own_warnings import collected_warnings, warn


def warn_twice():
    for _ in range(2):
        warn("too few steps")


def test_warnings_are_python_s_unless_they_are_collected():
    """At the line of whoever called the function that warns."""
    with pytest.warns(UserWarning, match="too few steps") as said:
        warn_twice()
    assert {warning.filename for warning in said} == {__file__}
    with warnings.catch_warnings(action="error"), collected_warnings() as collected:
        warn_twice()
    assert collected == ["too few steps"]


def test_the_innermost_collects():
    with collected_warnings() as outer:
        with collected_warnings() as inner:
            warn("inside")
        warn("outside")
    assert (outer, inner) == (["outside"], ["inside"])


def test_each_thread_collects_its_own():
    """A server draws in several."""
    with collected_warnings() as mine:
        with warnings.catch_warnings(record=True) as others:
            warnings.simplefilter("always")
            thread = threading.Thread(target=warn, args=("theirs",))
            thread.start()
            thread.join()
        warn("mine")
    assert mine == ["mine"]
    assert [str(warning.message) for warning in others] == ["theirs"]
