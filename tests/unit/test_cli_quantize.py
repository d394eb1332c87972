"""`puna quantize`, `puna perplexity`, and what the other verbs make of a quantized directory."""

import json
import math

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from puna import backend
from puna.cli.app import app
from puna.models import CausalLM
from puna.quantization.scheme import Scheme
from puna.testing import tiny_model, write_tiny_preset

pytestmark = pytest.mark.backend_free
SHAPE = {"hidden_size": 64, "intermediate_size": 96}
TEXT = "Hello there, the world! Hi you. " * 12


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_tiny_preset(tmp_path_factory.mktemp("preset") / "tiny", dtype="bfloat16", **SHAPE)


def puna(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="puna")


@pytest.mark.parametrize(
    ("arguments", "scheme"),
    [
        ((), Scheme(bits=4, group_size=32)),
        (("--scheme", "int8"), Scheme(bits=8)),
        (("--scheme", "float8"), Scheme(bits=8, kind="float")),
        (("--group-size", "64", "--minima"), Scheme(bits=4, group_size=64, symmetric=False)),
        (("--group-size", "0"), Scheme(bits=4)),
    ],
)
def test_what_is_written_is_what_loading_makes(tmp_path, preset, arguments, scheme):
    result = puna("quantize", preset, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    found = CausalLM.from_preset(tmp_path / "out")
    expected = CausalLM.from_preset(preset, quantization=scheme)
    assert found.quantization() == expected.quantization()
    for name, variable in expected.tensors().items():
        ours, theirs = (backend.ops.to_numpy(v) for v in (variable, found.tensors()[name]))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    facts = json.loads(puna("info", tmp_path / "out", "--json").stdout)
    assert facts["parameters"] == json.loads(puna("info", preset, "--json").stdout)["parameters"]
    held = sum(v.value.nbytes for v in expected.tensors().values())
    assert facts["memory"]["weights_bytes"] == pytest.approx(held, rel=0.3)


def test_matrices_are_kept(tmp_path, preset):
    result = puna("quantize", preset, "-o", tmp_path / "out", "--keep", "embed", "--keep", "o_proj")
    assert result.exit_code == 0, result.output
    names = CausalLM.from_preset(tmp_path / "out").quantization()
    assert len(names) == 13
    assert not any("o_proj" in name or "embed" in name for name in names)


def test_mistakes_are_told_in_a_line(tmp_path, preset):
    assert puna("quantize", preset, "-o", tmp_path / "one").exit_code == 0
    for arguments, what in (
        ((tmp_path / "one", "-o", tmp_path / "two"), "is quantized already"),
        ((preset, "-o", tmp_path / "two", "--keep", "q_prj"), "'q_prj' is found in none"),
        ((preset, "-o", tmp_path / "two", "--group-size", "48"), "group_size is 48"),
        ((preset, "-o", tmp_path / "one"), "not an empty directory"),
    ):
        result = puna("quantize", *arguments)
        assert result.exit_code == 1
        assert what in result.stderr
        assert not (tmp_path / "two").exists()


def test_perplexity_is_the_strided_one(tmp_path, preset):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    arguments = ("perplexity", preset, "--text", file, "--dtype", "float32")
    result = puna(*arguments, "--max-length", 32, "--stride", 8, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["perplexity"]
    # As the documentation of transformers has it.
    model = tiny_model(dtype="bfloat16", **SHAPE)
    ids = np.asarray(model.tokenizer(TEXT, add_special_tokens=True))
    model = CausalLM.from_preset(preset, dtype="float32")
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), 8):
        end = min(begin + 32, len(ids))
        logits = keras.ops.convert_to_numpy(model(ids[None, begin:end])[0]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = [place for place in range(begin + 1, end) if place >= before]
        total -= sum(logprobs[place - begin - 1, ids[place]] for place in wanted)
        count, before = count + len(wanted), end
        if end == len(ids):
            break
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    quantized = puna(*arguments, "--quantization", "int8", "--max-length", 32)
    assert float(quantized.stdout) == pytest.approx(found, rel=0.2)


def test_a_text_that_is_not_there_or_not_utf8(tmp_path, preset):
    result = puna("perplexity", preset, "--text", tmp_path / "none.txt")
    assert result.exit_code == 1
    assert "none.txt" in result.stderr
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert "not in UTF-8" in puna("perplexity", preset, "--text", tmp_path / "bad.txt").stderr
