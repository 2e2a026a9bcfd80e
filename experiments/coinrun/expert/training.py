"""Training of the expert: the games play, PPO learns, in turns.

The games and each minibatch are shared out to threads: XLA runs these small matrix
products on one core each, and the game lets go of Python's lock as well. What the
threads compute is combined in a fixed order, so the result does not depend on timing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.coinrun.expert import ppo
from experiments.coinrun.expert.config import MICROBATCH, ExpertConfig
from experiments.coinrun.expert.policy import (
    Architecture,
    Params,
    init_params,
    make_apply,
)
from experiments.coinrun.expert.saved import Expert
from experiments.coinrun.game import (
    EXPERT_TRAIN_LEVELS,
    FRAME,
    REWARD,
    LevelStream,
    SavedGames,
)
from experiments.common.run_dir import RunDir

PROGRESS = {
    "frames": ("frames", ".3g"),
    "solved": ("solved", ".1%"),
    "entropy": ("entropy", ".2f"),
    "kl": ("kl", ".4f"),
}
SPEED = "speed.csv"


class State(NamedTuple):
    """All that training goes on from: one entry of `games` and `steps` per worker."""

    params: Params
    opt_state: Any
    games: tuple[SavedGames, ...]
    steps: tuple[np.ndarray, ...]
    """int32 [env], made so far in each episode under way."""


class Rollout(NamedTuple):
    """The yield of one worker's games, NumPy arrays [step, env, ...].

    `rewards` are 1 for a coin.
    """

    frames: np.ndarray
    actions: np.ndarray
    log_probs: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    done: np.ndarray
    last_values: np.ndarray
    """float32 [env]."""
    episode_steps: list[int]
    """Lengths of the episodes that done."""


class Trainer:
    """Plays and learns; a context manager, because of its threads and games.

    Args:
      config: what to train.
    """

    def __init__(self, config: ExpertConfig):
        self.config = config
        self.architecture = Architecture(config.width, config.hidden)
        self._optimizer = ppo.make_optimizer(config)
        per_worker = config.num_envs // config.workers
        self._closing = contextlib.ExitStack()
        self._streams = []
        for worker in range(config.workers):
            seeds = np.random.SeedSequence([config.seed, worker])
            seed = int(seeds.generate_state(1)[0] % 2**31)
            stream = LevelStream(per_worker, config.mode, EXPERT_TRAIN_LEVELS, seed)
            self._closing.callback(stream.close)
            self._streams.append(stream)
        self._initial_games = tuple(stream.save() for stream in self._streams)
        self._threads = self._closing.enter_context(ThreadPoolExecutor(config.workers))
        # Reused, because so much memory takes long to come by.
        shape = (config.num_steps, per_worker, *FRAME)
        self._frames = [np.empty(shape, np.uint8) for _ in self._streams]
        self._compile()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def _compile(self) -> None:
        config, optimizer = self.config, self._optimizer
        apply = make_apply(self.architecture)

        @jax.jit
        def act(params: Params, frames: jax.Array, key: jax.Array, step: int) -> Any:
            logits, values = apply(params, frames)
            key = jax.random.fold_in(key, step)
            actions = jax.random.categorical(key, logits)
            log_probs = jax.nn.log_softmax(logits)
            taken = jnp.take_along_axis(log_probs, actions[:, None], 1)[:, 0]
            return actions, taken, values

        @jax.jit
        def prepare(
            rewards: jax.Array,
            done: jax.Array,
            values: jax.Array,
            last_values: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            advantages, returns = ppo.advantages_and_returns(
                rewards, done, values, last_values, config.gamma, config.gae_lambda
            )
            return ppo.normalize(advantages), returns

        @jax.jit
        def gradient(
            params: Params, frames: jax.Array, samples: ppo.Samples
        ) -> tuple[Params, ppo.Terms]:
            """Means over the samples of a worker's part of a minibatch."""
            parts = len(frames) // MICROBATCH

            def loss(
                params: Params, frames: jax.Array, samples: ppo.Samples
            ) -> tuple[jax.Array, ppo.Terms]:
                return ppo.loss(apply(params, frames), samples, config)

            def add(sums: Any, part: Any) -> tuple[Any, None]:
                new = jax.grad(loss, has_aux=True)(params, *part)
                return jax.tree.map(jnp.add, sums, new), None

            split = jax.tree.map(
                lambda leaf: leaf.reshape(parts, MICROBATCH, *leaf.shape[1:]),
                (frames, samples),
            )
            zeros = jax.tree.map(jnp.zeros_like, params)
            terms = ppo.Terms(*jnp.zeros(len(ppo.Terms._fields)))
            sums, _ = jax.lax.scan(add, (zeros, terms), split)
            mean: tuple[Params, ppo.Terms] = jax.tree.map(
                lambda leaf: leaf / parts, sums
            )
            return mean

        @jax.jit
        def step(
            params: Params, opt_state: Any, parts: Sequence[Any], rate: jax.Array
        ) -> tuple[Params, Any, ppo.Terms]:
            grads, terms = jax.tree.map(
                lambda *leaves: sum(leaves) / len(parts), *parts
            )
            params, opt_state = ppo.step(optimizer, params, opt_state, grads, rate)
            return params, opt_state, terms

        self._act, self._prepare = act, prepare
        self._gradient, self._step = gradient, step

    def init(self) -> State:
        """The state at the start."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        params = init_params(key, self.architecture)
        steps = tuple(np.zeros(stream.num_envs, np.int32) for stream in self._streams)
        return State(params, self._optimizer.init(params), self._initial_games, steps)

    def block(self, state: State, index: int) -> tuple[State, dict[str, Any]]:
        """Plays and learns for one block: the new state, and its metrics."""
        config = self.config
        for stream, saved in zip(self._streams, state.games, strict=True):
            stream.restore(saved)
        params, opt_state, _, steps = state
        solved: list[int] = []
        lengths: list[int] = []
        terms: list[ppo.Terms] = []
        updates = config.blocks * config.block
        for update in range(index * config.block, (index + 1) * config.block):
            rate = ppo.learning_rate(config, update / updates)
            key = jax.random.fold_in(jax.random.key(config.seed), update + 1)
            rollouts, steps = self._play(params, key, steps)
            for rollout in rollouts:
                solved += rollout.rewards[rollout.done].tolist()
                lengths += rollout.episode_steps
            params, opt_state, more = self._learn(
                params, opt_state, rollouts, [config.seed, update], rate
            )
            terms += more
        means = jax.tree.map(lambda *leaves: np.mean(leaves), *jax.device_get(terms))
        games = tuple(stream.save() for stream in self._streams)
        metrics = {
            "frames": (index + 1) * config.block_frames,
            "episodes": len(solved),
            "return": REWARD * _mean(solved),
            "solved": _mean(solved),
            "episode_steps": _mean(lengths),
            **means._asdict(),
            "learning_rate": rate,
        }
        return State(params, opt_state, games, steps), metrics

    def _play(
        self, params: Params, key: jax.Array, steps: Sequence[np.ndarray]
    ) -> tuple[list[Rollout], tuple[np.ndarray, ...]]:
        def play(worker: int) -> tuple[Rollout, np.ndarray]:
            own = jax.random.fold_in(key, worker)
            return self._play_one(params, own, worker, steps[worker])

        played = list(self._threads.map(play, range(len(self._streams))))
        return [rollout for rollout, _ in played], tuple(after for _, after in played)

    def _play_one(
        self, params: Params, key: jax.Array, worker: int, steps: np.ndarray
    ) -> tuple[Rollout, np.ndarray]:
        stream, frames = self._streams[worker], self._frames[worker]
        shape = frames.shape[:2]
        actions = np.empty(shape, np.int32)
        log_probs, values, rewards = (np.empty(shape, np.float32) for _ in range(3))
        done = np.empty(shape, bool)
        steps, lengths = steps.copy(), []
        seen = stream.observe().frames
        for index in range(len(frames)):
            frames[index] = seen
            chosen = self._act(params, seen, key, index)
            actions[index], log_probs[index], values[index] = map(np.asarray, chosen)
            stream.act(actions[index])
            gained, seen, first = stream.observe()
            rewards[index], done[index] = gained / REWARD, first
            steps += 1
            lengths += steps[first].tolist()
            steps[first] = 0
        # The key is of no matter: only the values are used.
        last_values = np.asarray(self._act(params, seen, key, len(frames))[2])
        rollout = Rollout(
            frames, actions, log_probs, values, rewards, done, last_values, lengths
        )
        return rollout, steps

    def _learn(
        self,
        params: Params,
        opt_state: Any,
        rollouts: Sequence[Rollout],
        seed: Sequence[int],
        rate: float,
    ) -> tuple[Params, Any, list[ppo.Terms]]:
        config = self.config
        samples = self._samples(rollouts)
        parts = len(rollouts)
        size = config.minibatch_size // parts
        rng = np.random.default_rng(seed)
        terms = []
        for _ in range(config.update_epochs):
            orders = [rng.permutation(config.update_frames // parts) for _ in rollouts]
            for start in range(0, config.update_frames // parts, size):
                chosen = [order[start : start + size] for order in orders]
                jobs = [
                    self._threads.submit(self._gradient_of, params, *each)
                    for each in zip(rollouts, samples, chosen, strict=True)
                ]
                grads = [job.result() for job in jobs]
                params, opt_state, mean = self._step(
                    params, opt_state, grads, jnp.float32(rate)
                )
                terms.append(mean)
        return params, opt_state, terms

    def _gradient_of(
        self, params: Params, rollout: Rollout, samples: ppo.Samples, rows: np.ndarray
    ) -> Any:
        frames = rollout.frames.reshape(-1, *FRAME)[rows]
        part = ppo.Samples(*(leaf[rows] for leaf in samples))
        return jax.block_until_ready(self._gradient(params, frames, part))

    def _samples(self, rollouts: Sequence[Rollout]) -> list[ppo.Samples]:
        """Of each worker, [step * env]; normalised over all together."""

        def joined(name: str, axis: int) -> np.ndarray:
            return np.concatenate([getattr(each, name) for each in rollouts], axis)

        fields = ("rewards", "done", "values")
        prepared = self._prepare(
            *(joined(name, 1) for name in fields), joined("last_values", 0)
        )
        advantages, returns = (
            np.split(np.asarray(array), len(rollouts), axis=1) for array in prepared
        )
        samples = []
        for worker, rollout in enumerate(rollouts):
            taken = (rollout.actions, rollout.log_probs, rollout.values)
            arrays = (*taken, advantages[worker], returns[worker])
            samples.append(ppo.Samples(*(array.reshape(-1) for array in arrays)))
        return samples

    def expert(self, state: State) -> Expert:
        """The expert that training has come to, with its record."""
        config = self.config
        about = {"mode": config.mode, "frames": config.frames, "seed": config.seed}
        return Expert(self.architecture, state.params, about)


def train(config: ExpertConfig, run: RunDir) -> tuple[Expert, list[dict[str, float]]]:
    """Trains to the end, from the start or from the run's last checkpoint.

    Besides metrics.csv, which is the same however often the run was killed, it writes
    speed.csv, which is not: frames per second of every block of this session.

    Returns:
      The expert, and the metrics of every block.
    """
    # Here, so that what is above does without Orbax and tqdm.
    from experiments.common.training import run_epochs

    speeds: list[dict[str, Any]] = []
    with Trainer(config) as trainer:

        def block(state: State, index: int) -> tuple[State, dict[str, Any]]:
            started = time.monotonic()
            state, metrics = trainer.block(state, index)
            seconds = time.monotonic() - started
            speed = config.block_frames / seconds
            speeds.append({"frames": metrics["frames"], "frames_per_second": speed})
            run.write_metrics(speeds, SPEED)
            return state, metrics

        state, history = run_epochs(
            run,
            block,
            trainer.init(),
            config.blocks,
            checkpoint_every=config.checkpoint_every,
            progress=PROGRESS,
            title="expert",
        )
        return trainer.expert(state), history


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
