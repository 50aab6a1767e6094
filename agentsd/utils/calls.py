"""What a pipeline takes and what it gives, read from its code and checked before it is called."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils import BaseOutput

from ..models.unet import attended_models
from ..runtime.checks import shown
from .images import IMAGE_OUTPUTS
from .loading import own_size


# What some pipelines of diffusers cannot do without, although their signature has a default, and what may be given in
# its place.
_NEEDED: dict[str, tuple[str, ...]] = {
    "image": ("image_embeds",),
    "mask_image": (),
    "control_image": (),
    "control_mode": (),
    "conditioning_frames": (),
    "video": ("latents",),
    "image_latents": (),
    "gligen_phrases": (),
    "gligen_boxes": (),
}
_TEXTS = {
    "prompt_embeds": ("prompt", "prompt_2"),
    "negative_prompt_embeds": ("negative_prompt", "negative_prompt_2"),
    "ip_adapter_image_embeds": ("ip_adapter_image",),
}
# What agentsd gives to every pipeline, and to those whose steps it times.
_OWN = ("num_inference_steps", "generator", "output_type")
_CALLBACKS = ("callback_on_step_end", "callback", "callback_steps")
_ADAPTER_IMAGES = ("ip_adapter_image", "ip_adapter_image_embeds")


def pipeline_call(
    prompt: str | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The arguments that a pipeline is called with: those that were given, so that it keeps its own for the others."""
    # Given one of them, some pipelines silently take their default for both.
    if (height is None) != (width is None):
        raise ValueError("Give both `height` and `width`, or neither.")
    given = {
        "prompt": prompt,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "negative_prompt": negative_prompt,
        **options,
    }
    return {name: value for name, value in given.items() if value is not None}


def check_call(pipe: Any, call: Mapping[str, Any], steps: int | None = None, is_timed: bool = True) -> None:
    """
    Refuse, before any work, what no image can be drawn with: a pipeline that gives something else, or arguments that
    do not suit it. `steps` is left out where it is not known yet; `is_timed` says whether each step is to be told of.
    """
    _check_gives_images(pipe)
    if is_timed:
        step_callback(pipe, lambda: None)
    if missing := _missing_inputs(pipe, call):
        raise TypeError(f"{type(pipe).__name__} needs {_listed(missing)} as well: pass what is missing along.")
    _check_accepts(pipe, [*call, *_OWN])
    for embeds, texts in _TEXTS.items():
        both = [name for name in texts if name in call and embeds in call]
        if both:
            raise ValueError(f"Give either {_listed(both)} or `{embeds}`, not both.")
    is_size_left = "height" in _parameters(pipe) and "height" not in call
    if is_size_left and _uses(pipe, "sample_size", "default_sample_size"):
        own_size(pipe)  # raises where the model does not know it
    if steps is not None:
        _check_strength(pipe, call, steps)


def check_draws_from_text(pipe: Any, call: Mapping[str, Any], steps: int | None = None, is_timed: bool = True) -> None:
    """[`check_call`] for those who have nothing but text to give."""
    _check_gives_images(pipe)
    kind = type(pipe).__name__
    advice = "load and call it in Python, with `agentsd.AgentSDPipeline`."
    missing = _missing_inputs(pipe, call)
    if "image" in missing:
        raise TypeError(f"{kind} starts from an image, but gets only a prompt here: {advice}")
    if missing:
        raise TypeError(f"{kind} needs {_listed(missing)}, but gets only a prompt here: {advice}")
    if "prompt" not in _parameters(pipe):
        raise TypeError(f"{kind} takes no prompt, and gets nothing else here: {advice}")
    check_call(pipe, call, steps, is_timed)


def step_callback(pipe: Any, end_of_step: Callable[[], None]) -> dict[str, Any]:
    """The arguments by which a pipeline tells of each step that it has done."""
    parameters = _parameters(pipe)
    if "callback_on_step_end" in parameters:

        def on_step_end(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            end_of_step()
            return tensors

        return {"callback_on_step_end": on_step_end}
    if {"callback", "callback_steps"} <= parameters.keys():
        # Older pipelines.
        return {"callback": lambda *_: end_of_step(), "callback_steps": 1}
    raise TypeError(
        f"{type(pipe).__name__} cannot be timed step by step, as it takes no `callback_on_step_end`: patch it with "
        "`agentsd.apply_patch`, and compare what it draws before and after."
    )


def without_tensors(error: Exception, call: Mapping[str, Any]) -> Exception | None:
    """An error whose message writes out tensors of the call, with their shapes instead; `None` for any other."""
    message = str(error)
    for value in call.values():
        if not isinstance(value, (str, int, float)):
            for text in (str(value), repr(value)):
                message = message.replace(text, shown(value)) if text else message
    return None if message == str(error) else type(error)(message)


def _check_gives_images(pipe: Any) -> None:
    attended_models(pipe)  # raises what is wrong with another object
    gives = _output_names(pipe)
    if gives and not any(name in gives for name in IMAGE_OUTPUTS):
        raise TypeError(
            f"{type(pipe).__name__} gives {_listed(gives)}, not images, which is what agentsd draws and compares: "
            "patch it with `agentsd.apply_patch`, and call it yourself."
        )


def _output_names(pipe: Any) -> list[str]:
    """What a pipeline returns, by the output classes that its code names; nothing where it names none."""
    calls = [inspect.unwrap(vars(kind)["__call__"]) for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    functions = [call for call in calls if inspect.isfunction(call)]
    named = [function.__globals__.get(name) for function in functions for name in function.__code__.co_names]
    outputs = [kind for kind in named if isinstance(kind, type) and issubclass(kind, BaseOutput)]
    return list(dict.fromkeys(name for output in outputs for name in getattr(output, "__dataclass_fields__", {})))


def _missing_inputs(pipe: Any, call: Mapping[str, Any]) -> list[str]:
    """What a pipeline cannot do without, and the call does not give."""
    parameters = _parameters(pipe)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in (*call, *_OWN, *_CALLBACKS)
    ]
    # Pipelines from elsewhere may take an image or leave it.
    if _is_of_diffusers(pipe):
        missing += [
            name
            for name, others in _NEEDED.items()
            if name in parameters and name not in missing and call.keys().isdisjoint((name, *others))
        ]
    takes_image = getattr(pipe.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj"
    if takes_image and "ip_adapter_image" in parameters and call.keys().isdisjoint(_ADAPTER_IMAGES):
        missing.append("ip_adapter_image")
    return missing


def _check_accepts(pipe: Any, names: list[str]) -> None:
    """Refuse arguments that a pipeline does not know; many of diffusers ignore them without a word."""
    parameters = _parameters(pipe)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [name for name in names if name not in parameters]
    if unknown and (_is_of_diffusers(pipe) or not takes_all):
        raise TypeError(f"{type(pipe).__name__} takes no {_listed(unknown)}: leave that out.")


def _check_strength(pipe: Any, call: Mapping[str, Any], steps: int) -> None:
    """Refuse a strength that leaves no step, where the pipeline runs only the last so many of them."""
    strength = _parameters(pipe).get("strength")
    if strength is None or not _uses(pipe, "get_timesteps") or call.get("denoising_start") is not None:
        return
    value = call.get("strength", strength.default)
    # A schedule of one's own has as many steps as it has entries.
    steps = next((len(call[name]) for name in ("timesteps", "sigmas") if name in call), steps)
    if isinstance(value, (int, float)) and 0 <= value <= 1 and steps * value < 1:
        lowest = math.ceil(1000 / max(steps, 1)) / 1000
        raise ValueError(
            f"`strength={value}` leaves none of {steps} steps, since it is the share of them that is run: raise it to "
            f"{lowest:g} or more, or take more steps."
        )


def _uses(pipe: Any, *names: str) -> bool:
    """Whether the code of a pipeline's call has one of these names in it."""
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    return code is not None and not set(names).isdisjoint(code.co_names)


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters


def _is_of_diffusers(pipe: Any) -> bool:
    return type(pipe).__module__.startswith("diffusers.")


def _listed(names: list[str]) -> str:
    *others, last = (f"`{name}`" for name in names)
    return f"{', '.join(others)} and {last}" if others else last
