"""The spectra of many weights at once, from a checkpoint folder or from a live model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from typing import Protocol

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from kasa.errors import SpectrumError
from kasa.spectra import Triplets, bottom_triplets
from kasa.targets import Target
from kasa.weighting import Weighting


class WeightSource(Protocol):
    """Where weights come from: `CheckpointWeights`, `ModelWeights`."""

    def weight(self, target: Target) -> torch.Tensor:
        """The target's weight as out x in."""


class ModelWeights:
    """The weights of a live model, on whatever device they are; nothing is copied.

    Args:
        model: holds a module of every target's name, with a floating point weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def weight(self, target: Target) -> torch.Tensor:
        """The target's weight as out x in, in its storage type.

        Raises:
            SpectrumError: the model has no such module, or its weight cannot be read: it is quantised, partitioned over
                processes, on the meta device, or of another shape.
        """
        try:
            module = self._model.get_submodule(target.name)
        except AttributeError:
            raise SpectrumError(f"the model has no module {target.name}") from None
        weight = getattr(module, "weight", None)
        stored = (
            (target.in_features, target.out_features)
            if target.transposed
            else (target.out_features, target.in_features)
        )
        if (
            not isinstance(weight, torch.Tensor)
            or weight.is_meta
            or not weight.is_floating_point()
            or weight.shape != stored
        ):
            raise SpectrumError(
                f"{target.name} ({type(module).__name__}) holds no floating point weight of {stored[0]} x {stored[1]}: it is "
                "quantised, partitioned, without values, or adapted already; take the spectra from the original checkpoint "
                "(CheckpointWeights)"
            )
        return weight.detach().T if target.transposed else weight.detach()


def compute_spectra(
    source: WeightSource,
    targets: Sequence[Target],
    rank: int,
    workers: int | None = None,
    weighting: Callable[[str], Weighting] | None = None,
    on_result: Callable[[str, int, int], None] | None = None,
) -> dict[str, Triplets]:
    """The `rank` smallest singular triplets of every target's weight, by name, in the order of the targets.

    Args:
        source: gives the weights.
        targets: which weights.
        rank: R; see `kasa.spectra.bottom_triplets`.
        workers: threads, each with one weight in work; default: one for each core this process may use. With more than
            one, the linear algebra libraries compute in one thread each until this returns: threads of theirs would wait
            for one another, and take ten times as long.
        weighting: gives the weighting of a target by its name, as `CalibrationSums.weighting` does; None weights nothing.
        on_result: called in this thread with (name, done, of all) as results come, in any order. What it raises ends the
            computation.

    Raises:
        SpectrumError: a weight cannot be read or decomposed.
    """

    def one(target: Target) -> Triplets:
        return bottom_triplets(source.weight(target), rank, target.name, weighting and weighting(target.name))

    found: dict[str, Triplets] = {}
    workers = workers or len(os.sched_getaffinity(0))
    # torch keeps its number of threads for each calling thread, the libraries below numpy and scipy for the process.
    alone = workers == 1
    initializer = None if alone else lambda: torch.set_num_threads(1)
    limits = nullcontext() if alone else threadpool_limits(1, user_api="blas")
    with limits, ThreadPoolExecutor(workers, initializer=initializer) as pool:
        # The largest first, so that no thread is left with one at the end.
        by_size = sorted(targets, key=lambda target: -target.in_features * target.out_features)
        names = {pool.submit(one, target): target.name for target in by_size}
        try:
            for done, future in enumerate(as_completed(names), 1):
                found[names[future]] = future.result()
                if on_result:
                    on_result(names[future], done, len(targets))
        finally:
            pool.shutdown(cancel_futures=True)
    return {target.name: found[target.name] for target in targets}
