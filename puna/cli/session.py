"""A conversation at a terminal: what is typed, what is answered, and the commands between."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from puna.cli import interrupts, terminal, transcript
from puna.cli.conversion import parameter_count
from puna.cli.lines import FENCE, Lines
from puna.cli.pace import Pace
from puna.errors import ContextLengthError, PunaError
from puna.machine import peak_memory, resident_memory

if TYPE_CHECKING:
    from puna.chat import ChatState


class Session:
    """A chat with a user.

    Answers go to standard output, all else to standard error. Without a terminal the messages are
    read from standard input, a line each, and the first error ends the session.

    Args:
        chat: the conversation.
        preset: what its model was loaded from.
    """

    def __init__(self, chat: ChatState, preset: str):
        self.chat = chat
        self.preset = preset
        self.lines = Lines()
        self._last = ""  # what /stats tells of the last answer
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "system": (self._system, "[TEXT]", "set the system message; alone, show it"),
            "reset": (self._reset, "", "forget the conversation, but for the system message"),
            "save": (self._save, "FILE", "write the conversation as JSON"),
            "load": (self._load, "FILE", "go on with a conversation that was saved"),
            "stats": (self._stats, "", "pace, context and memory"),
            "help": (self._help, "", "show this"),
            "quit": (self._quit, "", "leave (or Ctrl-D)"),
        }
        self._done = False

    def run(self) -> None:
        """Talk until the user leaves."""
        self._greet()
        try:
            while not self._done:
                try:
                    message = self.lines.read()
                except KeyboardInterrupt:
                    interrupts.clear()
                    if not self.lines.interactive:
                        raise
                    self._say("")  # the line is dropped; the next prompt has a line of its own
                    continue
                if message is None:
                    break
                self._take(message)
            else:
                return
            if self.lines.interactive:
                self._say("")
        finally:
            self.lines.close()

    def _take(self, message: str) -> None:
        """Do what a message says."""
        if not message.strip():
            return
        try:
            if message.startswith("/") and not message.startswith("//") and "\n" not in message:
                self._command(message)
            else:
                self._answer(message[1:] if message.startswith("//") else message)
        except PunaError as error:
            if not self.lines.interactive:
                raise
            self._say(terminal.one_line(str(error)), "red")

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].strip().partition(" ")
        entry = self._commands.get(name.lower())
        if entry is None:
            self._say(
                f"there is no /{name}; /help shows what there is (begin with // to send a message "
                "that starts with a slash)",
                "red",
            )
            return
        entry[0](argument.strip())

    # An answer

    def _answer(self, message: str) -> None:
        before, dropped = list(self.chat.history), self.chat.dropped_turns
        try:
            self._stream(message)
            print(flush=True)
        except ContextLengthError as error:
            self.chat.history = before
            raise ContextLengthError(self._overflow()) from error
        except KeyboardInterrupt:
            interrupts.clear()
            print(flush=True)
            if not self.lines.interactive:
                raise
            self._interrupted(before)
            return
        if self.chat.dropped_turns > dropped:
            self._say(
                f"the context of {self._context:,} tokens was full: the oldest "
                f"{self.chat.dropped_turns - dropped} turns are forgotten"
            )
        self._tell_if_cut()

    def _stream(self, message: str) -> None:
        """Show an answer as it is made."""
        pace = Pace()
        pieces = self.chat.stream_message(message)
        with warnings.catch_warnings():
            # We say it ourselves, each time; Python would say it once.
            warnings.filterwarnings("ignore", message="the conversation passed")
            try:
                watched = pace.watch(pieces)
                with self._thinking():
                    first = next(watched, "")
                for piece in itertools.chain([first], watched):
                    interrupts.check()
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            finally:
                pieces.close()  # which keeps what was said so far
                self._take_down(pace)

    def _take_down(self, pace: Pace) -> None:
        answer = self.chat.last
        if answer is None or pace.first_seconds is None:
            return
        tokens = len(answer.token_ids)
        rate = pace.tokens_per_second(tokens)
        self._last = (
            f"{tokens} tokens, the first after {pace.first_seconds:.2f} s"
            + ("" if rate is None else f", then {rate:.1f} tokens/s")
            + f"\nits prompt   {answer.prefilled:,} tokens read, {answer.reused:,} reused"
        )

    def _thinking(self) -> Any:
        if not (self.lines.interactive and sys.stderr.isatty()):
            return contextlib.nullcontext()
        return self._console.status("", spinner="dots")

    def _interrupted(self, before: list[dict[str, Any]]) -> None:
        if self.chat.history != before and self.chat.history[-1]["content"]:
            self._say("(stopped; what was said is kept)")
        else:
            self.chat.history = before
            self._say("(stopped before anything was said; your message is dropped)")

    def _tell_if_cut(self) -> None:
        """An answer that the model did not end itself is never left to look like one."""
        answer = self.chat.last
        if answer is None or answer.finish_reason != "length":
            return
        bound = self.chat.generation.get("max_new_tokens")
        if bound is not None and len(answer.token_ids) >= bound:
            self._say(f"(cut after {bound} tokens, as --max-new-tokens says)")
        else:
            self._say(
                f"(cut: the context of {self._context:,} tokens is full; /reset makes room, or "
                "start with --on-overflow drop_oldest)"
            )

    def _overflow(self) -> str:
        return (
            f"the conversation no longer fits in the context of {self._context:,} tokens with room "
            "for an answer; shorten the message, /reset, or start with --on-overflow drop_oldest"
        )

    # Commands

    def _system(self, text: str) -> None:
        if not text:
            self._say(self.chat.system or "there is no system message; /system TEXT sets one")
            return
        turns = [turn for turn in self.chat.history if turn["role"] != "system"]
        self.chat.system = text
        self.chat.history = [{"role": "system", "content": text}, *turns]
        self._say("the system message is set")

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self._say("the conversation is forgotten")

    def _save(self, name: str) -> None:
        if not name:
            raise transcript.TranscriptError("/save needs a file's name, such as /save talk.json")
        transcript.save(Path(name), self.preset, self.chat.history)
        self._say(f"saved {_count(self.chat.history)} to {name}")

    def _load(self, name: str) -> None:
        if not name:
            raise transcript.TranscriptError("/load needs a file's name, such as /load talk.json")
        messages = transcript.load(Path(name))
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        self.chat.system = first["content"] if first else ""
        self.chat.history = messages
        self._say(f"loaded {_count(messages)} from {name}")

    def _stats(self, _: str) -> None:
        used = self._tokens_in_context()
        self._say(f"last answer  {self._last or 'no answer yet'}")
        share = 100 * used / self._context
        self._say(f"context      {used:,} of {self._context:,} tokens ({share:.0f} %)")
        if self.chat.dropped_turns:
            self._say(f"forgotten    {self.chat.dropped_turns} turns, for want of room")
        self._say(f"memory       {_memory()}")

    def _help(self, _: str) -> None:
        for name, (_method, argument, what) in self._commands.items():
            self._say(f"  {f'/{name} {argument}':<16} {what}")
        self._say(f"  {FENCE:<16} begins and ends a message of several lines")
        self._say(f"  {'Ctrl-C':<16} stops an answer, or drops the line")

    def _quit(self, _: str) -> None:
        self._done = True

    # What they share

    @property
    def _context(self) -> int:
        return self.chat.model.config.context_length

    def _tokens_in_context(self) -> int:
        if not self.chat.history:
            return 0
        tokenizer = self.chat.model.tokenizer
        return len(tokenizer.apply_chat_template(self.chat.history, tokenize=True))

    def _greet(self) -> None:
        if not self.lines.interactive:
            return
        import keras

        model = self.chat.model
        # Of a quantized model, variables hold several weights in a byte, and scales.
        count = parameter_count(model.config)
        self._say(
            f"{Path(self.preset).name}: {count / 1e6:,.0f} million parameters, "
            f"{model.dtype_policy.name}, {keras.backend.backend()}, context {self._context:,} "
            "tokens"
        )
        self._say("/help for help, Ctrl-D to leave")

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, soft_wrap=True)


def _count(messages: list[Any]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def _memory() -> str:
    """The process's resident size, where the system tells it."""
    now, most = resident_memory(), peak_memory()
    told = [] if now is None else [f"{now // 10**6:,} MB resident"]
    told += [] if most is None else [f"{most // 10**6:,} MB at the most"]
    return ", ".join(told) or "not known on this system"
