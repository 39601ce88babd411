"""Keypoint matching: a small attentional matcher trained through transport, against what learns nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from PIL import Image

from couplings_experiments.data.photographs import FAR, NEAR, PHOTOGRAPHS, SIZE, Pair, stereo_pairs
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.matching_methods import (
    AUC,
    Found,
    Method,
    choose_threshold,
    descriptor_method,
    measure,
    nearest,
    right,
)
from couplings_experiments.matching_training import PLANS, VARIANTS, Plan, apply, held, train
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, drawing
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread, standing

SETS = {"photographs": "held-out photographs", "stereo": "the stereo pair"}
UNLEARNED = {
    "nearest": "mutual nearest neighbours",
    "ratio": "ratio test",
    "dual-softmax-descriptors": "dual softmax of descriptors",
    "transport-descriptors": "transport of descriptors",
}
# What is tried on the validation photographs for those of them that have settings: sharpness, dustbin's similarity.
_TRIED = {
    "dual-softmax-descriptors": (
        "dual_softmax",
        [(sharpness, -np.inf) for sharpness in (15.0, 25.0, 40.0, 60.0)],
    ),
    "transport-descriptors": (
        "transport",
        [
            (sharpness, likeness)
            for sharpness in (20.0, 30.0, 50.0)
            for likeness in (0.6, 0.65, 0.7, 0.75, 0.8)
        ],
    ),
}
MINE, RIVAL = "transport", "ratio"


def run(context: Context) -> dict[str, Any]:
    """Match with every method; settings and thresholds by the validation photographs only."""
    plan = PLANS[context.request.preset]
    seeds = range(context.request.seeds or plan.seeds)
    steps = plan.training.epochs * sum(VARIANTS[name].weight for name in plan.variants)
    context.progress.expect(1 + len(seeds) * steps)
    unlearned = context.unit("unlearned", 1, lambda directory: _unlearned(context, plan))
    context.progress.say(
        "F1 of "
        + ", ".join(
            f"{UNLEARNED[name]} {found['photographs']['f1']:.3f} ({found['stereo']['f1']:.3f} on the stereo pair)"
            for name, found in unlearned["methods"].items()
        )
    )
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.variants}
    for seed in seeds:
        for name in plan.variants:
            trained[name].append(_unit(context, plan, name, seed, unlearned))
    return {
        "preset": context.request.preset,
        "seeds": list(seeds),
        "plan": asdict(plan),
        "sizes": unlearned["sizes"],
        "unlearned": unlearned["methods"],
        "trained": {
            name: [{k: v for k, v in unit.items() if k != "pictured"} for unit in units]
            for name, units in trained.items()
        },
        "pictured": next(u["pictured"] for us in trained.values() for u in us if "pictured" in u),
    }


def _pairs(plan: Plan) -> dict[str, list[Pair]]:
    """What is tested on, for each of `SETS`."""
    return {"photographs": held("test", plan.test, plan.limit[1]), "stereo": stereo_pairs()}


def _unlearned(context: Context, plan: Plan) -> dict[str, Any]:
    """Every method that learns nothing, with the setting and the threshold that are best on validation."""
    validation = held("validation", plan.validation, plan.limit[1])
    tested = _pairs(plan)
    methods = {}
    for name, label in UNLEARNED.items():
        tried: dict[str, Method] = {"": nearest}
        if name in _TRIED:
            method, settings = _TRIED[name]
            tried = {
                f"similarity times {sharpness:g}"
                + (f", dustbin at {likeness:g}" if np.isfinite(likeness) else ""): descriptor_method(
                    method, sharpness, likeness
                )
                for sharpness, likeness in settings
            }
        chosen = {}
        for setting, match in tried.items():
            # mutual nearest neighbours have no threshold: they are kept however unsure
            chosen[setting] = choose_threshold([match(pair) for pair in validation], validation)
        best = max(chosen, key=lambda setting: chosen[setting][1])
        threshold = -1.0 if name == "nearest" else chosen[best][0]
        methods[name] = {
            "setting": best,
            "threshold": threshold,
            **{
                kind: measure([tried[best](pair) for pair in pairs], pairs, threshold).to_json()
                for kind, pairs in tested.items()
            },
        }
        context.progress.advance(1 / len(UNLEARNED), label)
    return {"methods": methods, "sizes": _sizes(plan, validation, tested)}


def _sizes(plan: Plan, validation: list[Pair], tested: dict[str, list[Pair]]) -> dict[str, Any]:
    parts = {"validation": validation, **tested}
    return {
        name: {
            "pairs": len(pairs),
            "keypoints": round(fmean(len(side) for pair in pairs for side in (pair.first, pair.second))),
            "matches": sum(int((pair.rows >= 0).sum()) for pair in pairs),
        }
        for name, pairs in parts.items()
    }


def _unit(context: Context, plan: Plan, name: str, seed: int, unlearned: dict[str, Any]) -> dict[str, Any]:
    """Train one variant, choose its threshold on validation, test it once."""
    variant = VARIANTS[name]
    title = f"{variant.label}, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        model, history = train(
            variant,
            plan,
            seed,
            directory,
            device=context.device,
            identity=name,
            after_epoch=lambda done: context.progress.advance(done * variant.weight, title),
            say=context.progress.say,
        )
        validation = held("validation", plan.validation, plan.limit[1])
        threshold, score = choose_threshold(apply(model, validation, variant)[0], validation)
        result: dict[str, Any] = {"threshold": threshold, "validation": score, "history": history}
        errors = []
        for kind, pairs in _pairs(plan).items():
            found, error = apply(model, pairs, variant)
            errors.append(error)
            result[kind] = measure(found, pairs, threshold).to_json()
            if name == MINE and seed == 0:
                rival = unlearned["methods"][RIVAL]["threshold"]
                shown = (0, -1) if kind == "photographs" else (0,)
                result.setdefault("pictured", []).extend(
                    _pictured(pairs[i], found[i], threshold, rival) for i in shown
                )
        return {**result, "row_error": max(errors)}

    result = context.unit(f"{name}-{seed}", plan.training.epochs * variant.weight, compute)
    context.progress.say(
        f"{title}: F1 {result['photographs']['f1']:.3f} ({result['stereo']['f1']:.3f} on the stereo pair)  "
        f"({result['seconds']:.1f} s)"
    )
    return result


def _pictured(pair: Pair, found: Found, threshold: float, rival: float) -> dict[str, Any]:
    """Both images, and the lines of what is found: x, y, x, y, and whether it is right."""

    def lines(result: Found, least: float) -> list[list[float]]:
        matches = result.above(least)
        matches[np.isnan(pair.distance).any(1)] = -1
        good, kept = right(matches, pair), np.flatnonzero(matches >= 0)
        ends = np.concatenate([pair.first.points[kept], pair.second.points[matches[kept]]], 1)
        return [[*row, float(ok)] for row, ok in zip(ends.round(1).tolist(), good[kept], strict=True)]

    return {
        "name": pair.name,
        "images": [_encoded(image) for image in pair.images],
        "matches": int((pair.rows >= 0).sum()),
        "lines": {RIVAL: lines(nearest(pair), rival), MINE: lines(found, threshold)},
    }


def _encoded(image: np.ndarray[Any, Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the tables, pictures of matches, the curves, the settings."""
    return [
        *_meaning(result),
        _table(result, "photographs"),
        _areas(result),
        _table(result, "stereo"),
        Heading("What is matched"),
        *(_picture(shown, index) for index, shown in enumerate(result["pictured"])),
        Heading("Learning curves"),
        _curves(result),
        Heading("Settings"),
        *_settings(result),
    ]


def _values(result: dict[str, Any], name: str, kind: str, what: str) -> list[float]:
    return [unit[kind][what] for unit in result["trained"][name]]


def _meaning(result: dict[str, Any]) -> list[Block]:
    """Two sentences, and what may be said of the differences; every claim is computed."""
    seeds, trained, unlearned = len(result["seeds"]), result["trained"], result["unlearned"]
    parts, signs = [], {}
    for kind, words in SETS.items():
        mine, rival = _values(result, MINE, kind, "f1"), unlearned[RIVAL][kind]["f1"]
        parts.append(f"{spread(mine, 3)} against {rival:.3f} on {words}")
        signs[kind] = (sum(value > rival for value in mine), clear([value - rival for value in mine]))
    first = (
        f"The matcher trained through transport has F1 {join(parts)}: the second figure is that of the ratio test on "
        f"the same keypoints and descriptors ({seeds_in_words(seeds)})."
    )
    if seeds < 3:
        first += caution(seeds)
    else:
        verdict = {1: "clearly higher", 0: "not clearly different", -1: "clearly lower"}
        first += (
            " By the differences over seeds (mean beyond two standard errors) it is "
            + join(
                [
                    f"{verdict[sign]} on {SETS[kind]} ({more} of {seeds} seeds)"
                    for kind, (more, sign) in signs.items()
                ]
            )
            + "."
        )
    second = []
    for kind, words in SETS.items():
        means = {name: fmean(_values(result, name, kind, "f1")) for name in trained}
        best = max(means, key=lambda name: means[name])
        plain = unlearned["transport-descriptors"][kind]["f1"]
        second.append(
            f"on {words} the highest F1 of the {len(trained)} ways from scores to a plan is {means[best]:.3f} "
            f"({VARIANTS[best].label}), the lowest {min(means.values()):.3f}, and transport of the descriptors with "
            f"nothing learned has {plain:.3f}"
        )
    text = f"{'; '.join(second)}."
    return [
        Paragraph(first, lead=True),
        Paragraph(text[0].upper() + text[1:], lead=True),
        Paragraph(f"{_homographies(result)} {_between(result)}"),
    ]


def _homographies(result: dict[str, Any]) -> str:
    """Whether more matches make better homographies, too."""
    rival, areas = result["unlearned"][RIVAL]["photographs"]["auc"], []
    for i, pixels in enumerate(AUC):
        mine = [unit["photographs"]["auc"][i] for unit in result["trained"][MINE]]
        sign = clear([value - rival[i] for value in mine])
        word = {1: ", clearly higher", 0: "", -1: ", clearly lower"}[sign]
        areas.append(f"{spread(mine, 3)} against {rival[i]:.3f} at {pixels} pixels{word}")
    return (
        "The homographies that RANSAC estimates from the same matches are another matter: the area under the curve for "
        f"the trained matcher and for the ratio test is {join(areas)}. F1 counts a match up to {NEAR:g} pixels off as "
        "right; the corners of a homography feel every pixel."
    )


def _between(result: dict[str, Any]) -> str:
    """The certificate against fixed sweeps and against the dual softmax."""
    seeds = len(result["seeds"])
    text = ""
    for name in (name for name in result["trained"] if name != MINE):
        said = []
        for kind, words in SETS.items():
            gaps = paired(_values(result, MINE, kind, "f1"), _values(result, name, kind, "f1"))
            word = ", clear over seeds" if clear(gaps) else ", not clear over seeds"
            said.append(f"{fmean(gaps):+.3f} on {words}{word if seeds > 2 else ''}")
        text += f" F1 of the certified transport minus that of {VARIANTS[name].label}: {join(said)}."
    errors = {name: max(unit["row_error"] for unit in units) for name, units in result["trained"].items()}
    text += (
        " What the certificate does give is the plan that was asked for: the mass of a keypoint in test pairs is off 1 "
        "by at most "
        + join([f"{error:.1g} ({VARIANTS[name].label})" for name, error in errors.items()])
        + "."
    )
    return text.strip() + caution(seeds)


def _rows(result: dict[str, Any], values: Callable[[dict[str, Any]], list[float]]) -> dict[str, Any]:
    """Rows of all methods, each cell a mean over its seeds, and which row to set off."""
    methods = [(UNLEARNED[name], [found]) for name, found in result["unlearned"].items()]
    methods += [(f"trained, {VARIANTS[name].label}", units) for name, units in result["trained"].items()]
    rows = [
        (label, *(spread(cell, 3) for cell in zip(*map(values, units), strict=True)))
        for label, units in methods
    ]
    return {"rows": tuple(rows), "strong": (len(UNLEARNED) + list(result["trained"]).index(MINE),)}


def _areas(result: dict[str, Any]) -> Table:
    return Table(
        caption=f"Homographies on {SETS['photographs']}: area under the curve",
        header=("Method", *(f"AUC at {pixels} px" for pixels in AUC)),
        note="Of the homography that RANSAC estimates from the matches, by the mean error at the corners.",
        **_rows(result, lambda unit: unit["photographs"]["auc"]),
    )


def _table(result: dict[str, Any], kind: str) -> Table:
    seeds, sizes = len(result["seeds"]), result["sizes"][kind]
    over = f"Trained: mean ± standard deviation over {seeds} seeds. " if seeds > 1 else "Trained: one seed. "
    known = {
        "photographs": (
            f"{join(PHOTOGRAPHS['test'])}, none of which trains or validates: {sizes['pairs']} pairs of random views "
            f"with {sizes['keypoints']} keypoints a view and {sizes['matches']} true matches in all. A match is right "
            f"within {NEAR:g} pixels of the true homography. Matching score: right matches over keypoints of the first "
            "image."
        ),
        "stereo": (
            "Middlebury 2014, Motorcycle, as scikit-image ships it: each quarter of the left image with the same "
            f"quarter of the right one, {sizes['keypoints']} keypoints a quarter and {sizes['matches']} true matches. "
            f"A match is right within {NEAR:g} pixels of the measured disparity; keypoints without one, or hidden "
            "from the right camera, are not counted. There is no homography to estimate."
        ),
    }[kind]
    return Table(
        caption=f"Matching on {SETS[kind]}",
        header=("Method", "precision", "recall", "F1", "matching score"),
        note=over + known,
        **_rows(result, lambda unit: [unit[kind][what] for what in ("precision", "recall", "f1", "score")]),
    )


def _picture(shown: dict[str, Any], index: int) -> Figure:
    images = [_decoded(text) for text in shown["images"]]
    height, width = images[0].shape
    both = np.concatenate(images, 1)
    counts = {}
    with drawing(f"matching-{index}", 7.8, 7.8 * height / width / 4 + 0.35) as (canvas, out):
        axes = canvas.subplots(1, 2)
        for place, (name, label) in zip(
            axes, ((RIVAL, "ratio test"), (MINE, "trained matcher")), strict=True
        ):
            place.imshow(both, cmap="gray", vmin=0, vmax=255, interpolation="none")
            place.set_axis_off()
            lines = np.asarray(shown["lines"][name]).reshape(-1, 5)
            ends = lines[:, :4].reshape(-1, 2, 2) + np.array([[0, 0], [width, 0]])
            good = lines[:, 4] > 0
            counts[label] = int(good.sum()), int((~good).sum())
            place.add_collection(
                LineCollection(list(ends[good]), colors=COLOURS[2], linewidths=0.7, linestyles="solid")
            )
            place.add_collection(
                LineCollection(list(ends[~good]), colors=COLOURS[1], linewidths=1.3, linestyles=(0, (3, 2)))
            )
            place.set_title(f"{label}: {counts[label][0]} right, {counts[label][1]} wrong")
    told = "; ".join(f"{label} {ok} right and {bad} wrong" for label, (ok, bad) in counts.items())
    return Figure(
        out[-1],
        f"{shown['name'].capitalize()}: right matches are solid green lines, wrong ones dashed and orange; "
        f"{shown['matches']} true matches. Left the ratio test, right the matcher trained through transport on the "
        "first seed.",
        f"Two image pairs with lines between matched keypoints: {told}.",
    )


def _curves(result: dict[str, Any]) -> Figure:
    with drawing("matching-curves", 7.8, 2.9) as (canvas, out):
        axes = canvas.subplots(1, 2)
        for what, label, place in zip(
            ("loss", "validation"), ("training loss", "validation F1"), axes, strict=True
        ):
            for (name, units), colour, style in zip(
                result["trained"].items(), COLOURS, ("-", "--", ":", "-."), strict=False
            ):
                values = np.asarray([[point[what] for point in unit["history"]] for unit in units])
                steps = np.arange(1, values.shape[1] + 1) * result["plan"]["training"]["steps"]
                place.plot(
                    steps,
                    values.mean(0),
                    color=colour,
                    linestyle=style,
                    linewidth=2.2 if name == MINE else 1.4,
                    label=VARIANTS[name].label,
                )
            place.set_xlabel("steps")
            place.set_ylabel(label)
            place.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    last = {
        name: fmean(unit["history"][-1]["validation"] for unit in units)
        for name, units in result["trained"].items()
    }
    return Figure(
        out[-1],
        "Loss of each epoch's training pairs (that of the dual softmax is another quantity), and F1 on validation "
        "pairs at the threshold best for them" + (", means over seeds." if len(result["seeds"]) > 1 else "."),
        "Two line charts by training step. Validation F1 at the end: "
        + ", ".join(f"{VARIANTS[name].label} {value:.3f}" for name, value in last.items())
        + ".",
    )


def _settings(result: dict[str, Any]) -> list[Block]:
    plan = result["plan"]
    used, (width, layers, heads) = plan["training"], plan["shape"]
    steps = used["epochs"] * used["steps"]
    rows = [
        (
            label,
            result["unlearned"][name]["setting"] or "–",
            _least(result["unlearned"][name]["threshold"]),
            "–",
            "–",
        )
        for name, label in UNLEARNED.items()
    ]
    for name, units in result["trained"].items():
        rows.append(
            (
                f"trained, {VARIANTS[name].label}",
                f"learning rate {used['rate']:g}",
                spread([unit["threshold"] for unit in units]),
                f"{max(unit['row_error'] for unit in units):.1g}",
                f"{fmean(unit['seconds'] for unit in units):.0f}",
            )
        )
    left_out = [VARIANTS[name].label for name in VARIANTS if name not in result["trained"]]
    return [
        Paragraph(
            f"Views of {SIZE[1]} x {SIZE[0]} pixels are cut from photographs by random homographies, and get uneven "
            "light, contrast, gamma, blur and noise. Keypoints and descriptors are scikit-image's SIFT, its histograms "
            f"under a square root for every method, at most {plan['limit'][0]} keypoints in training and "
            f"{plan['limit'][1]} in validation and testing. True matches are mutually nearest under the true "
            f"homography and within {NEAR:g} pixels; keypoints with nothing within {FAR:g} pixels belong to the "
            f"dustbin. Photographs that train: {join(PHOTOGRAPHS['train'])}, {plan['views']} views each, all pairs of "
            f"which may be drawn; that validate: {join(PHOTOGRAPHS['validation'])}. They lie in the installed packages "
            "scikit-image and scikit-learn; nothing is downloaded."
        ),
        Paragraph(
            f"The matcher: {layers} layers of attention between and within the images, width {width}, {heads} heads, "
            "learned dustbin scores. Its scores start as the descriptors' similarity; its states see geometry and how "
            f"clear that similarity is, not the descriptors. AdamW, {steps} steps of {used['pairs']} pairs, cosine "
            "decay, the same first weights and pairs for every way from scores to a plan. Learning rate, settings and "
            "thresholds were chosen on validation photographs by F1 (trained matchers' learning rate: the experiment "
            "matching-search)." + (f" Not trained in this preset: {join(left_out)}." if left_out else "")
        ),
        Table(
            caption="Settings, and how far a keypoint's mass is from 1 in test pairs",
            header=("Method", "setting", "least confidence", "largest row error", "seconds"),
            rows=tuple(rows),
            note="Of the ratio test, confidence is 1 minus the ratio of the distances to the nearest and the second "
            "nearest descriptor. Seconds: training, validation and test of one seed.",
        ),
    ]


def _least(threshold: float) -> str:
    return f"{threshold:.2f}" if threshold >= 0 else "–"


def headline(result: dict[str, Any]) -> Headline:
    """F1 on photographs, beside the ratio test's."""
    mine, rival = _values(result, MINE, "photographs", "f1"), result["unlearned"][RIVAL]["photographs"]["f1"]
    return Headline(
        f"F1 of the matcher trained through transport, {SETS['photographs']}",
        spread(mine, 3),
        "",
        standing(mine, [rival] * len(mine), f"the {UNLEARNED[RIVAL]}"),
    )


EXPERIMENT = Experiment(
    name="matching",
    title="Keypoints of photographs, matched by a network that learns through transport with dustbins",
    source="Sarlin et al., SuperGlue, CVPR 2020, with LightGlue (Lindenberger et al., ICCV 2023) and LoFTR's dual "
    "softmax (Sun et al., CVPR 2021)",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.2, "quick": 0.9, "full": 35},
)
