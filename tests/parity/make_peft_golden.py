"""Write what PEFT itself writes and computes, for `tests/unit/test_peft_source.py`.

Run it where the `dev` extra is installed, which has PEFT and transformers:

    python -m tests.parity.make_peft_golden

Under `tests/parity/data/peft/` it makes three tiny bases (`base`; `tied`, whose head is the
embedding; `biased`, whose layers have biases), an adapter of each kind, and `golden.npz`, which has
the logits of each adapted model by PEFT, the adapter not merged.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from tests import references

DATA = Path(__file__).parent / "data" / "peft"
BASES: dict[str, dict[str, Any]] = {
    "base": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
# The adapters by name: their base, and PEFT's arguments.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("base", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": (
        "base",
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": r".*\.(o|down)_proj"},
    ),
    "all_linear": ("base", {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.5}),
    "dora": ("base", {"r": 4, "use_dora": True, "target_modules": "all-linear"}),
    "dora_embedding": (
        "base",
        {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "k_proj"]},
    ),
    "patterns": (
        "base",
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.0\.mlp\.up_proj": 3},
            "alpha_pattern": {"k_proj": 5, "layers.1.self_attn.q_proj": 16},
        },
    ),
    "one_layer": (
        "base",
        {"r": 4, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    ),
    "excluding": (
        "base",
        {"r": 4, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "embedding": ("base", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "saved": (
        "base",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved_norms": (
        "base",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    ),
    "tokens": (
        "base",
        {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [3, 60, 7]},
    ),
    "tied_embedding": ("tied", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "tied_head": ("tied", {"r": 4, "target_modules": ["lm_head", "v_proj"]}),
    "tied_saved": (
        "tied",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied_head_saved": (
        "tied",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied_tokens": (
        "tied",
        {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [3, 60, 7]},
    ),
    "bias_all": ("biased", {"r": 4, "target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "lora_bias": (
        "biased",
        {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    ),
}


def _shake(model: torch.nn.Module, seed: int) -> None:
    """Give all that PEFT trains values far from what it starts as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            # A magnitude of DoRA stays a factor around what it was.
            is_factor = "magnitude" in name or "norm" in name
            parameter.copy_(parameter * (1 + 0.3 * noise) if is_factor else 0.3 * noise)


def main() -> None:
    warnings.simplefilter("ignore")
    shutil.rmtree(DATA, ignore_errors=True)
    ids = references.token_ids(2, 12)
    golden: dict[str, np.ndarray] = {"ids": ids}
    for name, fields in BASES.items():
        references.save(references.make(**fields), DATA / name)
    for seed, (name, (base, arguments)) in enumerate(ADAPTERS.items()):
        config = LoraConfig(task_type="CAUSAL_LM", **arguments)
        model = get_peft_model(references.make(**BASES[base]), config).eval()
        _shake(model, seed)
        golden[name] = references.logits(model, ids)
        model.save_pretrained(DATA / name)
        path = DATA / name / "adapter_config.json"
        saved = json.loads(path.read_text()) | {"base_model_name_or_path": f"../{base}"}
        path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
        (DATA / name / "README.md").unlink(missing_ok=True)
    np.savez_compressed(DATA / "golden.npz", **golden)


if __name__ == "__main__":
    main()
