"""`puna info` of large checkpoints: time, memory, and what it fetches from a Hub.

The files are 2.5 GB and take no room: headers, and holes for the weights.
"""

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from puna.checkpoint.gguf_header import STORAGE
from puna.testing import tiny_tokenizer
from tests import hub_server
from tests.hub_server import HubServer
from tests.processes import ROOT, Finished

pytestmark = pytest.mark.backend_free

# The shape of Llama 3.2 1B, but for the vocabulary, whose tokenizer shall not be fetched for this.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
PARAMETERS = 1_235_814_400

# Runs the program and tells what it took: seconds and bytes.
MEASURE = """
import json, resource, sys
from puna.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
try:
    # Linux counts in maxrss what the process was before it became this program.
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    peak = used.ru_maxrss
loaded = [name for name in ("keras", "jax", "torch", "tensorflow") if name in sys.modules]
print(json.dumps([used.ru_utime + used.ru_stime, peak, loaded]))
"""


def write_sparse_safetensors(path: Path, config: dict) -> None:
    """Valid weights of a model: a header, and a hole of the right size."""
    from puna.cli.conversion import expected_shapes
    from puna.config import LlamaConfig

    header, end = {}, 0
    for name, shape in expected_shapes(LlamaConfig.from_hf(config)).items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 2.5 GB with a small tokenizer."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tiny_tokenizer().save(directory)
    write_sparse_safetensors(directory / "model.safetensors", CONFIG)
    return directory


def info(*arguments, env=None) -> tuple[Finished, list]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "info", *map(str, arguments), "--json"],
        cwd=ROOT,
        env={**(env or os.environ), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    text, _, measured = done.stdout.rstrip().rpartition("\n")
    return Finished(0, text, done.stderr), json.loads(measured)


def test_a_checkpoint_of_two_gigabytes_takes_little_time_and_memory(large):
    done, (seconds, peak, loaded) = info(large)
    found = json.loads(done.out)
    assert found["parameters"] == PARAMETERS
    assert found["files"][0]["name"] == "model.safetensors"
    assert found["memory"]["weights_bytes"] == 2 * PARAMETERS
    assert loaded == []
    assert peak < 300e6
    # Of processor time, since tests run beside each other.
    assert seconds < 1.5


@pytest.fixture
def sent(monkeypatch):
    """How many bytes of each file the Hub sent."""
    counts: Counter[str] = Counter()
    send = hub_server._Handler._send

    def counted(self, status, headers, path, start, end):
        if self.command == "GET":
            counts[path.name] += end - start
        send(self, status, headers, path, start, end)

    monkeypatch.setattr(hub_server._Handler, "_send", counted)
    return counts


@pytest.fixture
def published(tmp_path):
    """What a Hub serves: 48 MB, since the server reads whole files to know their checksums."""
    directory = tmp_path / "published"
    directory.mkdir()
    config = CONFIG | {"vocab_size": 512, "num_hidden_layers": 1, "intermediate_size": 2048}
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save(directory)
    write_sparse_safetensors(directory / "model.safetensors", config)
    return directory


def test_info_fetches_headers_alone(published, sent, tmp_path):
    size = (published / "model.safetensors").stat().st_size
    with HubServer() as hub:
        hub.add("org/large", published)
        env = hub.environment(tmp_path / "home", TMPDIR=str(tmp_path))
        done, (_, _, loaded) = info("hf://org/large", env=env)
    found = json.loads(done.out)
    local = json.loads(info(published)[0].out)
    assert {**found, "preset": ""} == {**local, "preset": ""}
    assert loaded == []
    assert sent["model.safetensors"] > 0
    assert sum(sent.values()) < size / 100
    # Nothing but the small files is kept.
    kept = [
        path for path in tmp_path.rglob("*") if path.is_file() and published not in path.parents
    ]
    assert sum(path.stat().st_size for path in kept) < size / 100


def test_info_of_shards_and_of_a_revision(published, sent, tmp_path):
    weights = published / "model.safetensors"
    raw = weights.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    names = list(header)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        begin = header[part[0]]["data_offsets"][0]
        entries = {
            name: header[name]
            | {"data_offsets": [offset - begin for offset in header[name]["data_offsets"]]}
            for name in part
        }
        head = json.dumps(entries).encode()
        (published / file).write_bytes(struct.pack("<Q", len(head)) + head)
        os.truncate(published / file, 8 + len(head) + entries[part[-1]]["data_offsets"][1])
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    with HubServer() as hub:
        hub.add("org/large", published, revision="v2")
        env = hub.environment(tmp_path / "home")
        found = json.loads(info("hf://org/large@v2", env=env)[0].out)
    assert found["parameters"] == sum(
        (entry["data_offsets"][1] - entry["data_offsets"][0]) // 2 for entry in header.values()
    )
    assert sum(sent.values()) < len(raw) / 100


def write_sparse_gguf(path: Path, layers: int = 1) -> int:
    """A GGUF model with llama3 scaling and a hole for its weights; the bytes of its header."""
    from gguf import GGUFWriter

    tokens = [f"token{i}" for i in range(500)] + ["a", "b", "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(2048)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2048)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(7)
    # Long enough for the header not to fit in what is asked for first.
    writer.add_description("x" * (3 << 19))
    import numpy as np

    from puna.rope import RopeConfig

    plain = RopeConfig(rope_theta=500000.0).inverse_frequencies(64)
    scaled = RopeConfig(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ).inverse_frequencies(64)
    divisors = (plain / scaled).astype(np.float32)
    q8 = STORAGE[8]
    shapes = {"token_embd.weight": (len(tokens), 2048), "output_norm.weight": (2048,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (2048,),
            f"blk.{i}.ffn_norm.weight": (2048,),
            f"blk.{i}.attn_q.weight": (2048, 2048),
            f"blk.{i}.attn_k.weight": (512, 2048),
            f"blk.{i}.attn_v.weight": (512, 2048),
            f"blk.{i}.attn_output.weight": (2048, 2048),
            f"blk.{i}.ffn_gate.weight": (2048, 2048),
            f"blk.{i}.ffn_up.weight": (2048, 2048),
            f"blk.{i}.ffn_down.weight": (2048, 2048),
        }
    from gguf import GGMLQuantizationType

    offset = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), shape[0] * 4)
            offset += shape[0] * 4
        else:
            nbytes = shape[0] * shape[1] // q8.block * q8.nbytes
            stored = (shape[0], shape[1] // q8.block * q8.nbytes)
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
            offset += -(-nbytes // 32) * 32
    writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    head = -(-path.stat().st_size // 32) * 32
    with open(path, "r+b") as file:
        file.seek(head + offset)
        file.write(divisors.tobytes())
        file.write(b"\0" * (-divisors.nbytes % 32))
    return head


@pytest.mark.parametrize("named", [False, True])
def test_info_of_a_gguf_file_fetches_its_header_alone(sent, tmp_path, named):
    directory = tmp_path / "published"
    directory.mkdir()
    head = write_sparse_gguf(directory / "model.Q8_0.gguf", layers=2)
    with HubServer() as hub:
        hub.add("org/large-GGUF", directory)
        env = hub.environment(tmp_path / "home")
        address = "hf://org/large-GGUF" + ("/model.Q8_0.gguf" if named else "")
        done, (_, _, loaded) = info(address, env=env)
    found = json.loads(done.out)
    local = json.loads(info(directory / "model.Q8_0.gguf")[0].out)
    assert {**found, "preset": ""} == {**local, "preset": ""}
    assert found["rope"]["rope_type"] == "llama3"
    assert found["rope"]["factor"] == 32.0
    assert found["stop_tokens"] == [{"id": 7, "token": "token7"}]
    assert loaded == []
    # The vocabulary is part of a GGUF header. Its end is nowhere said: up to as much again goes.
    assert sent["model.Q8_0.gguf"] <= 2 * head


def test_what_is_wrong_is_told_of_the_address(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"torch_dtype": "auto"}))
    (published / "model.safetensors").write_bytes(b"no header" * 99)
    with HubServer() as hub:
        hub.add("org/broken", published)
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "puna", "info", "hf://org/broken"],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("puna: error: hf://org/broken/model.safetensors: its header")


def test_a_hub_that_refuses_is_told_in_one_line(published, tmp_path):
    with HubServer() as hub:
        hub.add("org/large", published, access="gated", tokens=("hf_" + "a" * 34,))
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        for address in ("hf://org/large", "hf://org/none"):
            done = subprocess.run(
                [sys.executable, "-m", "puna", "info", address],
                env=env,
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stdout) == (1, "")
            (line,) = done.stderr.splitlines()
            assert line.startswith("puna: error: ")
