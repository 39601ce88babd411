"""Retrieval: no leak between parts, ranks by another way, an encoder that padding cannot touch, a run that resumes."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from couplings_experiments import checkpoint, retrieval_index
from couplings_experiments.app import run
from couplings_experiments.data import docstrings
from couplings_experiments.data.docstrings import Entry, entries, part_of, split, words
from couplings_experiments.experiment import discover
from couplings_experiments.experiments import retrieval
from couplings_experiments.experiments.retrieval_search import trials
from couplings_experiments.progress import Screen
from couplings_experiments.retrieval_methods import (
    Encoded,
    Variant,
    _retrieved,
    all_scores,
    bm25,
    interval,
    measure,
    ranks,
    training_scores,
)
from couplings_experiments.retrieval_model import Encoder, Lexicon, Shape, pieces, pooled
from couplings_experiments.retrieval_training import PLANS, VARIANTS, build, corpus, schedule, train

PLAN = PLANS["smoke"]
SHAPE = Shape(16, 2, 2**8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete smoke run, made in this process."""
    out = tmp_path_factory.mktemp("retrieval") / "report"
    assert run(["reproduce", "retrieval", "--preset", "smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def data():
    return corpus(PLAN.packages, PLAN.training.limit)


def results(out):
    return json.loads((out / "results.json").read_text())["experiments"]["retrieval"]


def timeless(out):
    found = results(out)
    for units in found["trained"].values():
        for unit in units:
            del unit["seconds"]
    del found["seconds"]
    return found


def one_line(text):
    assert text.count("\n") == 1, text
    return text


# ------------------------------------------------------------------------------------------------------------ the texts


def test_words_take_identifiers_apart():
    assert words("HTMLParser reads snake_case x 42 and matMul") == [
        "html", "parser", "reads", "snake", "case", "and", "mat", "mul"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "query", "body"),
    [
        ("Sum of all. More\nof it.\n\nRest.", "Sum of all", "More of it.\n\nRest."),
        ("name(a, b)\n\nSum of all.\n\nRest.", "Sum of all", "Rest."),
        ("name(a) -> int\n\nSum", "Sum", ""),
        ("y = np.name(a)\nSum of\nall\n\nRest.", "Sum of all", "Rest."),
        ("Sums, e.g. of 2.5 and 3. More.", "Sums, e.g. of 2.5 and 3", "More."),
        ("name(a)", "", ""),
    ],
)
def test_the_summary_is_taken_off(text, query, body):
    assert docstrings._parts_of(text, "name") == (query, body)


def test_texts_do_not_quote_their_questions(data):
    for entry in (entry for found in data.parts.values() for entry in found):
        asked, told = words(entry.query), words(entry.body)
        windows = [told[i : i + len(asked)] for i in range(len(told))]
        assert asked not in windows, entry.name
        assert 4 <= len(asked) <= 24
        assert len(told) >= 20


def test_modules_are_in_one_part_and_no_text_occurs_twice(data):
    modules = [
        entry.module for found in data.parts.values() for entry in {e.module: e for e in found}.values()
    ]
    assert len(modules) == len(set(modules))
    found = [entry for part in data.parts.values() for entry in part]
    assert all(part_of(entry.module) == name for name, part in data.parts.items() for entry in part)
    questions = Counter(tuple(words(entry.query)) for entry in found)
    assert max(questions.values()) == 1
    # likeness of all pairs, one after the other, by word sequences themselves and not by their hashes
    sets = [
        {tuple(told[i : i + 4]) for i in range(len(told) - 3)}
        for told in (words(entry.body) for entry in found[::2])
    ]
    alike = [
        (i, j)
        for i in range(len(sets))
        for j in range(i)
        if len(sets[i] & sets[j]) > 0.8 * len(sets[i] | sets[j])
    ]
    assert not alike


def test_near_repetitions_are_dropped_and_others_kept():
    body = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    nearly = body.replace("wordca", "other")
    another = " ".join(reversed(body.split()))
    found = [
        Entry(f"p.m.{i}", "p.m", f"question number {'abcd'[i] * 3}", text)
        for i, text in enumerate((body, nearly, another, body + " " + another))
    ]
    again = Entry("p.m.z", "p.m", found[0].query, " ".join(["something", "else"] * 30))
    assert [entry.name for entry in docstrings._distinct([*found, again])] == ["p.m.0", "p.m.2", "p.m.3"]


def test_files_are_parsed_and_never_imported(tmp_path, monkeypatch):
    package = tmp_path / "trapped"
    (package / "sub" / "tests").mkdir(parents=True)
    text = " ".join(f"body{'abcdefghij'[i % 10]}{'klm'[i // 10]}" for i in range(30))
    source = (
        "raise SystemExit('imported')\n"
        f'def shown(x):\n    r"""Tell what is shown here.\n\n    {text} \\d\n    """\n'
        f'def _hidden(x):\n    """Tell what is hidden here.\n\n    {text}\n    """\n'
        "class Thing:\n    def method(self):\n"
        f'        """Tell what methods do here.\n\n        {text[::-1]}\n        """\n'
    )
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "sub" / "code.py").write_text(source)
    (package / "sub" / "broken.py").write_text("def (")
    (package / "sub" / "tests" / "test_code.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = entries(("trapped", "not_installed_anywhere"))
    assert [entry.name for entry in found] == ["trapped.sub.code.Thing.method", "trapped.sub.code.shown"]
    assert {entry.module for entry in found} == {"trapped.sub"}
    assert found[1].query == "Tell what is shown here"


def test_the_texts_do_not_depend_on_the_process():
    code = (
        "from couplings_experiments.data.docstrings import entries, fingerprint; "
        "print(fingerprint(entries(('skimage',))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == docstrings.fingerprint(entries(("skimage",)))


def test_parts_have_sizes_that_can_be_used():
    shares = Counter(part_of(f"package.module{i}") for i in range(3000))
    assert abs(shares["train"] - 2100) < 120
    assert abs(shares["test"] - 600) < 90
    assert sum(map(len, split(entries(("skimage",))).values())) == len(entries(("skimage",)))


# ---------------------------------------------------------------------------------------------------------- the encoder


def made(seed=0):
    torch.manual_seed(seed)
    return Encoder(SHAPE).double().eval()


def test_vectors_are_unit_and_padding_cannot_touch_them():
    model, lexicon = made(), Lexicon()
    both = lexicon.read(["find the corners of an image", "sort an array"], 10)
    alone = lexicon.read(["sort an array"], 10)
    vectors, single = model(both, lexicon), model(alone, lexicon)
    assert torch.allclose(vectors.norm(dim=-1), both.mask.double())
    assert torch.allclose(vectors[1, :3], single[0], atol=1e-12)
    assert torch.allclose(pooled(vectors)[1:], pooled(single), atol=1e-12)


def test_a_word_is_itself_in_every_lexicon():
    model, one, two = made(), Lexicon(), Lexicon()
    two.read(["quite other words"], 10)
    text = "sort an array"
    assert torch.equal(model(one.read([text], 9), one), model(two.read([text], 9), two))


def test_words_are_cut_into_letters():
    whole, letters = pieces("sort", 2**8)
    assert 0 <= whole < 2**7 <= min(letters) <= max(letters) < 2**8
    assert len(letters) == 7  # <so sor ort rt> <sor sort ort>
    assert pieces("sorts", 2**20)[1] != pieces("sort", 2**20)[1]
    assert set(pieces("sorts", 2**20)[1]) & set(pieces("sort", 2**20)[1])


# ----------------------------------------------------------------------------------------------------------- the scores


def random_sides():
    g = torch.Generator().manual_seed(3)
    lengths = (5, [3, 5, 1]), (7, [7, 2, 4, 6])
    sides = []
    for longest, counts in lengths:
        mask = torch.arange(longest) < torch.tensor(counts).unsqueeze(1)
        vectors = torch.randn(len(counts), longest, 6, generator=g, dtype=torch.float64)
        vectors = torch.nn.functional.normalize(vectors, dim=-1) * mask.unsqueeze(-1)
        sides.append(Encoded(vectors, mask))
    return sides


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_against_loops(name):
    asked, told = random_sides()
    variant = Variant("x", VARIANTS[name].kind, 1e-3, 0.05, (0.1,) if name == "smooth" else (6, 4), 1.0)
    found = training_scores(variant, asked, told)
    every = [d for j in range(4) for d in told.vectors[j][told.mask[j]]]
    for i in range(3):
        for j in range(4):
            q, d = asked.vectors[i][asked.mask[i]], told.vectors[j][told.mask[j]]
            if name == "single":
                expected = float(torch.cosine_similarity(q.sum(0), d.sum(0), dim=0))
            elif name == "smooth":
                expected = np.mean([0.1 * math.log(sum(math.exp(float(a @ b) / 0.1) for b in d)) for a in q])
            elif name == "xtr":
                least = [sorted((float(a @ b) for b in every), reverse=True)[5] for a in q]
                best = [max(float(a @ b) for b in d) for a in q]
                hits = [b for b, low in zip(best, least, strict=True) if b >= low - 1e-12]
                expected = sum(hits) / max(len(hits), 1)
            else:
                expected = np.mean([max(float(a @ b) for b in d) for a in q])
            assert found[i, j].item() == pytest.approx(expected, abs=1e-9), (i, j)


@pytest.mark.parametrize("count", [1, 4, 19, 100])
def test_what_was_not_retrieved_counts_as_the_last_that_was(count):
    asked, told = random_sides()
    parts = [Encoded(told.vectors[:2], told.mask[:2]), Encoded(told.vectors[2:], told.mask[2:])]
    found = _retrieved(asked, parts, count)
    for i in range(3):
        shares = np.zeros((int(asked.mask[i].sum()), 4))
        for a, q in enumerate(asked.vectors[i][asked.mask[i]]):
            hits = sorted(
                ((float(q @ d), j) for j in range(4) for d in told.vectors[j][told.mask[j]]), reverse=True
            )[:count]
            shares[a] = hits[-1][0]
            for value, j in reversed(hits):
                shares[a, j] = value
        assert np.allclose(found[i].numpy(), shares.mean(0), atol=1e-12)


def test_bm25_against_its_formula():
    texts = ["apple banana apple cherry", "banana date", "cherry cherry cherry date egg fig"]
    found = [Entry(str(i), "m", q, t) for i, (q, t) in enumerate(zip(["apple", "date fig", "egg"], texts))]
    k1, b = 1.5, 0.75
    scores = bm25(found, None, k1, b)
    split_texts = [text.split() for text in texts]
    mean = np.mean([len(text) for text in split_texts])
    for i, entry in enumerate(found):
        for j, text in enumerate(split_texts):
            expected = 0.0
            for word in entry.query.split():
                holding = sum(word in other for other in split_texts)
                idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
                count = text.count(word)
                expected += idf * count / (count + k1 * (1 - b + b * len(text) / mean))
            assert scores[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_ranks_and_measures():
    scores = torch.tensor([[3.0, 2.0, 1.0], [5.0, 4.0, 4.0], [1.0, 2.0, 0.0]])
    found = ranks(scores)
    assert found.tolist() == [1, 2.5, 3]
    assert measure(np.array([1.0, 2.0, 10.0, 11.0])) == pytest.approx(
        {"MRR@10": 1.6 / 4, "Recall@1": 0.25, "Recall@10": 0.75, "Recall@100": 1.0}
    )


def test_the_interval_is_that_of_a_mean():
    values = (np.random.default_rng(1).random(400) < 0.3).astype(float)
    low, high = interval(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.01)


# --------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_and_starts_alike(tmp_path, data, name):
    trained = train(VARIANTS[name], PLAN, 0, tmp_path, device=torch.device("cpu"), identity=name)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    start = build(PLAN, 0)
    scores = [
        all_scores(VARIANTS[name], model, data.lexicon, data.questions["train"], data.texts["train"])
        for model in (start, trained.model)
    ]
    first, last = (float(np.mean(1 / ranks(found))) for found in scores)
    assert last > first


@pytest.mark.parametrize("name", ["maxsim", "single"])
def test_a_training_that_was_interrupted_ends_the_same(tmp_path, name):
    def go(directory, after_epoch=lambda done: None):
        directory.mkdir(exist_ok=True)
        cpu = torch.device("cpu")
        return train(VARIANTS[name], PLAN, 0, directory, device=cpu, identity="x", after_epoch=after_epoch)

    def stop(done):
        raise KeyboardInterrupt

    model, history = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "halves", stop)
    again, resumed = go(tmp_path / "halves")
    assert resumed == history
    for label, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[label]), label


def test_the_rate_rises_and_falls():
    shares = [schedule(number, 100) for number in range(100)]
    assert shares.index(max(shares)) == 9
    assert 0 < shares[-1] < 0.02


# ------------------------------------------------------------------------------------------------------- the experiment


def test_the_page_shows_what_was_found(finished):
    page = (finished / "retrieval.html").read_text()
    for label in ("BM25", *(VARIANTS[name].label for name in PLAN.variants), "Recall@100", "Where BM25 wins"):
        assert label in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    assert "Not trained in this preset: smooth MaxSim and XTR-style." in page


def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    out = tmp_path / "report"
    arguments = ["reproduce", "retrieval", "--preset", "smoke", "--out", str(out)]
    advance = Screen.advance

    def interrupted(self, steps, what):
        advance(self, steps, what)
        if "single" in what:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "advance", interrupted)
    assert run(arguments) == 130
    monkeypatch.setattr(Screen, "advance", advance)
    assert run([*arguments, "--resume"]) == 0
    assert timeless(out) == timeless(finished)
    assert (out / "retrieval" / "model.safetensors").exists()


def with_ranks(result, mine, twin, counted):
    """``result`` with these ranks of the first two questions, one list for each seed."""
    changed = copy.deepcopy(result)
    changed["seeds"] = list(range(len(mine)))
    for name, found in (("maxsim", mine), ("single", twin)):
        unit = changed["trained"][name][0]
        changed["trained"][name] = [{**unit, "ranks": ranks_} for ranks_ in found]
    for found in changed["methods"].values():
        found["ranks"] = counted
    half = len(counted) // 2
    changed["groups"] = {
        "shares": [0.0, 0.5] * half,
        "unseen": [0.0, 1.0] * half,
        "lengths": [30.0, 200.0] * half,
    }
    return changed


@pytest.mark.parametrize(
    ("mine", "twin", "counted", "said"),
    [
        ([[1] * 8], [[2] * 8], [1] * 8, "One seed decides nothing"),
        ([[1] * 8] * 3, [[2] * 8] * 3, [4] * 8, "clearly higher (3 of 3 seeds)"),
        ([[1] * 8] * 3, [[2] * 8] * 3, [4] * 8, "late interaction is better"),
        ([[2] * 8] * 3, [[1] * 8] * 3, [1] * 8, "clearly lower (0 of 3 seeds)"),
        ([[2] * 8] * 3, [[1] * 8] * 3, [1] * 8, "BM25 is better"),
        ([[1, 2] * 4] * 3, [[2, 1] * 4] * 3, [1, 2] * 4, "not clearly different (0 of 3 seeds)"),
    ],
)
def test_the_sentence_follows_the_numbers(finished, mine, twin, counted, said):
    found = with_ranks(results(finished), mine, twin, counted)
    assert said in " ".join(block.text for block in retrieval._meaning(found))
    assert retrieval.blocks(found)


def test_the_experiments_are_found():
    known = discover()
    assert known["retrieval"].by_default
    assert not known["retrieval-search"].by_default
    assert PLANS["full"].seeds >= 3
    assert len(PLANS["full"].variants) == len(VARIANTS)
    assert all(VARIANTS[name] in trials(name) for name in VARIANTS)


# ----------------------------------------------------------------------------------------------------- couplings search


def test_search_finds_what_is_asked_for(finished, capsys):
    kept = json.loads((finished / "retrieval" / "docstrings.json").read_text())["entries"]
    answers = retrieval_index.search(finished, kept[3]["query"], 5)
    assert kept[3]["name"] in [answer.entry.name for answer in answers]
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    assert run(["search", "threshold", "an", "image", "--out", str(finished), "-n", "3"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 3
    assert all(re.match(r"-?\d\.\d{3}  skimage\.", line) for line in lines)


def test_search_says_what_is_missing(finished, tmp_path, capsys):
    assert run(["search", "sort", "--out", str(tmp_path)]) == 1
    assert "couplings reproduce retrieval --out" in one_line(capsys.readouterr().err)
    assert run(["search", "4 + 4", "--out", str(finished)]) == 1
    assert "nothing to look for" in one_line(capsys.readouterr().err)
    (tmp_path / "retrieval").mkdir()
    for name in ("model.safetensors", "docstrings.json", "words.safetensors"):
        content = (finished / "retrieval" / name).read_bytes()
        (tmp_path / "retrieval" / name).write_bytes(content if name != "model.safetensors" else content[:100])
    assert run(["search", "sort", "--out", str(tmp_path)]) == 1
    assert "damaged" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["model.safetensors", "docstrings.json", "words.safetensors"])
def test_search_notices_a_flipped_bit(finished, tmp_path, capsys, name):
    shutil.copytree(finished / "retrieval", tmp_path / "retrieval")
    path = tmp_path / "retrieval" / name
    content = bytearray(path.read_bytes())
    content[2 * len(content) // 3] ^= 1
    path.write_bytes(content)
    assert run(["search", "sort", "--out", str(tmp_path)]) == 1
    said = one_line(capsys.readouterr().err)
    assert f"{path} " in said
    assert "couplings reproduce retrieval --out" in said


def test_search_notices_files_of_two_runs(finished, tmp_path, capsys):
    shutil.copytree(finished / "retrieval", tmp_path / "retrieval")
    path = tmp_path / "retrieval" / "model.safetensors"
    weights, made = checkpoint.read_tensors(path)
    other = {name: weight + 1 for name, weight in weights.items()}
    checkpoint.write_tensors(path, other, {**made, "model": checkpoint.fingerprint(other)})
    assert run(["search", "sort", "--out", str(tmp_path)]) == 1
    assert "holds files of several runs" in one_line(capsys.readouterr().err)
