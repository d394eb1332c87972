"""Files of tensors, broken: safetensors, its index, keras-hub's HDF5 and Meta's `.pth`."""

from __future__ import annotations

import json
import pickle
import pickletools
import random
import shutil
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.h5_file import H5File
from puna.checkpoint.keras_hub import KerasHubSource, preprocessor_settings
from puna.checkpoint.meta import MetaSource
from puna.checkpoint.safetensors import SafetensorsSource, write_safetensors
from puna.config import LlamaConfig
from tests.fuzz.mutate import SIZES, mutate_bytes, mutate_json

DATA = Path(__file__).parents[1] / "parity" / "data" / "keras_hub" / "single"


def read_all(source: Any) -> None:
    """Read every tensor whole; what comes must be what was announced."""
    for name in list(source.names()):
        info, array = source.info(name), source.read(name)
        assert array.shape == info.shape, (name, array.shape, info.shape)
        assert array.dtype == info.dtype, (name, array.dtype, info.dtype)
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).sum()  # every byte is there
        source.release(name)
    source.close()


def arrays(names: list[str]) -> dict[str, np.ndarray]:
    """Small arrays of several types and shapes."""
    rng = np.random.default_rng(0)
    shapes, kinds = [(4, 8), (16,), (), (3, 1, 2), (0, 4), (64, 32)], ["f4", "f2", "i8", "u1", "?"]
    return {
        name: rng.integers(0, 2, shapes[place % 6]).astype(kinds[place % 5])
        for place, name in enumerate(names)
    }


def write_arrays(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    write_safetensors(path, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in tensors.items()])


class Safetensors:
    """One safetensors file: its header as JSON, and the bytes of it all."""

    name = "safetensors"
    file = "model.safetensors"

    def write(self, directory: Path) -> None:
        write_arrays(directory / self.file, arrays([f"layers.{i}.weight" for i in range(12)]))

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        raw = (originals / self.file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        if rng.random() < 0.7:
            values = [f'"{word}"' for word in ("F32", "F64", "BF16", "F8_E8M0", "C64", "F4", "I4")]
            values += [f"[{a}, {b}]" for a in (0, 8, 2**63, 2**64) for b in (0, 128, 2**40, 2**64)]
            values += [f"[{size}, 1]" for size in SIZES]
            header = mutate_json(rng, raw[8 : 8 + length].decode(), values)
            claimed = rng.choice([len(header)] * 9 + [rng.choice(SIZES)])
            raw = struct.pack("<Q", claimed) + header + raw[8 + length :]
        else:
            raw = mutate_bytes(rng, raw, range(8))
        (case / self.file).write_bytes(raw)

    def load(self, case: Path) -> None:
        source = SafetensorsSource(case)
        assert sum(source.info(n).nbytes for n in source.names()) <= sum(
            file.stat().st_size for file in case.glob("*.safetensors") if file.is_file()
        )
        read_all(source)


class Index(Safetensors):
    """A safetensors index over three shards, names and links to other places in it."""

    name = "index"
    file = "model.safetensors.index.json"

    def write(self, directory: Path) -> None:
        every = arrays([f"layers.{i}.weight" for i in range(12)])
        weight_map = {}
        for number in range(3):
            shard = f"model-{number + 1:05d}-of-00003.safetensors"
            some = dict(list(every.items())[number * 4 : number * 4 + 4])
            write_arrays(directory / shard, some)
            weight_map |= dict.fromkeys(some, shard)
        index = {"metadata": {"total_size": 9}, "weight_map": weight_map}
        (directory / self.file).write_text(json.dumps(index))

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        names = (
            "../model.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "a/../../x", "~/x",
            "C:\\\\x", "..\\\\x",
            "\\u0000", "/proc/self/mem", "link", "model.safetensors.index.json",
            "loop", "fifo", "outside", "sub/model.safetensors", "x" * 300, "\\ud800", "a\\nb",
            *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3, 4)),
        )  # fmt: skip
        values = [f'"{name}"' for name in names]
        text = (originals / self.file).read_text()
        (case / self.file).write_bytes(mutate_json(rng, text, values))
        for shard in originals.glob("*.safetensors"):
            kind = rng.random()
            if kind < 0.1:
                (case / shard.name).symlink_to(shard)  # as in the Hub's cache: it is followed
            elif kind < 0.15:
                raw = mutate_bytes(rng, shard.read_bytes(), range(200))
                (case / shard.name).write_bytes(raw)
            elif kind < 0.2:
                (case / shard.name).symlink_to(rng.choice(["/dev/zero", "loop", "nowhere", "."]))
            elif kind < 0.97:
                shutil.copy(shard, case)
        (case / "loop").symlink_to("loop")
        (case / "link").symlink_to("/etc/passwd")


class KerasHub:
    """A keras-hub preset: the HDF5 file outside of its numbers, and the config."""

    name = "keras_hub"
    weights = "model.weights.h5"

    def write(self, directory: Path) -> None:
        shutil.copytree(DATA, directory, dirs_exist_ok=True)
        file = H5File(directory / self.weights)
        spans = sorted((o, o + info.nbytes) for o, info in file._entries.values())
        file.close()
        size, end, places = (directory / self.weights).stat().st_size, 0, []
        for start, stop in [*spans, (size, size)]:
            places += range(end, start)
            end = stop
        raw = (directory / self.weights).read_bytes()
        places = [place for place in places if any(raw[place : place + 8])]
        (directory / "places.json").write_text(json.dumps(places))

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        names = ["config.json", self.weights, "metadata.json", "preprocessor.json", "task.json"]
        for name in names:
            shutil.copy(originals / name, case)
        if rng.random() < 0.7:
            places = json.loads((originals / "places.json").read_text())
            raw = mutate_bytes(rng, (originals / self.weights).read_bytes(), places, 8)
            (case / self.weights).write_bytes(raw)
        else:
            name = rng.choice(["config.json", "config.json", "preprocessor.json", "task.json"])
            (case / name).write_bytes(mutate_json(rng, (originals / name).read_text()))

    def load(self, case: Path) -> None:
        source = KerasHubSource(case)
        LlamaConfig.from_hf(source.hf_config()).rope.attention_scaling  # noqa: B018
        preprocessor_settings(case)
        read_all(source)


class Pth:
    """Meta's `consolidated.00.pth`: the archive, its pickle's instructions, and `params.json`."""

    name = "pth"
    weights = "consolidated.00.pth"

    def write(self, directory: Path) -> None:
        from tests import meta_layout
        from tests.unit.test_meta_source import PARAMS, model

        meta_layout.write(directory, model(), PARAMS)

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        shutil.copytree(originals, case, dirs_exist_ok=True)
        kind = rng.random()
        if kind < 0.15:
            raw = mutate_json(rng, (originals / "params.json").read_text())
            (case / "params.json").write_bytes(raw)
            return
        if kind < 0.75:
            self._rewrite_archive(rng, originals / self.weights, case / self.weights)
        if kind > 0.65:
            raw = (case / self.weights).read_bytes()
            central = raw.rfind(b"PK\x01\x02")
            near = [*range(max(0, central - 1500), len(raw)), *range(2500)]
            (case / self.weights).write_bytes(mutate_bytes(rng, raw, near))

    def _rewrite_archive(self, rng: random.Random, old: Path, new: Path) -> None:
        with zipfile.ZipFile(old) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        if rng.random() < 0.7:
            entries = [
                (name, mutate_pickle(rng, raw) if name.endswith("data.pkl") else raw)
                for name, raw in entries
            ]
        if rng.random() < 0.3:
            place = rng.randrange(len(entries))
            name, raw = entries[place]
            entries[place] = rng.choice(
                [(name, raw[:-1]), (name, raw + b"\0"), (name, b""), (f"../{name}", raw)]
            )
            if rng.random() < 0.3:
                entries.insert(place, rng.choice(entries))
        packed = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
        with warnings.catch_warnings(), zipfile.ZipFile(new, "w", packed) as archive:
            warnings.simplefilter("ignore")  # a name that is there twice is meant
            for name, raw in entries:
                archive.writestr(name, raw)

    def load(self, case: Path) -> None:
        source = MetaSource(case)
        LlamaConfig.from_hf(source.hf_config()).context_length  # noqa: B018
        read_all(source)


HOSTILE_PICKLES = (
    b"cos\nsystem\n(X\x04\x00\x00\x00trueltR.",
    b"\x80\x02c__builtin__\neval\n.",
    b"\x80\x04" + b"(" * 99_999,
    b"\x80\x04" + b"]" * 99_999 + b"\x85" * 99_999 + b".",
    b"\x80\x04\x8d" + b"\xff" * 8 + b"x.",
    b"\x80\x04\x8b\xff\xff\xff\x7f1.",
    b"\x80\x02)" + b"q\x00h\x00h\x00\x86" * 9999 + b".",
    b"\x80\x02}" + b"q\x00h\x00s" * 99 + b".",
    b"I" + b"9" * 99_999 + b"\n.",
    b"0" * 99,
    b".",
    b"",
    b"\x80\x02}q\x00(K\x01h\x00u.",
    pickle.dumps([1, {"a": (None, 2.5)}]),
    pickle.dumps({"a": 1}, 0),
)


def mutate_pickle(rng: random.Random, raw: bytes) -> bytes:
    """Change instructions of a pickle, or put another in its place."""
    if rng.random() < 0.1:
        return rng.choice(HOSTILE_PICKLES)
    starts = [place for _, _, place in pickletools.genops(raw) if place is not None]
    spans = list(zip(starts, [*starts[1:], len(raw)], strict=True))
    parts = [raw[start:stop] for start, stop in spans]
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.randrange(len(parts))
        kind = rng.random()
        if kind < 0.35:
            number = rng.choice([*SIZES, *range(9)])
            short = b"J" + struct.pack("<I", number % 2**32)
            long = b"\x8a\x09" + number.to_bytes(9, "little")
            numbers = [i for i, part in enumerate(parts) if part[:1] in b"KMJ\x8a" and part]
            parts[rng.choice(numbers or [place])] = rng.choice([short, long])
        elif kind < 0.5:
            del parts[place]
        elif kind < 0.65:
            parts.insert(place, rng.choice(parts))
        elif kind < 0.8:
            other = rng.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif kind < 0.9:
            parts[place] = rng.choice(
                [b"N", b"\x88", b")", b"}", b"(", b"t", b"2", b"0", b"Q", b"R"]
            )
        else:
            parts[place] = mutate_bytes(rng, parts[place] or b"\0", most=1)
        parts = parts or [b"."]
    return b"".join(parts)
