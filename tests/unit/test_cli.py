"""The command line, in this process and in processes of its own, on tiny presets."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from puna.checkpoint.safetensors import SafetensorsSource, write_safetensors
from puna.cli import transcript
from puna.cli.app import app
from puna.cli.conversion import expected_shapes
from puna.cli.options import Sampling
from puna.errors import ConfigError
from puna.models import CausalLM
from puna.samplers import Sampler
from puna.testing import tiny_config, tiny_model, tiny_tokenizer, write_tiny_preset
from tests.processes import ROOT, result_of, run

# What is tested here is the same on every backend, whose own parity is tested elsewhere.
pytestmark = pytest.mark.backend_free

VERBS = ("chat", "generate", "info", "tokenize", "convert", "quantize", "perplexity")
GREEDY = ("--greedy", "--max-new-tokens", "5")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return str(write_tiny_preset(tmp_path_factory.mktemp("preset") / "tiny"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without a chat template."""
    tokenizer = tiny_tokenizer(chat_template=None)
    return str(write_tiny_preset(tmp_path_factory.mktemp("base") / "base", tokenizer=tokenizer))


def puna(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, prog_name="puna")


def error_of(result):
    """The one line on standard error; nothing went to standard output."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("puna: error: ")
    return line


# What all verbs have


@pytest.mark.parametrize("verb", [*VERBS, "fuse", "upload"])
def test_help_has_examples_and_exit_codes(verb):
    result = puna(verb, "--help")
    assert result.exit_code == 0
    assert f"  puna {verb} " in result.stdout
    assert "Exit codes: 0 done, 1 an error" in " ".join(result.stdout.split())


def test_version_and_python_m_puna():
    import puna as package

    done = run(["-m", "puna", "--version"])
    assert (done.status, done.out, done.err) == (0, f"puna {package.__version__}\n", "")


def test_starting_imports_nothing_heavy_and_takes_little():
    heavy = ["keras", "jax", "torch", "tensorflow", "numpy", "tokenizers", "huggingface_hub"]
    found = result_of(
        "import json, sys, time, puna.cli.app\n"
        f"print(json.dumps([[m for m in {heavy} if m in sys.modules], time.process_time()]))"
    )
    assert found[0] == []
    # 0.1 s on an idle core; what it takes on a busy one is more, and no fault of ours.
    assert found[1] < 0.6


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat",),
        ("nonsense",),
        ("generate", "x", "y", "--top-k", "-1"),
        ("generate", "x", "y", "--greedy", "--temperature", "1"),
        ("generate", "x", "y", "--dtype", "int3"),
        ("generate", "x", "--file", "/nowhere/at/all"),
        ("generate", "x", "y", "--top-p", "0"),
        ("generate", "x", "y", "--min-p", "1"),
        ("generate", "x", "y", "--repetition-penalty", "0"),
        ("generate", "x", "y", "--stop", ""),
        ("generate", "x", "y", "--logprobs", "3"),
        ("generate", "x", "y", "--json", "--logprobs", "65"),
        ("convert", "x"),
        ("convert", "x", "--out", "y", "--to", "gguf"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = puna(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("verb", VERBS)
def test_a_preset_that_is_not_there_is_one_line_and_exit_code_1(verb, tmp_path):
    (text := tmp_path / "text.txt").write_text("Hi")
    more = {"generate": ["Hi"], "tokenize": ["Hi"], "perplexity": ["--text", text]}
    more |= {name: ["--out", tmp_path / "out"] for name in ("convert", "quantize")}
    assert "there is no preset" in error_of(puna(verb, tmp_path / "none", *more.get(verb, [])))


def test_a_reader_that_leaves_early_is_no_error_to_tell(preset):
    command = f"{sys.executable} -m puna tokenize {preset} | head -n 1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, input="Hello " * 50_000, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("'<|begin_of_text|>'")
    assert done.stderr == ""


def test_the_reference_in_the_documents_is_current():
    path = Path(ROOT, "docs", "make_cli_reference.py")
    spec = importlib.util.spec_from_file_location("make_cli_reference", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    current = script.TARGET.read_text(encoding="utf-8")
    assert current == script.reference(), "run python docs/make_cli_reference.py"


# generate


def test_generate_takes_a_prompt_from_three_places(preset, tmp_path):
    model = CausalLM.from_preset(preset)
    expected = model.generate("Hello", max_new_tokens=5, sampler="greedy", strip_prompt=True)
    file = tmp_path / "prompt.txt"
    file.write_text("Hello\n")
    for result in (
        puna("generate", preset, "Hello", *GREEDY),
        puna("generate", preset, "--file", file, *GREEDY),
        puna("generate", preset, *GREEDY, stdin="Hello\n"),
    ):
        assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_generate_as_json(preset):
    result = puna("generate", preset, "Hello", "--json", *GREEDY)
    found = json.loads(result.stdout)
    assert found["prompt"] == "Hello"
    assert found["tokens"]["prompt"] == 2  # the start token is counted
    assert found["tokens"]["completion"] == len(found["tokens"]["completion_ids"]) == 5
    text = tiny_tokenizer().detokenize(found["tokens"]["completion_ids"], skip_special_tokens=True)
    assert found["text"] == text
    assert found["stop_reason"] == "length"
    assert found["timings"]["first_token_seconds"] <= found["timings"]["total_seconds"]


def test_generate_tells_how_likely_tokens_were(preset):
    found = json.loads(puna("generate", preset, "Hello", "--json", "--logprobs", 2, *GREEDY).stdout)
    assert [one["id"] for one in found["logprobs"]] == found["tokens"]["completion_ids"]
    for one in found["logprobs"]:
        assert len(one["top"]) == 2
        assert one["top"][0] == {name: one[name] for name in ("id", "text", "logprob")}
        assert one["top"][1]["logprob"] <= one["logprob"] <= 0
    assert "logprobs" not in json.loads(puna("generate", preset, "Hi", "--json", *GREEDY).stdout)


def test_a_stop_text_ends_it(preset):
    free = puna("generate", preset, "Hello", *GREEDY).stdout.removesuffix("\n")
    stops = ("--stop", "never there", "--stop", free[2:4])
    cut = free[: free.index(free[2:4])]
    assert puna("generate", preset, "Hello", *GREEDY, *stops).stdout == cut + "\n"
    found = json.loads(puna("generate", preset, "Hello", "--json", *GREEDY, *stops).stdout)
    assert (found["text"], found["stop_reason"]) == (cut, "stop")
    chat = puna("chat", preset, *GREEDY, stdin="Hello\n").stdout
    stopped = puna("chat", preset, *GREEDY, "--stop", chat[2:4], stdin="Hello\n").stdout
    assert stopped == chat[: chat.index(chat[2:4])] + "\n"


def test_generate_says_when_the_context_is_full(tmp_path):
    path = write_tiny_preset(tmp_path / "short", max_position_embeddings=16)
    result = puna("generate", path, "Hello there", "--temperature", "0")
    assert result.exit_code == 0
    assert "context of 16 tokens is full" in result.stderr
    found = json.loads(puna("generate", path, "Hello there", "--greedy", "--json").stdout)
    assert found["stop_reason"] == "context"
    assert found["tokens"]["prompt"] + found["tokens"]["completion"] == 16
    assert "prompt 0 has" in error_of(puna("generate", path, "Hello " * 20, "--greedy"))


def test_a_seed_makes_it_repeatable(preset):
    once, again, other = (
        puna("generate", preset, "Hi", "--seed", seed, "--max-new-tokens", "8").stdout
        for seed in (1, 1, 2)
    )
    assert once == again != other


def test_two_prompts_are_one_too_many(preset, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xff\xfe")
    assert puna("generate", preset, "Hi", "--file", file).exit_code == 2
    assert "not UTF-8" in puna("generate", preset, "--file", file).stderr


# Sampling


def test_sampling_is_the_flags_then_the_checkpoint_then_our_defaults():
    ours = Sampler(top_p=0.95, top_k=50, temperature=0.7)
    theirs = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert Sampling().sampler({}) == ours
    assert Sampling().sampler({"do_sample": False, "temperature": 0.1}) == ours
    assert Sampling().sampler(theirs) == Sampler(top_p=0.9, top_k=50, temperature=0.6)
    assert Sampling().sampler({"do_sample": True}) == Sampler(top_k=50)
    assert Sampling().sampler({"repetition_penalty": 1.2}) == ours.replace(repetition_penalty=1.2)
    chosen = Sampling(temperature=0.2, top_k=0, top_p=0.5, seed=3).sampler(theirs)
    assert chosen == Sampler(top_p=0.5, temperature=0.2, seed=3)
    assert Sampling(min_p=0.1).sampler(theirs) == Sampler(min_p=0.1, temperature=0.6)
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    assert Sampling(**penalties).sampler({}) == ours.replace(**penalties)
    assert Sampling(greedy=True, **penalties).sampler(theirs).form == "greedy"
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        Sampling().sampler({"do_sample": True, "temperature": "hot"})


# tokenize


def test_tokenize_shows_ids_and_pieces(preset):
    result = puna("tokenize", preset, "Hello world 🦙")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].endswith("'<|begin_of_text|>'")
    assert lines[1:3] == ["259  'Hello'", "273  ' world'"]
    assert lines[-1] == f"{len(lines) - 1} tokens"
    assert "\\xf0" in result.stdout


def test_tokenize_without_special_tokens_reads_them_as_text(preset):
    found = json.loads(puna("tokenize", preset, "--json", "--no-special", "<|eot_id|>").stdout)
    assert found["count"] == len(found["ids"]) == 10
    assert "".join(found["pieces"]) == "<|eot_id|>"
    found = json.loads(puna("tokenize", preset, "--json", stdin="<|eot_id|>").stdout)
    assert found["pieces"] == ["<|begin_of_text|>", "<|eot_id|>"]


# info


def test_info_as_json(preset):
    result = puna("info", preset, "--json", "--context", "100")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    model = tiny_model()
    count = sum(int(np.prod(v.shape)) for v in model.variables)
    assert found["parameters"] == count
    assert found["stored"]["F32"]["parameters"] == count
    assert found["context_length"] == 256
    assert found["template"] == {
        "names": ["default"],
        "style": "llama3",
        "characters": len(model.tokenizer.chat_template),
        "supports_system": True,
        "supports_tools": False,
    }
    assert [stop["token"] for stop in found["stop_tokens"]] == [
        model.tokenizer.id_to_token(i) for i in model.tokenizer.stop_token_ids
    ]
    a_token = 2 * 2 * 2 * 4 * 4  # K and V, layers, heads, head size, bytes
    assert found["memory"]["contexts"] == [
        {
            "tokens": 100,
            "kv_cache_bytes": 100 * a_token,
            "total_bytes": 4 * count + 100 * a_token,
        }
    ]
    names = {file["name"] for file in found["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_info_for_people_names_what_matters(preset):
    result = puna("info", preset)
    for word in ("Llama, 2 layers", "F32", "256 tokens", "llama3", "<|eot_id|>", "byte-level"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout


def test_info_of_real_gguf_needs_no_keras(smollm2_gguf):
    found = result_of(
        "import json, sys\n"
        "from puna.cli.app import app\n"
        "try: app(['info', sys.argv[1], '--json'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps([m for m in ('keras', 'jax', 'torch') if m in sys.modules]))",
        str(smollm2_gguf),
    )
    assert found == []


def test_info_goes_without_a_tokenizer(preset, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(Path(preset, name))
    result = puna("info", tmp_path, "--json")
    assert json.loads(result.stdout)["tokenizer"] is None
    assert result.stderr.startswith("puna: there is no tokenizer")


# convert


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 8},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ],
)
def test_the_expected_tensors_are_those_of_the_model(changes):
    model = tiny_model(**changes)
    shapes = {name: tuple(variable.shape) for name, variable in model.tensors().items()}
    assert expected_shapes(tiny_config(**changes)) == shapes


def test_convert_keeps_what_the_model_says(preset, tmp_path):
    out = tmp_path / "made" / "copy"
    result = puna("convert", preset, "--to", "hf", "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    one, other = CausalLM.from_preset(preset), CausalLM.from_preset(out)
    for a, b in zip(one.variables, other.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert other.tokenizer.chat_template == one.tokenizer.chat_template
    assert other.generation_config == one.generation_config
    assert other.config == one.config
    assert [path.name for path in out.parent.iterdir()] == ["copy"]


def test_convert_to_another_dtype(preset, tmp_path):
    assert puna("convert", preset, "--out", tmp_path / "a", "--dtype", "bfloat16").exit_code == 0
    before, after = SafetensorsSource(preset), SafetensorsSource(tmp_path / "a")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        expected = before.read(name).astype(after.info(name).dtype)
        assert after.info(name).stored == "BF16"
        np.testing.assert_array_equal(after.read(name), expected)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_convert_merges_an_adapter(preset, tmp_path):
    name, rank = "model.layers.1.self_attn.q_proj", 2
    numbers = np.random.default_rng(0)
    a, b = (numbers.normal(size=s).astype(np.float32) for s in ((rank, 16), (16, rank)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_safetensors(
        adapter / "adapter_model.safetensors",
        [
            (f"base_model.model.{name}.lora_{part}.weight", m.shape, m.dtype, lambda m=m: m)
            for part, m in (("A", a), ("B", b))
        ],
    )
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4}
    settings |= {"target_modules": r".*\.1\.self_attn\.q_proj", "base_model_name_or_path": preset}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    result = puna("convert", preset, "--adapter", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    before, after = SafetensorsSource(preset), SafetensorsSource(tmp_path / "merged")
    for key in before.names():
        change = 4 / rank * b @ a if key == f"{name}.weight" else 0
        np.testing.assert_allclose(after.read(key), before.read(key) + change, rtol=1e-5)


def test_a_failed_conversion_leaves_nothing(preset, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(preset).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    line = error_of(puna("convert", broken, "--out", tmp_path / "out"))
    assert "lacks model.layers.2" in line
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 33}))
    assert "config.json asks for" in error_of(puna("convert", broken, "--out", tmp_path / "out"))
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "does not" in error_of(puna("convert", broken, "--out", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_convert_never_writes_over_anything(preset, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not an empty directory" in error_of(puna("convert", preset, "--out", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# chat, without a terminal; tests/integration/test_cli_chat.py has one


def test_chat_answers_each_line_and_prints_the_answers_alone(preset):
    result = puna("chat", preset, *GREEDY, stdin='Hello\n\n"""Hi\nthere"""\n/quit\nnot read\n')
    assert result.exit_code == 0
    assert ">>>" not in result.output
    from puna.chat import ChatState

    chat = ChatState(CausalLM.from_preset(preset), sampler="greedy", max_new_tokens=5)
    answers = [chat.send_message("Hello"), chat.send_message("Hi\nthere")]
    assert result.stdout == "".join(answer + "\n" for answer in answers)


def test_chat_commands_save_and_load(preset, tmp_path):
    file = tmp_path / "talk.json"
    lines = f"/system Be brief.\nHello\n/save {file}\n/reset\n/stats\n/load {file}\n/stats\n/help\n"
    result = puna("chat", preset, *GREEDY, stdin=lines)
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][0]["content"] == "Be brief."
    assert saved["model"] == preset
    assert "of 256 tokens" in result.stderr
    assert "tokens/s" in result.stderr
    assert "0 reused" in result.stderr
    assert "loaded 3 messages" in result.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_a_message_may_begin_with_a_slash(preset):
    assert "there is no /nonsense" not in puna("chat", preset, *GREEDY, stdin="//nonsense\n").stderr
    assert "there is no /nonsense" in puna("chat", preset, *GREEDY, stdin="/nonsense\n").stderr


def test_a_base_model_does_not_chat(base):
    line = error_of(puna("chat", base, stdin="Hi\n"))
    assert "has no chat template" in line
    assert "puna generate" in line
    assert puna("generate", base, "Hi", *GREEDY).exit_code == 0


def test_overflow_is_an_error_or_said(tmp_path):
    path = write_tiny_preset(tmp_path / "short", max_position_embeddings=64)
    talk = "Hello there\n" * 8
    result = puna("chat", path, *GREEDY, stdin=talk)
    assert result.exit_code == 1
    assert "no longer fits in the context of 64 tokens" in result.stderr.splitlines()[-1]
    result = puna("chat", path, *GREEDY, "--on-overflow", "drop_oldest", stdin=talk)
    assert result.exit_code == 0
    assert result.stderr.count("turns are forgotten") >= 2


def test_a_transcript_is_read_strictly_and_written_over_its_own_kind_only(tmp_path):
    file = tmp_path / "talk.json"
    turns = [{"role": "user", "content": "Hi"}]
    transcript.save(file, "tiny", turns)
    transcript.save(file, "tiny", turns * 2)
    assert transcript.load(file) == turns * 2
    file.write_text(json.dumps(turns))
    assert transcript.load(file) == turns
    for content in ("no JSON", "{}", "[1]", '[{"role": "pirate", "content": "x"}]', "[" * 99_999):
        file.write_text(content)
        with pytest.raises(transcript.TranscriptError, match=r"talk\.json"):
            transcript.load(file)
        with pytest.raises(transcript.TranscriptError, match="left alone"):
            transcript.save(file, "tiny", turns)
        assert file.read_text() == content
    assert list(tmp_path.iterdir()) == [file]
