"""A pipeline that is patched from the start."""

import os
from typing import TYPE_CHECKING, Any

import torch

from .config import AgentSDConfig
from .patch import FilterFn, apply_patch, check_filter, is_patched
from .patch_report import report
from .presets import PresetName
from .utils.loading import load_pipeline


if TYPE_CHECKING:
    from .comparison import Comparison


class AgentSDPipeline:
    """
    A diffusers pipeline with the agentsd patch. It is called like the pipeline, and has all of its attributes.

    Args:
        pipe (`DiffusionPipeline`): A pipeline with a UNet; patched in place unless it is patched already.

    Raises:
        TypeError: If it has no UNet.
        ValueError: If its UNet has no layer to patch.

    Examples:

    ```python
    >>> from agentsd import AgentSDPipeline
    >>> pipe = AgentSDPipeline.from_pretrained("emoji", ratio=0.5)
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe("red apple", num_inference_steps=2, height=256, width=384).images[0].size
    (384, 256)
    ```
    """

    pipe: Any

    def __init__(self, pipe: Any) -> None:
        pipe = pipe.pipe if isinstance(pipe, AgentSDPipeline) else pipe
        if not is_patched(pipe):
            apply_patch(pipe)
        self.__dict__["pipe"] = pipe

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike = "emoji",
        ratio: float | None = None,
        *,
        preset: PresetName | None = None,
        config: AgentSDConfig | str | os.PathLike | None = None,
        filter_fn: FilterFn | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "AgentSDPipeline":
        """
        Load a pipeline and patch it.

        Args:
            model (`str` or `os.PathLike`, defaults to `"emoji"`):
                The built-in name `"emoji"`, a folder that a pipeline was saved in, a `.safetensors` file, or an id on
                the Hub. A folder of that name takes precedence over the Hub, and the built-in name over a folder: for
                a folder called `emoji`, write `"./emoji"` or pass a `Path`.
            ratio (`float`, *optional*, defaults to `0.4`): Share of tokens to merge, in `[0, 1)`.
            preset (`str`, *optional*, defaults to `"paper"`): A named patch, as for [`apply_patch`].
            config (`AgentSDConfig`, `str` or `os.PathLike`, *optional*):
                An `AgentSDConfig` holds all options of the patch, instead of `ratio` and keywords. A string or path is
                diffusers' own `config` for a `.safetensors` file: the folder with the model's description.
            filter_fn (`Callable[[str, torch.nn.Module], bool]`, *optional*): As for [`apply_patch`].
            device (`str` or `torch.device`, *optional*): By default CUDA, else Apple's MPS, else the CPU.
            dtype (`str` or `torch.dtype`, *optional*):
                float32, float16 or bfloat16. By default float16 on CUDA, and float32 elsewhere: CPUs are slow in half
                precision, and MPS is known for black images in it.
            options:
                Fields of [`AgentSDConfig`]. Anything else goes to `from_pretrained` or, for a file,
                `from_single_file` of diffusers: components, `variant`, `revision`, … A file holds weights only; the
                description that goes with them is fetched from the Hub unless `config` names a folder that has it.

        Returns:
            `AgentSDPipeline`: The patched pipeline.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            OSError: If it cannot be read, or the Hub cannot be reached or does not have it.
            TypeError: If there is no such option, an option has the wrong type, or the model has no UNet.
            ValueError: If it is not a model, its weights are pickles, or an option is out of range.

        Examples:

        ```python
        >>> from agentsd import AgentSDPipeline
        >>> AgentSDPipeline.from_pretrained("emoji", ratio=0.5, agent_until=0.3).patch_config.agent_until
        0.3
        ```
        """
        patch = {name: options.pop(name) for name in AgentSDConfig().to_dict() if name in options}
        if ratio is not None:
            patch["ratio"] = ratio
        if isinstance(config, AgentSDConfig):
            given = [*(["preset"] if preset is not None else []), *patch]
            if given:
                raise ValueError(f"Give either `config` or {', '.join(given)}, not both.")
        else:
            if config is not None:
                options["config"] = config
            # Before the model, which may take long to load.
            config = AgentSDConfig.preset("paper" if preset is None else preset, **patch)
        check_filter(filter_fn)
        pipe = load_pipeline(model, device=device, dtype=dtype, **options)
        return cls(apply_patch(pipe, config=config, filter_fn=filter_fn))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate, exactly as the pipeline does.

        Args:
            args: Passed to the pipeline.
            kwargs: Passed to the pipeline.

        Returns:
            What the pipeline returns.
        """
        return self.pipe(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # While it is being unpickled there is no pipe yet.
        if name == "pipe":
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pipe":
            raise AttributeError(f"`pipe` cannot be replaced. Wrap the other one: `{type(self).__name__}(other)`.")
        # `pipe.scheduler = …` must change the scheduler that is used.
        setattr(self.pipe, name, value)

    # For what asks an object what it is: `from_pipe` of diffusers looks up the class of the pipeline that it is given.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the pipeline: it is an instance of that as well."""
        return type(self.__dict__["pipe"]) if "pipe" in self.__dict__ else type(self)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self.__dict__, *dir(self.__dict__.get("pipe"))})

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, pickle refuses an object that names another class than its own.
        return _wrap, (type(self), self.pipe)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pipe!r})"

    @property
    def patch_config(self) -> AgentSDConfig:
        """The configuration of the patch (`config` is the pipeline's own)."""
        return report(self.pipe).config

    def to(self, *args: Any, **kwargs: Any) -> "AgentSDPipeline":
        """
        Move the pipeline, as `DiffusionPipeline.to` does.

        Args:
            args: Passed to `DiffusionPipeline.to`.
            kwargs: Passed to `DiffusionPipeline.to`.

        Returns:
            `AgentSDPipeline`: This object.
        """
        self.__dict__["pipe"] = self.pipe.to(*args, **kwargs)
        return self

    def compare(self, prompt: str | None = None, **options: Any) -> "Comparison":
        """
        Generate the same image with and without the patch, and time both.

        Args:
            prompt (`str`, *optional*): What to draw, where the pipeline takes a prompt and gets no embeddings.
            options:
                As for [`agentsd.compare.compare`], such as `steps`, `seed` and, for the timing, `seconds`; and
                whatever the pipeline takes, such as `image` or `prompt_embeds`.

        Returns:
            `Comparison`: Both images, their difference, times and fidelity.

        Examples:

        ```python
        >>> from agentsd import AgentSDPipeline
        >>> pipe = AgentSDPipeline.from_pretrained("emoji")
        >>> comparison = pipe.compare("red apple", steps=2, height=256, width=256, seconds=0)
        >>> comparison.baseline.size == comparison.agentsd.size
        True
        ```
        """
        from .compare import compare

        return compare(self.pipe, prompt, **options)


def _wrap(kind: type[AgentSDPipeline], pipe: Any) -> AgentSDPipeline:
    """A wrapper around a pipeline as it is, patched or not."""
    wrapper = kind.__new__(kind)
    wrapper.__dict__["pipe"] = pipe
    return wrapper
