"""`puna chat`: talk with an instruction-tuned model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from puna.cli.options import Loading, Preset, Sampling
from puna.errors import TemplateError

EXAMPLES = (
    "puna chat hf://HuggingFaceTB/SmolLM2-135M-Instruct",
    'puna chat ./my-llama --system "You are a pirate." --temperature 0.3',
    'echo "Name three fish." | puna chat model.gguf --greedy --max-new-tokens 60',
)


def chat(
    preset: Preset,
    *,
    system: Annotated[
        str,
        typer.Option(help="The system message; else the template's own.", show_default=False),
    ] = "",
    on_overflow: Annotated[
        Literal["error", "drop_oldest"],
        typer.Option(help="What happens when the conversation no longer fits in the context."),
    ] = "error",
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Talk with an instruct model.

    The conversation is written as the checkpoint's own chat template has it. Answers stream as they
    are made; Ctrl-C stops one and keeps what was said. A message that begins with three double
    quotes may have several lines, up to the next three. Commands begin with a slash: /system TEXT,
    /reset, /save FILE, /load FILE, /stats, /help, /quit.

    Without a terminal each line of standard input is a message, and answers alone are printed.
    """
    model = loading.load(preset)
    if not model.tokenizer.chat_templates:
        raise TemplateError(
            f"{preset} has no chat template, so it is a base model, which continues texts and does "
            "not answer; chat with an instruct model, or use puna generate"
        )

    from puna.chat import ChatState
    from puna.cli.session import Session

    generation = sampling.arguments(model.generation_config)
    Session(ChatState(model, system, on_overflow=on_overflow, **generation), preset).run()
