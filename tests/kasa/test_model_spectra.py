"""The spectra of whole models, live and stored."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kasa import CheckpointWeights, ModelWeights, compute_spectra, find_targets
from kasa.errors import SpectrumError
from kasa.spectra import bottom_triplets
from kasa.targets import Target
from kasa.weighting import Weighting


def test_a_model_and_its_checkpoint_have_the_same_spectra(model, tmp_path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    targets = find_targets(model, "all-linear")
    live = compute_spectra(ModelWeights(model), targets, 4)
    stored = compute_spectra(CheckpointWeights(tmp_path), targets, 4)
    assert list(live) == list(stored) == ["square", "tall", "wide", "conv"]
    for target in targets:
        assert live[target.name].left_OR.shape == (target.out_features, 4)
        assert live[target.name].right_RI.shape == (4, target.in_features)
        assert torch.equal(live[target.name].right_RI, stored[target.name].right_RI)


def test_threads_and_their_number_change_nothing(model) -> None:
    targets, threads = find_targets(model, "all-linear"), torch.get_num_threads()
    alone, together = (compute_spectra(ModelWeights(model), targets, 4, workers=n) for n in (1, 3))
    for target in targets:
        assert torch.equal(alone[target.name].left_OR, together[target.name].left_OR)
    assert torch.get_num_threads() == threads


def test_a_weighting_is_asked_for_by_name(model) -> None:
    targets = find_targets(model, "all-linear")
    widths = {target.name: target.in_features for target in targets}
    found = compute_spectra(ModelWeights(model), targets, 4, weighting=lambda name: weighting(widths[name]))
    for target in targets:
        expected = bottom_triplets(ModelWeights(model).weight(target), 4, weighting=weighting(target.in_features))
        assert torch.equal(found[target.name].right_RI, expected.right_RI)


def weighting(width: int) -> Weighting:
    return Weighting(torch.diag(torch.linspace(1, 100, width)))


def test_progress_is_told_and_may_stop(model) -> None:
    targets, told = find_targets(model, "all-linear"), []
    compute_spectra(ModelWeights(model), targets, 4, 2, on_result=lambda *progress: told.append(progress))
    assert [(done, count) for _, done, count in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {name for name, *_ in told} == {target.name for target in targets}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_spectra(ModelWeights(model), targets, 4, on_result=stop)


def test_a_broken_weight_is_named(model) -> None:
    with torch.no_grad():
        model.tall.weight[3, 4] = float("nan")
    with pytest.raises(SpectrumError, match=r"^tall: .*NaN"):
        compute_spectra(ModelWeights(model), find_targets(model, "all-linear"), 4, 2)


class Packed(nn.Linear):
    """A weight of four bits, two a byte, as bitsandbytes keeps them."""

    def __init__(self) -> None:
        super().__init__(24, 24)
        self.weight = nn.Parameter(torch.zeros(24 * 12, 1, dtype=torch.uint8), requires_grad=False)


class Elsewhere(nn.Module):
    """A module without any tensor `weight`, as GPTQ's."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(3, 24, dtype=torch.int32), requires_grad=False)


@pytest.mark.parametrize(
    "module",
    [Packed(), Elsewhere(), nn.Linear(24, 24, device="meta"), nn.Linear(24, 20)],
    ids=["packed", "no weight", "meta", "other shape"],
)
def test_a_weight_that_cannot_be_read_is_refused(module: nn.Module, model) -> None:
    model.square = module
    with pytest.raises(SpectrumError, match=r"square \(\w+\).*24 x 24.*original checkpoint"):
        ModelWeights(model).weight(Target("square", 24, 24))


def test_a_missing_module_is_named(model) -> None:
    with pytest.raises(SpectrumError, match=r"no module nowhere\.at\.all"):
        ModelWeights(model).weight(Target("nowhere.at.all", 24, 24))
