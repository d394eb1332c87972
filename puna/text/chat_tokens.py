"""Conversations to text and to ids: the part of a tokenizer that reads chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.errors import TemplateError
from puna.text.template import ChatTemplate

if TYPE_CHECKING:
    from puna.text.encoder import Encoder


class ChatTokens:
    """The half of `Tokenizer` that writes conversations.

    Attributes:
        chat_templates: the Jinja templates by name; "default" is the usual one.
    """

    chat_templates: dict[str, str]
    start_token: str | None
    end_token: str | None
    pad_token: str | None
    start_token_id: int | None
    add_start_token: bool
    _encoder: Encoder

    @property
    def chat_template(self) -> str | None:
        """The default chat template, where there is one."""
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = False,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> Any:
        """Write a conversation as the model was trained to read it.

        Args:
            messages: `{"role": ..., "content": ...}` and what else the template reads.
            add_generation_prompt: whether to end with the header of the assistant's next turn.
            tools: JSON schemas of functions that the model may call.
            tokenize: whether to give ids in place of text. Then only the template makes special
                tokens; in messages, tools and documents "<|eot_id|>" is plain characters. There
                is one start token, where the template or this tokenizer begins texts with it.
            documents: documents for templates that read them.
            chat_template: the name of one of `chat_templates`, or a template's source.
            variables: what else the template reads, such as `date_string`.

        Returns:
            A string, or a 1-D int32 array where `tokenize`.

        Raises:
            TemplateError: there is no template, or it refuses the conversation.
        """
        variables |= {
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
            "chat_template": chat_template,
        }
        if not tokenize:
            template, given = self._chat(variables)
            return template.render(messages, **given)
        pieces = self.encode_pieces(self.chat_segments(messages, **variables))
        ids = [token_id for piece in pieces for token_id in piece]
        return np.asarray(self.with_start(ids), dtype=np.int32)

    def chat_segments(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[tuple[str, bool]]:
        """A conversation as (text, is a special token that the template wrote).

        Args:
            messages: as in `apply_chat_template`.
            options: the other arguments of `apply_chat_template`, but `tokenize`.

        Returns:
            What `encode_segments` and `encode_pieces` take.

        Raises:
            TemplateError: as `apply_chat_template`.
        """
        template, given = self._chat(options)
        return template.segments(messages, **given)

    def encode_pieces(self, segments: Iterable[tuple[str, bool]]) -> list[list[int]]:
        """As `encode_segments`, the ids of each segment apart; no token reaches into two."""
        return self._encoder.segments(segments)

    def with_start(self, ids: list[int], add: bool | None = None) -> list[int]:
        """The ids with the start token before them, once.

        Args:
            ids: of a text.
            add: whether to; None means as this tokenizer does.
        """
        start = self.start_token_id
        add = self.add_start_token if add is None else add
        if not add or start is None or ids[:1] == [start]:
            return ids
        return [start, *ids]

    def _chat(self, options: Mapping[str, Any]) -> tuple[ChatTemplate, dict[str, Any]]:
        """The template that options of `apply_chat_template` ask for, and its variables."""
        given = {"bos_token": self.start_token or "", "eos_token": self.end_token or ""}
        if self.pad_token is not None:
            given["pad_token"] = self.pad_token
        variables: dict[str, Any] = {
            **given,
            "add_generation_prompt": False,
            "tools": None,
            "documents": None,
            **options,
        }
        name = variables.pop("chat_template", None)
        return self._template(name, variables["tools"] is not None), variables

    def _template(self, name: str | None, with_tools: bool) -> ChatTemplate:
        """The template of a name or source; without either the one for tools or the default."""
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self.chat_templates else "default"
            if name not in self.chat_templates:
                raise TemplateError(
                    "This tokenizer has no chat template, so the model is perhaps not tuned for "
                    "chat. Use an instruct model, or pass chat_template= a Jinja template."
                )
        return ChatTemplate(self.chat_templates.get(name, name), tuple(self._encoder.added))
