"""`examples/pirate/pirate.py` on the current backend: a tiny model, and a few of the dialogues."""

import importlib
import re

import pytest

from puna.models import CausalLM
from puna.testing import write_tiny_preset
from tests.processes import ROOT

PIRATE = ROOT / "examples" / "pirate"


@pytest.fixture(scope="module")
def pirate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PIRATE)
        yield importlib.import_module("pirate")


@pytest.fixture
def rows(tmp_path):
    """The first rows of the real files."""
    directory = tmp_path / "rows"
    directory.mkdir()
    for name, count in (("dialogues.jsonl", 24), ("held_out.jsonl", 4)):
        lines = (PIRATE / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (directory / name).write_text("".join(lines[:count]), encoding="utf-8")
    return directory


@pytest.mark.slow
def test_it_trains_saves_reloads_and_chats(pirate, rows, tmp_path, monkeypatch, capsys):
    preset = write_tiny_preset(tmp_path / "tiny", num_hidden_layers=1, max_position_embeddings=1024)
    monkeypatch.setattr(pirate, "HERE", rows)
    settings = pirate.Settings(rank=2, learning_rate=0.01, new_tokens=4)
    pirate.main(str(preset), str(tmp_path / "out"), settings)
    printed = capsys.readouterr().out

    for number, question in enumerate(pirate.QUESTIONS, start=1):
        assert f"\n{number}. {question}\n   before plain  " in printed
    assert "In pirate speech before: 0 of 10.\nIn pirate speech after: 0 of 10.\n" in printed
    before, after = map(float, re.search(r"loss: (\S+) before, (\S+) after", printed).groups())
    assert after < before
    assert printed.count("  Pirate: ") == 2

    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_loss_of_a_step_is_what_it_adds_to_the_mean(pirate, rows, tmp_path, monkeypatch):
    model = CausalLM.from_preset(write_tiny_preset(tmp_path / "tiny", num_hidden_layers=1))
    monkeypatch.setattr(pirate, "HERE", rows)
    # Nothing is learned, so the steps' losses are those of the rows.
    settings = pirate.Settings(learning_rate=0.0, sequence_length=256)
    model.enable_lora(rank=1)
    losses, held_out = pirate.train(model, settings, 0.0)
    data = pirate.TextData(
        pirate.read_rows(rows / "dialogues.jsonl"),
        loss_on="assistant",
        packing=True,
        sequence_length=256,
    )
    batches = data.batches(model.preprocessor, batch_size=1)
    alone = [model.test_on_batch(x, y, w, return_dict=True)["loss"] for x, y, w in batches]
    assert sorted(losses) == pytest.approx(sorted(alone), rel=1e-3)
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
