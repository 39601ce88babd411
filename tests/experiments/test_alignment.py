"""Alignment: the table of scenarios, starts that are what they say, a run that ends the same on one process or two."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import couplings as cp
from couplings_experiments import processes
from couplings_experiments.alignment_model import Shape, TwoEncoders, collapse, halves
from couplings_experiments.alignment_scenarios import scenarios
from couplings_experiments.alignment_training import (
    NOISY,
    PLANS,
    STARTS,
    VARIANTS,
    build,
    dataset,
    measure,
    objective,
    quieten,
    train,
    validation,
    views,
)
from couplings_experiments.app import run
from couplings_experiments.errors import UserError
from couplings_experiments.experiment import discover
from couplings_experiments.experiments import alignment
from couplings_experiments.experiments.alignment_search import trials
from couplings_experiments.progress import Screen

PLAN = PLANS["smoke"]
CPU = torch.device("cpu")
SMOKE = ["reproduce", "alignment", "--preset", "smoke"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete smoke run, made in this process."""
    out = tmp_path_factory.mktemp("alignment") / "report"
    assert run([*SMOKE, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def data():
    return dataset("digits", None, 0, PLAN.limit)


def results(out):
    return json.loads((out / "results.json").read_text())["experiments"]["alignment"]


def timeless(value):
    """``value`` without what depends on the clock."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key != "seconds"}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def close(found, wanted):
    """Equal, numbers that are no counts up to 1e-9."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, entry in wanted.items():
            close(found[key], entry)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    elif isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9)
    else:
        assert found == wanted


# -------------------------------------------------------------------------------------------------------- the scenarios


def test_the_scenarios_are_those_of_the_question():
    found = scenarios(100)
    assert found["collapsed"] == [1.0, 1.0, 0.0]
    for name in ("n-pairs", "info-nce", "clip"):
        same, opposite, random = found["losses"][name]["value"]
        assert [round(value, 4) for value in (same, opposite)] == [1.9459, 1.9459]
        assert abs(random - 1.736) < 1e-3
    for name, row in found["losses"].items():
        if name == "guard":
            assert row["value"] == [1.0, 1.0, 0.0]
            assert min(row["gradient"][:2]) > 1e-3
            assert row["gradient"][2] == 0
        else:
            assert max(row["gradient"][:2]) < 1e-13
    assert found["losses"]["nt-xent"]["value"][0] == pytest.approx(math.log(13))


# ------------------------------------------------------------------------------------------------------------ the model


def test_halves_are_halves():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    left, right = halves(images)
    assert torch.equal(torch.cat([x.reshape(2, 3, 4, 3) for x in (left, right)], -1), images)
    left, right = halves(images[..., :5])  # the middle column belongs to neither
    assert torch.equal(right.reshape(2, 3, 4, 2), images[..., 3:5])


def test_a_collapsed_start_is_collapsed_to_the_bit_and_healthy_elsewhere(data):
    held = validation(data, CPU)
    variant = VARIANTS["clip"]
    sound, fallen = (
        build(variant, STARTS[key], PLAN, held.left.shape[1], 0).double() for key in ("healthy", "collapsed")
    )
    left, right, _ = fallen(held.left, held.right)
    assert (left == left[0]).all()
    assert (right == left[0]).all()
    assert measure(fallen, held)["accuracy"] == [0.0, 0.0]  # ties are no finds
    assert not measure(sound, held)["collapsed"]
    for side in ("left", "right"):
        assert torch.equal(getattr(fallen, side)[0].weight, getattr(sound, side)[0].weight)


def test_accuracy_both_ways_by_brute_force(data):
    held = views(data, "test", CPU)
    model = TwoEncoders(held.left.shape[1], Shape(16, 8), {}).double()
    left, right, _ = model(held.left, held.right)
    cosine = torch.nn.functional.normalize(left) @ torch.nn.functional.normalize(right).T
    wanted = [
        (scores.argmax(1) == torch.arange(len(left))).double().mean().item() for scores in (cosine, cosine.T)
    ]
    assert measure(model, held)["accuracy"] == pytest.approx(wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_guard_has_a_gradient_at_collapse(data, name):
    seen = views(data, "train", CPU)
    variant = VARIANTS[name]
    for key, alive in (("collapsed", False), ("collapsed-guard", True)):
        model = build(variant, STARTS[key], PLAN, seen.left.shape[1], 0).double()
        objective(variant, STARTS[key], *model(seen.left, seen.right)).backward()
        quieten(model)
        last = model.left[-1].weight.grad
        assert bool((last != 0).any()) == alive
        if alive:
            # of unit vectors: nothing along the one that all are
            assert torch.linalg.matrix_rank(last) >= min(last.shape) - 1


def test_rounding_is_taken_for_nothing_and_only_rounding():
    model = TwoEncoders(4, Shape(8, 4), {"temperature": 0.5}).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    objective(VARIANTS["clip"], STARTS["healthy"], *model(x, x)).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    quieten(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, torch.where(before[name].abs() < 2e-11, 0, before[name])), name
    collapse(model)
    model.zero_grad()
    objective(VARIANTS["clip"], NOISY, *model(x, x)).backward()
    quieten(model)
    assert all((p.grad == 0).all() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- a training


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_a_training_that_was_interrupted_ends_the_same(tmp_path, data, name):
    def go(directory, after_epoch=lambda done: None):
        directory.mkdir(exist_ok=True)
        start = STARTS["collapsed-guard"]
        return train(
            VARIANTS[name], start, PLAN, data, 0, directory, device=CPU, identity="x", after_epoch=after_epoch
        )

    def stop(done):
        if (directory := tmp_path / "halves").exists() and len(list(directory.iterdir())) == 2:
            raise KeyboardInterrupt

    model, history = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "halves", stop)
    again, resumed = go(tmp_path / "halves")
    assert resumed == history
    for label, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[label]), label


def test_too_few_images_are_refused(tmp_path, data):
    few = dataset("digits", None, 0, 20)
    with pytest.raises(UserError, match="20 training images"):
        train(VARIANTS["clip"], STARTS["healthy"], PLAN, few, 0, tmp_path, device=CPU, identity="x")


# ------------------------------------------------------------------------------------------------------- the experiment


def test_the_page_shows_what_was_found(finished):
    page = (finished / "alignment.html").read_text() if (finished / "alignment.html").exists() else ""
    page += (finished / "index.html").read_text()
    for text in ("1.9459", "SigLIP", "collapsed, guard", "do not leave exact collapse", "One seed decides"):
        assert text in page, text
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))


def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    out = tmp_path / "report"
    advance = Screen.advance

    def interrupted(self, steps, what):
        advance(self, steps, what)
        if "SigLIP, collapsed" in what:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "advance", interrupted)
    assert run([*SMOKE, "--out", str(out)]) == 130
    monkeypatch.setattr(Screen, "advance", advance)
    assert run([*SMOKE, "--out", str(out), "--resume"]) == 0
    assert timeless(results(out)) == timeless(results(finished))


def with_found(result, found, collapsed=True):
    """``result`` with these shares found, by start, the same for every loss; one entry for each seed."""
    changed = copy.deepcopy(result)
    seeds = len(next(iter(found.values())))
    changed["seeds"] = list(range(seeds))
    changed["noisy"] *= seeds
    for units in changed["trained"].values():
        for key in units:
            units[key] = [copy.deepcopy(units[key][0]) for _ in range(seeds)]
            for unit, share in zip(units[key], found[key], strict=True):
                unit["test"]["accuracy"] = [share, share]
                if key == "collapsed":
                    for point in (*unit["history"], unit["test"]):
                        point["collapsed"] = collapsed
    return changed


@pytest.mark.parametrize(
    ("healthy", "guarded", "freed", "collapsed", "said"),
    [
        ([0.3], [0.3], [0.29], True, "One seed decides nothing"),
        ([0.3], [0.3], [0.29], True, "come within 2 points"),
        ([0.3], [0.3], [0.25], True, "CLIP ends 5.0 points below"),
        (
            [0.3, 0.31, 0.3],
            [0.3, 0.31, 0.3],
            [0.29] * 3,
            False,
            "Without the guard, CLIP, SigLIP and triplet left",
        ),
        (
            [0.3, 0.31, 0.3],
            [0.2, 0.21, 0.2],
            [0.29] * 3,
            True,
            "-10.0 points in the mean, and clearly harms CLIP, SigLIP and triplet",
        ),
        ([0.3, 0.31, 0.3], [0.3, 0.31, 0.3], [0.29] * 3, True, "the guard changes +0.0 points in the mean."),
    ],
)
def test_the_sentences_follow_the_numbers(finished, healthy, guarded, freed, collapsed, said):
    shares = {
        "healthy": healthy,
        "healthy-guard": guarded,
        "collapsed": [0.0] * len(healthy),
        "collapsed-guard": freed,
    }
    found = with_found(results(finished), shares, collapsed)
    assert said in " ".join(block.text for block in alignment._meaning(found))
    assert alignment.blocks(found)
    assert alignment.headline(found).ours == f"{freed[0]:.1%}"


def test_the_experiments_are_found():
    known = discover()
    assert known["alignment"].by_default
    assert known["alignment"].distributed
    assert not known["alignment-search"].by_default
    assert PLANS["full"].seeds >= 3
    assert set(PLANS["full"].variants) == set(VARIANTS)
    for name, variant in VARIANTS.items():
        assert ("healthy", variant) in trials(name)
        assert ("collapsed-guard", variant) in trials(name)
        assert callable(getattr(cp.losses, variant.loss))


# ---------------------------------------------------------------------------------------------------- several processes

DYING = """
import os, signal
from couplings_experiments.cli import main
from couplings_experiments.epochs import Epochs

close = Epochs.close

def dying(self, measured):
    close(self, measured)
    if os.environ["RANK"] == os.environ["DIES"] and self._identity.startswith("SigLIP, collapsed"):
        os.kill(os.getpid(), signal.SIGKILL)

Epochs.close = dying
main()
"""


def torchrun(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("dies", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_two_processes_one_of_which_dies_end_as_one(finished, tmp_path, dies):
    """The same table as in one process; and a rank that is killed costs nothing but the time."""
    script, out = tmp_path / "dying.py", tmp_path / "report"
    script.write_text(DYING)
    ended = torchrun(str(script), *SMOKE, "--out", str(out), DIES=dies)
    assert ended.returncode != 0
    assert ended.stderr.count("couplings:") == 1
    assert f"couplings: {processes.LOST}\n" in ended.stderr
    assert not (out / "results.json").exists()
    assert list(out.glob("work/alignment/clip-*.json"))
    again = torchrun("-m", "couplings_experiments", *SMOKE, "--out", str(out), "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("continuing the run") == 1  # one process speaks
    assert again.stdout.count("Wrote ") == 1
    found, wanted = (timeless(results(place)) for place in (out, finished))
    for one in (found, wanted):
        del one["noisy"]  # rounding, by intention
    close(found, wanted)
    assert [p.name for p in out.rglob("*.tmp")] == []


@pytest.mark.slow
def test_what_is_not_shared_runs_on_rank_0_with_a_word(tmp_path):
    out = tmp_path / "report"
    ended = torchrun(
        "-m", "couplings_experiments", "reproduce", "knn", "alignment", "--preset", "smoke", "--out", str(out)
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("knn is not shared among processes: rank 0 runs it, the others wait") == 1
    assert set(json.loads((out / "results.json").read_text())["experiments"]) == {"knn", "alignment"}


def test_alone_everything_is_mine():
    alone = processes.ALONE
    rows = torch.arange(5)
    assert alone.first
    assert torch.equal(alone.mine(rows), rows)
    assert torch.equal(alone.mean(rows.double()), rows.double())
    assert alone.share(lambda: 3) == 3
    assert alone.device("cuda:1") == torch.device("cuda:1")
    parts = [processes.Processes(rank, 3).mine(rows).tolist() for rank in range(3)]
    assert [row for part in parts for row in part] == rows.tolist()
    assert processes.Processes(2, 3, 2).device("cuda") == torch.device("cuda:2")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("mps", "cannot be shared by processes"),
        ("cuda:1", "Say --device cuda"),
        ("cuda", "64 processes, but"),
    ],
)
def test_devices_that_processes_cannot_share(monkeypatch, device, said):
    for name, value in {"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "64", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match=re.escape(said)), processes.joined(device):
        pass


BLOCKED = """
import hashlib, os, signal, threading
from couplings_experiments import processes

processes._GRACE = 0.1
with processes._ended_by_torchrun():
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    # many minutes in C, without Python's lock and deaf to signals, as a collective whose other side is gone
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_torchrun_ends_a_process_that_is_blocked():
    ended = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr == f"couplings: {processes.LOST}\n"


def test_torchrun_ends_a_process_with_an_exception():
    before = signal.getsignal(signal.SIGTERM)

    def ended():
        with processes._ended_by_torchrun():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(processes.Lost):
        ended()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # it is left to say why
    signal.signal(signal.SIGTERM, before)
    with processes._ended_by_torchrun():
        pass
    assert signal.getsignal(signal.SIGTERM) == before
