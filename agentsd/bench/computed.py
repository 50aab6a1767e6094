"""Agentsd's whole schedule in single calls: computed from the times of its two phases."""

from collections.abc import Mapping

from ..config import AgentSDConfig
from ..utils.timing import Sample
from .methods import METHODS
from .rows import named
from .settings import BenchSettings, Case


# One call has no schedule: there, the whole of agentsd is computed from the times of its two phases.
_COMPUTED, PHASES = "agentsd", ("agentsd-agent", "agentsd-tome")


def is_computed(case: Case, settings: BenchSettings) -> bool:
    """
    Whether the times of a case follow from those of the schedule's phases; one phase for all steps is called.

    Args:
        case (`Case`): The case.
        settings (`BenchSettings`): What is measured.

    Returns:
        `bool`: `True` for `agentsd` in the suites of single calls.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings
    >>> settings = BenchSettings.of_suite("cpu")
    >>> [case.name for case in settings.groups()[0] if is_computed(case, settings)]
    ['agentsd 0.4']
    ```
    """
    is_scheduled = AgentSDConfig.from_dict(settings.options).is_scheduled
    return settings.kind == "call" and case.method == _COMPUTED and is_scheduled


def can_call(case: Case, settings: BenchSettings) -> bool:
    """
    Whether a case shows in what its suite calls.

    Args:
        case (`Case`): The case.
        settings (`BenchSettings`): What is measured.

    Returns:
        `bool`: `False` for what is computed, and for what shows only over the steps of a generation.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings
    >>> settings = BenchSettings.of_suite("cpu")
    >>> [case.method for case in settings.groups()[0] if not can_call(case, settings)]
    ['agentsd']
    ```
    """
    if settings.kind == "generation" or not METHODS[case.method].needs_generation:
        return True
    return case.method == _COMPUTED and not is_computed(case, settings)


def whole_schedule(samples: Mapping[str, Sample], case: Case, settings: BenchSettings) -> Sample:
    """
    The time of the paper's schedule from the times of its two phases, weighted by their share of the steps.

    Args:
        samples (`Mapping[str, Sample]`): The times of one round, by the names of cases.
        case (`Case`): The case.
        settings (`BenchSettings`): What is measured.

    Returns:
        `Sample`: Its time in this round.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings
    >>> from agentsd.utils.timing import Sample
    >>> settings = BenchSettings.of_suite("cpu")
    >>> case = next(case for case in settings.groups()[0] if case.method == "agentsd")
    >>> samples = {"agentsd-agent 0.4": Sample(1.0), "agentsd-tome 0.4": Sample(2.0)}
    >>> whole_schedule(samples, case, settings).seconds
    1.6
    ```
    """
    share = AgentSDConfig.from_dict(settings.options).agent_until
    agent, tome = (samples[named(phase, case.ratio)].seconds for phase in PHASES)
    return Sample(share * agent + (1 - share) * tome)
