"""Text as the calibration and the audit see it."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.run.stages.audit import truncation_warning
from pipeline.spectra.calibration import TOKENS_PER_BATCH, equal_length_batches, first_rows, language_loss

TEXTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11], [12, 13]]


def test_batches_hold_one_length_and_every_text() -> None:
    batches = equal_length_batches(TEXTS)
    assert batches == [[[4, 5, 6, 7, 8]], [[1, 2, 3], [9, 10, 11]], [[12, 13]]]


def test_a_pass_is_bounded() -> None:
    batches = equal_length_batches([[0] * 300] * 7)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert all(len(batch) * 300 <= TOKENS_PER_BATCH for batch in batches)
    assert equal_length_batches([[0] * (TOKENS_PER_BATCH + 1)] * 2) == [[[0] * (TOKENS_PER_BATCH + 1)]] * 2


def test_language_loss_is_the_mean_over_all_tokens_but_the_first() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)).eval()
    losses = []
    for text in TEXTS:
        logits = model(torch.tensor([text])).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none"))
    assert language_loss(model, TEXTS) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_the_first_rows_reach_the_tokens_asked_for() -> None:
    samples = {"input_ids": TEXTS}

    class Samples(dict):
        def __len__(self) -> int:
            return len(TEXTS)

    assert first_rows(Samples(samples), 1) == range(1)
    assert first_rows(Samples(samples), 4) == range(2)
    assert first_rows(Samples(samples), 100) == range(4)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [({}, "adapter.truncation_rank"), ({"adapter.truncation": "weight"}, "adapter.truncation=loss")],
)
def test_a_costly_truncation_is_warned_of_with_its_remedy(recipe, changes, remedy) -> None:
    facts = {"base_loss": 3.0, "truncated_loss": 3.2, "worst": [{"name": "model.v_proj", "loss": 3.1}]}
    warning = truncation_warning(recipe(changes), facts)
    assert warning is not None
    assert all(words in warning for words in ("3.000", "3.200", "model.v_proj", "3.100", remedy))


def test_a_harmless_truncation_is_not(recipe) -> None:
    facts = {"base_loss": 3.0, "truncated_loss": 3.2, "worst": []}
    assert truncation_warning(recipe({"spectra.warn_above": 0.3}), facts) is None
