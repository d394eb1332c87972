"""Quantized checkpoints, broken: what `config.json` says of them, and their tensors."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

from tests.fuzz.mutate import SIZES, mutate_bytes, mutate_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"

# What belongs into a `quantization_config`, in places where it does not.
VALUES = [
    *(f'"{word}"' for word in (
        "group", "channel", "tensor", "block", "float", "int", "pack-quantized", "int-quantized",
        "compressed-tensors", "gptq", "re:.*", "re:(", "Linear", "Embedding", "lm_head",
        "re:.*mlp.*", "dynamic", "naive-quantized",
    )),
    *(str(number) for number in (3, 4, 8, 16, 31, 32, 64, 128, 129)),
    '["Linear"]', '["re:(("]', "[]", "{}",
    '{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": false}',
]  # fmt: skip


class Quantized:
    """A tiny model in 8 and 4 bits, loaded whole and run, as a user does."""

    name = "quantized"

    def write(self, directory: Path) -> None:
        from puna.quantization.scheme import Scheme
        from puna.testing import tiny_model

        model = tiny_model(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        model.quantize(
            overrides={
                r"layers\.0\.mlp": Scheme(bits=4, group_size=32),
                r"layers\.1\.mlp": Scheme(bits=4, group_size=32, symmetric=False),
                r"self_attn": Scheme(bits=8),
            }
        )
        model.save_to_preset(directory / "saved")
        for name in (CONFIG, WEIGHTS):
            shutil.move(directory / "saved" / name, directory / name)
        shutil.rmtree(directory / "saved")

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        for name in (CONFIG, WEIGHTS):
            shutil.copy(originals / name, case)
        kind = rng.random()
        if kind < 0.5:
            text = (originals / CONFIG).read_text()
            (case / CONFIG).write_bytes(mutate_json(rng, text, VALUES))
            return
        raw = (originals / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        if kind < 0.8:
            values = [f'"{word}"' for word in ("I8", "U8", "I32", "I64", "F32", "BF16", "F16")]
            values += [f"[{a}, {b}]" for a in (0, 1, 32, 64) for b in (0, 1, 4, 8, 32)]
            header = mutate_json(rng, raw[8 : 8 + length].decode(), values)
            claimed = rng.choice([len(header)] * 9 + [rng.choice(SIZES)])
            raw = struct.pack("<Q", claimed) + header + raw[8 + length :]
        else:
            raw = mutate_bytes(rng, raw)
        (case / WEIGHTS).write_bytes(raw)

    def load(self, case: Path) -> None:
        import numpy as np
        from keras import ops

        from puna.models import Llama3CausalLM

        model = Llama3CausalLM.from_preset(case, preprocessor=None)
        # Any numbers go in, so any may come out; but they come.
        logits = ops.convert_to_numpy(model(np.array([[3, 1, 4]], np.int32)))
        assert logits.shape == (1, 3, model.backbone.config.vocab_size)
