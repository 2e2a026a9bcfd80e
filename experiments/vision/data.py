"""Images and labels: CIFAR-10, Fashion-MNIST, MNIST, and tiny generated ones for tests.

Nothing is trusted unchecked. Files are compared with their published checksums before
they are parsed, so a truncated, damaged or swapped one is an error that names it and
never data; pickles are read without the power to run code.

Sources. CIFAR-10: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
Fashion-MNIST: Xiao, Rasul and Vollgraf 2017,
https://github.com/zalandoresearch/fashion-mnist. MNIST: LeCun, Cortes and Burges 1998.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.run_dir import RunDirError
from experiments.vision.config import NUM_CLASSES, DatasetName

CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_TEST = ("test_batch",)
CIFAR10_MD5: Mapping[str, str] = MappingProxyType(
    {
        CIFAR10_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    }
)
# Where Debian's package dataset-fashion-mnist installs the files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# Of what is inside the .gz files: Debian has compressed them anew.
FASHION_MNIST_MD5: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
)
MNIST_MD5: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
)
# Its builders import TensorFlow, which it does not ask pip for.
_TENSORFLOW_DATASETS = (
    "(3) pip install tensorflow-datasets tensorflow array_record importlib_resources, "
    "which downloads the data when a network is there"
)
WAYS: Mapping[DatasetName, str] = MappingProxyType(
    {
        "cifar10": (
            f"(1) download {CIFAR10_ARCHIVE} from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and give its folder as "
            f"--data-dir; (2) give as --data-dir a folder with {CIFAR10_FOLDER}/, or "
            f"with the six batch files themselves; {_TENSORFLOW_DATASETS}"
        ),
        "fashion_mnist": (
            "(1) apt-get install dataset-fashion-mnist (Debian, Ubuntu); (2) download "
            "the four .gz files from https://github.com/zalandoresearch/fashion-mnist "
            f"and give their folder as --data-dir; {_TENSORFLOW_DATASETS}"
        ),
        "mnist": (
            "(1) give a folder with its four IDX files, compressed with gzip or not, "
            f"as --data-dir; (2) ask for fashion_mnist; {_TENSORFLOW_DATASETS}"
        ),
        "generated": "it needs no files",
    }
)


class DataError(RunDirError, ValueError):
    """Data that are missing or not what they should be; the message says the mend."""


class Split(NamedTuple):
    """Images uint8 [example, height, width, channel] and true labels int32 [example].

    NumPy arrays.
    """

    images: np.ndarray
    labels: np.ndarray


class Images(NamedTuple):
    """The two official parts of a dataset."""

    train: Split
    test: Split


class Spec(NamedTuple):
    """Shapes of a complete dataset; `balanced`: each class has as many examples."""

    image_shape: tuple[int, int, int]
    train_examples: int
    test_examples: int
    balanced: bool = True


SPECS: Mapping[DatasetName, Spec] = MappingProxyType(
    {
        "cifar10": Spec((32, 32, 3), 50_000, 10_000),
        "fashion_mnist": Spec((28, 28, 1), 60_000, 10_000),
        "mnist": Spec((28, 28, 1), 60_000, 10_000, balanced=False),
        "generated": Spec((8, 8, 1), 320, 160),
    }
)


def load(
    name: DatasetName,
    data_dir: Path | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> Images:
    """A dataset, or as many of its examples as asked for, as many of each class.

    The order is a function of the images, not of the source that they came from, so
    that a seed means the same wherever the files were found.

    Args:
      name: which dataset.
      data_dir: folder with its official files. Without it they are looked for where
        Debian installs them, then asked of tensorflow-datasets.
      train_examples: size of the training subset, a multiple of the number of
        classes; None for all.
      test_examples: likewise of the test set.

    Raises:
      DataError: nothing was found, or a file is missing, damaged, or another one.
    """
    images = _find(name, data_dir)
    _require_complete(name, images)
    subsets = zip(images, (train_examples, test_examples), strict=True)
    return Images(
        *(balanced_subset(_in_own_order(split), size) for split, size in subsets)
    )


def require_read(name: DatasetName, data_dir: Path | None) -> None:
    """Raises DataError for a folder that the dataset is not read from."""
    if name == "generated" and data_dir is not None:
        raise DataError(
            "--data-dir is not read: the dataset 'generated' is made anew; leave it "
            "out, or choose another with --dataset"
        )


def _find(name: DatasetName, data_dir: Path | None) -> Images:
    require_read(name, data_dir)
    if name == "generated":
        return generate()
    if data_dir is not None:
        readers = {
            "cifar10": read_cifar10,
            "fashion_mnist": read_fashion_mnist,
            "mnist": read_mnist,
        }
        return readers[name](Path(data_dir))
    if name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return read_fashion_mnist(DEBIAN_FASHION_MNIST)
    return _read_tensorflow_datasets(name)


def _require_complete(name: DatasetName, images: Images) -> None:
    spec = SPECS[name]
    sizes = (spec.train_examples, spec.test_examples)
    for part, split, size in zip(Images._fields, images, sizes, strict=True):
        counts = np.bincount(split.labels, minlength=NUM_CLASSES)
        expected = (size, *spec.image_shape)
        balanced = set(counts) == {size // NUM_CLASSES} or not spec.balanced
        if split.images.shape != expected or not balanced:
            each = f"{size // NUM_CLASSES} of each" if spec.balanced else "some of each"
            raise DataError(
                f"{name}: the {part} part has images {split.images.shape} and "
                f"{counts.tolist()} of each class, expected {expected} and {each}: "
                f"{WAYS[name]}"
            )


def _in_own_order(split: Split) -> Split:
    """Examples in the order of a hash of their images, of their labels after that."""
    digests = [
        hashlib.blake2b(image.tobytes(), digest_size=8).digest()
        for image in split.images
    ]
    keys = np.frombuffer(b"".join(digests), dtype=">u8")
    order = np.lexsort((split.labels, keys))
    return Split(split.images[order], split.labels[order])


def balanced_subset(split: Split, examples: int | None) -> Split:
    """The first `examples` / 10 examples of each class; all for None.

    Raises:
      DataError: `examples` is no positive multiple of 10, or more than there are.
    """
    if examples is None:
        return split
    each = examples // NUM_CLASSES
    counts = np.bincount(split.labels, minlength=NUM_CLASSES)
    if each < 1 or examples % NUM_CLASSES or each > counts.min():
        raise DataError(
            f"a subset must have a multiple of {NUM_CLASSES} examples, at most "
            f"{NUM_CLASSES * counts.min()} here, got {examples}"
        )
    rows = [np.flatnonzero(split.labels == c)[:each] for c in range(NUM_CLASSES)]
    chosen = np.sort(np.concatenate(rows))
    return Split(split.images[chosen], split.labels[chosen])


def redraw_labels(
    key: jax.Array, labels: jax.Array, fraction: float
) -> tuple[jax.Array, jax.Array]:
    """Labels of which a share was drawn anew, uniformly over the ten classes.

    A tenth of the new labels is the true one by chance: what is mislabelled is where
    the given label differs from the true one, not where it was redrawn (so too in the
    authors' script).

    Args:
      key: the same key redraws the same.
      labels: true labels, int32 [example].
      fraction: share in [0, 1]; round(fraction * examples) labels are redrawn.

    Returns:
      The given labels, int32 [example], and which were redrawn, bool [example].
    """
    count = round(fraction * len(labels))
    where_key, what_key = jax.random.split(key)
    rows = jax.random.permutation(where_key, len(labels))[:count]
    drawn = jax.random.randint(what_key, (count,), 0, NUM_CLASSES, labels.dtype)
    redrawn = jnp.zeros(len(labels), bool).at[rows].set(True)
    return labels.at[rows].set(drawn), redrawn


def generate() -> Images:
    """Ten blurred patterns with noise; always the same ones."""
    spec, rng = SPECS["generated"], np.random.default_rng(0)
    height, width, channels = spec.image_shape
    coarse = rng.uniform(0, 255, (NUM_CLASSES, height // 2, width // 2, channels))
    patterns = coarse.repeat(2, axis=1).repeat(2, axis=2)
    splits = []
    for size in (spec.train_examples, spec.test_examples):
        labels = rng.permutation(np.arange(size, dtype=np.int32) % NUM_CLASSES)
        noise = rng.normal(0, 32, (size, *spec.image_shape))
        images = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        splits.append(Split(images, labels))
    return Images(*splits)


def read_fashion_mnist(
    directory: Path, checksums: Mapping[str, str] = FASHION_MNIST_MD5
) -> Images:
    """The four IDX files of `directory`, compressed with gzip or not.

    Args:
      directory: where they are.
      checksums: MD5 of each file's content, uncompressed.

    Raises:
      DataError: a file is missing, damaged, or another one.
    """
    return _read_idx_files("fashion_mnist", directory, checksums)


def read_mnist(directory: Path, checksums: Mapping[str, str] = MNIST_MD5) -> Images:
    """As `read_fashion_mnist`, whose files have the same names."""
    return _read_idx_files("mnist", directory, checksums)


def _read_idx_files(
    dataset: DatasetName, directory: Path, checksums: Mapping[str, str]
) -> Images:
    def read(name: str) -> np.ndarray:
        content = _read_perhaps_gzipped(dataset, directory, name)
        path = directory / name
        _require_checksum(dataset, path, content, name, checksums)
        return parse_idx(path, content, dataset)

    splits = [
        Split(
            read(f"{part}-images-idx3-ubyte")[..., None],
            read(f"{part}-labels-idx1-ubyte").astype(np.int32),
        )
        for part in ("train", "t10k")
    ]
    return Images(*splits)


def parse_idx(
    path: Path, content: bytes, dataset: DatasetName = "fashion_mnist"
) -> np.ndarray:
    """The uint8 array of an IDX file, [example] or [example, height, width].

    Raises:
      DataError: `content` is no IDX file of bytes, or of another length than it says.
    """
    # Two zeros, the type (8: unsigned bytes), the number of dimensions, their sizes.
    header = 4 + 4 * (content[3] if len(content) > 3 else 0)
    if content[:3] != b"\0\0\x08" or len(content) < header:
        raise DataError(f"{path} is not an IDX file of bytes: {WAYS[dataset]}")
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path} has {len(content)} bytes, expected {header + math.prod(shape)} "
            f"for its shape {shape}: {WAYS[dataset]}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_perhaps_gzipped(dataset: DatasetName, directory: Path, name: str) -> bytes:
    plain, compressed = directory / name, directory / f"{name}.gz"
    if plain.is_file():
        return plain.read_bytes()
    try:
        with gzip.open(compressed) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{compressed} is not there, nor is {name} without .gz: {WAYS[dataset]}"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{compressed} is truncated or damaged ({error}), expected a gzip file: "
            f"{WAYS[dataset]}"
        ) from error


def read_cifar10(directory: Path, checksums: Mapping[str, str] = CIFAR10_MD5) -> Images:
    """The official Python version, from its batch files or from the archive.

    Args:
      directory: holds the batches, the folder that the archive unpacks to, or the
        archive. What is unpacked comes first.
      checksums: MD5 of the archive and of each batch.

    Raises:
      DataError: a file is missing, damaged, or another one.
    """
    read = _cifar10_reader(directory, checksums)

    def split(names: tuple[str, ...]) -> Split:
        images, labels = zip(*(_cifar10_batch(*read(n)) for n in names), strict=True)
        return Split(np.concatenate(images), np.concatenate(labels))

    return Images(split(CIFAR10_TRAIN), split(CIFAR10_TEST))


def _cifar10_reader(
    directory: Path, checksums: Mapping[str, str]
) -> Callable[[str], tuple[Path, bytes]]:
    """A function from a batch's name to its path and verified content."""

    def checked(path: Path, content: bytes, name: str) -> tuple[Path, bytes]:
        _require_checksum("cifar10", path, content, name, checksums)
        return path, content

    batches = (*CIFAR10_TRAIN, *CIFAR10_TEST)
    for folder in (directory, directory / CIFAR10_FOLDER):
        present = [name for name in batches if (folder / name).is_file()]
        for name in batches:
            if present and name not in present:
                raise DataError(
                    f"{folder / name} is not there, though {present[0]} is: "
                    f"{WAYS['cifar10']}"
                )
        if present:
            return lambda name, folder=folder: checked(  # type: ignore[misc]
                folder / name, (folder / name).read_bytes(), name
            )
    archive = directory / CIFAR10_ARCHIVE
    if not archive.is_file():
        raise DataError(
            f"{directory} holds neither {CIFAR10_ARCHIVE} nor {batches[0]}: "
            f"{WAYS['cifar10']}"
        )
    _, content = checked(archive, archive.read_bytes(), CIFAR10_ARCHIVE)
    members = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in batches:
            file = tar.extractfile(f"{CIFAR10_FOLDER}/{name}")
            assert file is not None
            members[name] = file.read()
    return lambda name: checked(archive / CIFAR10_FOLDER / name, members[name], name)


def _cifar10_batch(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [example, 32, 32, 3] and labels int32 [example]."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"], np.int32)
        images = pixels.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
    except Exception as error:  # what a strange pickle raises is its own choice
        raise DataError(
            f"{path} is not a batch of CIFAR-10 ({error}): {WAYS['cifar10']}"
        ) from error
    return images, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers and NumPy arrays, and refuses everything else."""

    # NumPy's function that begins an array, without its private name.
    _begin_array = np.empty(0).__reduce__()[0]
    _allowed: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _begin_array,
        ("numpy._core.multiarray", "_reconstruct"): _begin_array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is no array"
            ) from None


def _require_checksum(
    dataset: DatasetName,
    path: Path,
    content: bytes,
    name: str,
    checksums: Mapping[str, str],
) -> None:
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest == checksums[name]:
        return
    others = [other for other, md5 in checksums.items() if md5 == digest]
    problem = "it is truncated, damaged or something else"
    if others:
        problem = f"it is {others[0]} under the name of {name}"
    raise DataError(
        f"{path} has {len(content)} bytes with MD5 {digest}, expected MD5 "
        f"{checksums[name]}: {problem}. Get it anew: {WAYS[dataset]}"
    )


def _read_tensorflow_datasets(name: DatasetName) -> Images:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise DataError(
            f"{name} is not here. Three ways to get it: {WAYS[name]}"
        ) from None
    try:
        # It unpacks into a folder of another name until all is there.
        sources = [tfds.data_source(name, split=part) for part in ("train", "test")]
        return Images(*map(_from_source, sources))
    except Exception as error:  # of any library that it is built on
        raise DataError(
            f"tensorflow-datasets could not provide {name} ({error}). Three ways to "
            f"get it: {WAYS[name]}"
        ) from error


def _from_source(source: Any) -> Split:
    examples = [source[index] for index in range(len(source))]
    return Split(
        np.stack([np.asarray(example["image"], np.uint8) for example in examples]),
        np.asarray([example["label"] for example in examples], np.int32),
    )
