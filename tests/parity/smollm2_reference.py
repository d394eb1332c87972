"""SmolLM2 in transformers, from the same GGUF file read by other code than ours.

Run `python -m tests.parity.smollm2_reference` to write again what transformers says to `PROMPTS`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "smollm2_greedy.json"

PROMPTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nHow many legs has a spider?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nSay hello in Spanish.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time",
    "The three primary colours are",
    "def fibonacci(n):\n",
    "In 1969, the first man",
    "My favourite recipe for pancakes:\n1.",
    "The opposite of hot is",
    "Water boils at",
    "import numpy as np\n\n",
    "Dear Sir or Madam,\n",
    "The mitochondria is",
    "2 + 2 =",
    "A list of planets:\n- Mercury\n- Venus\n",
    "She opened the door and",
    "La capital de España es",
    "To be or not to be,",
    "The quick brown fox jumps over the lazy dog. " * 8,
]
NEW_TOKENS = 64


def reference_model(path: Path):
    """The same file read by the gguf package, in transformers' model."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(path)
    field = {name: value.contents() for name, value in reader.fields.items() if "llama." in name}
    config = LlamaConfig(
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    theirs = {
        names.get_name(name.removesuffix(".weight")): name
        for name in LlamaForCausalLM(config).state_dict()
    }
    state = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part, heads in (("attn_q", 9), ("attn_k", 3)):
            if part in tensor.name:  # llama.cpp interleaves the halves that RoPE turns together
                pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        name = theirs[tensor.name.removesuffix(".weight")]
        state[name] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def continuation(model, prompt_ids: np.ndarray) -> list[int]:
    """The reference's greedy choice after a prompt, `NEW_TOKENS` of them."""
    import torch

    ids = torch.from_numpy(prompt_ids.astype(np.int64))[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=2,
        eos_token_id=None,
    )
    return out[0, ids.shape[1] :].tolist()


def main() -> None:
    from puna.models import Llama3Tokenizer
    from tests import assets

    tokenizer = Llama3Tokenizer.from_preset(assets.smollm2_gguf())
    model = reference_model(assets.smollm2_gguf())
    rows = {prompt: continuation(model, tokenizer(prompt)) for prompt in PROMPTS}
    lines = ",\n".join(f"{json.dumps(prompt)}: {row}" for prompt, row in rows.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
