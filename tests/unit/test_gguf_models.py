"""Models from GGUF files, whose quantized matrices stay packed."""

import json
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter, quants
from keras import ops

from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.gguf_header import STORAGE
from puna.checkpoint.gguf_packed import SCHEMES, DequantizedWarning
from puna.checkpoint.names import GGUF
from puna.checkpoint.preset import Preset
from puna.cli.conversion import expected_shapes
from puna.cli.describe import describe
from puna.config import LlamaConfig
from puna.errors import ConfigError, PresetError
from puna.models import CausalLM, Llama3Backbone
from puna.models.load_model import load_model
from puna.quantization.arrays import held_bytes
from puna.quantization.rounding import dequantize
from puna.testing import tiny_model
from tests.processes import result_of
from tests.weights import array, assert_same

CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
METADATA = {
    "block_count": 2, "context_length": 64, "embedding_length": 256, "feed_forward_length": 512,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 64,
    "vocab_size": 48,
}  # fmt: skip
IDS = np.array([[7, 5, 26, 17, 3, 0, 44, 25, 1, 2, 9]], np.int32)
HALVES = {"Q4_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q5_K": (0, 2)}
each_kind = pytest.mark.parametrize("kind", SCHEMES)


def blocks_of(kind, shape, rng):
    """A matrix in a type: rounded by the package where it can, else random blocks like it."""
    if kind not in HALVES:
        return quants.quantize(rng.standard_normal(shape, np.float32) / 16, Q[kind])
    storage = next(s for s in STORAGE.values() if s.name == kind)
    raw = rng.integers(0, 256, (shape[0], shape[1] // storage.block, storage.nbytes), np.uint8)
    for at in HALVES[kind]:
        scales = rng.uniform(0.5, 1, raw.shape[:2]) * (1e-4 if kind == "Q6_K" else 3e-4)
        raw[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path, kind, others=()):
    """A tiny model with matrices of type `kind`, or of `others` where a name holds their key."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, shape in expected_shapes(CONFIG).items():
        theirs, _ = GGUF.inverse.to_ours(name)
        mine = next((other for part, other in dict(others).items() if part in name), kind)
        if len(shape) == 1:
            writer.add_tensor(theirs, np.ones(shape, np.float32))
        elif mine == "F16":
            writer.add_tensor(theirs, rng.standard_normal(shape).astype(np.float16) / 16)
        else:
            writer.add_tensor(theirs, blocks_of(mine, shape, rng), raw_dtype=Q[mine])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, **arguments):
    return CausalLM.from_preset(path, preprocessor=None, **arguments)


def logits(model, ids=IDS):
    return ops.convert_to_numpy(ops.cast(model(ids), "float32"))


def assert_same_steps(model, other, ids, *, atol, **options):
    """Token by token through the cache: the same best ones, as likely."""
    options |= {"sampler": "greedy", "stop_token_ids": None, "logprobs": 5}
    ours, theirs = (m.generate(ids, **options) for m in (model, other))
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    for one, two in zip(ours.logprobs, theirs.logprobs, strict=True):
        found, want = ([logprob for _, logprob in token.top] for token in (one, two))
        np.testing.assert_allclose(found, want, atol=atol, rtol=0)


def values(layer):
    """What a layer's packed matrix stands for."""
    packed = layer.matrix()
    numbers = layer.weight if layer.weight_packed is None else layer.weight_packed
    low = None if layer.weight_low is None else array(layer.weight_low)
    return dequantize(
        packed._replace(data=array(numbers), scale=array(layer.weight_scale), low=low)
    )


@pytest.fixture(scope="module", params=SCHEMES)
def file(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf", request.param)


def test_a_model_is_held_as_the_file_has_it(file):
    model, source = load(file), GGUFSource(file)
    assert len(model.quantization()) == len(source.schemes()) == 2 + 7 * 2
    assert set(model.quantization().values()) == {SCHEMES[file.stem]}
    assert model.dtype_policy.name == "float32"
    for name, layer in model.matrices().items():
        want = source.read(f"{name}.weight")
        np.testing.assert_array_equal(values(layer).view(np.uint32), want.view(np.uint32))


def test_logits_are_those_of_the_dequantized_model(file):
    packed, plain = load(file), load(file, quantization="none")
    assert plain.quantization() == {}
    want = logits(plain)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(logits(packed), want, atol=1e-4, rtol=0)
    assert_same_steps(packed, plain, IDS[0], atol=1e-4, max_new_tokens=8)


def test_bfloat16_leaves_the_matrices_as_they_are(file):
    wide, half = load(file), load(file, dtype="bfloat16")
    assert half.compute_dtype == "bfloat16"
    assert half.quantization() == wide.quantization()
    for name, layer in half.matrices().items():
        np.testing.assert_array_equal(values(layer), values(wide.matrices()[name]))
    np.testing.assert_allclose(logits(half), logits(wide), atol=0.05 * np.abs(logits(wide)).max())


def test_without_weights_the_form_is_the_same(file):
    model = load(file, load_weights=False)
    assert model.quantization() == load(file).quantization()
    assert np.isfinite(logits(model)).all()


def test_a_backbone_alone_leaves_the_head(file):
    assert_same(Llama3Backbone.from_preset(file), load(file).backbone)


def test_keras_saves_it(file, tmp_path):
    model = load(file)
    model.save(tmp_path / "x.keras")
    assert_same(load_model(tmp_path / "x.keras"), model)


def test_a_preset_is_written_of_what_the_format_can_store(file, tmp_path):
    model, directory = load(file), tmp_path / "saved"
    if SCHEMES[file.stem].free_minima:
        with pytest.raises(PresetError, match=r'minima that .* quantization="none"'):
            model.save_to_preset(directory)
        assert list(tmp_path.iterdir()) == []
        return
    model.save_to_preset(directory)
    again = load(directory)
    assert_same(again, model)
    assert again.quantization() == model.quantization()


def test_what_is_packed_can_be_quantized_otherwise(file):
    model = load(file, quantization="int8")
    assert {scheme.group_size for scheme in model.quantization().values()} == {None}


def test_info_tells_the_bytes_that_are_held(file):
    shapes = expected_shapes(CONFIG).values()
    held = [held_bytes(s, SCHEMES[file.stem]) if len(s) == 2 else 4 * s[0] for s in shapes]
    assert describe(Preset(file), None, (), None)["memory"]["weights_bytes"] == sum(held)
    assert sum(array(variable).nbytes for variable in load(file).tensors().values()) == sum(held)


def test_an_adapter_needs_floats(file, tmp_path):
    lora = adapter(tmp_path)
    with pytest.raises(ConfigError, match=r'adapter .* quantization="none"'):
        load(file, adapter=lora)
    merged, plain = (load(file, quantization="none", **a) for a in ({"adapter": lora}, {}))
    assert merged.quantization() == {}
    assert np.abs(logits(merged) - logits(plain)).max() > 1e-3


def adapter(directory):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    factors = {"lora_A": (4, 256), "lora_B": (512, 4)}
    tensors = {
        f"base_model.model.model.layers.{i}.mlp.up_proj.{part}.weight": rng.standard_normal(
            shape, np.float32
        )
        for i in range(2)
        for part, shape in factors.items()
    }
    (directory / "lora").mkdir()
    save_file(tensors, directory / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (directory / "lora" / "adapter_config.json").write_text(json.dumps(config))
    return directory / "lora"


def test_a_file_of_several_types(tmp_path):
    """As llama.cpp mixes them: some in more bits, some in halves, some that only floats hold."""
    kinds = {"v_proj": "Q6_K", "lm_head": "Q8_0", "down_proj": "Q2_K", "o_proj": "F16"}
    path = write(tmp_path / "mixed.gguf", "Q4_K", {**kinds, "layers.0.mlp.up": "Q5_K"})
    with pytest.warns(DequantizedWarning, match=r"3 matrices .* \(2 in Q2_K, 1 in Q5_K\)"):
        packed = load(path)
    assert Counter(packed.quantization().values()) == {
        SCHEMES["Q4_K"]: 8, SCHEMES["Q6_K"]: 2, SCHEMES["Q8_0"]: 1,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = load(path, quantization="none")
    np.testing.assert_allclose(logits(packed), logits(plain), atol=1e-4, rtol=0)


def test_a_file_of_floats_is_loaded_as_ever(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(write(tmp_path / "half.gguf", "F16"))
    assert model.quantization() == {}
    assert model.dtype_policy.name == "float16"


# Other quantized checkpoints


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_compressed_tensors_are_dequantized_too(tmp_path, mode, symmetric):
    model = tiny_model(hidden_size=64, intermediate_size=96)
    model.quantize(mode, symmetric=symmetric, overrides={"o_proj": None})
    model.save_to_preset(tmp_path)
    plain = CausalLM.from_preset(tmp_path, quantization="none")
    assert plain.quantization() == {}
    for name, layer in model.matrices().items():
        want = array(layer.weight) if layer.scheme is None else values(layer)
        np.testing.assert_array_equal(array(plain.matrices()[name].weight), want)
    np.testing.assert_allclose(logits(plain), logits(model), atol=1e-4, rtol=0)
    assert all(layer.weight.trainable for layer in plain.matrices().values())


def test_none_leaves_floats_as_they_are(tmp_path):
    model = tiny_model()
    model.save_to_preset(tmp_path)
    assert_same(CausalLM.from_preset(tmp_path, quantization="none"), model)


# The real file


@pytest.fixture(scope="module")
def real(smollm2_gguf):
    return CausalLM.from_preset(smollm2_gguf)


@pytest.mark.slow
def test_the_real_model_takes_what_its_file_takes(real, smollm2_gguf):
    source = GGUFSource(smollm2_gguf)
    stored = sum(source.info(name).nbytes for name in source.names())
    assert sum(array(variable).nbytes for variable in real.tensors().values()) <= 1.05 * stored
    assert len(real.quantization()) == 1 + 7 * 30


@pytest.mark.slow
def test_the_real_model_computes_as_the_dequantized(real, smollm2_gguf):
    plain = CausalLM.from_preset(smollm2_gguf, quantization="none")
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, " * 8]
    for prompt in prompts:
        ids = real.tokenizer(prompt)[None]
        np.testing.assert_allclose(logits(real, ids), logits(plain, ids), atol=1e-3, rtol=0)
        assert_same_steps(real, plain, ids[0], atol=1e-3, max_new_tokens=16)


MEMORY = """
import json, sys
from pathlib import Path
import keras
import puna.models

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

keras.ops.convert_to_numpy(keras.ops.zeros(1) + 1)  # the backend is up
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = puna.models.CausalLM.from_preset(sys.argv[1])
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is what Linux tells")
def test_loading_takes_little_more_than_the_file(smollm2_gguf):
    assert result_of(MEMORY, str(smollm2_gguf)) <= 1.3 * smollm2_gguf.stat().st_size + 50e6
