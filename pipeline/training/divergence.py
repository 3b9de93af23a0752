"""When a training has gone wrong for good: a pure decision on the numbers of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping


def what_went_wrong(record: Mapping[str, float], largest: float, guessing: float) -> str | None:
    """In words, where the loss or the gradient is no number any more, or the loss explodes; None where all is well.

    A loss explodes above `largest` (`Objective.largest_loss`); what guessing costs is only said.
    """
    for name, value in (("loss", record["loss"]), ("gradient's norm", record.get("gradient_norm", 0.0))):
        if not math.isfinite(value):
            return f"the {name} became {value}"
    if record["task_loss"] > largest:
        return f"the loss exploded to {record['task_loss']:.4g}, where guessing costs {guessing:.4g}"
    return None
