"""Presets opened to be looked into: nothing of the weights but their headers is read or fetched."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from puna.checkpoint import hub
from puna.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from puna.checkpoint.peft_config import AdapterConfig
from puna.checkpoint.preset import Preset
from puna.checkpoint.readers import is_adapter
from puna.errors import PresetError
from puna.text.tokenizer import Tokenizer


@contextlib.contextmanager
def open_headers(
    preset: str, revision: str | None = None, *, headers: bool = True
) -> Iterator[Preset]:
    """A preset whose configuration, tensor shapes and tokenizer may be read, and no weights.

    Args:
        preset: as `from_preset` takes it. Of one on the Hub the small files are fetched, and the
            headers of its weight files.
        revision: a branch, tag or commit of the Hub, where the address names none.
        headers: False where the tokenizer is enough.

    Raises:
        PresetError: it is not there, or its files are broken.
    """
    with _located(preset, revision, headers) as path:
        if not is_adapter(path):
            yield Preset(path)
            return
        base, base_revision = _base_of(path)
        with open_headers(base, base_revision, headers=headers) as below:
            yield Preset(below.path, (*below.adapters, path), weights=headers)


@contextlib.contextmanager
def _located(preset: str, revision: str | None, headers: bool) -> Iterator[Path]:
    """Where the files are, or what stands for them."""
    address = hub.PRESETS.get(preset, preset)
    if not address.startswith(hub.SCHEME):
        yield hub.locate(preset)
        return
    from puna.cli.remote import mirrored

    with mirrored(address, revision, headers=headers) as path:
        yield path


def _base_of(adapter: Path) -> tuple[str, str | None]:
    """The preset that an adapter is for, and its revision."""
    config = AdapterConfig.read(adapter / ADAPTER_CONFIG)
    name = config.base_model_name_or_path
    for path in (Path(name).expanduser(), adapter / name) if name else ():
        if path.exists() and path.resolve() != adapter.resolve():
            return str(path), None
    if name and (name in hub.PRESETS or name.startswith(hub.SCHEME)):
        return name, config.revision
    if name and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return hub.SCHEME + name, config.revision
    raise PresetError(
        f"{adapter} is an adapter, and its base is not there ({name!r}); look into the base by "
        "itself, or write its place into adapter_config.json"
    )


def tokenizer_of(opened: Preset) -> Tokenizer:
    """The tokenizer of an opened preset.

    Raises:
        TokenizerError: it has none, or a broken one.
    """
    return Tokenizer(**opened.tokenizer_settings())
