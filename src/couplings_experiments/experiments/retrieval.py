"""Retrieval: which text belongs to a question, by word against word, by one vector each, and by counting words."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from couplings_experiments import environment, retrieval_index
from couplings_experiments.data.docstrings import Entry, words
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph, Table
from couplings_experiments.report.figures import COLOURS, FAINT, MAP, drawing
from couplings_experiments.report.words import caution, clear, join, paired, seeds_in_words, spread, standing
from couplings_experiments.retrieval_methods import (
    CUT,
    MEASURES,
    Array,
    all_scores,
    bm25,
    encode,
    interval,
    measure,
    ranks,
    reciprocal,
)
from couplings_experiments.retrieval_model import Encoder
from couplings_experiments.retrieval_training import PLANS, QUESTION, VARIANTS, Corpus, Plan, corpus, train

MINE, TWIN, COUNTED = "maxsim", "single", "bm25"
_TRIED = [(k1, b) for k1 in (0.9, 1.5, 3.0) for b in (0.4, 0.75)]
_SHARES = (1 / 3, 2 / 3)  # of a question's words that stand in its text: few, some, most
_LENGTHS = (50, 150)  # words of a text: short ones have fewer, long ones more
_EXAMPLES = 4
MRR = f"MRR@{CUT}"


def run(context: Context) -> dict[str, Any]:
    """Train every variant, count words, and rank the texts of held-out modules."""
    plan = PLANS[context.request.preset]
    seeds = range(context.request.seeds or plan.seeds)
    steps = plan.training.epochs * sum(VARIANTS[name].weight for name in plan.variants)
    context.progress.expect(1 + len(seeds) * steps)
    counted = context.unit("counted", 1, lambda directory: _counted(context, plan))
    context.progress.say(
        f"{counted['sizes']['test']['texts']} texts of {counted['sizes']['test']['modules']} held-out modules; "
        + ", ".join(
            f"{found['label']} {measure(_array(found))[MRR]:.3f}" for found in counted["methods"].values()
        )
    )
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.variants}
    for seed in seeds:
        for name in plan.variants:
            trained[name].append(_unit(context, plan, name, seed, counted))
    return {
        "preset": context.request.preset,
        "seeds": list(seeds),
        "plan": asdict(plan),
        "versions": {name: environment.version(_DISTRIBUTIONS.get(name, name)) for name in plan.packages},
        **counted,
        "trained": {
            name: [{k: v for k, v in unit.items() if k != "pictured"} for unit in units]
            for name, units in trained.items()
        },
        "examples": _examples(plan, counted, trained),
        "pictured": next(u["pictured"] for us in trained.values() for u in us if "pictured" in u),
    }


_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def _array(found: dict[str, Any]) -> Array:
    return np.asarray(found["ranks"], dtype=float)


def _counted(context: Context, plan: Plan) -> dict[str, Any]:
    """BM25 with the setting that is best on validation; and what there is to be found."""
    data = corpus(plan.packages, plan.training.limit)
    parts = data.parts
    methods = {}
    for key, limit, label in (
        (COUNTED, None, "BM25"),
        (f"{COUNTED}-limited", plan.training.limit[1], f"BM25, first {plan.training.limit[1]} words"),
    ):
        scores = [
            float(reciprocal(ranks(bm25(parts["validation"], limit, k1, b))).mean()) for k1, b in _TRIED
        ]
        k1, b = _TRIED[int(np.argmax(scores))]
        methods[key] = {
            "label": label,
            "setting": f"k1 = {k1:g}, b = {b:g}",
            "validation": max(scores),
            "ranks": ranks(bm25(parts["test"], limit, k1, b)).tolist(),
        }
    context.progress.advance(1, "BM25")
    return {"methods": methods, "sizes": _sizes(data), "groups": _groups(data)}


def _sizes(data: Corpus) -> dict[str, Any]:
    return {
        name: {
            "texts": len(found),
            "modules": len({entry.module for entry in found}),
            "question": fmean(len(words(entry.query)) for entry in found),
            "text": fmean(len(words(entry.body)) for entry in found),
            "largest": [module for module, _ in Counter(entry.module for entry in found).most_common(6)],
        }
        for name, found in data.parts.items()
    }


def _groups(data: Corpus) -> dict[str, list[float]]:
    """Of each test question: the share of its words that its text has, how many training never saw, the length."""
    seen = {word for entry in data.parts["train"] for word in words(f"{entry.query} {entry.body}")}
    shares, unseen = [], []
    for entry in data.parts["test"]:
        asked = set(words(entry.query))
        shares.append(len(asked & set(words(entry.body))) / len(asked))
        unseen.append(float(len(asked - seen)))
    lengths = [float(len(words(entry.body))) for entry in data.parts["test"]]
    return {"shares": shares, "unseen": unseen, "lengths": lengths}


def _unit(context: Context, plan: Plan, name: str, seed: int, counted: dict[str, Any]) -> dict[str, Any]:
    """Train one variant and rank the test texts once."""
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
        data = corpus(plan.packages, plan.training.limit)
        found = ranks(all_scores(variant, model, data.lexicon, data.questions["test"], data.texts["test"]))
        result: dict[str, Any] = {"history": history, "ranks": found.tolist()}
        if name == MINE and seed == 0:
            retrieval_index.save(context.kept, model, plan, data)
            chosen = _chosen(data.parts["test"], counted, found)
            result["pictured"] = [
                {
                    **_aligned(model, data, i),
                    "rank": found[i],
                    "counted": counted["methods"][COUNTED]["ranks"][i],
                }
                for i in chosen
            ]
        return result

    result = context.unit(f"{name}-{seed}", plan.training.epochs * variant.weight, compute)
    context.progress.say(f"{title}: {MRR} {measure(_array(result))[MRR]:.3f}  ({result['seconds']:.1f} s)")
    return result


def _chosen(found: list[Entry], counted: dict[str, Any], rank: Array) -> list[int]:
    """Two questions that are answered first although the text has other words, and the worst one against BM25."""
    theirs = np.asarray(counted["methods"][COUNTED]["ranks"])
    shares = np.asarray(counted["groups"]["shares"])
    lengths = np.asarray([len(set(words(entry.query))) for entry in found])
    short = (lengths >= 4) & (lengths <= 9)
    right = np.flatnonzero(short & (rank == 1))
    right = right[np.argsort(-(theirs[right] - 1000 * (shares[right] < 0.2)), kind="stable")][:2]
    wrong = np.flatnonzero(short & (theirs < rank))
    wrong = wrong[np.argsort(theirs[wrong] - rank[wrong], kind="stable")][:1]
    return [int(i) for i in (*right, *wrong)]


def _aligned(model: Encoder, data: Corpus, row: int) -> dict[str, Any]:
    """Similarities of a question's words and the words of its text that one of them is nearest to."""
    entry, at = data.parts["test"][row], torch.tensor([row])
    question, text = data.questions["test"].at(at), data.texts["test"].at(at)
    asked, told = (encode(model, data.lexicon, side)[0].vectors[0].cpu() for side in (question, text))
    grid = asked @ told.mT
    places = grid.argmax(1).unique()
    lexicon = data.lexicon.words
    return {
        "name": entry.name,
        "query": entry.query,
        "asked": [lexicon[i] for i in question.ids[0].tolist()],
        "told": [lexicon[i] for i in text.ids[0, places].tolist()],
        "places": places.tolist(),
        "length": text.ids.shape[1],
        "grid": [[round(value, 3) for value in line] for line in grid[:, places].tolist()],
    }


def _examples(
    plan: Plan, counted: dict[str, Any], trained: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The questions on which the first seed's late interaction and BM25 are farthest apart, by reciprocal rank."""
    found = corpus(plan.packages, plan.training.limit).parts["test"]
    mine, theirs = _array(trained[MINE][0]), _array(counted["methods"][COUNTED])
    gap = 1 / mine - 1 / theirs
    examples = {}
    for key, order in (("won", np.argsort(-gap, kind="stable")), ("lost", np.argsort(gap, kind="stable"))):
        examples[key] = [
            {"query": found[i].query, "name": found[i].name, "mine": mine[i], "theirs": theirs[i]}
            for i in order[:_EXAMPLES].tolist()
        ]
    return examples


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """What it means, the table, where BM25 wins, word against word, the curves, the settings."""
    return [
        *_meaning(result),
        *_tables(result),
        Heading("Where BM25 wins"),
        *_against(result),
        Heading("Which word found which"),
        *(_alignment(shown, index) for index, shown in enumerate(result["pictured"])),
        Heading("Learning curves"),
        _curves(result),
        Heading("Settings"),
        *_settings(result),
    ]


def _values(result: dict[str, Any], name: str, what: str) -> list[float]:
    return [measure(_array(unit))[what] for unit in result["trained"][name]]


def _per_question(result: dict[str, Any], name: str, what: str) -> Array:
    """A measure of each question; of a trained variant the mean over seeds."""
    if name in result["methods"]:
        return MEASURES[what](_array(result["methods"][name]))
    found: Array = np.mean([MEASURES[what](_array(unit)) for unit in result["trained"][name]], 0)
    return found


def _meaning(result: dict[str, Any]) -> list[Block]:
    """Two sentences; every claim is computed."""
    seeds = len(result["seeds"])
    mine, twin = _values(result, MINE, MRR), _values(result, TWIN, MRR)
    gaps = paired(mine, twin)
    low, high = interval(_per_question(result, MINE, MRR) - _per_question(result, TWIN, MRR))
    first = (
        f"On modules that training never saw, late interaction has {MRR} {spread(mine, 3)} and its single-vector twin "
        f"(the same encoder, its vectors averaged) {spread(twin, 3)}, {seeds_in_words(seeds)}; the difference is "
        f"{fmean(gaps):+.3f}, over questions between {low:+.3f} and {high:+.3f} (95 %)."
    )
    if seeds < 3:
        first += caution(seeds)
    else:
        more = sum(gap > 0 for gap in gaps)
        verdict = {1: "clearly higher", 0: "not clearly different", -1: "clearly lower"}[clear(gaps)]
        first += f" By the differences over seeds it is {verdict} ({more} of {seeds} seeds)."
    second = []
    for name, found in result["methods"].items():
        low, high = interval(_per_question(result, MINE, MRR) - _per_question(result, name, MRR))
        verdict = (
            "late interaction is better"
            if low > 0
            else "BM25 is better"
            if high < 0
            else "neither is clearly better"
        )
        second.append(
            f"{found['label']} has {measure(_array(found))[MRR]:.3f}: {verdict} (difference between {low:+.3f} and "
            f"{high:+.3f})"
        )
    text = f"{join(second)}."
    return [Paragraph(first, lead=True), Paragraph(text, lead=True)]


def _tables(result: dict[str, Any]) -> list[Block]:
    rows: list[tuple[str, ...]] = []
    ranges: list[tuple[str, ...]] = []
    strong: list[int] = []
    names = {name: found["label"] for name, found in result["methods"].items()}
    names |= {name: VARIANTS[name].label for name in result["trained"]}
    for name, label in names.items():
        if name in result["trained"]:
            cells = [spread(_values(result, name, what), 3) for what in MEASURES]
        else:
            cells = [f"{value:.3f}" for value in measure(_array(result["methods"][name])).values()]
        ends = [interval(_per_question(result, name, what)) for what in MEASURES]
        if name == MINE:
            strong.append(len(rows))
        rows.append((label, *cells))
        ranges.append((label, *(f"{low:.3f} to {high:.3f}" for low, high in ends)))
    seeds, size = len(result["seeds"]), result["sizes"]["test"]
    return [
        Table(
            caption=f"The right one of {size['texts']} docstrings of {size['modules']} held-out modules",
            header=("Method", *MEASURES),
            rows=tuple(rows),
            note=(
                f"Trained: mean ± standard deviation over {seeds} seeds. "
                if seeds > 1
                else "Trained: one seed. "
            )
            + "The question is the first sentence of a docstring, the text is the rest of it, without that sentence. "
            f"Recall@k: the right text is among the first k; {MRR}: mean of 1 / rank, 0 below rank {CUT}.",
            strong=tuple(strong),
        ),
        Table(
            caption="95 % intervals",
            header=("Method", *MEASURES),
            rows=tuple(ranges),
            note="Of the mean over seeds, when the questions are drawn anew with replacement.",
            strong=tuple(strong),
        ),
    ]


def _against(result: dict[str, Any]) -> list[Block]:
    shares, unseen, lengths = (np.asarray(result["groups"][name]) for name in ("shares", "unseen", "lengths"))
    low, high = _SHARES
    groups = {
        "under a third of the question's words stand in the text": shares < low,
        "a third to two thirds of the question's words do": (shares >= low) & (shares < high),
        "two thirds or more of the question's words do": shares >= high,
        "every word of the question was seen in training": unseen == 0,
        "some word of the question was never seen in training": unseen > 0,
        f"the text has fewer than {_LENGTHS[0]} words": lengths < _LENGTHS[0],
        f"the text has {_LENGTHS[0]} to {_LENGTHS[1]} words": (lengths >= _LENGTHS[0])
        & (lengths <= _LENGTHS[1]),
        f"the text has more than {_LENGTHS[1]} words": lengths > _LENGTHS[1],
    }
    counted = _per_question(result, COUNTED, MRR)
    rows, better = [], []
    for label, members in groups.items():
        if not members.any():
            continue
        mine = _per_question(result, MINE, MRR)
        ends = interval((mine - counted)[members])
        if ends[1] < 0:
            better.append(label)
        rows.append(
            (
                label,
                str(int(members.sum())),
                f"{counted[members].mean():.3f}",
                f"{mine[members].mean():.3f}",
                f"[{ends[0]:+.3f}, {ends[1]:+.3f}]",
                f"{_per_question(result, TWIN, MRR)[members].mean():.3f}",
            )
        )
    mine_ranks = np.mean([_array(unit) for unit in result["trained"][MINE]], 0)
    their_ranks = _array(result["methods"][COUNTED])
    said = (
        f"BM25 ranks the right text higher for {(their_ranks < mine_ranks).mean():.0%} of the questions, late "
        f"interaction for {(mine_ranks < their_ranks).mean():.0%} (mean rank over seeds). "
    )
    everywhere = len(better) == len(rows)
    said += (
        f"By {MRR}, BM25 is clearly better on every kind of question below."
        if everywhere
        else f"By {MRR}, BM25 is clearly better where {join(better)}."
        if better
        else "In none of the groups below is BM25 clearly better."
    )
    examples = [
        Table(
            f"Questions on which {better_one} is farthest ahead",
            ("Question: right answer", "rank by BM25", "rank by late interaction"),
            tuple(
                (f"{shown['query']}: {shown['name']}", f"{shown['theirs']:g}", f"{shown['mine']:g}")
                for shown in result["examples"][key]
            ),
            note="Late interaction: first seed.",
        )
        for key, better_one in (("lost", "BM25"), ("won", "late interaction"))
    ]
    return [
        Paragraph(said),
        Table(
            f"{MRR} by kind of question",
            (
                "Kind of question",
                "questions",
                "BM25",
                "late interaction",
                "difference, 95 %",
                "single vector",
            ),
            tuple(rows),
            note="Difference: late interaction minus BM25, questions drawn anew.",
        ),
        *examples,
    ]


def _alignment(shown: dict[str, Any], index: int) -> Figure:
    grid = np.asarray(shown["grid"])
    count, places = grid.shape
    with drawing(f"retrieval-{index}", 7.8, 1.3 + 0.24 * count) as (canvas, out):
        axes = canvas.subplots()
        edges = np.arange(places + 1) - 0.5, np.arange(count + 1) - 0.5
        mesh = axes.pcolormesh(*edges, grid, cmap=MAP, vmin=min(0.0, float(grid.min())), vmax=1.0)
        best = grid.argmax(1)
        axes.scatter(best, np.arange(count), s=26, facecolor="white", edgecolor="black", linewidth=0.8)
        axes.set_yticks(np.arange(count), shown["asked"])
        labels = [f"{word} ({place + 1})" for word, place in zip(shown["told"], shown["places"], strict=True)]
        axes.set_xticks(np.arange(places), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.invert_yaxis()
        axes.set_xlabel("words of the text (and where they stand in it)")
        axes.set_ylabel("question")
        canvas.colorbar(mesh, ax=axes, label="cosine", fraction=0.05)
    pairs = ", ".join(f"{word}: {shown['told'][i]}" for word, i in zip(shown["asked"], best, strict=True))
    return Figure(
        out[-1],
        f"“{shown['query']}”, answered by {shown['name']}: rank {shown['rank']:g} by late interaction, "
        f"{shown['counted']:g} by BM25. A dot marks the word of the text that a word of the question finds; only "
        f"columns with a dot are drawn, of {shown['length']} words.",
        f"A heat map of similarities between words. Nearest words: {pairs}.",
    )


def _curves(result: dict[str, Any]) -> Figure:
    with drawing("retrieval-curves", 7.8, 2.9) as (canvas, out):
        axes = canvas.subplots(1, 2)
        for what, label, place in zip(
            ("loss", "validation"), ("training loss", f"validation {MRR}"), axes, strict=True
        ):
            for (name, units), colour, style in zip(
                result["trained"].items(), COLOURS, ("-", "--", ":", "-."), strict=False
            ):
                values = np.asarray([[point[what] for point in unit["history"]] for unit in units])
                place.plot(
                    np.arange(1, values.shape[1] + 1),
                    values.mean(0),
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    linewidth=2.2 if name == MINE else 1.4,
                    label=VARIANTS[name].label,
                )
            place.set_xlabel("epoch")
            place.set_ylabel(label)
            place.set_xticks(np.arange(1, values.shape[1] + 1))
            place.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        axes[1].axhline(
            result["methods"][COUNTED]["validation"], color=FAINT, linewidth=1.2, linestyle="--", label="BM25"
        )
        handles, labels = axes[1].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    last = {
        name: fmean(unit["history"][-1]["validation"] for unit in units)
        for name, units in result["trained"].items()
    }
    return Figure(
        out[-1],
        f"Loss of each epoch's training pairs, and {MRR} on the validation modules"
        + (", means over seeds." if len(result["seeds"]) > 1 else "."),
        "Two line charts by epoch. At the end, on validation modules: "
        + ", ".join(f"{VARIANTS[name].label} {value:.3f}" for name, value in last.items())
        + ".",
    )


def _settings(result: dict[str, Any]) -> list[Block]:
    plan, sizes = result["plan"], result["sizes"]
    used, shape = plan["training"], plan["shape"]
    rows = [(found["label"], found["setting"], "–", "–", "–") for found in result["methods"].values()]
    for name, units in result["trained"].items():
        variant = VARIANTS[name]
        known = {
            "smooth": "temperature of the maximum {:g}",
            "retrieved": "{:g} words retrieved in training, {:g} in searching",
        }.get(variant.kind, "–")
        rows.append(
            (
                variant.label,
                known.format(*variant.setting),
                f"{variant.rate:g}",
                f"{variant.temperature:g}",
                f"{fmean(unit['seconds'] for unit in units):.0f}",
            )
        )
    left_out = [VARIANTS[name].label for name in VARIANTS if name not in result["trained"]]
    parts = join(
        [
            f"{sizes[part]['texts']} pairs of {sizes[part]['modules']} modules {verb}"
            for part, verb in (("train", "train"), ("validation", "validate"), ("test", "test"))
        ]
    )
    versions = join([f"{_DISTRIBUTIONS.get(name, name)} {v}" for name, v in result["versions"].items() if v])
    largest = join(sizes["test"]["largest"])
    return [
        Paragraph(
            f"Public functions, classes and methods of {versions}; the source is parsed, not imported. {parts} (two "
            f"names of a module's path, as in scipy.signal, are wholly in one part; the largest test modules are "
            f"{largest}). Texts that share most of their word sequences with an earlier one, questions that "
            "repeat an earlier one, and texts that quote their question are left out."
        ),
        Paragraph(
            f"The encoder, the same for all trained methods: a vector of each word and its letter sequences from a "
            f"hashed table of {shape['buckets']} rows, {shape['layers']} convolutions over three words, width "
            f"{shape['width']}, unit vectors; all from nothing. AdamW, {used['epochs']} epochs of steps of "
            f"{used['pairs']} pairs, cross-entropy both ways within the batch; the first {QUESTION} words of a "
            f"question and {used['limit'][0]} of a text are read in training, {used['limit'][1]} in searching. "
            "Settings were chosen on validation modules; the experiment retrieval-search compares them with others."
            + (f" Not trained in this preset: {join(left_out)}." if left_out else "")
        ),
        Table(
            caption="Settings",
            header=("Method", "setting", "learning rate", "temperature of the loss", "seconds"),
            rows=tuple(rows),
            note="Seconds: training, validation and test of one seed. `couplings search` asks the first seed's late "
            "interaction, over the docstrings of all parts.",
        ),
    ]


def headline(result: dict[str, Any]) -> Headline:
    """Late interaction beside its twin; BM25 in the same sentence, because it may beat both."""
    mine, counted = _values(result, MINE, MRR), result["methods"][COUNTED]
    said = standing(mine, _values(result, TWIN, MRR), "its single-vector twin")
    return Headline(
        f"{MRR} of late interaction (MaxSim)",
        spread(mine, 3),
        "",
        f"{said.rstrip('.')}; {counted['label']} has {measure(_array(counted))[MRR]:.3f}.",
    )


EXPERIMENT = Experiment(
    name="retrieval",
    title="Docstrings found by their summaries: late interaction, one vector each, and BM25",
    source="Khattab and Zaharia, ColBERT, SIGIR 2020, with XTR (Lee et al., NeurIPS 2023) and BM25",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.1, "quick": 1, "full": 60},
)
