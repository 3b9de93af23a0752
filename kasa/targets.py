"""Which modules of a model carry an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kasa.errors import TargetError, nearest

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
REGEX_PREFIX = "re:"
# The share of a model's weights below which it is not said that they carry no adapter.
_WORTH_SAYING = 0.01


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


@dataclass(frozen=True)
class Outline:
    """What has to be known of a model before it is loaded: above all what it is made of, to choose targets.

    Attributes:
        linear: the modules that can carry an adapter, in the model's own order.
        others: the class names of all other modules by their full names.
        remarks: what of the model carries no adapter under `all-linear`, and why, in sentences.
        drops: whether the model itself drops activations at random in training.
        positions: the length of the longest sequence that it was made for; None where it has no limit of its own.
    """

    linear: tuple[Target, ...]
    others: dict[str, str]
    remarks: tuple[str, ...] = ()
    drops: bool = False
    positions: int | None = None


def find_targets(model: nn.Module, targets: str | Sequence[str], trained_modules: Sequence[str] = ()) -> list[Target]:
    """The modules selected by `targets`, in the model's own order.

    Args:
        model: any transformers model, also on the meta device.
        targets: `all-linear` (every linear module but the output head and those of one output or input), names (a module matches by its last name or
            by a dotted suffix), or one regular expression `re:...` on the full name.
        trained_modules: modules that are to be trained whole, named likewise; nothing in them is selected.

    Raises:
        TargetError: a name or expression matches nothing, or only modules that cannot carry an adapter.
    """
    return select_targets(outline_of(model, trained_modules), targets)


def outline_of(model: nn.Module, trained_modules: Sequence[str] = ()) -> Outline:
    """The outline of a model; what is in `trained_modules` carries no adapter."""
    linear = tuple(target for target in _linear_modules(model) if not is_within(target.name, trained_modules))
    names = {target.name for target in linear}
    others = {name: type(module).__name__ for name, module in model.named_modules() if name and name not in names}
    return Outline(linear, others)


def select_targets(outline: Outline, targets: str | Sequence[str]) -> list[Target]:
    """As `find_targets`, from a model's outline.

    Raises:
        TargetError: as there.
    """
    candidates = {target.name: target for target in outline.linear}
    if targets == ALL_LINEAR:
        return [target for target in candidates.values() if target.smaller_side > 1]  # no rank is below 1
    if isinstance(targets, str) and targets.startswith(REGEX_PREFIX):
        return _by_expression(candidates, targets.removeprefix(REGEX_PREFIX))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for name in wanted:
        if not any(is_suffix(name, candidate) for candidate in candidates):
            raise TargetError(_unmatched(name, outline.others, candidates))
    return [target for target in candidates.values() if any(is_suffix(name, target.name) for name in wanted)]


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


def as_target(name: str, module: nn.Module) -> Target | None:
    """The module as a target, or None if it cannot carry an adapter.

    Quantised linear modules (bitsandbytes, GPTQ, HQQ) pack their weight in other shapes; all state their features.
    """
    if isinstance(known := getattr(module, "target", None), Target):
        return known
    # Its owner, torch's MultiheadAttention, reads the weight and never calls the module.
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    outputs, inputs = getattr(module, "nf", None), getattr(module, "nx", None)
    if isinstance(outputs, int) and isinstance(inputs, int):
        return Target(name, outputs, inputs, transposed=True)
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int) and not any(True for _ in module.children()):
        return Target(name, features[0], features[1])
    return None


def is_suffix(name: str, full_name: str) -> bool:
    """Whether `name` is a module's full name or a dotted end of it."""
    return full_name == name or full_name.endswith("." + name)


def is_within(full_name: str, names: Sequence[str]) -> bool:
    """Whether a module or one that holds it has one of the names, each a full name or a dotted end of it."""
    parts = full_name.split(".")
    return any(is_suffix(name, ".".join(parts[:end])) for name in names for end in range(1, len(parts) + 1))


def _linear_modules(model: nn.Module) -> list[Target]:
    output_head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = output_head() if output_head else None
    found: list[Target] = []
    inside = ""
    for name, module in model.named_modules():
        if module is head or (inside and name.startswith(inside)):
            continue
        if target := as_target(name, module):
            found.append(target)
            # An adapted layer stands for the module inside it.
            inside = name + "."
    return found


def remarks_on(model: nn.Module, linear: Sequence[Target]) -> list[str]:
    """What `all-linear` leaves out of a model with these linear modules, in sentences: modules that no rank fits, and experts."""
    remarks = []
    if narrow := [target for target in linear if target.smaller_side <= 1]:
        first = narrow[0]
        remarks.append(
            f"all-linear leaves {len(narrow)} modules out that no rank fits, such as {first.name} "
            f"({first.out_features} x {first.in_features})"
        )
    stacked = _stacked(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(size for _, size in stacked) / total if total else 0.0
    if share >= _WORTH_SAYING:
        names = ", ".join(sorted({name.rpartition(".")[2] for name, _ in stacked}))
        remarks.append(
            f"{share:.0%} of the weights are stored as 3-D parameters, as those of experts are ({names}): they carry no adapter"
        )
    return remarks


def _stacked(model: nn.Module) -> list[tuple[str, int]]:
    """Name and size of each parameter that holds several matrices; a convolution's holds none."""
    return [
        (f"{name}.{own}", parameter.numel())
        for name, module in model.named_modules()
        if not hasattr(module, "kernel_size")
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] > 1
    ]


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


def _unmatched(name: str, others: dict[str, str], candidates: dict[str, Target]) -> str:
    other = next((kind for full_name, kind in others.items() if is_suffix(name, full_name)), None)
    if other:
        return f"adapter.targets: {name!r} is a {other}, which cannot carry an adapter; linear modules are {_examples(candidates)}"
    short_names = sorted({candidate.rsplit(".", 1)[-1] for candidate in candidates})
    return (
        f"adapter.targets: {name!r} matches no module; linear modules are {_examples(candidates)} ({ALL_LINEAR}: all of them)"
        f"{nearest(name, short_names)}"
    )


def _examples(candidates: dict[str, Target]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in candidates)) or "absent"
