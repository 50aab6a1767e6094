"""How whatever takes long tells what it is doing."""

from collections.abc import Callable


# What runs now, how much of it is done, and how much there is. Whatever it raises ends the work.
Progress = Callable[[str, int, int], None]
