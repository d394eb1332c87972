"""Turn-by-turn conversation with an instruction-tuned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.models import Llama3CausalLM

Message = dict[str, str]


class ChatState:
    """A conversation with a model, in the words of the checkpoint's own chat template.

    What a message says is plain text to the model: a user cannot write a turn of another role into
    it, whatever special tokens the message spells.

    Args:
        model: a causal LM whose tokenizer has a chat template.
        system: the system message; "" leaves it to the template.
        **generation: arguments of `model.generate` for every answer, such as `max_new_tokens` and
            `sampler`.

    Example:
        chat = puna.ChatState(model, system="You are a pirate.", max_new_tokens=100)
        chat.send_message("Ahoy! Who are you?")
    """

    def __init__(self, model: Llama3CausalLM, system: str = "", **generation: Any):
        self.model = model
        self.system = system
        self.generation = generation
        self.history: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.history = [_message("system", self.system)] if self.system else []

    def add_to_history_as_user(self, message: str) -> None:
        """Add a turn of the user's, without asking for an answer."""
        self.history.append(_message("user", message))

    def add_to_history_as_model(self, message: str) -> None:
        """Add a turn of the model's, as if it had said it."""
        self.history.append(_message("assistant", message))

    def get_full_prompt(self) -> str:
        """The conversation as text, ready for the model's next turn.

        Raises:
            TemplateError: the tokenizer has no template, or it refuses the conversation.
        """
        return self.model.tokenizer.apply_chat_template(self.history, add_generation_prompt=True)

    def send_message(self, message: str) -> str:
        """Add a turn of the user's and the model's answer to it.

        Returns:
            The answer, without the tokens that end it.

        Raises:
            ContextLengthError: the conversation no longer fits; it is as it was before the call.
            TemplateError: the tokenizer has no template, or it refuses the conversation.
        """
        turns = [*self.history, _message("user", message)]
        tokenizer = self.model.tokenizer
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
        completion = self.model.generate(prompt, strip_prompt=True, **self.generation)
        answer = tokenizer.detokenize(completion, skip_special_tokens=True)
        self.history = [*turns, _message("assistant", answer)]
        return answer


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
