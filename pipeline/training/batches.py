"""Which samples go into which step: a pure function of the seed and the step, whatever the number of workers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from pipeline.config.training import TrainSettings


@dataclass(frozen=True)
class BatchPlan:
    """The order of samples over a whole training run.

    Attributes:
        lengths: tokens of each training sample.
        steps: optimizer steps of the run.
        batch_size: samples per optimizer step, over all workers.
        micro_batch_size: samples per forward pass of one worker; packed samples have `pack_tokens` instead.
        workers: number of training processes.
        seed: decides the order.
        pack_tokens: the most tokens a worker packs into one forward pass; None pads samples instead.
    """

    lengths: Sequence[int]
    steps: int
    batch_size: int
    micro_batch_size: int
    workers: int
    seed: int
    pack_tokens: int | None = None
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def samples(self, step: int) -> np.ndarray:
        """Indices of the global batch of `step` (counted from 0); passes over the data follow one another seamlessly."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.lengths))
        return np.array([self._order(int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)])

    @cached_property
    def passes(self) -> int:
        """Forward passes of each worker in every step; packed, as few as the fullest batch needs."""
        if self.pack_tokens is None:
            return math.ceil(self.batch_size / (self.workers * self.micro_batch_size))
        batches = ([self.lengths[index] for index in self.samples(step)] for step in range(self.steps))
        return max(_passes_needed(lengths, self.pack_tokens, self.workers) for lengths in batches)

    def micro_batches(self, step: int, rank: int) -> list[np.ndarray]:
        """What worker `rank` computes in `step`, one array of indices for each forward pass.

        Padded samples of like length share a pass, and the passes of one moment are dealt evenly to the workers; packed
        samples fill all passes evenly. So nobody waits for long. Where the workers do not divide the batch, a worker may
        have fewer samples in a pass than another, or none.
        """
        samples = self.samples(step)
        lengths = [self.lengths[index] for index in samples]
        if self.pack_tokens is not None:
            packs = _share_out(lengths, self.passes * self.workers)
            return [samples[positions] for positions in packs[rank :: self.workers]]
        by_length = samples[np.argsort(lengths, kind="stable")]
        return [chunk[rank :: self.workers] for chunk in np.array_split(by_length, self.passes)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        return self._epochs[epoch]


def _share_out(lengths: Sequence[int], packs: int) -> list[list[int]]:
    """Positions in `lengths` in packs of about equally many tokens: the longest first, each to the emptiest pack."""
    shared: list[list[int]] = [[] for _ in range(packs)]
    loads = [(0, pack) for pack in range(packs)]
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        tokens, pack = heapq.heappop(loads)
        shared[pack].append(position)
        heapq.heappush(loads, (tokens + lengths[position], pack))
    return shared


def _passes_needed(lengths: Sequence[int], pack_tokens: int, workers: int) -> int:
    passes = math.ceil(sum(lengths) / (pack_tokens * workers))
    while any(sum(lengths[p] for p in pack) > pack_tokens for pack in _share_out(lengths, passes * workers)):
        passes += 1
    return passes


def optimizer_steps(train: TrainSettings, rows: int) -> int:
    """Steps of a run over `rows` samples: epochs x rows / batch_size, the last batch filled up from the next pass."""
    # Rounding keeps 0.1 x 1280 / 16 from becoming nine steps.
    steps = math.ceil(round(train.epochs * rows / train.batch_size, 9))
    return steps if train.max_steps is None else min(steps, train.max_steps)


def learning_rate(
    step: int, steps: int, peak: float, warmup_share: float, schedule: Literal["linear", "cosine", "constant"]
) -> float:
    """The rate of `step` (from 0): a linear warm-up to `peak`, then the decay, which ends at 0 after the last step."""
    warmup = math.ceil(steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak
