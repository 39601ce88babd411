"""The search that chose the alignment experiment's settings: validation images only, every loss with its own grid."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from couplings_experiments.alignment_training import PLANS, STARTS, VARIANTS, Plan, Variant, dataset, train
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Paragraph, Table
from couplings_experiments.search import score

SEED = 100  # other first weights and another order than the seeds that are reported
SEEDS = (SEED, SEED + 1, SEED + 2)  # of the guard's weights: runs from collapse differ more than others
RATES = (1e-3, 3e-3)
TEMPERATURES = (0.1, 0.2, 0.4)
OPTIONS: dict[str, tuple[dict[str, float], ...]] = {
    **{
        name: tuple({"temperature": t} for t in TEMPERATURES)
        for name in ("n-pairs", "info-nce", "clip", "nt-xent")
    },
    "sigmoid": tuple({"temperature": t, "bias": b} for t, b in ((0.1, -10.0), (0.2, -5.0), (0.4, -5.0))),
    "sigmoid-low": tuple({"temperature": t, "bias": b} for t, b in ((0.1, -15.0), (0.2, -10.0))),
    "triplet": tuple({"margin": margin} for margin in (0.1, 0.2, 0.4)),
    "cosine-target": tuple({"balance": balance} for balance in (0.3, 0.5, 0.7)),
}
GUARDS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def trials(name: str) -> list[tuple[str, Variant]]:
    """Rates with options from a healthy start; then weights of the guard, from collapse, with what is reported."""
    chosen = VARIANTS[name]
    found = [
        ("healthy", replace(chosen, rate=rate, options={**chosen.options, **options}))
        for rate in RATES
        for options in OPTIONS[name]
    ]
    return [*found, *(("collapsed-guard", replace(chosen, guard=weight)) for weight in GUARDS)]


def run(context: Context) -> dict[str, Any]:
    """Train every trial; look at validation images only."""
    plan = PLANS["smoke" if context.request.preset == "smoke" else "quick"]
    tried = {name: trials(name) for name in plan.variants}
    runs = sum(len(_seeds(key)) for found in tried.values() for key, _ in found)
    context.progress.expect((plan.training.epochs + 1) * runs)
    return {
        "epochs": plan.training.epochs,
        "trials": {
            name: [
                {
                    "start": key,
                    "rate": variant.rate,
                    "options": variant.options,
                    "guard": variant.guard,
                    "validation": _trial(context, plan, name, key, variant),
                }
                for key, variant in found
            ]
            for name, found in tried.items()
        },
    }


def _seeds(key: str) -> tuple[int, ...]:
    return SEEDS if STARTS[key].guarded else (SEED,)


def _trial(context: Context, plan: Plan, name: str, key: str, variant: Variant) -> float:
    """Mean over its seeds."""
    values = "-".join(f"{value:g}" for value in (variant.rate, variant.guard, *variant.options.values()))
    title = f"{variant.label}, {STARTS[key].label}, {values}"
    folder = context.request.data_dir

    def fit(directory: Path, seed: int) -> list[dict[str, Any]]:
        history = train(
            variant,
            STARTS[key],
            plan,
            dataset(context.request.dataset, Path(folder) if folder else None, seed, plan.limit),
            seed,
            directory,
            device=context.device,
            identity=f"{title}, seed {seed}",
            processes=context.processes,
            after_epoch=lambda done: context.progress.advance(done, title),
            say=context.progress.say,
        ).history
        return [{"validation": fmean(point["accuracy"])} for point in history]

    found = fmean(
        score(
            context,
            f"{name}-{key}-{values}-{seed}",
            plan.training.epochs + 1,
            partial(fit, seed=seed),
            last=1,
        )
        for seed in _seeds(key)
    )
    context.progress.say(f"{title}: {found:.1%}")
    return found


def blocks(result: dict[str, Any]) -> list[Block]:
    """One table of all trials."""
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    for name, found in result["trials"].items():
        for key in ("healthy", "collapsed-guard"):
            mine = [trial for trial in found if trial["start"] == key]
            best = max(range(len(mine)), key=lambda i: mine[i]["validation"])
            strong.append(len(rows) + best)
            rows += [
                (
                    VARIANTS[name].label,
                    STARTS[key].label,
                    f"{trial['rate']:g}",
                    ", ".join(
                        f"{option} {value:g}"
                        for option, value in trial["options"].items()
                        if not isinstance(value, bool)
                    ),
                    f"{trial['guard']:g}" if STARTS[key].guarded else "–",
                    f"{100 * trial['validation']:.1f}",
                )
                for trial in mine
            ]
    return [
        Paragraph(
            f"Every trial is trained for {result['epochs']} epochs, from a healthy start on one seed, from collapse on "
            f"{len(SEEDS)}, and scored by the halves found among the validation images, mean of both directions. The "
            "test images are never used here."
        ),
        Table(
            "Validation images whose other half is found, in percent",
            ("Loss", "start", "learning rate", "options", "guard", "found"),
            tuple(rows),
            note="The best one of each loss and start is set off.",
            strong=tuple(strong),
        ),
    ]


EXPERIMENT = Experiment(
    name="alignment-search",
    title="Settings of the alignment experiment, chosen on validation images",
    source="For the experiment alignment",
    run=run,
    blocks=blocks,
    by_default=False,
    distributed=True,
)
