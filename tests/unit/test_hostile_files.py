"""Files that are made to harm, by hand; `tests/fuzz` makes thousands more."""

import base64
import errno
import json
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest

from puna.checkpoint.preset import Preset
from puna.checkpoint.safetensors import INDEX, SINGLE, SafetensorsSource, write_sharded
from puna.config import LlamaConfig
from puna.errors import ConfigError, PresetError, TemplateError, TokenizerError
from puna.models import CausalLM
from puna.testing import tiny_model, write_tiny_preset
from puna.text.template import render
from puna.text.tokenizer import Tokenizer
from tests.tiny_tokenizers import byte_level, sentencepiece_metadata

pytestmark = pytest.mark.backend_free


@pytest.fixture
def preset(tmp_path):
    return write_tiny_preset(tmp_path / "preset")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_line(error):
    message = str(error.value)
    assert message.strip()
    assert "\n" not in message
    return message


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# Files that do not belong together


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(preset):
    tokenizer = json.loads((preset / "tokenizer.json").read_text())
    more = dict(tokenizer["added_tokens"][-1], id=5000, content="<|more|>")
    tokenizer["added_tokens"].append(more)
    tokenizer["model"]["vocab"]["<|more|>"] = 5000
    (preset / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="tokens and the model") as error:
        CausalLM.from_preset(preset)
    assert str(preset) in one_line(error)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"]
)
def test_sizes_beyond_the_weights_are_refused_before_a_model_is_built(preset, name):
    change(preset / "config.json", **{name: 2**30})
    start = time.perf_counter()
    with pytest.raises(PresetError, match=name) as error:
        CausalLM.from_preset(preset)
    one_line(error)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("value", [10**18, float("nan"), float("inf"), "8", [8], True, -1])
def test_sizes_that_are_none_are_refused(preset, value):
    change(preset / "config.json", hidden_size=value)
    with pytest.raises(ConfigError, match="hidden_size") as error:
        LlamaConfig.from_hf(Preset(preset).config)
    one_line(error)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "rope_theta": 1},
        {"rope_type": "yarn", "factor": 9, "mscale": 1, "mscale_all_dim": -4.5},
        {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "dynamic", "factor": 1e308},
        ["linear"],
    ],
    ids=str,
)
def test_rotary_settings_that_compute_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match="RoPE") as error:
        LlamaConfig.from_hf({"rope_scaling": settings})
    one_line(error)


def test_weights_that_are_all_nan_are_read_as_they_are(tmp_path):
    """They are numbers that a file may hold: nothing fails on the way, and none is hidden."""
    array = np.full((8, 4), np.nan, np.float32)
    write_sharded(tmp_path, [("a", array.shape, array.dtype, lambda: array)])
    assert np.isnan(SafetensorsSource(tmp_path).read("a")).all()


def test_scores_that_are_all_nan_make_a_tokenizer_that_still_tokenizes():
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.scores"] = [float("nan")] * len(metadata["tokenizer.ggml.tokens"])
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.detokenize(tokenizer("ab c")) == "ab c"


# Names and links


@pytest.fixture
def shards(tmp_path):
    array = np.arange(32, dtype=np.float32)
    write_sharded(tmp_path / "model", [(n, (32,), array.dtype, lambda: array) for n in "ab"], 128)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "a\0", "", "..", 7]
)
def test_an_index_that_points_outside_is_refused(shards, name):
    shutil.copy(shards / "model-00001-of-00002.safetensors", shards.parent / "x.safetensors")
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["a"] = name
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(PresetError, match="inside") as error:
        SafetensorsSource(shards)
    assert "'a'" in one_line(error)


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "a\nb"])
def test_an_index_with_an_impossible_name_is_refused(shards, name):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["a"] = name
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(PresetError, match="missing") as error:
        SafetensorsSource(shards)
    one_line(error)


def test_links_of_the_hubs_cache_are_followed(shards):
    """There every file is a link to ../../blobs, so a link is not what makes a file hostile."""
    blobs = shards.parent / "blobs"
    blobs.mkdir()
    for file in list(shards.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert SafetensorsSource(shards).read("b").sum() == 496


@pytest.mark.parametrize("target", ["itself", "/dev/zero", "nowhere", "."])
def test_links_to_what_is_no_file_are_refused(shards, target):
    shard = shards / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name if target == "itself" else target)
    with pytest.raises(PresetError, match="missing") as error:
        SafetensorsSource(shards)
    one_line(error)


def test_a_name_in_two_shards_is_refused(shards):
    first, second = sorted(shards.glob("*.safetensors"))
    with pytest.raises(PresetError, match="once") as error:
        SafetensorsSource([first, shutil.copy(first, second)])
    one_line(error)


def test_metadata_that_is_not_utf8_is_refused(shards):
    for path in (shards / INDEX, *shards.glob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"total", b"t\xfftal").replace(b"format", b"f\xffrmat"))
        with pytest.raises(PresetError, match=r"not valid JSON.*utf-8") as error:
            SafetensorsSource(path)
        one_line(error)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_that_is_not_utf8_is_refused(tmp_path, name):
    byte_level().save(tmp_path)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:20] + b"\xff\xfe" + raw[20:])
    with pytest.raises(TokenizerError, match=name) as error:
        Tokenizer.from_directory(tmp_path)
    one_line(error)


def test_a_tokenizer_table_that_says_it_is_longer_than_it_is_is_refused(tmp_path):
    byte_level().save(tmp_path)
    table = base64.b64encode((1 << 25).to_bytes(4, "little") + b"short").decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    change(
        tmp_path / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [normalizer]}
    )
    with pytest.raises(TokenizerError, match="precompiled_charsmap has 9 bytes of 335544") as error:
        Tokenizer.from_directory(tmp_path)
    one_line(error)


def test_a_tokenizer_that_pads_without_end_pads_nothing(tmp_path):
    byte_level().save(tmp_path)
    padding = {
        "strategy": {"Fixed": 10**11},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    change(tmp_path / "tokenizer.json", padding=padding)
    assert len(Tokenizer.from_directory(tmp_path)("ab")) == 2


# Templates without an end

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}"
    "{% endfor %}",
    "doubled": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}{{ n.s }}",
    "concatenated": "{% set n = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set n.s = n.s ~ n.s ~ n.s %}{% endfor %}",
    "shared": "{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}"
    "{% endfor %}{{ n.l }}",
    "compared": "{% set n = namespace(l=[1], m=[1]) %}{% for i in range(99) %}"
    "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
    "circle": "{% set n = namespace() %}{% set n.n = n %}{{ n }}{{ [n, n] | tojson }}",
    "multiplied": "{{ 'a' * 10 ** 9 }}",
    "listed": "{{ [1] * 10 ** 9 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "folded": "{{ 'a' | center(10 ** 9) }}{{ 'a' | center(1000000000) }}",
    "method": "{{ 'a'.ljust(1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "replace": "{% set s = 'a' * 9999 %}{{ s.replace('a', s) }}{{ s | replace('a', s) }}",
    "join": "{% set s = 'a' * 9999 %}{{ s.join(s) }}{{ s | join(s) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "wide recursion": "{% for x in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}"
    "{% endfor %}",
    "buffered": "{% set x %}{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ('' | attr('__class__')).mro() }}",
    "globals": "{{ raise_exception.__globals__ }}{{ namespace.__init__.__globals__.sys }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "deep": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "long": "{{ 1 }}" * 99_999,
    "statements": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "digits": "{{ " + "9" * 5000 + " }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_templates_have_an_end_in_any_thread(kind):
    outcome = []

    def run():
        start = time.thread_time()
        try:
            outcome.append(render(ENDLESS[kind], [{"role": "user", "content": "Hi"}]))
        except TemplateError as error:
            outcome.append(error)
        outcome.append(time.thread_time() - start)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    error, seconds = outcome
    assert seconds < 2
    assert isinstance(error, TemplateError), f"{kind} gave {str(error)[:80]!r}"
    assert "\n" not in str(error)


def test_a_long_conversation_is_not_too_much():
    text = "{% for m in messages %}{{ m.role + ': ' + m.content | trim }}{% endfor %}"
    chat = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(render(text, chat)) > 9_000_000


# A disk that is full


def test_a_full_disk_leaves_the_earlier_preset(preset, monkeypatch):
    before = contents(preset)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PresetError, match=r"No space left.*unchanged") as error:
        tiny_model(seed=1).save_to_preset(preset)
    assert str(preset) in one_line(error)
    monkeypatch.undo()
    assert contents(preset) == before
    assert [path.name for path in preset.parent.iterdir()] == [preset.name]
    CausalLM.from_preset(preset)


def test_a_disk_that_is_really_full_leaves_the_earlier_preset(tmp_path):
    """On a file system of 192 KB, where this machine lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        write_tiny_preset(disk / "preset")
        before = contents(disk / "preset")
        with pytest.raises(PresetError, match=r"No space left.*unchanged") as error:
            tiny_model(hidden_size=128, seed=1).save_to_preset(disk / "preset")
        one_line(error)
        assert contents(disk / "preset") == before
        assert [path.name for path in disk.iterdir()] == ["preset"]
        assert (disk / "preset" / SINGLE).is_file()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
