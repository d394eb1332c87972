"""Turn-by-turn conversation with an instruction-tuned model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from puna.checkpoint.fingerprint import fingerprint
from puna.errors import ContextLengthError
from puna.text.tool_calls import PYTHON_TAG, ToolCall, parse_tool_calls

if TYPE_CHECKING:
    from puna.decoding.streams import TextStream
    from puna.models import Llama3CausalLM

Message = dict[str, Any]

# Tokens that are kept free for an answer, where the caller sets no bound.
_ROOM_FOR_ANSWER = 64


class ChatState:
    """A conversation with a model, in the words of the checkpoint's own chat template.

    What a message says is plain text to the model: a user cannot write a turn of another role into
    it, whatever special tokens the message spells. An answer ends at any of the checkpoint's stop
    tokens, or at the end of the context. What the model has made of the conversation is kept, so
    that a turn costs what is new in it; a change of the history costs what comes after it.

    Args:
        model: a causal LM with a preprocessor.
        system: the system message; "" leaves it to the template.
        template: a Jinja template, or the name of one of the checkpoint's, in the place of the
            checkpoint's default.
        tools: JSON schemas of functions that the model may call; see `tool_calls`.
        on_overflow: what happens where the conversation no longer fits in the context: "error", or
            "drop_oldest", which forgets the oldest turns after the system message, with a warning.
        template_variables: what else the template reads, such as `documents` or `date_string`.
        **generation: arguments of `model.generate` for every answer, such as `max_new_tokens` and
            `sampler`.

    Attributes:
        history: the turns, `{"role", "content"}`, the system message first. It may be changed.
        dropped_turns: how many turns were forgotten so far.
        last: the stream of the last answer, with its `token_ids` and `finish_reason`; it holds the
            memory of the conversation. None before the first.

    Example:
        chat = puna.ChatState(model, system="You are a pirate.", max_new_tokens=100)
        chat.send_message("Ahoy! Who are you?")
    """

    def __init__(
        self,
        model: Llama3CausalLM,
        system: str = "",
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        on_overflow: Literal["error", "drop_oldest"] = "error",
        template_variables: Mapping[str, Any] | None = None,
        **generation: Any,
    ):
        if on_overflow not in ("error", "drop_oldest"):
            raise ValueError(f"on_overflow is {on_overflow!r}; expected 'error' or 'drop_oldest'")
        self.model = model
        self.system = system
        self.template = template
        self.tools = tools
        self.on_overflow = on_overflow
        self.template_variables = dict(template_variables or {})
        self.generation = generation
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.history: list[Message] = [_message("system", self.system)] if self.system else []
        self.dropped_turns = 0
        self.last: TextStream | None = None
        self._weights = ""  # those that `last` was made with

    @property
    def prefilled(self) -> int:
        """Tokens of the last turn's prompt that went through the model; see `TextStream`."""
        return 0 if self.last is None else self.last.prefilled

    def add_to_history_as_user(self, message: str) -> None:
        """Add a turn of the user's, without asking for an answer."""
        self.history.append(_message("user", message))

    def add_to_history_as_model(self, message: str) -> None:
        """Add a turn of the model's, as if it had said it."""
        self.history.append(_message("assistant", message))

    def add_tool_result(self, result: str) -> None:
        """Add what a tool gave; `continue_turn` then asks the model to go on from it."""
        self.history.append(_message("ipython", result))

    def get_full_prompt(self) -> str:
        """The conversation as text, ready for the model's next turn.

        Raises:
            TemplateError: the tokenizer has no template, or it refuses the conversation.
        """
        return self.model.tokenizer.apply_chat_template(self.history, **self._template_options())

    def send_message(self, message: str, *, prefill: str = "") -> str:
        """Add a turn of the user's and the model's answer to it.

        Args:
            message: what the user says.
            prefill: how the answer shall begin; it is part of what is returned.

        Returns:
            The answer, without the tokens that end it. Of other special tokens only the
            `<|python_tag|>` before code and calls of tools is kept.

        Raises:
            ContextLengthError: the conversation does not fit; it is as it was before the call.
            TemplateError: the tokenizer has no template, or it refuses the conversation.
        """
        return "".join(self.stream_message(message, prefill=prefill))

    def stream_message(self, message: str, *, prefill: str = "") -> Generator[str, None, None]:
        """As `send_message`, in pieces as the answer is made.

        Where the iterator is closed, or the user interrupts, the turn is kept with what was said.
        """
        return self._answer([*self.history, _message("user", message)], prefill)

    def continue_turn(self, *, prefill: str = "") -> str:
        """The model's answer to the history as it stands, such as after `add_tool_result`."""
        return "".join(self._answer(list(self.history), prefill))

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that the last turn asks for, if it is the model's and consists of calls."""
        if not self.history or self.history[-1]["role"] != "assistant":
            return []
        return parse_tool_calls(self.history[-1]["content"])

    def _answer(self, turns: list[Message], prefill: str) -> Generator[str, None, None]:
        turns, prompt, dropped = self._fitting(turns, prefill)
        said: list[str] = []

        def keep() -> None:
            self.history = [*turns, _message("assistant", "".join(said))]
            self.dropped_turns += dropped
            self._weights = self._fingerprint()

        with self._stream(prompt) as pieces:
            try:
                for piece in itertools.chain([prefill] if prefill else [], pieces):
                    said.append(piece)
                    yield piece
            except (GeneratorExit, KeyboardInterrupt):
                keep()
                raise
        keep()

    def _stream(self, prompt: np.ndarray) -> TextStream:
        """The answer to a prompt, with what the model has made of the turns before."""
        options: dict[str, Any] = dict(self._bounds())
        kept = self.last and self.last.prompt_cache
        if kept is not None and self._fingerprint() == self._weights:
            options["prompt_cache"] = kept
        self.last = None  # its memory is the stream's now
        # Llama 3.1 marks code and calls with this token; without it code would look like prose.
        self.last = self.model.stream(prompt, keep_special_tokens=(PYTHON_TAG,), **options)
        return self.last

    def _fingerprint(self) -> str:
        """That of the ends and of adapters: it tells of another model, and of training."""
        ends = ("layers.0.", f"layers.{self.model.config.num_hidden_layers - 1}.")
        tensors = self.model.tensors().items()
        found = {name: v for name, v in tensors if any(end in name for end in ends)}
        return fingerprint(self.model.config, found | self.model.adapter_tensors())

    def _bounds(self) -> dict[str, Any]:
        """The answer may take what is left of the context, where the caller sets no bound."""
        given = self.generation
        if given.get("max_length") is not None or given.get("max_new_tokens") is not None:
            return given
        return {**self.generation, "max_length": self.model.config.context_length}

    def _fitting(self, turns: list[Message], prefill: str) -> tuple[list[Message], np.ndarray, int]:
        """The turns that fit, their tokens, and how many turns were left out."""
        context = self.model.config.context_length
        bounds = self._bounds()
        limit = min(bounds.get("max_length") or context, context)
        room = bounds.get("max_new_tokens") or min(_ROOM_FOR_ANSWER, limit // 4)
        dropped = 0
        while True:
            prompt = self._tokens(turns, prefill)
            if len(prompt) + room <= limit:
                break
            shorter = _without_oldest(turns)
            if self.on_overflow == "error" or shorter is None:
                raise ContextLengthError(
                    f"the conversation has {len(prompt)} tokens and needs room for {room} more, "
                    f"and the limit is {limit}; shorten the message, call reset(), or use "
                    "ChatState(on_overflow='drop_oldest')"
                )
            dropped += len(turns) - len(shorter)
            turns = shorter
        if dropped:
            warnings.warn(
                f"the conversation passed {limit} tokens; its oldest {dropped} turns were dropped",
                stacklevel=4,
            )
        return turns, prompt, dropped

    def _tokens(self, turns: list[Message], prefill: str) -> np.ndarray:
        tokenizer = self.model.tokenizer
        prompt = tokenizer.apply_chat_template(turns, tokenize=True, **self._template_options())
        if prefill:
            begun = tokenizer.tokenize(prefill, parse_special=False)
            prompt = np.concatenate([prompt, begun])
        return prompt

    def _template_options(self) -> dict[str, Any]:
        return {
            "add_generation_prompt": True,
            "tools": self.tools,
            "chat_template": self.template,
            **self.template_variables,
        }


def _without_oldest(turns: list[Message]) -> list[Message] | None:
    """The turns without the oldest exchange, from one message of the user's to the next."""
    first = 1 if turns and turns[0]["role"] == "system" else 0
    for place in range(first + 1, len(turns)):
        if turns[place]["role"] == "user":
            return turns[:first] + turns[place:]
    return None


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
