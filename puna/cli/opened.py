"""Presets opened to be looked into: nothing of the weights but their headers is read or fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from puna.checkpoint import hub
from puna.checkpoint.preset import Preset
from puna.text.tokenizer import Tokenizer

# What is in some files and is no parameter of the model.
NO_PARAMETERS = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias")


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
    address = hub.PRESETS.get(preset, preset)
    if not address.startswith(hub.SCHEME):
        yield Preset(hub.locate(preset))
        return
    from puna.cli.remote import mirrored

    with mirrored(address, revision, headers=headers) as path:
        yield Preset(path)


def tokenizer_of(opened: Preset) -> Tokenizer:
    """The tokenizer of an opened preset.

    Raises:
        TokenizerError: it has none, or a broken one.
    """
    return Tokenizer(**opened.tokenizer_settings())
