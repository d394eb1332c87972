"""The data of `examples/pirate`: readable, in pirate speech, and without the questions asked."""

import importlib
import json
import re
from pathlib import Path

import pytest

from puna.tuning import read_rows

pytestmark = pytest.mark.backend_free

PIRATE = Path(__file__).parents[2] / "examples" / "pirate"
QUESTIONS = json.loads((PIRATE / "questions.json").read_text(encoding="utf-8"))
# Words that a question may share with any other.
COMMON = set(
    re.findall(
        r"\w+",
        "a an the is are was were be do does did i my me you your it to of for in on at and or "
        "what how why who which when where can should that with from",
    )
)


@pytest.fixture(scope="module")
def word_test():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PIRATE)
        yield importlib.import_module("word_test")


def said(role: str, *names: str) -> list[str]:
    """What a role says in the files."""
    rows = [row for name in names for row in read_rows(PIRATE / name)]
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == role]


def overlap(one: str, other: str) -> float:
    """Shared words of two questions, as a part of the words of both."""
    a, b = (set(re.findall(r"[\w']+", text.lower())) - COMMON for text in (one, other))
    return len(a & b) / max(len(a | b), 1)


def test_size_and_roles():
    assert 300 <= len(read_rows(PIRATE / "dialogues.jsonl")) <= 400
    assert len(read_rows(PIRATE / "held_out.jsonl")) == 40
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 10
    for name in ("dialogues.jsonl", "held_out.jsonl"):
        for row in read_rows(PIRATE / name):
            roles = [message["role"] for message in row["messages"]]
            assert roles[roles[0] == "system" :] in (
                ["user", "assistant"],
                ["user", "assistant"] * 2,
            )


def test_every_answer_is_short_and_in_pirate_speech(word_test):
    for answer in said("assistant", "dialogues.jsonl", "held_out.jsonl"):
        assert word_test.is_pirate(answer), answer
        assert 12 <= len(answer.split()) <= 45, answer


def test_no_question_or_answer_occurs_twice():
    for role in ("user", "assistant"):
        texts = [
            " ".join(t.lower().split()) for t in said(role, "dialogues.jsonl", "held_out.jsonl")
        ]
        assert len(texts) == len(set(texts))


def test_the_ten_questions_are_not_in_the_data():
    for question in QUESTIONS:
        for other in said("user", "dialogues.jsonl", "held_out.jsonl"):
            assert overlap(question, other) < 0.5, (question, other)


def test_held_out_questions_are_not_in_the_training_data():
    """First questions: a second one such as "What does it eat?" means nothing by itself."""
    for row in read_rows(PIRATE / "held_out.jsonl"):
        question = next(turn["content"] for turn in row["messages"] if turn["role"] == "user")
        for other in said("user", "dialogues.jsonl"):
            assert overlap(question, other) <= 0.5, (question, other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ARRRR, ye   landlubber!", {"arr", "ye", "landlubber"}),
        ("Ahoy, me\nhearties! Ye’ll see.", {"ahoy", "me hearties", "ye"}),
        ("Yes, they use an array in your yearly layer.", set()),
        ("The captain sailed his ship across the sea for gold.", set()),
        ("Aye! Aye, aye.", {"aye"}),
    ],
)
def test_words_are_whole_and_count_once(word_test, text, words):
    assert word_test.pirate_words(text) == words
    assert word_test.is_pirate(text) == (len(words) >= 2)
