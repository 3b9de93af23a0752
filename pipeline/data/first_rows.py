"""The rows of all sources, side by side, and what the first of them show before a run begins.

Of a data set with few rows all is read, and everything is checked that preparation checks before it tokenises: the same
functions say the same in both places.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.settings import DataSettings, HeadKind
from pipeline.core.errors import DataError
from pipeline.data.forms import check_form, check_head, decide_form, read_samples, settings_for_head
from pipeline.data.labels import Labels, check_sides, find_labels
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import read_rows
from pipeline.data.sources import DataSources, SourceFile
from pipeline.data.split import split_samples

LOCATIONS_SHOWN = 5
# A tenth of a second of a core.
LOOKED_AT = 2000


@dataclass
class Rows:
    """What was read from the sources.

    Attributes:
        train, heldout, calibration: The usable rows of each side.
        rejected: The others.
        count: How many rows there were.
        unread: Columns that say something and are not used, each with the first place where that is so.
        cut: Whether there are more rows than were read.
    """

    train: list[Sample]
    heldout: list[Sample]
    calibration: list[Sample]
    rejected: list[Rejection]
    count: int
    unread: dict[str, str]
    cut: bool


@dataclass(frozen=True)
class FirstRows:
    """What the first rows show.

    Attributes:
        form: the form of the data; `auto` where no row is here.
        heldout: the samples that would be held out, before any is found too long; None where not all rows are known.
        classes: how many classes a new head has to tell apart; None as before, and without such a head.
    """

    form: str
    heldout: tuple[Sample, ...] | None = None
    classes: int | None = None


def read_sides(
    settings: DataSettings, sources: DataSources, labelled: bool, limit: int | None = None
) -> tuple[Rows, DataSettings]:
    """The rows of all sides, and the settings with the form that they have.

    Args:
        limit: the most rows that are read of each file; None for all.

    Raises:
        DataError: a file is damaged, or its columns fit no form.
    """
    unread: dict[str, str] = {}
    form, train, rejected, cut = _read(sources.train, settings_for_head(settings, labelled), unread, limit)
    check_head(form, labelled)
    settings = settings.model_copy(update={"form": form})
    _, heldout, heldout_rejected, heldout_cut = _read(sources.heldout, settings, unread, limit)
    _, calibration, calibration_rejected, calibration_cut = _read(sources.calibration, settings, unread, limit)
    rejected += heldout_rejected + calibration_rejected
    count = len({item.location for item in itertools.chain[Sample | Rejection](train, heldout, calibration, rejected)})
    cut = cut or heldout_cut or calibration_cut
    return Rows(train, heldout, calibration, rejected, count, unread, cut), settings


def check_rejected(rejected: Sequence[Rejection], rows_read: int, settings: DataSettings) -> None:
    """Refuse data of which too large a share is unusable.

    Raises:
        DataError: with the reasons and the first places.
    """
    if len(rejected) <= settings.max_rejected_share * rows_read:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(r.reason for r in rejected).most_common())
    first = ", ".join(row.location for row in rejected[:LOCATIONS_SHOWN])
    raise DataError(
        f"{len(rejected)} of {rows_read} rows ({len(rejected) / rows_read:.1%}) are unusable: {reasons}; first: "
        f"{first}. Mend them{_length_hint(rejected)} or raise data.max_rejected_share "
        f"(now {settings.max_rejected_share:g})"
    )


def check_first_rows(
    settings: DataSettings, sides: Sequence[Sequence[Path]], head: HeadKind, whole: bool = True
) -> FirstRows:
    """Refuse what the first rows show to be wrong with the data.

    Args:
        sides: the files of each side, those to train on first.
        whole: whether these are all files; some may not have been fetched yet.

    Raises:
        DataError: what preparation would raise: a damaged file, columns that no form fits, unusable rows, labels that are no
            classes, or, where there are few rows, sides on which nothing is left.
        RecipeError: the form does not exist.
    """
    check_form(settings)
    sources = DataSources(*(tuple(SourceFile(path, sha256="") for path in side) for side in sides))
    limit = max(1, LOOKED_AT // max(1, len(sources.files)))
    rows, settings = read_sides(settings, sources, head != "language-model", limit)
    whole = whole and not rows.cut
    if whole or not (rows.train or rows.heldout or rows.calibration):
        check_rejected(rows.rejected, rows.count, settings)
    if not whole:
        return FirstRows(settings.form)
    labels = None
    if head != "language-model":
        labels = find_labels(head, settings.labels, [*rows.train, *rows.heldout])
        _check_labels(labels, rows, settings)
    heldout = _check_split(rows, settings, labels, named=bool(sources.heldout))
    return FirstRows(settings.form, heldout, len(labels.head.classes) if labels else None)


def _check_labels(labels: Labels, rows: Rows, settings: DataSettings) -> None:
    """Move samples whose label cannot be read to the rejected rows, and refuse too many of them."""
    for side in (rows.train, rows.heldout, rows.calibration):
        rows.rejected += [read for sample in side if isinstance(read := labels.read(sample), Rejection)]
    places = {rejection.location for rejection in rows.rejected}
    for side in (rows.train, rows.heldout):
        side[:] = [sample for sample in side if sample.location not in places]
    check_rejected(rows.rejected, rows.count, settings)


def _check_split(rows: Rows, settings: DataSettings, labels: Labels | None, named: bool) -> tuple[Sample, ...]:
    """The held-out samples; where references are joined later, a limit counts more of them, so fewer are held out here."""
    wanted = settings.heldout_rows
    if not named and wanted is not None and wanted >= len(rows.train):
        raise DataError(
            f"data.heldout_rows {wanted} is not less than the {len(rows.train)} samples of data.train, so that none is left "
            "to train on; lower it, or name a source in data.heldout"
        )
    split = split_samples(rows.train, rows.heldout if named else None, settings)
    if labels is not None:
        train, heldout = (
            [read[1] for sample in side if not isinstance(read := labels.read(sample), Rejection)]
            for side in (split.train, split.heldout)
        )
        check_sides(labels.head, train, heldout)
    return tuple(split.heldout)


def _read(
    files: Sequence[SourceFile], settings: DataSettings, unread: dict[str, str], limit: int | None
) -> tuple[str, list[Sample], list[Rejection], bool]:
    samples: list[Sample] = []
    rejected: list[Rejection] = []
    cut = False
    for file in files:
        rows = read_rows(file.path, settings.separator, file.sha256)
        first = itertools.islice(rows, limit)
        head = [next(first)]
        form = decide_form(settings, head[0].values, head[0].location)
        settings = settings.model_copy(update={"form": form})  # the first file decides for all
        for item in read_samples(itertools.chain(head, first), settings, form, unread):
            if isinstance(item, Sample):
                samples.append(item)
            else:
                rejected.append(item)
        cut = cut or next(rows, None) is not None
    return settings.form, samples, rejected, cut


def _length_hint(rejected: Sequence[Rejection]) -> str:
    return ", raise data.max_tokens" if any(row.reason.startswith("longer than") for row in rejected) else ""
