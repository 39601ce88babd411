"""Sorting 4-digit numbers: honest data, losses that ask for the right order, a run that ends the same when resumed."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch

import couplings as cp
from couplings_experiments import sorting_methods
from couplings_experiments.app import run
from couplings_experiments.data import Dataset, Split, load
from couplings_experiments.experiment import discover
from couplings_experiments.experiments import sorting
from couplings_experiments.experiments.sorting_search import GRID
from couplings_experiments.models import NumberScore
from couplings_experiments.progress import Screen
from couplings_experiments.sorting_methods import (
    Choice,
    Sorter,
    compose,
    draw_numbers,
    order_loss,
    ranks_of,
    sequences_of,
)
from couplings_experiments.sorting_training import (
    CHOICES,
    LABELS,
    OPERATOR,
    PAPER,
    PLANS,
    Plan,
    build,
    optimisation_for,
    repeated,
)
from couplings_experiments.trainer import train

SMALL = Plan(1, (3, 4), 2, 1, 12, (40, 40))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PLANS, ("digits", "smoke"), SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete smoke run, made in this process."""
    out = tmp_path_factory.mktemp("sorting") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANS, ("digits", "smoke"), SMALL)
        assert run(["reproduce", "sorting", "ordering-pictures", "--preset", "smoke", "--out", str(out)]) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())["experiments"]


def timeless(out):
    return {name: value for name, value in results(out)["sorting"].items() if name != "seconds"}


def marked(first, count):
    """Images that are constant, and the constant tells them apart."""
    marks = torch.arange(first, first + count)
    return Split(marks.float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), marks % 10)


# ---------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_their_digits_side_by_side():
    digits = marked(0, 8)
    images, values = compose(digits)
    assert images.shape == (2, 1, 8, 32)
    assert values.tolist() == [123, 4567]
    assert images[1, 0, 3].tolist() == [4.0] * 8 + [5.0] * 8 + [6.0] * 8 + [7.0] * 8


def test_the_network_looks_at_every_digit_alone():
    network = NumberScore((1, 8, 8), 4).eval()
    images, _ = draw_numbers(marked(0, 30), 5, seed=0)
    seen = []
    network.digit.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    network(images)
    assert torch.equal(seen[0].reshape(5, 4, 8, 8)[2, 3], images[2, 0, :, 24:])


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_the_network_takes_images_of_all_data_sets(shape):
    channels, height, width = shape
    scores = NumberScore(shape, 4)(torch.randn(6, channels, height, 4 * width))
    assert scores.shape == (6,)


def test_sequences_have_no_equal_numbers():
    values = torch.tensor([5, 5, 5, 7, 9, 11])
    index = sequences_of(values, 3, 200, seed=0)
    assert 0 < len(index) < 200
    assert all(len(set(values[row].tolist())) == 3 for row in index)


# ---------------------------------------------------------------------------------------------------------- honesty


def test_the_digits_that_test_are_not_among_those_that_train():
    for seed in (0, 1):
        digits = load("digits", None, seed)
        pixels = {
            part: {image.mul(1000).round().to(torch.int32).numpy().tobytes() for image in split.images}
            for part, split in vars(digits).items()
            if isinstance(split, Split)
        }
        assert sum(digits.sizes.values()) == 1797
        assert not pixels["test"] & pixels["train"]
        assert not pixels["test"] & pixels["validation"]
        assert not pixels["validation"] & pixels["train"]


def test_no_number_mixes_the_parts(tmp_path, monkeypatch):
    digits = Dataset("marked", marked(0, 300), marked(1000, 100), marked(2000, 100))
    seen = {True: set(), False: set()}
    forward = NumberScore.forward

    def recorded(self, images):
        seen[self.training] |= set(images.flatten().long().tolist())
        return forward(self, images)

    monkeypatch.setattr(NumberScore, "forward", recorded)
    choice = CHOICES["neuralsort"]
    method = build("neuralsort", choice, 4, digits, 0)
    settings = optimisation_for(SMALL, choice, 4)
    train(method, repeated(digits, settings), settings, 0, tmp_path, identity="x")
    assert seen[True]
    assert max(seen[True]) < 300
    assert seen[False]
    assert 1000 <= min(seen[False]) <= max(seen[False]) < 1100
    seen[False].clear()
    method.score(digits.test, 40, 40)
    assert 2000 <= min(seen[False]) <= max(seen[False]) < 2100


def test_an_epoch_has_the_steps_it_is_to_have():
    digits = load("digits", None, 0)
    for plan in PLANS.values():
        for length in plan.lengths:
            settings = optimisation_for(plan, CHOICES["transport"], length)
            total = len(repeated(digits, settings).train)
            assert total // settings.queries >= plan.steps
            assert settings.queries % (4 * length) == 0


# ----------------------------------------------------------------------------------------------- losses and measures


ALL_CHOICES = [(name, CHOICES[name]) for name in CHOICES] + [
    (name, c) for name in GRID for c in GRID[name][::2]
]


@pytest.mark.parametrize(("name", "choice"), ALL_CHOICES)
def test_every_loss_asks_for_the_true_order(name, choice):
    values = torch.tensor([[4, 1, 3, 2], [10, 40, 20, 30]])
    right = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 4.0, 2.0, 3.0]])
    losses, gradients = [], []
    for scores in (right, -right, 0.1 * right):
        scores = scores.clone().requires_grad_()
        noise = torch.Generator().manual_seed(0)
        loss = order_loss(scores, values, OPERATOR[name], choice, noise)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(scores.grad)
    assert losses[0] < losses[1]
    assert all(np.isfinite(losses))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_the_gradient_of_transports_cross_entropy_is_the_error_of_the_ranks():
    scores = torch.randn(
        2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    values = torch.tensor([[3, 1, 2, 6, 5, 4], [6, 5, 4, 3, 2, 1]])
    epsilon = 0.5
    loss = order_loss(scores, values, "transport", Choice(0.1, epsilon), None)
    (gradient,) = torch.autograd.grad(loss, scores)
    ranks = cp.soft_rank(scores.detach(), epsilon=epsilon, standardize=False, squash=None)
    assert torch.allclose(gradient, (ranks - values) * 2 / (epsilon * 5) / 12, atol=1e-9)


class Oracle(torch.nn.Module):
    """Reads the value off marked images."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, images):
        digits = images[:, 0, 0, ::8] % 10
        return self.sign * (digits * torch.tensor([1000.0, 100.0, 10.0, 1.0])).sum(-1)


def test_the_measures_at_both_ends():
    digits = marked(0, 200)
    choice = Choice(0.1, 1.0)
    assert Sorter(Oracle(1), "transport", choice, 5).score(digits, 100, 200) == (1.0, 1.0)
    backwards = Sorter(Oracle(-1), "transport", choice, 5).score(digits, 100, 200)
    assert backwards.exact == 0
    assert backwards.ranks == pytest.approx(0.2)  # the middle one of five
    assert ranks_of(torch.tensor([3, 1, 2, 1])).tolist() == [3, 0, 2, 1]


# ------------------------------------------------------------------------------------------------------ end to end


def test_a_smoke_run(finished):
    sorted_ = results(finished)["sorting"]
    for what in ("exact", "ranks"):
        assert set(sorted_[what]) == set(LABELS)
        for by_length in sorted_[what].values():
            assert set(by_length) == {"3", "4"}
            assert all(0 <= share <= 1 for shares in by_length.values() for share in shares)
    page = (finished / "sorting.html").read_text()
    assert "deterministic NeuralSort" in page
    assert page.count("<svg") + (finished / "ordering-pictures.html").read_text().count("<svg") == 8


def test_struck_and_resumed_it_ends_with_the_same_numbers(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report"
    count = 0
    advance = Screen.advance

    def struck(self, steps, what):
        nonlocal count
        count += 1
        if count == 16:  # one epoch of the eighth network is stored, the network is not finished
            raise KeyboardInterrupt
        advance(self, steps, what)

    with monkeypatch.context() as patch:
        patch.setattr(Screen, "advance", struck)
        assert run(["reproduce", "sorting", "--preset", "smoke", "--out", str(out)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    assert run(["reproduce", "--out", str(out), "--resume"]) == 0
    assert timeless(out) == timeless(finished)


def test_another_seed_ends_with_other_numbers():
    digits = load("digits", None, 0)
    first, again, other = (build("network", CHOICES["network"], 3, digits, seed) for seed in (0, 0, 1))
    images, _ = draw_numbers(digits.validation, 10, seed=0)
    assert torch.equal(first.scores(images), again.scores(images))
    assert not torch.equal(first.scores(images), other.scores(images))


def test_mnist_runs_by_the_same_code(tmp_path, monkeypatch, write_mnist):
    monkeypatch.setitem(PLANS, ("other", "smoke"), Plan(1, (3,), 1, 1, 3, (20, 20), 60))
    monkeypatch.setattr(sorting_methods, "VALIDATION", (12, 20))
    write_mnist(tmp_path)
    arguments = ["--preset", "smoke", "--dataset", "mnist", "--data-dir", str(tmp_path)]
    assert run(["reproduce", "sorting", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")["sorting"]["dataset"] == "mnist"


@pytest.fixture
def write_mnist():
    random = np.random.default_rng(0)

    def write(folder):
        for part, count in (("train", 120), ("t10k", 40)):
            images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = (np.arange(count) % 10).astype(np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                head = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">i4").tobytes()
                (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())

    return write


# --------------------------------------------------------------------------------------------------------- the report


def with_shares(result, transport, neuralsort):
    """A finished result with other shares of exact permutations, by length and seed."""
    changed = copy.deepcopy(result)
    changed["seeds"] = list(range(len(next(iter(transport.values())))))
    for what in ("exact", "ranks"):
        for name in LABELS:
            changed[what][name] = {n: [0.1] * len(v) for n, v in transport.items()}
        changed[what]["transport"] = transport
        changed[what]["neuralsort"] = neuralsort
    return changed


def test_the_tables_show_the_papers_figures_beside_ours(finished):
    result = results(finished)["sorting"]
    result["lengths"] = [3, 5, 7, 9, 15]
    shares = {str(n): [0.5] for n in result["lengths"]}
    result = with_shares(result, shares, shares)
    tables = [sorting._table(result, what) for what in ("exact", "ranks")]
    for place, table in enumerate(tables):
        rows = {row[0]: row[1:] for row in table.rows}
        for label, name in (
            ("Sinkhorn sort", "transport"),
            ("Deterministic NeuralSort", "neuralsort"),
            ("Stochastic NeuralSort", "stochastic"),
        ):
            assert rows[f"{label}, paper, MNIST"] == tuple(
                f"{pair[place]:.3f}" for pair in PAPER[name].values()
            )
        assert rows["Transport, ours, digits"] == ("0.500",) * 5
    assert tables[0].rows[0][1:] == ("0.928", "0.811", "0.656", "0.497", "0.126")


@pytest.mark.parametrize(
    ("transport", "neuralsort", "said"),
    [
        ({"3": [0.9], "4": [0.8]}, {"3": [0.9], "4": [0.7]}, "NeuralSort at every length, n = 3 and 4 (0.900"),
        ({"3": [0.9], "4": [0.6]}, {"3": [0.8], "4": [0.7]}, "at n = 3, but fewer at n = 4 (0.900 against 0.800"),
        ({"3": [0.7], "4": [0.6]}, {"3": [0.8], "4": [0.7]}, "fewer test sequences are sorted exactly than"),
        ({"3": [0.9] * 3, "4": [0.6] * 3}, {"3": [0.8] * 3, "4": [0.7] * 3}, "and clearly behind at n = 4"),
        ({"3": [0.9, 0.7, 0.8], "4": [0.8] * 3}, {"3": [0.8] * 3, "4": [0.8] * 3}, "is clear at no length"),
    ],
)  # fmt: skip
def test_the_sentence_follows_the_numbers(finished, transport, neuralsort, said):
    result = with_shares(results(finished)["sorting"], transport, neuralsort)
    assert said in sorting._meaning(result)


def test_all_experiments_are_found_and_their_pages_are_well_formed(finished):
    known = discover()
    assert known["sorting"].by_default
    assert known["ordering-pictures"].by_default
    assert not known["sorting-search"].by_default
    page = (finished / "sorting.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL), re.IGNORECASE)


def test_the_pictures_say_what_the_operators_do(finished):
    pictures = results(finished)["ordering-pictures"]
    ranks = np.asarray(pictures["ranks"])
    assert np.allclose(ranks[:, 0], [1, 2, 3, 4, 5])
    assert np.allclose(ranks[:, -1], 3, atol=0.02)
    assert (np.diff(ranks, axis=0) >= 0).all()  # no two change their order
    even, weighted = (np.asarray(pictures["milestones"][kind]) for kind in ("even", "weighted"))
    for plans, weights in ((even, [0.2] * 5), (weighted, [0.4, 0.2, 0.4])):
        assert np.allclose(plans.sum(1), 1)
        assert np.allclose(plans.sum(2), 24 * np.asarray(weights))
    assert np.allclose(pictures["quantiles"]["soft"][0], pictures["quantiles"]["exact"], atol=0.05)


def test_the_search_has_as_many_trials_for_everyone():
    assert {len(choices) for choices in GRID.values()} == {8}
    assert set(GRID) == set(CHOICES)
    assert all(CHOICES[name] in GRID[name] for name in GRID)
