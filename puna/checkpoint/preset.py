"""An opened preset: what kind of checkpoint it is, its configuration and its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.safetensors import SafetensorsSource
from puna.checkpoint.source import TensorSource
from puna.errors import PresetError

SETTINGS_FILE = "puna.json"

# A checkpoint in one of these is run in the dtype beside it, where none is asked for.
_RUN_AS = {"float64": "float32", "float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16"}


class Preset:
    """The files of a preset on this machine.

    Args:
        path: a Hugging Face directory, a directory with one GGUF file, or a GGUF file.

    Raises:
        PresetError: the files are missing or broken.
    """

    def __init__(self, path: Path):
        self.path = path
        self.gguf: GGUFSource | None = None
        if (gguf := _gguf_file(path)) is not None:
            self.gguf = GGUFSource(gguf)
            self.config = self.gguf.hf_config()
        else:
            self.config = read_json(path / "config.json")
        self.settings = self._optional(SETTINGS_FILE)
        self.generation_config = self._optional("generation_config.json")

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path) if path.exists() else {}

    def tensors(self) -> TensorSource:
        """The checkpoint's tensors."""
        return self.gguf if self.gguf is not None else SafetensorsSource(self.path)

    def default_dtype(self, source: TensorSource) -> str:
        """The dtype to run in where none is asked for: the one that the checkpoint is in."""
        dtype = self.config.get("dtype", self.config.get("torch_dtype"))
        if dtype in (None, "auto"):
            dtype = _widest(source)
        dtype = str(dtype).removeprefix("torch.")
        return _RUN_AS.get(dtype, dtype)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        PresetError: it is missing, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*"))[:8] if path.parent.is_dir() else []
        raise PresetError(
            f"{path.parent} has no {path.name}; expected the files of a Hugging Face checkpoint, "
            f"found: {', '.join(beside) or 'nothing'}"
        ) from None
    except (OSError, ValueError) as error:
        raise PresetError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise PresetError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that it holds instead of a Hugging Face checkpoint."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise PresetError(f"{path} is a file; expected a directory or a .gguf file")
    files = sorted(path.glob("*.gguf"))
    if not files or (path / "config.json").exists():
        return None
    if len(files) > 1 and "-of-" not in files[0].stem:
        names = ", ".join(file.name for file in files)
        raise PresetError(f"{path} holds several GGUF files ({names}); name one of them")
    return files[0]


def _widest(source: TensorSource) -> str:
    """The dtype of the checkpoint's matrices; the widest, where they differ."""
    dtypes = {source.info(n).dtype for n in source.names() if len(source.info(n).shape) > 1}
    floats = [d for d in dtypes if d.kind == "f" or d.name in ("bfloat16", *_RUN_AS)]
    if not floats:
        raise PresetError("the checkpoint holds no matrix of floating-point numbers")
    return max(floats, key=lambda dtype: (np.dtype(dtype).itemsize, dtype.name)).name
