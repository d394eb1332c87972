"""What is to be seen of a model on eight devices, for tests: a process of its own makes them.

`seen("parity", ...)` runs the functions of those names, of `mesh_places` and `mesh_runs`, in one
process with eight CPU devices, as starting JAX and compiling for eight devices takes seconds, and
returns what they return.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

from tests.processes import result_of

DEVICES = 8
MESHES = ((1, 8), (2, 4), (8, 1), (4, 2))

# All that eight devices can divide.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 320,
}
# As SmolLM2's: 9 query heads and 3 key/value heads.
ODD_HEADS: dict[str, Any] = SHAPE | {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
ROWS = ["Hello there world", "Hi you are", "the system", "you", "a user and an assistant"]
IDS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2], [30, 1, 2, 9, 9, 9, 9, 1], [5] * 8]


def seen(*names: str) -> dict[str, Any]:
    """What the functions of these names return, each run after the other in one process."""
    code = "import sys; from tests import meshes; meshes.main(sys.argv[1:])"
    return result_of(code, *names, env=eight_devices())


def eight_devices() -> dict[str, str]:
    """The environment of a process that has eight devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    return os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }


def main(names: list[str]) -> None:
    """Run functions of `mesh_places` and `mesh_runs`, and print what they return as JSON."""
    from tests import mesh_places, mesh_runs

    warnings.simplefilter("ignore")
    there = vars(mesh_places) | vars(mesh_runs)
    print(json.dumps({name: there[name]() for name in names}))


def on(mesh: tuple[int, int] | None, fsdp: bool = False) -> None:
    """Set the distribution that `from_preset(mesh=...)` sets; None sets none."""
    import keras

    from puna.models import Llama3Backbone

    distribution = None
    if mesh is not None:
        devices = keras.distribution.list_devices()
        device_mesh = keras.distribution.DeviceMesh(mesh, ["batch", "model"], devices)
        layout_map = Llama3Backbone.get_layout_map(device_mesh, fsdp=fsdp)
        distribution = keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="batch"
        )
    keras.distribution.set_distribution(distribution)


def model_of(kind: str, **changes: Any) -> Any:
    """A tiny model; "lora", "int8" and "int4" in its kind say what is done to it."""
    import numpy as np

    from puna.testing import tiny_model

    model = tiny_model(**(SHAPE | changes))
    for mode in ("int8", "int4"):
        if mode in kind:
            model.quantize(mode)
    if "lora" in kind:
        model.enable_lora(4, dora="dora" in kind)
        numbers = np.random.default_rng(1)
        for variable in model.adapter_tensors().values():
            variable.assign(numbers.normal(0, 0.1, variable.shape).astype("float32"))
    return model


def done_by(model: Any, *, trains: bool = True) -> dict[str, Any]:
    """A model's logits, what it generates, and one step's loss and gradients."""
    import keras
    import numpy as np

    from puna import backend
    from puna.tuning import TextData

    found: dict[str, Any] = {"logits": np.asarray(model.predict(np.array(IDS), verbose=0))}
    found["tokens"] = [
        list(map(int, row)) for row in model.generate(IDS[:3], max_new_tokens=6, sampler="greedy")
    ]
    if not trains:
        return found
    # With this optimizer a step changes each weight by its gradient.
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    read = backend.ops.to_numpy
    before = {v.path: np.array(read(v)) for v in model.trainable_variables}
    data = TextData(ROWS, packing=True, sequence_length=32)
    history = model.fit(data, batch_size=4, epochs=1, shuffle=False, verbose=0).history
    found["loss"] = history["loss"]
    found["gradients"] = {v.path: before[v.path] - read(v) for v in model.trainable_variables}
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """How far what two models do is apart."""
    import numpy as np

    apart: dict[str, Any] = {
        "logits": float(np.abs(found["logits"] - wanted["logits"]).max()),
        "tokens": found["tokens"] == wanted["tokens"],
    }
    if "loss" in found:
        apart["loss"] = float(np.abs(np.subtract(found["loss"], wanted["loss"])).max())
        pairs = [(found["gradients"][path], value) for path, value in wanted["gradients"].items()]
        apart["gradients"] = max(
            float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in pairs
        )
    return apart
