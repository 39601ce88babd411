"""Keypoint matching: true matches that are true, a matcher with its symmetries, a run that resumes to the bit."""

from __future__ import annotations

import copy
import json
import re
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch

import couplings as cp
from couplings_experiments import matching_model, matching_training
from couplings_experiments.app import run
from couplings_experiments.data import photographs
from couplings_experiments.data.photographs import (
    FAR,
    NEAR,
    PHOTOGRAPHS,
    SIZE,
    Features,
    Pair,
    collate,
    detect,
    draw_homography,
    load_photograph,
    pair_views,
    project,
    solve_homography,
    stereo_pairs,
    visible,
)
from couplings_experiments.experiment import discover
from couplings_experiments.experiments import matching
from couplings_experiments.experiments.matching_search import RATES
from couplings_experiments.matching_methods import (
    AUC,
    Found,
    area_under,
    choose_threshold,
    corner_error,
    couple,
    descriptor_method,
    measure,
    nearest,
    right,
    row_error,
)
from couplings_experiments.matching_model import Frames, Matcher
from couplings_experiments.matching_training import PLANS, VARIANTS, Plan, Training, build, solved, train
from couplings_experiments.progress import Screen

SMALL = Plan(
    1, Training(epochs=2, steps=1, pairs=2), 2, 1, 1, (24, 32), ("transport", "sweeps-20"), (8, 2, 2)
)


def quarter():
    return stereo_pairs()[3:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete smoke run, made in this process."""
    out = tmp_path_factory.mktemp("matching") / "report"
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        assert run(["reproduce", "matching", "--preset", "smoke", "--out", str(out)]) == 0
    return out


def small(patch):
    patch.setitem(PLANS, "smoke", SMALL)
    patch.setattr(matching, "stereo_pairs", quarter)


def results(out):
    return json.loads((out / "results.json").read_text())["experiments"]["matching"]


def timeless(out):
    found = results(out)
    for units in found["trained"].values():
        for unit in units:
            del unit["seconds"]
    return found


@pytest.fixture(scope="module")
def views():
    return photographs.draw_views("test", 2, 80, 0)


@pytest.fixture(scope="module")
def pair(views):
    return pair_views("china", *views["china"])


def made(points, there, distance=None, rows=None):
    """A pair of keypoints with nothing else that matters."""

    def features(places):
        places = np.asarray(places, dtype=float)
        rng = np.random.default_rng(len(places))
        descriptors = rng.random((len(places), 128))
        angles = rng.uniform(0, 2 * np.pi, len(places))
        return Features(
            places,
            rng.uniform(1, 4, len(places)),
            np.stack([np.cos(angles), np.sin(angles)], -1),
            descriptors / np.linalg.norm(descriptors, axis=-1, keepdims=True),
        )

    first, second = features(points), features(there)
    if distance is None:
        distance = np.linalg.norm(first.points[:, None] - second.points, axis=-1)
    if rows is None:
        rows = np.full(len(first), -1)
    columns = np.full(len(second), -1)
    columns[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    blank = np.zeros(SIZE)
    return Pair("made", first, second, distance, rows, columns, np.eye(3), (blank, blank))


# ----------------------------------------------------------------------------------------------------- photographs


def test_no_photograph_is_in_two_parts_and_the_stereo_pair_is_in_none():
    names = [name for part in PHOTOGRAPHS.values() for name in part]
    assert len(names) == len(set(names))
    assert "stereo_motorcycle" not in names


def test_photographs_come_from_the_installed_packages(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a photograph was asked of the network")

    monkeypatch.setattr(socket, "socket", refuse)
    for part in PHOTOGRAPHS.values():
        for name in part:
            image = load_photograph(name)
            assert image.ndim == 2
            assert 0 <= image.min() < image.max() <= 1 + 1e-9
            assert image.shape[0] > SIZE[0]
            assert image.shape[1] > SIZE[1]


def test_a_homography_takes_four_points_to_four_points():
    rng = np.random.default_rng(0)
    source, target = rng.random((4, 2)) * 100, rng.random((4, 2)) * 100
    assert np.allclose(project(solve_homography(source, target), source), target)


def test_views_show_nothing_but_photograph():
    corners = np.array([[0, 0], [SIZE[1], 0], [SIZE[1], SIZE[0]], [0, SIZE[0]]], dtype=float)
    for seed in range(50):
        shape = (300, 451)
        seen = project(np.linalg.inv(draw_homography(shape, np.random.default_rng(seed))), corners)
        assert (seen > -1e-6).all()
        assert (seen < np.array([451, 300]) - 1 + 1e-6).all()


def test_the_same_seed_draws_the_same_views_and_another_one_others(views):
    again, others = photographs.draw_views("test", 2, 80, 0), photographs.draw_views("test", 1, 80, 1)
    for name, found in views.items():
        for one, two in zip(found, again[name], strict=True):
            assert np.array_equal(one.image, two.image)
            assert np.array_equal(one.features.descriptors, two.features.descriptors)
        assert not np.array_equal(found[0].image, others[name][0].image)


def test_keypoints_are_unit_vectors_and_no_more_than_asked_for(views):
    for found in views.values():
        for view in found:
            features = view.features
            assert 0 < len(features) <= 80
            assert np.allclose(np.linalg.norm(features.descriptors, axis=-1), 1)
            assert np.allclose(np.linalg.norm(features.directions, axis=-1), 1)
            assert (features.scales > 0).all()
            assert (features.points >= 0).all()
            assert (features.points <= np.array(SIZE[::-1])).all()


def test_an_empty_image_has_no_keypoints():
    assert len(detect(np.full(SIZE, 0.5), 10)) == 0


def test_directions_turn_with_the_image():
    image = load_photograph("china")[:240, :240]
    first, second = detect(image, 100), detect(np.rot90(image).copy(), 100)
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # x, y of a pixel -> y, 239 - x
    moved = first.points @ turn.T + [0, 239]
    distance = np.linalg.norm(moved[:, None] - second.points, axis=-1)
    rows, _ = photographs.true_matches(distance, first.directions @ turn.T, second.directions)
    matched = rows >= 0
    agreement = ((first.directions @ turn.T)[matched] * second.directions[rows[matched]]).sum(-1)
    assert matched.sum() > 60
    assert np.median(agreement) > 0.99


# ---------------------------------------------------------------------------------------------------- true matches


def test_true_matches_are_mutually_nearest_ones(pair):
    """One keypoint after the other, by the homography itself."""
    belongs = [project(pair.homography, point[None])[0] for point in pair.first.points]
    ahead = [
        project(pair.homography, (p + 0.5 * d)[None])[0] - b
        for p, d, b in zip(pair.first.points, pair.first.directions, belongs, strict=True)
    ]

    def cost(i, j):
        gap = np.linalg.norm(belongs[i] - pair.second.points[j])
        turned = 1 - ahead[i] @ pair.second.directions[j] / np.linalg.norm(ahead[i])
        return gap + turned if gap <= NEAR else np.inf

    n, m = len(pair.first), len(pair.second)
    table = np.array([[cost(i, j) for j in range(m)] for i in range(n)])
    gaps = np.array(
        [[np.linalg.norm(belongs[i] - pair.second.points[j]) for j in range(m)] for i in range(n)]
    )
    for i in range(n):
        j = table[i].argmin()
        if np.isfinite(table[i, j]) and table[:, j].argmin() == i:
            assert pair.rows[i] == j
            assert pair.columns[j] == i
        else:
            assert pair.rows[i] == (-1 if gaps[i].min() > FAR else -2)
    assert (pair.rows >= 0).sum() == (pair.columns >= 0).sum() > 10


def test_nothing_is_known_of_rows_without_a_distance():
    distance = np.array([[0.5, 9.0], [np.nan, np.nan], [9.0, 8.0]])
    east = np.array([[1.0, 0.0]] * 3)
    rows, columns = photographs.true_matches(distance, east, east[:2])
    assert rows.tolist() == [0, -2, -1]
    assert columns.tolist() == [0, -1]


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_where_there_are_no_keypoints_nothing_matches(n, m):
    rows, columns = photographs.true_matches(np.zeros((n, m)), np.ones((n, 2)), np.ones((m, 2)))
    assert rows.tolist() == [-1] * n
    assert columns.tolist() == [-1] * m


def test_what_something_nearer_hides_is_not_visible():
    disparity = np.full((3, 12), 2.0)
    disparity[1, 8] = 6.0  # lands on 2, where the pixel 4 of disparity 2 lands, too
    disparity[2, 5] = np.inf
    expected = np.ones((3, 12), dtype=bool)
    expected[:, :2] = False  # outside the right image
    expected[1, 4] = False
    expected[2, 5] = False
    assert np.array_equal(visible(disparity), expected)


def test_the_stereo_pairs_matches_look_alike():
    for found in stereo_pairs():
        matched = found.rows >= 0
        assert matched.sum() > 50
        alike = found.first.descriptors @ found.second.descriptors.T
        true = alike[matched, found.rows[matched]]
        assert np.median(true) > np.quantile(alike, 0.99)
        shift = (found.first.points[matched] - found.second.points[found.rows[matched]])[:, 0]
        assert 5 < np.median(shift) < 60  # to the left, as measured
        assert np.isnan(found.distance).any(1).sum() > 0


def test_a_batch_is_its_pairs_padded(views):
    pairs = [pair_views(name, *found) for name, found in views.items()]
    batch = collate(pairs)
    for i, one in enumerate(pairs):
        n, m = len(one.first), len(one.second)
        assert batch.masks[0][i].sum() == n
        assert batch.masks[1][i].sum() == m
        assert batch.rows[i, :n].tolist() == one.rows.tolist()
        assert (batch.rows[i, n:] == -2).all()
        assert np.allclose(batch.points[1][i, :m], one.second.points, atol=1e-4)
        assert (batch.descriptors[0][i, n:] == 0).all()


# ------------------------------------------------------------------------------------------------------- the model


def double(batch):
    def moved(value):
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.double() if value.is_floating_point() else value

    return photographs.Batch(**{name: moved(value) for name, value in vars(batch).items()})


def matcher():
    torch.manual_seed(0)
    model = Matcher(8, 2, 2).double()
    with torch.no_grad():
        model.unmatched.weight.normal_()
    return model


def test_a_pair_does_not_know_of_its_padding(views):
    pairs = [pair_views(name, *found) for name, found in views.items()]
    model = matcher()
    together, bins = model(double(collate(pairs)))
    for i, one in enumerate(pairs):
        n, m = len(one.first), len(one.second)
        alone, own = model(double(collate([one])))
        torch.testing.assert_close(together[i, :n, :m], alone[0, :n, :m])
        torch.testing.assert_close(bins[0][i, :n], own[0][0, :n])
        torch.testing.assert_close(bins[1][i, :m], own[1][0, :m])


def test_exchanged_images_have_exchanged_scores(pair):
    model = matcher()
    batch = double(collate([pair]))
    names = ("points", "scales", "directions", "descriptors", "masks", "sizes")
    back = replace(batch, **{name: getattr(batch, name)[::-1] for name in names})
    scores, bins = model(batch)
    swapped, others = model(back)
    torch.testing.assert_close(swapped, scores.mT)
    torch.testing.assert_close(others, bins[::-1])


def test_reordered_keypoints_have_reordered_scores(pair):
    model = matcher()
    order = np.random.default_rng(0).permutation(len(pair.first))
    shuffled = replace(pair, first=Features(*(getattr(pair.first, f)[order] for f in vars(pair.first))))
    scores, _ = model(double(collate([pair])))
    again, _ = model(double(collate([shuffled])))
    torch.testing.assert_close(again[0, : len(order)], scores[0, order])


def frames_of(seed, count=9):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, count)
    return Frames(
        torch.from_numpy(rng.uniform(0, 200, (1, count, 2))),
        torch.from_numpy(np.log(rng.uniform(1, 5, (1, count)))),
        torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], -1)[None]),
    )


def test_keypoints_that_move_alike_see_no_gap_and_vote_for_the_truth():
    """Under a similarity, every keypoint's vote on every other one is where it went."""
    frames, angle, larger = frames_of(0), 0.7, 1.6
    turn = torch.tensor(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float64
    )
    moved = Frames(
        larger * frames.places @ turn.T + torch.tensor([30.0, -12.0], dtype=torch.float64),
        frames.scales + np.log(larger),
        frames.directions @ turn.T,
    )
    here, there = frames.offsets(), moved.offsets()
    for one, two in zip(here, there, strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(
        matching_model._geometry(frames, *here), matching_model._geometry(moved, *there)
    )
    movement = matching_model._movement(*here, *there)
    torch.testing.assert_close(
        movement, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).expand(movement.shape), atol=2e-3, rtol=0
    )
    votes = matching_model._votes(*here, moved)
    torch.testing.assert_close(votes, moved.places[:, :, None].expand(votes.shape))


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1), (0, 3), (3, 0)])
def test_gradients_are_finite_for_any_number_of_keypoints(name, sizes):
    rng = np.random.default_rng(0)
    one = made(*(rng.uniform(0, 200, (size, 2)) for size in sizes))
    batch = collate([one, made(rng.uniform(0, 200, (5, 2)), rng.uniform(0, 200, (5, 2)))])
    model = build(VARIANTS[name], SMALL, 0)
    log_plan = solved(model, batch, VARIANTS[name])
    loss = cp.losses.matching_loss(
        log_plan,
        batch.rows,
        column_matches=batch.columns,
        row_mask=batch.masks[0],
        column_mask=batch.masks[1],
    )
    loss.backward()
    assert loss.isfinite()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label


# ----------------------------------------------------------------------------------------------------- the measures


def test_mutual_nearest_neighbours_against_a_loop(pair):
    here, there = pair.first.descriptors, pair.second.descriptors
    table = np.array([[np.linalg.norm(a - b) for b in there] for a in here])
    found = nearest(pair)
    for i, row in enumerate(table):
        j = row.argmin()
        assert found.matches[i] == (j if table[:, j].argmin() == i else -1)
        assert found.confidence[i] == pytest.approx(1 - row[j] / np.delete(row, j).min())


def test_what_is_like_two_is_unsure():
    rng = np.random.default_rng(0)
    one = made(rng.uniform(0, 200, (3, 2)), rng.uniform(0, 200, (3, 2)))
    twin = one.first.descriptors[[0, 0, 1]]
    found = nearest(replace(one, second=replace(one.second, descriptors=twin)))
    assert found.confidence[:2].tolist() == [0, 1]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (1, 4), (4, 1)])
def test_nothing_unlearned_fails_on_few_keypoints(sizes):
    one = made(*(np.random.default_rng(0).uniform(0, 200, (size, 2)) for size in sizes))
    for method in (nearest, descriptor_method("transport", 50.0, 0.8)):
        assert len(method(one).matches) == sizes[0]


def test_what_is_measured():
    points = np.array([[10.0, 10.0], [50.0, 50.0], [90.0, 20.0], [30.0, 150.0], [200.0, 200.0]])
    there = np.array([[11.0, 10.0], [50.0, 52.0], [150.0, 20.0], [31.0, 150.0]])
    one = made(points, there, rows=np.array([0, 1, -1, 3, -1]))
    one.distance[4] = np.nan  # its truth is unknown: not counted
    found = Found(np.array([0, 2, -1, 3, 1]), np.array([0.9, 0.8, 0.0, 0.3, 0.9]))
    assert right(found.matches, one).tolist() == [True, False, False, True, False]
    low = measure([found], [one], 0.2)
    assert (low.precision, low.recall, low.score) == (2 / 3, 2 / 3, 2 / 4)
    high = measure([found], [one], 0.5)
    assert (high.precision, high.recall, high.score) == (1 / 2, 1 / 3, 1 / 4)
    assert high.f1 == pytest.approx(0.4)
    assert high.auc == (0.0, 0.0, 0.0)  # two matches make no homography
    assert choose_threshold([found], [one])[1] == pytest.approx(low.f1)
    nothing = measure([found], [one], 1.0)
    assert (nothing.precision, nothing.recall, nothing.f1) == (0, 0, 0)


def test_the_area_is_the_integral_of_the_curve():
    errors = [0.5, 2.0, 4.0, 20.0, float("inf")]
    for most, area in zip(AUC, area_under(errors), strict=True):
        at = (np.arange(100000) + 0.5) / 100000 * most
        assert area == pytest.approx((np.array(errors) <= at[:, None]).mean(), abs=1e-4)


def test_true_matches_give_the_true_homography_back(pair):
    matches = np.full(len(pair.first), -1)
    close = (pair.rows >= 0) & (pair.distance.min(1) <= 1.5)
    matches[close] = pair.rows[close]
    assert corner_error(matches, pair) < 6
    exact = replace(
        pair,
        second=replace(pair.second, points=project(pair.homography, pair.first.points)[: len(pair.second)]),
    )
    same = np.where(np.arange(len(pair.first)) < len(exact.second.points), np.arange(len(pair.first)), -1)
    assert corner_error(same, exact) < 1e-6
    few = np.full(len(pair.first), -1)
    few[:3] = [0, 1, 2]
    assert corner_error(few, pair) == float("inf")


def test_row_errors_are_those_of_keypoints_only(pair):
    batch = collate([pair])
    scores = 50 * batch.descriptors[0] @ batch.descriptors[1].mT
    solved_ = couple(scores, torch.tensor(40.0), batch, "transport", None)
    swept = couple(scores, torch.tensor(40.0), batch, "transport", 3)
    assert row_error(solved_, batch.masks[0]) < 1e-5
    sums = swept[0].exp().sum(-1)[: len(pair.first)]
    assert row_error(swept, batch.masks[0]) == pytest.approx(float((sums - 1).abs().max()), rel=1e-4)


def test_certified_plans_are_what_many_sweeps_come_to(pair):
    batch = double(collate([pair]))
    scores, bins = matcher()(batch)
    exact = couple(scores, bins, batch, "transport", None)
    swept = couple(scores, bins, batch, "transport", 2000)
    torch.testing.assert_close(exact.exp(), swept.exp(), atol=1e-8, rtol=0)


# ------------------------------------------------------------------------------------------------------- the training


def test_training_learns_to_tell_matches(tmp_path):
    plan = replace(SMALL, training=Training(epochs=3, steps=4, pairs=2))
    history = train(
        VARIANTS["transport"], plan, 0, tmp_path, device=torch.device("cpu"), identity="x"
    ).history
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("name", ["transport", "dual-softmax"])
def test_a_training_that_was_interrupted_ends_the_same(tmp_path, name):
    def go(directory, after_epoch=lambda done: None):
        directory.mkdir(exist_ok=True)
        return train(
            VARIANTS[name],
            SMALL,
            0,
            directory,
            device=torch.device("cpu"),
            identity="x",
            after_epoch=after_epoch,
        )

    def stop(done):
        raise KeyboardInterrupt

    model, history = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "halves", stop)
    again, resumed = go(tmp_path / "halves")
    assert resumed == history
    for label, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[label]), label


def test_variants_begin_with_the_same_weights():
    first, *rest = (build(VARIANTS[name], SMALL, 0).state_dict() for name in VARIANTS)
    for other in rest:
        assert all(torch.equal(first[name], other[name]) for name in first if name != "likeness")


def test_training_views_are_of_training_photographs():
    found = matching_training.training_views(2, 24, 0)
    assert set(found) <= set(PHOTOGRAPHS["train"])
    assert all(len(view.features) >= matching_training.FEWEST for views in found.values() for view in views)


# ------------------------------------------------------------------------------------------------------ the experiment


def test_the_page_shows_what_was_found(finished):
    page = (finished / "matching.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # three pairs, twice each
    for label in (*matching.UNLEARNED.values(), VARIANTS["transport"].label, "AUC at 5 px"):
        assert label in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL), re.IGNORECASE)
    assert "Not trained in this preset: 100 unrolled Sinkhorn sweeps and dual softmax." in page


def test_figures_are_shares(finished):
    found = results(finished)
    units = [*found["unlearned"].values(), *(unit for units in found["trained"].values() for unit in units)]
    for unit in units:
        for kind in matching.SETS:
            for what in ("precision", "recall", "f1", "score"):
                assert 0 <= unit[kind][what] <= 1
    assert (
        found["unlearned"]["nearest"]["photographs"]["recall"]
        >= found["unlearned"]["ratio"]["photographs"]["recall"]
    )
    assert found["trained"]["transport"][0]["row_error"] < 1e-4
    assert len(found["pictured"]) == 3


def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    small(monkeypatch)
    out = tmp_path / "report"
    arguments = ["reproduce", "matching", "--preset", "smoke", "--out", str(out)]
    calls = []
    advance = Screen.advance

    def interrupted(self, steps, what):
        calls.append(what)
        advance(self, steps, what)
        if len([call for call in calls if "sweeps" in call]) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "advance", interrupted)
    assert run(arguments) == 130
    monkeypatch.setattr(Screen, "advance", advance)
    assert run([*arguments, "--resume"]) == 0
    assert timeless(out) == timeless(finished)


def with_f1(result, photographs_, stereo):
    """``result`` with these F1 of the matcher trained through transport, and 0.8 for the ratio test."""
    changed = copy.deepcopy(result)
    unit = changed["trained"]["transport"][0]
    changed["seeds"] = list(range(len(stereo)))
    for name in changed["trained"]:
        changed["trained"][name] = [copy.deepcopy(unit) for _ in stereo]
    for unit, one, two in zip(changed["trained"]["transport"], photographs_, stereo, strict=True):
        unit["photographs"]["f1"], unit["stereo"]["f1"] = one, two
    for kind in matching.SETS:
        changed["unlearned"]["ratio"][kind]["f1"] = 0.8
    return changed


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ([0.9], [0.7], "One seed decides nothing"),
        ([0.9, 0.91, 0.92], [0.85, 0.86, 0.87], "clearly higher on the stereo pair (3 of 3 seeds)"),
        ([0.9, 0.91, 0.92], [0.7, 0.71, 0.72], "clearly lower on the stereo pair (0 of 3 seeds)"),
        ([0.7, 0.9, 0.8], [0.7, 0.71, 0.72], "not clearly different on held-out photographs (1 of 3 seeds)"),
    ],
)
def test_the_sentence_follows_the_numbers(finished, one, two, said):
    found = with_f1(results(finished), one, two)
    assert said in " ".join(block.text for block in matching._meaning(found))
    assert matching.blocks(found)


def test_the_experiments_are_found():
    known = discover()
    assert known["matching"].by_default
    assert not known["matching-search"].by_default
    assert {plan.training.rate for plan in PLANS.values()} <= set(RATES)
    assert len(PLANS["full"].variants) == len(VARIANTS)
    assert PLANS["full"].seeds >= 3
