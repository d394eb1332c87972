"""Model cards: what they tell, whose they are, and what is never written over."""

import dataclasses
import os
import re

import pytest
import yaml

from puna.checkpoint import model_card
from puna.checkpoint.model_card import License, ModelCard, card_from_base, is_ours, placed
from puna.checkpoint.preset import Preset
from puna.models import CausalLM
from puna.testing import tiny_model, tiny_tokenizer, write_tiny_preset
from tests.processes import run

pytestmark = pytest.mark.backend_free

BASE = "org/base"
TRAINED = ModelCard(
    base=BASE,
    license=License(id="llama3.2"),
    data={"train.jsonl": 1300, "held | out": None},
    hyperparameters={"learning rate": 2e-4, "rank": 8},
    metrics={"first loss": 3.123456, "validation loss": 1.5},
    curve="loss_curve.png",
)


def metadata(text):
    """The front matter, as any reader of YAML finds it."""
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert rest
    return yaml.safe_load(head)


def write_card(directory, text):
    directory.mkdir(exist_ok=True)
    (directory / "README.md").write_text(text, encoding="utf-8")
    return directory


def codes(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


# What it tells


def test_all_that_is_known_of_a_training_is_told():
    text = TRAINED.render()
    assert metadata(text) == {
        "base_model": BASE,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "llama3.2",
        "pipeline_tag": "text-generation",
        "tags": ["puna", "keras", "llama"],
    }
    for line in (
        "| train.jsonl | 1,300 |",
        r"| held \| out | unknown |",
        "| learning rate | 0.0002 |",
        "| rank | 8 |",
        "| first loss | 3.123 |",
        "| validation loss | 1.5 |",
        r"![The losses while it was trained](<loss\_curve.png>)",
        "Built with Llama. llama3.2, the licence of [org/base](https://huggingface.co/org/base).",
    ):
        assert line in text.splitlines()


def test_nothing_is_invented():
    text = ModelCard().render()
    assert metadata(text)["license"] == "other"
    assert metadata(text)["license_name"] == "unknown"
    assert "base_model" not in metadata(text)
    assert "Not known to Puna: see the model that this one was made from" in text
    assert "Training" not in text
    assert text == ModelCard().render()


@pytest.mark.parametrize(
    ("base", "license"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("somebody/Llama-3.2-1B-Instruct", "other"),
    ],
)
def test_a_licence_is_known_by_who_publishes(base, license):
    assert card_from_base(base, None, ()).license.id == license


def test_a_base_with_a_card_names_its_licence(tmp_path):
    told = "license: other\nlicense_name: own\nlicense_link: https://example.org/own"
    write_card(tmp_path, f"---\n{told}\n---\n# Base\n")
    # What the base says of itself is believed before what its publisher is known for.
    card = card_from_base("meta-llama/Llama-3.2-1B", tmp_path, ())
    assert card.license == License(id="other", name="own", link="https://example.org/own")
    assert metadata(card.render())["license_link"] == "https://example.org/own"
    assert "[own](https://example.org/own), the licence of" in card.render()


def test_a_local_base_is_named_by_its_own_card_and_never_by_its_place(tmp_path):
    base = write_tiny_preset(tmp_path / "secret-place")
    assert card_from_base(None, base, ()).base is None
    write_card(base, "---\nbase_model:\n- org/first\nlicense: mit\n---\n")
    model = CausalLM.from_preset(base)
    assert (model.card.base, model.card.license.id) == ("org/first", "mit")
    model.save_to_preset(tmp_path / "saved")
    assert "secret-place" not in (tmp_path / "saved/README.md").read_text()


def test_what_lies_in_the_hubs_cache_is_known_by_its_name(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    adapter = tmp_path / "models--me--lora" / "snapshots" / "2c3d"
    write_tiny_preset(snapshot)
    card = Preset(snapshot, [adapter, tmp_path / "mine"], weights=False).card()
    assert (card.base, card.adapters) == ("org/name", ("me/lora", ""))
    text = card.render()
    assert "with [me/lora](https://huggingface.co/me/lora) and an adapter merged into" in text
    assert metadata(text)["base_model_relation"] == "finetune"


BOMB = "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nlicense: *c"
HOSTILE = {
    "no yaml": "---\n{]\n---\n",
    "a list": "---\n- license: mit\n---\n",
    "no end": "---\nlicense: mit\n",
    "other kinds": "---\nlicense: 3\nbase_model: {a: b}\nlicense_name: [x]\n---\n",
    "aliases": f"---\n{BOMB}\n---\n",
    "half a pair": '---\nlicense: "\\ud800"\n---\n',
    "lines": '---\nlicense: "mit\\n---\\n# Injected"\n---\n',
    "nested": "---\nlicense: " + "[" * 2000 + "\n---\n",
    "a tag": "---\nlicense: !!python/object/apply:os.system [x]\n---\n",
    "a base that is no id": "---\nbase_model: '../../etc) [x](y'\n---\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_broken_card_of_a_base_says_nothing(tmp_path, text):
    card = card_from_base(None, write_card(tmp_path, text), ())
    assert card == ModelCard()


def test_a_card_that_is_no_text_or_far_too_long_says_nothing(tmp_path):
    write_card(tmp_path, "---\nlicense: mit\n---\n" + "x" * (1 << 16))
    assert card_from_base(None, tmp_path, ()) == ModelCard()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    assert card_from_base(None, tmp_path, ()) == ModelCard()


def test_names_cannot_break_out_of_their_places():
    name = "a|b\n\n# `c` <script> \udcff"
    text = ModelCard(title=name, data={name: 1}, hyperparameters={name: name}).render()
    assert r"# a\|b \# \`c\` \<script\> ?" in text.splitlines()
    assert r"| a\|b \# \`c\` \<script\> ? | 1 |" in text.splitlines()
    assert is_ours(text)


# Whose it is


def saved_card(directory):
    return (directory / "README.md").read_text(encoding="utf-8")


def test_a_card_of_ours_is_renewed(tmp_path):
    model = tiny_model()
    model.save_to_preset(tmp_path)
    assert is_ours(saved_card(tmp_path))
    model.card = dataclasses.replace(TRAINED, curve=None)
    (tmp_path / "loss_curve.png").write_bytes(b"a picture")
    model.save_to_preset(tmp_path)
    assert "| train.jsonl | 1,300 |" in saved_card(tmp_path)
    assert (tmp_path / "loss_curve.png").read_bytes() == b"a picture"


@pytest.mark.parametrize("kind", ["theirs", "ours, changed", "no text", "a link", "a folder"])
def test_a_card_of_somebody_elses_is_never_written_over(tmp_path, kind):
    model, path = tiny_model(), tmp_path / "saved" / "README.md"
    path.parent.mkdir()
    if kind == "ours, changed":
        model.save_to_preset(path.parent)
        path.write_text(path.read_text().replace("Saved with Puna", "Saved by me"))
    elif kind == "a link":
        (tmp_path / "elsewhere.md").write_text("# Mine")
        path.symlink_to(tmp_path / "elsewhere.md")
    elif kind == "a folder":
        path.mkdir()
        (path / "page.md").write_text("# Mine")
    else:
        path.write_bytes(b"# Mine" if kind == "theirs" else b"\xff\xfe")
    before = os.path.islink(path), None if path.is_dir() else path.read_bytes()
    model.save_to_preset(path.parent)
    model.enable_lora(rank=2)
    model.save_to_preset(path.parent, adapter="only")
    assert (os.path.islink(path), None if path.is_dir() else path.read_bytes()) == before
    assert kind != "a folder" or (path / "page.md").read_text() == "# Mine"


def test_a_published_card_loads_from_where_it_is_published():
    for card in (TRAINED, dataclasses.replace(TRAINED, kind="adapter", base=None)):
        text = placed(card.render(), "me/pirate")
        assert is_ours(text)
        assert model_card.PLACE not in text
        puna_code, other = codes(text)
        assert '"hf://me/pirate"' in puna_code
        assert '"me/pirate"' in other
        assert metadata(text) == metadata(card.render())


# What save_to_preset writes, and whether it is true


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_examples_run(tmp_path, is_chat):
    pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer() if is_chat else tiny_tokenizer(chat_template=None)
    tiny_model(tokenizer=tokenizer).save_to_preset(tmp_path / "saved")
    text = saved_card(tmp_path / "saved")
    assert ("conversational" in metadata(text)["tags"]) == is_chat
    found = codes(text)
    assert len(found) == 2
    for code in found:
        exec(code.replace(model_card.PLACE, str(tmp_path / "saved")), {})


def test_an_adapters_card_names_its_base(tmp_path):
    write_tiny_preset(tmp_path / "models--org--base" / "snapshots" / "0a1b")
    model = CausalLM.from_preset(tmp_path / "models--org--base" / "snapshots" / "0a1b")
    model.enable_lora(rank=2)
    model.save_to_preset(tmp_path / "adapter", adapter="only")
    text = saved_card(tmp_path / "adapter")
    told = metadata(text)
    assert (told["library_name"], told["base_model"]) == ("peft", BASE)
    assert told["base_model_relation"] == "adapter"
    assert "lora" in told["tags"]
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in codes(text)[1]
    model.save_to_preset(tmp_path / "adapter")
    assert metadata(saved_card(tmp_path / "adapter"))["library_name"] == "transformers"


@pytest.mark.parametrize("filters", [None, "_proj"])
def test_a_quantized_models_card_says_what_opens_it(tmp_path, filters):
    model = tiny_model(hidden_size=64, intermediate_size=96)
    model.quantize("int4", **({} if filters is None else {"filters": filters}))
    model.save_to_preset(tmp_path)
    text = saved_card(tmp_path)
    assert "quantized to int4 (compressed-tensors)" in text
    # transformers reads an embedding in floats alone.
    assert ("transformers import" in text) == (filters is not None)


def test_a_card_needs_no_keras():
    code = (
        "import sys, dataclasses\n"
        "from puna.checkpoint.model_card import ModelCard\n"
        "dataclasses.replace(ModelCard(), data={'a': 1}).render()\n"
        "assert 'keras' not in sys.modules"
    )
    done = run(["-c", code])
    assert done.status == 0, done.err
