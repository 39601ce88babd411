"""Applications 2 and 3 of the SOFT paper: beam search inside training, and top-k attention, on names of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from couplings_experiments.data.numbers import LONGEST, Corpus, corpus
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, MAP, drawing
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread, standing
from couplings_experiments.translation_training import (
    BEAM,
    BEAM_EPSILON,
    NETWORKS,
    PLANS,
    RHO,
    ROWS,
    TOPK,
    TOPK_EPSILON,
    Plan,
    attention,
    build,
    fit,
    phases,
    score,
    translations,
)

TESTS = {"unseen": "unseen numbers", "longer": "longer numbers"}
MEASURES = {"bleu": ("BLEU", 1), "chrf": ("chrF", 1), "exact": ("exact, %", 100)}
# what the paper reports for the two ideas: BLEU without and with
PAPER = {"beam": ("WMT14 En-Fr", 35.38, 36.27), "topk": ("WMT16 En-De", 36.54, 37.30)}
# rows that differ in one idea only: without, with
PAIRS = {
    "beam": (("lstm", "lstm-beam"), ("lstm-topk", "lstm-topk-beam")),
    "topk": (("lstm", "lstm-topk"), ("transformer", "transformer-topk")),
}
IDEAS = {
    "beam": "the soft beam in the second phase, instead of as many more steps of teacher forcing",
    "topk": "top-k attention instead of attention to all words",
}
_CELLS = {
    "lstm": "35.38 (En-Fr), 36.54 (En-De)",
    "lstm-beam": "36.27 (En-Fr)",
    "lstm-topk": "37.30 (En-De)",
}


def run(context: Context) -> dict[str, Any]:
    """Train and test every row on every seed."""
    plan, language = PLANS[context.request.preset], context.request.language
    seeds = range(context.request.seeds or plan.seeds)
    networks = list(dict.fromkeys(ROWS[name].network for name in plan.rows))
    steps = plan.first * sum(NETWORKS[name].weight for name in networks)
    steps += plan.second * sum(ROWS[name].weight for name in plan.rows)
    first: dict[str, list[dict[str, Any]]] = {name: [] for name in networks}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.rows}
    data = corpus(language, plan.train, plan.held, 0)  # before anything else: complains about the language
    context.progress.expect(len(seeds) * steps)
    for seed in seeds:
        data = corpus(language, plan.train, plan.held, seed)
        for name in networks:
            first[name].append(_first(context, data, plan, name, seed))
        for name in plan.rows:
            rows[name].append(_second(context, data, plan, name, seed))
    return {
        "preset": context.request.preset,
        "language": language,
        "seeds": list(seeds),
        "plan": asdict(plan),
        "words": {"source": len(data.source), "target": len(data.target)},
        "example": {"source": data.unseen[0].source, "target": data.unseen[0].target},
        "first": {name: [_without_maps(unit) for unit in units] for name, units in first.items()},
        "rows": {name: [_without_maps(unit) for unit in units] for name, units in rows.items()},
        "maps": {name: units[0]["map"] for name, units in rows.items() if "map" in units[0]},
    }


def _without_maps(unit: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in unit.items() if name != "map"}


def _first(context: Context, data: Corpus, plan: Plan, network: str, seed: int) -> dict[str, Any]:
    """Teacher forcing alone; the weights stay in the unit's directory."""
    weight = NETWORKS[network].weight
    title = f"{NETWORKS[network].label}, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        model = build(network, data, plan, seed).to(context.device)
        row = next(row for row in ROWS.values() if row.network == network)
        history = fit(
            model,
            phases(row, plan)[0],
            data,
            plan,
            seed,
            directory,
            identity=network,
            after_epoch=lambda done: context.progress.advance(done * weight, title),
            say=context.progress.say,
        )
        return {"history": history}

    return context.unit(f"first-{network}-{seed}", weight * plan.first, compute)


def _second(context: Context, data: Corpus, plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """The second phase, from the weights of the first; tested once."""
    row = ROWS[name]
    title = f"{row.label}, second phase, seed {seed}"

    def compute(directory: Path) -> dict[str, Any]:
        model = build(row.network, data, plan, seed).to(context.device)
        before, after = phases(row, plan)
        kept = context.directory / f"first-{row.network}-{seed}"
        fit(model, before, data, plan, seed, kept, identity=row.network, say=context.progress.say)
        history = fit(
            model,
            after,
            data,
            plan,
            seed,
            directory,
            identity=name,
            after_epoch=lambda done: context.progress.advance(done * row.weight, title),
            say=context.progress.say,
        )
        result: dict[str, Any] = {"history": history}
        for test in TESTS:
            pairs = getattr(data, test)
            result[test] = score(translations(model, data, pairs), pairs)
        if seed == 0 and not row.beam:
            # the first longer number: the same for every row
            pair = data.longer[0]
            words = translations(model, data, [pair])[0]
            result["map"] = {
                "source": [*pair.source, "<end>"],
                "target": [*words, "<end>"],
                "right": words == pair.target,
                "weights": attention(model, data, pair.source, words),
            }
        return result

    result = context.unit(f"second-{name}-{seed}", row.weight * plan.second, compute)
    context.progress.say(
        f"{row.label}, seed {seed}: "
        + "; ".join(
            f"{label} BLEU {result[test]['bleu']:.1f}, chrF {result[test]['chrf']:.1f}, "
            f"exact {100 * result[test]['exact']:.1f} %"
            for test, label in TESTS.items()
        )
        + f"  ({result['seconds']:.1f} s)"
    )
    return result


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """Whether the two ideas help, the tables, the attention, the curves, the settings."""
    return [
        *(Paragraph(_verdict(result, idea), lead=True) for idea in PAIRS),
        *(_table(result, test) for test in TESTS),
        _differences(result),
        Heading("What is attended to"),
        _maps(result),
        Heading("Learning curves"),
        _curves(result),
        Heading("Settings"),
        *_settings(result),
    ]


def _values(result: dict[str, Any], name: str, test: str, measure: str) -> list[float]:
    return [MEASURES[measure][1] * unit[test][measure] for unit in result["rows"][name]]


def _pairs(result: dict[str, Any], idea: str) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS[idea] if all(name in result["rows"] for name in pair)]


def _gaps(result: dict[str, Any], pair: tuple[str, str], test: str, measure: str) -> list[float]:
    without, with_ = pair
    return paired(_values(result, with_, test, measure), _values(result, without, test, measure))


def _verdict(result: dict[str, Any], idea: str) -> str:
    """Whether it helps, every word of which depends on the numbers."""
    seeds, pairs = len(result["seeds"]), _pairs(result, idea)
    name = {"beam": "soft beam", "topk": "top-k attention"}[idea]
    if not pairs:
        return f"Whether {name} helps was not tried in this preset."
    start = f"Whether {name} helps on this data is not decided"
    counted = ""
    if seeds >= 3:
        found: dict[str, list[str]] = {}
        for pair in pairs:
            found.setdefault(_effect(result, pair), []).append(ROWS[pair[0]].label)
        effects = [f"{effect} for {join(labels)}" for effect, labels in found.items()]
        start = f"On this data {name} {join(effects)}"
        counts = [
            f"{signs.count(1)} are clearly better and {signs.count(-1)} clearly worse for {ROWS[pair[0]].label}"
            for pair in pairs
            for signs in [_signs(result, pair)]
        ]
        counted = (
            f" Of four comparisons each (BLEU and exact match, unseen and longer numbers) {join(counts)}. Clear "
            "is a mean over seeds beyond two standard errors, which with few seeds happens by chance, too."
        )
    changes = [
        "BLEU on "
        + TESTS[test]
        + " changes by "
        + join([f"{_signed(_gaps(result, pair, test, 'bleu'))} ({ROWS[pair[0]].label})" for pair in pairs])
        for test in TESTS
    ]
    place, before, after = PAPER[idea]
    return (
        f"{start}: with {IDEAS[idea]}, {join(changes)}, {seeds_in_words(seeds)}; the paper has {after - before:+.2f} "
        f"on {place} ({before:.2f} to {after:.2f}).{caution(seeds)}{counted}"
    )


def _signs(result: dict[str, Any], pair: tuple[str, str]) -> list[int]:
    return [clear(_gaps(result, pair, test, measure)) for test in TESTS for measure in ("bleu", "exact")]


def _effect(result: dict[str, Any], pair: tuple[str, str]) -> str:
    """What can be said from four comparisons: one that is clear alone may be chance."""
    signs = _signs(result, pair)
    better, worse = signs.count(1), signs.count(-1)
    if better and worse:
        return "helps in part and harms in part"
    if max(better, worse) < 2:
        return "makes no clear difference (a null result)"
    return "helps" if better else "harms"


def _signed(values: Sequence[float]) -> str:
    mean = f"{fmean(values):+.1f}"
    return "0.0" if mean in ("+0.0", "-0.0") else mean.replace("-", "−")


def _table(result: dict[str, Any], test: str) -> Table:
    rows = tuple(
        (
            ROWS[name].label,
            *(spread(_values(result, name, test, measure), 1) for measure in MEASURES),
            _CELLS.get(name, "–"),
        )
        for name in result["rows"]
    )
    plan, seeds = result["plan"], len(result["seeds"])
    over = f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed, no spread."
    what = {
        "unseen": f"{plan['held']} numbers whose English names have at most {LONGEST} words, as those that train",
        "longer": f"{plan['held']} numbers whose English names have more than {LONGEST} words, none of which trains",
    }[test]
    how = (
        f" Every row decodes with an ordinary beam of {BEAM}. BLEU and chrF by sacrebleu on words joined by spaces. "
        "The paper's figures, WMT14 En-Fr for the soft beam and WMT16 En-De for top-k attention, are for other data "
        "and larger models: compare differences, not values."
    )
    how = how if test == "unseen" else ""
    return Table(
        caption=f"English to {result['language']}, {TESTS[test]}",
        header=("Model", *(label for label, _ in MEASURES.values()), "paper, BLEU"),
        rows=rows,
        note=f"{over} {what[0].upper() + what[1:]}; the same for all seeds and used once per trained model.{how}",
    )


def _differences(result: dict[str, Any]) -> Table:
    rows = []
    for idea in PAIRS:
        place, before, after = PAPER[idea]
        for pair in _pairs(result, idea):
            cells = [
                spread(_gaps(result, pair, test, measure), 1)
                for test in TESTS
                for measure in ("bleu", "exact")
            ]
            cells = [cell if cell.startswith("-") else f"+{cell}" for cell in cells]
            rows.append(
                (
                    f"{ROWS[pair[1]].label} against {ROWS[pair[0]].label}",
                    *(cell.replace("-", "−") for cell in cells),
                    f"{after - before:+.2f} ({place}: {before:.2f} to {after:.2f})",
                )
            )
    return Table(
        caption="What each idea changes, paired by seed",
        header=(
            "With against without",
            *(f"{label}, {what}" for label in TESTS.values() for what in ("BLEU", "exact, points")),
            "paper, BLEU",
        ),
        rows=tuple(rows),
        note="Both have the same numbers, first weights, batches and number of steps.",
    )


def _maps(result: dict[str, Any]) -> Figure:
    shown = result["maps"]
    tallest = max(len(entry["target"]) for entry in shown.values())
    lines = (len(shown) + 1) // 2
    held = []
    with drawing("translation-maps", 7.8, lines * (0.19 * tallest + 1.3)) as (canvas, out):
        axes = canvas.subplots(lines, 2, squeeze=False)
        for place in axes.flat[len(shown) :]:
            place.set_axis_off()
        for place, (name, entry) in zip(axes.flat, shown.items(), strict=False):
            weights = np.asarray(entry["weights"])
            place.imshow(weights, cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="none")
            place.set_xticks(range(len(entry["source"])), entry["source"], rotation=90, fontsize=7)
            place.set_yticks(range(len(entry["target"])), entry["target"], fontsize=7)
            place.set_title(ROWS[name].label)
            best = np.sort(weights, 1)[:, ::-1][:, :TOPK].sum(1).mean()
            held.append(f"{ROWS[name].label} {100 * best:.1f} % ({'right' if entry['right'] else 'wrong'})")
    return Figure(
        out[-1],
        f"Attention of every word of the translation (rows) to the English words (columns), from 0 dark to 1 bright, "
        f"for one longer number and the first seed; of the transformers, the mean over heads of the last layer. Share "
        f"of the weight on the {TOPK} most attended words, and whether the translation is right: {', '.join(held)}.",
        f"{len(shown)} maps of attention between an English number name and its translation.",
    )


def _curves(result: dict[str, Any]) -> Figure:
    plan = result["plan"]
    final = {}
    with drawing("translation-curves", 7.8, 3.0) as (canvas, out):
        kinds = list(dict.fromkeys(name.partition("-")[0] for name in result["rows"]))
        axes = canvas.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for place, kind in zip(axes, kinds, strict=True):
            names = [name for name in result["rows"] if name.partition("-")[0] == kind]
            for name, colour, style in zip(names, COLOURS, ("-", "--", ":", "-."), strict=False):
                histories = [
                    first["history"] + second["history"]
                    for first, second in zip(
                        result["first"][ROWS[name].network], result["rows"][name], strict=True
                    )
                ]
                values = 100 * np.asarray([[point["validation"] for point in h] for h in histories]).mean(0)
                final[name] = values[-1]
                epochs = range(1, len(values) + 1)
                place.plot(epochs, values, color=colour, linestyle=style, label=ROWS[name].label)
            place.axvline(plan["first"] + 0.5, color=FAINT, linewidth=0.8)
            place.set_xlabel("epoch")
            place.xaxis.get_major_locator().set_params(integer=True)
            place.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
            place.legend(fontsize=8)
        axes[0].set_ylabel("validation, exact, %")
    return Figure(
        out[-1],
        "Share of validation numbers translated without a mistake by greedy decoding after every epoch"
        + (", mean over seeds" if len(result["seeds"]) > 1 else "")
        + ". The vertical line is where the second phase begins.",
        "Line charts by epoch. At the end: "
        + ", ".join(f"{ROWS[name].label} {value:.1f} %" for name, value in final.items())
        + ".",
    )


def _settings(result: dict[str, Any]) -> list[Block]:
    plan, example = result["plan"], result["example"]
    rows = tuple(
        (
            ROWS[name].label,
            f"{NETWORKS[ROWS[name].network].rate:g}",
            "mixture" if ROWS[name].beam else "teacher forcing",
            f"{fmean(unit['seconds'] for unit in result['first'][ROWS[name].network]):.0f}",
            f"{fmean(unit['seconds'] for unit in result['rows'][name]):.0f}",
        )
        for name in result["rows"]
    )
    left_out = [ROWS[name].label for name in ROWS if name not in result["rows"]]
    return [
        Paragraph(
            f"Names of numbers below a billion by num2words, in words split at spaces and hyphens: "
            f"“{' '.join(example['source'])}” is “{' '.join(example['target'])}”. {plan['train']} numbers train and "
            f"{plan['held']} validate, all of at most {LONGEST} English words; {result['words']['source']} English "
            f"and {result['words']['target']} other words, three of each being marks. Seeds change the numbers that "
            "train, the first weights and the batches."
        ),
        Paragraph(
            f"LSTM: bidirectional encoder, additive attention (Bahdanau et al. 2015); transformer: two layers, four "
            f"heads; width {plan['width']}. {plan['first']} epochs of teacher forcing, then {plan['second']} more "
            f"from the same weights with Adam anew at {plan['slower']:g} of the rate: of teacher forcing again, or of "
            f"{RHO:g} teacher forcing + {1 - RHO:.1f} soft beam (beam {BEAM}, epsilon {BEAM_EPSILON:g} in standardised "
            f"units), in as many steps. Batches of {plan['batch']}. Top-k attention: k = {TOPK}, epsilon "
            f"{TOPK_EPSILON:g}, in every attention of the network. Both were chosen for the LSTM "
            "on the validation numbers, with a seed that is not among these, from k = 2, 3, 5 at epsilon 0.1 and k = 3 "
            "at 0.5; soft beams of epsilon 0.1 and 0.5 did not differ there. Rates and lengths of training were set "
            "by hand." + (f" Not trained in this preset: {join(left_out)}." if left_out else "")
        ),
        Table(
            caption="Training",
            header=(
                "Model",
                "rate",
                "second phase",
                "seconds, first phase",
                "seconds, second phase and tests",
            ),
            rows=rows,
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """The first idea that was tried, beside the same model without it; a model alone where none was."""
    tried = [(idea, pair) for idea in PAIRS for pair in _pairs(result, idea)]
    if not tried:
        row = next(iter(result["rows"]))
        bleu = spread(_values(result, row, "unseen", "bleu"), 1)
        return Headline(
            f"BLEU on {TESTS['unseen']}, {ROWS[row].label}", bleu, "–", "nothing to compare it with"
        )
    idea, (without, with_) = tried[0]
    place, _, after = PAPER[idea]
    mine = _values(result, with_, "unseen", "bleu")
    return Headline(
        f"BLEU on {TESTS['unseen']}, {ROWS[with_].label}",
        spread(mine, 1),
        f"{after:.2f} ({place})",
        standing(mine, _values(result, without, "unseen", "bleu"), f"the {ROWS[without].label}", digits=1),
    )


EXPERIMENT = Experiment(
    name="translation",
    title="Translating names of numbers: beam search inside training, and top-k attention",
    source="Xie et al., Differentiable Top-k with Optimal Transport, NeurIPS 2020, sections 5 and 6",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.1, "quick": 1, "full": 16},
)
