"""Matrices of GGUF files read packed: what they stand for is what the `gguf` package reads."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter, quants

from puna.checkpoint import gguf_packed
from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.gguf_header import STORAGE
from puna.errors import PresetError

pytestmark = pytest.mark.backend_free

OUT, IN, HEADS = 128, 512, 4
NAMES = {
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj",
}


def blocks_of(kind, rng):
    """Random blocks `[out, bytes]`, with scales that are finite."""
    storage = next(s for s in STORAGE.values() if s.name == kind)
    raw = rng.integers(0, 256, (OUT, IN // storage.block, storage.nbytes), np.uint8)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[kind]
    for at in halves:
        numbers = rng.standard_normal(raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return raw.reshape(OUT, -1)


def source_of(path, kind, raw):
    writer = GGUFWriter(path, "llama")
    writer.add_head_count(HEADS)
    for name in NAMES:
        writer.add_tensor(name, raw, raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFSource(path)


def values(packed):
    """What a packed matrix stands for, in float32, as kernels and backends compute it."""
    numbers = packed.data
    if packed.is_4_bit:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(len(numbers), -1)
    numbers = numbers.astype(np.float32)
    if packed.is_4_bit and packed.low is None:
        numbers -= 8
    scale = np.repeat(packed.scale.astype(np.float32), packed.group, axis=1)
    if packed.low is None:
        return numbers * scale
    return numbers * scale + np.repeat(packed.low.astype(np.float32), packed.group, axis=1)


@pytest.mark.parametrize("kind", gguf_packed.SCHEMES)
def test_nothing_is_lost(tmp_path, kind):
    raw = blocks_of(kind, np.random.default_rng(0))
    source = source_of(tmp_path / "x.gguf", kind, raw)
    assert source.schemes() == dict.fromkeys(NAMES.values(), gguf_packed.SCHEMES[kind])
    packed = source.read_packed("model.layers.0.mlp.up_proj")
    assert packed.shape == (OUT, IN)
    np.testing.assert_array_equal(values(packed), quants.dequantize(raw, Q[kind]))


@pytest.mark.parametrize("kind", gguf_packed.SCHEMES)
def test_rows_of_queries_are_put_back_as_those_of_floats(tmp_path, kind):
    source = source_of(tmp_path / "x.gguf", kind, blocks_of(kind, np.random.default_rng(1)))
    name = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(values(source.read_packed(name)), source.read(f"{name}.weight"))


def test_the_bytes_are_the_files(smollm2_gguf):
    source = GGUFSource(smollm2_gguf)
    packed = [source.read_packed(name) for name in source.schemes()]
    held = sum(array.nbytes for matrix in packed for array in matrix.arrays)
    stored = sum(source.info(f"{name}.weight").nbytes for name in source.schemes())
    assert len(packed) >= 210
    assert held == stored


def test_other_types_are_read_as_floats_alone(tmp_path):
    raw = np.random.default_rng(2).integers(0, 256, (OUT, IN // 256 * 84), np.uint8)
    source = source_of(tmp_path / "x.gguf", "Q2_K", raw)
    assert source.schemes() == {}
    assert set(source.dequantized().values()) == {"Q2_K"}
    with pytest.raises(PresetError, match=r"is Q2_K of shape .* expected a matrix in one of Q8_0"):
        source.read_packed("model.layers.0.mlp.up_proj")
