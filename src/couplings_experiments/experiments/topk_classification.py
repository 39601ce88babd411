"""Classification with the soft 0/1 and top-k losses, on clean and on noisy labels, against three others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from couplings_experiments.data import Dataset
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, drawing
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread, standing
from couplings_experiments.topk_training import (
    METHODS,
    NETWORKS,
    choice_for,
    load_for,
    plan_for,
    top_for,
    train_one,
)


def run(context: Context) -> dict[str, Any]:
    """Train and test every method at every share of wrong labels on every seed."""
    request = context.request
    plan = plan_for(request.dataset, request.preset)
    seeds = range(request.seeds or plan.seeds)
    data = load_for(context, 0, plan.limit)  # before anything else: complains if there is none
    steps = sum(method.weight for method in METHODS.values()) * len(plan.noise) * len(plan.networks)
    context.progress.expect(len(seeds) * plan.optimisation.epochs * steps)
    results: dict[str, dict[str, list[list[dict[str, Any]]]]] = {
        network: {name: [[] for _ in plan.noise] for name in METHODS} for network in plan.networks
    }
    for seed in seeds:
        if seed:
            data = load_for(context, seed, plan.limit)
        for network in plan.networks:
            for i in range(len(plan.noise)):
                for name in METHODS:
                    results[network][name][i].append(_unit(context, data, network, name, plan.noise[i], seed))

    def gather(key: str) -> dict[str, Any]:
        return {
            network: {name: [[r[key] for r in runs] for runs in found] for name, found in methods.items()}
            for network, methods in results.items()
        }

    return {
        "dataset": request.dataset,
        "preset": request.preset,
        "seeds": list(seeds),
        "noise": list(plan.noise),
        "k": top_for(data.classes),
        "sizes": data.sizes,
        "optimisation": asdict(plan.optimisation),
        "choices": {
            name: [asdict(choice_for(request.dataset, name, noise)) for noise in plan.noise]
            for name in METHODS
        },
        # network -> method -> share of noise -> seed
        "top1": gather("top1"),
        "topk": gather("topk"),
        "seconds": gather("seconds"),
        "history": gather("validation"),
    }


def _unit(
    context: Context, data: Dataset, network: str, name: str, noise: float, seed: int
) -> dict[str, Any]:
    """Train one model and test it once."""
    plan = plan_for(context.request.dataset, context.request.preset)
    title = f"{METHODS[name].label}, {noise:.0%} noise, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        choice = choice_for(context.request.dataset, name, noise)
        model, history = train_one(context, data, network, name, noise, choice, seed, directory, title)
        return {
            "top1": model.hits(data.test, 1),
            "topk": model.hits(data.test, top_for(data.classes)),
            "validation": [point["validation"] for point in history],
        }

    unit = f"{network}-{name}-{round(100 * noise)}-{seed}"
    result = context.unit(unit, plan.optimisation.epochs * METHODS[name].weight, compute)
    context.progress.say(
        f"seed {seed}: {NETWORKS[network]}, {noise:.0%} noise, {METHODS[name].label}: "
        f"top-1 {100 * result['top1']:.2f} %  ({result['seconds']:.1f} s)"
    )
    return result


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the curves, a table of each network and accuracy, the settings."""
    return [
        *(block for network in result["top1"] for block in _meaning(result, network)),
        *(_curves(result, network) for network in result["top1"]),
        *(_table(result, network, key) for network in result["top1"] for key in ("top1", "topk")),
        Heading("Settings"),
        *_settings(result),
    ]


def _label(result: dict[str, Any], name: str) -> str:
    return METHODS[name].label.replace("top-k", f"top-{result['k']}")


def _accuracy(result: dict[str, Any], key: str) -> str:
    return f"top-{1 if key == 'top1' else result['k']} accuracy"


def _meaning(result: dict[str, Any], network: str) -> list[Block]:
    """What the soft 0/1 loss reaches beside cross-entropy, and what may be said of the soft losses."""
    noise, seeds, top = result["noise"], len(result["seeds"]), result["top1"][network]

    def percent(name: str, i: int) -> str:
        return f"{100 * fmean(top[name][i]):.1f}"

    shown = "; ".join(
        f"{percent('sigmoid', i)} and {percent('soft', i)} % against {percent('cross-entropy', i)} % with "
        f"{share:.0%} of the training labels wrong"
        for i, share in enumerate(noise)
    )
    text = (
        f"{_sentence(NETWORKS[network])} on {result['dataset']}, {seeds_in_words(seeds)}: top-1 accuracy of the soft "
        f"0/1 loss through sigmoid and through transport ranks against cross-entropy: {shown}."
    )
    if seeds < 3:
        return [Paragraph(text + caution(seeds), lead=True)]
    verdicts = [
        _verdict(result, network, key, name)
        for key, names in (("top1", ("sigmoid", "soft")), ("topk", ("sigmoid-topk", "soft-topk")))
        for name in names
    ]
    signs = [clear(paired(top["sigmoid"][i], top["soft"][i])) for i in range(len(noise))]
    better = {
        name: [f"{share:.0%}" for share, found in zip(noise, signs, strict=True) if found == sign]
        for name, sign in (("sigmoid", 1), ("transport", -1))
    }
    ways = [
        f"the one through {name} ranks is better at {join(at)} noise" for name, at in better.items() if at
    ]
    verdicts.append(
        f"Of the two soft 0/1 losses, {'; '.join(ways)}."
        if ways
        else "Between the two soft 0/1 losses these seeds show no difference."
    )
    return [
        Paragraph(text, lead=True),
        Paragraph(
            "Against the losses without ranks, by paired differences over seeds beyond two standard errors. "
            + " ".join([*verdicts, *_same(result, network)])
        ),
    ]


def _verdict(result: dict[str, Any], network: str, key: str, name: str) -> str:
    """Where a soft loss stands among the classic ones: at 0% noise ahead of focal; at 40% noise level with all."""
    accuracy = result[key][network]
    parts = []
    for i, share in enumerate(result["noise"]):
        signs = {
            other: clear(paired(accuracy[name][i], accuracy[other][i]))
            for other in METHODS
            if not METHODS[other].soft
        }
        ahead, behind = (
            [_label(result, other) for other in signs if signs[other] == sign] for sign in (1, -1)
        )
        words = [f"ahead of {join(ahead)}"] * bool(ahead) + [f"behind {join(behind)}"] * bool(behind)
        parts.append(f"at {share:.0%} noise {' and '.join(words) or 'level with all'}")
    return f"{_sentence(_accuracy(result, key))}, {_label(result, name)}: {'; '.join(parts)}."


def _same(result: dict[str, Any], network: str) -> list[str]:
    """Says so where a top-k loss is no other loss than the 0/1 loss."""
    accuracy = result["top1"][network]
    said = []
    for one, many in (("sigmoid", "sigmoid-topk"), ("soft", "soft-topk")):
        at = [
            f"{share:.0%}"
            for i, share in enumerate(result["noise"])
            if result["choices"][one][i] == result["choices"][many][i]
            and accuracy[one][i] == accuracy[many][i]
        ]
        if at:
            said.append(
                f"At {join(at)} noise {_label(result, many)} has the setting and the results of {_label(result, one)}: "
                "so smooth that no label's rank comes near enough to the first for the two losses to differ."
            )
    return said


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _table(result: dict[str, Any], network: str, key: str) -> Table:
    noise, seeds, sizes = result["noise"], len(result["seeds"]), result["sizes"]
    accuracy = result[key][network]
    rows = tuple(
        (_label(result, name), *(spread(accuracy[name][i], 2, 100) for i in range(len(noise))))
        for name in METHODS
    )
    how = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed, no spread"
    note = (
        f"{how}; {sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test images. A wrong "
        "label is another one, drawn uniformly; only training labels are ever changed. The test images are the same "
        "for all seeds and were used once per trained model. Cuturi et al. show accuracies on CIFAR-10 and CIFAR-100 "
        "as curves; Berrada et al. have a table for CIFAR-100, with noise within coarse classes: neither is comparable."
    )
    return Table(
        caption=f"Test {_accuracy(result, key)} in percent, {NETWORKS[network]}",
        header=("Loss", *(f"{share:.0%} of labels wrong" for share in noise)),
        rows=rows,
        note=note if key == "topk" and network == list(result["top1"])[-1] else "",
        strong=tuple(i for i, method in enumerate(METHODS.values()) if method.soft),
    )


_LOOKS = {
    "cross-entropy": (COLOURS[6], "s-"),
    "focal": (COLOURS[4], "v--"),
    "svm": (COLOURS[1], "^-"),
    "svm-topk": (COLOURS[1], "^:"),
    "soft": (COLOURS[0], "o-"),
    "soft-topk": (COLOURS[0], "o:"),
    "sigmoid": (COLOURS[2], "D-"),
    "sigmoid-topk": (COLOURS[2], "D:"),
}


def _curves(result: dict[str, Any], network: str) -> Figure:
    noise, keys = [100 * share for share in result["noise"]], ("top1", "topk")
    with drawing(f"noise-{network}", 7.8, 3.6) as (canvas, out):
        axes = canvas.subplots(1, 2)
        for place, key in zip(axes, keys, strict=True):
            for name, (colour, style) in _LOOKS.items():
                values = 100 * np.asarray(result[key][network][name])
                place.plot(
                    noise,
                    values.mean(1),
                    style,
                    color=colour,
                    markersize=5,
                    linewidth=1.7,
                    label=_label(result, name),
                )
            place.set_xticks(noise, [f"{share:.0f} %" for share in noise])
            place.set_xlabel("wrong training labels")
            place.set_ylabel(f"test {_accuracy(result, key)}, %")
            place.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8.5)
    last = ", ".join(
        f"{_label(result, name)} {100 * fmean(result['top1'][network][name][-1]):.1f} %" for name in METHODS
    )
    band = " Lines are means over seeds; the tables have the spread." if len(result["seeds"]) > 1 else ""
    return Figure(
        out[-1],
        f"{_sentence(NETWORKS[network])}: accuracy on clean test labels as more training labels "
        f"are wrong; neither axis begins at 0.{band} Dotted lines aim at the top {result['k']}, the others at the "
        "top 1.",
        f"Two line charts of test accuracy by share of wrong labels. Top-1 at {noise[-1]:.0f} %: {last}.",
    )


def _settings(result: dict[str, Any]) -> list[Block]:
    used = result["optimisation"]
    decay = ", cosine decay to 0" if used["schedule"] == "cosine" else ""
    how = (
        "Learning rates, gamma, tau and epsilon were chosen for each share of noise on validation images with clean "
        "labels, by the search that is the experiment topk-classification-search: the same number of trials for every "
        "loss, judged by the top-1 accuracy or, for the losses that aim at the top k, by the top-k accuracy. No "
        "training is stopped early."
        if result["dataset"] == "digits"
        else "Nothing was searched on this data set: one learning rate for all losses in units of scores, a smaller "
        "one for those through ranks."
    )
    rows = []
    for name, method in METHODS.items():
        cells = []
        for choice in result["choices"][name]:
            own = f", {method.parameter} {choice['parameter']:g}" if method.parameter else ""
            cells.append(f"rate {choice['learning_rate']:g}{own}")
        seconds = fmean(
            value for network in result["seconds"].values() for runs in network[name] for value in runs
        )
        rows.append((_label(result, name), *cells, f"{seconds:.1f}"))
    return [
        Paragraph(
            f"SGD with momentum {used['momentum']:g} and weight decay {used['weight_decay']:g}{decay}; "
            f"{used['epochs']} epochs in batches of {used['queries']}, no augmentation; the same first weights, wrong "
            f"labels and batches for every loss. {how}"
        ),
        Table(
            caption="Settings, and the time of one training",
            header=("Loss", *(f"{share:.0%}" for share in result["noise"]), "seconds"),
            rows=tuple(rows),
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """The soft 0/1 loss beside cross-entropy where most labels are wrong."""
    network, noise = next(iter(result["top1"])), result["noise"][-1]
    mine, rival = (result["top1"][network][name][-1] for name in ("soft", "cross-entropy"))
    return Headline(
        f"Top-1 accuracy with {noise:.0%} of the training labels wrong, {_label(result, 'soft')}, %",
        spread(mine, 2, 100),
        "",
        standing(mine, rival, "cross-entropy", digits=2, factor=100, unit=" points"),
    )


EXPERIMENT = Experiment(
    name="topk-classification",
    title="Classification with the soft 0/1 and top-k losses, under label noise",
    source=(
        "Cuturi et al., NeurIPS 2019, section 4. Against focal loss (Lin et al. 2017) and the smoothed top-k SVM "
        "(Berrada et al. 2018)"
    ),
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.02, "quick": 1.2, "full": 9},
)
