"""When a training has gone wrong for good: a pure decision on the numbers of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping


def what_went_wrong(record: Mapping[str, float], vocabulary: int) -> str | None:
    """In words, where the loss or the gradient is no number any more, or the loss explodes; None where all is well.

    A loss counts as exploding from twice that of guessing, which is the logarithm of the vocabulary's size, in nats a token.
    """
    for name, value in (("loss", record["loss"]), ("gradient's norm", record.get("gradient_norm", 0.0))):
        if not math.isfinite(value):
            return f"the {name} became {value}"
    guessing = math.log(vocabulary)
    if record["task_loss"] > 2 * guessing:
        return f"the loss exploded to {record['task_loss']:.4g}, where guessing costs {guessing:.4g}"
    return None
