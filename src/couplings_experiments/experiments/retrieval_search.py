"""The search that chose the retrievers' settings: validation modules only, every variant with a grid of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Paragraph, Table
from couplings_experiments.retrieval_methods import Variant
from couplings_experiments.retrieval_training import PLANS, VARIANTS, Plan, train
from couplings_experiments.search import score, tried

SEED = 100  # other first weights and another order than the seeds that are reported
RATES = (1e-3, 3e-3, 1e-2)
TEMPERATURES = (0.03, 0.05, 0.1)
SETTINGS: dict[str, tuple[tuple[float, ...], ...]] = {
    "smooth": ((0.01,), (0.02,), (0.05,)),
    "xtr": ((64, 2000), (256, 2000), (1024, 2000), (256, 500), (256, 8000)),
}


def trials(name: str) -> list[Variant]:
    """Every learning rate with every temperature of the loss; then other settings with the pair that is reported."""
    chosen = VARIANTS[name]
    found = [replace(chosen, rate=rate, temperature=t) for rate in RATES for t in TEMPERATURES]
    found += [replace(chosen, setting=setting) for setting in SETTINGS.get(name, ())]
    return list(dict.fromkeys(found))


def run(context: Context) -> dict[str, Any]:
    """Train every trial; look at validation modules only."""
    plan = PLANS["smoke" if context.request.preset == "smoke" else "full"]
    grid = {name: tried(trials(name), context.request.preset) for name in plan.variants}
    context.progress.expect(
        plan.training.epochs * sum(variant.weight for found in grid.values() for variant in found)
    )
    return {
        "epochs": plan.training.epochs,
        "trials": {
            name: [
                {
                    "rate": variant.rate,
                    "temperature": variant.temperature,
                    "setting": list(variant.setting),
                    "validation": _trial(context, plan, name, variant),
                }
                for variant in found
            ]
            for name, found in grid.items()
        },
    }


def _trial(context: Context, plan: Plan, name: str, variant: Variant) -> float:
    setting = "-".join(f"{value:g}" for value in variant.setting)
    title = f"{variant.label}, learning rate {variant.rate:g}, temperature {variant.temperature:g} {setting}".strip()

    def fit(directory: Path) -> list[dict[str, Any]]:
        return train(
            variant,
            plan,
            SEED,
            directory,
            device=context.device,
            identity=title,
            after_epoch=lambda done: context.progress.advance(done * variant.weight, title),
            say=context.progress.say,
        ).history

    key = f"{name}-{variant.rate:g}-{variant.temperature:g}-{setting}"
    found = score(context, key, variant.weight * plan.training.epochs, fit, last=1)
    context.progress.say(f"{title}: {found:.3f}")
    return found


def blocks(result: dict[str, Any]) -> list[Block]:
    """One table of all trials."""
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    for name, found in result["trials"].items():
        best = max(range(len(found)), key=lambda i: found[i]["validation"])
        strong.append(len(rows) + best)
        rows += [
            (
                VARIANTS[name].label,
                f"{trial['rate']:g}",
                f"{trial['temperature']:g}",
                ", ".join(f"{value:g}" for value in trial["setting"]) or "–",
                f"{trial['validation']:.3f}",
            )
            for trial in found
        ]
    return [
        Paragraph(
            f"Every trial is trained for {result['epochs']} epochs on one seed and scored by MRR@10 on the validation "
            "modules after the last one. The test modules are never used here."
        ),
        Table(
            "Validation MRR@10",
            ("Method", "learning rate", "temperature", "setting", "MRR@10"),
            tuple(rows),
            note="The best one of each method is set off. Setting: temperature of the smooth maximum; words retrieved "
            "in training and in searching.",
            strong=tuple(strong),
        ),
    ]


EXPERIMENT = Experiment(
    name="retrieval-search",
    title="Settings of the retrieval experiment, chosen on validation modules",
    source="For the experiment retrieval",
    run=run,
    blocks=blocks,
    by_default=False,
)
