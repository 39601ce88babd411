"""How the retrievers are set up and trained: variants, presets, one loop, resumable after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from couplings_experiments.data import docstrings
from couplings_experiments.data.docstrings import PACKAGES, PARTS, Entry
from couplings_experiments.epochs import Epochs
from couplings_experiments.retrieval_methods import (
    Encoded,
    Variant,
    all_scores,
    ranks,
    reciprocal,
    training_scores,
)
from couplings_experiments.retrieval_model import Encoder, Lexicon, Shape, Texts

# Learning rate, temperature and setting of each were chosen on validation modules: `couplings reproduce
# retrieval-search`.
VARIANTS = {
    "maxsim": Variant("late interaction (MaxSim)", "max", 3e-3, 0.05, (), 1.3),
    "smooth": Variant("smooth MaxSim", "smooth", 3e-3, 0.05, (0.02,), 1.7),
    "xtr": Variant("XTR-style", "retrieved", 3e-3, 0.05, (256, 2000), 2.2),
    "single": Variant("single vector", "single", 3e-3, 0.1, (), 1.0),
}
QUESTION = 24  # words of a question that are read


@dataclass(frozen=True)
class Training:
    """AdamW, a short rise and a linear decay to 0 of the learning rate, cross-entropy both ways within the batch.

    Attributes:
        epochs: how many.
        pairs: of a step: each question has the other pairs' texts for wrong ones, and each text their questions.
        limit: words of a text that are read in training, and when texts are searched.
        clip: largest norm of a gradient.
    """

    epochs: int
    pairs: int = 64
    limit: tuple[int, int] = (96, 256)
    clip: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How much a preset does: seeds, training, the packages whose docstrings are read, variants, encoder."""

    seeds: int
    training: Training
    packages: tuple[str, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)
    shape: Shape = field(default_factory=Shape)


_NUMERIC = tuple(name for name in PACKAGES if name not in ("sympy", "torch"))
PLANS = {
    "smoke": Plan(1, Training(epochs=2, pairs=32), ("skimage",), ("maxsim", "single"), Shape(32, 1, 2**12)),
    "quick": Plan(1, Training(epochs=2), _NUMERIC, ("maxsim", "single")),
    "full": Plan(3, Training(epochs=4), _NUMERIC),
}


class Corpus(NamedTuple):
    """Entries by part, and their words: questions and texts of each part."""

    parts: dict[str, list[Entry]]
    lexicon: Lexicon
    questions: dict[str, Texts]
    texts: dict[str, Texts]
    fingerprint: str


@lru_cache(maxsize=1)  # all variants and seeds read the same texts
def corpus(packages: tuple[str, ...], limit: tuple[int, int]) -> Corpus:
    """What is asked and what is told."""
    found = docstrings.entries(packages)
    parts = docstrings.split(found)
    lexicon = Lexicon()
    questions = {name: lexicon.read([entry.query for entry in parts[name]], QUESTION) for name in PARTS}
    texts = {
        name: lexicon.read([entry.body for entry in parts[name]], limit[name != "train"]) for name in PARTS
    }
    return Corpus(parts, lexicon, questions, texts, docstrings.fingerprint(found))


class Trained(NamedTuple):
    """An encoder and how it came to be."""

    model: Encoder
    history: list[dict[str, float]]


def build(plan: Plan, seed: int) -> Encoder:
    """A freshly initialised encoder; the same seed gives every variant the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(plan.shape)


def train(
    variant: Variant,
    plan: Plan,
    seed: int,
    directory: Path,
    *,
    device: torch.device,
    identity: str,
    after_epoch: Callable[[int], None] = lambda epochs: None,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train one encoder, continuing from a checkpoint in ``directory`` if there is one.

    Args:
        variant: see `Variant`.
        plan: see `Plan`.
        seed: of the first weights and of the order of the pairs.
        directory: for checkpoints.
        device: where to compute.
        identity: what is trained; a checkpoint of anything else is not continued.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption).
        say: takes a line for the user.

    Raises:
        Diverged: the loss is not finite.
    """
    settings = plan.training
    data = corpus(plan.packages, settings.limit)
    questions, texts = data.questions["train"], data.texts["train"]
    model = build(plan, seed).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), variant.rate)
    draw = torch.Generator().manual_seed(seed)
    epochs = Epochs(
        directory,
        model,
        optimiser,
        {"draw": draw},
        identity=identity,
        stated=[seed, asdict(variant), asdict(plan), data.fingerprint],
        after_epoch=after_epoch,
        say=say,
    )
    steps = len(questions) // settings.pairs
    for epoch in range(len(epochs.history), settings.epochs):
        model.train()
        losses = []
        order = torch.randperm(len(questions), generator=draw).split(settings.pairs)[:steps]
        for number, rows in enumerate(order, epoch * steps):
            for group in optimiser.param_groups:
                group["lr"] = variant.rate * schedule(number, settings.epochs * steps)
            loss = contrastive(variant, model, data.lexicon, questions.at(rows), texts.at(rows))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
            losses.append(loss.detach())
        mean = epochs.mean(losses)
        found = ranks(
            all_scores(variant, model, data.lexicon, data.questions["validation"], data.texts["validation"])
        )
        epochs.close({"epoch": epoch + 1, "loss": mean, "validation": float(reciprocal(found).mean())})
    return Trained(model, epochs.history)


def contrastive(
    variant: Variant, model: Encoder, lexicon: Lexicon, questions: Texts, texts: Texts
) -> torch.Tensor:
    """Cross-entropy of finding each question's text among the batch's, and each text's question."""
    device = model.table.device
    asked = Encoded(model(questions, lexicon), questions.mask.to(device))
    told = Encoded(model(texts, lexicon), texts.mask.to(device))
    logits = training_scores(variant, asked, told) / variant.temperature
    target = torch.arange(len(logits), device=device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.mT, target)) / 2


def schedule(number: int, total: int) -> float:
    """The share of the learning rate that step ``number`` has."""
    return min(1.0, (number + 1) / max(1, total // 10)) * (1 - number / total)
