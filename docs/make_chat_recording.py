"""Writes docs/chat.svg: a real session of `puna chat`, typed by this script, as a picture.

python docs/make_chat_recording.py "$(python -m tests.assets smollm2)"
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

TARGET = Path(__file__).with_name("chat.svg")
PROMPT, MORE = ">>> ", "... "
COLUMNS = 96
PATIENCE = 120  # seconds

OPTIONS = ("--greedy", "--max-new-tokens", "80")
# What is typed. A pair of a text and a number is interrupted after so many words.
SCRIPT: tuple[str | tuple[str, int], ...] = (
    "What is the capital of France?",
    '"""List three animals of the mountains.\nOnly their names."""',
    "/system You are a friendly teacher. Answer in one sentence.",
    "/reset",
    "Why is the sky blue?",
    ("Tell me a long story about a llama in the Andes.", 12),
    "/stats",
    "/quit",
)

THEME = TerminalTheme(
    background=(22, 24, 33),
    foreground=(214, 218, 232),
    normal=[
        (22, 24, 33),
        (235, 111, 123),
        (152, 203, 121),
        (230, 192, 122),
        (110, 160, 250),
        (198, 130, 230),
        (90, 190, 200),
        (214, 218, 232),
    ],
)


def record(preset: Path) -> Text:
    """Type the script into a terminal, and give what was to be seen there."""
    command = ["puna", "chat", preset.name, *OPTIONS]
    seen = Text.assemble(("$ ", "bold green"), (" ".join(command), "bold"), "\n")
    chat = pexpect.spawn(
        sys.executable,
        ["-m", *command],
        cwd=str(preset.parent),
        env=os.environ | {"PUNA_HISTORY": "", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)},
        encoding="utf-8",
        timeout=PATIENCE,
        dimensions=(50, COLUMNS),
    )
    chat.expect_exact(PROMPT)
    seen.append(_shown(chat.before))
    for typed in SCRIPT:
        text, words = typed if isinstance(typed, tuple) else (typed, 0)
        first, *others = text.split("\n")
        seen.append(PROMPT, "bold green").append(f"{first}\n", "bold")
        chat.sendline(first)
        chat.expect_exact("\r\n")
        for line in others:
            chat.expect_exact(MORE)
            seen.append(MORE, "green").append(f"{line}\n", "bold")
            chat.sendline(line)
            chat.expect_exact("\r\n")
        if words:
            chat.expect(rf"([A-Za-z',.]+\s+){{{words}}}")  # which is not the spinner
            begun = chat.before + chat.after
            chat.sendintr()
            chat.expect_exact(PROMPT)
            seen.append(_shown(begun + chat.before))
        elif text == "/quit":
            chat.expect(pexpect.EOF)
        else:
            chat.expect_exact(PROMPT)
            seen.append(_shown(chat.before))
    chat.close()
    if chat.exitstatus:
        raise SystemExit(f"puna chat ended with {chat.exitstatus}: {chat.before}")
    return seen


def _shown(raw: str) -> Text:
    """What a terminal shows of its input: colours stay, what was drawn over goes."""
    # A line that the next movement goes back to and clears: the spinner's last.
    raw = re.sub(r"[^\n]*\n(\x1b\[\?25h)?\r?\x1b\[1A\x1b\[2K", "", raw)
    raw = re.sub(r"\x1b\[[0-9;?]*[A-Zac-ln-z]", "", raw)  # movements, not colours
    raw = re.sub(r"(\x1b\[[0-9;]*m)*[\u2800-\u28ff](\x1b\[[0-9;]*m)* *", "", raw)  # the spinner
    lines = [line.rpartition("\r")[2] for line in raw.replace("\r\n", "\n").split("\n")]
    text = Text.from_ansi("\n".join(lines).strip("\n"))
    return text.append("\n") if text else text


def render(seen: Text) -> str:
    """The session as an SVG that needs nothing from anywhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(seen, end="")
        svg = console.export_svg(title="puna chat", theme=THEME, unique_id="puna")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    session = record(Path(sys.argv[1]).resolve())
    TARGET.write_text(render(session), encoding="utf-8")
    print(session.plain)
    print(TARGET)
