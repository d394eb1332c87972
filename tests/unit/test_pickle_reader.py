"""torch's files are read without torch, and their pickles run nothing."""

import collections
import functools
import io
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from puna.checkpoint import torch_file
from puna.checkpoint.pickle_reader import read_state_dict
from puna.checkpoint.torch_file import TorchFile
from puna.errors import PresetError

pytestmark = pytest.mark.backend_free


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def opened(path, value):
    return TorchFile(saved(path / "x.pth", value))


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def archive(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, raw in files.items():
            out.writestr(name, raw)
    return path


def with_pickle(path, pickled):
    """A file as torch's with another pickle."""
    files = entries(saved(path, {"a": torch.zeros(4)}))
    return archive(path, files | {next(n for n in files if n.endswith("data.pkl")): pickled})


DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.int64: np.int64,
    torch.int8: np.int8,
    torch.bool: np.bool_,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    file = opened(tmp_path, {"a": tensor})
    assert file.info("a").dtype == DTYPES[dtype]
    assert file.info("a").shape == (2, 3)
    assert file.read("a").tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_strides_offsets_and_shared_storages_are_honoured(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "all": base,
        "turned": base.T,
        "row": base[2],
        "column": base[:, 3],
        "cut": base[1:, 2:4],
    }
    file = opened(tmp_path, tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor.numpy())
    assert file.is_same("all", "all")
    assert not file.is_same("all", "row")


def test_tensors_are_views_of_the_file(tmp_path):
    file = opened(tmp_path, {"a": torch.arange(1000.0)})
    first, again = file.read("a"), file.read("a")
    assert np.shares_memory(first, again)
    file.release("a")
    np.testing.assert_array_equal(again, np.arange(1000, dtype="float32"))
    file.close()
    with pytest.raises(PresetError, match="was closed"):
        file.read("a")


def test_state_dicts_parameters_scalars_and_empty_tensors_are_read(tmp_path):
    module = torch.nn.Linear(3, 2)
    file = TorchFile(saved(tmp_path / "module.pth", module.state_dict()))
    np.testing.assert_array_equal(file.read("weight"), module.weight.detach().numpy())
    file = opened(
        tmp_path,
        collections.OrderedDict(
            a=torch.nn.Parameter(torch.ones(2)), b=torch.tensor(3.5), c=torch.empty(0, 7)
        ),
    )
    assert list(file.names()) == ["a", "b", "c"]
    assert file.read("b") == 3.5
    assert file.read("c").shape == (0, 7)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_writes_is_read(tmp_path, protocol):
    file = TorchFile(saved(tmp_path / "x", {"a": torch.ones(3)}, pickle_protocol=protocol))
    np.testing.assert_array_equal(file.read("a"), np.ones(3))


def test_the_format_of_before_torch_1_6_is_refused_with_advice(tmp_path):
    path = saved(tmp_path / "old.pth", {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(PresetError, match=r"before PyTorch 1\.6.*torch\.save"):
        TorchFile(path)


# Hostile pickles. Each would write a file if it ran.


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "system": lambda proof: Calls(os.system, f"touch {proof}"),
    "eval": lambda proof: Calls(eval, f"open({str(proof)!r}, 'w')"),
    "exec": lambda proof: Calls(exec, f"open({str(proof)!r}, 'w')"),
    "open": lambda proof: Calls(open, str(proof), "w"),
    "getattr": lambda proof: Calls(getattr, str(proof), "title"),
    "partial": lambda proof: Calls(functools.partial, os.system, f"touch {proof}"),
    "torch load": lambda proof: Calls(torch.load, str(proof)),
    "numpy": lambda proof: np.zeros(3),
    "path": lambda proof: Path(proof),
    "ordered dict with items": lambda proof: Calls(collections.OrderedDict, [("a", 1)]),
    "set": lambda proof: {1, 2},
    "bytes": lambda proof: b"bytes",
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_is_refused(tmp_path, name, protocol):
    proof = tmp_path / "proof"
    pickled = pickle.dumps({"a": HOSTILE[name](proof)}, protocol)
    with pytest.raises(PresetError):
        TorchFile(with_pickle(tmp_path / "x.pth", pickled))
    assert not proof.exists()


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"c__builtin__\neval\n.", "__builtin__.eval"),
        (b"ctorch._utils\n_rebuild_qtensor\n.", "_rebuild_qtensor"),
        (b"ctorch.hub\nload\n.", "torch.hub.load"),
    ],
)
def test_the_name_that_is_refused_is_said(tmp_path, pickled, named):
    with pytest.raises(PresetError, match=named):
        TorchFile(with_pickle(tmp_path / "x.pth", pickled))


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"N.",
        b"(",
        b"}(.",
        b"}",
        b"t.",
        b"\x85.",
        b"h\x01.",
        b"]r\xff\xff\xff\x7f.",  # a memo at 2**31, which CPython's unpickler makes room for
        b"}\x8c\x01aNs\x8c\x01aNs.",  # a key twice
        b"}))s.",  # a tuple as a key
        b"(i__builtin__\neval\n.",
        b"\x82\x01.",
        b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
        b"\x8b" + struct.pack("<i", 1 << 30) + b".",
        b"X" + struct.pack("<I", 1 << 31) + b".",
        b"NR.",
        b"NQ.",
        b"NNb.",
    ],
)
def test_a_malformed_pickle_is_refused(tmp_path, pickled):
    with pytest.raises(PresetError):
        TorchFile(with_pickle(tmp_path / "x.pth", pickled))


def test_a_pickle_that_doubles_itself_is_refused_at_once():
    # Sixty doublings of a tuple: to hash or print it would take forever.
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    for end in (b"NR.", b"Q.", b"."):
        with pytest.raises(PresetError):
            read_state_dict(b"\x80\x02)" + doubled + end, Path("x"))


# Tensors and archives that lie.


def tensor_pickle(numel=4, offset=0, shape=(4,), strides=(1,), key="0", storage="FloatStorage"):
    """The pickle of {"a": tensor}, each number as asked for."""

    def tuple_of(numbers):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in numbers) + b"t"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    return b"".join(
        [
            b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n((",
            text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key) + text("cpu"),
            b"\x8a\x08" + struct.pack("<q", numel) + b"tQ",
            b"\x8a\x08" + struct.pack("<q", offset) + tuple_of(shape) + tuple_of(strides),
            b"\x89}tRs.",
        ]
    )


def test_the_pickle_of_these_tests_is_read(tmp_path):
    file = TorchFile(with_pickle(tmp_path / "x.pth", tensor_pickle()))
    np.testing.assert_array_equal(file.read("a"), np.zeros(4))


@pytest.mark.parametrize(
    "lie",
    [
        {"numel": 5},
        {"numel": 1 << 60},
        {"numel": -1},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 62},
        {"shape": (5,)},
        {"shape": (1 << 62,)},
        {"shape": (-1,)},
        {"strides": (2,)},
        {"strides": (-1,)},
        {"shape": (1 << 40,), "strides": (0,)},
        {"shape": (2, 2)},
        {"shape": (0, 1 << 62, 1 << 62), "strides": (1, 1, 1)},
        {"shape": (1,) * 65, "strides": (1,) * 65},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"storage": "DoubleStorage"},
        {"storage": "BFloat16Storage"},
    ],
    ids=str,
)
def test_a_tensor_that_its_storage_cannot_hold_is_refused(tmp_path, lie):
    with pytest.raises(PresetError):
        TorchFile(with_pickle(tmp_path / "x.pth", tensor_pickle(**lie)))


def test_a_dict_of_other_things_is_refused_with_advice(tmp_path):
    for value in (
        [torch.ones(2)],
        {"model": {"a": torch.ones(2)}},
        {"a": 1},
        {},
        {1: torch.ones(2)},
    ):
        with pytest.raises(PresetError, match="state_dict"):
            opened(tmp_path, value)


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    files = entries(saved(tmp_path / "x.pth", {"a": torch.zeros(4)}))
    with pytest.raises(PresetError, match="compressed"):
        TorchFile(archive(tmp_path / "c.pth", files, zipfile.ZIP_DEFLATED))
    with pytest.raises(PresetError, match="byte order"):
        TorchFile(archive(tmp_path / "b.pth", files | {"x/byteorder": b"big"}))
    with pytest.raises(PresetError, match=r"no data\.pkl"):
        TorchFile(archive(tmp_path / "n.pth", {"x/data/0": b"0000"}))
    with pytest.raises(PresetError, match="twice"):
        TorchFile(archive(tmp_path / "t.pth", {**files, "y/data/0": files["x/data/0"]}))
    pickled = b"N" * (torch_file.MAX_PICKLE + 1)
    with pytest.raises(PresetError, match="at most"):
        TorchFile(with_pickle(tmp_path / "l.pth", pickled))


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 100, b"hello there"])
def test_what_is_no_archive_is_refused(tmp_path, raw):
    (tmp_path / "x.pth").write_bytes(raw)
    with pytest.raises(PresetError):
        TorchFile(tmp_path / "x.pth")


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    raw = saved(tmp_path / "x.pth", {"a": torch.arange(4.0)}).read_bytes()
    for length in range(0, len(raw), 7):
        (tmp_path / "x.pth").write_bytes(raw[:length])
        with pytest.raises(PresetError):
            TorchFile(tmp_path / "x.pth")


def test_a_mutated_file_is_refused_or_read(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16).T}, buffer)
    numbers = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(500):
        raw = bytearray(buffer.getvalue())
        for _ in range(numbers.randint(1, 4)):
            raw[numbers.randrange(len(raw))] = numbers.randrange(256)
        (tmp_path / "x.pth").write_bytes(raw)
        try:
            file = TorchFile(tmp_path / "x.pth")
        except PresetError:
            outcomes["refused"] += 1
        else:
            assert all(file.read(name).size <= 100 for name in file.names())
            outcomes["read"] += 1
    assert min(outcomes.values()) > 50
