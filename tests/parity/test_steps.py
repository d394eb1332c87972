"""One step of `fit` has the loss and gradients of one step of transformers and PEFT.

Of all weights and of a LoRA on all seven projections; of a padded batch, of one whose rows hold
several texts, and of one whose gradients are accumulated.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import torch

from puna.models import Llama3CausalLM
from tests import references
from tests.parity import test_lora_parity
from tests.parity.test_gradients import batch, values

TOLERANCE = 1e-4  # of the loss, and of the largest number of each gradient
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Batch(NamedTuple):
    """The same rows as both sides take them."""

    x: dict[str, np.ndarray]
    labels: np.ndarray
    weights: np.ndarray
    mask: np.ndarray  # as transformers has it
    positions: np.ndarray


def padded() -> Batch:
    ids, mask, labels, weights = batch([16, 3, 11, 7], 16)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    x = {"token_ids": ids, "padding_mask": mask}
    return Batch(x, labels, weights, mask.astype(np.int64), positions)


def packed() -> Batch:
    """Three rows of several texts each, the last tokens of two rows being padding."""
    T, lengths = 20, [(9, 4, 7), (3, 12), (5, 2, 6, 1)]
    ids = references.token_ids(len(lengths), T, seed=1)
    segments = np.zeros((len(lengths), T), np.int32)
    positions, weights = np.zeros_like(segments), np.zeros(segments.shape, np.float32)
    for row, texts in enumerate(lengths):
        ends = np.cumsum(texts)
        for number, (end, length) in enumerate(zip(ends, texts, strict=True), 1):
            segments[row, end - length : end] = number
            positions[row, end - length : end] = np.arange(length)
            weights[row, end - length : end - 1] = 1  # the last token has nothing to predict
    place = np.arange(T)
    seen = (place[None, :] <= place[:, None]) & (segments[:, None] == segments[:, :, None])
    mask = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)[:, None]
    x = {"token_ids": ids, "padding_mask": segments > 0}
    x |= {"segment_ids": segments, "positions": positions}
    return Batch(x, np.roll(ids, -1, axis=1), weights, mask, positions)


def reference_step(model: torch.nn.Module, made: Batch, parts: list[slice]) -> float:
    """The loss by transformers itself, and its gradients left in the model, part after part."""
    ids = torch.tensor(made.x["token_ids"], dtype=torch.long)
    # transformers takes a token's own label, and looks at the token before it for the guess.
    labels = torch.full_like(ids, -100)
    learned = torch.tensor(made.weights[:, :-1] > 0)
    labels[:, 1:] = torch.where(learned, ids[:, 1:], -100)
    total = 0.0
    for part in parts:
        loss = model(
            input_ids=ids[part],
            attention_mask=torch.tensor(made.mask[part]),
            position_ids=torch.tensor(made.positions[part], dtype=torch.long),
            labels=labels[part],
            num_items_in_batch=learned.sum(),
            use_cache=False,
        ).loss
        loss.backward()
        total += float(loss.detach())
    return total


def fitted_step(model: Llama3CausalLM, tensors: Any, made: Batch, accumulate: int):
    """The loss of one `fit`, and what each tensor loses: at a learning rate of 1, its gradient."""
    before = tensors(model)
    model.compile(optimizer=keras.optimizers.SGD(1.0), accumulate=accumulate)
    x, labels, weights = made[:3]
    history = model.fit(x, labels, sample_weight=weights, batch_size=len(labels), verbose=0)
    after = tensors(model)
    return history.history["loss"][0], {name: before[name] - after[name] for name in before}


@pytest.fixture(params=["full", "lora"])
def both(request, tmp_path):
    """Their model and ours, and how to read their gradients and our tensors, by the same names."""
    base = references.make()
    references.save(base, tmp_path / "base")
    load = {"preprocessor": None, "dtype": "float32"}
    if request.param == "full":
        ours = Llama3CausalLM.from_preset(tmp_path / "base", **load)
        return base, ours, lambda: {n: p.grad for n, p in base.named_parameters()}, values
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=SEVEN))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # PEFT begins with a B of zeros
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = Llama3CausalLM.from_preset(tmp_path / "base", **load)
    ours.load_adapter(tmp_path / "adapter")

    def gradients():
        found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        return peft.get_peft_model_state_dict(theirs, state_dict=found)

    return theirs.eval(), ours, gradients, test_lora_parity.tensors


@pytest.mark.parametrize("parts", [1, 3], ids=["whole", "accumulated"])
@pytest.mark.parametrize("made", [padded(), packed()], ids=["padded", "packed"])
def test_loss_and_gradients_are_those_of_transformers(both, made, parts):
    theirs, ours, gradients, tensors = both
    cuts = [slice(None)] if parts == 1 else [slice(0, 1), slice(1, 2), slice(2, None)]
    expected = reference_step(theirs, made, cuts)
    loss, changes = fitted_step(ours, tensors, made, parts)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    wanted = gradients()
    assert changes.keys() == wanted.keys()
    for name, gradient in wanted.items():
        difference = references.relative_difference(changes[name], gradient.numpy())
        assert difference <= TOLERANCE, f"{name}: relative difference {difference:.2e}"
