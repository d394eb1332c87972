"""A model on eight devices does what it does on one; see `tests/meshes.py`, which has the eight."""

import re

import pytest

from puna.errors import BackendError
from puna.models import CausalLM, Llama3Backbone
from puna.testing import write_tiny_preset
from tests.hosts import LAUNCH
from tests.meshes import MESHES, SHAPE, eight_devices, seen
from tests.processes import ROOT, run

# The devices are JAX's in processes of their own, whatever the tests run on.
pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def quick():
    """What compiles little."""
    return seen("places", "places_of_1b", "loading", "saving", "arguments", "maps", "moved")


def model_axis(mesh):
    return mesh[1]


@pytest.mark.parametrize(
    ("mesh", "mode"),
    [*((mesh, mode) for mesh in MESHES for mode in (None, "int8")), ((2, 4), "int4")],
)
def test_every_matrix_is_cut_and_what_belongs_to_it_with_it(quick, mesh, mode):
    found = quick["places"][f"{mesh} {mode}"]
    scales = 0
    for path, axes in found["axes"].items():
        *_, layer, part = path.removesuffix("/default/weight").split("/")
        is_input = layer in ("o_proj", "down_proj")
        if part in ("weight", "weight_packed") and len(axes) == 2:
            assert axes == ([None, "model"] if is_input else ["model", None]), path
        elif part == "lora_A":
            assert axes == ([None, "model"] if is_input else [None, None]), path
        elif part == "lora_B":
            assert axes == ([None, None] if is_input else ["model", None]), path
        elif part == "weight_scale":
            scales += 1
            # A row's scale is of all of its inputs; groups of them have one each.
            assert axes[0] == (None if is_input else "model"), path
            if mode == "int4" and layer == "down_proj":
                assert axes[1] == "model"
        else:
            assert axes == [None], path
    assert bool(scales) == (mode is not None)
    if mode is None:  # norms and scales are a large part of a tiny quantized model
        assert found["largest"] <= 1.1 * found["total"] / model_axis(mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_of_a_1b_model_each_device_has_its_share(quick, mesh):
    found = quick["places_of_1b"][str(mesh)]
    whole = [path for path, axes in found["axes"].items() if "model" not in axes]
    assert all("norm" in path for path in whole)
    assert len(whole) == 2 * 16 + 1
    assert found["largest"] <= 1.001 * found["total"] / model_axis(mesh)


CASES = ["plain", "two copies", "other dtype", "int8 on load", "packed", "gguf"]


@pytest.mark.parametrize("case", CASES)
def test_each_byte_is_read_once_and_put_where_it_stays(quick, case):
    found = quick["loading"][case]
    in_file = found["tensors"] / (2 if case == "other dtype" else 1)  # bfloat16 to float32
    assert found["read"] == in_file
    assert found["put"] == found["held"]
    assert found["largest put"] == found["largest shard"] < found["tensors"] / 8
    assert found["same"]


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_what_is_saved_is_what_one_device_saves(quick, kind):
    assert quick["saving"][kind]
    assert quick["saving"][f"{kind} kept nothing"]  # no second copy stays in memory


def test_one_argument_makes_the_mesh(quick):
    found = quick["arguments"]
    assert found["2, 4"] == found["again"] == [2, 4]
    assert found["auto"] == [8, 1]
    assert found["backbone"] == ["model", None]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("another", ["(4, 2)", "(2, 4)", "set_distribution(None)"]),
        ("too many", ["16", "8", "xla_force_host_platform_device_count=16"]),
        ("both", ["mesh=(2, 4)", "sharding='auto'"]),
        ("one number", ["8", "(2, 4)"]),
        ("missing", ["no preset"]),
    ],
)
def test_arguments_that_cannot_be_are_refused(quick, name, words):
    assert all(word in quick["arguments"][name] for word in words), quick["arguments"][name]


@pytest.mark.parametrize("case", ["to many", "to one"])
def test_a_model_stays_on_the_devices_that_it_was_made_for(quick, case):
    assert "set keras.distribution before the model is made" in quick["moved"][case]


def test_a_failed_load_leaves_no_distribution(quick):
    assert quick["arguments"]["after"]


def test_the_automatic_mesh_has_as_many_copies_as_fit(quick):
    found = quick["arguments"]
    assert (found["fits"], found["fits on four"], found["fits on none"]) == ([8, 1], [2, 4], [1, 8])


def test_a_map_of_ones_own_is_followed_as_the_article_writes_it(quick):
    found = quick["maps"]["own"]
    assert found["warnings"] == []
    assert found["axes"]["model/layers_1/self_attn/k_proj/weight"] == ["model", None]
    assert found["axes"]["model/layers_1/mlp/down_proj/weight"] == [None, "model"]


def test_what_no_rule_cuts_and_rules_for_nothing_are_named(quick):
    told = " ".join(quick["maps"]["partial"]["warnings"])
    for name in ("model.embed_tokens", "mlp.down_proj (2)", "lm_head", "'.*nothing/weight'"):
        assert name in told
    assert "q_proj" not in told.split("such as")[0]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("keras-hub", ["token_embedding/embeddings", "embed_tokens/weight"]),
        ("rank 3", ["query|key|value", "self_attn/(q|k|v)_proj/weight"]),
        ("twice", ["2 rules", "'.*q_proj/weight'", "'.*_proj/weight'"]),
        ("wrong rank", ["('model',)", "2 axes"]),
    ],
)
def test_maps_that_cannot_be_meant_are_refused(quick, case, words):
    assert all(word in quick["maps"][case]["error"] for word in words), quick["maps"][case]


def test_a_rule_for_a_whole_path_goes_before_one_for_a_part(quick):
    axes = quick["maps"]["narrower"]["axes"]
    assert axes["model/layers_0/self_attn/q_proj/weight"] == [None, "model"]
    assert axes["model/layers_0/self_attn/k_proj/weight"] == ["model", None]


def test_heads_are_never_cut(quick):
    found = quick["maps"]["odd heads"]
    cut = {path: axes for path, axes in found["axes"].items() if "model" in axes}
    assert not any("self_attn" in path for path in cut)
    assert len(cut) == 2 * 3 + 2  # the feed-forward, and the vocabulary
    [told] = found["warnings"]
    assert "9 query heads" in told
    assert "3 key/value heads" in told


def close(found):
    assert found["logits"] <= 1e-4
    assert found["tokens"]
    assert found["loss"] <= 1e-4
    assert found["gradients"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "parity",
        "parity_odd_heads",
        *(
            pytest.param(f"parity_{kind}", marks=pytest.mark.soak)  # half a minute each
            for kind in ("elsewhere", "lora", "int8", "int4", "shared_heads", "fsdp")
        ),
    ],
)
def test_logits_tokens_loss_and_gradients_are_those_of_one_device(name):
    found = seen(name)[name]
    for mesh in found.values():
        close(mesh)


@pytest.mark.slow
def test_half_precision_is_looked_up_right():
    found = seen("parity_bfloat16")["parity_bfloat16"]
    # Sums of eight parts round otherwise; a wrong row would be as far off as the logits are large.
    assert found["logits"] <= 0.02 * found["size"]


@pytest.mark.slow
def test_weights_are_drawn_as_one_device_draws_them():
    assert seen("random")["random"]["apart"] <= 1e-6


@pytest.mark.slow
def test_batches_that_do_not_divide_are_filled_up_and_count_the_same():
    found = seen("uneven")["uneven"]
    assert found["rows"] == 5
    assert found["apart"] <= 1e-3  # of logits after training
    for name, wanted in found["wanted"].items():
        assert found["found"][name] == pytest.approx(wanted, abs=1e-4), name


@pytest.mark.slow
def test_streams_chats_and_kept_prompts_say_the_same():
    found = seen("talking")["talking"]
    assert found["mesh"] == found["one"]


@pytest.mark.slow
def test_a_token_gathers_no_weight_and_sums_twice_a_layer():
    found = seen("decode_step")["decode_step"]
    for kind in ("plain", "int8", "int4", "lora"):
        assert found[f"{kind} cache"] == [None, "model"]
        inside = [what for what, _, is_inside in found[kind] if is_inside]
        outside = [what for what, _, is_inside in found[kind] if not is_inside]
        assert inside == ["all-reduce"] * 2 * 3
        # The rows of the embedding, with their scales if it is quantized, and the logits.
        rows = 2 if kind.startswith("int") else 1
        assert sorted(outside) == ["all-gather"] + ["all-reduce"] * rows
        # Of one row: no weight has a first axis of 1.
        assert all(shape.endswith("[1") for _, shape, _ in found[kind])


@pytest.mark.slow
def test_with_fsdp_a_step_gathers_each_matrix_once_and_nothing_else():
    for step in seen("fsdp_step")["fsdp_step"].values():
        assert len(step["planned"]) >= 7 * 3 + 1
        assert step["gathered"] == step["planned"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_articles_section_runs(tmp_path, processes):
    shape = SHAPE | {"num_hidden_layers": 1, "max_position_embeddings": 512}
    preset = write_tiny_preset(tmp_path / "llama", **shape)
    script = [str(ROOT / "examples" / "model_parallel.py"), "--preset", str(preset)]
    script += ["--directory", str(tmp_path / "pirate"), "--new-tokens", "4", "--rows", "4"]
    both = [*LAUNCH, *script, "--hosts"]
    done = run(script, eight_devices()) if processes == 1 else run(both)
    assert done.status == 0, done.err
    assert "Warning" not in done.err
    assert not re.search(r"^\[1\] \S", done.out, re.MULTILINE)  # the first speaks for both
    out = done.out.replace("[0] ", "")
    parts = re.split(r"^== (.*) ==$", out, flags=re.MULTILINE)
    said = dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))
    first, own = said["The default layout map"], said["A layout map of one's own"]
    assert "o_proj (64, 64) of which a device has (64, 16)" in first
    assert first.splitlines()[-1] == own
    assert "loss:" in said["Fine-tuning"]
    assert CausalLM.from_preset(tmp_path / "pirate").config.hidden_size == 64


@pytest.mark.parametrize("asked", [{"mesh": (2, 4)}, {"sharding": "auto"}])
def test_other_backends_say_at_once_what_to_do(asked):
    with pytest.raises(BackendError, match="KERAS_BACKEND=jax"):
        CausalLM.from_preset("nowhere", **asked)
    with pytest.raises(BackendError, match="KERAS_BACKEND=jax"):
        Llama3Backbone.from_preset("nowhere", **asked)
    with pytest.raises(BackendError, match="KERAS_BACKEND=jax"):
        Llama3Backbone.get_layout_map(None)
