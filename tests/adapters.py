"""Tiny models with adapters, and what they should compute."""

import keras
import numpy as np
import pytest

from puna.quantization.rounding import dequantize
from puna.testing import tiny_model
from tests.unit.test_quantization import packed_of
from tests.weights import array

TEXTS = ["Hello world", "Hi there, how are you?", "the system", "Hello Hello"]
IDS = np.array([[300, 5, 261, 17, 3, 0, 44, 259]], np.int32)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# Wide enough for the native kernels, which take heads of a multiple of 16.
SHAPE = {"hidden_size": 64, "intermediate_size": 96}
GREEDY = {"sampler": "greedy", "max_new_tokens": 12, "stop_token_ids": None}

KINDS = {
    "lora": {"rank": 4, "alpha": 6},
    "rslora": {"rank": 4, "alpha": 3, "rslora": True},
    "dora": {"rank": 4, "alpha": 6, "dora": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def model_of(dtype="float32", **changes):
    return tiny_model(dtype=dtype, sequence_length=24, **(SHAPE | changes))


def shake(model, seed=0, spread=0.2):
    """Give all that is trained values far from what it starts as."""
    numbers = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = numbers.normal(0, spread, tuple(variable.shape)).astype("float32")
        is_factor = "magnitude" in variable.path
        variable.assign(array(variable) * (1 + noise) if is_factor else noise)


def adapted(kind=KINDS["lora"], dtype="float32", targets=ALL, name="default", **changes):
    model = model_of(dtype, **changes)
    model.enable_lora(**kind, target_modules=targets, name=name)
    shake(model)
    return model


def by_formula(model):
    """A model without adapters whose weights are what the papers say, in float64."""
    twin = model_of(attention_bias=model.config.attention_bias, mlp_bias=model.config.mlp_bias)
    for name, variable in model.tensors().items():
        if name in twin.tensors():
            twin.tensors()[name].assign(array(variable).astype("float32"))
    for module, layer in model.linears().items():
        weight = layer.weight if layer.scheme is None else None
        matrix = dequantize(packed_of(layer)) if weight is None else array(weight)
        matrix = matrix.astype(np.float64)
        for adapter in layer.in_use:
            a, b = array(adapter.a).astype(np.float64), array(adapter.b).astype(np.float64)
            matrix = matrix + adapter.scale * b @ a
            if adapter.magnitude is not None:
                lengths = np.linalg.norm(matrix, axis=1)
                matrix *= (array(adapter.magnitude) / lengths)[:, None]
        twin.tensors()[f"{module}.weight"].assign(matrix.astype("float32"))
    return twin


def logits(model, **options):
    return keras.ops.convert_to_numpy(keras.ops.cast(model(IDS, **options), "float32"))


def assert_close(ours, theirs, relative=1e-4):
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


def fit(model, epochs=4, rate=1e-2):
    model.compile(optimizer=keras.optimizers.Adam(rate))
    return model.fit(TEXTS, batch_size=4, epochs=epochs, verbose=0).history["loss"]
