"""Translating names of numbers: honest data, networks that agree with a plain computation, a run that resumes."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

import couplings as cp
from couplings_experiments import translation_command, translation_training
from couplings_experiments.app import run
from couplings_experiments.data.numbers import (
    END,
    LANGUAGES,
    LONGEST,
    SPECIAL,
    START,
    Vocabulary,
    corpus,
    name,
)
from couplings_experiments.experiments import translation
from couplings_experiments.progress import Screen
from couplings_experiments.report.page import pages
from couplings_experiments.translation_model import AdditiveAttention
from couplings_experiments.translation_training import (
    BEAM,
    BEAM_EPSILON,
    NETWORKS,
    PLANS,
    RHO,
    ROWS,
    Plan,
    attention,
    beams,
    build,
    collate,
    fit,
    loss_of,
    phases,
    score,
    translations,
)

SMALL = Plan(1, 48, 6, 2, 1, ("lstm", "lstm-beam", "lstm-topk", "transformer", "transformer-topk"), width=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return corpus("fr", 48, 6, 0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PLANS, "smoke", SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete smoke run, made in this process."""
    out = tmp_path_factory.mktemp("translation") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANS, "smoke", SMALL)
        assert run(["reproduce", "translation", "--preset", "smoke", "--out", str(out)]) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def timeless(out):
    result = results(out)["experiments"]["translation"]
    for units in (*result["first"].values(), *result["rows"].values()):
        for unit in units:
            unit.pop("seconds")
    return result


def model_of(network, data, seed=0):
    return build(network, data, SMALL, seed).double()


# ------------------------------------------------------------------------------------------------------------ data


def test_names_are_words():
    assert name(97, "fr") == ("quatre", "vingt", "dix", "sept")
    words = name(1234567, "en")
    assert " ".join(words) == "one million two hundred and thirty four thousand five hundred and sixty seven"


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_tests_is_unseen_and_every_word_is_known(language):
    found = [corpus(language, 60, 20, seed) for seed in (0, 1)]
    for one in found:
        parts = [one.train, one.validation, one.unseen, one.longer]
        numbers = [pair.number for part in parts for pair in part]
        assert len(set(numbers)) == len(numbers) == 60 + 3 * 20
        assert all(len(pair.source) <= LONGEST for part in parts[:3] for pair in part)
        assert all(len(pair.source) > LONGEST for pair in one.longer)
        for pair in (pair for part in parts for pair in part):
            assert one.source.decode(one.source.encode(pair.source)) == pair.source
            assert one.target.decode(one.target.encode(pair.target)) == pair.target
    assert found[0].unseen == found[1].unseen
    assert found[0].longer == found[1].longer
    assert found[0].train != found[1].train


def test_the_vocabulary():
    vocabulary = Vocabulary.of([("b", "a"), ("a",)])
    assert vocabulary.words == (*SPECIAL, "a", "b")
    assert vocabulary.encode(("b", "a")) == [4, 3, END]
    assert vocabulary.decode([3, 4, END, 3]) == ("a", "b")


# -------------------------------------------------------------------------------------------------------- networks


def test_additive_attention_is_softmax_of_scores_plus_log_of_the_mask():
    rows, sources, k, epsilon = 5, 7, 3, 0.4
    layer = AdditiveAttention(4, 6, 6, k, epsilon).double()
    query, keys = torch.randn(rows, 4).double(), torch.randn(rows, sources, 6).double()
    visible = torch.arange(sources) < torch.tensor([7, 6, 5, 4, 2]).unsqueeze(-1)
    weights = layer(query, keys, visible)
    scores = layer.score(torch.tanh(layer.query(query).unsqueeze(1) + keys)).squeeze(-1)
    for row in range(rows):
        s = scores[row][visible[row]]
        if len(s) <= k:
            expected = s.softmax(-1)
        else:
            standard = s / s.std(correction=0)
            low, high = standard.min() * 2 - 40, standard.max() * 2 + 40
            for _ in range(200):  # bisection for the threshold at which the indicators sum to k
                middle = (low + high) / 2
                high, low = (
                    (high, middle)
                    if torch.sigmoid((2 * standard - middle) / epsilon).sum() > k
                    else (middle, low)
                )
            expected = (s + torch.nn.functional.logsigmoid((2 * standard - low) / epsilon)).softmax(-1)
        torch.testing.assert_close(weights[row][visible[row]], expected, rtol=1e-7, atol=1e-9)
        assert (weights[row][~visible[row]] == 0).all()


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_top_k_of_everything_is_ordinary_attention(kind, data, monkeypatch):
    batch = collate(data.train[:5], data, CPU)
    everything = replace(NETWORKS[f"{kind}-topk"], topk=99)
    monkeypatch.setitem(NETWORKS, f"{kind}-topk", everything)
    plain, selected = (
        loss_of(model_of(network, data), batch, beam=False) for network in (kind, f"{kind}-topk")
    )
    assert torch.allclose(plain, selected, rtol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_forced_loss_is_that_of_every_sentence_alone_and_step_by_step(network, data):
    model = model_of(network, data)
    pairs = data.train[:4]
    batch = collate(pairs, data, CPU)
    together = loss_of(model, batch, beam=False)
    alone = []
    for pair in pairs:
        one = collate([pair], data, CPU)
        step, state = model.begin(one.source)
        # the transformer's own loss takes all steps at once
        alone.append(cp.beam.teacher_forcing_loss(step, model.embeddings, state, one.gold, start=START))
    assert torch.allclose(together, torch.stack(alone).mean(), rtol=1e-9)


def test_the_mixture_is_the_papers(data):
    model = model_of("lstm-topk", data)
    batch = collate(data.train[:3], data, CPU)
    step, state = model.begin(batch.source)
    soft = cp.beam.soft_beam_loss(
        step,
        model.embeddings,
        state,
        batch.gold,
        start=START,
        lengths=batch.lengths,
        beam=BEAM,
        epsilon=BEAM_EPSILON,
    )
    mixture = loss_of(model, batch, beam=True)
    assert torch.allclose(mixture, RHO * loss_of(model, batch, beam=False) + (1 - RHO) * soft)
    mixture.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("network", ["lstm-topk", "transformer-topk"])
def test_the_beam_is_sorted_and_its_likelihoods_are_those_of_the_words(network, data):
    model = model_of(network, data)
    sources = [pair.source for pair in data.train[:3]]
    for source, found in zip(sources, beams(model, data, sources, beam=4), strict=True):
        scores = [hypothesis.log_likelihood for hypothesis in found]
        assert scores == sorted(scores, reverse=True)
        for words, log_likelihood in found:
            tokens = [data.target.words.index(word) for word in words]
            step, state = model.begin(torch.tensor([data.source.encode(source)]))
            longest = max(len(p.target) for part in (data.train, data.unseen, data.longer) for p in part)
            gold = [*tokens, END][: longest + translation_training._SLACK]
            with torch.no_grad():
                loss = cp.beam.teacher_forcing_loss(
                    step, model.embeddings, state, torch.tensor([gold]), start=START
                )
            assert float(loss) == pytest.approx(-log_likelihood, rel=1e-6)


def test_attention_is_a_distribution_for_every_word(data):
    pair = data.longer[0]
    for network in NETWORKS:
        weights = attention(build(network, data, SMALL, 0), data, pair.source, pair.target)
        assert len(weights) == len(pair.target) + 1
        assert all(len(row) == len(pair.source) + 1 for row in weights)
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in weights)


def test_the_measures_at_both_ends(data):
    right = [pair.target for pair in data.longer]
    assert score(right, data.longer) == pytest.approx({"bleu": 100, "chrf": 100, "exact": 1})
    wrong = score([("x",)] * len(right), data.longer)
    assert wrong["exact"] == 0
    assert wrong["bleu"] < 1


# -------------------------------------------------------------------------------------------------------- training


def test_all_rows_of_a_plan_take_as_many_steps():
    for plan in PLANS.values():
        assert len({tuple(p.epochs for p in phases(ROWS[row], plan)) for row in plan.rows}) == 1
    for without, with_ in translation.PAIRS["beam"]:
        before, after = (phases(ROWS[row], SMALL) for row in (without, with_))
        assert before[0] == after[0]
        assert before[1] == after[1]._replace(beam=False)


def test_a_little_training_learns_a_little_language(tmp_path):
    data = corpus("fr", 48, 6, 0)
    small = replace(data, train=data.train[:12], validation=data.train[:12])
    plan = replace(SMALL, width=48, batch=12, first=40)
    model = build("lstm", small, plan, 0)
    history = fit(
        model, phases(ROWS["lstm"], plan)[0]._replace(rate=2e-2), small, plan, 0, tmp_path, identity="x"
    )
    assert history[-1]["validation"] > 0.9
    assert score(translations(model, small, small.train), small.train)["exact"] > 0.9


# ------------------------------------------------------------------------------------------------------ end to end


def test_a_smoke_run(finished):
    result = results(finished)["experiments"]["translation"]
    assert set(result["rows"]) == set(SMALL.rows)
    assert set(result["maps"]) == {"lstm", "lstm-topk", "transformer", "transformer-topk"}
    for units in result["rows"].values():
        for unit in units:
            for test in ("unseen", "longer"):
                assert 0 <= unit[test]["exact"] <= 1
                assert 0 <= unit[test]["bleu"] <= 100
    page = (finished / "translation.html").read_text()
    assert page.count("<svg") == 2
    for figure in ("35.38", "36.27", "36.54", "37.30"):
        assert figure in page


def test_struck_and_resumed_it_ends_with_the_same_numbers(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report"
    count = 0
    advance = Screen.advance

    def struck(self, steps, what):
        nonlocal count
        count += 1
        if count == 7:  # in the second phase, whose first one is read back
            raise KeyboardInterrupt
        advance(self, steps, what)

    with monkeypatch.context() as patch:
        patch.setattr(Screen, "advance", struck)
        assert run(["reproduce", "translation", "--preset", "smoke", "--out", str(out)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert run(["reproduce", "--out", str(out), "--resume"]) == 0
    assert timeless(out) == timeless(finished)


def test_another_language(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PLANS, "smoke", replace(SMALL, rows=("lstm",), first=1))
    arguments = ["reproduce", "translation", "--preset", "smoke", "--out", str(tmp_path / "o")]
    assert run([*arguments, "--language", "de"]) == 1
    assert "--language de is none of those" in capsys.readouterr().err
    assert run([*arguments, "--language", "es"]) == 0
    assert "--language es" in results(tmp_path / "o")["command"]
    page = (tmp_path / "o" / "translation.html").read_text()
    assert "English to es" in page
    assert "Whether soft beam helps was not tried in this preset" in page


def test_the_command_shows_the_beam_and_trains_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(translation_command, "PLAN", SMALL)
    arguments = ["translate", "--out", str(tmp_path), "--beam", "3"]
    assert run([*arguments, "Two hundred and five"]) == 0
    first = capsys.readouterr().out
    assert "two hundred and five" in first
    assert first.count("%") == 3
    newest = max((tmp_path / "translator-fr" / "second").glob("epoch-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert run([*arguments, "Two hundred and five"]) == 0  # its last epoch is trained again
    mended = capsys.readouterr().out
    assert f"{newest.name} of translate second is damaged and was passed over" in mended
    assert first.strip() in mended

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(translation_training, "loss_of", never)
    assert run([*arguments, "205"]) == 0
    again = capsys.readouterr().out
    assert again.startswith(first.rstrip("\n"))
    assert "num2words: deux cent cinq" in again


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("two dogs", "'dogs' is in no number's name"),
        ("?!", "nothing to translate"),
        ("1234567890", "billion"),
    ],
)
def test_what_cannot_be_translated_is_said_in_one_line(tmp_path, capsys, text, said):
    assert run(["translate", text, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ the report


def with_gains(result, idea, gains):
    """A finished result over three seeds in which ``idea`` changes everything by ``gains``, one for each seed."""
    changed = copy.deepcopy(result)
    changed["seeds"] = [0, 1, 2]
    for units in (*changed["first"].values(), *changed["rows"].values()):
        units.extend(copy.deepcopy(units[0]) for _ in range(2))
    for pair in translation.PAIRS[idea]:
        for without, with_ in (pair,) if set(pair) <= set(changed["rows"]) else ():
            for test in translation.TESTS:
                for seed, gain in enumerate(gains):
                    base = {"bleu": 50.0, "chrf": 60.0, "exact": 0.5}
                    changed["rows"][without][seed][test] = base
                    changed["rows"][with_][seed][test] = {
                        "bleu": 50 + gain,
                        "chrf": 60 + gain,
                        "exact": 0.5 + gain / 100,
                    }
    return changed


@pytest.mark.parametrize("idea", ["beam", "topk"])
@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((2.0, 2.1, 2.2), " helps for "),
        ((-2.0, -2.1, -2.2), " harms for "),
        ((2.0, -2.0, 0.5), " makes no clear difference (a null result) for "),
    ],
)
def test_the_report_says_plainly_whether_it_helps(finished, idea, gains, said):
    result = with_gains(results(finished)["experiments"]["translation"], idea, gains)
    text = translation._verdict(result, idea)
    assert said in text
    mean = f"{sum(gains) / 3:+.1f}".replace("-", "−")
    assert f"changes by {mean}" in text
    whole = {**results(finished), "experiments": {"translation": result}}
    assert said in pages(whole)["translation.html"]


def test_one_seed_decides_nothing(finished):
    result = results(finished)["experiments"]["translation"]
    for idea in ("beam", "topk"):
        assert "One seed decides nothing" in translation._verdict(result, idea)
    assert math.isfinite(result["rows"]["lstm"][0]["history"][0]["loss"])
