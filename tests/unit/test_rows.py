"""Rows of every kind, from lists, files and data sets, and what is said of bad ones."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from puna.errors import DataError
from puna.testing import tiny_tokenizer
from puna.text.preprocessor import CausalLMPreprocessor
from puna.tuning import Rows, TextData, read_rows
from puna.tuning.rows import Chat, Completion, RowError, Text, read_row
from puna.tuning.sources import all_rows, holds_rows

pytestmark = pytest.mark.backend_free

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
CHAT = Chat([HI, HELLO])

KINDS = {
    "text": ("Hi", Text("Hi")),
    "bytes": (b"Hi", Text("Hi")),
    "a text in a mapping": ({"text": "Hi", "id": 3}, Text("Hi")),
    "prompt": ({"prompt": "Hi", "completion": " you"}, Completion("Hi", " you")),
    "messages": ({"messages": [HI, HELLO]}, CHAT),
    "messages with nothing": ({"messages": [{**HI, "name": None}, HELLO], "tools": None}, CHAT),
    "messages as JSON": ({"messages": json.dumps([HI, HELLO])}, CHAT),
    "messages in two parts": ({"prompt": [HI], "completion": [HELLO]}, Chat([HI, HELLO], start=1)),
    "tools": ({"messages": [HI, HELLO], "tools": [{"a": 1}]}, Chat([HI, HELLO], [{"a": 1}])),
    "weights": (
        {"messages": [HI, {**HELLO, "weight": 0}]},
        Chat([HI, HELLO], muted=frozenset({1})),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        CHAT,
    ),
    "sharegpt with a system": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "GPT", "value": "Hello"}],
        },
        Chat([{"role": "system", "content": "Be kind."}, HI, HELLO]),
    ),
    "sharegpt with roles": ({"conversations": [HI, HELLO]}, CHAT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    row, form = KINDS[kind]
    assert read_row(row) == form


def test_alpaca():
    form = read_row({"instruction": "Add.", "input": "2 2", "output": "4", "text": "..."})
    assert form.messages == [
        {"role": "user", "content": "Add.\n\n2 2"},
        {"role": "assistant", "content": "4"},
    ]
    assert form.plain.completion == "4"
    assert form.plain.prompt.endswith("### Input:\n2 2\n\n### Response:\n")
    without = read_row({"instruction": "Sing.", "input": "", "output": "La"})
    assert without.messages[0]["content"] == "Sing."
    assert "Input" not in without.plain.prompt
    assert read_row({"instruction": "Sing.", "output": "La"}) == without


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, "a row is int 5; expected text"),
        (None, "expected text"),
        (b"\xff", "not UTF-8"),
        ({}, r"it has the keys \[\]; expected text; messages"),
        ({"prompt": "Hi"}, r"it has the keys \['prompt'\]"),
        ({"text": 5}, "text is int 5"),
        ({"prompt": "Hi", "completion": None}, r"keys \['prompt'\]"),
        ({"prompt": "Hi", "completion": [HELLO]}, "completion is list"),
        ({"messages": []}, "expected a list that is not empty"),
        ({"messages": "Hi"}, "messages is str 'Hi'"),
        ({"messages": ["Hi"]}, "message 0 of messages has no role: str 'Hi'"),
        ({"messages": [HI, {"role": "assistant"}]}, "message 1 of messages has no content"),
        ({"conversations": [{"from": "human"}]}, "turn 0 of conversations is not"),
        ({"conversations": [{"from": "cat", "value": "Meow"}]}, "from str 'cat'; expected one of"),
        (HI, "a single message; expected a whole chat"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(RowError, match=message):
        read_row(row)


def test_bad_rows_are_reported_together():
    with pytest.raises(DataError) as error:
        TextData(["Hi", 5, {"no": 1}, *[None] * 20])
    lines = str(error.value).splitlines()
    assert lines[0].startswith("22 rows cannot be used")
    assert lines[1] == "  row 1: a row is int 5; expected text"
    assert lines[2].startswith("  row 2: it has the keys ['no']")
    assert len(lines) == 7
    assert lines[-1] == "  and 17 more"


# Files


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


ROWS = [{"prompt": "Hi, ü", "completion": 'there\n"you"'}, {"prompt": "", "completion": "a,b"}]


def test_json_lines(tmp_path):
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    for name in ("a.jsonl", "b.NDJSON"):
        rows = read_rows(write(tmp_path / name, f"\ufeff{lines}\n"))
        assert list(rows) == ROWS
        assert rows.where(1) == f"{tmp_path / name}, line 3"


def test_json(tmp_path):
    rows = read_rows(str(write(tmp_path / "a.json", json.dumps(ROWS))))
    assert list(rows) == ROWS
    assert rows.where(1).endswith("a.json, row 2")


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", "excel"), ("a.tsv", "excel-tab")])
def test_csv(tmp_path, name, dialect):
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], dialect=dialect)
        writer.writeheader()
        writer.writerows(ROWS)
    rows = read_rows(path)
    assert list(rows) == ROWS
    assert [rows.where(0), rows.where(1)] == [f"{path}, line 2", f"{path}, line 4"]


def test_a_long_field_of_a_csv_file(tmp_path):
    text = "a" * 300_000
    assert read_rows(write(tmp_path / "a.csv", f"text\n{text}\n"))[0]["text"] == text
    assert csv.field_size_limit() == 131072


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [HI, HELLO]}, {"messages": [HI, {**HELLO, "name": "A"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert read_row(found[0]) == CHAT
    assert found.where(1).endswith("a.parquet, row 2")
    table = pyarrow.Table.from_pylist(ROWS)
    assert holds_rows(table)
    assert list(all_rows(table)) == ROWS
    parquet.write_table(pyarrow.Table.from_pylist([{"id": 1}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 1: it has the keys \['id'\]"):
        read_rows(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rows(write(tmp_path / "c.parquet", "no"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"puna\[train\]"):
        read_rows(write(tmp_path / "a.parquet", ""))


def test_bad_lines_are_reported_with_file_and_line(tmp_path):
    good = write(tmp_path / "good.jsonl", '"Hi"\n')
    bad = write(tmp_path / "bad.jsonl", '"Hi"\n{"text": 1}\n\n{"text"\n{"txt": ""}\n')
    with pytest.raises(DataError) as error:
        read_rows(good, bad)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 rows cannot be used")
    assert lines[1] == f"  {bad}, line 2: text is int 1; expected text"
    assert lines[2].startswith(f"  {bad}, line 4: it is not JSON (Expecting ':' delimiter")
    assert lines[3].startswith(f"  {bad}, line 5: it has the keys ['txt']")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "Hi", "ends in one of .jsonl"),
        ("a.json", "{}", "holds a dict; expected a list"),
        ("a.json", '{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("a.csv", 'text\n"a"b\n', "line 2: it is not CSV"),
        ("a.csv", "prompt,completion\na\n", r"line 2: it has 1 fields; the first line names"),
        ("a.csv", "a,b\n1,2\n", r"line 2: it has the keys \['a', 'b'\]"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, text))


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_bytes(b'"\xff"\n"Hi"\n')
    with pytest.raises(DataError, match="line 1: it is not JSON"):
        read_rows(tmp_path / "a.jsonl")


def test_rows_can_be_cut_into_parts_that_know_their_places(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", '"a"\n"b"\n"c"\n'))
    last = rows[1:]
    assert isinstance(last, Rows)
    assert list(last) == ["b", "c"]
    assert last.where(1).endswith("line 3")
    assert list(TextData(last).rows) == ["b", "c"]


# Other sources


def test_sources(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)))
    columns = {name: [row[name] for row in ROWS] for name in ("prompt", "completion")}

    def rows():
        yield from ROWS

    class Set:
        """As Hugging Face's and grain's data sets."""

        def __len__(self):
            return 2

        def __getitem__(self, place):
            return ROWS[place]

    sources = [path, [path], ROWS, tuple(ROWS), np.array(ROWS), columns, rows(), iter(ROWS), Set()]
    sources += [iter([ROWS[:1], ROWS[1:]]), iter([columns])]
    for source in sources:
        assert list(all_rows(source)) == ROWS, source
    for source in (path, ROWS, tuple(ROWS), np.array(ROWS), columns, Set()):
        assert holds_rows(source)
    assert list(all_rows(np.array(["a", "b"]))) == ["a", "b"]
    assert list(all_rows(iter([(["a", "b"],), (["c"], None)]))) == ["a", "b", "c"]


def test_what_is_not_rows():
    for data in (
        np.zeros((2, 3)),
        {"token_ids": np.zeros((2, 3))},
        ({"token_ids": np.zeros((2, 3))}, np.zeros((2, 3))),
        [],
        [1, 2],
        None,
        np.array([]),
        np.array(5),
    ):
        assert not holds_rows(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("train.jsonl", "is one text; expected rows. For a file pass pathlib.Path"),
        ([], "has no rows"),
        ({"train": (x for x in ()), "test": (x for x in ())}, r"such as dataset\['train'\]"),
        ({"text": ["a"], "id": [1, 2]}, "different numbers of rows"),
        (iter([(["a"], 1)]), "labels or weights"),
        (5, "cannot be gone through"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(DataError, match=message):
        all_rows(source)


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    assert holds_rows(dataset)
    assert list(all_rows(dataset)) == ROWS
    assert list(all_rows(dataset.to_iterable_dataset())) == ROWS
    chats = datasets.Dataset.from_list([{"messages": [HI, HELLO]}])
    assert read_row(all_rows(chats)[0]) == CHAT
    assert list(all_rows(dataset["prompt"])) == [row["prompt"] for row in ROWS]
    parts = datasets.DatasetDict({"train": dataset})
    assert holds_rows(parts)
    with pytest.raises(DataError, match=r"dataset\['train'\]"):
        all_rows(parts)


def test_grain_data_sets():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(ROWS)
    assert holds_rows(dataset)
    assert list(all_rows(dataset)) == ROWS
    assert list(all_rows(dataset.to_iter_dataset())) == ROWS
    texts = grain.MapDataset.source(["a", "b", "c"]).batch(2)
    assert list(all_rows(texts)) == ["a", "b", "c"]
    with pytest.raises(DataError, match="has no end"):
        all_rows(dataset.repeat())


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert holds_rows(frame)
    assert list(all_rows(frame)) == ROWS


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": "user"}, "loss_on is 'user'; expected one of 'auto', 'all'"),
        ({"long": "wrap"}, "long is 'wrap'; expected one of 'cut', 'drop', 'refuse'"),
        ({"sequence_length": 1}, "sequence_length is 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TextData(["Hi"], **options)


def test_long_rows_are_cut_dropped_or_refused():
    preprocessor = CausalLMPreprocessor(tiny_tokenizer(), sequence_length=4)
    rows = ["Hi", "Hello world you are the", {"prompt": "the system", "completion": " Hi"}]
    rows.append({"prompt": "the system user you are", "completion": " Hi"})
    found = TextData(rows).examples(preprocessor)
    assert (len(found.examples), found.cut, found.dropped, found.empty) == (3, 1, 0, 1)
    # a text keeps its end token, a completion loses its end
    assert found.examples[1].ids[-1] == preprocessor.tokenizer.end_token_id
    assert len(found.examples[1]) == 4
    found = TextData(rows, long="drop").examples(preprocessor)
    assert (len(found.examples), found.cut, found.dropped) == (2, 0, 2)
    with pytest.raises(DataError, match="row 1: it has 7 tokens, and the sequence length takes 5"):
        TextData(rows, long="refuse").examples(preprocessor)
    assert (
        len(TextData(rows, long="refuse", sequence_length=9).examples(preprocessor).examples) == 4
    )
    with pytest.raises(DataError, match="none of the 1 rows is left"):
        TextData(rows[3:], long="drop").batches(preprocessor)
