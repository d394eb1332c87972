"""`puna chat` at a terminal, on a real model: a scripted session."""

import json
import os
import re
import sys
import time

import pytest

from tests.processes import ROOT

pexpect = pytest.importorskip("pexpect", reason="there are no pseudo-terminals here")
if not hasattr(pexpect, "spawn"):
    pytest.skip("there are no pseudo-terminals here", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.backend_free]

PROMPT = ">>> "
# Loading, and compiling the first steps, on a machine that does other things too.
PATIENCE = 180
LONG = "Tell me a long story about a dragon and a princess, with many chapters."


class Terminal:
    """A session of `puna chat`."""

    def __init__(self, preset, home, *options):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PUNA_HISTORY": str(home / "history"),
            "TERM": "xterm",
            "COLUMNS": "100",
            "LINES": "40",
        }
        arguments = ["-m", "puna", "chat", str(preset), *options]
        self.process = pexpect.spawn(
            sys.executable,
            arguments,
            env=environment,
            cwd=str(ROOT),
            encoding="utf-8",
            timeout=PATIENCE,
            dimensions=(40, 100),
        )
        self.process.expect_exact(PROMPT)
        self.greeting = plain(self.process.before)

    def say(self, line):
        """Type a line; what was shown until the next prompt, without its echo."""
        self.process.sendline(line)
        self.process.expect_exact("\r\n")
        self.process.expect_exact(PROMPT)
        return plain(self.process.before).strip()

    def end(self):
        """The exit code, once it has left."""
        self.process.expect(pexpect.EOF)
        self.process.close()
        assert self.process.signalstatus is None
        return self.process.exitstatus


def plain(text):
    """What remains of a terminal's output without colours and cursor movements."""
    text = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", text).replace("\r\n", "\n")
    # The spinner's frames are drawn over.
    return re.sub(r"[\u2800-\u28ff] *", "", text).replace("\r", "")


@pytest.fixture
def open_chat(smollm2_gguf, tmp_path):
    opened = []

    def start(*options):
        opened.append(Terminal(smollm2_gguf, tmp_path, "--greedy", *options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.process.close(force=True)


def test_a_session(open_chat, tmp_path):
    chat = open_chat("--max-new-tokens", "60")
    assert "135 million parameters" in chat.greeting
    assert "context 8,192 tokens" in chat.greeting

    # Several lines make one message.
    chat.process.sendline('"""What is the capital')
    chat.process.expect_exact("... ")
    answer = chat.say('of France?"""')
    assert "Paris" in answer

    # It remembers.
    stats = chat.say("/stats")
    assert re.search(r"last answer +\d+ tokens, the first after [\d.]+ s, then [\d.]+ token", stats)
    used = int(re.search(r"context +([\d,]+) of 8,192 tokens", stats)[1].replace(",", ""))
    assert used > 30
    assert re.search(r"memory +[\d,]+ MB", stats)

    file = tmp_path / "talk.json"
    assert "saved 2 messages" in chat.say(f"/save {file}")
    saved = json.loads(file.read_text())["messages"]
    assert saved[0] == {"role": "user", "content": "What is the capital\nof France?"}
    assert saved[1]["content"] == answer

    assert "is set" in chat.say("/system You are a pirate.")
    assert chat.say("/system") == "You are a pirate."
    chat.say("/reset")
    assert "no answer yet" not in chat.say("/stats")
    assert "loaded 2 messages" in chat.say(f"/load {file}")
    assert "cannot be read" in chat.say("/load /nowhere/at/all.json")
    assert "there is no /dance" in chat.say("/dance")
    assert "/stats" in chat.say("/help")

    chat.process.sendline("/quit")
    assert chat.end() == 0
    history = (tmp_path / "history").read_text()
    assert "/system You are a pirate." in history


def test_answers_stream(open_chat):
    chat = open_chat("--max-new-tokens", "60")
    chat.say("Hi")  # compiles
    chat.process.sendline("Count from one to twenty.")
    chat.process.expect_exact("\r\n")
    pieces, ends = [], time.monotonic() + PATIENCE
    while PROMPT not in "".join(pieces) and time.monotonic() < ends:
        pieces.append(chat.process.read_nonblocking(4096, timeout=PATIENCE))
    said = [piece for piece in pieces if plain(piece).strip()]
    assert len(said) >= 10
    read, reused = re.search(
        r"its prompt +(\d+) tokens read, (\d+) reused", chat.say("/stats")
    ).groups()
    assert int(reused) > int(read) > 5
    chat.process.sendeof()
    assert chat.end() == 0


def test_an_answer_may_be_interrupted_and_is_kept(open_chat, tmp_path):
    chat = open_chat()
    chat.process.sendline(LONG)
    chat.process.expect_exact("\r\n")
    chat.process.expect(r"\w+ \w+ \w+ \w+ \w+")  # it has begun
    chat.process.sendintr()
    chat.process.expect_exact(PROMPT)
    assert "stopped; what was said is kept" in plain(chat.process.before)

    # The model goes on from what it said.
    file = tmp_path / "talk.json"
    chat.say(f"/save {file}")
    user, assistant = json.loads(file.read_text())["messages"]
    assert user["content"] == LONG
    assert 10 < len(assistant["content"]) < 20_000

    # At the prompt Ctrl-C drops the line, and nothing is sent.
    chat.process.send("never sent")
    chat.process.expect_exact("never sent")
    # Python's readline sees an interrupt only while it waits, not while it takes in a key.
    time.sleep(0.2)
    chat.process.sendintr()
    chat.process.expect_exact(PROMPT)
    chat.say(f"/save {file}")
    assert len(json.loads(file.read_text())["messages"]) == 2

    chat.process.sendeof()
    assert chat.end() == 0


def test_lines_come_back_in_another_session(open_chat, tmp_path):
    (tmp_path / "history").write_text("/system Remembered.\n")
    chat = open_chat()
    chat.process.send("\x1b[A")  # the up key
    chat.process.expect_exact("/system Remembered.")
    chat.process.sendline("")
    chat.process.expect_exact("is set")
    chat.process.expect_exact(PROMPT)
    chat.process.sendline("/quit")
    assert chat.end() == 0


def test_an_interrupt_while_loading_ends_it(smollm2_gguf):
    process = pexpect.spawn(
        sys.executable,
        ["-m", "puna", "chat", str(smollm2_gguf)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PUNA_HISTORY": ""},
        cwd=str(ROOT),
        encoding="utf-8",
        timeout=PATIENCE,
    )
    process.expect_exact("Loading")
    process.sendintr()
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 130
