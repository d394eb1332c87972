"""The last section of the blog post "Llama 3.2 in Keras", with Puna: a model on several devices.

    pip install 'puna[jax]'
    python examples/model_parallel.py --preset hf://meta-llama/Llama-3.1-8B-Instruct

It takes as many devices as the mesh has. To try it on a CPU:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/model_parallel.py \
        --preset hf://HuggingFaceTB/SmolLM2-135M-Instruct

Or two processes of four devices each, as on two hosts (docs/hosts.md has the launch lines of SLURM,
Kubernetes and TPU pods):

    python -m puna.launch --processes 2 --cpu-devices 4 examples/model_parallel.py --hosts \
        --preset hf://HuggingFaceTB/SmolLM2-135M-Instruct

The article: https://huggingface.co/blog/keras-llama-32
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # the only one with model parallelism

import keras

import puna
from puna.tuning import TextData, read_rows

LLAMA = "hf://meta-llama/Llama-3.1-8B-Instruct"
PIRATE = Path(__file__).parent / "pirate" / "dialogues.jsonl"

# The map of `Llama3Backbone.get_layout_map`, in one's own words. A matrix is (out, in); adapters,
# quantized numbers and scales follow the matrix that they belong to.
RULES = {
    "embed_tokens/weight": ("model", None),
    "lm_head/weight": ("model", None),
    "self_attn.*(q_proj|k_proj|v_proj).weight": ("model", None),
    "self_attn.*o_proj.weight": (None, "model"),
    "(gate_proj|up_proj).weight": ("model", None),
    "down_proj.weight": (None, "model"),
}


def main(preset: str, mesh: tuple[int, int], directory: str, new_tokens: int, rows: int) -> None:
    devices = keras.distribution.list_devices()[: mesh[0] * mesh[1]]
    device_mesh = keras.distribution.DeviceMesh(mesh, ["batch", "model"], devices)
    ask = {"max_new_tokens": new_tokens, "sampler": "greedy", "strip_prompt": True}

    title("The default layout map")
    layout_map = puna.models.Llama3Backbone.get_layout_map(device_mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    # Every device gets its own shards out of the files, and nothing else.
    # `from_preset(preset, mesh=(2, 4))` does these four steps by itself.
    model = puna.models.Llama3CausalLM.from_preset(preset, dtype="bfloat16")
    for name in ("q_proj", "o_proj"):
        weight = getattr(model.backbone.transformer_layers[0].self_attn, name).weight
        show(name, tuple(weight.shape), "of which a device has", shard_shape(weight))
    show("A:", model.generate("Q: Aye there! A:", **ask))
    del model

    title("A layout map of one's own")
    layout_map = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in RULES.items():
        layout_map[pattern] = axes
    distribution = keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    model = puna.models.Llama3CausalLM.from_preset(preset, dtype="bfloat16")
    show("A:", model.generate("Q: Aye there! A:", **ask))

    title("Fine-tuning")
    model.enable_lora(rank=8)
    model.compile(optimizer=keras.optimizers.Adam(2e-3))
    data = TextData(read_rows(PIRATE)[:rows], packing=True, sequence_length=256)
    history = model.fit(data, batch_size=4, epochs=1)
    show("loss:", round(history.history["loss"][-1], 4))

    title("Saving")
    # The files are those of any model, whatever devices it was on.
    model.save_to_preset(directory)
    again = puna.models.CausalLM.from_preset(directory)
    show("A:", again.generate("Q: Aye there! A:", **ask))


def shard_shape(variable: keras.Variable) -> tuple[int, ...]:
    """The shape of what one device has of a variable."""
    return tuple(variable.value.addressable_shards[0].data.shape)


def title(text: str) -> None:
    show(f"\n== {text} ==")


def show(*values: object) -> None:
    if puna.distribution.is_first_process():
        print(*values, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The article's last section, with Puna.")
    parser.add_argument("--preset", default=LLAMA, help=f"default: {LLAMA}")
    parser.add_argument("--mesh", default="2,4", help="devices for rows, and for weights")
    parser.add_argument("--directory", default="pirate-llama", help="where to save")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rows", type=int, help="dialogues to learn from; default: all")
    parser.add_argument("--hosts", action="store_true", help="this is one of several processes")
    arguments = parser.parse_args()
    if arguments.hosts:
        puna.distribution.initialize()
    batch, model_axis = map(int, arguments.mesh.split(","))
    main(
        arguments.preset,
        (batch, model_axis),
        arguments.directory,
        arguments.new_tokens,
        arguments.rows,
    )
