"""Alignment: two encoders learn to find each other's half of an image, from a healthy and from a collapsed start."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from couplings_experiments import alignment_scenarios
from couplings_experiments.alignment_pictures import curves, heatmaps
from couplings_experiments.alignment_training import (
    NOISY,
    PLANS,
    STARTS,
    VARIANTS,
    Plan,
    Start,
    Views,
    build,
    dataset,
    measure,
    train,
    views,
)
from couplings_experiments.data.sets import Dataset
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import SETTINGS, Block, Heading, Headline, Paragraph, Table
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread

PICTURED = "clip"  # its similarities are drawn, and it runs once more with rounding left in
HEALTHY, STUCK, FREED = "healthy", "collapsed", "collapsed-guard"
NEAR = 0.02  # "as good as a healthy start", in accuracy
_SHOWN = 3  # images of each label in the heat maps
_TINY = 1e-12  # a gradient below this is the rounding of terms that cancel


def run(context: Context) -> dict[str, Any]:
    """The table of scenarios, then every loss from every start."""
    plan = PLANS[context.request.preset]
    seeds = range(context.request.seeds or plan.seeds)
    runs = [(name, key) for name in plan.variants for key in STARTS]
    context.progress.expect(1 + len(seeds) * (len(runs) + 1) * (plan.training.epochs + 1))
    table = context.unit("scenarios", 1, lambda directory: _scenarios(context, plan))
    trained: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {key: [] for key in STARTS} for name in plan.variants
    }
    noisy = []
    for seed in seeds:
        for name, found in trained.items():
            for key, start in STARTS.items():
                found[key].append(_unit(context, plan, name, key, start, seed))
            accuracies = (f"{start.label} {_found(found[key][-1]):.1%}" for key, start in STARTS.items())
            context.progress.say(f"{VARIANTS[name].label}, seed {seed}: {', '.join(accuracies)}")
        noisy.append(_unit(context, plan, PICTURED, "noisy", NOISY, seed))
    data = _data(context, plan, 0)
    return {
        "preset": context.request.preset,
        "dataset": data.name,
        "sizes": data.sizes,
        "pixels": list(data.train.images.shape[1:]),
        "seeds": list(seeds),
        "plan": asdict(plan),
        "scenarios": table,
        "trained": {
            name: {key: [_without(unit) for unit in units] for key, units in found.items()}
            for name, found in trained.items()
        },
        "noisy": noisy,
        "pictured": {
            key: units[0]["pictured"] for key, units in trained[PICTURED].items() if "pictured" in units[0]
        },
    }


def _scenarios(context: Context, plan: Plan) -> dict[str, Any]:
    found = alignment_scenarios.scenarios(plan.draws)
    context.progress.advance(1, "scenarios")
    return found


def _data(context: Context, plan: Plan, seed: int) -> Dataset:
    folder = context.request.data_dir
    return dataset(context.request.dataset, Path(folder) if folder else None, seed, plan.limit)


def _without(unit: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in unit.items() if key != "pictured"}


def _unit(context: Context, plan: Plan, name: str, key: str, start: Start, seed: int) -> dict[str, Any]:
    """Train one pair of encoders, and look at the test images once."""
    variant = VARIANTS[name]
    title = f"{variant.label}, {start.label}, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        data = _data(context, plan, seed)
        model, history = train(
            variant,
            start,
            plan,
            data,
            seed,
            directory,
            device=context.device,
            identity=title,
            processes=context.processes,
            after_epoch=lambda done: context.progress.advance(done, title),
            say=context.progress.say,
        )
        held = views(data, "test", context.device)
        result: dict[str, Any] = {"history": history, "test": measure(model, held)}
        if seed == 0 and name == PICTURED and key in (HEALTHY, STUCK, FREED):
            first = build(variant, start, plan, held.left.shape[1], seed).to(held.left)
            result["pictured"] = {
                when: _pictured(shown, held) for when, shown in (("before", first), ("after", model))
            }
        return result

    return context.unit(f"{name}-{key}-{seed}", plan.training.epochs + 1, compute)


def _pictured(model: torch.nn.Module, held: Views) -> list[list[list[float]]]:
    """Vectors of both halves of some test images, in the order of their labels."""
    labels = held.labels.cpu()
    rows = torch.cat([torch.nonzero(labels == label)[:_SHOWN, 0] for label in labels.unique()])
    rows = rows.to(held.left.device)
    with torch.no_grad():
        sides = model(held.left[rows], held.right[rows])[:2]
    return [[[round(value, 4) for value in row] for row in side.tolist()] for side in sides]


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the scenarios, who finds whom, the way there, the settings."""
    return [
        *_meaning(result),
        _scenario_table(result["scenarios"]),
        *_accuracies(result),
        Heading("On the way"),
        curves(result, {name: VARIANTS[name].label for name in result["trained"]}, _labels()),
        _left(result),
        Heading("Similarities before and after"),
        heatmaps(result["pictured"], VARIANTS[PICTURED].label, _labels()),
        Heading(SETTINGS),
        *_settings(result),
    ]


def _labels() -> dict[str, str]:
    return {key: start.label for key, start in STARTS.items()}


def _found(unit: dict[str, Any]) -> float:
    """Share of test images whose other half has the highest cosine, mean of both directions."""
    return fmean(unit["test"]["accuracy"])


def _values(result: dict[str, Any], name: str, key: str) -> list[float]:
    return [_found(unit) for unit in result["trained"][name][key]]


def _gaps(result: dict[str, Any], name: str) -> list[float]:
    return paired(_values(result, name, FREED), _values(result, name, HEALTHY))


def _stays(result: dict[str, Any], name: str) -> bool:
    """Whether held-out vectors are collapsed from first to last without the guard, with every seed."""
    units = result["trained"][name][STUCK]
    return all(point["collapsed"] for unit in units for point in [*unit["history"], unit["test"]])


def _meaning(result: dict[str, Any]) -> list[Block]:
    """Who stays collapsed, who comes out and how far: every claim is computed."""
    seeds, names = len(result["seeds"]), list(result["trained"])
    label = {name: VARIANTS[name].label for name in names}
    steps = result["trained"][names[0]][STUCK][0]["history"][-1]["step"]
    stuck = [label[name] for name in names if _stays(result, name)]
    left = [label[name] for name in names if not _stays(result, name)]
    first = f"Without the guard, {join(stuck)} {'does' if len(stuck) == 1 else 'do'} not leave exact collapse"
    width = (
        max(
            max(unit["test"]["spread"])
            for name in names
            if _stays(result, name)
            for unit in result["trained"][name][STUCK]
        )
        if stuck
        else 0
    )
    first = (
        f"{first}: {steps} steps later all vectors are still one point (spread {width:.0g}). "
        if stuck
        else ""
    )
    if left:
        first += f"Without the guard, {join(left)} left it. "
    near = [
        name for name in names if abs(fmean(_gaps(result, name))) <= NEAR or fmean(_gaps(result, name)) > 0
    ]
    far = [name for name in names if name not in near]
    mean = {key: fmean(fmean(_values(result, name, key)) for name in names) for key in (HEALTHY, FREED)}
    second = (
        f"With the guard, training from collapse finds {mean[FREED]:.1%} of the other halves, mean over losses, and "
        f"training from a healthy start {mean[HEALTHY]:.1%} ({seeds_in_words(seeds)}). "
    )
    if near:
        second += f"{join([label[name] for name in near])} {'comes' if len(near) == 1 else 'come'} within "
        second += f"{100 * NEAR:g} points of the healthy run, or above it"
        second += "." if not far else "; "
    if far:
        gaps = [f"{label[name]} ends {-100 * fmean(_gaps(result, name)):.1f} points below" for name in far]
        second += f"{join(gaps)}."
    costs = {
        name: paired(_values(result, name, "healthy-guard"), _values(result, name, HEALTHY)) for name in names
    }
    harmed = [label[name] for name in names if clear(costs[name]) < 0]
    third = f"From a healthy start the guard changes {100 * fmean(map(fmean, costs.values())):+.1f} points in the mean"
    third += f", and clearly harms {join(harmed)}." if harmed else "."
    third += caution(seeds)
    return [Paragraph(text, lead=True) for text in (first.strip(), second, third) if text]


def _scenario_table(found: dict[str, Any]) -> Table:
    names = alignment_scenarios.SCENARIOS
    rows = [
        (
            row["label"],
            *(
                text
                for value, slope in zip(row["value"], row["gradient"], strict=True)
                for text in (f"{value:.4f}", "0" if slope < _TINY else f"{slope:.2g}")
            ),
        )
        for row in found["losses"].values()
    ]
    flags = (f"{share:.0%} of draws" for share in found["collapsed"])
    rows.append(("diagnostics: collapsed", *(text for flag in flags for text in (flag, ""))))
    return Table(
        caption="Three batches, and what each loss says of them",
        header=("Loss on raw cosines", *(text for name in names for text in (name, "gradient"))),
        rows=tuple(rows),
        note=f"{alignment_scenarios.ROWS} pairs of {alignment_scenarios.WIDTH} numbers, uniform on [0, 1); value and "
        f"length of the gradient in all numbers, means over {found['draws']} draws; temperature 1, bias 0. Gradient 0: "
        f"below {_TINY:g}, the rounding of terms that cancel.",
        strong=(len(rows) - 2, len(rows) - 1),
    )


def _accuracies(result: dict[str, Any]) -> list[Block]:
    rows, ways = [], []
    for name, found in result["trained"].items():
        label = VARIANTS[name].label
        cells = [spread(_values(result, name, key), 1, 100) for key in STARTS]
        rows.append((label, *cells, spread(_gaps(result, name), 1, 100)))
        both = [
            " / ".join(
                f"{100 * fmean(unit['test']['accuracy'][way] for unit in units):.1f}" for way in (0, 1)
            )
            for units in found.values()
        ]
        ranks = [f"{fmean(fmean(unit['test']['rank']) for unit in units):.1f}" for units in found.values()]
        ways.append((label, *both, *ranks))
    seeds, size = len(result["seeds"]), result["sizes"]["test"]
    labels = [start.label for start in STARTS.values()]
    return [
        Table(
            caption="Test images whose other half is found, in percent",
            header=("Loss", *labels, "last less first"),
            rows=tuple(rows),
            note=f"The half with the highest cosine among {size}, mean of both directions; equal cosines count as "
            f"wrong. Chance finds {100 / size:.1f} %. "
            + (f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."),
        ),
        Table(
            caption="Left to right / right to left, in percent, and the effective rank of the vectors",
            header=("Loss", *labels, *(f"rank: {label}" for label in labels)),
            rows=tuple(ways),
            note="Means over seeds, on test images. The rank is at least 1, where all vectors are equal, and at most "
            f"{result['plan']['shape']['width']}.",
        ),
    ]


def _left(result: dict[str, Any]) -> Paragraph:
    """When the flag goes out; and what happens where rounding is taken for a gradient."""
    steps = []
    for found in result["trained"].values():
        for unit in found[FREED]:
            steps += [point["step"] for point in unit["history"] if not point["collapsed"]][:1]
    total = sum(len(found[FREED]) for found in result["trained"].values())
    text = f"With the guard, {len(steps)} of {total} runs from collapse are no longer flagged as collapsed"
    text += f" after {max(steps)} steps at most (the first look after the start). " if steps else ". "
    units = result["noisy"]
    rank = fmean(fmean(unit["test"]["rank"]) for unit in units)
    out = sum(not unit["test"]["collapsed"] for unit in units)
    text += (
        "What is left of a gradient at collapse is the rounding of terms that cancel, here set to 0. Adam divides by "
        f"its size: with rounding left in, {VARIANTS[PICTURED].label} without the guard leaves the point in {out} of "
        f"{len(units)} runs, to an effective rank of {rank:.1f} and {100 * fmean(map(_found, units)):.1f} % found. "
        "Those runs follow noise, and are other ones on another machine or number of processes."
    )
    return Paragraph(text)


def _settings(result: dict[str, Any]) -> list[Block]:
    plan = result["plan"]
    used, shape, sizes = plan["training"], plan["shape"], result["sizes"]
    rows = []
    for name, found in result["trained"].items():
        variant = VARIANTS[name]
        options = [
            f"{option} {value:g}{' at first, learned' if option in variant.learned else ''}"
            for option, value in variant.options.items()
            if not isinstance(value, bool)
        ]
        options += [option for option, value in variant.options.items() if value is True]
        seconds = fmean(unit["seconds"] for units in found.values() for unit in units)
        rows.append(
            (
                variant.label,
                ", ".join(options) or "–",
                f"{variant.rate:g}",
                f"{variant.guard:g}, {'alone' if variant.alone else 'added'}",
                f"{seconds:.1f}",
            )
        )
    channels, height, width = result["pixels"]
    return [
        Paragraph(
            f"Left and right half of the images of {result['dataset']} ({channels} x {height} x {width // 2} pixels "
            f"each); {sizes['train']} train, {sizes['validation']} validate, {sizes['test']} test. Each half has an "
            f"encoder of its own, with two hidden layers of {shape['hidden']} ReLU and {shape['width']} outputs. Adam, "
            f"{used['epochs']} epochs, steps of {used['pairs']} pairs, cosine decay of the learning rate, float64, "
            "so that any number of processes gives the same table. Collapsed start: last layers with weight 0 and "
            f"constant bias {shape['hidden'] ** -0.5:.3f}, so that all vectors are the same bit for bit; everything "
            "else as in the healthy start. The guard is added, or followed alone, without the loss, until it is 0. "
            "Learning rates, temperatures and the guard's weight were chosen on validation images: the experiment "
            "alignment-search compares them with others."
        ),
        Table(
            caption=SETTINGS,
            header=("Loss", "options", "learning rate", "guard", "seconds"),
            rows=tuple(rows),
            note="Guard: its weight and use. Seconds: training and test of one run.",
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """From collapse with the guard, beside a healthy start."""
    gaps = {VARIANTS[name].label: fmean(_gaps(result, name)) for name in result["trained"]}
    freed = [fmean(_values(result, name, FREED)) for name in result["trained"]]
    worst = min(gaps, key=lambda label: gaps[label])
    stuck = sum(_stays(result, name) for name in result["trained"])
    return Headline(
        "other halves found from collapse with the guard, mean over losses",
        f"{fmean(freed):.1%}",
        "",
        f"Without the guard {stuck} of {len(gaps)} losses stay collapsed; with it the difference to a healthy start is "
        f"{100 * fmean(gaps.values()):+.1f} points in the mean, {100 * gaps[worst]:+.1f} for {worst}.",
    )


EXPERIMENT = Experiment(
    name="alignment",
    title="Two halves of an image that find each other: contrastive losses, healthy and from collapse",
    source="Radford et al., CLIP, ICML 2021, with N-pairs, InfoNCE, NT-Xent, SigLIP, triplets and a cosine target",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.1, "quick": 1, "full": 20},
    distributed=True,
)
