"""The site: well-formed, self-contained, accessible, and true to the numbers; and two runs compared."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
from html_pages import Page, check_site

from couplings_experiments.errors import UserError
from couplings_experiments.experiment import discover
from couplings_experiments.experiments import knn
from couplings_experiments.files import write_json
from couplings_experiments.knn_training import ROWS, TRAINED
from couplings_experiments.report import compare as compare_module
from couplings_experiments.report.blocks import Table
from couplings_experiments.report.compare import compare, write_comparison
from couplings_experiments.report.page import FORMAT, pages, read_results
from couplings_experiments.report.words import duration, standing


def fake_knn(seeds=3):
    history = [
        [{"epoch": e + 1, "loss": 1 / (e + 1), "validation": 0.9 + 0.02 * e} for e in range(4)]
    ] * seeds
    accuracy = {row.key: [0.97 + 0.001 * s for s in range(seeds)] for row in ROWS}
    accuracy["soft"] = [0.98 + 0.0011 * s for s in range(seeds)]
    accuracy["cross-entropy"] = [0.99 + 0.001 * s for s in range(seeds)]
    points = [[float(i % 7), float(i // 7)] for i in range(40)]
    return {
        "dataset": "digits",
        "preset": "full",
        "neighbours": 9,
        "seeds": list(range(seeds)),
        "sizes": {"train": 899, "validation": 359, "test": 539},
        "optimisation": {
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "epochs": 4,
            "queries": 100,
            "templates": 100,
        },
        "choices": {name: {"learning_rate": 0.01, "epsilon": None} for name in TRAINED},
        "accuracy": accuracy,
        "history": dict.fromkeys(TRAINED, history),
        "seconds": {row.unit: [1.0] * seeds for row in ROWS},
        "map": {"labels": [i % 10 for i in range(40)], "pixels": points, "soft": points},
    }


def fake_surroundings():
    return {
        "format": FORMAT,
        "version": "0.1.0",
        "request": {"preset": "full", "dataset": "digits", "device": "cpu"},
        "command": "couplings reproduce --preset <full>",
        "finished": "today",
        "elapsed_seconds": 200.0,
        "seconds": {"knn": 190.0},
        "environment": {"torch": "2.13", "Processor": "<b>a & b</b>"},
    }


def fake_results(seeds=3):
    pictures = discover()["topk-pictures"]

    class Silent:
        def expect(self, steps):
            pass

        def advance(self, steps, what):
            pass

    class Context:
        progress = Silent()

    return {
        **fake_surroundings(),
        "experiments": {"knn": fake_knn(seeds), "topk-pictures": pictures.run(Context())},
    }


@pytest.fixture(scope="module")
def results():
    return fake_results()


@pytest.fixture(scope="module")
def site(results):
    return pages(results)


@pytest.fixture(scope="module")
def knn_page(site):
    return Page(site["knn.html"])


def test_a_page_for_each_experiment_and_an_index_all_of_them_sound(site):
    assert list(site) == ["knn.html", "topk-pictures.html", "index.html"]
    check_site(site)


def test_the_index_has_the_main_figure_beside_the_paper_s(site):
    index = Page(site["index.html"])
    text = " ".join(index.text)
    assert "98.11 ± 0.11" in text
    assert "99.4 (MNIST), 92.6 (CIFAR-10)" in text
    assert "1.01 points above plain k-NN; clear over 3 seeds." in text
    assert "3 min 10 s" in text
    assert "not recorded" in text  # the other experiment's time
    assert "couplings reproduce --preset <full>" in text
    linked = [given["href"] for given in index.every("a")]
    assert linked == ["#main", "knn.html", "topk-pictures.html"]


def test_pages_lead_to_their_neighbours(site):
    ways = [
        {given.get("rel", "up"): given["href"] for given in Page(site[name]).every("a")[1:]}
        for name in ("knn.html", "topk-pictures.html")
    ]
    assert ways == [
        {"up": "index.html", "next": "topk-pictures.html"},
        {"up": "index.html", "prev": "knn.html"},
    ]


def test_a_page_says_what_it_means_before_the_numbers_and_how_after_them(knn_page):
    text = " ".join(knn_page.text)
    headings = ["What it means", "Results", "Learning curves", "What the features look like", "Settings"]
    places = [text.index(f" {heading} ") for heading in [*headings, "Environment"]]
    assert places == sorted(places)


def test_text_is_escaped(site):
    for html in site.values():
        assert "<b>a & b</b>" not in html
        assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in html


def test_follows_the_reader_s_colours_and_prints(site):
    for html in site.values():
        assert "prefers-color-scheme: dark" in html
        assert "@media print" in html
        assert "#010203" not in html
        assert len(html) < 3_000_000
    assert "currentColor" in site["knn.html"]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_stands_out_in_light_and_dark(site):
    """WCAG 2.1, success criterion 1.4.3."""
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", site["index.html"])[:2]
    ]
    for colours in schemes:
        for ink, ground in itertools.product(("ink", "soft", "accent", "warn"), ("page", "strong")):
            low, high = sorted(luminance(colours[name]) for name in (ink, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def test_the_table_has_the_paper_s_figures_beside_ours(knn_page):
    text = " ".join(knn_page.text)
    for row in ROWS:
        assert row.label in text
        assert f"{row.mnist:.1f}" in text
        assert f"{row.cifar10:.1f}" in text
    assert "98.11 ± 0.11" in text
    assert "3 min 20 s" in text


def test_the_sentences_follow_the_numbers():
    result = fake_knn()
    (said,) = knn._meaning(result)
    assert "1.01 points more than kNN (more in 3 of 3 seeds)" in said.text
    assert "clearly behind CE + CNN" in said.text
    assert "clearly ahead of kNN + autoencoder" in said.text
    result["accuracy"]["soft"] = [value - 0.02 for value in result["accuracy"]["knn"]]
    (said,) = knn._meaning(result)
    assert "2.00 points fewer than kNN (more in 0 of 3 seeds)" in said.text
    result["accuracy"]["soft"] = list(result["accuracy"]["knn"])
    (said,) = knn._meaning(result)
    assert "as many as kNN" in said.text
    assert "not distinguishable from" in said.text


def test_one_seed_makes_no_comparison():
    (said,) = knn._meaning(fake_knn(1))
    assert "one seed decides nothing" in said.text
    assert not re.search("ahead|behind", said.text)


def test_the_data_of_a_report_is_json():
    json.dumps(fake_knn(), allow_nan=False)


def test_durations_are_for_people():
    assert [duration(s) for s in (8.2, 200, 3720)] == ["8 s", "3 min 20 s", "1 h 02 min"]


def test_a_gap_says_whether_seeds_can_tell():
    ours, theirs = [0.98, 0.985, 0.99], [0.97, 0.975, 0.98]
    points = {"digits": 2, "factor": 100, "unit": " points"}
    assert standing(ours, theirs, "kNN", **points) == "1.00 points above kNN; clear over 3 seeds."
    assert standing([0.98, 0.96, 0.99], theirs, "kNN").endswith("; not clear over 3 seeds.")
    assert standing(theirs[:1], ours[:1], "kNN") == "0.010 below kNN; one seed decides nothing."
    assert standing(ours[:2], ours[:2], "kNN") == "Level with kNN; two seeds decide nothing."


# ----------------------------------------------------------------------------------------------------- two runs


@pytest.fixture
def two(tmp_path):
    """Two directories with ``results``, those of the second one changed."""

    def write(results, edit=lambda other: None):
        other = copy.deepcopy(results)
        edit(other)
        for name, content in (("a", results), ("b", other)):
            (tmp_path / name).mkdir()
            write_json(tmp_path / name / "results.json", content)
        return tmp_path / "a", tmp_path / "b"

    return write


@pytest.fixture
def searched():
    """Results that take no time to show: tables and no figures."""
    choice = {"learning_rate": 0.1, "epsilon": None}
    trials = {
        name: [{"choice": choice, "validation": 0.9 + 0.01 * i} for i in range(3)]
        for name in ("soft", "neuralsort")
    }
    found = {"trials": trials, "epochs": 2, "dataset": "digits"}
    return {
        **fake_surroundings(),
        "experiments": {
            "knn-search": found,
            "matching-search": {"trials": {"transport": [0.5] * 3}, "steps": 9},
        },
    }


def test_a_run_does_not_differ_from_itself(two, searched):
    found = compare(*two(searched))
    assert found.summary == "No difference in 24 figures of 2 experiments."
    assert found.warnings == found.surroundings == ()
    assert not any(experiment.settings for experiment in found.experiments)


def test_figures_settings_and_surroundings_that_differ_are_told_apart(two, results):
    def edit(other):
        knn = other["experiments"]["knn"]
        knn["accuracy"]["soft"] = [value + 0.02 for value in knn["accuracy"]["soft"]]
        knn["optimisation"]["epochs"] = 5
        knn["seconds"]["soft"] = [7.0] * 3
        other["environment"]["torch"] = "2.14"
        other["experiments"]["topk-pictures"]["steps"]["soft"][0][0] += 1e-3

    found = compare(*two(results, edit))
    knn, pictures = found.experiments
    assert ("98.11 ± 0.11", "100.11 ± 0.11", "+2.00 (beyond both spreads)") in [
        c.row[1:] for c in knn.changes
    ]
    assert all("seconds" not in change.what for change in (*knn.changes, *knn.settings))
    assert any("5 epochs" in change.b for change in knn.settings)
    assert pictures.changes[0].row[2:] == ("1.0e-03", "+1.0e-03")
    assert [change.sides for change in found.surroundings] == [("torch", "2.13", "2.14")]
    assert found.warnings == ()
    assert (
        found.summary == f"Differences: {len(knn.changes) + 1} in {found.figures} figures of 2 experiments."
    )


def test_runs_that_answer_different_questions_are_warned_of(two, searched):
    def edit(other):
        other["request"] |= {"preset": "quick", "dataset": "mnist"}
        del other["experiments"]["knn-search"]

    found = compare(*two(searched, edit))
    assert [warning.split(" (")[0] for warning in found.warnings] == [
        "The presets differ",
        "The data sets differ",
        "Only A has knn-search.",
    ]
    assert len(found.experiments) == 1


def test_figures_of_one_run_only_are_counted(two, searched):
    def edit(other):
        del other["experiments"]["knn-search"]["trials"]["neuralsort"]

    search, matching = compare(*two(searched, edit)).experiments
    assert (search.figures, search.alone, search.changes) == (9, 9, ())
    assert matching.alone == 0


def test_tables_whose_captions_differ_in_a_number_only_are_told_apart():
    tables = [Table(f"Top-{k} accuracy", ("Loss", "ours"), (("soft", f"{k}"),)) for k in (1, 3)]
    found = compare_module._figures(tables)
    assert list(found.values()) == [("Top-1 accuracy: soft, ours", "1"), ("Top-3 accuracy: soft, ours", "3")]


def test_runs_with_nothing_in_common(two, searched):
    found = compare(*two(searched, lambda other: other["experiments"].clear()))
    assert found.summary == "The runs have no experiment in common."


def test_the_comparison_is_a_sound_page(two, searched, tmp_path):
    def edit(other):
        other["request"]["preset"] = "quick"
        other["environment"]["torch"] = "<2.14>"
        other["experiments"]["knn-search"]["trials"]["soft"][0]["validation"] += 0.02

    found = compare(*two(searched, edit))
    page = write_comparison(found, tmp_path)
    html = page.read_text()
    check_site({"index.html": html})
    assert "&lt;2.14&gt;" in html
    text = " ".join(Page(html).text)
    for line in (found.summary, *found.warnings):
        assert line in text


def test_rows_that_are_called_alike_are_compared_one_by_one(two, searched):
    def edit(other):
        other["experiments"]["knn-search"]["trials"]["neuralsort"][1]["validation"] = 0.5

    search, _ = compare(*two(searched, edit)).experiments
    (change,) = search.changes
    assert change.what.endswith(": NeuralSort (2), validation")
    assert change.row[1:] == ("91.00", "50.00", "−41.00")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no results.json"),
        ("{", "is not JSON"),
        ('{"format": 1}', "has no checksum"),
        ({"format": 99}, f"expected format {FORMAT}, got 99"),
    ],
)
def test_results_that_cannot_be_read_are_said_in_one_line(tmp_path, content, said):
    path = tmp_path / "results.json"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        write_json(path, content)
    with pytest.raises(UserError, match=said) as caught:
        read_results(tmp_path)
    assert str(caught.value).endswith(f"Run: couplings reproduce --out {tmp_path}")


def test_an_unfinished_run_has_no_results_yet(tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError, match=r"not finished.*--resume$"):
        read_results(tmp_path)
