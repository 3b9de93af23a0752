"""What the observers see of a model at work, against sums computed by hand."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kasa import SpectrumError, StoredCovariances, find_targets, observe_dropped, observe_inputs, save_sums


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


def test_covariance_is_the_mean_outer_product_of_all_inputs_at_unit_length(model: Shared) -> None:
    batches = [text(1, 2, 5), text(2, 1, 3)]
    with observe_inputs(model, find_targets(model, "all-linear")) as sums:
        for batch in batches:
            model(batch)
    whole = torch.cat([batch.flatten(0, 1) for batch in batches])
    rows = unit(whole.double())
    torch.testing.assert_close(sums.covariance("q").double(), rows.T @ rows / 13, rtol=1e-6, atol=1e-6)
    after_q = unit(model.q(whole).double().detach())
    torch.testing.assert_close(sums.covariance("o").double(), after_q.T @ after_q / 13, rtol=1e-6, atol=1e-6)


def test_layers_that_read_one_tensor_share_one_matrix(model: Shared) -> None:
    with observe_inputs(model, find_targets(model, "all-linear")) as sums:
        model(text(1, 4))
    assert list(sums.sums_II) == ["q", "o"]
    assert sums.leaders == {"q": "q", "k": "q", "o": "o"}
    assert sums.covariance("k") is not None


def test_a_layer_that_stops_sharing_is_refused(model: Shared) -> None:
    with observe_inputs(model, find_targets(model, "all-linear")):
        model(text(1, 4))
        model.swap = True
        with pytest.raises(SpectrumError, match=r"k is not .* q"):
            model(text(1, 4))


def test_nothing_is_observed_after_the_block(model: Shared) -> None:
    with observe_inputs(model, find_targets(model, "all-linear")) as sums:
        model(text(1, 4))
    model(text(2, 4))
    assert sums.tokens["q"] == 4


def test_a_llama_has_four_distinct_inputs_a_block() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50,
        )
    )  # fmt: skip
    with observe_inputs(model, find_targets(model, "all-linear")) as sums:
        model(torch.arange(9)[None])
    assert len(sums.leaders) == 14
    assert [name.rsplit(".", 1)[-1] for name in sums.sums_II] == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2


def test_parts_add_up_to_the_whole(model: Shared, tmp_path) -> None:
    batches = [text(1, 4), text(2, 7), text(3, 2)]
    targets = find_targets(model, "all-linear")
    with observe_inputs(model, targets) as whole:
        for batch in batches:
            model(batch)
    for part, chosen in (("a", batches[:1]), ("b", batches[1:])):
        with observe_inputs(model, targets) as sums:
            for batch in chosen:
                model(batch)
        save_sums(tmp_path / part, sums)
    stored = StoredCovariances([tmp_path / "a", tmp_path / "b"])
    for name in ("q", "k", "o"):
        torch.testing.assert_close(stored.covariance(name), whole.covariance(name), rtol=1e-5, atol=1e-6)
    with pytest.raises(SpectrumError, match=r"never reached v"):
        stored.covariance("v")


def test_output_share_is_the_energy_that_dropping_takes(model: Shared) -> None:
    left, right = text(5, 2)[:, :6].T.contiguous(), text(6, 2)
    x = text(1, 2, 5)
    with observe_dropped(model, {"q": (left, right)}) as observed:
        model(x[:, :2])
        model(x[:, 2:])
    rows = x.flatten(0, 1)
    expected = (rows @ right.T @ left.T).square().sum() / (rows @ model.q.weight.T).square().sum()
    assert observed.shares() == {"q": pytest.approx(expected.item(), rel=1e-5)}
