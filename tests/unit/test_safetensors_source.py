"""Safetensors read and written by us, against the official library and torch."""

import hashlib
import json
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.checkpoint.safetensors import (
    DTYPES,
    SafetensorsSource,
    TensorSpec,
    plan_shards,
    write_safetensors,
    write_sharded,
)
from puna.errors import PresetError

QUICK = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def spec(name, array):
    return (name, array.shape, array.dtype, lambda: array)


def sample(rng, dtype, shape):
    """Any bytes at all, NaNs too."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, nbytes, np.uint8).view(dtype).reshape(shape)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def raw_file(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TORCH = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def test_reads_what_torch_writes_in_every_dtype(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 4).to(dtype) for dtype in TORCH}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = SafetensorsSource(tmp_path)
    assert set(source.names()) == set(tensors)
    assert source.metadata == {"format": "pt"}
    for dtype, word in TORCH.items():
        info, array = source.info(str(dtype)), source.read(str(dtype))
        want = tensors[str(dtype)]
        assert info.stored == word
        assert info.dtype == array.dtype == DTYPES[word]
        assert info.shape == array.shape == (3, 5)
        assert info.nbytes == array.nbytes
        assert array.tobytes() == want.view(torch.uint8).numpy().tobytes()


def test_official_readers_read_what_we_write_in_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {word: sample(rng, dtype, (7, 3)) for word, dtype in DTYPES.items()}
    arrays["scalar"] = np.float32(3.5).reshape(())
    arrays["empty"] = np.zeros((0, 4), np.float16)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [spec(name, array) for name, array in arrays.items()])
    read = SafetensorsSource(path)
    for name, array in arrays.items():
        assert same(read.read(name), array)
    loaded = safetensors.torch.load_file(path)
    for word in [*TORCH.values(), "scalar", "empty"]:
        want = np.atleast_1d(arrays[word]).tobytes()
        assert loaded[word].contiguous().view(-1).view(torch.uint8).numpy().tobytes() == want
    with safetensors.safe_open(path, "np") as official:
        assert official.metadata() == {"format": "pt"}
        assert set(official.keys()) == set(arrays)


def test_views_are_zero_copy_writable_and_never_reach_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    array = np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)
    write_safetensors(path, [spec("a", array), spec("b", array.astype(ml_dtypes.bfloat16))])
    before = hashlib.sha256(path.read_bytes()).digest()
    source = SafetensorsSource(path)
    view = source.read("a")
    assert view.base is not None
    assert np.shares_memory(view, source.read("a"))
    torch.from_numpy(view).mul_(2)
    source.read("b").view(np.uint16)[:] = 0
    assert same(view, array * 2)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    source.release("a")  # drops the private pages; the edges of the span may keep theirs
    assert np.array_equal(view[32], array[32])
    source.close()
    assert np.array_equal(view[33], array[33])
    with pytest.raises(PresetError, match="was closed"):
        source.read("a")
    source.release("a")
    source.close()


def test_our_file_may_be_replaced_while_it_is_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    array = np.full((256, 64), 7, np.float32)
    write_safetensors(path, [spec("a", array)])
    source = SafetensorsSource(path)
    view = source.read("a")
    write_safetensors(path, [("a", view.shape, view.dtype, lambda: source.read("a") * 2)])
    assert np.array_equal(view, array)
    assert np.array_equal(SafetensorsSource(path).read("a"), array * 2)


def test_misaligned_tensors_are_copied(tmp_path):
    header = json.dumps({"a": tensor("F32", (2,), (0, 8))}).encode()
    header += b" " * (-(8 + len(header)) % 4 + 1)
    path = raw_file(tmp_path / "x.safetensors", header, np.array([1, 2], np.float32).tobytes())
    array = SafetensorsSource(path).read("a")
    assert array.flags.aligned
    assert array.tolist() == [1, 2]


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
specs = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=12)


@QUICK
@given(specs=specs, seed=st.integers(0, 9))
def test_round_trip_order_alignment_and_bytes(tmp_path, specs, seed):
    rng = np.random.default_rng(seed)
    arrays = {f"t{i}é": sample(rng, DTYPES[word], shape) for i, (word, shape) in enumerate(specs)}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [spec(name, array) for name, array in arrays.items()])
    first = path.read_bytes()
    write_safetensors(path, [spec(name, array) for name, array in arrays.items()])
    assert path.read_bytes() == first
    safetensors.safe_open(path, "np")
    source = SafetensorsSource(path)
    assert set(source.names()) == set(arrays)
    (length,) = struct.unpack_from("<Q", first)
    assert (8 + length) % 64 == 0
    header = json.loads(first[8 : 8 + length])
    for name, array in arrays.items():
        assert same(source.read(name), array)
        start = 8 + length + header[name]["data_offsets"][0]
        # At least as aligned as it is long, up to 64.
        assert start % min(64, array.nbytes & -array.nbytes or 64) == 0
    whole = [array.nbytes % 64 == 0 for array in arrays.values()]
    starts = [(8 + length + header[n]["data_offsets"][0]) % 64 == 0 for n in arrays]
    assert all(start for start, multiple in zip(starts, whole, strict=True) if multiple)


entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", 3, None]),
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**63, 1.5, True]), max_size=3)
        | st.none(),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | st.just("0"),
    }
)


@QUICK
@given(
    header=st.dictionaries(st.text(max_size=3), entry | st.integers() | st.none(), max_size=3),
    data=st.integers(0, 40),
)
def test_random_headers_load_as_the_official_ones_do_or_raise(tmp_path, header, data):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(data))
    _agree(path)


@QUICK
@given(data=st.data())
def test_damaged_files_never_crash(tmp_path, data):
    good = tmp_path / "good.safetensors"
    array = np.arange(20, dtype=np.float32)
    write_safetensors(good, [spec("a", array), spec("b", array.astype(np.float16))])
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)) | st.just(len(raw)))]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    _agree(path)


def _agree(path):
    """What we open, the official reader opens, with the same bytes; else PresetError."""
    try:
        source = SafetensorsSource(path)
    except PresetError:
        return
    official = dict(safetensors.deserialize(path.read_bytes()))
    assert set(official) == set(source.names())
    for name in source.names():
        assert source.read(name).tobytes() == bytes(official[name]["data"])


two = {"a": tensor(offsets=(0, 8)), "b": tensor(offsets=(8, 16))}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", 0, 2**40, "header claims 1099511627776 bytes"),
        (b"[]", 0, None, "begins with b'\\[\\]'"),
        (b"{", 0, None, "not valid JSON"),
        (b"{\xff}", 0, None, "not valid JSON"),
        (b'{"a":' * 10000, 0, None, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, None, "not valid JSON"),
        (b'{"a":1,"a":1}', 0, None, "the key 'a' is there twice"),
        ({"a": 1}, 0, None, "entry of 'a' is 1"),
        ({"a": tensor("F4")}, 8, None, "dtype 'F4'"),
        ({"a": tensor(shape=(-2,))}, 8, None, "shape \\[-2\\]"),
        ({"a": tensor(shape=(True, 2))}, 8, None, "shape \\[True, 2\\]"),
        ({"a": tensor(shape=(1,) * 65)}, 8, None, "at most 64 integers"),
        ({"a": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0, None, "larger than any memory"),
        ({"a": tensor(shape=(3,))}, 8, None, "takes 12 bytes.*span 8"),
        ({"a": tensor(offsets=(8, 0))}, 8, None, "span -8"),
        ({"a": tensor(offsets=(0,))}, 8, None, "data_offsets \\[0\\]"),
        (two | {"b": tensor(offsets=(4, 12))}, 12, None, "overlaps the one before"),
        (two | {"b": tensor(offsets=(12, 20))}, 20, None, "leaves a hole"),
        (two, 17, None, "tensors end at byte"),
        (two, 15, None, "tensors end at byte"),
        ({"__metadata__": {"a": 1}}, 0, None, "not an object of strings"),
    ],
)
def test_malformed_files_say_what_is_off(tmp_path, header, data, length, message):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(data), length)
    with pytest.raises(PresetError, match=message) as caught:
        SafetensorsSource(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(PresetError, match="cannot be read"):
        SafetensorsSource(tmp_path / "none.safetensors")
    with pytest.raises(PresetError, match="found none"):
        SafetensorsSource(tmp_path)
    with pytest.raises(PresetError, match="at least one"):
        SafetensorsSource([])
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(PresetError, match="is empty"):
        SafetensorsSource(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(PresetError, match="it has 3 bytes"):
        SafetensorsSource(tmp_path)
    write_safetensors(tmp_path / "x.safetensors", [])
    with pytest.raises(PresetError, match="no tensor 'a'"):
        SafetensorsSource(tmp_path).read("a")
    write_safetensors(tmp_path / "y.safetensors", [])
    with pytest.raises(PresetError, match=r"2 files .* and no index"):
        SafetensorsSource(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"model.layers.{i}.w": sample(rng, np.float32, (16, 16)) for i in range(6)}
    files = write_sharded(tmp_path, [spec(n, a) for n, a in arrays.items()], 2500)
    return tmp_path, arrays, files


def test_shards_have_the_names_and_index_of_transformers(sharded):
    directory, arrays, files = sharded
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    assert sorted(p.name for p in directory.iterdir()) == sorted(f.name for f in files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_parameters": 6 * 256, "total_size": 6 * 1024}
    assert list(index["weight_map"]) == sorted(arrays)
    for place in (directory, files[-1], files[:-1]):
        source = SafetensorsSource(place)
        assert all(same(source.read(name), array) for name, array in arrays.items())
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(directory / file)


def test_one_shard_is_one_file_and_the_old_shards_go(sharded):
    directory, arrays, _ = sharded
    keep = directory / "adapter_model.safetensors"
    write_safetensors(keep, [])
    source = SafetensorsSource(directory)
    specs = [(n, a.shape, a.dtype, lambda n=n: source.read(n)) for n, a in arrays.items()]
    assert write_sharded(directory, specs) == [directory / "model.safetensors"]
    assert {p.name for p in directory.iterdir()} == {"model.safetensors", keep.name}
    assert same(SafetensorsSource(directory).read("model.layers.5.w"), arrays["model.layers.5.w"])


@pytest.mark.slow  # importing transformers takes seconds
def test_transformers_opens_our_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    write_sharded(tmp_path, [spec(n, a) for n, a in state.items()], 8000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(np.array_equal(v.numpy(), state[n]) for n, v in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../x.safetensors", "inside the index's directory"),
        ("/etc/passwd", "inside the index's directory"),
        ("C:\\x", "inside the index's directory"),
        ("a\\..\\..\\x", "inside the index's directory"),
        ("", "inside the index's directory"),
        (7, "inside the index's directory"),
        ("gone.safetensors", "1 of 4 shards are missing: gone.safetensors"),
        ("model-00003-of-00003.safetensors", "should be in model-00003.* is model-00001"),
    ],
)
def test_an_index_is_not_trusted(sharded, file, message):
    directory, _, files = sharded
    index = json.loads(files[-1].read_text())
    index["weight_map"]["model.layers.0.w"] = file
    files[-1].write_text(json.dumps(index))
    with pytest.raises(PresetError, match=message):
        SafetensorsSource(directory)


def test_index_and_shards_must_agree(sharded):
    directory, arrays, files = sharded
    index = json.loads(files[-1].read_text())
    index["weight_map"]["extra"] = files[0].name
    files[-1].write_text(json.dumps(index))
    with pytest.raises(PresetError, match=r"'extra' should be in .* and is nowhere"):
        SafetensorsSource(directory)
    files[-1].write_text('{"weight_map": {}}')
    with pytest.raises(PresetError, match="non-empty object 'weight_map'"):
        SafetensorsSource(directory)
    files[-1].write_text('{"a": 1, "a": 2}')
    with pytest.raises(PresetError, match="'a' is there twice"):
        SafetensorsSource(directory)
    write_safetensors(files[1], [spec(n, arrays[n]) for n in list(arrays)[:3]])
    with pytest.raises(PresetError, match="is also in"):
        SafetensorsSource(files[:-1])


def test_links_out_of_the_directory_are_read_as_a_hub_cache_has_them(sharded, tmp_path_factory):
    _, arrays, files = sharded
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in files:
        (snapshot / file.name).symlink_to(file)
    source = SafetensorsSource(snapshot)
    assert set(source.names()) == set(arrays)


def test_the_writer_refuses_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.safetensors"
    array = np.zeros((2, 3), np.float32)
    write_safetensors(path, [spec("a", array)])
    before = path.read_bytes()

    def broken():
        raise RuntimeError("disk on fire")

    for tensors, message in [
        ([spec("a", array), spec("a", array)], "the name is taken"),
        ([spec("__metadata__", array)], "the name is taken"),
        ([("a", (2, 3), "datetime64[s]", lambda: array)], "no word for"),
        ([("a", (3, 2), np.float32, lambda: array)], r"came as float32 \(2, 3\), announced"),
        ([("a", (2, 3), np.float16, lambda: array)], "came as float32"),
        ([("a", (2, 3), np.float32, broken)], "disk on fire"),
    ]:
        for write in (write_safetensors, lambda _, t: write_sharded(tmp_path, t)):
            with pytest.raises((PresetError, RuntimeError), match=message):
                write(path, tensors)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_written_one_at_a_time(tmp_path):
    alive = []

    def make(i):
        def data():
            alive[:] = [ref for ref in alive if ref() is not None]
            assert len(alive) <= 1
            array = np.full(100, i, np.int64)
            alive.append(weakref.ref(array))
            return array

        return data

    write_safetensors(tmp_path / "x", [(f"t{i}", (100,), "int64", make(i)) for i in range(8)])


def test_plan_shards_keeps_order_and_isolates_the_large():
    def one(name, n):
        return TensorSpec(name, (n,), "uint8", lambda: np.zeros(n, np.uint8))

    shards = plan_shards([one("a", 4), one("b", 4), one("c", 99), one("d", 10)], 10)
    assert [[s.name for s in shard] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert plan_shards([], 10) == [[]]
