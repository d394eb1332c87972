"""JSON files that hold an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puna.errors import PresetError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.

    Raises:
        PresetError: it is missing, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*"))[:8] if path.parent.is_dir() else []
        raise PresetError(
            f"{path.parent} has no {path.name}; expected the files of a checkpoint, "
            f"found: {', '.join(beside) or 'nothing'}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PresetError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise PresetError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The same; an empty object where there is no file."""
    return read_json(path) if path.is_file() else {}
