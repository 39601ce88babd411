"""Sorting 4-digit numbers: images of numbers are shown, and only their order is supervised."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from couplings_experiments.data import Dataset
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.knn_training import use_threads
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, INK, drawing
from couplings_experiments.report.words import clear, join, paired, seeds_in_words, spread, standing
from couplings_experiments.sorting_methods import DIGITS, Sorter, draw_numbers, ranks_of
from couplings_experiments.sorting_training import (
    CHOICES,
    COST,
    LABELS,
    PAPER,
    Plan,
    build,
    digits_for,
    optimisation_for,
    plan_for,
    repeated,
)
from couplings_experiments.trainer import train

PAPER_LABELS = {
    "transport": "Sinkhorn sort",
    "neuralsort": "Deterministic NeuralSort",
    "stochastic": "Stochastic NeuralSort",
}
BASE = "neuralsort"  # what the others are compared with
SHOWN = 5  # numbers in the pictured sequence


def run(context: Context) -> dict[str, Any]:
    """Train and test every method on every length and seed."""
    plan = plan_for(context.request.dataset, context.request.preset)
    seeds = range(context.request.seeds or plan.seeds)
    digits = digits_for(context, 0, plan.limit)  # before anything else: complains if there is none
    use_threads(digits)
    context.progress.expect(len(seeds) * len(plan.lengths) * plan.epochs * sum(COST.values()))
    units: dict[str, dict[int, list[dict[str, Any]]]] = {
        name: {length: [] for length in plan.lengths} for name in LABELS
    }
    for seed in seeds:
        if seed:
            digits = digits_for(context, seed, plan.limit)
        for length in plan.lengths:
            for name in LABELS:
                units[name][length].append(_unit(context, plan, digits, name, length, seed))
    return {
        "dataset": context.request.dataset,
        "preset": context.request.preset,
        "seeds": list(seeds),
        "sizes": digits.sizes,
        "plan": asdict(plan),
        "lengths": list(plan.lengths),
        "optimisation": asdict(optimisation_for(plan, CHOICES["transport"], plan.lengths[0])),
        "choices": {name: asdict(choice) for name, choice in CHOICES.items()},
        "exact": _table_of(units, "exact"),
        "ranks": _table_of(units, "ranks"),
        "history": {
            name: {str(length): [u["history"] for u in results] for length, results in by_length.items()}
            for name, by_length in units.items()
        },
        "seconds": _table_of(units, "seconds"),
        "pictured": next(u for us in units["transport"].values() for u in us if "pictured" in u)["pictured"],
    }


def _table_of(units: dict[str, dict[int, list[dict[str, Any]]]], what: str) -> dict[str, dict[str, Any]]:
    return {
        name: {str(length): [unit[what] for unit in results] for length, results in by_length.items()}
        for name, by_length in units.items()
    }


def _unit(context: Context, plan: Plan, digits: Dataset, name: str, length: int, seed: int) -> dict[str, Any]:
    """Train ``name`` on sequences of ``length``, and test it once."""
    title = f"{LABELS[name]}, n = {length}, seed {seed}"
    choice = CHOICES[name]

    def compute(directory: Path) -> dict[str, Any]:
        method = build(name, choice, length, digits, seed)
        settings = optimisation_for(plan, choice, length)
        history = train(
            method,
            repeated(digits, settings),
            settings,
            seed,
            directory,
            identity=f"{name} {length} {choice}",
            after_epoch=lambda done: context.progress.advance(done * COST[name], title),
            say=context.progress.say,
        )
        score = method.score(digits.test, *plan.test)
        result: dict[str, Any] = {"exact": score.exact, "ranks": score.ranks, "history": history}
        if name == "transport" and seed == 0 and length == min(plan.lengths, key=lambda n: abs(n - SHOWN)):
            result["pictured"] = _pictured(method, digits)
        return result

    result = context.unit(f"{name}-{length}-{seed}", plan.epochs * COST[name], compute)
    context.progress.say(
        f"{title}: {result['exact']:.3f} ({result['ranks']:.3f})  ({result['seconds']:.1f} s)"
    )
    return result


def _pictured(method: Sorter, digits: Dataset) -> list[dict[str, Any]]:
    """Four test sequences: images, values, ranks given and right."""
    images, values = draw_numbers(digits.test, 4 * SHOWN, seed=0)
    scores = method.scores(images)
    shown = []
    for index in torch.arange(len(values)).split(SHOWN):
        pixels = images[index].mean(1).cpu()
        low, high = pixels.min(), pixels.max()
        shown.append(
            {
                "images": ((pixels - low) / (high - low) * 99).round().to(torch.int64).tolist(),
                "values": values[index].tolist(),
                "given": (ranks_of(scores[index]) + 1).tolist(),
                "right": (ranks_of(values[index]) + 1).tolist(),
            }
        )
    return shown


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the two tables, the curves, an example, the settings."""
    return [
        Paragraph(_meaning(result), lead=True),
        _table(result, "exact"),
        _table(result, "ranks"),
        Heading("Against deterministic NeuralSort"),
        _against_length(result),
        Heading("Learning curves"),
        _curves(result),
        Heading("What is sorted"),
        _example(result),
        Heading("Settings"),
        *_settings(result),
    ]


def _share(values: list[float]) -> str:
    return spread(values, 3)


def _meaning(result: dict[str, Any]) -> str:
    """Sentences, every word of which depends on the numbers."""
    exact, lengths, seeds = result["exact"], result["lengths"], len(result["seeds"])
    mean = {name: {n: fmean(exact[name][str(n)]) for n in lengths} for name in exact}
    ahead = [n for n in lengths if mean["transport"][n] >= mean["neuralsort"][n]]
    behind = [n for n in lengths if n not in ahead]
    figures = join(
        [
            f"{mean['transport'][n]:.3f} against {mean['neuralsort'][n]:.3f} at n = {n}"
            for n in (lengths if len(lengths) < 3 else (lengths[0], lengths[-1]))
        ]
    )
    if not behind:
        first = (
            "Trained through transport, at least as many test sequences are sorted exactly as with deterministic "
            f"NeuralSort at every length, {_numbers(lengths)}"
        )
    elif not ahead:
        first = (
            "Trained through transport, fewer test sequences are sorted exactly than with deterministic NeuralSort "
            f"at every length, {_numbers(lengths)}"
        )
    else:
        first = (
            "Trained through transport, at least as many test sequences are sorted exactly as with deterministic "
            f"NeuralSort at {_numbers(ahead)}, but fewer at {_numbers(behind)}"
        )
    text = f"{first} ({figures}; {seeds_in_words(seeds)})."
    if seeds < 3:
        gap = max(abs(mean["transport"][n] - mean["neuralsort"][n]) for n in lengths)
        text += (
            f" The two differ by at most {gap:.3f}, and {'one seed decides' if seeds == 1 else 'two seeds decide'} "
            "nothing between methods."
        )
    else:
        signs = {n: clear(paired(exact["transport"][str(n)], exact["neuralsort"][str(n)])) for n in lengths}
        more = [n for n in lengths if signs[n] > 0]
        less = [n for n in lengths if signs[n] < 0]
        parts = [
            f"clearly {word} at {_numbers(at)}" for word, at in (("ahead", more), ("behind", less)) if at
        ]
        said = f"transport is {join(parts)}" if parts else "the difference is clear at no length"
        text += f" By the paired differences over seeds (mean beyond two standard errors), {said}."
    best = {n: max(mean, key=lambda name: mean[name][n]) for n in lengths}
    leaders = [
        f"{LABELS[name]} at {_numbers([n for n in lengths if best[n] == name])}"
        for name in dict.fromkeys(best.values())
    ]
    return f"{text} The highest share is that of {join(leaders)}."


def _numbers(lengths: list[int]) -> str:
    return f"n = {join([str(n) for n in lengths])}"


def _table(result: dict[str, Any], what: str) -> Table:
    lengths, seeds = result["lengths"], len(result["seeds"])
    rows = []
    strong = []
    for name, label in LABELS.items():
        if name in PAPER:
            figures = [f"{PAPER[name][n][what == 'ranks']:.3f}" if n in PAPER[name] else "–" for n in lengths]
            rows.append((f"{PAPER_LABELS[name]}, paper, MNIST", *figures))
        if name == "transport":
            strong.append(len(rows))
        rows.append(
            (f"{label}, ours, {result['dataset']}", *(_share(result[what][name][str(n)]) for n in lengths))
        )
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, no spread"
    sizes = result["sizes"]
    numbers, sequences = result["plan"]["test"]
    steps = result["plan"]["epochs"] * result["plan"]["steps"]
    note = (
        f"Ours: {over}; a network for every length and method, {steps} steps of at most {result['plan']['images']} "
        f"numbers. Numbers are put together from {sizes['train']} training, {sizes['validation']} validation and "
        f"{sizes['test']} test digits: no test digit is in any training number. Test: {sequences} sequences drawn from "
        f"{numbers} numbers of test digits, the same for all methods and seeds; sequences with two equal numbers are "
        "left out. The paper's figures are for MNIST (60000 digits) and far longer training: compare orders, not "
        "values."
    )
    if what == "ranks":
        note = "Element-wise: a number counts if it stands at its own place. Data and seeds as above."
    captions = {
        "exact": "Share of sequences of n numbers sorted exactly",
        "ranks": "Share of numbers given the right rank",
    }
    return Table(captions[what], ("Method", *(f"n = {n}" for n in lengths)), tuple(rows), note, tuple(strong))


def _against_length(result: dict[str, Any]) -> Figure:
    lengths = result["lengths"]
    exact = result["exact"]
    last = {}
    with drawing("sorting-lengths", 7.8, 3.4) as (canvas, out):
        ours, theirs = canvas.subplots(1, 2, sharey=True, sharex=True)
        for (name, label), colour in zip(LABELS.items(), COLOURS, strict=False):
            style: dict[str, Any] = {"color": colour, "linewidth": 2.4 if name == "transport" else 1.3}
            style |= {"marker": "o", "markersize": 4, "zorder": 4 if name == "transport" else 3}
            if name == BASE:
                for place in (ours, theirs):
                    place.axhline(0, color=colour, linewidth=1.3, label=label)
                continue
            gaps = [paired(exact[name][str(n)], exact[BASE][str(n)]) for n in lengths]
            last[name] = 100 * fmean(gaps[-1])
            ours.errorbar(
                lengths,
                [100 * fmean(values) for values in gaps],
                [100 * stdev(values) if len(values) > 1 else 0 for values in gaps],
                label=label,
                **style,
            )
            known = [n for n in lengths if n in PAPER.get(name, {})]
            if known:
                theirs.plot(known, [100 * (PAPER[name][n][0] - PAPER[BASE][n][0]) for n in known], **style)
        ours.set_title(f"ours, {result['dataset']}")
        theirs.set_title("paper, MNIST")
        ours.set_ylabel("sorted exactly, points more")
        for place in (ours, theirs):
            place.set_xlabel("numbers in a sequence")
            place.set_xticks(lengths)
        handles, labels = ours.get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return Figure(
        out[-1],
        "Share of test sequences sorted exactly, in percentage points above that of deterministic NeuralSort"
        + (" (paired by seed; bars: standard deviation over seeds)." if len(result["seeds"]) > 1 else "."),
        f"Two line charts. Ours, at {lengths[-1]} numbers: "
        + ", ".join(f"{LABELS[name]} {value:+.1f}" for name, value in last.items())
        + " points.",
    )


def _curves(result: dict[str, Any]) -> Figure:
    lengths = result["lengths"]
    with drawing("sorting-curves", 7.8, 2.7) as (canvas, out):
        axes = np.atleast_1d(canvas.subplots(1, len(lengths), sharey=True))
        for place, n in zip(axes, lengths, strict=True):
            for (name, label), colour in zip(LABELS.items(), COLOURS, strict=False):
                runs = [[point["validation"] for point in run] for run in result["history"][name][str(n)]]
                values = np.asarray(runs).mean(0)
                place.plot(
                    range(1, len(values) + 1),
                    values,
                    color=colour,
                    linewidth=2.2 if name == "transport" else 1.2,
                    label=label,
                    zorder=3 if name == "transport" else 2,
                )
            place.set_title(f"n = {n}")
            place.set_xlabel("epoch")
            place.set_ylim(bottom=0)
        axes[0].set_ylabel("validation, exact")
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return Figure(
        out[-1],
        "Share of validation sequences sorted exactly after every epoch"
        + (", mean over seeds." if len(result["seeds"]) > 1 else "."),
        f"{len(lengths)} small line charts of the share of validation sequences sorted exactly, by epoch.",
    )


def _example(result: dict[str, Any]) -> Figure:
    shown = result["pictured"]
    wrong = sum(given != right for s in shown for given, right in zip(s["given"], s["right"], strict=True))
    with drawing("sorting-example", 7.8, 3.2) as (canvas, out):
        axes = canvas.subplots(len(shown), SHOWN)
        for row, sequence in zip(axes, shown, strict=True):
            columns = zip(*(sequence[key] for key in ("images", "values", "given", "right")), strict=True)
            for place, (pixels, value, given, right) in zip(row, columns, strict=True):
                place.imshow(np.asarray(pixels), cmap="gray_r", vmin=0, vmax=99, interpolation="nearest")
                place.set_xticks([])
                place.set_yticks([])
                place.spines[:].set_visible(False)
                note = f"{value:0{DIGITS}d}: {given}" + (f", not {right}" if given != right else "")
                place.set_xlabel(note, color=INK if given == right else COLOURS[1], fontsize=9, labelpad=3)
    return Figure(
        out[-1],
        f"{len(shown)} sequences of test digits, one in each row. Below each image its value and the rank given by the "
        f"network that was trained through transport on the first seed: {wrong} of {len(shown) * SHOWN} numbers are "
        "out of place.",
        "Rows of images of 4-digit numbers. "
        + " ".join(
            "Values "
            + ", ".join(f"{value:0{DIGITS}d}" for value in s["values"])
            + "; ranks given "
            + ", ".join(map(str, s["given"]))
            + "."
            for s in shown
        ),
    )


def _settings(result: dict[str, Any]) -> list[Block]:
    used = result["optimisation"]
    how = (
        "Learning rate, epsilon, variant and what the loss compares were chosen for every method on validation digits, "
        "by the search that is the experiment sorting-search (sequences of five numbers, the same number of trials for "
        "every method), and serve all lengths."
        if result["dataset"] == "digits"
        else "Learning rate, epsilon, variant and loss are those chosen on validation images of scikit-learn's digits."
    )
    rows = []
    for name, choice in result["choices"].items():
        seconds = [s for runs in result["seconds"][name].values() for s in runs]
        loss = "permutation, cross-entropy" if choice["target"] == "permutation" else "ranks, squared error"
        rows.append(
            (
                LABELS[name],
                (choice["variant"] or "–").replace("_", " "),
                loss,
                "standardised" if choice["standardize"] else "raw",
                f"{choice['epsilon']:g}",
                f"{choice['learning_rate']:g}",
                f"{fmean(seconds):.1f}",
            )
        )
    return [
        Paragraph(
            "One convolutional network looks at every digit of a number, two linear layers turn what it saw into a "
            "score; it is identically initialised for every method and sees the same sequences. SGD with momentum "
            f"{used['momentum']:g}, weight decay {used['weight_decay']:g}, cosine decay to 0, {used['epochs']} epochs "
            f"of {used['steps']} steps; every epoch makes new numbers. {how}"
        ),
        Paragraph(
            "Raw scores let the network choose its own scale, and with it how hard its order is: a sequence of close "
            "numbers then may have close scores. Measuring every sequence in its own standard deviations would ask "
            "for scores of one number that depend on the others. On raw scores, transport's cross-entropy has the soft "
            "rank minus the true one as its gradient, up to a constant: it is convex in the scores."
        ),
        Table(
            caption="Settings and time of each method",
            header=(
                "Method",
                "variant",
                "loss on",
                "scores",
                "epsilon",
                "learning rate",
                "seconds a network",
            ),
            rows=tuple(rows),
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """Sequences of about five numbers sorted exactly, beside NeuralSort's."""
    length = min(result["lengths"], key=lambda n: abs(n - SHOWN))
    mine, rival = (result["exact"][name][str(length)] for name in ("transport", BASE))
    return Headline(
        f"Share of sequences of {length} numbers sorted exactly, {LABELS['transport'].lower()}",
        _share(mine),
        f"{PAPER['transport'][length][0]:.3f} (MNIST)" if length in PAPER["transport"] else "–",
        standing(mine, rival, PAPER_LABELS[BASE].replace("D", "d", 1)),
    )


EXPERIMENT = Experiment(
    name="sorting",
    title="Sorting 4-digit numbers from their order alone",
    source="Grover et al., NeuralSort, ICLR 2019; Cuturi, Teboul and Vert, NeurIPS 2019: section 5, table of sorted "
    "permutations",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.1, "quick": 0.9, "full": 27},
)
