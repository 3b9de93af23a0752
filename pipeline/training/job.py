"""The contract between the driver and the training workers: the job, the files in its folder, and the plan of the steps.

Which samples go into which step, and at which learning rate, are pure functions of settings, seed and step. The samples of a
step do not depend on the number of workers, so a run can be resumed with another. The driver imports this module, so it must
not import torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.config.settings import TrainSettings
from pipeline.core.files import Record, read_journal

if TYPE_CHECKING:
    from pipeline.methods.method import Method

# Written by rank 0: one record per optimizer step.
JOURNAL = "journal.jsonl"
# Folder of `HangDetector`.
ROLL_CALL = "roll-call"
# Written by rank 0 when it has attached the method: `trainable_parameters`, and `attach_s` in seconds.
ATTACHED = "attached.json"
# Worker failures (by the driver), nodes about to leave (by rank 0), and errors that no retry mends (a file per rank). Each file
# has one writer, because nodes may have no common disk.
INTERRUPTIONS = "interruptions.jsonl"
NOTICES = "notices.jsonl"
ERRORS = "errors"
# Singular values of each layer, what it learned beside what it lost (`write_layers`).
LAYERS = "layers.json"


@dataclass(frozen=True)
class TrainJob:
    """All that a training process needs to know.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        work: the folder that training fills, and resumes from.
        method: the method to attach and train.
        settings: the recipe's `train` section.
        deepspeed: the complete DeepSpeed configuration.
    """

    base_folder: Path
    prepared: Path
    work: Path
    method: Method
    settings: TrainSettings
    deepspeed: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.work / "checkpoints"


def journalled_error(work: Path) -> Record | None:
    """The first error that no retry mends: its text as `error`, and as `mistake` whether it is the user's. None without one."""
    return next((record for file in sorted((work / ERRORS).glob("*.jsonl")) for record in read_journal(file)), None)


@dataclass(frozen=True)
class BatchPlan:
    """The order of samples over a whole training run.

    Attributes:
        lengths: number of tokens of each training sample.
        labels: number of losses of each training sample.
        steps: optimizer steps of the run.
        batch_size: samples per optimizer step, over all workers.
        micro_batch_size: samples per forward pass of one worker; unused where samples are packed.
        workers: number of training processes.
        seed: decides the order.
        pack_tokens: most tokens that a worker packs into one forward pass; None pads samples instead.
    """

    lengths: Sequence[int]
    labels: Sequence[int]
    steps: int
    batch_size: int
    micro_batch_size: int
    workers: int
    seed: int
    pack_tokens: int | None = None
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def samples(self, step: int) -> np.ndarray:
        """Indices of the global batch of `step` (counted from 0); a batch may span the end of one epoch and the next."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.lengths))
        return np.array([self._order(int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)])

    def batch_labels(self, step: int) -> int:
        """The number of losses in the global batch of `step`."""
        return sum(int(self.labels[index]) for index in self.samples(step))

    @cached_property
    def accumulation_steps(self) -> int:
        """Gradient accumulation steps: forward passes of each worker per optimizer step, the same for all steps.

        Packed samples take as few as the batch with most tokens needs.
        """
        if self.pack_tokens is None:
            return math.ceil(self.batch_size / (self.workers * self.micro_batch_size))
        batches = ([self.lengths[index] for index in self.samples(step)] for step in range(self.steps))
        return max(_steps_to_pack(lengths, self.pack_tokens, self.workers) for lengths in batches)

    def micro_batches(self, step: int, rank: int) -> list[np.ndarray]:
        """The micro-batches of worker `rank` in `step`, an array of indices for each accumulation step.

        Workers wait for each other in every accumulation step, so each gets about the same work in it: padded samples are
        grouped by length, and packed samples fill all micro-batches evenly. Where the workers do not divide the batch, a
        worker may have fewer samples than another, or none.
        """
        samples = self.samples(step)
        lengths = [self.lengths[index] for index in samples]
        if self.pack_tokens is not None:
            packs = _packs(lengths, self.accumulation_steps * self.workers)
            return [samples[positions] for positions in packs[rank :: self.workers]]
        by_length = samples[np.argsort(lengths, kind="stable")]
        return [chunk[rank :: self.workers] for chunk in np.array_split(by_length, self.accumulation_steps)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        return self._epochs[epoch]


def _packs(lengths: Sequence[int], packs: int) -> list[list[int]]:
    """Positions in `lengths`, in packs of about equally many tokens: greedily, the longest first, each to the emptiest pack."""
    shared: list[list[int]] = [[] for _ in range(packs)]
    loads = [(0, pack) for pack in range(packs)]
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        tokens, pack = heapq.heappop(loads)
        shared[pack].append(position)
        heapq.heappush(loads, (tokens + lengths[position], pack))
    return shared


def _steps_to_pack(lengths: Sequence[int], pack_tokens: int, workers: int) -> int:
    steps = math.ceil(sum(lengths) / (pack_tokens * workers))
    while any(sum(lengths[p] for p in pack) > pack_tokens for pack in _packs(lengths, steps * workers)):
        steps += 1
    return steps


def optimizer_steps(train: TrainSettings, rows: int) -> int:
    """Optimizer steps of a run over `rows` samples: epochs x rows / batch_size, rounded up, at most `max_steps`."""
    # Rounding keeps 0.1 x 1280 / 16 from becoming nine steps.
    steps = math.ceil(round(train.epochs * rows / train.batch_size, 9))
    return steps if train.max_steps is None else min(steps, train.max_steps)


def learning_rate(
    step: int, steps: int, peak: float, warmup_share: float, schedule: Literal["linear", "cosine", "constant"]
) -> float:
    """The learning rate of a step: linear warm-up to `peak`, then decay to 0 after the last step.

    Args:
        step: counted from 0.
        steps: optimizer steps of the run.
        peak: the largest rate.
        warmup_share: share of the steps that the warm-up takes.
        schedule: form of the decay.
    """
    warmup = math.ceil(steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak
