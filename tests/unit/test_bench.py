"""`puna bench` on a tiny preset, and the scripts in benchmarks/ that need no peers.

What they measure is never tested, only that they measure what they say and tell it right.
"""

import csv
import io
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import decode, gguf_file, questions, report
from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.safetensors import SafetensorsSource
from puna.cli import bench_run
from puna.cli.app import app
from puna.testing import write_tiny_preset

pytestmark = pytest.mark.backend_free

QUICK = ("--prompt", "8", "--new", "4", "--repetitions", "2")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_tiny_preset(tmp_path_factory.mktemp("preset") / "tiny")


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="puna")


# The verb


def test_json_has_a_result_for_each_case_and_says_where_it_ran(preset):
    result = bench(preset, *QUICK, "--batch", "2", "--depth", "0,16", "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = [(r["test"], r["batch"]) for r in found["results"]]
    assert names == [("pp8", 2), ("tg4", 2), ("pp8 @ d16", 2), ("tg4 @ d16", 2)]
    first = found["results"][0]
    assert len(first["seconds"]) == 2
    assert first["slowest"] <= first["tokens_per_second"] <= first["fastest"]
    assert found["backend"] in found["versions"]
    assert {"puna", "keras", "numpy", "python"} <= set(found["versions"])
    assert found["weights_bytes"] == 4 * found["parameters"]
    assert found["dtype"] == "float32"
    assert found["load_seconds"] > 0
    assert found["cores"] >= 1
    assert "peak_memory_bytes" in found
    assert found["device"] != "unknown"


def test_csv_has_all_facts_in_each_row(preset):
    result = bench(preset, *QUICK, "--format", "csv", "--dtype", "bfloat16")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["test"] for row in rows] == ["pp8", "tg4"]
    for row in rows:
        assert row["dtype"] == "bfloat16"
        assert "keras=" in row["versions"]
        assert len(row["seconds"].split()) == 2


def test_the_table_is_plain_where_it_is_piped(preset):
    result = bench(preset, "--prompt", "8", "--new", "0", "-r", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["preset", str(preset)]
    assert lines[-1].split()[0] == "pp8"
    assert all(line == line.rstrip() for line in lines)


def test_random_weights_need_a_config_alone(preset, tmp_path):
    (tmp_path / "config.json").write_bytes((preset / "config.json").read_bytes())
    result = bench(tmp_path, *QUICK, "--random-weights", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["random_weights"] is True
    assert bench(tmp_path, *QUICK).exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "many"),
        ("--prompt", "-1"),
        ("--batch", "0"),
        ("--depth", ""),
        ("--prompt", "0", "--new", "0"),
        ("--repetitions", "0"),
        ("--format", "xml"),
        ("--random-weights", "--adapter", "x"),
    ],
)
def test_wrong_usage_is_exit_code_2(preset, arguments):
    result = bench(preset, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_what_does_not_fit_is_told_before_any_time_is_spent(preset):
    result = bench(preset, *QUICK, "--depth", "250")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "pp8 @ d250 needs a context of 259 tokens, and the model has 256" in result.stderr
    assert "there is no preset" in bench(preset / "none").stderr


def test_help_has_examples():
    assert "  puna bench ./my-llama" in bench("--help").stdout


class Recorder:
    """A model that takes down what it is asked for."""

    class config:
        vocab_size = 100

    def __init__(self):
        self.calls = []

    def generate(self, rows, **settings):
        assert settings["stop_token_ids"] is None
        assert settings["sampler"] == "greedy"
        self.calls.append((len(rows), len(rows[0]), settings["max_new_tokens"], tuple(rows[0])))


@pytest.mark.parametrize(
    ("kind", "depth", "expected"),
    [
        ("pp", 0, [(2, 8, 1)]),
        ("pp", 5, [(2, 13, 1), (2, 5, 1)]),
        ("tg", 0, [(2, 1, 9), (2, 1, 1)]),
        ("tg", 5, [(2, 5, 9), (2, 5, 1)]),
    ],
)
def test_what_is_timed(kind, depth, expected):
    model = Recorder()
    case = bench_run.Case(kind=kind, tokens=8, batch=2, depth=depth)
    bench_run.measure(model, case, repetitions=2)
    assert [call[:3] for call in model.calls] == expected * 3  # the warm-up is the first
    if kind == "pp":
        assert len({call[3] for call in model.calls}) == len(model.calls)


def test_noise_is_no_speed():
    case = bench_run.Case(kind="tg", tokens=8, batch=1, depth=0)
    found = bench_run._rates(case, [-0.1, -0.2, 0.5])
    assert found["tokens_per_second"] is None
    assert found["slowest"] == 16
    found = bench_run._rates(case, [0.5, 1.0, 2.0])
    assert [found[n] for n in ("slowest", "tokens_per_second", "fastest")] == [4, 8, 16]


# benchmarks/


def test_the_gguf_file_holds_the_checkpoint(tmp_path):
    from puna.rope import RopeConfig

    rope = RopeConfig(
        rope_type="llama3",
        rope_theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    sizes = {"hidden_size": 64, "head_dim": 32, "num_key_value_heads": 4}
    checkpoint = write_tiny_preset(tmp_path / "tiny", dtype="bfloat16", rope=rope, **sizes)
    file = gguf_file.write_gguf(checkpoint, tmp_path / "tiny.gguf", "bfloat16")
    ours, theirs = SafetensorsSource(checkpoint), GGUFSource(file)
    assert set(theirs.names()) == set(ours.names())
    for name in ours.names():
        expected, found = (np.asarray(s.read(name), np.float32) for s in (ours, theirs))
        np.testing.assert_array_equal(found, expected)
    config = theirs.hf_config()
    assert config["rope_scaling"]["factor"] == pytest.approx(8)
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["tiny.gguf"]


def test_each_question_gives_the_figures_that_it_names():
    def ask(**request):
        made = [[1] * request.get("new", 0) for _ in request.get("prompts", [])]
        return {"seconds": 2.0, "tokens": made, "peak": 9, "weights": 5, "files": 3}

    shape = questions.Shape(vocab_size=50, new=64, context=256, token_bytes=4)
    for name, question in questions.QUESTIONS.items():
        asked = question(shape)
        answer = asked.measure(ask, 1)
        assert set(answer.figures) == {figure.name for figure in asked.figures}, name
        assert asked.about.endswith(".")
    assert questions.longest([questions.Context(shape)]) == 512
    assert shape.prompt(9, 1) != shape.prompt(9, 2)


def test_ratios_are_of_the_same_round_and_above_one_is_better():
    shape = questions.Shape(vocab_size=50, new=64, context=256, token_bytes=4)
    rows = {
        "a": [(10.0, 4.0), (30.0, 1.0), (math.nan, 9.0)],
        "b": [(5.0, 8.0), (10.0, 4.0), (5.0, 9.0)],
    }
    answers = {
        engine: [questions.Answer({"decode": d, "whole call": w}, [*range(20)]) for d, w in given]
        for engine, given in rows.items()
    }
    found = decode.summary(questions.Decode(shape), answers, "b")
    assert found["a"]["figures"]["decode"]["median"] == 20
    assert found["a"]["figures"]["decode"]["ratio"] == 2.5
    assert found["a"]["figures"]["decode"]["values"] == [10.0, 30.0, None]
    assert found["a"]["figures"]["whole call"]["ratio"] == 2
    assert found["b"]["figures"]["decode"]["ratio"] == 1
    assert found["a"]["tokens"] == [*range(8)]
    assert "ratio" not in decode.summary(questions.Decode(shape), answers, "c")["a"]["figures"]


def results():
    shape = questions.Shape(vocab_size=50, new=64, context=256, token_bytes=4)
    question = questions.Decode(shape)
    answers = {
        engine: [questions.Answer({"decode": speed, "whole call": 2.0}, [7, 8])]
        for engine, speed in (("puna-jax", 1234.5), ("transformers", 500.0))
    }
    given = decode.summary(question, answers, "transformers")
    given["llama.cpp"] = {"error": "a | b\nc"}
    figures = {f.name: {"unit": f.unit, "better": f.better} for f in question.figures}
    return {
        "benchmark": "decode",
        "date": "2026-01-02",
        "command": "python -m benchmarks.decode tiny",
        "checkpoint": "tiny",
        "dtype": "bfloat16",
        "rounds": 5,
        "fresh_rounds": 3,
        "baseline": "transformers",
        "machine": {"cpu": "a <fast> one", "cores": 2, "system": "Linux"},
        "engines": {
            "puna-jax": {"versions": {"puna": "0.1.0"}},
            "transformers": {"versions": {"transformers": "5"}},
            "keras-hub-jax": {"skipped": "keras_hub is not installed"},
        },
        "questions": {
            "decode": {
                "about": "How fast.",
                "baseline": "transformers",
                "figures": figures,
                "engines": given,
            }
        },
    }


def test_the_report_says_what_was_measured_and_where(tmp_path):
    file, out = tmp_path / "one.json", tmp_path / "README.md"
    file.write_text(json.dumps(results()))
    assert report.write_report([file], out) == [out, tmp_path / "one.svg"]
    text = out.read_text()
    for part in (
        "a <fast> one, 2 cores",
        "puna 0.1.0",
        "2026-01-02",
        "How fast. Baseline: transformers.",
        "`python -m benchmarks.decode tiny`",
        "| puna-jax | 1,234 (2.47×) | 2 (1.00×) | 7 8 |",
        "keras-hub-jax: left out: keras_hub is not installed",
        "failed: a \\| b c",
        "(one.svg)",
    ):
        assert part in text, part
    plot = ElementTree.fromstring((tmp_path / "one.svg").read_text())
    said = [element.text for element in plot.iter() if element.tag.endswith("text")]
    assert said == [
        "decode: decode, tokens/s (higher is better)",
        *("puna-jax", "1,234", "transformers", "500"),
    ]


def test_the_report_refuses_what_it_cannot_read(tmp_path):
    file = tmp_path / "one.json"
    for content in ("no JSON", "[]", '{"benchmark": "load"}'):
        file.write_text(content)
        with pytest.raises(SystemExit, match=r"one\.json"):
            report.write_report([file], tmp_path / "README.md")
    with pytest.raises(SystemExit, match="rename"):
        report.write_report([file, file], tmp_path / "README.md")
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_the_command_has_no_places_in_it():
    found = decode.command(["/home/me/llama", "--peer-python=keras-hub=/opt/bin/python", "--new"])
    assert found == "python -m benchmarks.decode llama --peer-python=keras-hub=python --new"
