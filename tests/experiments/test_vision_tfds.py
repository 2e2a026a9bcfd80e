"""The real tensorflow-datasets, with files of this machine in place of its download.

Runs by `make test-tfds` in an environment of its own; skipped where that is missing.
"""

import dataclasses
import gzip
import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest

from experiments.vision import data
from experiments.vision.data import SPECS, DataError, Spec, load
from tests.experiments.test_vision_data import idx, images_and_labels

tfds = pytest.importorskip("tensorflow_datasets", reason="runs by `make test-tfds`")
mnist = sys.modules[tfds.image_classification.MNIST.__module__]
BUILDERS = {
    "cifar10": tfds.image_classification.Cifar10,
    "fashion_mnist": tfds.image_classification.FashionMNIST,
    "mnist": tfds.image_classification.MNIST,
}


EXAMPLES = {"train": 200, "test": 100}


def draw(name):
    """Images, of full size, and labels of both parts."""
    for seed, examples in enumerate(EXAMPLES.values()):
        yield images_and_labels(examples, SPECS[name].image_shape, seed)


def mnist_files(parts):
    """Content by name of the four files of MNIST and Fashion-MNIST."""
    files = {}
    for part, (images, labels) in zip(("train", "t10k"), parts, strict=True):
        files[f"{part}-images-idx3-ubyte.gz"] = idx(images[..., 0])
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels)
    return {name: gzip.compress(content, 1) for name, content in files.items()}


def cifar_files(parts):
    """Content by name of the one archive of CIFAR-10, in its binary version."""
    (images, labels), (test_images, test_labels) = parts
    batches = zip(np.split(images, 5), np.split(labels, 5), strict=True)
    members = {
        f"data_batch_{number}.bin": batch for number, batch in enumerate(batches, 1)
    } | {"test_batch.bin": (test_images, test_labels)}
    content = {"batches.meta.txt": "\n".join(map(str, range(10))).encode()}
    for name, (images, labels) in members.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content[name] = np.concatenate([labels[:, None], planes], axis=1).tobytes()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name, text in content.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return {"cifar-10-binary.tar.gz": stream.getvalue()}


def offer(monkeypatch, folder, name, files):
    """Lays few examples where the builder looks before it downloads."""
    spec = Spec(SPECS[name].image_shape, *EXAMPLES.values())
    monkeypatch.setattr(data, "SPECS", {**SPECS, name: spec})
    for part, examples in EXAMPLES.items():
        monkeypatch.setattr(mnist, f"_{part.upper()}_EXAMPLES", examples)
    # What TFDS_DATA_DIR sets, which is read when the package is imported.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", folder / "none")
    manual = folder / "downloads" / "manual"
    manual.mkdir(parents=True)
    for file, content in files.items():
        (manual / file).write_bytes(content)
    builder = BUILDERS[name]
    ours = {
        url: dataclasses.replace(
            info,
            checksum=hashlib.sha256(files[info.filename]).hexdigest(),
            size=len(files[info.filename]),
        )
        for url, info in builder.url_infos.items()
        if info.filename in files
    }
    monkeypatch.setattr(builder, "url_infos", ours)


@pytest.mark.parametrize("name", BUILDERS)
def test_load_by_the_real_builder_gives_what_its_files_hold(
    name, tmp_path, monkeypatch
):
    parts = list(draw(name))
    make = cifar_files if name == "cifar10" else mnist_files
    offer(monkeypatch, tmp_path, name, make(parts))
    loaded = load(name)
    for split, (images, labels) in zip(loaded, parts, strict=True):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        own = data._in_own_order(data.Split(images, labels.astype(np.int32)))
        np.testing.assert_array_equal(split.images, own.images)
        np.testing.assert_array_equal(split.labels, own.labels)
    # Which the package does not ask pip for: the loader's message names it.
    assert "tensorflow" in sys.modules
    # What was prepared is read again, without the files that it was made of.
    (tmp_path / "downloads").rename(tmp_path / "gone")
    again = load(name)
    np.testing.assert_array_equal(again.test.images, loaded.test.images)


def test_load_by_the_real_builder_damaged_file_names_three_ways(tmp_path, monkeypatch):
    files = mnist_files(list(draw("fashion_mnist")))
    offer(monkeypatch, tmp_path, "fashion_mnist", files)
    damaged = tmp_path / "downloads" / "manual" / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    match = r"(?s)wrong checksum.*\(1\).*\(3\) pip install"
    with pytest.raises(DataError, match=match):
        load("fashion_mnist")
