"""Loads a model from a folder, a file or the Hub, onto a device that works."""

import inspect
import json
import os
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open


BUILTIN_MODELS = ("emoji",)

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
# What diffusers' loading functions take beside components. They only log a keyword that they do not know, so that a
# misspelt option would go unnoticed.
_COMMON_OPTIONS = {*_HUB_OPTIONS, "disable_mmap", "dtype"}
_FILE_OPTIONS = {*_COMMON_OPTIONS, "config", "original_config"}
_FOLDER_OPTIONS = {
    *_COMMON_OPTIONS,
    *("custom_pipeline", "custom_revision", "device_map", "low_cpu_mem_usage", "max_memory", "offload_folder"),
    *("load_connected_pipeline", "offload_state_dict", "quantization_config", "trust_remote_code", "variant"),
}
# By the kind of model and the channels that its UNet takes: the latents' own 4, and those of what else it is given.
_PIPELINES_OF_FILES = {
    ("sd", 4): "StableDiffusionPipeline",
    ("sd", 7): "StableDiffusionUpscalePipeline",
    ("sd", 8): "StableDiffusionInstructPix2PixPipeline",
    ("sd", 9): "StableDiffusionInpaintPipeline",
    ("sdxl", 4): "StableDiffusionXLPipeline",
    ("sdxl", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("sdxl", 9): "StableDiffusionXLInpaintPipeline",
    ("sdxl refiner", 4): "StableDiffusionXLImg2ImgPipeline",
}


def resolve_model(model: str | os.PathLike = "emoji", replaced: Collection[str] = ()) -> Path | str:
    """The folder or file that a model is in, or its id on the Hub; `replaced` components may be pickles there."""
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"`model` must be a name or a path, but got {type(model).__name__}.")
    name = os.fspath(model)
    is_builtin = isinstance(model, str) and name in BUILTIN_MODELS
    path = Path(__file__).parents[1] / "assets" / name if is_builtin else Path(name).expanduser()
    if name and path.is_dir():
        _check_folder(path, replaced)
        return path
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ValueError(f"{name} is a pickle checkpoint, which can run code when it is loaded. {_CONVERT}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{name} is not a model: agentsd loads folders and files that end in .safetensors.")
        return path
    is_path = isinstance(model, os.PathLike) or path.suffix == ".safetensors" or not _HUB_ID.fullmatch(name)
    if is_path or name.startswith("."):
        raise FileNotFoundError(
            f"There is no model {name!r}: there is no such file or folder, and it is neither a built-in model "
            f"({', '.join(BUILTIN_MODELS)}) nor an id on the Hugging Face Hub (owner/name)."
        )
    return name


def load_pipeline(
    model: str | os.PathLike = "emoji",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> diffusers.DiffusionPipeline:
    """Load a pipeline, unpatched, from safetensors only; `options` go to diffusers."""
    if "torch_dtype" in options:
        if dtype is not None:
            raise TypeError("Give either `dtype` or `torch_dtype`, not both.")
        dtype = options.pop("torch_dtype")
    source = resolve_model(model, replaced=options.keys())
    target = pick_device(device)
    options["dtype"] = pick_dtype(dtype, target)
    if not options.pop("use_safetensors", True):
        raise ValueError(f"`use_safetensors=False` would load a pickle, which can run code. {_CONVERT}")
    is_file = isinstance(source, Path) and source.is_file()
    pipe = _load_file(Path(source), options) if is_file else _load_folder_or_id(source, options)
    return pipe if options.get("device_map") is not None else pipe.to(target)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, if it works; by default CUDA, else MPS, else the CPU."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        # Names such as "cuda:7" are valid without the device being there; a tensor on it tells.
        torch.empty(1, device=found).cpu()
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"Cannot use device {str(device)!r}. {_usable_devices()}") from error
    return found


def pick_dtype(dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.dtype:
    """The precision asked for, as a dtype or by name; by default float16 on CUDA, else float32."""
    if dtype is None:
        return torch.float16 if torch.device(device).type == "cuda" else torch.float32
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, but got {str(dtype)!r}.")
    return found


def own_size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels that a pipeline was made for."""
    size = getattr(pipe.unet.config, "sample_size", None)
    if size is None:
        raise ValueError(
            f"The UNet of this {type(pipe).__name__} does not say which size it was made for (its config has no "
            "`sample_size`): give `height` and `width`."
        )
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


_CONVERT = (
    "Only safetensors are loaded. Get the model as safetensors, or convert it once, from a source that you trust, "
    "with diffusers and `save_pretrained`."
)


def _usable_devices() -> str:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return f"Devices that work here: {', '.join(devices)}."


def _read_index(folder: Path) -> dict[str, Any]:
    index = folder / "model_index.json"
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} cannot be read: {error}.") from error
    if not isinstance(components, dict):
        raise ValueError(f"{index} does not describe a pipeline.")
    return components


def _check_folder(folder: Path, replaced: Collection[str]) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a diffusers model, because it has no model_index.json. Name the folder that a pipeline "
            "was saved in, or a .safetensors file."
        )
    for component in (name for name in _read_index(folder) if name not in replaced):
        suffixes = {file.suffix.lower() for file in (folder / component).glob("*")}
        if not suffixes.isdisjoint(_PICKLE_SUFFIXES) and ".safetensors" not in suffixes:
            raise ValueError(f"{folder} has its {component} as a pickle, which can run code. {_CONVERT}")


def _check_options(pipeline_class: type, options: dict[str, Any], known: set[str], kind: str) -> None:
    unknown = sorted(set(options) - known - set(inspect.signature(pipeline_class).parameters))
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise TypeError(f"Loading {pipeline_class.__name__} from a {kind} has no option {names}.")


def _load_folder_or_id(source: Path | str, options: dict[str, Any]) -> diffusers.DiffusionPipeline:
    try:
        from_hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an outdated argument that diffusers itself sets
            name = diffusers.DiffusionPipeline.load_config(source, **from_hub).get("_class_name")
        is_custom = "custom_pipeline" in options or not hasattr(diffusers, str(name))
        if not is_custom:
            # Before the weights, which may take long to load.
            _check_options(getattr(diffusers, name), options, _FOLDER_OPTIONS, "folder")
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
        if is_custom:
            # What a pipeline with its own code takes is known only now.
            _check_options(type(pipe), options, _FOLDER_OPTIONS, "folder")
        return pipe
    except OSError as error:
        if isinstance(source, Path):
            raise OSError(f"Cannot load the model in {source}: {error}") from error
        raise OSError(
            f"Cannot load {source!r}: there is no such folder here, and the Hugging Face Hub did not provide it. "
            f"Check the name, the connection and, for a gated model, that you are logged in. The Hub's answer: {error}"
        ) from error


def _load_file(file: Path, options: dict[str, Any]) -> diffusers.DiffusionPipeline:
    pipeline_class = _pipeline_class_of_file(file, options.get("config"))
    _check_options(pipeline_class, options, _FILE_OPTIONS, "file")
    try:
        return pipeline_class.from_single_file(str(file), **options)
    except OSError as error:
        raise OSError(
            f"Cannot load {file}. A single file does not describe the model, so diffusers fetches a description from "
            "the Hugging Face Hub; without a connection, load it in Python and give `config`, a folder that has the "
            "model's model_index.json and configs. `save_pretrained` then makes a folder of it, for which none is "
            f"needed. diffusers says: {error}"
        ) from error


def _pipeline_class_of_file(file: Path, config: str | os.PathLike | None) -> Any:
    """The pipeline that a description names or, without one, that the names and shapes of the weights call for."""
    try:
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            first = "model.diffusion_model.input_blocks.0.0.weight"
            in_channels = weights.get_slice(first).get_shape()[1] if first in names else None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or is damaged: {error}") from error
    if config is not None and (Path(config) / "model_index.json").is_file():
        name = str(_read_index(Path(config)).get("_class_name"))
        if not hasattr(diffusers, name):
            raise ValueError(f"{config} describes a {name}, which diffusers does not have.")
        return getattr(diffusers, name)
    if in_channels is None:
        raise ValueError(
            f"{file} is not a complete Stable Diffusion model. Load its parts with diffusers, and patch the pipeline "
            "with `agentsd.apply_patch`."
        )
    kind = "sd"
    if any(name.startswith("conditioner.") for name in names):
        kind = "sdxl" if any(name.startswith("conditioner.embedders.1.") for name in names) else "sdxl refiner"
    if (kind, in_channels) not in _PIPELINES_OF_FILES:
        raise ValueError(
            f"{file} has a UNet with {in_channels} input channels, and no diffusers pipeline loads such a model from "
            "a single file. Name a folder that has it in diffusers' layout."
        )
    return getattr(diffusers, _PIPELINES_OF_FILES[kind, in_channels])
