"""The search that chose the settings of topk-classification on digits: validation images only, six trials a loss."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Paragraph, Table
from couplings_experiments.search import score
from couplings_experiments.topk_training import GRID, METHODS, Choice, load_for, plan_for, train_one

FIRST_SEED = 100  # divides train and validation in another way than the seeds that are reported


def run(context: Context) -> dict[str, Any]:
    """Train every trial; look at validation images only."""
    request = context.request
    plan = plan_for(request.dataset, request.preset)
    seeds = range(FIRST_SEED, FIRST_SEED + (request.seeds or 1))
    steps = sum(len(GRID[name]) * METHODS[name].weight for name in GRID)
    context.progress.expect(plan.optimisation.epochs * len(seeds) * len(plan.noise) * steps)
    trials = [
        {
            "method": name,
            "noise": noise,
            "choice": asdict(choice),
            "validation": fmean(_trial(context, name, noise, number, choice, seed) for seed in seeds),
        }
        for name, choices in GRID.items()
        for noise in plan.noise
        for number, choice in enumerate(choices)
    ]
    return {
        "trials": trials,
        "noise": list(plan.noise),
        "epochs": plan.optimisation.epochs,
        "seeds": list(seeds),
        "dataset": request.dataset,
    }


def _trial(context: Context, name: str, noise: float, number: int, choice: Choice, seed: int) -> float:
    plan = plan_for(context.request.dataset, context.request.preset)
    title = f"{METHODS[name].label}, {noise:.0%} noise, trial {number + 1}"

    def fit(directory: Path) -> list[dict[str, Any]]:
        data = load_for(context, seed, plan.limit)
        return train_one(context, data, plan.networks[0], name, noise, choice, seed, directory, title)[1]

    steps = METHODS[name].weight * plan.optimisation.epochs
    found = score(context, f"{name}-{round(100 * noise)}-{number}-{seed}", steps, fit, last=3)
    context.progress.say(f"{title} ({choice}): {100 * found:.2f} %")
    return found


def blocks(result: dict[str, Any]) -> list[Block]:
    """One table of all trials."""
    rows: list[tuple[str, ...]] = []
    strong = []
    for name, choices in GRID.items():
        found = {
            noise: [t for t in result["trials"] if t["method"] == name and t["noise"] == noise]
            for noise in result["noise"]
        }
        best = {
            noise: max(range(len(choices)), key=lambda i: ts[i]["validation"]) for noise, ts in found.items()
        }
        for number in range(len(choices)):
            if number in best.values():
                strong.append(len(rows))
            choice = found[result["noise"][0]][number]["choice"]
            own = METHODS[name].parameter
            cells = [
                f"{100 * ts[number]['validation']:.2f}{' (chosen)' if best[noise] == number else ''}"
                for noise, ts in found.items()
            ]
            setting = f"{own} {choice['parameter']:g}" if own else "–"
            rows.append((METHODS[name].label, f"{choice['learning_rate']:g}", setting, *cells))
    return [
        Paragraph(
            f"Every loss has six trials of {result['epochs']} epochs on {result['dataset']} at each share of wrong "
            "training labels. What is compared is the accuracy on validation images, whose labels are right, mean of "
            "the last three epochs: top-1, or top-k for the losses that aim at the top k. The first of equal trials is "
            "chosen. The images that test are never used here."
        ),
        Table(
            caption="Validation accuracy in percent; rows with a chosen trial are set off",
            header=(
                "Loss",
                "learning rate",
                "parameter",
                *(f"{share:.0%} noise" for share in result["noise"]),
            ),
            rows=tuple(rows),
            strong=tuple(strong),
        ),
    ]


EXPERIMENT = Experiment(
    name="topk-classification-search",
    title="Settings of topk-classification, chosen on validation images",
    source="For the digits settings of the experiment topk-classification",
    run=run,
    blocks=blocks,
    by_default=False,
)
