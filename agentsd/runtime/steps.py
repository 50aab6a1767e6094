"""Which phase a denoising step is in, and how its timestep is read without stalling the device at every step."""

from typing import Any

import torch

from ..config import AgentSDConfig, Phase


def phase_at(timestep: float, num_train_timesteps: int, config: AgentSDConfig) -> Phase:
    """
    The phase of one timestep: agents while `t >= (1 - agent_until) * T`.

    Args:
        timestep (`float`): The timestep `t`, from `T` (noise) down to 0 (image).
        num_train_timesteps (`int`): `T`.
        config (`AgentSDConfig`): The configuration.

    Returns:
        `Phase`: The agent phase, or the ToMe phase.

    Examples:

    ```python
    >>> from agentsd import AgentSDConfig
    >>> phase_at(601, 1000, AgentSDConfig()).sx, phase_at(599, 1000, AgentSDConfig()).sx
    (4, 2)
    ```
    """
    # Written this way round, with a little slack, so that a step exactly on the edge is inside despite rounding.
    is_early = num_train_timesteps - timestep <= (config.agent_until + 1e-9) * num_train_timesteps
    return config.agent_phase if is_early else config.tome_phase


class TimestepReader:
    """
    Reads timesteps as numbers, with one copy from the device for a whole generation.

    A pipeline hands its model one element after another of the scheduler's `timesteps`, each a view of one tensor. The
    first is read together with all others in that tensor, the rest from the copy.
    """

    def __init__(self) -> None:
        self._source: torch.Tensor | None = None
        self._version: int | None = None
        self._values: list[float] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def read(self, timestep: torch.Tensor | float) -> list[float]:
        """
        The values of a timestep.

        Args:
            timestep (`torch.Tensor` or `float`): A number, a scalar tensor, or one timestep a sample.

        Returns:
            `list[float]`: The distinct values: one, or one a sample.

        Examples:

        ```python
        >>> import torch
        >>> timesteps = torch.tensor([801, 401])
        >>> reader = TimestepReader()
        >>> [reader.read(t) for t in timesteps]
        [[801.0], [401.0]]
        ```
        """
        if not isinstance(timestep, torch.Tensor):
            return [float(timestep)]
        if timestep.device.type == "cpu" or (timestep.numel() > 1 and any(timestep.stride())):
            return [float(value) for value in timestep.flatten().tolist()]
        return [self._read_view(timestep)]

    def _read_view(self, timestep: torch.Tensor) -> float:
        storage = timestep.untyped_storage()
        # An inference tensor has no version counter. One that stands alone may be a buffer that is written anew for
        # every step; those of a whole run are not written to.
        version = None if timestep.is_inference() else timestep._version
        is_buffer = version is None and storage.nbytes() == timestep.element_size()
        is_known = (
            self._source is not None
            and not is_buffer
            and self._source.untyped_storage().data_ptr() == storage.data_ptr()
            and self._source.dtype == timestep.dtype
            and self._version == version
        )
        if not is_known:
            # Holding the tensor keeps its memory from being reused for another one.
            self._source = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)
            self._version = version
            self._values = [float(value) for value in self._source.tolist()]
        return self._values[timestep.storage_offset()]


def timestep_key(timestep: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """
    The timestep as integers to hash, without reading it.

    Args:
        timestep (`torch.Tensor` or `float`): A number, a scalar tensor, or one timestep a sample.
        device (`torch.device`): Where the key is needed.

    Returns:
        `torch.Tensor` of shape `(1,)` or `(batch,)`: The bits of the float32 timestep, int64.

    Examples:

    ```python
    >>> import torch
    >>> timestep_key(1.0, torch.device("cpu"))
    tensor([1065353216])
    ```
    """
    values = torch.as_tensor(timestep, dtype=torch.float32, device=device)
    return values.reshape(-1).view(torch.int32).to(torch.int64)
