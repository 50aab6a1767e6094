"""Counts the calls and images of a run for a progress display."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


# Calls and images done, how many there are in all, what runs now.
Progress = Callable[[int, int, str], None]


class Counter:
    """
    Counts the calls and images of a run, in groups of cases that each have a name.

    A case that has ended counts as a whole, whatever it left out, so that what cannot run does not spoil the estimate
    of the time that is left.

    Args:
        progress (`Callable[[int, int, str], None]`, *optional*): Told before each call; see [`run_bench`].
        total (`int`): Calls and images of all groups.

    Examples:

    ```python
    >>> from agentsd.bench.counter import Counter
    >>> counter = Counter(lambda *state: print(*state), total=3)
    >>> counter.begin("64×64 ", {"baseline": 1, "agentsd": 2}, left={"baseline": 0, "agentsd": 2})
    >>> counter.step("agentsd")
    1 3 64×64 agentsd
    >>> counter.end("agentsd")
    >>> counter.finish()
    3 3 done
    ```
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self._prefix = ""
        self._left: dict[str, int] = {}
        self._charged: str | None = None

    def begin(self, prefix: str, work: Mapping[str, int], left: Mapping[str, int]) -> None:
        """
        A group of cases begins.

        Args:
            prefix (`str`): What to show before a case's name.
            work (`Mapping[str, int]`): Calls and images of each case.
            left (`Mapping[str, int]`): How many of them an earlier run has left to do.
        """
        self._prefix, self._left = prefix, dict(left)
        self._done += sum(work.values()) - sum(left.values())

    def step(self, name: str, what: str = "", count: int = 1) -> None:
        """
        A call of a case begins.

        Args:
            name (`str`): The case.
            what (`str`): What to show behind its name.
            count (`int`, defaults to `1`): Images that the call draws, where images are counted.
        """
        if self._progress is not None:
            self._progress(self._done, self._total, f"{self._prefix}{name} {what}".rstrip())
        self._count(self._charged or name, count)

    @contextmanager
    def charge(self, name: str) -> Iterator[None]:
        """
        Count all calls in a `with` block as calls of one case.

        Args:
            name (`str`): The case.
        """
        self._charged = name
        try:
            yield
        finally:
            self._charged = None

    def end(self, name: str) -> None:
        """
        A case has its row.

        Args:
            name (`str`): The case.
        """
        self._count(name, self._left[name])

    def finish(self) -> None:
        """All is done."""
        if self._progress is not None:
            self._progress(self._total, self._total, "done")

    def _count(self, name: str, count: int) -> None:
        counted = min(count, self._left[name])
        self._left[name] -= counted
        self._done += counted
