"""Robust regression: a soft quantile and a trimmed mean of the squared residuals, against least squares and Huber."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.metrics import mean_absolute_error, median_absolute_error, root_mean_squared_error
from torch import Tensor

from couplings.losses import least_quantile_loss, trimmed_loss
from couplings_experiments.data.patients import load_patients
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.fitting import Fitting, RowNetworks, best, fit
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, drawing
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread, standing

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)  # of the training targets
FACTOR = 10.0  # an outlier is a target whose decimal point slipped
HIDDEN = {"linear": 0, "network": 16}
MODELS = {"linear": "linear model", "network": "network with 16 hidden units"}
RATES = {"linear": 0.1, "network": 0.01}


@dataclass(frozen=True)
class Trial:
    """One setting of a method: the loss's own parameter, epsilon, and the weight of the squared parameters."""

    parameter: float | None = None
    epsilon: float | None = None
    decay: float = 0.0

    def words(self, name: str | None) -> str:
        """'keep 0.5, epsilon 0.1'."""
        parts = [] if name is None else [f"{name} {self.parameter:g}"]
        parts += [f"epsilon {self.epsilon:g}"] if self.epsilon is not None else [f"decay {self.decay:g}"]
        return ", ".join(parts)


Loss = Callable[[Tensor, float | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Method:
    """A loss of residuals (rows, n), its parameter and epsilon (rows,) -> (rows,), and the trials it is allowed."""

    label: str
    loss: Loss
    trials: tuple[Trial, ...]
    parameter: str | None
    weight: float  # how long an epoch takes compared with the cheapest (for the time left)
    soft: bool


def least_squares(residuals: Tensor, parameter: float | None, epsilon: Tensor | None) -> Tensor:
    """Mean squared residual of each row."""
    return residuals.square().mean(-1)


def huber(residuals: Tensor, parameter: float | None, epsilon: Tensor | None) -> Tensor:
    """Huber's loss with the threshold ``parameter``: quadratic below, linear above."""
    delta = parameter or 1.0
    size = residuals.abs()
    inner = size.clamp_max(delta)
    return (inner * (size - 0.5 * inner)).mean(-1)


def _least_quantile(residuals: Tensor, parameter: float | None, epsilon: Tensor | None) -> Tensor:
    return least_quantile_loss(residuals.square(), parameter or 0.5, epsilon=epsilon, reduction="none")


def _trimmed(residuals: Tensor, parameter: float | None, epsilon: Tensor | None) -> Tensor:
    return trimmed_loss(residuals.square(), parameter or 0.5, epsilon=epsilon, reduction="none")


# Six trials for everyone. Thresholds are in robust standard deviations of the training targets.
_KEPT = (0.5, 0.7, 0.9)
METHODS = {
    "squares": Method(
        "least squares",
        least_squares,
        tuple(Trial(decay=decay) for decay in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)),
        None,
        1.0,
        False,
    ),
    "huber": Method(
        "Huber",
        huber,
        tuple(Trial(delta, decay=decay) for delta, decay in product((0.03, 0.3, 1.345), (0.01, 0.1))),
        "delta",
        1.0,
        False,
    ),
    "quantile": Method(
        "soft least quantile",
        _least_quantile,
        tuple(Trial(q, epsilon) for q, epsilon in product(_KEPT, (0.001, 0.01))),
        "q",
        8.0,
        True,
    ),
    "trimmed": Method(
        "soft trimmed squares",
        _trimmed,
        tuple(Trial(keep, epsilon) for keep, epsilon in product(_KEPT, (0.01, 0.1))),
        "keep",
        1.5,
        True,
    ),
}
METRICS = {"median": "median absolute error", "rmse": "root mean square error"}


@dataclass(frozen=True)
class Plan:
    """How much a preset does."""

    seeds: int
    fitting: Fitting
    models: tuple[str, ...] = ("linear", "network")
    shares: tuple[float, ...] = SHARES


PLANS = {
    "smoke": Plan(1, Fitting(epochs=2, steps=3), ("linear",), (0.0, 0.4)),
    "quick": Plan(1, Fitting(epochs=5, steps=30), shares=(0.0, 0.2, 0.4)),
    "full": Plan(5, Fitting(epochs=10, steps=30)),
}


def plant(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Targets with ``share`` of them multiplied by ten, and which ones, (n,) bool.

    A larger share has the outliers of a smaller one, too.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    chosen[order[: round(share * len(targets))]] = True
    chosen = chosen.to(targets.device)
    return torch.where(chosen, FACTOR * targets, targets), chosen


def robust_unit(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Median, and median absolute deviation as a standard deviation: what the fit measures targets in."""
    centre = targets.median()
    return centre, 1.4826 * (targets - centre).abs().median()


def run(context: Context) -> dict[str, Any]:
    """Fit every model, choose by validation patients, test the chosen ones once."""
    torch.set_num_threads(1)
    plan = PLANS[context.request.preset]
    seeds = range(context.request.seeds or plan.seeds)
    steps = sum(method.weight for method in METHODS.values()) * len(plan.models)
    context.progress.expect(len(seeds) * plan.fitting.epochs * steps)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        model: {name: [] for name in METHODS} for model in plan.models
    }
    for seed in seeds:
        for model in plan.models:
            for name in METHODS:
                results[model][name].append(_unit(context, model, name, seed))
    return {
        "preset": context.request.preset,
        "seeds": list(seeds),
        "shares": list(plan.shares),
        "sizes": load_patients(0).sizes,
        "fitting": asdict(plan.fitting),
        # model -> method -> metric -> share -> seed
        "test": {
            model: {
                name: {
                    metric: [[r["test"][i][metric] for r in found] for i in range(len(plan.shares))]
                    for metric in METRICS
                }
                for name, found in methods.items()
            }
            for model, methods in results.items()
        },
        "chosen": {
            model: {name: [r["chosen"] for r in found] for name, found in methods.items()}
            for model, methods in results.items()
        },
        "trials": {
            name: [trial.words(method.parameter) for trial in method.trials]
            for name, method in METHODS.items()
        },
        "seconds": {
            model: {name: [r["seconds"] for r in found] for name, found in methods.items()}
            for model, methods in results.items()
        },
    }


def _unit(context: Context, model: str, name: str, seed: int) -> dict[str, Any]:
    """All trials of a method at all shares, which are rows of one fit."""
    plan, method = PLANS[context.request.preset], METHODS[name]
    title = f"{method.label}, {MODELS[model]}, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        data = load_patients(seed).to(context.device)
        planted = [plant(data.train.targets, share, seed)[0] for share in plan.shares]
        units = [robust_unit(targets) for targets in planted]
        goals = torch.stack([(t - centre) / scale for t, (centre, scale) in zip(planted, units, strict=True)])
        centre, scale = (torch.stack(parts)[:, None, None] for parts in zip(*units, strict=True))
        trials, count = method.trials, len(plan.shares)
        networks = RowNetworks(
            [RATES[model]] * (count * len(trials)), data.train.features.shape[-1], HIDDEN[model], seed
        ).to(context.device)
        decay = torch.tensor([trial.decay for trial in trials], device=context.device)

        def by_share(rows: Tensor) -> Tensor:
            return rows.reshape(count, len(trials), *rows.shape[1:])

        def step(draw: torch.Generator) -> Tensor:
            residuals = goals[:, None] - by_share(networks(data.train.features))
            losses = trial_losses(method, residuals)
            return (losses + decay * by_share(networks.penalty())).flatten()

        def predicted(features: Tensor) -> Tensor:
            return by_share(networks(features)) * scale + centre

        def measure() -> list[float]:
            errors = predicted(data.validation.features) - data.validation.targets
            return errors.abs().mean(-1).flatten().tolist()

        history = fit(
            networks,
            step,
            measure,
            plan.fitting,
            seed,
            directory,
            identity=f"{name} {model} {trials} {plan.shares} {RATES[model]}",
            after_epoch=lambda done: context.progress.advance(done * method.weight, title),
            say=context.progress.say,
        )
        last = [history[-1][i * len(trials) : (i + 1) * len(trials)] for i in range(count)]
        chosen = [best(scores, highest=False) for scores in last]
        with torch.no_grad():
            found = predicted(data.test.features).double().cpu().numpy()
        truth = data.test.targets.double().cpu().numpy()
        return {
            "chosen": chosen,
            "validation": last,
            "test": [_errors(truth, found[i, one]) for i, one in enumerate(chosen)],
        }

    result = context.unit(f"{model}-{name}-{seed}", plan.fitting.epochs * method.weight, compute)
    medians = ", ".join(
        f"{share:.0%} {found['median']:.1f}" for share, found in zip(plan.shares, result["test"], strict=True)
    )
    context.progress.say(
        f"seed {seed}: {MODELS[model]}, {method.label}: median absolute error {medians}  "
        f"({result['seconds']:.1f} s)"
    )
    return result


def trial_losses(method: Method, residuals: Tensor) -> Tensor:
    """The loss of each trial, residuals (shares, trials, n) -> (shares, trials)."""
    losses: list[Tensor] = [torch.empty(0)] * len(method.trials)
    for parameter in dict.fromkeys(trial.parameter for trial in method.trials):
        members = [i for i, trial in enumerate(method.trials) if trial.parameter == parameter]
        rows = residuals[:, members]
        epsilon = None
        if method.soft:
            values = [method.trials[i].epsilon or 0.0 for i in members]
            epsilon = torch.tensor(values, device=rows.device).expand(rows.shape[:-1])
        found = method.loss(rows, parameter, epsilon)
        for column, i in enumerate(members):
            losses[i] = found[:, column]
    return torch.stack(losses, 1)


def _errors(truth: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> dict[str, float]:
    return {
        "median": float(median_absolute_error(truth, found)),
        "rmse": float(root_mean_squared_error(truth, found)),
        "mean": float(mean_absolute_error(truth, found)),
    }


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the curves, a table of each metric, the settings."""
    return [
        *_meaning(result),
        _curves(result),
        *(_table(result, model, metric) for model in result["test"] for metric in METRICS),
        Heading("Settings"),
        *_settings(result),
    ]


def _signs(result: dict[str, Any], model: str, metric: str, mine: str, rival: str) -> list[int]:
    """For each share, the sign of how much larger the error of ``mine`` is than that of ``rival``, 0 if unclear."""
    test = result["test"][model]
    return [
        clear(paired(ours, theirs))
        for ours, theirs in zip(test[mine][metric], test[rival][metric], strict=True)
    ]


def _meaning(result: dict[str, Any]) -> list[Block]:
    """For each model what the errors are, and what may be said of them; every claim is computed."""
    shares, seeds = result["shares"], len(result["seeds"])
    said: list[Block] = []
    for model, test in result["test"].items():
        mean = {name: [fmean(values) for values in test[name]["median"]] for name in METHODS}
        text = (
            f"{MODELS[model][0].upper()}{MODELS[model][1:]}, median absolute error on untouched test targets "
            f"{seeds_in_words(seeds)}, from {shares[0]:.0%} to {shares[-1]:.0%} outliers in training: "
            + "; ".join(
                f"{METHODS[name].label} {mean[name][0]:.1f} to {mean[name][-1]:.1f}" for name in METHODS
            )
            + "."
        )
        if seeds < 3:
            said.append(Paragraph(text + caution(seeds), lead=True))
            continue
        said.append(Paragraph(text, lead=True))
        compared = "By paired differences over seeds, beyond two standard errors."
        for name in (name for name, method in METHODS.items() if method.soft):
            for metric, words in METRICS.items():
                parts = []
                for sign, word in ((-1, "smaller"), (1, "larger"), (0, "not distinguishable")):
                    signs = _signs(result, model, metric, name, "huber")
                    at = [f"{share:.0%}" for share, found in zip(shares, signs, strict=True) if found == sign]
                    parts += [f"{word} at {join(at)}"] * bool(at)
                compared += f" Against Huber's, the {words} of {METHODS[name].label} is {', '.join(parts)}."
        for metric, words in METRICS.items():
            losers = [
                METHODS[name].label
                for name, method in METHODS.items()
                if method.soft and _signs(result, model, metric, name, "squares")[0] > 0
            ]
            verb = "loses" if len(losers) == 1 else "lose"
            compared += (
                f" Without outliers {join(losers)} {verb} to least squares in {words}."
                if losers
                else f" Without outliers neither soft loss measurably loses to least squares in {words}."
            )
        said.append(Paragraph(compared))
    return said


def _table(result: dict[str, Any], model: str, metric: str) -> Table:
    shares, seeds, sizes = result["shares"], len(result["seeds"]), result["sizes"]
    test = result["test"][model]
    rows = tuple(
        (METHODS[name].label, *(spread(test[name][metric][i], 1) for i in range(len(shares))))
        for name in METHODS
    )
    how = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed, no spread"
    last = metric == list(METRICS)[-1]
    note = (
        f"{how}; {sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test patients, none "
        f"in two parts; the test patients are the same for all seeds. An outlier is a training target multiplied by "
        f"{FACTOR:g}, as by a slipped decimal point; validation and test targets are never touched. Targets run from "
        "25 to 346. The idea is Cuturi et al.'s, who give no figures for these data."
    )
    return Table(
        caption=f"Test {METRICS[metric]}, {MODELS[model]}",
        header=("Loss", *(f"{share:.0%} outliers" for share in shares)),
        rows=rows,
        note=note if last and model == list(result["test"])[-1] else "",
        strong=tuple(i for i, method in enumerate(METHODS.values()) if method.soft),
    )


def _curves(result: dict[str, Any]) -> Figure:
    models, shares = list(result["test"]), [100 * share for share in result["shares"]]
    tops = [
        value
        for model in models
        for name in METHODS
        if name != "squares"
        for value in (fmean(values) for values in result["test"][model][name]["median"])
    ]
    top, low = 1.25 * max(tops), 0.9 * min(tops)
    with drawing("robust", 7.8, 3.3) as (canvas, out):
        axes = canvas.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for place, model in zip(axes, models, strict=True):
            for (name, method), colour, style in zip(METHODS.items(), _COLOURS, _STYLES, strict=True):
                values = np.asarray(result["test"][model][name]["median"])
                place.fill_between(
                    shares, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0
                )
                place.plot(
                    shares,
                    values.mean(1),
                    style,
                    color=colour,
                    linewidth=1.9,
                    markersize=5,
                    label=method.label,
                )
            place.set_ylim(low, top)
            place.set_xticks(shares, [f"{share:.0f} %" for share in shares])
            place.set_xlabel("outliers among the training targets")
            place.set_title(MODELS[model])
            place.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        axes[0].set_ylabel("median absolute test error")
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside upper center", ncols=len(METHODS))
    end = "; ".join(
        f"{MODELS[model]}: "
        + ", ".join(
            f"{METHODS[name].label} {fmean(result['test'][model][name]['median'][-1]):.1f}"
            for name in METHODS
        )
        for model in models
    )
    band = " Lines are means over seeds, bands their range." if len(result["seeds"]) > 1 else ""
    return Figure(
        out[-1],
        f"Error on untouched test targets as more training targets slip by a factor of {FACTOR:g}.{band} The axis "
        f"begins at {low:.0f}; what lies above {top:.0f} is cut off.",
        f"Line charts of test error by share of outliers. At {shares[-1]:.0f} %: {end}.",
    )


_COLOURS = (COLOURS[6], COLOURS[1], COLOURS[2], COLOURS[0])
_STYLES = ("s:", "^--", "D-", "o-")


def _settings(result: dict[str, Any]) -> list[Block]:
    used, shares = result["fitting"], result["shares"]
    rows = []
    for model, methods in result["chosen"].items():
        for name, found in methods.items():
            cells = []
            for i in range(len(shares)):
                indices = [seed[i] for seed in found]
                most = max(indices, key=indices.count)
                often = f" ({indices.count(most)} of {len(indices)})" if len(indices) > 1 else ""
                cells.append(result["trials"][name][most] + often)
            seconds = fmean(result["seconds"][model][name])
            rows.append((f"{METHODS[name].label}, {model}", *cells, f"{seconds:.1f}"))
    return [
        Paragraph(
            f"Adam on all training patients at once, {used['epochs'] * used['steps']} steps with cosine decay, rates "
            f"{RATES['linear']:g} (linear) and {RATES['network']:g} (network). Measurements are scaled by the training "
            "patients, targets by their median and median absolute deviation. Every loss has six trials; at each share "
            "of outliers the one with the smallest mean absolute error on the validation patients is tested, once. So "
            "every loss knows from clean validation targets how much to distrust the training targets; the least "
            "quantile and the trimmed loss depend on that most."
        ),
        Table(
            caption="The setting chosen most often, and the time of all trials and shares together",
            header=("Loss, model", *(f"{share:.0%}" for share in shares), "seconds per seed"),
            rows=tuple(rows),
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """The trimmed loss beside Huber's where outliers are most."""
    test = result["test"]["linear"]
    mine, rival = (test[name]["median"][-1] for name in ("trimmed", "huber"))
    return Headline(
        f"Median error with {result['shares'][-1]:.0%} outliers in training, {MODELS['linear']}, "
        f"{METHODS['trimmed'].label}",
        spread(mine, 1),
        "",
        standing(mine, rival, f"{METHODS['huber'].label}'s error", digits=1),
    )


EXPERIMENT = Experiment(
    name="robust-regression",
    title="Regression with outliers in the training targets",
    source="Rousseeuw 1984, with the soft quantiles of Cuturi et al., NeurIPS 2019, and soft top k of Xie et al. 2020",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.05, "quick": 1.1, "full": 19},
)
