"""One step of `fit` has transformers' loss and gradients; half precision trains or says why not."""

import keras
import numpy as np
import pytest
import torch

from puna.config import LlamaConfig
from puna.errors import ConfigError
from puna.models import Llama3Backbone, Llama3CausalLM
from tests import references

TOLERANCE = 1e-4  # of the largest number of each gradient

MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"},
    "llama3": {"rope_parameters": references.ROPES["llama3"], "num_key_value_heads": 1},
}


def batch(lengths, length, side="right"):
    """Ids, mask, labels and weights; a label counts where its token and the next are real."""
    ids = references.token_ids(len(lengths), length)
    mask = references.padded_mask(lengths, length, side)
    labels = np.roll(ids, -1, axis=1)
    weight = (mask & np.roll(mask, -1, axis=1)).astype(np.float32)
    weight[:, -1] = 0
    return ids, mask, labels, weight


def reference_step(reference, ids, mask, labels, weight):
    """Loss, the mean over the tokens that count, and the gradient of every tensor by name."""
    real = torch.tensor(mask, dtype=torch.long)
    logits = reference(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=real,
        position_ids=(real.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    counts = torch.tensor(weight) > 0
    wanted = torch.tensor(labels, dtype=torch.long)[counts]
    loss = torch.nn.functional.cross_entropy(logits[counts], wanted)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    return float(loss.detach()), gradients


def values(model):
    return {
        name: keras.ops.convert_to_numpy(variable.value).copy()
        for name, variable in model.tensors().items()
    }


def fitted_step(model, ids, mask, labels, weight):
    """The same of one `fit`: with a learning rate of 1, a weight's loss is its gradient."""
    before = values(model)
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    x = {"token_ids": ids, "padding_mask": mask}
    history = model.fit(x, labels, sample_weight=weight, batch_size=len(ids), epochs=1, verbose=0)
    after = values(model)
    return history.history["loss"][0], {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize(
    ("name", "side"), [*((name, "right") for name in MODELS), ("tied", "left")]
)
def test_loss_and_gradients_of_a_fit_step(name, side, tmp_path):
    reference = references.make(**MODELS[name])
    references.save(reference, tmp_path)
    model = Llama3CausalLM.from_preset(tmp_path, preprocessor=None, dtype="float32")
    arrays = batch([16, 3, 11, 7], 16, side)
    their_loss, theirs = reference_step(reference, *arrays)
    our_loss, ours = fitted_step(model, *arrays)
    assert our_loss == pytest.approx(their_loss, rel=TOLERANCE)
    assert ours.keys() == theirs.keys()
    for tensor, gradient in theirs.items():
        difference = references.relative_difference(ours[tensor], gradient)
        assert difference <= TOLERANCE, f"{tensor}: relative difference {difference:.2e}"


def small_model(dtype):
    fields = references.TINY | {"num_hidden_layers": 1, "initializer_range": 0.1}
    keras.utils.set_random_seed(0)
    return Llama3CausalLM(Llama3Backbone(config=LlamaConfig.from_hf(fields), dtype=dtype))


def test_mixed_bfloat16_trains():
    model = small_model("mixed_bfloat16")
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    ids, mask, labels, weight = batch([16, 3, 11, 7], 16)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    x = {"token_ids": ids, "padding_mask": mask}
    losses = model.fit(x, labels, sample_weight=weight, batch_size=4, epochs=12, verbose=0).history[
        "loss"
    ]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_half_precision_weights_says_what_to_do(dtype):
    model = small_model(dtype)
    ids, mask, labels, weight = batch([16, 3], 16)
    with pytest.raises(ConfigError, match=f"mixed_{dtype}.*float32.*freeze"):
        model.fit({"token_ids": ids, "padding_mask": mask}, labels, sample_weight=weight)
