"""What the translation experiment compares, and how it is trained: teacher forcing, then a shorter second phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sacrebleu
import torch
from torch import Tensor, nn

import couplings as cp
from couplings_experiments.data.numbers import END, PAD, START, Corpus, Pair
from couplings_experiments.epochs import Epochs
from couplings_experiments.translation_model import LstmTranslator, TransformerTranslator, Translator

BEAM = 5
RHO = 0.8
BEAM_EPSILON = 0.1
TOPK = 3
TOPK_EPSILON = 0.5
_SLACK = 6  # words that a translation may have beyond the longest one that tests
_TOGETHER = 150  # sentences decoded at a time


@dataclass(frozen=True)
class Row:
    """One way to translate: a network, its attention, and the loss of the second phase."""

    label: str
    network: str  # of `NETWORKS`: rows with the same network share its first phase
    beam: bool
    weight: (
        float  # how long an epoch of the second phase takes compared with the cheapest (for the time left)
    )


@dataclass(frozen=True)
class Network:
    """A network of its first phase."""

    label: str
    kind: type[Any]
    topk: int | None
    rate: float
    weight: float


NETWORKS = {
    "lstm": Network("LSTM", LstmTranslator, None, 4e-3, 3.0),
    "lstm-topk": Network("LSTM with top-k attention", LstmTranslator, TOPK, 4e-3, 5.0),
    "transformer": Network("transformer", TransformerTranslator, None, 2e-3, 1.0),
    "transformer-topk": Network("transformer with top-k attention", TransformerTranslator, TOPK, 2e-3, 1.5),
}
ROWS = {
    "lstm": Row("LSTM", "lstm", False, 3.0),
    "lstm-beam": Row("LSTM with soft beam", "lstm", True, 18.0),
    "lstm-topk": Row("LSTM with top-k attention", "lstm-topk", False, 5.0),
    "lstm-topk-beam": Row("LSTM with top-k attention and soft beam", "lstm-topk", True, 24.0),
    "transformer": Row("transformer", "transformer", False, 1.0),
    "transformer-topk": Row("transformer with top-k attention", "transformer-topk", False, 1.5),
}


@dataclass(frozen=True)
class Plan:
    """How much a preset does.

    Attributes:
        seeds: how many.
        train, held: numbers that train; that validate, that test, and longer ones that test.
        first, second: epochs of teacher forcing, and of the second phase.
        rows: of `ROWS`, which ones are compared.
        width: of the networks.
        batch: sentences of a step.
        slower: the second phase starts with the first one's rate times this.
        clip: largest norm of a gradient.
    """

    seeds: int
    train: int
    held: int
    first: int
    second: int
    rows: tuple[str, ...] = tuple(ROWS)
    width: int = 64
    batch: int = 64
    slower: float = 0.3
    clip: float = 1.0


PLANS = {
    "smoke": Plan(1, 96, 20, 2, 1, ("lstm", "lstm-beam", "transformer", "transformer-topk"), width=16),
    "quick": Plan(1, 800, 100, 9, 3, ("lstm", "lstm-beam", "lstm-topk", "transformer", "transformer-topk")),
    "full": Plan(3, 1000, 400, 16, 4),
}


class Batch(NamedTuple):
    """Sentences padded with `PAD`: (batch, S), (batch, T), and the lengths of the latter."""

    source: Tensor
    gold: Tensor
    lengths: Tensor


def collate(pairs: Sequence[Pair], corpus: Corpus, device: torch.device) -> Batch:
    """Words as padded numbers; every sentence ends with `END`."""
    sources = [torch.tensor(corpus.source.encode(pair.source)) for pair in pairs]
    targets = [torch.tensor(corpus.target.encode(pair.target)) for pair in pairs]
    source, gold = (
        nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=PAD).to(device)
        for side in (sources, targets)
    )
    return Batch(source, gold, torch.tensor([len(target) for target in targets], device=device))


def build(network: str, corpus: Corpus, plan: Plan, seed: int) -> Translator:
    """A freshly initialised network; with and without top-k it starts from the same weights."""
    described = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Translator = described.kind(
            len(corpus.source), len(corpus.target), plan.width, described.topk, TOPK_EPSILON
        )
    return model


def loss_of(model: Translator, batch: Batch, *, beam: bool) -> Tensor:
    """Teacher forcing, or its mixture with the soft beam."""
    if not beam:
        return model.forced_loss(batch.source, batch.gold, batch.lengths)
    step, state = model.begin(batch.source)
    return cp.beam.sequence_loss(
        step,
        model.embeddings,
        state,
        batch.gold,
        start=START,
        lengths=batch.lengths,
        beam=BEAM,
        epsilon=BEAM_EPSILON,
        rho=RHO,
    )


# --------------------------------------------------------------------------------------------------------- training


class Phase(NamedTuple):
    """One stretch of training."""

    beam: bool
    epochs: int
    rate: float


def phases(row: Row, plan: Plan) -> tuple[Phase, Phase]:
    """Teacher forcing, and what follows it; the steps are as many for every row."""
    rate = NETWORKS[row.network].rate
    return Phase(False, plan.first, rate), Phase(row.beam, plan.second, rate * plan.slower)


def fit(
    model: Translator,
    phase: Phase,
    corpus: Corpus,
    plan: Plan,
    seed: int,
    directory: Path,
    *,
    identity: str,
    after_epoch: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, float]]:
    """Train ``model`` in place, continuing from a checkpoint in ``directory`` if there is one, and return the history.

    Adam; the rate rises for a tenth of the steps and falls to 0 as a cosine.

    Args:
        model: what the phase starts from.
        phase: see `Phase`.
        corpus: to learn from.
        plan: the batches.
        seed: of the batches.
        directory: for checkpoints.
        identity: what is trained; a checkpoint of anything else is not continued.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption).
        say: takes a line for the user.

    Raises:
        Diverged: the loss became infinite or NaN.
    """
    device = model.embeddings.device
    optimiser = torch.optim.Adam(model.parameters(), phase.rate)
    draw = torch.Generator().manual_seed(seed)
    epochs = Epochs(
        directory,
        model,
        optimiser,
        {"draw": draw},
        identity=identity,
        stated=[seed, *phase, asdict(plan), corpus.language],
        after_epoch=after_epoch,
        say=say,
    )
    steps = math.ceil(len(corpus.train) / plan.batch)
    for epoch in range(len(epochs.history), phase.epochs):
        model.train()
        order = torch.randperm(len(corpus.train), generator=draw).tolist()
        losses = []
        for number in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = phase.rate * _share(epoch * steps + number, phase.epochs * steps)
            chosen = [corpus.train[i] for i in order[number * plan.batch : (number + 1) * plan.batch]]
            loss = loss_of(model, collate(chosen, corpus, device), beam=phase.beam)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimiser.step()
            losses.append(loss.detach())
        mean = epochs.mean(losses)
        exact = score(translations(model, corpus, corpus.validation, beam=1), corpus.validation)["exact"]
        epochs.close({"epoch": epoch + 1, "loss": mean, "validation": exact})
    return epochs.history


def _share(number: int, total: int) -> float:
    """The share of the learning rate that step ``number`` has."""
    rise = max(1, total // 10)
    return min(1.0, (number + 1) / rise) * (1 + math.cos(math.pi * number / total)) / 2


# ---------------------------------------------------------------------------------------------------------- testing


class Hypothesis(NamedTuple):
    """A translation and its log-likelihood."""

    words: tuple[str, ...]
    log_likelihood: float


def beams(
    model: Translator, corpus: Corpus, sources: Sequence[Sequence[str]], *, beam: int
) -> list[list[Hypothesis]]:
    """The hypotheses of every sentence, best first."""
    model.eval()
    device = model.embeddings.device
    longest = max(len(pair.target) for pair in (*corpus.train, *corpus.unseen, *corpus.longer)) + _SLACK
    found = []
    with torch.no_grad():
        for first in range(0, len(sources), _TOGETHER):
            some = [Pair(0, tuple(source), ()) for source in sources[first : first + _TOGETHER]]
            step, state = model.begin(collate(some, corpus, device).source)
            result = cp.beam.beam_search(
                step,
                model.embeddings,
                state,
                start=torch.full((len(some),), START, device=device),
                beam=beam,
                max_length=longest,
                end=END,
            )
            for tokens, scores in zip(result.tokens.tolist(), result.log_likelihoods.tolist(), strict=True):
                ranked = zip(tokens, scores, strict=True)
                found.append([Hypothesis(corpus.target.decode(t), s) for t, s in ranked if math.isfinite(s)])
    return found


def translations(
    model: Translator, corpus: Corpus, pairs: Sequence[Pair], *, beam: int = BEAM
) -> list[tuple[str, ...]]:
    """The most likely hypothesis of every sentence."""
    return [found[0].words for found in beams(model, corpus, [p.source for p in pairs], beam=beam)]


def score(found: Sequence[tuple[str, ...]], pairs: Sequence[Pair]) -> dict[str, float]:
    """BLEU and chrF (0 to 100, by sacrebleu), and the share translated without a mistake."""
    texts = [" ".join(words) for words in found]
    references = [[" ".join(pair.target) for pair in pairs]]
    return {
        "bleu": sacrebleu.corpus_bleu(texts, references).score,
        "chrf": sacrebleu.corpus_chrf(texts, references).score,
        "exact": sum(a == p.target for a, p in zip(found, pairs, strict=True)) / len(pairs),
    }


def attention(
    model: Translator, corpus: Corpus, source: Sequence[str], target: Sequence[str]
) -> list[list[float]]:
    """Weights of the sources, one row for each word of ``target`` and its end."""
    model.eval()
    batch = collate([Pair(0, tuple(source), ())], corpus, model.embeddings.device)
    # a model that has learned little may write `SPECIAL`, too
    tokens = [*(corpus.target.words.index(word) for word in target), END]
    gold = torch.tensor([tokens], device=model.embeddings.device)
    record: list[Tensor] = []
    with torch.no_grad():
        step, state = model.begin(batch.source, record)
        cp.beam.teacher_forcing_loss(step, model.embeddings, state, gold, start=START)
    return [[round(weight, 4) for weight in weights[0].tolist()] for weights in record]
