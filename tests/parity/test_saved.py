"""What was trained, merged or fused and then saved: transformers and PEFT open it, and so do we.

`tests/integration/test_save.py` has models as they are; here they have learned something.
"""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from puna.cli.app import app
from puna.models import CausalLM
from tests import references
from tests.adapters import IDS, KINDS, TEXTS, adapted, fit, logits, model_of, shake
from tests.weights import array, assert_same

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # of the largest logit
SHARD = 40_000
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
CHAT = [{"role": "user", "content": "Hello <|eot_id|> there"}]


def merged_then_saved(directory):
    model = adapted(KINDS["rslora"])
    model.merge_lora()
    model.save_to_preset(directory, max_shard_size=SHARD)
    return model


def saved_beside_an_adapter(directory):
    model = adapted(KINDS["dora"], tie_word_embeddings=True, targets=["q_proj", "down_proj"])
    model.save_to_preset(directory, adapter="merged", max_shard_size=SHARD)
    return model


def trained_in_full(directory):
    model = model_of(attention_bias=True)
    model.generation_config = dict(SAMPLING)
    fit(model, epochs=2)
    model.save_to_preset(directory, max_shard_size=SHARD)
    return model


def trained_by_adapter(directory):
    model = model_of()
    model.enable_lora(rank=4, alpha=8)
    fit(model, epochs=2)
    model.save_to_preset(directory, max_shard_size=SHARD)
    return model


def fused(directory):
    base, adapter = directory.parent / "base", directory.parent / "adapter"
    model_of().save_to_preset(base, max_shard_size=SHARD)
    model = CausalLM.from_preset(base)
    model.enable_lora(rank=4)
    shake(model)
    model.save_to_preset(adapter, adapter="only")
    arguments = [base, "--adapter", adapter, "--out", directory, "--max-shard-size", "40KB"]
    result = CliRunner().invoke(app, ["fuse", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return model


WAYS = (
    merged_then_saved,
    saved_beside_an_adapter,
    trained_in_full,
    trained_by_adapter,
    fused,
)


@pytest.mark.parametrize("way", WAYS)
def test_transformers_computes_the_same_and_we_read_the_same(tmp_path, way):
    directory = tmp_path / "saved"
    model = way(directory)
    shards = sorted(directory.glob("*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())

    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(loading.values()), loading
    expected = references.logits(theirs.eval(), IDS)
    again = CausalLM.from_preset(directory)
    references.assert_close(logits(again), expected, TOLERANCE)
    references.assert_close(logits(model), expected, TOLERANCE)
    if model.is_merged or not model.adapters():  # else what is in memory is not merged
        assert_same(again, model)
    again.save_to_preset(tmp_path / "again")
    assert_same(CausalLM.from_preset(tmp_path / "again"), again)

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert (
        tokenizer("Hello there")["input_ids"]
        == model.tokenizer("Hello there", add_special_tokens=True).tolist()
    )
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == again.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    settings = theirs.generation_config
    assert settings.eos_token_id == list(model.tokenizer.stop_token_ids)
    assert {name: getattr(settings, name) for name in model.generation_config} == dict(
        model.generation_config
    )


def test_what_is_merged_here_and_what_is_fused_are_one(tmp_path):
    model = fused(tmp_path / "fused")
    model.save_to_preset(tmp_path / "merged")
    ours, theirs = (CausalLM.from_preset(tmp_path / name) for name in ("merged", "fused"))
    for name, variable in ours.tensors().items():
        np.testing.assert_allclose(array(variable), array(theirs.tensors()[name]), atol=1e-6)


def test_what_was_trained_is_felt(tmp_path):
    """Else the tests above would say nothing."""
    for way in (trained_in_full, trained_by_adapter):
        model = way(tmp_path / way.__name__)
        again = CausalLM.from_preset(tmp_path / way.__name__)
        assert again.evaluate(TEXTS, verbose=0)[0] == pytest.approx(
            model.evaluate(TEXTS, verbose=0)[0], rel=1e-4
        )
        before = model_of(attention_bias=model.config.attention_bias)
        assert references.relative_difference(logits(again), logits(before)) > 1e-3


def test_peft_opens_what_is_saved_alone_on_the_base_that_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model_of().save_to_preset(tmp_path / "base")
    model = CausalLM.from_preset(tmp_path / "base")
    model.enable_lora(rank=4, alpha=6, target_modules="all-linear", rslora=True)
    shake(model)
    model.save_to_preset(tmp_path / "adapter", adapter="only")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    references.assert_close(logits(model), references.logits(theirs, IDS), 1e-4)
