"""A trained retriever that is kept beside the report, and the answers it gives to `couplings search`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from couplings.similarity import maxsim_topk
from couplings_experiments.data.docstrings import PARTS, Entry
from couplings_experiments.errors import UserError
from couplings_experiments.files import read_json, write_atomic, write_json
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
    metadata = {"shape": json.dumps(asdict(plan.shape)), "texts": data.fingerprint}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(directory / MODEL, safetensors.torch.save(weights, metadata))
    write_json(directory / ENTRIES, [asdict(entry) for entry in entries])
    lexicon = Lexicon()
    # who searches wants to find the summaries, too, and the names
    told = [f"{entry.name.rpartition('.')[2]} {entry.query} {entry.body}" for entry in entries]
    texts = lexicon.read(told, plan.training.limit[1])
    parts = encode(model, lexicon, texts)
    values = torch.cat([part.vectors[part.mask] for part in parts]).half().cpu()
    lengths = texts.mask.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    write_atomic(directory / INDEX, safetensors.torch.save({"values": values, "offsets": offsets}, metadata))


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
    damaged = UserError(f"{directory} is damaged. Run again: couplings reproduce retrieval --out {out}")
    found = read_json(directory / ENTRIES)
    if not isinstance(found, list) or not (directory / INDEX).exists():
        raise damaged
    try:
        weights, metadata = _load(directory / MODEL)
        index, belongs = _load(directory / INDEX)
        model = Encoder(Shape(**json.loads(metadata["shape"])))
        model.load_state_dict(weights)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        raise damaged from None
    if belongs != metadata or len(index["offsets"]) != len(found) + 1:
        raise damaged
    query = encode(model, lexicon, asked)[0]
    best = maxsim_topk(
        query.vectors,
        (index["values"], index["offsets"]),
        min(count, len(found)),
        query_mask=query.mask,
        reduction="mean",
        progress=progress,
    )
    return [
        Answer(score, Entry(**found[place]))
        for score, place in zip(best.values[0].tolist(), best.indices[0].tolist(), strict=True)
    ]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118 - not a dict
