"""A trained expert: its file, and the policies that it is compared with."""

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

from experiments.coinrun.config import MICROBATCH
from experiments.coinrun.game import ACTIONS, FRAME, RIGHT, RIGHT_UP, Choose, Turn
from experiments.coinrun.policy import (
    Architecture,
    Output,
    Params,
    init_params,
    make_apply,
)
from experiments.common.files import atomic_write
from experiments.common.run_dir import RunDirError

FORMAT = "hardvary coinrun expert 1"
# Of 0.2, 0.5, 0.7, 0.9, 0.95 and 1 this share of jumps solved most of 500 easy levels:
# 71 %, against 61 to 68 %.
JUMPING = 0.7


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
        forward = _forward(self.architecture)
        parts = [
            # Always as many at a time, because rounding depends on that.
            np.asarray(forward(self.params, _pad(frames[start : start + MICROBATCH])))
            for start in range(0, len(frames), MICROBATCH)
        ]
        empty = np.zeros((0, len(ACTIONS)), np.float32)
        return np.concatenate([empty, *parts])[: len(frames)]

    def sample(self, seed: int) -> Choose:
        """The policy as `game.play` takes it; draws from (seed, level, step)."""

        def choose(turn: Turn) -> np.ndarray:
            return _draw(seed, turn, self.probabilities(turn.frames))

        return choose

    def greedy(self, turn: Turn) -> np.ndarray:
        """The most likely actions, as `game.play` takes them."""
        return self.probabilities(turn.frames).argmax(-1)


def random_policy(seed: int) -> Choose:
    """Each action as likely as the others."""
    return functools.partial(_draw_constant, seed, np.full(len(ACTIONS), 1 / 15))


def scripted_policy(seed: int) -> Choose:
    """Always to the right, mostly with a jump."""
    shares = np.zeros(len(ACTIONS))
    shares[RIGHT_UP] = JUMPING
    shares[RIGHT] = 1 - JUMPING
    return functools.partial(_draw_constant, seed, shares)


def _draw_constant(seed: int, shares: np.ndarray, turn: Turn) -> np.ndarray:
    shape = (len(turn.levels), len(ACTIONS))
    return _draw(seed, turn, np.broadcast_to(shares.astype(np.float32), shape))


def _draw(seed: int, turn: Turn, probabilities: np.ndarray) -> np.ndarray:
    key = jax.random.key(seed)
    levels, steps = turn.levels.astype(np.uint32), turn.steps.astype(np.uint32)
    return np.asarray(_draw_by_level(key, levels, steps, probabilities))


@jax.jit
def _draw_by_level(
    key: jax.Array, levels: jax.Array, steps: jax.Array, probabilities: jax.Array
) -> jax.Array:
    def draw(level: jax.Array, step: jax.Array, shares: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, level), step)
        return jax.random.categorical(own, jnp.log(shares))

    return jax.vmap(draw)(levels, steps, probabilities)


@functools.lru_cache(maxsize=4)
def _forward(architecture: Architecture) -> Any:
    apply = make_apply(architecture)

    @jax.jit
    def forward(params: Params, frames: jax.Array) -> jax.Array:
        output: Output = apply(params, frames)
        return jax.nn.softmax(output.logits)

    return forward


def _pad(frames: np.ndarray) -> np.ndarray:
    missing = MICROBATCH - len(frames)
    return np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else frames


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, which tells an expert from others."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
