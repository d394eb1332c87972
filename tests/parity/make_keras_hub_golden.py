"""Write what keras-hub itself writes and computes, for `tests/unit/test_keras_hub_source.py`.

keras-hub is not installed with Puna. Run this in an environment that has it, with the directory of
Llama 3.1's real `tokenizer.json` (`python -m tests.assets llama3` prints it):

    KERAS_BACKEND=jax python tests/parity/make_keras_hub_golden.py LLAMA3_TOKENIZER_DIRECTORY

Under `tests/parity/data/keras_hub/` it makes two tiny presets: `single`, float32 in one file, with
Llama 3.1's rotary scaling; and `sharded`, tied, bfloat16, with a position scaling that keras-hub
takes and does not compute. `golden.npz` has the
hidden states and logits of both, and the ids of a few texts by keras-hub's tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data" / "keras_hub"
# keras-hub's default is 1e-6, which is not Llama 3's; the files must say it for both to agree.
EPSILON = 1e-5
MERGES = 200
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
# Texts in which no token would reach over the end of a word: keras-hub 0.32 gives its splitting
# rule to the tokenizers library as a literal string, not as a regular expression, and so never
# splits.
TEXTS = (
    "Hello there, it's 2024 and 12345 things...\n\nare in the world!",
    "<|start_header_id|>user<|end_header_id|>\n\nI'LL say: naïve façade ☃ — 日本語<|eot_id|>",
    " leading and trailing ",
    "",
)
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "layer_norm_epsilon": EPSILON,
}
MODELS: dict[str, dict[str, Any]] = {
    "single": {
        "dtype": "float32",
        "rope_max_wavelength": 500000,
        "rope_frequency_adjustment_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_pretraining_sequence_length": 16,
    },
    "sharded": {
        "dtype": "bfloat16",
        "rope_position_scaling_factor": 2.0,
        "tie_word_embeddings": True,
    },
}


def cut_down(directory: Path) -> tuple[dict[str, int], list[str]]:
    """The bytes, the first merges and the main special tokens of the real tokenizer."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    names = dict.fromkeys(sorted(model["vocab"], key=model["vocab"].__getitem__)[:256])
    merges: list[str] = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if len(merges) < MERGES and left in names and right in names:
            merges.append(f"{left} {right}")
            names[left + right] = None
    names |= dict.fromkeys(SPECIAL)
    return {name: place for place, name in enumerate(names)}, merges


def make(name: str, vocabulary: dict[str, int], merges: list[str], ids: np.ndarray) -> dict:
    """Write one preset; its hidden states and logits in float32, and the ids of the texts."""
    import keras
    import keras_hub  # here, so that the tests may import what is above without it

    tokenizer = keras_hub.models.Llama3Tokenizer(vocabulary, merges)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(vocabulary), **SHAPE, **MODELS[name]
    )
    numbers = np.random.default_rng(len(name))
    for variable in backbone.variables:
        center = 1.0 if variable.path.endswith("scale") else 0.0
        variable.assign(numbers.normal(center, 0.2, variable.shape))
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=48, add_end_token=False
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor)
    directory = DATA / name
    shutil.rmtree(directory, ignore_errors=True)
    shard_size = 3e-5 if name == "sharded" else 10  # in GiB
    model.save_to_preset(str(directory), max_shard_size=shard_size)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if name == "sharded":
        # The same rounded weights, computed with in float32.
        exact = keras_hub.models.Llama3Backbone(
            vocabulary_size=len(vocabulary), **SHAPE, **(MODELS[name] | {"dtype": "float32"})
        )
        for ours, theirs in zip(exact.variables, backbone.variables, strict=True):
            ours.assign(keras.ops.cast(theirs, "float32"))
        backbone = exact
    hidden = backbone(inputs)
    logits = backbone.token_embedding(hidden, reverse=True)
    return {
        f"{name}_hidden": np.asarray(hidden, np.float32),
        f"{name}_logits": np.asarray(logits, np.float32),
        f"{name}_tokens": np.concatenate([np.asarray(tokenizer(text)) for text in TEXTS]),
    }


def main() -> None:
    vocabulary, merges = cut_down(Path(sys.argv[1]))
    DATA.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(0, len(vocabulary), (2, 24)).astype("int32")
    golden: dict[str, Any] = {"ids": ids}
    for name in MODELS:
        golden |= make(name, vocabulary, merges, ids)
    np.savez_compressed(DATA / "golden.npz", **golden)


if __name__ == "__main__":
    main()
