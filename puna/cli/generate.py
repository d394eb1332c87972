"""`puna generate`: continue one prompt."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli import interrupts, terminal
from puna.cli.options import AsJson, Loading, Preset, Sampling

if TYPE_CHECKING:
    from puna.cli.tally import Tally

EXAMPLES = (
    'puna generate ./my-llama "The sky is" --greedy --max-new-tokens 9',
    "puna generate llama3.2_1b --file prompt.txt --seed 1 > story.txt",
    'echo "2 + 2 =" | puna generate model.gguf --json --greedy --max-new-tokens 3',
)


def generate(
    preset: Preset,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue; read from --file or standard input where left out.",
            show_default=False,
        ),
    ] = None,
    *,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Read the prompt from a file.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Continue a text.

    What follows the prompt is printed as it is made. The prompt goes to the model as it is: no chat
    template is put around it (see puna chat). With --json the result comes whole: the text, its
    tokens, why it ended, and timings.
    """
    text = _prompt(prompt, file)
    began = time.perf_counter()
    model = loading.load(preset)
    loaded = time.perf_counter() - began

    from puna.cli.tally import Tally

    rows, _ = model.preprocessor.prompt_ids(text)
    tally = Tally(model)
    pieces = model.stream(
        _ids(rows[0]),
        max_length=model.config.context_length,
        max_new_tokens=sampling.max_new_tokens,
        sampler=sampling.sampler(model.generation_config),
    )
    tally.start()
    if as_json:
        said = "".join(pieces)
        result = {"preset": preset, "prompt": text, "text": said}
        result |= _figures(tally, len(rows[0]), loaded, sampling.max_new_tokens)
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    try:
        for piece in pieces:
            interrupts.check()
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(flush=True)  # what was said stands on lines of its own
        raise
    print(flush=True)
    if _stop_reason(tally, sampling.max_new_tokens) == "context":
        terminal.note(
            f"the text was cut: the model's context of {model.config.context_length} tokens is full"
        )


def _figures(tally: Tally, prompt: int, loaded: float, bound: int | None) -> dict[str, Any]:
    """What --json tells beside the text."""
    return {
        "tokens": {
            "prompt": prompt,
            "completion": len(tally.ids),
            "completion_ids": tally.ids,
        },
        "stop_reason": _stop_reason(tally, bound),
        "timings": {
            "load_seconds": round(loaded, 3),
            "first_token_seconds": _rounded(tally.first_seconds),
            "total_seconds": round(tally.seconds, 4),
            "tokens_per_second": _rounded(tally.tokens_per_second),
        },
    }


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from the one place where it is."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("a prompt and --file were both given; expected one of them")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "there is no prompt; give it as an argument, with --file, or on standard input"
        )
    raw = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"the prompt is not UTF-8 ({error.reason} at byte {error.start}); convert it first"
        ) from None
    # The line's end is the shell's or the editor's, not the text's.
    return text.removesuffix("\n").removesuffix("\r")


def _ids(row: list[int]) -> Any:
    import numpy as np

    return np.asarray(row, np.int32)


def _stop_reason(tally: Tally, bound: int | None) -> str:
    """Why it ended: "stop" (the model), "length" (--max-new-tokens) or "context" (it is full)."""
    if tally.stopped:
        return "stop"
    return "length" if bound is not None and len(tally.ids) >= bound else "context"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
