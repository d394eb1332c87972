"""What a causal language model makes: completions, streams, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from keras import ops

from puna import samplers
from puna.backend.protocol import Tensor
from puna.config import LlamaConfig
from puna.decoding import scores
from puna.decoding.loop import Decoder
from puna.decoding.prompt_cache import PromptCache
from puna.decoding.prompts import read_rows
from puna.decoding.requests import Generation, Served, answer, prefix
from puna.decoding.streams import TextStream
from puna.errors import ConfigError

if TYPE_CHECKING:
    from puna.models.backbone import Llama3Backbone
    from puna.models.preprocessor import Llama3CausalLMPreprocessor


class Generating:
    """The methods of a causal LM around its decoder."""

    backbone: Llama3Backbone
    preprocessor: Llama3CausalLMPreprocessor | None
    sampler: samplers.Sampler
    generation_config: dict[str, Any]
    _decoder: Decoder
    if TYPE_CHECKING:

        @property
        def config(self) -> LlamaConfig:
            """The model's shape."""
            ...

        def _logits(self, x_BTD: Tensor) -> Tensor: ...

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        num_return_sequences: int = 1,
        logprobs: int | None = None,
        prompt_cache: PromptCache | None = None,
        cache_dtype: str | None = None,
        sliding_window: int | None = None,
        attention_sinks: int = 4,
        sampler: str | samplers.Sampler | None = None,
        **settings: Unpack[samplers.SamplerSettings],
    ) -> Any:
        """Continue prompts.

        Args:
            inputs: a string, a list of strings, token ids (1-D, or a list of such), or a dict of
                `token_ids` and `padding_mask` `[B, T]`. Prompts may differ in length.
            max_length: tokens of prompt and completion together; None means the preprocessor's
                `sequence_length`, or the context where there is no preprocessor.
            stop_token_ids: ids that end a completion; "auto" means all that the tokenizer names,
                None means none.
            strip_prompt: whether to leave the prompt out of the result.
            max_new_tokens: tokens of the completion alone; with `max_length`, both hold.
            stop: texts that end a completion, wherever tokens begin and end; they are left out.
            num_return_sequences: completions of each prompt.
            logprobs: how many of the likeliest tokens to tell of at each place, 0 to 64; None
                tells nothing.
            prompt_cache: from `prompt_cache`; a prompt that begins alike is not computed anew.
            cache_dtype: how keys and values are kept: "int8" (with a scale for each token and
                head), "bfloat16", "float16" or "float32"; None means what is fastest.
            sliding_window: how many tokens are kept; beyond them the older half is forgotten, so
                that a completion may be longer than the context. None forgets nothing.
            attention_sinks: how many of the first tokens a sliding window keeps always.
            sampler: a `puna.samplers.Sampler`, a name of one, or "preset" for what the checkpoint's
                `generation_config.json` says; None means `compile`'s, else top-k of 5.
            **settings: settings of the sampler for this call, such as `temperature=0.7`,
                `top_p=0.9` or `seed=1`; see `puna.samplers.Sampler.replace`.

        Returns:
            What came in: a string for a string, a list for a list, int32 ids for ids, a dict for a
            dict (`[B, longest]`, the mask true on prompt and completion). In text, special tokens
            are left out; in ids, the token that stopped a row is kept. With
            `num_return_sequences` above 1 a list of them for each prompt (more rows in a dict);
            with `logprobs` a `Completion` in the place of each.

        Raises:
            ContextLengthError: a prompt is longer than `max_length` or than the model's context.
            ConfigError: a length is negative, or the sampler or a setting is not known.
            TokenizerError: a prompt has no tokens, or ids that the model does not have.
        """
        generation = Generation(
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop=stop,
            strip_prompt=strip_prompt,
            num_return_sequences=num_return_sequences,
            logprobs=logprobs,
            prompt_cache=prompt_cache,
            cache_dtype=cache_dtype,
            sliding_window=sliding_window,
            attention_sinks=attention_sinks,
            sampler=self._sampler_for(sampler, settings),
        )
        return answer(self._served(), inputs, generation)

    def stream(
        self,
        prompt: Any,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        prompt_cache: PromptCache | None = None,
        cache_dtype: str | None = None,
        sliding_window: int | None = None,
        attention_sinks: int = 4,
        sampler: str | samplers.Sampler | None = None,
        keep_special_tokens: Sequence[str] = (),
        **settings: Unpack[samplers.SamplerSettings],
    ) -> TextStream:
        """Continue one prompt, and give the completion in pieces as it is made.

        The pieces joined are what `generate(..., strip_prompt=True)` returns; none ends within a
        character, and none is empty. A piece is a string with `token_ids` and `logprobs`; the
        stream has those of all, and a `finish_reason`. It is for `async for` too. Closing it stops
        the work.

        Args:
            prompt: a string, or token ids (1-D).
            max_length, stop_token_ids, max_new_tokens, stop, logprobs, prompt_cache,
                cache_dtype, sliding_window, attention_sinks, sampler: as in `generate`.
            keep_special_tokens: special tokens that are not left out of the text, such as
                `<|python_tag|>`; those that the tokenizer lacks do not matter.
            **settings: as in `generate`.

        Raises:
            ContextLengthError: as `generate` raises.
        """
        generation = Generation(
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop=stop,
            strip_prompt=True,
            logprobs=logprobs,
            prompt_cache=prompt_cache,
            cache_dtype=cache_dtype,
            sliding_window=sliding_window,
            attention_sinks=attention_sinks,
            sampler=self._sampler_for(sampler, settings),
        )
        return TextStream(self._served(), prompt, generation, keep_special_tokens)

    def prompt_cache(self, prompt: Any) -> PromptCache:
        """What the model makes of the beginning of prompts, computed once for many of them.

        Args:
            prompt: a string, or token ids (1-D), as in `generate`. The prompts that reuse it
                should begin with the same tokens: end it where a token ends, such as before a
                space or a special token.

        Returns:
            For `generate(prompt_cache=...)` and `stream`; it can be saved, see `PromptCache`.
        """
        return prefix(self._served(), prompt)

    def warm_up(self, max_length: int = 1024, batch_size: int = 1) -> None:
        """Compile ahead all that `generate` and `stream` need, whatever the sampler's settings.

        Args:
            max_length: tokens of prompt and completion together, at most.
            batch_size: prompts in one call, at most.
        """
        self._decoder.warm_up(max_length, batch_size)

    def token_logprobs(self, inputs: Any, top: int = 0) -> Any:
        """How likely the model finds each token of texts, given those before it.

        Args:
            inputs: a string or token ids (1-D), or several; strings get the start token as in
                `generate`, so that their first own token is predicted too.
            top: how many of the likeliest tokens to tell of in each place, 0 to 64.

        Returns:
            A tuple of `TokenLogprob` for each token but the first; a list of them for several.

        Raises:
            ContextLengthError: a text is longer than the context.
        """
        rows, batched = read_rows(inputs, self.preprocessor)
        model, programs = self._decoder.model, self._decoder.programs
        found = [scores.token_logprobs(model, programs, row, top) for row in rows]
        return found if batched else found[0]

    def perplexity(
        self, inputs: Any, *, max_length: int | None = None, stride: int | None = None
    ) -> float:
        """The exponential of the mean negative log-probability over all tokens of all texts.

        Each token counts the same, whatever text it is in. The start token is not predicted.

        Args:
            inputs: as in `token_logprobs`, of any length.
            max_length: tokens that are taken at once; None means the model's context.
            stride: tokens by which this window moves over a longer text; None means all of it,
                so that every token is computed once; smaller gives each token more to go by.

        Raises:
            ConfigError: there is nothing to predict, or a length makes no sense.
        """
        rows, _ = read_rows(inputs, self.preprocessor)
        decoder = self._decoder
        return scores.perplexity(decoder.model, decoder.programs, rows, max_length, stride)

    def _served(self) -> Served:
        return Served(self._decoder, self.config, self.preprocessor)

    def _sampler_for(
        self, sampler: str | samplers.Sampler | None, settings: samplers.SamplerSettings
    ) -> samplers.Sampler:
        """The sampler of a call: its argument, or `compile`'s, with the call's settings."""
        if sampler is None:
            found = self.sampler
        elif sampler == "preset":
            found = samplers.from_generation_config(self.generation_config)
        else:
            found = samplers.get(sampler)
        return found.replace(**settings) if settings else found

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Callable[[Tensor, int], Tensor] | None = None,
        target_ids: Any = None,
    ) -> Tensor:
        """Logits or losses of whole sequences, to look into a model; as in keras-hub.

        Args:
            token_ids: int `[B, T]`.
            padding_mask: bool `[B, T]`; None means that all are real.
            scoring_mode: "logits", or "loss" for the cross-entropy of `target_ids`.
            layer_intercept_fn: given the hidden states `[B, T, D]` and the place they come from (-1
                for the embedding, then the number of the block), returns what goes on from there.
            target_ids: int `[B, T]`, the token that should follow each; for "loss".

        Returns:
            A tensor: logits `[B, T, V]`, or losses `[B, T]`, float32.

        Raises:
            ConfigError: the mode is not known, or "loss" has no targets.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ConfigError(f"scoring_mode is {scoring_mode!r}; expected 'logits' or 'loss'")
        if scoring_mode == "loss" and target_ids is None:
            raise ConfigError("scoring_mode='loss' needs target_ids: the tokens that should follow")
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        logits_BTV = self._logits(self.backbone.intercepted(inputs, layer_intercept_fn))
        if scoring_mode == "logits":
            return logits_BTV
        target_BT1 = ops.cast(ops.convert_to_tensor(target_ids), "int32")[:, :, None]
        logprobs_BTV = ops.log_softmax(logits_BTV, axis=-1)
        return -ops.take_along_axis(logprobs_BTV, target_BT1, axis=-1)[:, :, 0]
