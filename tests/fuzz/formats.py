"""The formats that are broken, by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Protocol

from tests.fuzz.gguf_files import GGUF
from tests.fuzz.quantized import Quantized
from tests.fuzz.templates import Template
from tests.fuzz.texts import Config, TokenizerJson
from tests.fuzz.weights import Index, KerasHub, Pth, Safetensors


class Format(Protocol):
    """A format, by what its cases are made from and loaded with."""

    name: str

    def write(self, directory: Path) -> None:
        """Write the files that are whole."""
        ...

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        """Write broken ones."""
        ...

    def load(self, case: Path) -> None:
        """Read all of it.

        Raises:
            PunaError: it is refused.
        """
        ...


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Safetensors(), Index(), GGUF(), KerasHub(), Pth(), TokenizerJson(), Config(), Template(),
        Quantized(),
    )
}  # fmt: skip
