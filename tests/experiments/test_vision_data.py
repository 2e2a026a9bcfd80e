"""Datasets: complete and the right ones, or a clear error; labels as asked for."""

import functools
import gzip
import hashlib
import pickle
import sys
import tarfile
import types

import jax
import numpy as np
import pytest

from experiments.common.run_dir import RunDirError
from experiments.vision import data
from experiments.vision.data import (
    DataError,
    Spec,
    Split,
    balanced_subset,
    load,
    parse_idx,
    read_cifar10,
    read_fashion_mnist,
    redraw_labels,
)

PARTS = {"train": 40, "t10k": 20}


def images_and_labels(examples, shape, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(examples) % 10).astype(np.uint8)
    return rng.integers(0, 256, (examples, *shape), np.uint8), labels


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def fashion_files():
    """Content of four tiny files by name, uncompressed."""
    files = {}
    for seed, (part, examples) in enumerate(PARTS.items()):
        images, labels = images_and_labels(examples, (4, 4), seed)
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        files[f"{part}-labels-idx1-ubyte"] = idx(labels)
    return files


def cifar_files():
    """Content of six tiny batches by name."""
    files = {}
    for seed, name in enumerate((*data.CIFAR10_TRAIN, *data.CIFAR10_TEST)):
        images, labels = images_and_labels(10, (3072,), seed)
        batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": name}
        files[name] = pickle.dumps(batch, protocol=4)
    return files


def md5(files):
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


def write(directory, files, compressed=False):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if compressed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / name).write_bytes(content)


@pytest.mark.parametrize("compressed", [True, False], ids=["gz", "plain"])
def test_read_fashion_mnist_gives_what_the_files_hold(tmp_path, compressed):
    files = fashion_files()
    write(tmp_path, files, compressed)
    train, test = read_fashion_mnist(tmp_path, md5(files))
    images, labels = images_and_labels(40, (4, 4), 0)
    np.testing.assert_array_equal(train.images, images[..., None])
    np.testing.assert_array_equal(train.labels, labels)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert test.images.shape == (20, 4, 4, 1)


def change(directory, kind):
    """Damages the files in a way; returns the name that the error has to have."""
    images = directory / "train-images-idx3-ubyte.gz"
    labels = directory / "train-labels-idx1-ubyte.gz"
    test = directory / "t10k-images-idx3-ubyte.gz"
    if kind == "missing":
        images.unlink()
    elif kind == "truncated":
        images.write_bytes(images.read_bytes()[:-9])
    elif kind == "empty":
        images.write_bytes(b"")
    elif kind == "folder":
        images.unlink()
        images.mkdir()
    elif kind == "no gzip":
        images.write_bytes(b"<html>not found</html>")
    elif kind == "other content":
        images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes()) + b"."))
    else:
        other = {"train and test": test, "images and labels": labels}[kind]
        ours, theirs = images.read_bytes(), other.read_bytes()
        images.write_bytes(theirs)
        other.write_bytes(ours)
    return "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is not there"),
        ("truncated", "truncated or damaged"),
        ("empty", "has 0 bytes"),
        ("folder", r"truncated or damaged \(.*[Dd]irectory"),
        ("no gzip", "expected a gzip file"),
        ("other content", "expected MD5"),
        ("train and test", "it is t10k-images-idx3-ubyte under the name of train-im"),
        ("images and labels", "it is train-labels-idx1-ubyte under the name of train-"),
    ],
)
def test_read_fashion_mnist_bad_file_says_which_and_how_to_get_it(
    tmp_path, kind, message
):
    files = fashion_files()
    write(tmp_path, files, compressed=True)
    name = change(tmp_path, kind)
    with pytest.raises(DataError, match=message) as info:
        read_fashion_mnist(tmp_path, md5(files))
    assert str(tmp_path / name) in str(info.value)
    assert "apt-get install dataset-fashion-mnist" in str(info.value)


def test_read_fashion_mnist_part_of_a_download_is_not_data(tmp_path):
    files = fashion_files()
    write(tmp_path, files, compressed=True)
    whole = tmp_path / "train-images-idx3-ubyte.gz"
    whole.rename(tmp_path / "train-images-idx3-ubyte.gz.part")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is not there"):
        read_fashion_mnist(tmp_path, md5(files))


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x0d\x01", b"\0\0\x08\x03\0\0", idx(np.zeros(3, "u1"))[:-1]]
)
def test_parse_idx_no_idx_file_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"f has 10 bytes|f is not an IDX file"):
        parse_idx(tmp_path / "f", content)


def pack(directory, files):
    """Writes the archive; returns the checksums with its own."""
    folder = directory / "unpacked" / data.CIFAR10_FOLDER
    write(folder, files)
    archive = directory / data.CIFAR10_ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, data.CIFAR10_FOLDER)
    return md5(files) | md5({data.CIFAR10_ARCHIVE: archive.read_bytes()})


@pytest.mark.parametrize("form", ["batches", "folder", "archive"])
def test_read_cifar10_gives_what_the_files_hold(tmp_path, form):
    files = cifar_files()
    checksums = md5(files)
    if form == "archive":
        checksums = pack(tmp_path, files)
    else:
        write(tmp_path / (data.CIFAR10_FOLDER if form == "folder" else "."), files)
    train, test = read_cifar10(tmp_path, checksums)
    assert train.images.shape == (50, 32, 32, 3)
    assert test.images.shape == (10, 32, 32, 3)
    assert train.images.dtype == np.uint8
    # The file has all of an image's red first, row by row.
    pixels, labels = images_and_labels(10, (3072,), seed=1)
    image = train.images[10]
    assert image[3, 5, 2] == pixels[0][2 * 1024 + 3 * 32 + 5]
    np.testing.assert_array_equal(train.labels[10:20], labels)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"data_batch_3 is not there, though data_batch_1 is"),
        ("truncated", r"data_batch_3 has \d+ bytes with MD5 \w+, expected MD5"),
        ("swapped", r"data_batch_3 has .* it is test_batch under the name of data_bat"),
        ("empty folder", "holds neither cifar-10-python.tar.gz nor data_batch_1"),
        ("archive", r"cifar-10-python.tar.gz has \d+ bytes"),
        ("part of the archive", "holds neither cifar-10-python.tar.gz nor data_bat"),
    ],
)
def test_read_cifar10_bad_file_says_which_and_how_to_get_it(tmp_path, kind, message):
    files = cifar_files()
    checksums = pack(tmp_path, files)
    folder, archive = tmp_path / "data", tmp_path / data.CIFAR10_ARCHIVE
    write(folder, files)
    third = folder / "data_batch_3"
    if kind == "missing":
        third.unlink()
    elif kind == "truncated":
        third.write_bytes(third.read_bytes()[:-1])
    elif kind == "swapped":
        third.write_bytes(files["test_batch"])
    elif kind == "empty folder":
        folder = tmp_path / "unpacked" / "none"
    elif kind == "part of the archive":
        folder = tmp_path
        archive.rename(tmp_path / f"{data.CIFAR10_ARCHIVE}.part")
    else:
        folder = tmp_path
        archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=message) as info:
        read_cifar10(folder, checksums)
    assert "www.cs.toronto.edu" in str(info.value)


class Malicious:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": Malicious(), b"labels": []}),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps([1, 2]),
        b"no pickle",
    ],
    ids=["code", "no data", "list", "text"],
)
def test_read_cifar10_strange_pickle_is_refused_and_not_run(tmp_path, content, capsys):
    files = cifar_files() | {"data_batch_1": content}
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"data_batch_1 is not a batch of CIFAR-10"):
        read_cifar10(tmp_path, md5(files))
    assert capsys.readouterr().out == ""


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_load_nothing_found_names_three_ways(nothing_installed, name):
    with pytest.raises(RunDirError, match=r"\(1\).*--data-dir.*\(3\) pip install"):
        load(name)


def fake_datasets(examples):
    """A stand-in for tensorflow-datasets, as its `data_source` is documented."""

    def data_source(name, split):
        images, labels = images_and_labels(examples[split], (4, 4, 1), len(split))
        return [
            {"image": image, "label": label}
            for image, label in zip(images, labels, strict=True)
        ]

    return types.SimpleNamespace(data_source=data_source)


@pytest.fixture
def tiny_fashion_mnist(nothing_installed, monkeypatch):
    spec = Spec((4, 4, 1), 40, 20)
    monkeypatch.setattr(data, "SPECS", {**data.SPECS, "fashion_mnist": spec})


def test_load_from_tensorflow_datasets(tiny_fashion_mnist, monkeypatch):
    fake = fake_datasets({"train": 40, "test": 20})
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    train, test = load("fashion_mnist")
    assert train.images.shape == (40, 4, 4, 1)
    assert test.labels.dtype == np.int32


def test_load_incomplete_dataset_is_refused(tiny_fashion_mnist, monkeypatch):
    fake = fake_datasets({"train": 39, "test": 20})
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    with pytest.raises(DataError, match=r"train part has images \(39, 4, 4, 1\)"):
        load("fashion_mnist")


def test_load_tensorflow_datasets_without_network_names_three_ways(
    nothing_installed, monkeypatch
):
    def data_source(name, split):
        raise OSError("no route to host")

    fake = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    with pytest.raises(DataError, match=r"no route to host.*\(1\).*\(3\)"):
        load("cifar10")


def test_load_order_depends_on_the_images_not_on_the_source(
    tiny_fashion_mnist, monkeypatch
):
    fake = fake_datasets({"train": 40, "test": 20})
    source = fake.data_source
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    first = load("fashion_mnist", train_examples=20)
    fake.data_source = lambda name, split: source(name, split)[::-1]
    second = load("fashion_mnist", train_examples=20)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.bincount(first.train.labels).tolist() == [2] * 10


@pytest.mark.parametrize("examples", [0, 15, 330, -10])
def test_balanced_subset_impossible_size_is_refused(examples):
    train, _ = load("generated")
    with pytest.raises(DataError, match=f"at most 320 here, got {examples}"):
        balanced_subset(train, examples)


def test_balanced_subset_is_part_of_a_larger_one():
    train, _ = load("generated")
    small, large = (balanced_subset(train, size) for size in (50, 100))
    assert np.bincount(small.labels).tolist() == [5] * 10
    found = {image.tobytes() for image in large.images}
    assert all(image.tobytes() in found for image in small.images)
    assert balanced_subset(train, None) is train


def test_generated_is_the_same_every_time():
    first, second = load("generated"), load("generated")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert isinstance(first.train, Split)


@functools.cache
def compiled_redraw(fraction):
    return jax.jit(functools.partial(redraw_labels, fraction=fraction))


def redraw(seed, labels, fraction):
    redrawn = compiled_redraw(fraction)(jax.random.key(seed), labels)
    return jax.tree.map(np.asarray, redrawn)


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.0, 0), (0.25, 2500), (0.12345, 1234), (1.0, 10000)]
)
def test_redraw_labels_redraws_exactly_the_share(fraction, count):
    labels = np.arange(10000, dtype=np.int32) % 10
    given, redrawn = redraw(3, labels, fraction)
    assert int(redrawn.sum()) == count
    assert given.dtype == np.int32
    np.testing.assert_array_equal(given[~redrawn], labels[~redrawn])
    again, _ = redraw(3, labels, fraction)
    np.testing.assert_array_equal(given, again)


def test_redraw_labels_new_labels_are_uniform_and_independent_of_the_true_ones():
    labels = np.arange(40000, dtype=np.int32) % 10
    given, redrawn = redraw(0, labels, 0.5)
    table = np.zeros((10, 10))
    np.add.at(table, (labels[redrawn], given[redrawn]), 1)
    expected = 20000 / 100
    # 99 degrees of freedom (the rows' sums are nearly fixed): 148 is beyond 99.9 %.
    assert ((table - expected) ** 2 / expected).sum() < 148
    mislabelled = (given != labels).mean()
    assert abs(mislabelled - 0.45) < 0.01


def test_redraw_labels_other_seed_redraws_other_examples():
    labels = np.zeros(1000, np.int32)
    _, first = redraw(0, labels, 0.25)
    _, second = redraw(1, labels, 0.25)
    assert (first != second).any()
