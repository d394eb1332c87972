"""Where a model's weights lie on eight devices, and how they get there; see `tests/meshes.py`."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.meshes import MESHES, ODD_HEADS, SHAPE, on


def places() -> dict[str, Any]:
    """Where the variables of tiny models lie, and how many bytes each device holds."""
    from puna.backend.jax_shards import bytes_on_devices
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(folder, **SHAPE)
        for mesh, mode, rank in (
            *((mesh, mode, 0) for mesh in MESHES for mode in (None, "int8")),
            ((2, 4), "int4", 4),
        ):
            on(None)
            model = Llama3CausalLM.from_preset(preset, mesh=mesh, quantization=mode)
            if rank:
                model.enable_lora(rank)
            values = [variable.value for variable in model.variables]
            found[f"{mesh} {mode}"] = {
                "axes": {v.path: list(v.value.sharding.spec) for v in model.variables},
                "largest": max(bytes_on_devices(values).values()),
                "total": sum(value.nbytes for value in values),
            }
    on(None)
    return found


def places_of_1b() -> dict[str, Any]:
    """The same of a Llama 3.2 1B, which gets no memory."""
    import math

    from puna import distribution
    from puna.backend import build
    from puna.config import LlamaConfig
    from puna.models import Llama3Backbone, Llama3CausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    found = {}
    for mesh in MESHES:
        on(mesh)
        with build.abstract():
            model = Llama3CausalLM(Llama3Backbone(config=config, dtype="bfloat16"))
        distribution.settle(model)
        weights = model.tensors().values()
        shards = [v._layout.backend_layout.shard_shape(tuple(v.shape)) for v in weights]
        found[str(mesh)] = {
            "largest": sum(map(math.prod, shards)),
            "total": sum(math.prod(v.shape) for v in weights),
            "axes": {v.path: list(v._layout.axes) for v in weights},
        }
    on(None)
    return found


def loading() -> dict[str, Any]:
    """What is copied out of a checkpoint's files, and onto devices, while it is loaded."""
    import numpy as np

    from benchmarks.sharded_load import counted
    from puna.backend import jax_shards
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset
    from tests.unit.test_gguf_models import write as write_gguf

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(Path(folder) / "plain", **SHAPE, dtype="bfloat16")
        ref = Llama3CausalLM.from_preset(preset, dtype="float32", quantization="int4")
        ref.save_to_preset(Path(folder) / "packed")
        gguf = write_gguf(Path(folder) / "model.gguf", "Q4_K")
        cases: list[tuple[str, Any, tuple[int, int], dict[str, Any]]] = [
            ("plain", preset, (1, 8), {}),
            ("two copies", preset, (2, 4), {}),
            ("other dtype", preset, (1, 8), {"dtype": "float32"}),
            ("int8 on load", preset, (1, 8), {"quantization": "int8"}),
            ("packed", Path(folder) / "packed", (1, 8), {}),
            ("gguf", gguf, (4, 2), {"preprocessor": None}),
        ]
        for name, path, mesh, options in cases:
            on(None)
            wanted = Llama3CausalLM.from_preset(path, **options)
            with counted() as (read, put):
                model = Llama3CausalLM.from_preset(path, mesh=mesh, **options)
            values = [variable.value for variable in model.tensors().values()]
            held = jax_shards.bytes_on_devices(values)
            shards = [s.data.nbytes for value in values for s in value.addressable_shards]
            apart = [
                np.array_equal(jax_shards.gather(a.value), np.asarray(b.value))
                for a, b in zip(model.variables, wanted.variables, strict=True)
            ]
            found[name] = {
                "read": sum(read),
                "tensors": sum(value.nbytes for value in values),
                "put": sum(put),
                "held": sum(held.values()),
                "largest put": max(put),
                "largest shard": max(shards),
                "same": all(apart),
            }
    on(None)
    return found


def saving() -> dict[str, Any]:
    """Whether what a model on a mesh saves is what it saves on one device."""
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(Path(folder) / "plain", **SHAPE, dtype="bfloat16")
        for kind in ("plain", "int4"):
            options: dict[str, Any] = {} if kind == "plain" else {"quantization": kind}
            for mesh in (None, (2, 4)):
                on(mesh)
                model = Llama3CausalLM.from_preset(preset, **options)
                model.save_to_preset(Path(folder) / f"{kind} {mesh}")
                kept = [v.value._npy_value is None for v in model.variables] if mesh else []
                found[f"{kind} kept nothing"] = all(kept)
            one, other = (Path(folder) / f"{kind} {mesh}" for mesh in (None, (2, 4)))
            found[kind] = (one / "model.safetensors").read_bytes() == (
                other / "model.safetensors"
            ).read_bytes()
    on(None)
    return found


def maps() -> dict[str, Any]:
    """What layout maps of one's own do, and what is said of those that do nothing."""
    import keras

    from puna.errors import ConfigError
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset

    folder = tempfile.TemporaryDirectory()
    devices = keras.distribution.list_devices()
    device_mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)

    both: tuple[dict[str, Any], ...] = ({}, ODD_HEADS)
    for changes in both:
        write_tiny_preset(Path(folder.name) / str(len(changes)), **(SHAPE | changes))

    def tried(rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
        layout_map = keras.distribution.LayoutMap(device_mesh)
        for pattern, axes in rules.items():
            layout_map[pattern] = axes
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
        )
        path = Path(folder.name) / str(len(changes))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model = Llama3CausalLM.from_preset(path)
            except ConfigError as error:
                return {"error": str(error)}
            finally:
                on(None)
        axes = {v.path: list(v.value.sharding.spec) for v in model.variables}
        return {"axes": axes, "warnings": [str(warning.message) for warning in caught]}

    attention = {"self_attn.*(q_proj|k_proj|v_proj).weight": ("model", None)}
    rest = {
        "embed_tokens/weight": ("model", None),
        ".*o_proj/weight": (None, "model"),
        ".*(gate|up)_proj/weight": ("model", None),
        ".*down_proj/weight": (None, "model"),
        ".*lm_head/weight": ("model", None),
    }
    found = {
        "own": tried(attention | rest),
        "partial": tried(attention | {".*nothing/weight": ("model", None)}),
        "keras-hub": tried({"token_embedding/embeddings": ("model", None)}),
        "rank 3": tried({"self_attention.*(query|key|value).kernel": ("model", None, None)}),
        "narrower": tried(attention | rest | {".*q_proj/weight": (None, "model")}),
        "twice": tried({".*q_proj/weight": ("model", None), ".*_proj/weight": ("model", None)}),
        "wrong rank": tried({".*q_proj/weight": ("model",)}),
        "odd heads": tried(rest | attention, **ODD_HEADS),
    }
    folder.cleanup()
    return found


def arguments() -> dict[str, Any]:
    """`from_preset(mesh=...)`, and what it refuses."""
    import keras

    from puna.distribution import automatic_mesh
    from puna.errors import PunaError
    from puna.models import CausalLM, Llama3Backbone
    from puna.testing import tiny_config, write_tiny_preset

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(folder, **SHAPE)

        def mesh_of(name: str, path: Any = preset, **options: Any) -> None:
            try:
                CausalLM.from_preset(path, preprocessor=None, **options)
            except PunaError as error:
                found[name] = str(error)
            else:
                distribution: Any = keras.distribution.distribution()
                found[name] = list(distribution.device_mesh.shape)

        mesh_of("2, 4", mesh=(2, 4))
        mesh_of("again", mesh=(2, 4))
        mesh_of("another", mesh=(4, 2))
        on(None)
        mesh_of("auto", sharding="auto")
        on(None)
        mesh_of("missing", Path(folder) / "none", mesh=(2, 4))
        found["after"] = keras.distribution.distribution() is None
        mesh_of("too many", mesh=(4, 4))
        mesh_of("both", mesh=(2, 4), sharding="auto")
        mesh_of("one number", mesh=8)
        backbone = Llama3Backbone.from_preset(preset, mesh=(1, 2))
        found["backbone"] = list(backbone.embed_tokens.weight.value.sharding.spec)
    on(None)
    big = tiny_config(**SHAPE)
    found["fits"] = automatic_mesh(8, 16 << 30, big, 2 << 30)
    found["fits on four"] = automatic_mesh(8, 16 << 30, big, 30 << 30)
    found["fits on none"] = automatic_mesh(8, 1 << 30, big, 30 << 30)
    return found
