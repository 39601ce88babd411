"""The search that chose the k-NN experiment's settings on digits: validation images only, six trials a method."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.knn_training import ROWS, TRAINED, Choice, build, data_for, plan_for, use_threads
from couplings_experiments.report.blocks import Block, Paragraph, Table
from couplings_experiments.search import score, tried
from couplings_experiments.trainer import train

# Six trials for everyone: three learning rates with two epsilons, or six learning rates where there is no epsilon.
_RATES = (0.003, 0.01, 0.03)
GRID = {
    "autoencoder": [Choice(rate) for rate in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)],
    "classifier": [Choice(rate) for rate in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)],
    "gumbel": [Choice(rate, epsilon) for rate in _RATES for epsilon in (0.1, 0.5)],
    "neuralsort": [Choice(rate, epsilon) for rate in _RATES for epsilon in (1.0, 10.0)],
    "cuturi": [Choice(rate, epsilon) for rate in _RATES for epsilon in (0.01, 0.1)],
    "softmax": [Choice(rate, epsilon) for rate in _RATES for epsilon in (0.1, 0.5)],
    "soft": [Choice(rate, epsilon) for rate in _RATES for epsilon in (0.3, 1.0)],
}
FIRST_SEED = 100  # divides train and validation in another way than the seeds that are reported
LABELS = {row.unit: row.label for row in ROWS} | {"classifier": "CE + CNN"}


def run(context: Context) -> dict[str, Any]:
    """Train every trial; look at validation images only."""
    request = context.request
    plan = plan_for(request.dataset, request.preset)
    seeds = range(FIRST_SEED, FIRST_SEED + (request.seeds or 1))
    epochs = plan.optimisation.epochs
    grid = {name: tried(choices, request.preset) for name, choices in GRID.items()}
    context.progress.expect(epochs * len(seeds) * sum(len(grid[name]) * TRAINED[name] for name in grid))
    trials: dict[str, list[dict[str, Any]]] = {name: [] for name in grid}
    for name, choices in grid.items():
        for number, choice in enumerate(choices):
            scores = [_trial(context, name, number, choice, seed) for seed in seeds]
            trials[name].append({"choice": asdict(choice), "validation": fmean(scores)})
    return {"trials": trials, "epochs": epochs, "seeds": list(seeds), "dataset": request.dataset}


def _trial(context: Context, name: str, number: int, choice: Choice, seed: int) -> float:
    plan = plan_for(context.request.dataset, context.request.preset)
    weight = TRAINED[name]
    title = f"{LABELS[name]}, trial {number + 1}"

    def fit(directory: Path) -> list[dict[str, Any]]:
        data = data_for(context, seed, plan.limit)
        use_threads(data)
        return train(
            build(name, choice, data, seed),
            data,
            replace(plan.optimisation, learning_rate=choice.learning_rate),
            seed,
            directory,
            identity=f"{name} {choice}",
            after_epoch=lambda done: context.progress.advance(done * weight, title),
            say=context.progress.say,
        )

    found = score(context, f"{name}-{number}-{seed}", weight * plan.optimisation.epochs, fit)
    context.progress.say(f"{title} ({choice}): {100 * found:.2f} %")
    return found


def blocks(result: dict[str, Any]) -> list[Block]:
    """One table of all trials."""
    rows: list[tuple[str, ...]] = []
    strong = []
    for name, trials in result["trials"].items():
        best = max(range(len(trials)), key=lambda i: trials[i]["validation"])
        for number, trial in enumerate(trials):
            if number == best:
                strong.append(len(rows))
            epsilon = trial["choice"]["epsilon"]
            rows.append(
                (
                    LABELS[name],
                    f"{trial['choice']['learning_rate']:g}",
                    "–" if epsilon is None else f"{epsilon:g}",
                    f"{100 * trial['validation']:.2f}",
                )
            )
    count = len(next(iter(result["trials"].values())))
    return [
        Paragraph(
            f"Every method has {count} trials of {result['epochs']} epochs on {result['dataset']}. What is compared is "
            "the accuracy on validation images, mean of the last third of the epochs; the first of equal trials is "
            "chosen. The images that test are never used here."
        ),
        Table(
            caption="Validation accuracy in percent; the chosen trials are set off",
            header=("Method", "learning rate", "epsilon", "validation"),
            rows=tuple(rows),
            strong=tuple(strong),
        ),
    ]


EXPERIMENT = Experiment(
    name="knn-search",
    title="Settings of the k-NN experiment, chosen on validation images",
    source="For the digits settings of the experiment knn",
    run=run,
    blocks=blocks,
    by_default=False,
)
