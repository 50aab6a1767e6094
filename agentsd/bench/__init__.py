"""The benchmark: speed, memory and image quality against every peer, in one process and interleaved."""

from .methods import METHODS, Method, find_method
from .peers import MethodUnavailable
from .report import BenchResult, load_result
from .rows import Row
from .run import run_bench
from .settings import SUITES, BenchSettings
from .store import BenchError


__all__ = [
    "METHODS",
    "SUITES",
    "BenchError",
    "BenchResult",
    "BenchSettings",
    "Method",
    "MethodUnavailable",
    "Row",
    "find_method",
    "load_result",
    "run_bench",
]
