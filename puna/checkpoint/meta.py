"""Meta's original layout, read: `params.json` and `consolidated.NN.pth`, one file a GPU.

Sources: Meta's `llama_models/llama3/{args,model}.py`, and fairscale's parallel layers, which say
how a tensor is cut over the files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.meta_config import Params
from puna.checkpoint.names import KEY_ROWS, META, QUERY_ROWS, SAME, Heads, Transform
from puna.checkpoint.source import EntrySource, TensorInfo
from puna.checkpoint.torch_file import TorchFile
from puna.errors import PresetError

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.(\d{2,3})\.pth")
_ROPE_FREQS = "rope.freqs"  # a buffer that the first Llamas saved; it follows from the config

# The dimension along which a tensor is cut over the files; the embedding's is told by its shape.
_CUT_BY_COLUMNS = re.compile(r".*\.(attention\.wo|feed_forward\.w2)\.weight")
_WHOLE = re.compile(r"(.*_)?norm\.weight|layers\.\d+\..*_norm\.weight")


@dataclass(frozen=True, slots=True)
class _Entry:
    theirs: str
    axis: int | None  # None: every file has all of it
    transform: Transform
    info: TensorInfo


class MetaSource(EntrySource[_Entry, TorchFile]):
    """The tensors of a model in Meta's layout, in Hugging Face's names and layout.

    Rows of q and k are put from rotary pairs to halves, and what is cut over several files is put
    together, one tensor at a time. What needs neither is a view of the mapped file.

    Args:
        directory: it holds `params.json` and `consolidated.00.pth`, and so on.

    Attributes:
        params: what `params.json` says.

    Raises:
        PresetError: a file is missing or malformed, the files do not fit each other, or they hold
            tensors that a Llama has not.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory)
        self.params = Params.read(self.path / PARAMS)
        self._heads = Heads(self.params.n_heads, self.params.n_kv_heads)
        self._entries: dict[str, _Entry] = {}
        self._files: list[TorchFile] = []
        self.is_tied = False
        try:
            for file in _files(self.path):
                self._files.append(TorchFile(file))
            self._add()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's layout: a view of the mapped file, or a new array.

        Raises:
            PresetError: there is no tensor of that name, or the source is closed.
        """
        entry = self._entry(name)
        files = self._files if entry.axis is not None else self._files[:1]
        # Files are cut between heads, so each part can be put in order by itself.
        heads = Heads(*(max(1, count // len(files)) for count in self._heads))
        parts = [entry.transform.to_ours(file.read(entry.theirs), heads) for file in files]
        if len(parts) == 1:
            return np.ascontiguousarray(parts[0])
        return np.concatenate(parts, axis=entry.axis)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages; a view still held reads them anew.

        Raises:
            PresetError: there is no tensor of that name.
        """
        entry = self._entry(name)
        for file in self._files:
            file.release(entry.theirs)

    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json` as transformers 4 would have written it.

        Raises:
            PresetError: `params.json` asks for what is not computed here.
        """
        embedding = self.info("model.embed_tokens.weight")
        return self.params.hf_config(
            vocab_size=embedding.shape[0], dtype=embedding.dtype.name, is_tied=self.is_tied
        )

    def _where(self) -> str:
        return str(self.path)

    def _add(self) -> None:
        """Match the files with each other and with the table of names."""
        first = self._files[0]
        for file in self._files[1:]:
            if differing := sorted(set(first.names()) ^ set(file.names())):
                raise PresetError(
                    f"{first.path.name} and {file.path.name} in {self.path} differ in "
                    f"{differing[0]!r} and {len(differing) - 1} more; they are of different "
                    "models: fetch them together again"
                )
        unknown = [n for n in first.names() if META.to_ours(n) is None and n != _ROPE_FREQS]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise PresetError(
                f"{first.path}: tensors that a Llama has not: {', '.join(unknown[:5])}{more}; "
                "expected those of a text model in Meta's layout: this model cannot be loaded"
            )
        for theirs in first.names():
            if (found := META.to_ours(theirs)) is not None:
                ours, transform = found
                self._entries[ours] = self._combined(theirs, transform)
        if "tok_embeddings.weight" not in first.names():
            raise PresetError(f"{first.path} lacks tok_embeddings.weight; fetch the model again")
        self.is_tied = "output.weight" not in first.names() or first.is_same(
            "output.weight", "tok_embeddings.weight"
        )
        if self.is_tied:
            self._entries.pop("lm_head.weight", None)

    def _combined(self, theirs: str, transform: Transform) -> _Entry:
        """What a tensor is once its parts are put together."""
        infos = [file.info(theirs) for file in self._files]
        first = infos[0]
        for info in infos[1:]:
            if (info.shape, info.dtype) != (first.shape, first.dtype):
                raise PresetError(
                    f"tensor {theirs!r} is {first.dtype} {first.shape} in {first.file}, and "
                    f"{info.dtype} {info.shape} in {info.file.name}; fetch them together again"
                )
        axis = self._axis(theirs, first)
        shape = list(first.shape)
        if axis is not None:
            shape[axis] *= len(infos)
        self._check_heads(theirs, transform, shape)
        nbytes = first.nbytes * (1 if axis is None else len(infos))
        info = TensorInfo(tuple(shape), first.dtype, nbytes, first.file, first.stored)
        return _Entry(theirs, axis, transform, info)

    def _axis(self, theirs: str, info: TensorInfo) -> int | None:
        """Along which dimension a tensor is cut over the files."""
        if _WHOLE.fullmatch(theirs):
            return None
        if len(info.shape) != 2:
            raise PresetError(
                f"{info.file}: tensor {theirs!r} has shape {info.shape}, expected a matrix; the "
                "file is damaged: fetch it again"
            )
        if theirs == "tok_embeddings.weight":
            # Llama 3 cuts the vocabulary, Llama 1 and 2 cut the width.
            return 0 if info.shape[1] == self.params.dim else 1
        return 1 if _CUT_BY_COLUMNS.fullmatch(theirs) else 0

    def _check_heads(self, theirs: str, transform: Transform, shape: list[int]) -> None:
        if transform is SAME:
            return
        count = {QUERY_ROWS: self._heads.query, KEY_ROWS: self._heads.key_value}[transform]
        rows, files = count * self.params.head_dim, len(self._files)
        if shape[0] != rows or 0 in shape or count % files:
            raise PresetError(
                f"tensor {theirs!r} in {self.path} has {shape[0]} rows over {files} files, "
                f"expected {rows}: {count} heads of {self.params.head_dim}, whole heads in each "
                f"file; {PARAMS} is of another model, or heads are repeated, which is not read"
            )


def _files(directory: Path) -> list[Path]:
    """`consolidated.00.pth` and those after it."""
    found = sorted(path for path in directory.glob("consolidated.*") if _FILE.fullmatch(path.name))
    numbers = [int(match[1]) for path in found if (match := _FILE.fullmatch(path.name))]
    if not found or numbers != list(range(len(found))):
        names = ", ".join(path.name for path in found) or "none"
        raise PresetError(
            f"{directory}: expected consolidated.00.pth and, without a gap, those after it; found "
            f"{names}: fetch the missing files"
        )
    return found
