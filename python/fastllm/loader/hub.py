"""Finds a model: a folder, a GGUF file, an installed package that ships one GGUF file, or a Hugging Face hub id."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastllm.errors import LoadError

_PACKAGE = "package:"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_model(
    model: str, revision: str | None = None, download_dir: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder or GGUF file of `model`, downloaded if it is a hub id. Raises LoadError saying what was tried."""
    if model.startswith(_PACKAGE):
        return _package_gguf(model.removeprefix(_PACKAGE))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"{path} is a file but not a .gguf file; name the model's folder instead.")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.suffix == ".gguf":
        raise LoadError(f"There is no model at {path.absolute()}.")
    return _download(model, revision, download_dir, token)


def _package_gguf(name: str) -> Path:
    spec = None
    if name.isidentifier():
        spec = importlib.util.find_spec(name)  # finds the package without running its code
    if spec is None or not spec.submodule_search_locations:
        raise LoadError(f"{_PACKAGE}{name}: no installed package has this name; install it with pip first.")
    files = sorted(p for root in spec.submodule_search_locations for p in Path(root).glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise LoadError(f"{_PACKAGE}{name} must ship exactly one .gguf file, found {found}.")
    return files[0]


def _download(model: str, revision: str | None, download_dir: str | None, token: str | bool | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise LoadError(
            f"There is no folder {model!r} here, and downloading it as a hub id needs `pip install huggingface-hub`."
        ) from error
    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=_FILES, token=token)
        )
    except Exception as error:  # httpx, OSError and the hub's own errors share no base class
        at = f" at revision {revision!r}" if revision else ""
        raise LoadError(
            f"The model {model!r} was not found: {Path(model).absolute()} does not exist, and fetching the hub id "
            f"{model!r}{at} failed ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]}). Check the "
            "name and the network, log in for gated models, or pass a local folder."
        ) from error
