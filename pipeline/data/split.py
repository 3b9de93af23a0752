"""The split into training and held-out samples: no prompt is on both sides, and the order of the rows does not matter.

The hash of a prompt alone decides which side it goes to. So a prompt keeps its side when the data grows, and a model that
was trained on last week's data has not seen this week's held-out prompts. With `data.heldout_rows` the prompts with the
smallest hashes are held out: of those some go over to training when the data grows, but none comes back.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.models.chat import Message


class Splittable(Protocol):
    """What the split needs to know about a sample (`forms.Sample`)."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The turns of its conversation."""

    @property
    def opening(self) -> str:
        """The text that must not occur on both sides."""


S = TypeVar("S", bound=Splittable)


@dataclass(frozen=True)
class Split(Generic[S]):
    """The sides of a split, each in the order of its samples' hashes.

    Attributes:
        train: The training samples.
        heldout: The held-out samples.
        validation: Samples taken from the training side, all those of a prompt together.
        duplicates: How many repeated samples were removed.
        leaked: How many training samples were removed because their prompt occurs in the held-out source.
    """

    train: list[S]
    heldout: list[S]
    validation: list[S]
    duplicates: int
    leaked: int


def split_samples(
    train: Sequence[S], heldout: Sequence[S] | None, settings: DataSettings, join: Callable[[list[S]], list[S]] = list
) -> Split[S]:
    """Split `train`, or remove from it the prompts of a named held-out source; then apply the row limits.

    Where held-out samples are split off, `heldout_rows` says how many, in whole prompts and at most half of them; all others
    are to train on. Of a named source it keeps the first so many, prompt by prompt. `train_rows` keeps the training samples
    with the smallest hashes. Prompts are equal if they are equal up to case and white space.

    Args:
        heldout: The samples of `data.heldout`; None if they are to be split off from `train`.
        join: Makes one held-out sample of those that differ by their reference only. The limit counts its results.

    Raises:
        DataError: A side is empty, or the validation samples leave nothing to train on.
    """
    kept = _without_duplicates(train)
    duplicates = len(train) - len(kept)
    leaked = 0
    if heldout is None:
        sides = _divide(kept, settings, join)
    else:
        side = _without_duplicates(heldout)
        duplicates += len(heldout) - len(side)
        openings = {group_key(sample) for sample in side}
        clean = [sample for sample in kept if group_key(sample) not in openings]
        leaked = len(kept) - len(clean)
        sides = clean, side
        _check_named_sides(kept, clean, side)
    seed = settings.split_seed
    ordered = sorted(sides[0], key=lambda sample: _sample_hash(sample, seed))
    grouped = join(sorted(sides[1], key=lambda sample: (_hash(group_key(sample), seed), _sample_hash(sample, seed))))
    ordered, validation = _set_aside(ordered, settings)
    if heldout is not None:
        grouped = grouped[: settings.heldout_rows]
    return Split(ordered[: settings.train_rows], grouped, validation, duplicates, leaked)


def group_key(sample: Splittable) -> str:
    """The opening up to case and white space."""
    return " ".join(sample.opening.casefold().split())


def _divide(samples: list[S], settings: DataSettings, join: Callable[[list[S]], list[S]]) -> tuple[list[S], list[S]]:
    places = {key: _hash(key, settings.split_seed) for key in {group_key(sample) for sample in samples}}
    if len(places) < 2:
        raise DataError(
            f"data.train holds {len(places)} distinct prompt{'' if len(places) == 1 else 's'}, too few to hold one "
            "out; add rows, or name a source in data.heldout"
        )
    first, *others, last = sorted(places, key=places.__getitem__)
    if settings.heldout_rows is None:
        chosen = {key for key, place in places.items() if place < settings.heldout_share * 2**64}
    else:
        half = [first, *others][: len(places) // 2]
        chosen = _first_prompts(half, samples, settings.heldout_rows, join)
    # In a small data set one side may be empty by chance.
    chosen = (chosen | {first}) - {last}
    return _sides(samples, lambda sample: group_key(sample) in chosen)


def _first_prompts(keys: list[str], samples: list[S], limit: int, join: Callable[[list[S]], list[S]]) -> set[str]:
    """As many of the prompts, from the first on, as together have at most `limit` samples."""
    prompts: dict[str, list[S]] = {key: [] for key in keys}
    for sample in samples:
        if (key := group_key(sample)) in prompts:
            prompts[key].append(sample)
    totals = itertools.accumulate(len(join(prompt)) for prompt in prompts.values())
    return {key for key, total in zip(prompts, totals, strict=True) if total <= limit}


def _set_aside(ordered: list[S], settings: DataSettings) -> tuple[list[S], list[S]]:
    """(training samples, validation samples). The latter are those of the first prompts by a hash of their own."""
    if settings.validation_rows is None:
        return ordered, []
    prompts: dict[str, list[S]] = {}
    for sample in ordered:
        prompts.setdefault(group_key(sample), []).append(sample)
    chosen: set[str] = set()
    rows = 0
    for key in sorted(prompts, key=lambda key: _hash(f"validation\0{key}", settings.split_seed)):
        if rows >= settings.validation_rows:
            break
        chosen.add(key)
        rows += len(prompts[key])
    if len(chosen) == len(prompts):
        raise DataError(
            f"data.validation_rows {settings.validation_rows} leaves nothing to train on: there are {len(ordered)} "
            "training samples; lower it"
        )
    return _sides(ordered, lambda sample: group_key(sample) in chosen)


def _sides(samples: list[S], is_heldout: Callable[[S], bool]) -> tuple[list[S], list[S]]:
    train: list[S] = []
    heldout: list[S] = []
    for sample in samples:
        (heldout if is_heldout(sample) else train).append(sample)
    return train, heldout


def _check_named_sides(kept: Sequence[S], clean: Sequence[S], heldout: Sequence[S]) -> None:
    if not heldout:
        raise DataError("data.heldout holds no usable sample; name another source, or leave it out to split data.train")
    if not kept:
        raise DataError("data.train holds no usable sample; see data.form and data.max_tokens")
    if not clean:
        raise DataError(
            f"each of the {len(kept)} training samples has a prompt that occurs in data.heldout, so none is left; "
            "are both the same source? Leave data.heldout out to split data.train"
        )


def _without_duplicates(samples: Sequence[S]) -> list[S]:
    return list({sample.turns: sample for sample in reversed(samples)}.values())[::-1]


def _sample_hash(sample: Splittable, seed: int) -> int:
    return _hash("\0".join(f"{_role(turn)}\0{turn.content}{_beside(turn)}" for turn in sample.turns), seed)


def _role(turn: Message) -> str:
    return turn.role if turn.learned else f"{turn.role}\0context"


def _beside(turn: Message) -> str:
    """What a turn says beside its text."""
    more = (turn.reasoning, turn.tool_calls, turn.tool_call_id, turn.name)
    return repr(more) if any(more) else ""


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest())
