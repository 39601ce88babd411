"""Readers: right on right files, one clear line on wrong ones, and no power to a pickle."""

from __future__ import annotations

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from couplings_experiments.data import load
from couplings_experiments.data.cifar import read_batch
from couplings_experiments.data.idx import read_idx
from couplings_experiments.errors import UserError


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


@pytest.fixture
def cifar(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {
            b"data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            b"labels": [i % 10 for i in range(20)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path


def test_digits_split_is_fixed_for_the_test_and_divided_anew_otherwise():
    first, again, other = load("digits", None, 0), load("digits", None, 0), load("digits", None, 1)
    assert first.sizes == {"train": 899, "validation": 359, "test": 539}
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, other.test.labels)
    assert not torch.equal(first.train.labels, other.train.labels)
    for part in (first.train, first.validation, first.test):  # stratified
        share = torch.bincount(part.labels).double() / len(part)
        assert float(share.min()) > 0.09
        assert float(share.max()) < 0.11


def test_digits_parts_share_no_image():
    data = load("digits", None, 3)
    rows = [
        {tuple(image) for image in part.images.flatten(1).tolist()}
        for part in (data.train, data.validation, data.test)
    ]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_idx_plain_and_gzipped(mnist):
    data = load("mnist", mnist, 0)
    assert data.sizes == {"train": 50, "validation": 10, "test": 20}
    assert data.train.images.shape == (50, 1, 28, 28)
    assert abs(float(data.train.images.mean())) < 1e-4
    (mnist / "FashionMNIST" / "raw").mkdir(parents=True)
    for file in list(mnist.glob("*ubyte*")):
        file.rename(mnist / "FashionMNIST" / "raw" / file.name)
    assert load("fashion-mnist", mnist, 0).sizes["test"] == 20


def test_idx_files_with_a_dot_in_their_names(mnist):
    for file in list(mnist.glob("*ubyte*")):
        file.rename(mnist / file.name.replace("-idx", ".idx"))
    assert load("mnist", mnist, 0).sizes == {"train": 50, "validation": 10, "test": 20}


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_files_and_folders_are_named(name, tmp_path):
    (tmp_path / "file").write_text("")
    for place, said in (
        (None, f"--dataset {name} needs --data-dir"),
        (tmp_path / "nowhere", f"--data-dir {tmp_path / 'nowhere'} does not exist"),
        (tmp_path / "file", f"--data-dir {tmp_path / 'file'} is a file, not a directory"),
    ):
        with pytest.raises(UserError, match="format and files: https://") as caught:
            load(name, place, 0)
        assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "wanted", "inner"),
    [
        ("mnist", "train-images-idx3-ubyte (or train-images-idx3-ubyte.gz)", "MNIST/raw"),
        ("fashion-mnist", "train-images-idx3-ubyte (or train-images-idx3-ubyte.gz)", "FashionMNIST/raw"),
        ("cifar10", "data_batch_1", "cifar-10-batches-py"),
        ("cifar100", "train", "cifar-100-python"),
    ],
)
def test_a_folder_without_the_files_says_what_was_looked_for_and_what_is_there(name, wanted, inner, tmp_path):
    with pytest.raises(UserError, match="There is nothing") as caught:
        load(name, tmp_path, 0)
    said = str(caught.value)
    assert said.startswith(f"{name}: {wanted} not found. Looked in {tmp_path}, ")
    assert str(tmp_path / inner) in said
    assert said.endswith("or change --data-dir.")
    for other in ("data.tar.gz", *"bcdefg"):
        (tmp_path / other).write_text("")
    with pytest.raises(UserError, match=r"There is only: b, c, d, data.tar.gz, e and 2 more\. "):
        load(name, tmp_path, 0)


def test_truncated_or_foreign_idx_is_refused(mnist):
    labels = mnist / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, said in (
        (whole[:-7], "only 53 bytes"),
        (whole + b"x", "more bytes"),
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01" + whole[4:], "not an IDX file"),
        (b"\x00\x00\x08\x01" + struct.pack(">I", 2**32 - 1), "more than any set"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            load("mnist", mnist, 0)
        assert "\n" not in str(caught.value)
    labels.write_bytes(whole)
    images = mnist / "train-images-idx3-ubyte.gz"
    zipped = images.read_bytes()
    for content in (zipped[:200], b"not gzip", zipped[:-20] + b"\x00" * 20):
        images.write_bytes(content)
        with pytest.raises(UserError, match=r"train-images.*Fetch it again"):
            load("mnist", mnist, 0)


def test_labels_that_do_not_fit_their_images_are_refused(mnist):
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(59, dtype=np.uint8)))
    with pytest.raises(UserError, match="as many labels"):
        load("mnist", mnist, 0)


def test_idx_of_the_wrong_kind(tmp_path):
    (tmp_path / "x").write_bytes(idx(np.zeros((2, 3), dtype=np.uint8)))
    assert read_idx(tmp_path / "x", 2).shape == (2, 3)
    with pytest.raises(UserError, match="with 3 dimensions"):
        read_idx(tmp_path / "x", 3)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_cifar_pickles_of_every_protocol_read_as_they_are(tmp_path, protocol):
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    (tmp_path / "b").write_bytes(pickle.dumps({b"data": data, b"labels": [0, 1, 2, 3]}, protocol=protocol))
    images, labels = read_batch(tmp_path / "b")
    assert np.array_equal(images.reshape(4, -1), data)
    assert labels.tolist() == [0, 1, 2, 3]


def test_cifar_is_read_from_its_folder(cifar):
    data = load("cifar10", cifar, 0)
    assert data.sizes == {"train": 90, "validation": 10, "test": 20}
    (cifar / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"data_batch_3 not found in .*, where data_batch_1 is"):
        load("cifar10", cifar, 0)


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    victim = tmp_path / "touched"
    payloads = [
        Payload(os.system, f"touch {victim}"),
        Payload(eval, f"open({str(victim)!r}, 'w')"),
        Payload(getattr, "", "format"),
        Payload(np.load, str(victim)),
        np.array([Payload(os.system, f"touch {victim}")], dtype=object),
    ]
    for payload in payloads:
        for content in (payload, {b"data": payload, b"labels": []}):
            (tmp_path / "b").write_bytes(pickle.dumps(content, protocol=2))
            with pytest.raises(UserError, match="refused") as caught:
                read_batch(tmp_path / "b")
            assert "\n" not in str(caught.value)
    assert not victim.exists()


def test_damaged_and_unfit_pickles_are_refused(tmp_path):
    good = pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0, 1]}, protocol=2)
    contents = [good[:-10], good[: len(good) // 2], b"", b"\x80\x02", b"plain text"]
    contents += [bytes(good[:20]) + bytes([b]) + good[21:] for b in range(0, 256, 5)]
    contents += [
        pickle.dumps(value, protocol=2)
        for value in (
            [],
            {b"data": np.zeros((2, 3072)), b"labels": [0, 1]},
            {b"data": np.zeros((2, 3071), dtype=np.uint8), b"labels": [0, 1]},
            {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0]},
            {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0, 10]},
            {b"labels": [0]},
        )
    ]
    refused = 0
    for content in contents:
        (tmp_path / "b").write_bytes(content)
        try:
            read_batch(tmp_path / "b")
        except UserError:
            refused += 1
    assert refused >= 11


def test_an_unknown_set_is_named():
    with pytest.raises(UserError, match="unknown data set 'imagenet'"):
        load("imagenet", None, 0)
