"""Learning to rank: NDCG, average precision and Spearman's correlation as losses, against the classics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor

from couplings.losses import average_precision_loss, ndcg_loss, spearman_loss
from couplings_experiments.data.patients import Group, load_patients
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.fitting import Fitting, RowNetworks, best, fit
from couplings_experiments.ranking_losses import lambdarank, listnet, ranknet, squared_error
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, drawing
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread, standing

LENGTH = 20  # patients in a list
LISTS = 8  # lists in a step
GRADES = 5  # fifths of the training patients by progression, 0..4
RELEVANT = 3  # from this grade on a patient is relevant
CUTOFF = 10
HIDDEN = 16


@dataclass(frozen=True)
class Trial:
    """One setting of a method: its learning rate, and epsilon or the weight of the squared parameters."""

    rate: float
    epsilon: float | None = None
    decay: float = 0.0


# Six trials for everyone: three learning rates with two epsilons, or with two weight decays where there is no epsilon.
RATES = (0.001, 0.003, 0.01)
PLAIN = tuple(Trial(rate, decay=decay) for rate, decay in product(RATES, (0.0, 0.3)))
SOFT = tuple(Trial(rate, epsilon) for rate, epsilon in product(RATES, (0.1, 1.0)))


@dataclass(frozen=True)
class Method:
    """A loss (rows, lists, n), (lists, n), epsilon (rows, 1) -> (rows, lists), and the trials it is allowed."""

    label: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    trials: tuple[Trial, ...]
    weight: float  # how long an epoch takes compared with the cheapest (for the time left)
    soft: bool


def _soft_ndcg(scores: Tensor, grades: Tensor, epsilon: Tensor) -> Tensor:
    return ndcg_loss(scores, grades, epsilon=epsilon.expand(scores.shape[:-1]), reduction="none")


def _soft_precision(scores: Tensor, grades: Tensor, epsilon: Tensor) -> Tensor:
    relevant = grades >= RELEVANT
    return average_precision_loss(
        scores, relevant, epsilon=epsilon.expand(scores.shape[:-1]), reduction="none"
    )


def _soft_spearman(scores: Tensor, grades: Tensor, epsilon: Tensor) -> Tensor:
    return spearman_loss(scores, grades, epsilon=epsilon.expand(scores.shape[:-1]), reduction="none")


def _plain(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda scores, grades, epsilon: loss(scores, grades)


METHODS = {
    "regression": Method("squared error", _plain(squared_error), PLAIN, 1.0, False),
    "ranknet": Method("RankNet", _plain(ranknet), PLAIN, 1.0, False),
    "lambdarank": Method("LambdaRank", _plain(lambdarank), PLAIN, 1.5, False),
    "listnet": Method("ListNet", _plain(listnet), PLAIN, 1.0, False),
    "ndcg": Method("soft NDCG", _soft_ndcg, SOFT, 3.0, True),
    "precision": Method("soft AP", _soft_precision, SOFT, 6.0, True),
    "spearman": Method("soft Spearman", _soft_spearman, SOFT, 3.0, True),
}
METRICS = {
    f"ndcg{CUTOFF}": f"NDCG@{CUTOFF}",
    "ndcg": "NDCG",
    "map": "MAP",
    "spearman": "Spearman",
}
TRAINS = {"ndcg": "ndcg", "precision": "map", "spearman": "spearman"}  # which metric a soft loss relaxes


@dataclass(frozen=True)
class Plan:
    """How much a preset does."""

    seeds: int
    fitting: Fitting
    held: int  # validation lists, and as many test lists


PLANS = {
    "smoke": Plan(1, Fitting(epochs=2, steps=2), held=10),
    "quick": Plan(1, Fitting(epochs=6, steps=25), held=200),
    "full": Plan(10, Fitting(epochs=6, steps=25), held=200),
}


@dataclass(frozen=True)
class Lists:
    """Patients in lists: measurements (lists, n, 10), grades (lists, n), and which patients they are (lists, n)."""

    features: Tensor
    grades: Tensor
    patients: Tensor


def draw_lists(group: Group, thresholds: Tensor, count: int, draw: torch.Generator) -> Lists:
    """``count`` lists of different patients of ``group``, with grades: how many of ``thresholds`` lie below."""
    chosen = torch.rand(count, len(group), generator=draw).argsort(-1)[:, :LENGTH].to(group.targets.device)
    targets = group.targets[chosen]
    grades = (targets.unsqueeze(-1) > thresholds).sum(-1)
    return Lists(group.features[chosen], grades, group.patients[chosen])


def grade_thresholds(group: Group) -> Tensor:
    """The four progressions that divide ``group`` into fifths."""
    levels = torch.arange(1, GRADES, device=group.targets.device) / GRADES
    return torch.quantile(group.targets, levels)


def metrics(scores: npt.NDArray[np.float64], grades: npt.NDArray[np.int64]) -> dict[str, float]:
    """Means over lists (lists, n), by scikit-learn and scipy.

    Gains are 2^grade - 1. Average precision is that of the lists with a relevant entry, Spearman's correlation that of
    the lists whose grades are not all equal; constant scores have correlation 0.
    """
    gains = 2.0**grades - 1
    relevant = grades >= RELEVANT
    ordered = [
        float(spearmanr(s, g).statistic) if np.ptp(s) > 0 else 0.0
        for s, g in zip(scores, grades, strict=True)
        if np.ptp(g) > 0
    ]
    precise = [float(average_precision_score(r, s)) for s, r in zip(scores, relevant, strict=True) if r.any()]
    return {
        f"ndcg{CUTOFF}": float(ndcg_score(gains, scores, k=CUTOFF)),
        "ndcg": float(ndcg_score(gains, scores)),
        "map": fmean(precise),
        "spearman": fmean(ordered),
    }


def run(context: Context) -> dict[str, Any]:
    """Train every method on every seed, choose by validation lists, test the chosen model once."""
    torch.set_num_threads(1)
    plan = PLANS[context.request.preset]
    seeds = range(context.request.seeds or plan.seeds)
    context.progress.expect(len(seeds) * plan.fitting.epochs * sum(m.weight for m in METHODS.values()))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in seeds:
        for name in METHODS:
            results[name].append(_unit(context, name, seed))
    return {
        "preset": context.request.preset,
        "seeds": list(seeds),
        "sizes": load_patients(0).sizes,
        "fitting": asdict(plan.fitting),
        "held": plan.held,
        "test": {
            name: {metric: [found["test"][metric] for found in results[name]] for metric in METRICS}
            for name in METHODS
        },
        "chosen": {name: [found["chosen"] for found in results[name]] for name in METHODS},
        "trials": {name: [asdict(trial) for trial in method.trials] for name, method in METHODS.items()},
        "seconds": {name: [found["seconds"] for found in results[name]] for name in METHODS},
    }


def _unit(context: Context, name: str, seed: int) -> dict[str, Any]:
    plan, method = PLANS[context.request.preset], METHODS[name]
    title = f"{method.label}, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        data = load_patients(seed).to(context.device)
        thresholds = grade_thresholds(data.train)
        validation = draw_lists(data.validation, thresholds, plan.held, torch.Generator().manual_seed(seed))
        test = draw_lists(data.test, thresholds, plan.held, torch.Generator().manual_seed(0))
        trials = method.trials
        networks = RowNetworks([trial.rate for trial in trials], data.train.features.shape[-1], HIDDEN, seed)
        networks.to(context.device)
        epsilon = torch.tensor([[trial.epsilon or 1.0] for trial in trials], device=context.device)
        decay = torch.tensor([trial.decay for trial in trials], device=context.device)

        def step(draw: torch.Generator) -> Tensor:
            lists = draw_lists(data.train, thresholds, LISTS, draw)
            losses = method.loss(networks(lists.features), lists.grades, epsilon)
            return losses.mean(-1) + decay * networks.penalty()

        def measure() -> list[float]:
            scores, gains = _numpy(networks(validation.features)), 2.0 ** _numpy(validation.grades) - 1
            return [
                float(ndcg_score(gains, row, k=CUTOFF, ignore_ties=True))
                if np.isfinite(row).all()
                else np.nan
                for row in scores
            ]

        history = fit(
            networks,
            step,
            measure,
            plan.fitting,
            seed,
            directory,
            identity=f"{name} {trials} {context.request.preset}",
            after_epoch=lambda done: context.progress.advance(done * method.weight, title),
            say=context.progress.say,
        )
        chosen = best(history[-1], highest=True)
        with torch.no_grad():
            scores = _numpy(networks(test.features)[chosen])
        return {
            "chosen": chosen,
            "validation": history[-1],
            "test": metrics(scores.astype(np.float64), _numpy(test.grades)),
        }

    result = context.unit(f"{name}-{seed}", plan.fitting.epochs * method.weight, compute)
    found = ", ".join(f"{METRICS[metric]} {value:.3f}" for metric, value in result["test"].items())
    context.progress.say(f"seed {seed}: {method.label}: {found}  ({result['seconds']:.1f} s)")
    return result


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return found


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the table, a picture, the settings."""
    return [
        *_meaning(result),
        _table(result),
        Heading("How far apart the methods are"),
        _picture(result),
        Heading("Settings"),
        *_settings(result),
    ]


def _meaning(result: dict[str, Any]) -> list[Block]:
    """Sentences whose every claim is computed."""
    test, seeds = result["test"], len(result["seeds"])
    classic = [name for name, method in METHODS.items() if not method.soft]
    said = []
    verdicts: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for metric, title in METRICS.items():
        mean = {name: fmean(test[name][metric]) for name in METHODS}
        rival = max(classic, key=lambda name: mean[name])
        mine = max(TRAINS, key=lambda name: mean[name])
        gap = paired(test[mine][metric], test[rival][metric])
        if round(mean[mine], 3) == round(mean[rival], 3):
            how = f"{METHODS[mine].label} and {METHODS[rival].label} both {mean[mine]:.3f}"
        else:
            how = f"{METHODS[mine].label} {mean[mine]:.3f}, {METHODS[rival].label} {mean[rival]:.3f}"
        said.append(f"{title}: {how}")
        verdicts[clear(gap)].append(title)
    first = (
        f"The best loss through soft ranks beside the best of the classic losses, {seeds_in_words(seeds)}: "
        f"{'; '.join(said)}."
    )
    if seeds < 3:
        return [Paragraph(first + caution(seeds), lead=True)]
    parts = []
    if verdicts[1]:
        parts.append(
            f"soft ranks help, by paired differences beyond two standard errors, in {join(verdicts[1])}"
        )
    if verdicts[0]:
        parts.append(f"soft ranks make no difference that these seeds can show in {join(verdicts[0])}")
    if verdicts[-1]:
        parts.append(f"soft ranks do worse than the best classic loss in {join(verdicts[-1])}")
    text = "; ".join(parts)
    second = f" {text[0].upper()}{text[1:]}."
    own = []
    for name, metric in TRAINS.items():
        others = [other for other in METHODS if other != name]
        top = max(others, key=lambda other: fmean(test[other][metric]))
        sign = clear(paired(test[name][metric], test[top][metric]))
        word = {1: "clearly above", 0: "not distinguishable from", -1: "clearly below"}[sign]
        own.append(
            f"{METHODS[name].label} is {word} {METHODS[top].label}, the best of the others, in {METRICS[metric]}"
        )
    third = f" On the metric that each one relaxes: {'; '.join(own)}."
    return [Paragraph(first + second + third, lead=True)]


def _table(result: dict[str, Any]) -> Table:
    test, seeds = result["test"], len(result["seeds"])
    rows = tuple(
        (method.label, *(spread(test[name][metric], 3) for metric in METRICS))
        for name, method in METHODS.items()
    )
    how = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, no spread"
    return Table(
        caption=f"Test lists of {LENGTH} patients",
        header=("Loss", *METRICS.values()),
        rows=rows,
        note=(
            f"{how[0].upper()}{how[1:]}. A list is {LENGTH} patients drawn at random; the grade of a patient, 0 to "
            f"{GRADES - 1}, is the fifth of the training patients that the measured disease progression falls into. "
            f"{result['sizes']['train']} training, {result['sizes']['validation']} validation and "
            f"{result['sizes']['test']} test patients, none in two parts. The {result['held']} test lists share "
            "patients and are the same for all seeds, which change the division of the others, the first weights and "
            f"the lists: the spread is that of training. Gains are 2^grade - 1; relevant for MAP is grade {RELEVANT} "
            "and above. Metrics by scikit-learn and scipy. The publications use other data; none has figures for these."
        ),
        strong=tuple(i for i, method in enumerate(METHODS.values()) if method.soft),
    )


def _picture(result: dict[str, Any]) -> Figure:
    test = result["test"]
    names = list(METHODS)[::-1]
    with drawing("ranking", 7.8, 2.9) as (canvas, out):
        axes = canvas.subplots(1, len(METRICS), sharey=True)
        for place, (metric, title) in zip(axes, METRICS.items(), strict=True):
            for height, name in enumerate(names):
                values = test[name][metric]
                colour = COLOURS[0] if METHODS[name].soft else COLOURS[1]
                place.plot(values, [height] * len(values), ".", color=FAINT, markersize=4, alpha=0.6)
                place.plot([fmean(values)], [height], "o", color=colour, markersize=7)
            place.set_title(title)
            place.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
            place.margins(x=0.12, y=0.08)
            place.locator_params(axis="x", nbins=3)
        axes[0].set_yticks(range(len(names)), [METHODS[name].label for name in names])
        for place in axes:
            place.tick_params(axis="y", length=0)
    shown = "; ".join(f"{METHODS[name].label} {fmean(test[name][f'ndcg{CUTOFF}']):.3f}" for name in METHODS)
    many = "small grey dots are seeds, large ones" if len(result["seeds"]) > 1 else "dots are"
    return Figure(
        out[-1],
        f"Each panel one metric on its own scale, none of which begins at 0; {many} means, blue for the losses "
        "through soft ranks and orange for the others.",
        f"Four dot plots of the seven losses. NDCG@{CUTOFF}: {shown}.",
    )


def _settings(result: dict[str, Any]) -> list[Block]:
    used = result["fitting"]
    rows = []
    for name, method in METHODS.items():
        counts: dict[str, int] = {}
        for index in result["chosen"][name]:
            trial = result["trials"][name][index]
            second = f"epsilon {trial['epsilon']:g}" if method.soft else f"decay {trial['decay']:g}"
            words = f"rate {trial['rate']:g}, {second}"
            counts[words] = counts.get(words, 0) + 1
        most = max(counts, key=lambda words: counts[words])
        often = (
            f" ({counts[most]} of {len(result['chosen'][name])})" if len(result["chosen"][name]) > 1 else ""
        )
        rows.append((method.label, most + often, f"{fmean(result['seconds'][name]):.1f}"))
    return [
        Paragraph(
            f"A scorer with one hidden layer of {HIDDEN} units, the same first weights for every loss; Adam with "
            f"cosine decay, {used['epochs'] * used['steps']} steps of {LISTS} fresh lists of training patients. Each "
            "loss has six trials: three learning rates with two epsilons, or with two weight decays where there is no "
            f"epsilon. The one with the highest NDCG@{CUTOFF} on validation lists is tested, once: the same criterion "
            "for all losses, whatever metric they relax."
        ),
        Table(
            caption="The setting chosen most often, and the time of all six trials together",
            header=("Loss", "setting", "seconds per seed"),
            rows=tuple(rows),
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """The best of the losses through soft ranks beside the best of the others."""
    metric = f"ndcg{CUTOFF}"
    found = {name: result["test"][name][metric] for name in METHODS}
    mine, rival = (
        max((name for name in METHODS if METHODS[name].soft == soft), key=lambda name: fmean(found[name]))
        for soft in (True, False)
    )
    return Headline(
        f"{METRICS[metric]} of the best loss through soft ranks, {METHODS[mine].label}",
        spread(found[mine], 3),
        "",
        standing(found[mine], found[rival], f"the best of the classic losses, {METHODS[rival].label}"),
    )


EXPERIMENT = Experiment(
    name="ranking",
    title="Learning to rank patients by disease progression",
    source=(
        "Soft ranks: Cuturi et al., NeurIPS 2019. Against RankNet (Burges et al. 2005), LambdaRank (Burges et al. "
        "2006) and ListNet (Cao et al. 2007)"
    ),
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.02, "quick": 0.3, "full": 6},
)
