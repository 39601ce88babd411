"""Parallel text: the names of numbers in English and in another language, as num2words writes them.

Numbers have up to nine digits, many of them zero, so that sentences of all lengths occur. What tests is never seen in
training, and numbers with long names are kept out altogether: they are translated only by what was learned from
shorter ones.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

from num2words import num2words  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import CountVectorizer

from couplings_experiments.errors import UserError

SOURCE = "en"
# Target languages that num2words writes in separate words: where a number is one word (German, Italian, Turkish ...)
# every test number would be an unseen word.
LANGUAGES = ("fr", "fr_BE", "fr_CH", "es", "pt", "ro", "ru", "pl", "cs", "id")
DIGITS = 9
ZERO = 0.35  # probability of a digit to be zero, beyond the one in ten of chance
LONGEST = 10  # words of an English name that may train
SPECIAL = ("<pad>", "<start>", "<end>")
PAD, START, END = range(3)
_HELD_SEED = 1000  # of the numbers that validate and test: the same for all seeds
_words = CountVectorizer(token_pattern=r"[^\W_]+").build_tokenizer()


class Pair(NamedTuple):
    """A number and its name in both languages, in words."""

    number: int
    source: tuple[str, ...]
    target: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers; the first three are `SPECIAL`."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]]) -> Vocabulary:
        """All words of ``sentences``, in alphabetical order."""
        return cls((*SPECIAL, *sorted({word for sentence in sentences for word in sentence})))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentence: Sequence[str]) -> list[int]:
        """The numbers of its words, and `END`.

        Raises:
            UserError: a word that is not in the vocabulary.
        """
        unknown = [word for word in sentence if word not in self.words[len(SPECIAL) :]]
        if unknown:
            known = self.words[len(SPECIAL) :]
            close = get_close_matches(unknown[0], known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(f"{unknown[0]!r} is in no number's name.{hint} There are: {' '.join(known)}.")
        return [*(self.words.index(word) for word in sentence), END]

    def decode(self, tokens: Iterable[int]) -> tuple[str, ...]:
        """The words up to the first `END`; what is not a word is left as it is written in `SPECIAL`."""
        words: list[str] = []
        for token in tokens:
            if token == END:
                break
            words.append(self.words[token])
        return tuple(words)


@dataclass(frozen=True)
class Corpus:
    """Names of numbers: what trains, validates and tests, and longer ones that test."""

    language: str
    source: Vocabulary
    target: Vocabulary
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    unseen: tuple[Pair, ...]
    longer: tuple[Pair, ...]


def name(number: int, language: str) -> tuple[str, ...]:
    """The words of a number's name, split at spaces and hyphens, without punctuation."""
    return tuple(_words(num2words(number, lang=language).lower()))


def check_language(language: str) -> None:
    """Raise a `UserError` unless ``language`` is one of `LANGUAGES`."""
    if language not in LANGUAGES:
        raise UserError(
            f"--language {language} is none of those that write a number in separate words: "
            f"{', '.join(LANGUAGES)}."
        )


@lru_cache(maxsize=4)
def corpus(language: str, train: int, held: int, seed: int) -> Corpus:
    """Numbers and their names.

    Args:
        language: of the translations, one of `LANGUAGES`.
        train: how many numbers train; ``seed`` draws them.
        held: how many numbers validate, how many test, and how many longer ones test.
        seed: of the numbers that train.

    Raises:
        UserError: an unknown language.
    """
    check_language(language)
    draw = random.Random(_HELD_SEED)
    known: set[int] = set()
    parts = [_distinct(draw, held, known, language, longer=longer) for longer in (False, False, True)]
    validation, unseen, longer = parts
    trained = _distinct(random.Random(seed), train, known, language, longer=False)
    # every word below a thousand, and those of a thousand and a million, whatever was drawn
    every = [*range(1000), 1000, 2000, 10**6, 2 * 10**6, 5 * 10**6]
    return Corpus(
        language,
        Vocabulary.of(name(number, SOURCE) for number in every),
        Vocabulary.of([*(name(number, language) for number in every), *(pair.target for pair in trained)]),
        *(tuple(part) for part in (trained, validation, unseen, longer)),
    )


def _distinct(
    draw: random.Random, count: int, known: set[int], language: str, *, longer: bool
) -> Collection[Pair]:
    """``count`` numbers that are not yet ``known``; they are then."""
    found: list[Pair] = []
    while len(found) < count:
        number = _number(draw)
        source = name(number, SOURCE)
        if number not in known and (len(source) > LONGEST) == longer:
            known.add(number)
            found.append(Pair(number, source, name(number, language)))
    return found


def _number(draw: random.Random) -> int:
    # from random() alone: the only stream that Python keeps the same from version to version
    digits = 1 + int(DIGITS * draw.random())
    return int("".join("0" if draw.random() < ZERO else str(int(10 * draw.random())) for _ in range(digits)))
