"""An adapter learns beside weights in 4 bits what it learns beside weights in floats."""

import math
from statistics import mean

import pytest

from puna.models import CausalLM
from puna.runs import FinetuneSettings, finetune
from tests.finetuning import losses_of
from tests.processes import ROOT

ROWS = ROOT / "examples" / "pirate"
STEPS = 90


@pytest.mark.soak
def test_a_qlora_ends_within_a_tenth_of_loras_loss(smollm2_gguf, tmp_path):
    base = tmp_path / "base"
    CausalLM.from_preset(smollm2_gguf, dtype="bfloat16", quantization="none").save_to_preset(base)
    learned, held_out = {}, {}
    for kind in (None, "int4"):
        settings = FinetuneSettings(
            preset=str(base),
            data=(str(ROWS / "dialogues.jsonl"),),
            eval_data=(str(ROWS / "held_out.jsonl"),),
            out=str(tmp_path / f"{kind}"),
            quantization=kind,
            packing=True,
            sequence_length=256,
            batch_size=1,
            max_steps=STEPS,
            eval_every=STEPS,
            learning_rate=1e-3,
        )
        measured = finetune(settings).report["losses"]
        learned[kind], held_out[kind] = mean(losses_of(settings)[-10:]), measured["eval_last"]
        print(f"{kind or 'bfloat16'}: the last ten steps {learned[kind]:.4f}, report {measured}")
    for losses in (learned, held_out):
        assert math.isfinite(losses[None])
        assert losses["int4"] <= 1.1 * losses[None]
