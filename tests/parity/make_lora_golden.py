"""Write PEFT's loss and gradients of one step, for `tests/parity/test_lora_parity.py`.

Run it where the `dev` extra is installed, which has PEFT, after `tests.parity.make_peft_golden`,
whose base and adapters it takes:

    python -m tests.parity.make_lora_golden

Under `tests/parity/data/lora/` it makes `seven`, an adapter of all seven projections without
dropout, and for this and others an `.npz` with the loss and the gradients of the adapter's tensors,
under their names in the file, of the padded batch that `test_gradients.py` takes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from tests import references
from tests.parity.make_peft_golden import DATA as PEFT
from tests.parity.make_peft_golden import _shake
from tests.parity.test_gradients import batch

DATA = Path(__file__).parent / "data" / "lora"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OTHERS = ("rslora", "dora", "patterns")


def _step(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The loss, the mean over the tokens that count, and the gradients."""
    ids, mask, labels, weight = batch([16, 3, 11, 7], 16)
    real = torch.tensor(mask, dtype=torch.long)
    logits = model(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=real,
        position_ids=(real.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    counts = torch.tensor(weight) > 0
    wanted = torch.tensor(labels, dtype=torch.long)[counts]
    loss = torch.nn.functional.cross_entropy(logits[counts], wanted)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = get_peft_model_state_dict(model, state_dict=gradients)
    return {name: tensor.numpy() for name, tensor in found.items()} | {"loss": loss.detach()}


def main() -> None:
    warnings.simplefilter("ignore")
    shutil.rmtree(DATA, ignore_errors=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=SEVEN)
    model = get_peft_model(references.make(), config).eval()
    _shake(model, 100)
    model.save_pretrained(DATA / "seven")
    path = DATA / "seven" / "adapter_config.json"
    saved = json.loads(path.read_text()) | {"base_model_name_or_path": "../../peft/base"}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    (DATA / "seven" / "README.md").unlink(missing_ok=True)
    np.savez_compressed(DATA / "seven.npz", **_step(model))
    for name in OTHERS:
        base = references.make()
        model = PeftModel.from_pretrained(base, PEFT / name, is_trainable=True).eval()
        np.savez_compressed(DATA / f"{name}.npz", **_step(model))


if __name__ == "__main__":
    main()
