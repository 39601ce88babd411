"""Table 1 of the SOFT paper: a k-NN classifier trained end to end, against nine other ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, from_numpy

from couplings_experiments.data import Dataset
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.knn_methods import (
    COMPONENTS,
    ENTROPIC_SORT_EPSILON,
    NEIGHBOURS,
    Classifier,
    knn_accuracy,
)
from couplings_experiments.knn_training import (
    ROWS,
    TRAINED,
    build,
    choices_for,
    data_for,
    plan_for,
    use_threads,
)
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, drawing
from couplings_experiments.report.words import standing
from couplings_experiments.trainer import train

LABELS = {row.key: row.label for row in ROWS}
UNIT_LABELS = {row.unit: row.label for row in ROWS} | {"classifier": "CE + CNN"}
MAPPED = {"smoke": 150, "quick": 1000, "full": 1000}  # at most so many test images are drawn


def run(context: Context) -> dict[str, Any]:
    """Train and test every method on every seed."""
    plan = plan_for(context.request.dataset, context.request.preset)
    seeds = range(context.request.seeds or plan.seeds)
    epochs = plan.optimisation.epochs
    data = data_for(context, 0, plan.limit)  # before anything else: complains if there is none
    use_threads(data)
    context.progress.expect(len(seeds) * (2 + epochs * sum(TRAINED.values())))
    units: dict[str, list[dict[str, Any]]] = {row.unit: [] for row in ROWS}
    for seed in seeds:
        if seed:
            data = data_for(context, seed, plan.limit)
        for unit in units:
            units[unit].append(_unit(context, data, unit, seed))
    return {
        "dataset": context.request.dataset,
        "preset": context.request.preset,
        "neighbours": NEIGHBOURS,
        "seeds": list(seeds),
        "sizes": data.sizes,
        "optimisation": asdict(plan.optimisation),
        "choices": {name: asdict(choice) for name, choice in choices_for(context.request.dataset).items()},
        "accuracy": {row.key: [result["test"][row.key] for result in units[row.unit]] for row in ROWS},
        "history": {name: [result["history"] for result in units[name]] for name in TRAINED},
        "seconds": {name: [result["seconds"] for result in results] for name, results in units.items()},
        "map": {
            "labels": units["soft"][0]["map_labels"],
            "pixels": units["knn"][0]["map"],
            "soft": units["soft"][0]["map"],
        },
    }


def _unit(context: Context, data: Dataset, name: str, seed: int) -> dict[str, Any]:
    """Train ``name`` on ``seed`` and test it once."""
    plan = plan_for(context.request.dataset, context.request.preset)
    weight = TRAINED.get(name, 1 / plan.optimisation.epochs)
    title = f"{UNIT_LABELS[name]}, seed {seed}"
    mapped = MAPPED[context.request.preset]

    def compute(directory: Path) -> dict[str, Any]:
        if name not in TRAINED:
            context.progress.advance(1, title)
            return _untrained(data, name, mapped if seed == 0 else 0)
        choice = choices_for(context.request.dataset)[name]
        method = build(name, choice, data, seed)
        history = train(
            method,
            data,
            replace(plan.optimisation, learning_rate=choice.learning_rate),
            seed,
            directory,
            identity=f"{name} {choice}",
            after_epoch=lambda done: context.progress.advance(done * weight, title),
            say=context.progress.say,
        )
        rows = {name: method.accuracy(data.train, data.test)}
        if isinstance(method, Classifier):
            rows = {"cross-entropy": rows[name], "pretrained": _knn(data, method.features)}
        result: dict[str, Any] = {"test": rows, "history": history}
        if name == "soft" and seed == 0:
            result |= {
                "map": _flat_map(method.features(data.test.images[:mapped])),
                "map_labels": data.test.labels[:mapped].tolist(),
            }
        return result

    result = context.unit(f"{name}-{seed}", weight * plan.optimisation.epochs, compute)
    accuracies = ", ".join(f"{LABELS[key]} {100 * value:.2f} %" for key, value in result["test"].items())
    context.progress.say(f"seed {seed}: {accuracies}  ({result['seconds']:.1f} s)")
    return result


def _untrained(data: Dataset, name: str, mapped: int) -> dict[str, Any]:
    """k-NN on pixels, or on their principal components."""
    flat: Callable[[Tensor], Tensor] = lambda images: images.flatten(1)  # noqa: E731 - one of two
    if name == "pca":
        pixels = data.train.images.flatten(1).cpu().numpy()
        components = min(COMPONENTS, *pixels.shape)
        projection = PCA(components, svd_solver="full").fit(pixels)
        flat = lambda images: from_numpy(projection.transform(images.flatten(1).cpu().numpy())).to(images)  # noqa: E731
    result: dict[str, Any] = {"test": {name: _knn(data, flat)}}
    if name == "knn" and mapped:
        result["map"] = _flat_map(data.test.images[:mapped].flatten(1))
    return result


def _knn(data: Dataset, features: Callable[[Tensor], Tensor]) -> float:
    return knn_accuracy(
        features(data.train.images), data.train.labels, features(data.test.images), data.test.labels
    )


def _flat_map(features: Tensor) -> list[list[float]]:
    """Two coordinates for each row by t-SNE, which keeps neighbours together."""
    points = features.double().cpu().numpy()
    perplexity = min(30.0, (len(points) - 1) / 3)
    with threadpool_limits(1):  # two busy threads on a busy machine take ten times as long as one
        flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=500).fit_transform(points)
    return [[round(float(x), 2), round(float(y), 2)] for x, y in flat]


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the table, the curves, the map, the settings."""
    return [
        *_meaning(result),
        _table(result),
        Heading("Learning curves"),
        _curves(result),
        Heading("What the features look like"),
        _draw_map(result),
        Heading("Settings"),
        *_settings(result),
    ]


def _percent(values: list[float]) -> str:
    mean = f"{100 * fmean(values):.2f}"
    return f"{mean} ± {100 * stdev(values):.2f}" if len(values) > 1 else mean


def _signed(values: list[float]) -> str:
    mean = f"{100 * fmean(values):+.2f}".replace("-", "−")
    return f"{mean} ± {100 * stdev(values):.2f}" if len(values) > 1 else mean


def _against(result: dict[str, Any], key: str) -> list[float]:
    """SOFT's accuracy minus that of ``key``, seed by seed."""
    accuracy = result["accuracy"]
    return [ours - theirs for ours, theirs in zip(accuracy["soft"], accuracy[key], strict=True)]


def _meaning(result: dict[str, Any]) -> list[Block]:
    """Two sentences, every word of which depends on the numbers."""
    accuracy = result["accuracy"]
    seeds = len(result["seeds"])
    over = f"over {seeds} seeds" if seeds > 1 else "on one seed"
    ahead = [_phrase(result, key) for key in ("knn", "pca")]
    first = (
        f"Trained through the SOFT top-k operator, the k-NN classifier labels {_percent(accuracy['soft'])} % of the "
        f"{result['sizes']['test']} {result['dataset']} test images correctly {over}: {ahead[0]}, and {ahead[1]}."
    )
    others = [row.key for row in ROWS if row.key not in ("soft", "knn", "pca")]
    if seeds < 3:
        best = max(LABELS, key=lambda key: fmean(accuracy[key]))
        second = (
            f"The highest figure of the table is that of {LABELS[best]} ({_percent(accuracy[best])} %), but "
            f"{'one seed decides' if seeds == 1 else 'two seeds decide'} nothing between the trained methods."
        )
        return [Paragraph(f"{first} {second}", lead=True)]
    below = [LABELS[key] for key in others if _clear(_against(result, key)) > 0]
    above = [LABELS[key] for key in others if _clear(_against(result, key)) < 0]
    level = [LABELS[key] for key in others if _clear(_against(result, key)) == 0]
    parts = []
    if below:
        parts.append(f"it is clearly ahead of {_join(below)}")
    if above:
        parts.append(f"clearly behind {_join(above)}")
    if level:
        parts.append(f"not distinguishable from {_join(level)}")
    second = (
        f"Among the trained methods, judged by the paired differences over seeds (mean beyond two standard errors), "
        f"{'; '.join(parts)}."
    )
    return [Paragraph(f"{first} {second}", lead=True)]


def _phrase(result: dict[str, Any], key: str) -> str:
    """'0.81 points more than kNN (5 of 5 seeds)'."""
    differences = _against(result, key)
    mean = 100 * fmean(differences)
    wins = sum(difference > 0 for difference in differences)
    if abs(mean) < 0.005:
        return f"as many as {LABELS[key]}"
    counted = f" (more in {wins} of {len(differences)} seeds)" if len(differences) > 1 else ""
    return f"{abs(mean):.2f} points {'more' if mean > 0 else 'fewer'} than {LABELS[key]}{counted}"


def _clear(differences: list[float]) -> int:
    """The sign of the mean if it lies beyond two standard errors, else 0."""
    mean = fmean(differences)
    error = stdev(differences) / len(differences) ** 0.5
    return 0 if abs(mean) <= 2 * error or mean == 0 else 1 if mean > 0 else -1


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(result: dict[str, Any]) -> Table:
    seeds = len(result["seeds"])
    sizes = result["sizes"]
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, no spread"
    rows = tuple(
        (
            row.label,
            f"{row.mnist:.1f}",
            f"{row.cifar10:.1f}",
            _percent(result["accuracy"][row.key]),
            "" if row.key == "soft" else _signed([-x for x in _against(result, row.key)]),
        )
        for row in ROWS
    )
    return Table(
        caption=f"Test accuracy in percent, k = {result['neighbours']}",
        header=(
            "Method",
            "paper, MNIST",
            "paper, CIFAR-10",
            f"ours, {result['dataset']}",
            "against SOFT, paired",
        ),
        rows=rows,
        note=(
            f"Ours: {spread}; {sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test "
            "images. "
            "The test images are the same for all seeds and were used once per trained model; seeds change the "
            "division into training and validation, the initial network and the batches. The paper's figures are for "
            "other data sets and larger training sets: compare orders, not values. kNN + pretrained CNN is plain k-NN "
            "on the features of the CE + CNN network. Cuturi et al. is the k-NN loss of NeuralSort with the entropic "
            "transport plan as permutation matrix."
        ),
        strong=(len(rows) - 1,),
    )


def _curves(result: dict[str, Any]) -> Figure:
    names = list(TRAINED)
    mean = {
        name: np.asarray([[100 * point["validation"] for point in run] for run in result["history"][name]])
        for name in names
    }
    low = min(float(np.median(values.mean(0))) for values in mean.values())
    low = max(min(low - 1, 97.0), 0.0)
    with drawing("curves", 7.8, 3.9) as (canvas, out):
        axes = canvas.subplots(2, 4, sharex=True, sharey=True)
        for place in axes.flat[len(names) :]:
            place.set_axis_off()
        for place, name in zip(axes.flat, names, strict=False):
            for other in names:
                values = mean[other].mean(0)
                place.plot(range(1, len(values) + 1), values, color=FAINT, linewidth=0.6, alpha=0.45)
            values = mean[name]
            epochs = range(1, values.shape[1] + 1)
            place.fill_between(
                epochs, values.min(0), values.max(0), color=COLOURS[0], alpha=0.25, linewidth=0
            )
            place.plot(
                epochs, values.mean(0), color=COLOURS[0], linewidth=1.9, marker="o" if len(epochs) < 3 else ""
            )
            place.set_title(UNIT_LABELS[name])
            place.set_ylim(low, 100.2 if low > 50 else 102)
        for place in axes[:, 0]:
            place.set_ylabel("validation, %")
        for place in axes[-1]:
            place.set_xlabel("epoch")
    final = {name: float(values.mean(0)[-1]) for name, values in mean.items()}
    band = " (line: mean over seeds, band: their range)" if len(result["seeds"]) > 1 else ""
    return Figure(
        out[-1],
        f"Accuracy on the validation images after every epoch{band}, each method before the others in grey. "
        f"Below {low:.0f} % is cut off.",
        "Seven small line charts of validation accuracy by epoch. At the end: "
        + ", ".join(f"{UNIT_LABELS[name]} {value:.1f} %" for name, value in final.items())
        + ".",
    )


def _draw_map(result: dict[str, Any]) -> Figure:
    data = result["map"]
    labels = np.asarray(data["labels"])
    purity = {name: _purity(np.asarray(data[name]), labels) for name in ("pixels", "soft")}
    with drawing("map", 7.8, 4.0) as (canvas, out):
        axes = canvas.subplots(1, 2)
        for place, name, title in zip(
            axes, ("pixels", "soft"), ("pixels", "features learned by SOFT"), strict=True
        ):
            points = np.asarray(data[name])
            for label in np.unique(labels):
                group = points[labels == label]
                colour = _CLASS_COLOURS[int(label) % len(_CLASS_COLOURS)]
                place.scatter(
                    group[:, 0], group[:, 1], s=26, marker=f"${label}$", color=colour, linewidths=0.1
                )
            place.set_title(title)
            place.set_axis_off()
    return Figure(
        out[-1],
        "Two-dimensional map (t-SNE) of the test images of the first seed, each drawn as its label. In the map of "
        f"the pixels {purity['pixels']:.1f} % of the points have a nearest neighbour of their own label, in that of "
        f"the learned features {purity['soft']:.1f} %.",
        f"Two scatter plots of {len(labels)} test images, drawn as labels, from pixels and from learned features.",
    )


# ten hues with lightness near the middle, so that they show on white and on black
_CLASS_COLOURS = (
    "#2f7fc1", "#d9822b", "#2d9d63", "#d0454c", "#8d6cc9", "#9a6b4f", "#cf6fae", "#7d8790", "#9a9a1f", "#1fa3b3",
)  # fmt: skip


def _purity(points: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Percentage of points whose nearest neighbour in the plane has the same label."""
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    return 100 * float((labels[squared.argmin(-1)] == labels).mean())


def _settings(result: dict[str, Any]) -> list[Block]:
    used = result["optimisation"]
    decay = ", cosine decay to 0" if used["schedule"] == "cosine" else ""
    how = (
        "Learning rates and epsilons were chosen on validation images, by the search that is the experiment "
        "knn-search: the same number of trials for every trained method."
        if result["dataset"] == "digits"
        else "Learning rate and SOFT's epsilon are the paper's (its relative epsilon converted to standard deviations "
        "of the distances); the other methods use the library's default epsilon."
    )
    rows = []
    for name, choice in result["choices"].items():
        epsilon = choice["epsilon"]
        if epsilon is None:
            selects = name not in ("autoencoder", "classifier")
            epsilon = (ENTROPIC_SORT_EPSILON if name == "cuturi" else "default") if selects else "–"
        seconds = result["seconds"][name]
        rows.append(
            (UNIT_LABELS[name], f"{choice['learning_rate']:g}", f"{epsilon}", f"{fmean(seconds):.1f}")
        )
    return [
        Paragraph(
            f"SGD with momentum {used['momentum']:g} and weight decay {used['weight_decay']:g}{decay}; "
            f"{used['epochs']} epochs of {used['queries']} queries and {used['templates']} templates a step, "
            "drawn so that no query is "
            f"its own template; one network architecture, identically initialised for every method. {how}"
        ),
        Table(
            caption="Settings and time of each trained method",
            header=("Method", "learning rate", "epsilon", "seconds per seed"),
            rows=tuple(rows),
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """SOFT's accuracy, and whether it is more than that of k-NN with nothing learned."""
    accuracy = result["accuracy"]
    paper = next(row for row in ROWS if row.key == "soft")
    return Headline(
        f"Accuracy of k-NN trained through SOFT, {result['dataset']}, %",
        _percent(accuracy["soft"]),
        f"{paper.mnist} (MNIST), {paper.cifar10} (CIFAR-10)",
        standing(accuracy["soft"], accuracy["knn"], "plain k-NN", digits=2, factor=100, unit=" points"),
    )


EXPERIMENT = Experiment(
    name="knn",
    title="k-nearest-neighbour classification, trained end to end",
    source="Xie et al., Differentiable Top-k with Optimal Transport, NeurIPS 2020: section 4, table 1 and figure 7",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.1, "quick": 0.6, "full": 10},
)
