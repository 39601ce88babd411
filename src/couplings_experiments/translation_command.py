"""`couplings translate`: a small translator, trained once and kept in --out, and the beam that it finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from couplings_experiments.data.numbers import DIGITS, SOURCE, check_language, corpus, name
from couplings_experiments.errors import UserError
from couplings_experiments.experiment import Progress
from couplings_experiments.files import make_directory, owned
from couplings_experiments.translation_training import (
    NETWORKS,
    ROWS,
    Hypothesis,
    Plan,
    beams,
    build,
    fit,
    phases,
)

ROW = "lstm-topk-beam"
PLAN = Plan(seeds=1, train=1000, held=100, first=16, second=2)
SEED = 0


class Translation(NamedTuple):
    """What was asked, what was found, and the truth where it is known."""

    source: tuple[str, ...]
    hypotheses: list[Hypothesis]
    truth: tuple[str, ...] | None


def translate(text: str, language: str, beam: int, out: Path, progress: Progress) -> Translation:
    """The beam for ``text``, a number in English words or in digits.

    Args:
        text: such as "two hundred and five", or "205", whose true translation is then known, too.
        language: to translate to, one of `LANGUAGES`.
        beam: how many hypotheses to keep.
        out: where the translator is kept; it is trained if there is none.
        progress: whom to report to.

    Raises:
        UserError: an unknown language or word, no word at all, a number that is too large, an ``out`` in use.
    """
    check_language(language)
    source, truth = _read(text, language)
    plan, row = PLAN, ROWS[ROW]
    data = corpus(language, plan.train, plan.held, SEED)
    data.source.encode(source)  # complains before it trains
    model = build(row.network, data, plan, SEED)
    directory = out / f"translator-{language}"
    make_directory(directory)
    weights = (NETWORKS[row.network].weight, row.weight)
    progress.expect(plan.first * weights[0] + plan.second * weights[1])
    with owned(directory):
        for place, phase, weight in zip(("first", "second"), phases(row, plan), weights, strict=True):
            make_directory(directory / place)
            fit(
                model,
                phase,
                data,
                plan,
                SEED,
                directory / place,
                identity=f"translate {place}",
                after_epoch=lambda done, weight=weight: progress.advance(  # type: ignore[misc]
                    done * weight, "training a translator (once)"
                ),
                say=progress.say,
            )
    return Translation(source, beams(model, data, [source], beam=beam)[0], truth)


def _read(text: str, language: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The English words, and the translation if the number is given in digits."""
    digits = re.sub(r"[\s,_]", "", text)
    if digits.isdecimal():
        if len(digits.lstrip("0")) > DIGITS:
            raise UserError(
                f"{text} is too large: expected a number below a billion, larger ones were not learned."
            )
        return name(int(digits), SOURCE), name(int(digits), language)
    words = tuple(re.findall(r"[^\W\d_]+", text.lower()))
    if not words:
        raise UserError('there is nothing to translate. Try: couplings translate "two hundred and five"')
    return words, None
