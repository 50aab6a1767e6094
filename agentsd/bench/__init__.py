"""The benchmark: how much faster a model runs, against every peer, in one process and interleaved."""

from .environment import environment
from .methods import METHODS, Method, MethodUnavailable
from .report import BenchResult, Row
from .runner import BenchSettings, SuiteSettings, bench_pipeline, run_bench, run_suite
from .store import BenchError


__all__ = [
    "METHODS",
    "BenchError",
    "BenchResult",
    "BenchSettings",
    "Method",
    "MethodUnavailable",
    "Row",
    "SuiteSettings",
    "bench_pipeline",
    "environment",
    "run_bench",
    "run_suite",
]
