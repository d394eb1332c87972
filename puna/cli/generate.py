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
    from puna.cli.pace import Pace
    from puna.decoding.streams import TextStream

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
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            metavar="N",
            help="With --json, tell how likely each token was, and the N likeliest in its place.",
            show_default=False,
        ),
    ] = None,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Continue a text.

    What follows the prompt is printed as it is made. The prompt goes to the model as it is: no chat
    template is put around it (see puna chat). With --json the result comes whole: the text, its
    tokens, why it ended, and timings.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs tells its numbers in JSON; add --json")
    text = _prompt(prompt, file)
    began = time.perf_counter()
    model = loading.load(preset)
    loaded = time.perf_counter() - began

    from puna.cli.pace import Pace

    rows, _ = model.preprocessor.prompt_ids(text)
    stream = model.stream(
        _ids(rows[0]),
        max_length=model.config.context_length,
        logprobs=logprobs,
        **sampling.arguments(model.generation_config),
    )
    if as_json:
        pace = Pace()
        result: dict[str, Any] = {"preset": preset, "prompt": text}
        result["text"] = "".join(pace.watch(stream))
        result |= _figures(stream, pace, len(rows[0]), loaded, sampling.max_new_tokens)
        if logprobs is not None:
            result["logprobs"] = _logprobs(stream, model.tokenizer)
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    _show(stream)
    if _stop_reason(stream, sampling.max_new_tokens) == "context":
        terminal.note(
            f"the text was cut: the model's context of {model.config.context_length} tokens is full"
        )


def _show(stream: TextStream) -> None:
    """Print a text as it is made."""
    try:
        for piece in stream:
            interrupts.check()
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        print(flush=True)  # also what an interrupt left stands on lines of its own


def _figures(
    stream: TextStream, pace: Pace, prompt: int, loaded: float, bound: int | None
) -> dict[str, Any]:
    """What --json tells beside the text."""
    ids = stream.token_ids.tolist()
    return {
        "tokens": {"prompt": prompt, "completion": len(ids), "completion_ids": ids},
        "stop_reason": _stop_reason(stream, bound),
        "timings": {
            "load_seconds": round(loaded, 3),
            "first_token_seconds": _rounded(pace.first_seconds),
            "total_seconds": round(pace.seconds, 4),
            "tokens_per_second": _rounded(pace.tokens_per_second(len(ids))),
        },
    }


def _logprobs(stream: TextStream, tokenizer: Any) -> list[dict[str, Any]]:
    """Each token of the completion, and the likeliest in its place."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.detokenize([token], skip_special_tokens=False)
        return {"id": token, "text": text, "logprob": round(logprob, 5)}

    return [
        told(one.token_id, one.logprob) | {"top": [told(*pair) for pair in one.top]}
        for one in stream.logprobs
    ]


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


def _stop_reason(stream: TextStream, bound: int | None) -> str | None:
    """Why it ended: "stop" (the model, or --stop), "length" (--max-new-tokens) or "context"."""
    if stream.finish_reason != "length":
        return stream.finish_reason
    return "length" if bound is not None and len(stream.token_ids) >= bound else "context"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
