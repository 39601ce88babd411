"""The page: well-formed, self-contained, accessible, and true to the numbers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from couplings_experiments.experiment import discover
from couplings_experiments.experiments import knn
from couplings_experiments.knn_training import ROWS, TRAINED
from couplings_experiments.report.page import duration, render

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps what the tests ask about."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


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


def page(seeds=3):
    pictures = discover()["topk-pictures"]

    class Silent:
        def expect(self, steps):
            pass

        def advance(self, steps, what):
            pass

    class Context:
        progress = Silent()

    return render(
        {
            "format": 1,
            "version": "0.1.0",
            "request": {"preset": "full"},
            "command": "couplings reproduce --preset <full>",
            "finished": "today",
            "elapsed_seconds": 200.0,
            "environment": {"torch": "2.13", "Processor": "<b>a & b</b>"},
            "experiments": {"knn": fake_knn(seeds), "topk-pictures": pictures.run(Context())},
        }
    )


@pytest.fixture(scope="module")
def html():
    return page()


@pytest.fixture(scope="module")
def parsed(html):
    reader = Page()
    reader.feed(html)
    reader.close()
    return reader


def test_well_formed_with_unique_ids_and_no_dead_anchors(parsed):
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    for tag, given in parsed.tags:
        for name in ("href", "xlink:href"):
            if given.get(name, "").startswith("#"):
                assert given[name][1:] in parsed.ids, (tag, given)


def test_self_contained(parsed, html):
    for tag, given in parsed.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert not given.get(name, "#").startswith(("http", "//")), (tag, given)
    assert "@import" not in html
    assert len(html) < 3_000_000


def test_readable_without_seeing_it(parsed):
    figures = [given for tag, given in parsed.tags if given.get("role") == "img"]
    assert len(figures) == 6
    assert all(len(given["aria-label"]) > 40 for given in figures)
    assert all(given.get("scope") in ("col", "row") for tag, given in parsed.tags if tag == "th")
    assert sum(tag == "h1" for tag, _ in parsed.tags) == 1
    assert ("html", {"lang": "en"}) in parsed.tags


def test_text_is_escaped(html):
    assert "<b>a & b</b>" not in html
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in html


def test_follows_the_reader_s_colours_and_prints(html):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "currentColor" in html
    assert "#010203" not in html


def test_the_table_has_the_paper_s_figures_beside_ours(parsed):
    text = " ".join(parsed.text)
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
