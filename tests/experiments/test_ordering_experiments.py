"""Classification, robust regression and ranking: honest splits, baselines that are what they say, runs that repeat."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch

from couplings_experiments.app import run
from couplings_experiments.data import load
from couplings_experiments.data.patients import load_patients
from couplings_experiments.errors import UserError
from couplings_experiments.experiment import Context, Request, discover
from couplings_experiments.experiments import ranking, robust_regression, topk_classification
from couplings_experiments.fitting import Fitting, RowNetworks, best, fit
from couplings_experiments.ranking_losses import lambdarank, listnet, ranknet, squared_error
from couplings_experiments.report import words
from couplings_experiments.topk_training import (
    DIGITS,
    GRID,
    METHODS,
    NOISE,
    Choice,
    LossClassifier,
    flip_labels,
    focal_loss,
    log_symmetric,
    smooth_topk_svm,
)

NAMES = ("topk-classification", "robust-regression", "ranking")


class Silent:
    def __init__(self):
        self.expected, self.done = 0.0, 0.0

    def expect(self, steps):
        self.expected += steps

    def advance(self, steps, what):
        self.done += steps

    def say(self, line):
        pass


def untimed(value):
    """The result without its times."""
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if key != "seconds"}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """One smoke run of the three through the command line."""
    out = tmp_path_factory.mktemp("smoked")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(["reproduce", *NAMES, "--preset", "smoke", "--out", str(out)]) == 0
    torch.set_num_threads(before)
    return out


# ------------------------------------------------------------------------------------------------ end to end


def test_the_command_line_runs_them_to_a_page(smoked):
    results = json.loads((smoked / "results.json").read_text())["experiments"]
    page = "".join((smoked / f"{name}.html").read_text() for name in NAMES)
    assert set(results) == set(NAMES)
    for name in NAMES:
        assert discover()[name].title in page
        assert discover()[name].by_default
    assert page.count("One seed decides nothing between methods") == 3
    assert not (smoked / "work").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_gives_the_same_numbers_and_a_resumed_one_too(smoked, tmp_path, name):
    first = json.loads((smoked / "results.json").read_text())["experiments"][name]
    request = Request((name,), "smoke", "digits", None, None, "cpu")
    progress = Silent()
    again = json.loads(json.dumps(discover()[name].run(Context(request, tmp_path, progress))))
    assert untimed(again) == untimed(first)
    assert progress.done == pytest.approx(progress.expected)
    # an interruption: half of the units are gone, one of them in the middle of its epochs
    units = sorted(tmp_path.glob("*.json"))
    for unit in units[::2]:
        unit.unlink()
    checkpoints = sorted((tmp_path / units[0].stem).glob("epoch-*"))
    if len(checkpoints) > 1:
        checkpoints[-1].unlink()
    progress = Silent()
    resumed = json.loads(json.dumps(discover()[name].run(Context(request, tmp_path, progress))))
    assert untimed(resumed) == untimed(first)
    assert progress.done == pytest.approx(progress.expected)


# --------------------------------------------------------------------------------------------- honest splits


def test_no_patient_is_in_two_parts_and_the_test_patients_are_fixed():
    first, other = load_patients(0), load_patients(1)
    for data in (first, other):
        parts = [set(group.patients.tolist()) for group in (data.train, data.validation, data.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 442
        # only the training patients decide the scale
        assert torch.allclose(data.train.features.mean(0), torch.zeros(10), atol=1e-5)
        assert torch.allclose(data.train.features.std(0, correction=0), torch.ones(10), atol=1e-5)
        assert float(data.test.features.mean(0).abs().max()) > 0.01
    assert torch.equal(first.test.patients, other.test.patients)
    assert torch.equal(first.test.targets, other.test.targets)
    assert not torch.equal(first.train.patients, other.train.patients)
    assert torch.equal(first.train.features, load_patients(0).train.features)


def test_lists_hold_different_patients_of_their_own_part():
    data = load_patients(0)
    thresholds = ranking.grade_thresholds(data.train)
    for group in (data.train, data.validation, data.test):
        lists = ranking.draw_lists(group, thresholds, 50, torch.Generator().manual_seed(0))
        assert lists.features.shape == (50, ranking.LENGTH, 10)
        assert all(len(set(row)) == ranking.LENGTH for row in lists.patients.tolist())
        assert set(lists.patients.flatten().tolist()) <= set(group.patients.tolist())
        assert set(lists.grades.unique().tolist()) == set(range(ranking.GRADES))
    train = ranking.draw_lists(data.train, thresholds, 400, torch.Generator().manual_seed(0))
    share = torch.bincount(train.grades.flatten(), minlength=5) / train.grades.numel()
    assert torch.allclose(share, torch.full((5,), 0.2), atol=0.03)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_wrong_labels_are_training_labels_only(share):
    data = load("digits", None, 0)
    noisy, chosen = flip_labels(data, share, 0)
    wrong = noisy.train.labels != data.train.labels
    assert torch.equal(wrong, chosen)
    assert int(wrong.sum()) == round(share * len(data.train))
    for before, after in ((data.validation, noisy.validation), (data.test, noisy.test)):
        assert torch.equal(before.labels, after.labels)
    assert torch.equal(noisy.train.images, data.train.images)
    assert torch.equal(noisy.train.labels, flip_labels(data, share, 0)[0].train.labels)
    if share:
        moved = (noisy.train.labels - data.train.labels)[wrong] % 10
        assert torch.bincount(moved, minlength=10)[1:].min() >= 8  # every other label happens
        assert not torch.equal(noisy.train.labels, flip_labels(data, share, 1)[0].train.labels)


def test_no_test_image_is_a_training_image_of_any_seed():
    def pictures(split):
        return {tuple(image) for image in split.images.flatten(1).round(decimals=3).tolist()}

    raw = load("digits", None, 0)
    assert not pictures(raw.train) & pictures(raw.test)
    assert not pictures(raw.validation) & pictures(raw.test)


def test_outliers_are_planted_in_as_many_targets_as_said_and_grow_with_the_share():
    targets = load_patients(0).train.targets
    before = targets.clone()
    last = torch.zeros(len(targets), dtype=torch.bool)
    for share in robust_regression.SHARES:
        planted, chosen = robust_regression.plant(targets, share, 3)
        assert int(chosen.sum()) == round(share * len(targets))
        assert torch.equal(planted[chosen], 10 * targets[chosen])
        assert torch.equal(planted[~chosen], targets[~chosen])
        assert bool((chosen | ~last).all())
        last = chosen
    assert torch.equal(targets, before)


# ------------------------------------------------------------------------- baselines against their definitions


def test_symmetric_polynomials_are_sums_over_subsets():
    z = torch.randn(3, 6, dtype=torch.float64)
    for k in (1, 3, 6):
        found = log_symmetric(z, k)
        for degree in range(k + 1):
            sets = [z[:, list(chosen)].sum(-1).exp() for chosen in itertools.combinations(range(6), degree)]
            assert torch.allclose(found[:, degree], torch.stack(sets).sum(0).log())


@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (1, 0.3), (2, 1.0), (3, 0.5)])
def test_smooth_topk_svm_is_its_definition(k, tau):
    scores = torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 3, 4, 3])
    expected = []
    for s, y in zip(scores.tolist(), labels.tolist(), strict=True):
        sets = list(itertools.combinations(range(5), k))
        everything = sum(math.exp(((y not in c) + sum(s[j] for j in c) / k) / tau) for c in sets)
        right = sum(math.exp(sum(s[j] for j in c) / (k * tau)) for c in sets if y in c)
        expected.append(tau * math.log(everything) - tau * math.log(right))
    assert float(smooth_topk_svm(scores, labels, k, tau)) == pytest.approx(sum(expected) / 4)
    free = scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: smooth_topk_svm(x, labels, k, tau), free)


def test_smooth_svm_tends_to_the_hinge_on_the_kth_score():
    scores = torch.tensor([[0.5, 2.0, 1.0, -1.0]], dtype=torch.float64)
    # k = 2: the mean of the two largest of the others, plus 1, against the mean of the best set with class 0
    assert float(smooth_topk_svm(scores, torch.tensor([0]), 2, 1e-3)) == pytest.approx(
        1.5 + 1 - 1.25, abs=1e-2
    )


def test_focal_loss_is_its_definition_and_cross_entropy_at_gamma_0():
    scores, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    p = scores.softmax(-1)[range(6), labels]
    assert torch.allclose(focal_loss(scores, labels, 2.0), (-((1 - p) ** 2) * p.log()).mean())
    cross = torch.nn.functional.cross_entropy(scores, labels)
    assert torch.allclose(focal_loss(scores, labels, 0.0), cross)
    sure = torch.tensor([[50.0, 0.0]], requires_grad=True)
    focal_loss(sure, torch.tensor([0]), 2.0).backward()
    assert bool(sure.grad.isfinite().all())


def graded():
    torch.manual_seed(1)
    return torch.randn(6, dtype=torch.float64), torch.tensor([2, 0, 1, 4, 1, 0])


def test_ranknet_is_the_mean_over_ordered_pairs():
    s, g = graded()
    pairs = [(i, j) for i in range(6) for j in range(6) if g[i] > g[j]]
    expected = sum(math.log1p(math.exp(s[j] - s[i])) for i, j in pairs) / len(pairs)
    assert float(ranknet(s, g)) == pytest.approx(expected)
    assert float(ranknet(s, torch.zeros(6))) == 0


def test_lambdarank_has_the_paper_s_lambdas_as_its_gradient():
    s, g = graded()
    s.requires_grad_()
    lambdarank(s, g).backward()
    gradient, s = s.grad.tolist(), s.detach()

    def dcg(order):
        return sum((2.0 ** int(g[i]) - 1) / math.log2(place + 2) for place, i in enumerate(order))

    order = s.argsort(descending=True).tolist()
    ideal = dcg(g.argsort(descending=True).tolist())
    expected = [0.0] * 6
    for i, j in itertools.permutations(range(6), 2):
        if g[i] > g[j]:
            swapped = [{i: j, j: i}.get(entry, entry) for entry in order]
            size = abs(dcg(swapped) - dcg(order)) / ideal / (1 + math.exp(float(s[i] - s[j])))
            expected[i] -= size
            expected[j] += size
    assert gradient == pytest.approx(expected)


def test_listnet_compares_the_probabilities_of_coming_first():
    s, g = graded()

    def first(values):
        """By summing the probabilities of all permutations (Plackett, Luce) that begin with an entry."""
        total = [0.0] * 6
        for order in itertools.permutations(range(6)):
            p = 1.0
            for place in range(6):
                p *= math.exp(values[order[place]]) / sum(math.exp(values[i]) for i in order[place:])
            total[order[0]] += p
        return total

    expected = -sum(a * math.log(b) for a, b in zip(first(g.tolist()), first(s.tolist()), strict=True))
    assert float(listnet(s, g)) == pytest.approx(expected)


def test_pointwise_losses_and_batches():
    s, g = graded()
    assert float(squared_error(s, g)) == pytest.approx(float(((s - g) ** 2).mean()))
    for loss in (squared_error, ranknet, lambdarank, listnet):
        rows = loss(torch.stack([s, -s])[:, None], torch.stack([g, g.flip(0)]))
        assert rows.shape == (2, 2)
        assert torch.allclose(rows[1, 1], loss(-s, g.flip(0)))


def test_huber_is_torch_s():
    residuals = 3 * torch.randn(2, 30)
    for delta in (0.1, 1.345):
        expected = torch.nn.functional.huber_loss(
            residuals, torch.zeros(2, 30), reduction="none", delta=delta
        )
        assert torch.allclose(robust_regression.huber(residuals, delta, None), expected.mean(-1))
    assert torch.allclose(robust_regression.least_squares(residuals, None, None), residuals.square().mean(-1))


def test_each_trial_has_its_own_parameter_and_epsilon():
    residuals = torch.randn(2, 6, 40)
    for method in robust_regression.METHODS.values():
        together = robust_regression.trial_losses(method, residuals)
        for i, trial in enumerate(method.trials):
            epsilon = None if trial.epsilon is None else torch.tensor([trial.epsilon] * 2)
            alone = method.loss(residuals[:, i], trial.parameter, epsilon)
            assert torch.allclose(together[:, i], alone, rtol=1e-4, atol=1e-5)


def test_metrics_of_a_perfect_and_of_a_reversed_order():
    grades = np.array([[0, 1, 2, 3, 4] * 4, [4, 3, 2, 1, 0] * 4])
    perfect = ranking.metrics(grades.astype(float), grades)
    assert list(perfect.values()) == pytest.approx([1, 1, 1, 1])
    worst = ranking.metrics(-grades.astype(float), grades)
    assert worst["spearman"] == pytest.approx(-1)
    assert all(worst[name] < perfect[name] for name in worst)
    assert ranking.metrics(np.zeros((2, 20)), grades)["spearman"] == 0


# ------------------------------------------------------------------------------------------ rows and settings


def test_rows_of_a_fit_know_nothing_of_each_other(tmp_path):
    x = torch.randn(30, 4)
    goals = torch.stack([x @ torch.randn(4), x.square().sum(-1), torch.full((30,), torch.nan)])

    def fitted(rows, name, epochs=4):
        networks = RowNetworks([(0.01, 0.03, 0.01)[row] for row in rows], 4, 5, seed=1)
        loss = lambda draw: (networks(x) - goals[rows]).square().mean(-1)  # noqa: E731
        measure = lambda: (networks(x) - goals[rows]).abs().mean(-1).tolist()  # noqa: E731
        (tmp_path / name).mkdir(exist_ok=True)
        history = fit(networks, loss, measure, Fitting(epochs, 5), 0, tmp_path / name, identity=name)
        return networks(x).detach(), history

    together, history = fitted([0, 1, 2], "all")
    assert [row[2] for row in history] == [None] * 4  # one row diverged
    for row in (0, 1):
        alone, _ = fitted([row], f"only {row}")
        assert torch.allclose(alone[0], together[row], rtol=1e-4, atol=1e-5)
    assert history[-1][0] < history[0][0]
    # from the last checkpoint, and from the one before it
    again, same = fitted([0, 1, 2], "all")
    assert torch.equal(again[:2], together[:2])
    assert same == history
    sorted((tmp_path / "all").glob("epoch-*"))[-1].unlink()
    again, same = fitted([0, 1, 2], "all")
    assert torch.equal(again[:2], together[:2])
    assert same == history


def test_a_linear_fit_finds_least_squares(tmp_path):
    x = torch.randn(50, 3)
    goal = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
    networks = RowNetworks([0.1, 0.05], 3, 0, seed=0)
    step = lambda draw: (networks(x) - goal).square().mean(-1)  # noqa: E731
    measure = lambda: (networks(x) - goal).abs().mean(-1).tolist()  # noqa: E731
    history = fit(networks, step, measure, Fitting(2, 150), 0, tmp_path, identity="linear")
    assert max(history[-1]) < 1e-3
    assert networks.penalty().tolist() == pytest.approx([0.5 * 5.25] * 2, rel=1e-2)


def test_the_best_trial_is_the_first_of_equal_ones_and_never_a_diverged_one():
    assert best([None, 0.5, 0.7, 0.7], highest=True) == 2
    assert best([None, 0.5, 0.5], highest=False) == 1
    with pytest.raises(ValueError, match="diverged"):
        best([None, None], highest=True)


def test_every_loss_has_as_many_trials_as_the_others():
    assert {len(GRID[name]) for name in METHODS} == {6}
    assert {len(method.trials) for method in ranking.METHODS.values()} == {6}
    assert {len(method.trials) for method in robust_regression.METHODS.values()} == {6}
    for name in METHODS:  # what is used was searched
        assert len(DIGITS[name]) == len(NOISE)
        assert set(DIGITS[name]) <= set(GRID[name])


# --------------------------------------------------------------------------------------- CIFAR, without CIFAR


@pytest.fixture
def cifar100(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 120), ("test", 20)):
        batch = {
            b"data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
            b"fine_labels": [i % 12 for i in range(count)],
            b"coarse_labels": [i % 4 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path


def test_cifar_100_is_read_with_its_fine_labels(cifar100):
    data = load("cifar100", cifar100, 0)
    assert data.classes == 12
    assert sum(data.sizes.values()) == 140
    (cifar100 / "cifar-100-python" / "test").unlink()
    with pytest.raises(UserError, match="test not found"):
        load("cifar100", cifar100, 0)


@pytest.mark.parametrize("network", ["plain", "resnet18"])
def test_the_networks_for_cifar_train_with_every_loss(cifar100, network):
    data = load("cifar100", cifar100, 0, limit=8)
    names = list(METHODS) if network == "plain" else ["soft-topk"]
    for name in names:
        model = LossClassifier(network, name, Choice(0.1, 1.0), data)
        loss = model.loss(data.train, type(data.train)(data.train.images[:0], data.train.labels[:0]), None)
        loss.backward()
        gradients = [p.grad for p in model.module.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.slow
def test_the_smoke_run_on_cifar(cifar100, tmp_path):
    arguments = ["--preset", "smoke", "--dataset", "cifar100", "--data-dir", str(cifar100)]
    assert run(["reproduce", "topk-classification", *arguments, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["experiments"]
    assert set(results["topk-classification"]["top1"]) == {"plain", "resnet18"}


# ------------------------------------------------------------------------------------------- true sentences


def test_words():
    assert words.spread([0.5, 0.7], 2) == "0.60 ± 0.14"
    assert words.spread([0.5], 1, 100) == "50.0"
    assert words.join(["a", "b", "c"]) == "a, b and c"
    assert [words.clear(d) for d in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [1, -1, 0.1], [5.0, 5.1])] == [
        1,
        -1,
        0,
        0,
    ]


def classified(seeds, soft):
    noise = [0.0, 0.4]
    values = {name: [[0.9 + 0.001 * s for s in range(seeds)]] * 2 for name in METHODS}
    for name in METHODS:
        if METHODS[name].soft:
            values[name] = [[soft + 0.0011 * s for s in range(seeds)]] * 2
    return {
        "dataset": "digits",
        "noise": noise,
        "seeds": list(range(seeds)),
        "k": 3,
        "top1": {"small": values},
        "topk": {"small": values},
    }


def test_what_is_said_of_classification_follows_the_numbers():
    result = classified(3, 0.95)
    result["choices"] = {name: [{"parameter": name}] * 2 for name in METHODS}
    first, second = topk_classification._meaning(result, "small")
    assert "95.1 and 95.1 % against 90.1 % with 0% of the training labels wrong" in first.text
    assert "Top-1 accuracy, soft 0/1, sigmoid: at 0% noise ahead of cross-entropy, focal" in second.text
    assert "behind" not in second.text
    assert "has the setting and the results of" not in second.text
    result["choices"]["soft-topk"] = result["choices"]["soft"]
    said = topk_classification._meaning(result, "small")[1].text
    assert (
        "At 0% and 40% noise soft top-3, transport has the setting and the results of soft 0/1, transport"
        in said
    )
    worse = {**classified(3, 0.85), "choices": result["choices"]}
    said = topk_classification._meaning(worse, "small")[1].text
    assert "behind cross-entropy, focal" in said
    assert "ahead" not in said
    (said,) = topk_classification._meaning(classified(1, 0.85), "small")
    assert "One seed decides nothing" in said.text


def regressed(seeds, soft):
    def errors(level):
        return {m: [[level + 0.01 * s for s in range(seeds)]] * 2 for m in robust_regression.METRICS}

    named = {
        name: errors(soft if method.soft else 50.0) for name, method in robust_regression.METHODS.items()
    }
    return {"shares": [0.0, 0.4], "seeds": list(range(seeds)), "test": {"linear": named}}


def test_what_is_said_of_regression_follows_the_numbers():
    _, said = robust_regression._meaning(regressed(3, 40.0))
    assert said.text.count("smaller at 0% and 40%") == 4
    assert said.text.count("neither soft loss measurably loses") == 2
    result = regressed(3, 60.0)
    for name in ("quantile", "trimmed"):
        result["test"]["linear"][name]["median"] = result["test"]["linear"]["huber"]["median"]
    _, said = robust_regression._meaning(result)
    assert "median absolute error of soft trimmed squares is not distinguishable at 0% and 40%" in said.text
    assert "root mean square error of soft trimmed squares is larger at 0% and 40%" in said.text
    assert "neither soft loss measurably loses to least squares in median absolute error" in said.text
    assert "soft trimmed squares lose to least squares in root mean square error" in said.text
    (said,) = robust_regression._meaning(regressed(1, 60.0))
    assert "larger" not in said.text


def ranked(seeds, soft):
    test = {
        name: {m: [(soft if method.soft else 0.8) + 0.001 * s * (1 + method.soft) for s in range(seeds)]
               for m in ranking.METRICS}
        for name, method in ranking.METHODS.items()
    }  # fmt: skip
    return {"seeds": list(range(seeds)), "test": test}


def test_what_is_said_of_ranking_follows_the_numbers():
    (said,) = ranking._meaning(ranked(3, 0.9))
    assert "Soft ranks help" in said.text
    (said,) = ranking._meaning(ranked(3, 0.7))
    assert "Soft ranks do worse than the best classic loss in NDCG@10, NDCG, MAP and Spearman" in said.text
    assert "soft NDCG is clearly below" in said.text
    (said,) = ranking._meaning(ranked(1, 0.9))
    assert "One seed decides nothing" in said.text
    assert "help" not in said.text
