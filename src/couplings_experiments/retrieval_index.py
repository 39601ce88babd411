"""A trained retriever that is kept beside the report, and the answers it gives to `couplings search`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from couplings.similarity import maxsim_topk
from couplings_experiments.checkpoint import fingerprint, read_tensors, write_tensors
from couplings_experiments.data.docstrings import PARTS, Entry
from couplings_experiments.errors import UserError
from couplings_experiments.files import Damaged, read_json, write_json
from couplings_experiments.retrieval_methods import encode
from couplings_experiments.retrieval_model import Encoder, Lexicon, Shape
from couplings_experiments.retrieval_training import QUESTION, Corpus, Plan

MODEL, ENTRIES, INDEX = "model.safetensors", "docstrings.json", "words.safetensors"
FOLDER = "retrieval"  # in the report's directory


class Answer(NamedTuple):
    """A docstring and the mean cosine of the question's words to their nearest words in it."""

    score: float
    entry: Entry


def save(directory: Path, model: Encoder, plan: Plan, data: Corpus) -> None:
    """Keep the encoder, and the docstrings of all parts with their words' vectors in half precision."""
    entries = [entry for part in PARTS for entry in data.parts[part]]
    # files of two runs side by side do not pass for one another's
    run = {"shape": asdict(plan.shape), "texts": data.fingerprint, "model": fingerprint(model.state_dict())}
    write_tensors(directory / MODEL, model.state_dict(), run)
    write_json(directory / ENTRIES, {"run": run, "entries": [asdict(entry) for entry in entries]})
    lexicon = Lexicon()
    # who searches wants to find the summaries, too, and the names
    told = [f"{entry.name.rpartition('.')[2]} {entry.query} {entry.body}" for entry in entries]
    texts = lexicon.read(told, plan.training.limit[1])
    parts = encode(model, lexicon, texts)
    values = torch.cat([part.vectors[part.mask] for part in parts]).half().cpu()
    lengths = texts.mask.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    write_tensors(directory / INDEX, {"values": values, "offsets": offsets}, run)


def search(
    out: Path, question: str, count: int, progress: Callable[[int, int | None], None] | None = None
) -> list[Answer]:
    """The docstrings that answer ``question`` best, best first.

    Args:
        out: the report's directory, with what `save` has kept in its folder `FOLDER`.
        question: in words.
        count: how many answers.
        progress: see `maxsim_topk`.

    Raises:
        UserError: nothing is kept there, what is kept is damaged, or the question has no words.
    """
    directory = out / FOLDER
    if not (directory / MODEL).exists():
        raise UserError(
            f"no trained retriever in {directory}. Run: couplings reproduce retrieval --out {out}"
        )
    lexicon = Lexicon()
    asked = lexicon.read([question], QUESTION)
    if not bool(asked.mask.any()):
        raise UserError(f"nothing to look for in {question!r}. Ask with words of two Latin letters or more.")
    try:
        weights, run = read_tensors(directory / MODEL)
        index, indexed = read_tensors(directory / INDEX)
        told = read_json(directory / ENTRIES) or {}
        if not run == indexed == told.get("run"):
            raise Damaged(f"{directory} holds files of several runs")
        entries = [Entry(**entry) for entry in told["entries"]]
        model = Encoder(Shape(**run["shape"]))
        model.load_state_dict(weights)
    except Damaged as error:
        raise UserError(
            f"{error}: it is damaged. Run again: couplings reproduce retrieval --out {out}"
        ) from None
    except (KeyError, TypeError, RuntimeError):  # other names or shapes than this version's
        raise UserError(
            f"{directory} is of another version of couplings. Run again: couplings reproduce retrieval --out {out}"
        ) from None
    query = encode(model, lexicon, asked)[0]
    best = maxsim_topk(
        query.vectors,
        (index["values"], index["offsets"]),
        min(count, len(entries)),
        query_mask=query.mask,
        reduction="mean",
        progress=progress,
    )
    return [
        Answer(score, entries[place])
        for score, place in zip(best.values[0].tolist(), best.indices[0].tolist(), strict=True)
    ]
