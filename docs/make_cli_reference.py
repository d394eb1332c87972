"""Writes docs/cli.md from what the commands say of themselves.

python docs/make_cli_reference.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VERBS = (
    *("chat", "generate", "info", "tokenize", "finetune", "convert", "quantize", "fuse"),
    *("upload", "perplexity", "bench"),
)
TARGET = Path(__file__).with_name("cli.md")

HEAD = """# The command line

<!-- Made by docs/make_cli_reference.py from the programs' own help; do not edit. -->

`puna`, or `python -m puna`, is installed with the package. `KERAS_BACKEND` chooses where models
run (`jax`, `torch` or `tensorflow`); `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` are
heeded for presets on the Hub; `NO_COLOR` takes the colours out. `puna chat` keeps its history of
lines in `~/.local/state/puna/history`, or where `PUNA_HISTORY` says.

![a session of puna chat](chat.svg)
"""


def reference() -> str:
    """The whole page."""
    sections = [HEAD, _section("puna")]
    sections += [_section(f"puna {verb}", verb) for verb in VERBS]
    return "\n".join(sections)


def _section(title: str, *verb: str) -> str:
    # Plain help, of one width: the page must not depend on who makes it.
    environment = {**os.environ, "TYPER_USE_RICH": "0", "COLUMNS": "100", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "puna", *verb, "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(TARGET)
