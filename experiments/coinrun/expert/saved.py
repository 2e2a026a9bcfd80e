"""A trained expert and its file."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.coinrun.expert.actors import in_batches
from experiments.coinrun.expert.config import MICROBATCH
from experiments.coinrun.expert.policy import (
    Architecture,
    Output,
    Params,
    init_params,
    make_apply,
)
from experiments.coinrun.game import FRAME
from experiments.common.files import atomic_write
from experiments.common.run_dir import RunDirError

FORMAT = "hardvary coinrun expert 1"


class ExpertError(RunDirError, ValueError):
    """An expert's file that cannot be used; the message says the mend."""


class Expert:
    """A policy for frames of CoinRun.

    Args:
      architecture: of its network.
      params: the network's parameters.
      about: what is on record about it, JSON values: mode, frames, config.
    """

    def __init__(
        self, architecture: Architecture, params: Params, about: Mapping[str, Any]
    ):
        self.architecture = architecture
        self.params = params
        self.about = dict(about)

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        """Probabilities float32 [n, 15] of the actions in `ACTIONS`.

        A frame's do not depend on how many others there are.

        Args:
          frames: uint8 [n, 64, 64, 3].
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != FRAME:
            raise ValueError(
                f"frames must be uint8 [n, {', '.join(map(str, FRAME))}], got "
                f"{frames.dtype} {list(frames.shape)}"
            )
        forward = functools.partial(_forward(self.architecture), self.params)
        return in_batches(forward, MICROBATCH)(frames)


@functools.lru_cache(maxsize=4)
def _forward(architecture: Architecture) -> Any:
    apply = make_apply(architecture)

    @jax.jit
    def forward(params: Params, frames: jax.Array) -> jax.Array:
        output: Output = apply(params, frames)
        return jax.nn.softmax(output.logits)

    return forward


def save_expert(path: Path, expert: Expert) -> None:
    """Writes an expert as one file, an .npz with a checksum in it, atomically."""
    arrays = _arrays(expert.params)
    about = {
        "format": FORMAT,
        "architecture": expert.architecture._asdict(),
        "about": expert.about,
    }
    arrays["about"] = np.array(json.dumps(about))
    arrays["sha256"] = np.array(_checksum(arrays))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_expert(path: Path) -> Expert:
    """Reads what `save_expert` wrote.

    Raises:
      ExpertError: there is no such file, it is not whole, or not an expert's.
    """
    mend = (
        "get it again from the repository, or train one with "
        "`python -m experiments.coinrun expert`"
    )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExpertError(f"{path} is not there ({error.strerror}): {mend}") from None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        # What damage makes zipfile and NumPy raise is a long list.
        raise ExpertError(f"{path} is damaged ({error!r}): {mend}") from None
    expected = arrays.pop("sha256", None)
    if expected is None or "about" not in arrays:
        raise ExpertError(f"{path} is not an expert's file: {mend}")
    if str(expected) != _checksum(arrays):
        raise ExpertError(f"{path} is damaged (its checksum does not agree): {mend}")
    about = json.loads(str(arrays.pop("about")))
    if about["format"] != FORMAT:
        raise ExpertError(f"{path} has the format {about['format']!r}: {mend}")
    architecture = Architecture(**about["architecture"])
    like = jax.eval_shape(lambda: init_params(jax.random.key(0), architecture))
    leaves, structure = jax.tree.flatten(like)
    names = _names(like)
    if set(names) != arrays.keys() or any(
        arrays[name].shape != leaf.shape
        for name, leaf in zip(names, leaves, strict=True)
    ):
        raise ExpertError(f"{path} does not fit this version of the program: {mend}")
    params = jax.tree.unflatten(structure, [jnp.asarray(arrays[n]) for n in names])
    return Expert(architecture, params, about["about"])


def _names(params: Params) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
    return [".".join(str(key.key) for key in path) for path, _ in paths]


def _arrays(params: Params) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves(params)
    return {
        name: np.asarray(leaf)
        for name, leaf in zip(_names(params), leaves, strict=True)
    }


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
