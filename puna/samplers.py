"""How the next token is chosen from the logits.

A sampler is a frozen description. What it asks for (temperature, how many candidates, penalties)
travels to the compiled step as values, and randomness is a value too: one uniform number per row
and token. So changing any of them compiles nothing, and a seed gives the same choice on every
backend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from puna.errors import ConfigError

# The ways to make a choice: the best token; among the best `CANDIDATES`; among all; among all by
# rank, which may need them sorted.
Form = Literal["greedy", "candidates", "all", "sorted"]
FORMS: tuple[Form, ...] = ("greedy", "candidates", "all", "sorted")

CANDIDATES = 64


class SamplerSettings(TypedDict, total=False):
    """The settings of a `Sampler`, as arguments of a call; the last four are a `BeamSampler`'s."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    bad_words: Sequence[str | Sequence[int]]
    min_new_tokens: int
    seed: int | Sequence[int] | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    return_all_beams: bool


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What is done with the logits, in this order, and with what seed.

    The bias, the penalties and the bans change the logits; the temperature divides them; `top_k`,
    `top_p`, `min_p` and `typical_p`, each among what those before it left, narrow the choice.
    They mean what they mean in transformers, and the presence and frequency penalties what they
    mean in OpenAI's API and in vLLM.

    Args:
        temperature: divides the logits; 0 takes the best token.
        top_k: how many of the best tokens may be chosen, of equals any; None means all.
        top_p: the probability that the fewest best tokens must have together, in (0, 1].
        min_p: the share of the best token's probability that a token must have, in [0, 1).
        typical_p: the probability that the tokens nearest to the expected surprise must have
            together, in (0, 1] (Meister et al. 2022, arXiv:2202.00666).
        repetition_penalty: divides the positive logits of tokens of the prompt and the completion,
            and multiplies the negative (Keskar et al. 2019, arXiv:1909.05858); 1 does nothing.
        presence_penalty: taken from the logit of every token of the completion.
        frequency_penalty: taken from it as often as the token is there.
        logit_bias: added to the logits of tokens by their ids.
        bad_words: texts, or sequences of ids, that the completion shall not contain. A text is
            tokenized as it stands: " cat" and "cat" are two. A stop token among them is banned too.
        min_new_tokens: tokens that come before a stop token may.
        seed: makes the choices repeatable; one per row makes each row's independent of the others;
            None draws a new one at each call.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str | Sequence[int]] = ()
    min_new_tokens: int = 0
    seed: int | Sequence[int] | None = None

    def __post_init__(self):
        _check("temperature", self.temperature, "a number ≥ 0", 0 <= self.temperature < math.inf)
        k = self.top_k
        whole = k is None or (isinstance(k, int | np.integer) and k >= 1)
        _check("top_k", k, "a whole number above 0, or None", whole)
        _check("top_p", self.top_p, "a number in (0, 1]", 0 < self.top_p <= 1)
        _check("min_p", self.min_p, "a number in [0, 1)", 0 <= self.min_p < 1)
        _check("typical_p", self.typical_p, "a number in (0, 1]", 0 < self.typical_p <= 1)
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, "a number above 0", 0 < penalty < math.inf)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, "a finite number", math.isfinite(value))
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, "a finite number", math.isfinite(bias))
        _check("min_new_tokens", self.min_new_tokens, "a number ≥ 0", self.min_new_tokens >= 0)
        # Lists and arrays become tuples, so that equal samplers are equal, after JSON too.
        object.__setattr__(self, "bad_words", _words(self.bad_words))
        object.__setattr__(self, "seed", _seeds(self.seed))

    @property
    def form(self) -> Form:
        """Which way to make the choice is enough."""
        if self.temperature == 0 or self.top_k == 1:
            return "greedy"
        if self.top_k is not None and self.top_k <= CANDIDATES:
            return "candidates"
        narrowed = self.top_k is not None or self.top_p < 1 or self.typical_p < 1
        return "sorted" if narrowed else "all"

    @property
    def changes_logits(self) -> bool:
        """Whether there is a bias, a penalty or a ban."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.bad_words
            or self.min_new_tokens
        )

    def replace(self, **settings: Unpack[SamplerSettings]) -> Sampler:
        """The same with other settings.

        One of `top_k`, `top_p`, `min_p` and `typical_p` replaces all four: who asks for the top
        0.9 does not mean the top 0.9 of the sampler's five best.

        >>> TopKSampler(5).replace(temperature=0.7)
        Sampler(temperature=0.7, top_k=5)
        >>> TopKSampler(5).replace(top_p=0.9)
        Sampler(top_p=0.9)
        """
        _check_known(Sampler, settings)
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(Sampler)}
        if not settings.keys().isdisjoint(_NARROWING):
            mine = {name: value for name, value in mine.items() if name not in _NARROWING}
        return Sampler(**mine | settings)

    def __repr__(self):
        given = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        )
        return f"{type(self).__name__}({given})"


_NARROWING = ("top_k", "top_p", "min_p", "typical_p")  # each does nothing by default


class GreedySampler(Sampler):
    """The most likely token, always."""

    def __init__(self, **settings: Any):
        settings.setdefault("temperature", 0.0)
        super().__init__(**settings)


class RandomSampler(Sampler):
    """Any token, as likely as the model says."""


class TopKSampler(Sampler):
    """One of the k most likely tokens (Fan et al. 2018, arXiv:1805.04833).

    Args:
        k: how many.
        **settings: `Sampler`'s others.
    """

    def __init__(self, k: int = 5, **settings: Any):
        settings.setdefault("top_k", k)
        super().__init__(**settings)


class TopPSampler(Sampler):
    """One of the fewest tokens that have the probability p together (Holtzman et al. 2020).

    Args:
        p: the probability, in (0, 1].
        k: how many tokens at the most; None means no bound.
        **settings: `Sampler`'s others.
    """

    def __init__(self, p: float = 0.1, k: int | None = None, **settings: Any):
        settings.setdefault("top_p", p)
        settings.setdefault("top_k", k)
        super().__init__(**settings)


class MinPSampler(Sampler):
    """One of the tokens with at least p of the best one's probability (arXiv:2407.01082).

    Args:
        p: the share, in [0, 1).
        **settings: `Sampler`'s others.
    """

    def __init__(self, p: float = 0.05, **settings: Any):
        settings.setdefault("min_p", p)
        super().__init__(**settings)


class TypicalSampler(Sampler):
    """One of the tokens that surprise about as much as expected (arXiv:2202.00666).

    Args:
        p: the probability that they have together, in (0, 1].
        **settings: `Sampler`'s others.
    """

    def __init__(self, p: float = 0.95, **settings: Any):
        settings.setdefault("typical_p", p)
        super().__init__(**settings)


@dataclass(frozen=True, kw_only=True, repr=False)
class BeamSampler(Sampler):
    """The likeliest sequence that a search over several finds; nothing is random.

    The search is transformers': a beam that ends in a stop token is set aside with its score, the
    sum of its log-probabilities divided by its length, in new tokens, to the power of
    `length_penalty`. A bias, penalties and bans change the log-probabilities, as they do there.

    Args:
        num_beams: how many sequences are followed, at most `CANDIDATES` / 2.
        length_penalty: above 0 it prefers longer sequences, below 0 shorter ones.
        early_stopping: True ends the search as soon as `num_beams` sequences have ended; False
            where none that is followed would be better if it ended now; "never" where none could
            become better.
        return_all_beams: whether all are returned, the best first, in the place of the best.
    """

    num_beams: int = 5
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    return_all_beams: bool = False
    temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        most, early, penalty = CANDIDATES // 2, self.early_stopping, self.length_penalty
        fits = isinstance(self.num_beams, int | np.integer) and 1 <= self.num_beams <= most
        _check("num_beams", self.num_beams, f"a whole number from 1 to {most}", fits)
        _check("length_penalty", penalty, "a finite number", math.isfinite(penalty))
        known = isinstance(early, bool) or early == "never"
        _check("early_stopping", repr(early), "True, False or 'never'", known)
        fields = type(self).__dataclass_fields__
        for name in ("temperature", *_NARROWING):
            value = getattr(self, name)
            if value != _default(fields[name]):
                raise ConfigError(
                    f"{name} is {value}; a beam search chooses nothing at random, so leave it out"
                )

    def replace(self, **settings: Unpack[SamplerSettings]) -> Sampler:
        """The same search with other settings.

        >>> BeamSampler(num_beams=3).replace(length_penalty=2.0)
        BeamSampler(num_beams=3, length_penalty=2.0)
        """
        _check_known(BeamSampler, settings)
        return dataclasses.replace(self, **settings)


_BY_NAME: dict[str, type[Sampler]] = {
    "greedy": GreedySampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
    "min_p": MinPSampler,
    "typical": TypicalSampler,
    "random": RandomSampler,
    "beam": BeamSampler,
}
_CLASSES = {cls.__name__: cls for cls in (Sampler, *_BY_NAME.values())}


def get(sampler: str | Sampler) -> Sampler:
    """The sampler that a name stands for, with its defaults; a sampler is returned as it is.

    >>> get("top_k")
    TopKSampler(top_k=5)
    """
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in _BY_NAME:
        raise ConfigError(
            f"sampler {sampler!r} is not known; expected a puna.samplers.Sampler or one of: "
            f"{', '.join(_BY_NAME)}"
        )
    return _BY_NAME[sampler]()


def from_generation_config(config: Mapping[str, Any]) -> Sampler:
    """The sampler that a checkpoint's `generation_config.json` describes.

    >>> from_generation_config({"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    Sampler(temperature=0.6, top_k=50, top_p=0.9)
    """

    def given(name: str, default: Any) -> Any:
        value = config.get(name)
        return default if value is None else value

    shared = {
        "repetition_penalty": given("repetition_penalty", 1.0),
        "min_new_tokens": given("min_new_tokens", 0),
        "bad_words": given("bad_words_ids", ()),
    }
    beams, sample = given("num_beams", 1), config.get("do_sample")
    if beams > 1 and sample:
        raise ConfigError(
            f"generation_config.json has num_beams {beams} with do_sample; a beam search that "
            "samples is not supported: pass a sampler"
        )
    if beams > 1:
        return BeamSampler(
            num_beams=beams,
            length_penalty=given("length_penalty", 1.0),
            early_stopping=given("early_stopping", False),
            **shared,
        )
    if not sample:
        return GreedySampler(**shared)
    return Sampler(
        temperature=given("temperature", 1.0),
        top_k=given("top_k", 50) or None,  # 50 is transformers' default, and 0 its "all"
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        typical_p=given("typical_p", 1.0),
        **shared,
    )


def to_config(sampler: Sampler) -> dict[str, Any]:
    """A sampler as JSON."""
    config = dataclasses.asdict(sampler)
    config["logit_bias"] = {str(token): bias for token, bias in sampler.logit_bias.items()}
    return {"class_name": type(sampler).__name__, **config}


def from_config(config: Mapping[str, Any]) -> Sampler:
    """The inverse of `to_config`."""
    fields = dict(config)
    fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    return _CLASSES[fields.pop("class_name")](**fields)


def _check(name: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; expected {expected}")


def _check_known(cls: type[Sampler], settings: Iterable[str]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is no setting of a {cls.__name__}; expected {', '.join(known)}"
        )


def _words(words: Any) -> tuple[str | tuple[int, ...], ...]:
    try:
        found = tuple(w if isinstance(w, str) else tuple(int(t) for t in w) for w in words)
    except TypeError:
        found = ("",)
    if isinstance(words, str) or not all(map(len, found)):
        raise ConfigError(
            f"bad_words is {words!r}; expected a list of texts or of lists of token ids, none of "
            "them empty"
        )
    return found


def _seeds(seed: Any) -> int | tuple[int, ...] | None:
    if seed is None:
        return None
    several = np.ndim(seed) == 1
    seeds = list(seed) if several else [seed]
    if not all(isinstance(one, int | np.integer) and one >= 0 for one in seeds):
        raise ConfigError(f"seed is {seed!r}; expected a whole number ≥ 0, or one for each row")
    return tuple(map(int, seeds)) if several else int(seed)


def _default(of: dataclasses.Field) -> Any:
    if of.default is not dataclasses.MISSING:
        return of.default
    return of.default_factory() if of.default_factory is not dataclasses.MISSING else None
