"""Checkpoints and files: whole or not at all, damaged ones passed over, training resumes to the same bits."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from couplings_experiments import checkpoint, files
from couplings_experiments.data import load
from couplings_experiments.epochs import Diverged
from couplings_experiments.errors import UserError, explain_os_error
from couplings_experiments.knn_training import DIGITS, Choice, build
from couplings_experiments.trainer import Optimisation, train


@pytest.fixture(scope="module")
def digits():
    return load("digits", None, 0)


def sample(epoch):
    g = torch.Generator().manual_seed(epoch)
    return checkpoint.Checkpoint(
        epoch,
        {
            "a": torch.randn(3, 4, generator=g),
            "empty": torch.empty(0),
            "state": g.get_state(),
            "n": torch.tensor(7),
        },
        {"history": [{"loss": 0.1 + 0.2}], "text": "x"},
    )


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    checkpoint.save(tmp_path, sample(1))
    back, damaged = checkpoint.load_last(tmp_path)
    assert damaged == []
    assert back.epoch == 1
    assert back.state == sample(1).state
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in sample(1).tensors.items())


def test_only_the_last_two_are_kept(tmp_path):
    for epoch in range(1, 6):
        checkpoint.save(tmp_path, sample(epoch))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-00004.safetensors",
        "epoch-00005.safetensors",
    ]
    checkpoint.clear(tmp_path)
    assert checkpoint.load_last(tmp_path) == (None, [])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    checkpoint.save(tmp_path, sample(1))
    path = checkpoint.save(tmp_path, sample(2))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content in (
        b"",
        whole[:5],
        whole[: len(whole) // 2],
        whole[:-1],
        bytes(flipped),
        b"\xff" * len(whole),
    ):
        path.write_bytes(content)
        back, damaged = checkpoint.load_last(tmp_path)
        assert back.epoch == 1
        assert damaged == [path]


def test_where_all_are_damaged_training_keeps_what_it_does_from_then_on(digits, tmp_path):
    """Damaged checkpoints of late epochs must not pass for newer ones than those of the first epochs."""
    for epoch in (2, 3):
        checkpoint.save(tmp_path, sample(epoch)).write_bytes(b"damaged")

    def stop(done):
        raise Stop

    said = []
    with pytest.raises(Stop):
        train(
            build("soft", DIGITS["soft"], digits, 0),
            digits,
            SHORT,
            0,
            tmp_path,
            identity="soft",
            after_epoch=stop,
            say=said.append,
        )
    assert len(said) == 2
    assert checkpoint.load_last(tmp_path)[0].epoch == 1


def test_a_failing_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "x"
    files.write_atomic(target, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_system_errors_become_one_line():
    full = str(explain_os_error(OSError(errno.ENOSPC, "No space left", "/x"), "writing"))
    assert "disk full" in full
    assert "--resume" in full
    assert "--out" in str(explain_os_error(OSError(errno.EROFS, "Read-only", "/x"), "writing"))


def test_a_directory_has_one_owner(tmp_path):
    with files.owned(tmp_path), pytest.raises(UserError, match="another run"), files.owned(tmp_path):
        pass
    with files.owned(tmp_path):
        pass


SHORT = Optimisation(epochs=3, learning_rate=0.01, schedule="cosine", steps=2)


def weights(method):
    return torch.cat([p.detach().flatten() for p in method.module.parameters()])


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["soft", "gumbel", "classifier"])
@pytest.mark.parametrize("damage", [False, True])
def test_interrupted_training_ends_at_the_same_bits(digits, tmp_path, name, damage):
    def fresh():
        return build(name, DIGITS[name], digits, 0)

    straight = fresh()
    (tmp_path / "a").mkdir()
    history = train(straight, digits, SHORT, 0, tmp_path / "a", identity=name)

    (tmp_path / "b").mkdir()
    epochs = []

    def stop(done):
        epochs.append(done)
        if len(epochs) == 2:
            raise Stop

    with pytest.raises(Stop):
        train(fresh(), digits, SHORT, 0, tmp_path / "b", identity=name, after_epoch=stop)
    if damage:
        (tmp_path / "b" / "epoch-00002.safetensors").write_bytes(b"torn")
    said = []
    resumed = fresh()
    again = train(resumed, digits, SHORT, 0, tmp_path / "b", identity=name, say=said.append)
    assert again == history
    assert torch.equal(weights(straight), weights(resumed))
    assert len(said) == damage


def test_a_checkpoint_of_something_else_is_not_continued(digits, tmp_path):
    train(build("classifier", Choice(0.1), digits, 0), digits, SHORT, 0, tmp_path, identity="one")
    done = []
    train(
        build("classifier", Choice(0.1), digits, 0),
        digits,
        SHORT,
        0,
        tmp_path,
        identity="two",
        after_epoch=done.append,
    )
    assert done == [1, 1, 1]


def test_divergence_is_said(digits, tmp_path):
    wild = Optimisation(epochs=3, learning_rate=1e6, steps=4)
    with pytest.raises(Diverged, match="diverged in epoch"):
        train(build("classifier", Choice(0.1), digits, 0), digits, wild, 0, tmp_path, identity="wild")
