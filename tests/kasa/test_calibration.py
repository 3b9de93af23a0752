"""What the observers see of a model at work, against sums computed by hand."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kasa import find_targets, observe_layers
from kasa.audit import observe_dropped
from kasa.calibration import StoredCalibration, save_sums
from kasa.errors import SpectrumError


class Shared(nn.Module):
    """q and k read one tensor, o another; `swap` feeds k something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 3, bias=False)
        self.swap = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        self.k(x + 1 if self.swap else x)
        return self.o(q)


@pytest.fixture
def model() -> Shared:
    torch.manual_seed(3)
    return Shared()


def text(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def test_inputs_are_summed_as_outer_products_at_unit_length(model: Shared) -> None:
    batches = [text(1, 2, 5), text(2, 1, 3)]
    with observe_layers(model, find_targets(model, "all-linear")) as sums:
        for batch in batches:
            model(batch)
    whole = torch.cat([batch.flatten(0, 1) for batch in batches])
    rows = unit(whole.double())
    torch.testing.assert_close(sums.weighting("q").inputs_II.double(), rows.T @ rows, rtol=1e-6, atol=1e-6)
    after_q = unit(model.q(whole).double().detach())
    torch.testing.assert_close(sums.weighting("o").inputs_II.double(), after_q.T @ after_q, rtol=1e-6, atol=1e-6)


def test_layers_that_read_one_tensor_share_one_matrix(model: Shared) -> None:
    with observe_layers(model, find_targets(model, "all-linear")) as sums:
        model(text(1, 4))
    assert list(sums.inputs_II) == ["q", "o"]
    assert sums.leaders == {"q": "q", "k": "q", "o": "o"}
    assert sums.weighting("k").inputs_II is sums.weighting("q").inputs_II


def test_a_layer_that_stops_sharing_is_refused(model: Shared) -> None:
    with observe_layers(model, find_targets(model, "all-linear")):
        model(text(1, 4))
        model.swap = True
        with pytest.raises(SpectrumError, match=r"k is not .* q"):
            model(text(1, 4))


def test_nothing_is_observed_after_the_block(model: Shared) -> None:
    with observe_layers(model, find_targets(model, "all-linear"), gradients=True) as sums:
        model(text(1, 4)).sum().backward()
    seen = {name: sums.weighting("o").inputs_II.clone() for name in ("q", "o")}
    model(text(2, 4)).sum().backward()
    assert torch.equal(sums.weighting("o").inputs_II, seen["o"])


def gradients_at(model: Shared, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """d loss / d output of q and o, by hand, and the loss: the sum of squares of what comes out."""
    q = model.q(x)
    out = model.o(q)
    return {"q": 2 * out @ model.o.weight, "o": 2 * out}, out.square().sum()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_summed_as_outer_products_at_unit_length(model: Shared, frozen: bool) -> None:
    model.requires_grad_(not frozen)
    x = text(1, 2, 5)
    with observe_layers(model, find_targets(model, "all-linear"), gradients=True) as sums:
        model(x).square().sum().backward()
    expected, _ = gradients_at(model, x.flatten(0, 1))
    for name in ("q", "o"):
        rows = unit(expected[name].detach())
        torch.testing.assert_close(sums.weighting(name).gradients_OO, rows.T @ rows, rtol=1e-5, atol=1e-5)
    # What k puts out is not used, so nothing flows back into it.
    assert sums.weighting("k").gradients_OO is None
    assert all(parameter.grad is None and parameter.requires_grad is not frozen for parameter in model.parameters())


def test_outputs_wider_than_the_input_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    with observe_layers(model, find_targets(model, "all-linear"), gradients=True) as sums:
        model(torch.randn(3, 4)).sum().backward()
    assert list(sums.gradients_OO) == ["1"]


def test_gradients_need_a_forward_pass_with_them(model: Shared) -> None:
    targets = find_targets(model, "all-linear")
    refused = pytest.raises(SpectrumError, match=r"q: gradients .*no_grad")
    with observe_layers(model, targets, gradients=True), torch.no_grad(), refused:
        model(text(1, 4))


def test_a_llama_has_four_distinct_inputs_a_block() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50,
        )
    )  # fmt: skip
    with observe_layers(model, find_targets(model, "all-linear")) as sums:
        model(torch.arange(9)[None])
    assert len(sums.leaders) == 14
    assert [name.rsplit(".", 1)[-1] for name in sums.inputs_II] == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2


def test_parts_add_up_to_the_whole(model: Shared, tmp_path) -> None:
    batches = [text(1, 4), text(2, 7), text(3, 2)]
    targets = find_targets(model, "all-linear")
    with observe_layers(model, targets, gradients=True) as whole:
        for batch in batches:
            model(batch).square().sum().backward()
    for part, chosen in (("a", batches[:1]), ("b", batches[1:])):
        with observe_layers(model, targets, gradients=True) as sums:
            for batch in chosen:
                model(batch).square().sum().backward()
        save_sums(tmp_path / part, sums)
    stored = StoredCalibration([tmp_path / "a", tmp_path / "b"])
    for name in ("q", "k", "o"):
        ours, theirs = stored.weighting(name), whole.weighting(name)
        torch.testing.assert_close(ours.inputs_II, theirs.inputs_II, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.gradients_OO, theirs.gradients_OO, rtol=1e-5, atol=1e-6)
    for sums in (stored, whole):
        with pytest.raises(SpectrumError, match=r"never reached v"):
            sums.weighting("v")


def test_output_share_is_the_energy_that_dropping_takes(model: Shared) -> None:
    left, right = text(5, 2)[:, :6].T.contiguous(), text(6, 2)
    x = text(1, 2, 5)
    with observe_dropped(model, {"q": (left, right)}) as observed:
        model(x[:, :2])
        model(x[:, 2:])
    rows = x.flatten(0, 1)
    expected = (rows @ right.T @ left.T).square().sum() / (rows @ model.q.weight.T).square().sum()
    assert observed.shares() == {"q": pytest.approx(expected.item(), rel=1e-5)}
