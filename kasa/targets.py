"""Which modules of a model carry an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from kasa.errors import TargetError, nearest

ALL_LINEAR = "all-linear"
REGEX_PREFIX = "re:"


@dataclass(frozen=True)
class Target:
    """A module y = W x (+ bias) with W of shape out_features x in_features.

    `transposed` says that the module stores W^T (GPT-2's Conv1D).
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def smaller_side(self) -> int:
        """k = min(out, in), the number of singular values."""
        return min(self.out_features, self.in_features)


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> list[Target]:
    """The modules selected by `targets`, in the model's own order.

    Args:
        model: any transformers model, also on the meta device.
        targets: `all-linear` (every linear module but the output head), names (a module matches by its last name or
            by a dotted suffix), or one regular expression `re:...` on the full name.

    Raises:
        TargetError: a name or expression matches nothing, or only modules that cannot carry an adapter.
    """
    candidates = {target.name: target for target in _linear_modules(model)}
    if targets == ALL_LINEAR:
        return list(candidates.values())
    if isinstance(targets, str) and targets.startswith(REGEX_PREFIX):
        return _by_expression(candidates, targets.removeprefix(REGEX_PREFIX))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for name in wanted:
        if not any(_is_suffix(name, candidate) for candidate in candidates):
            raise TargetError(_unmatched(name, model, candidates))
    return [target for target in candidates.values() if any(_is_suffix(name, target.name) for name in wanted)]


def check_rank(targets: Sequence[Target], rank: int, key: str) -> None:
    """Refuse a rank that some target cannot carry; `key` names the setting in the error.

    Raises:
        TargetError: `rank` is not below the smaller side of a weight.
    """
    for target in targets:
        if rank >= target.smaller_side:
            raise TargetError(
                f"{key} {rank} must be below {target.smaller_side}, the smaller side of "
                f"{target.name} ({target.out_features} x {target.in_features}); lower it or leave that module out of adapter.targets"
            )


def _linear_modules(model: nn.Module) -> list[Target]:
    output_head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = output_head() if output_head else None
    found = []
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            found.append(Target(name, module.out_features, module.in_features))
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            found.append(Target(name, module.nf, module.nx, transposed=True))
    return found


def _by_expression(candidates: dict[str, Target], expression: str) -> list[Target]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise TargetError(f"adapter.targets: {expression!r} is no regular expression: {error}") from None
    found = [target for name, target in candidates.items() if pattern.search(name)]
    if not found:
        raise TargetError(
            f"adapter.targets: {expression!r} matches none of {len(candidates)} linear modules, such as {_examples(candidates)}"
        )
    return found


def _unmatched(name: str, model: nn.Module, candidates: dict[str, Target]) -> str:
    other = next((type(m).__name__ for n, m in model.named_modules() if n and _is_suffix(name, n)), None)
    if other:
        return f"adapter.targets: {name!r} is a {other}, which cannot carry an adapter; linear modules are {_examples(candidates)}"
    short_names = sorted({candidate.rsplit(".", 1)[-1] for candidate in candidates})
    return f"adapter.targets: {name!r} matches no module; linear modules are {_examples(candidates)}{nearest(name, short_names)}"


def _examples(candidates: dict[str, Target]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in candidates)) or "absent"


def _is_suffix(name: str, full_name: str) -> bool:
    return full_name == name or full_name.endswith("." + name)
