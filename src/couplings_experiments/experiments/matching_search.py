"""The search that chose the matchers' learning rate: validation photographs only, every variant at every rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.matching_training import PLANS, VARIANTS, Plan, train
from couplings_experiments.report.blocks import Block, Paragraph, Table
from couplings_experiments.search import score

SEED = 100  # draws other views and first weights than the seeds that are reported
RATES = (1e-3, 2e-3, 5e-3)


def run(context: Context) -> dict[str, Any]:
    """Train every trial; look at validation photographs only."""
    plan = PLANS["smoke" if context.request.preset == "smoke" else "quick"]
    steps = plan.training.epochs * sum(variant.weight for variant in VARIANTS.values())
    context.progress.expect(len(RATES) * steps)
    trials = {name: [_trial(context, plan, name, rate) for rate in RATES] for name in VARIANTS}
    return {"trials": trials, "steps": plan.training.epochs * plan.training.steps}


def _trial(context: Context, plan: Plan, name: str, rate: float) -> float:
    variant = VARIANTS[name]
    tried = replace(plan, training=replace(plan.training, rate=rate))
    title = f"{variant.label}, learning rate {rate:g}"

    def fit(directory: Path) -> list[dict[str, Any]]:
        return train(
            variant,
            tried,
            SEED,
            directory,
            device=context.device,
            identity=title,
            after_epoch=lambda done: context.progress.advance(done * variant.weight, title),
            say=context.progress.say,
        ).history

    found = score(context, f"{name}-{rate:g}", variant.weight * plan.training.epochs, fit)
    context.progress.say(f"{title}: {found:.3f}")
    return found


def blocks(result: dict[str, Any]) -> list[Block]:
    """One table of all trials."""
    trials = result["trials"]
    rows = [(VARIANTS[name].label, *(f"{score:.3f}" for score in found)) for name, found in trials.items()]
    rows.append(("mean", *(f"{fmean(scores):.4f}" for scores in zip(*trials.values(), strict=True))))
    return [
        Paragraph(
            f"Every way from scores to a plan is trained for {result['steps']} steps at each rate, on one seed. What "
            "is compared is F1 on pairs of validation photographs at the threshold best for them, after the last "
            "epoch. The rate that is best on average serves all of them, so that they differ in nothing but the plan. "
            "The photographs that test are never used here."
        ),
        Table(
            "Validation F1 by learning rate",
            ("Variant", *(f"{rate:g}" for rate in RATES)),
            tuple(rows),
            strong=(len(rows) - 1,),
        ),
    ]


EXPERIMENT = Experiment(
    name="matching-search",
    title="Learning rate of the matching experiment, chosen on validation photographs",
    source="For the experiment matching",
    run=run,
    blocks=blocks,
    by_default=False,
)
