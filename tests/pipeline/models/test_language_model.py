"""Neither padding nor packing changes a loss; labels are counted where they count."""

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.models.forward import IGNORED, collate, label_losses, pack


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length, prompt in ((5, 2), (17, 11), (9, 0), (12, 4), (8, 7)):
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    # A conversation: two labelled stretches with an unlabelled one between them.
    found.append(found[1] | {"labels": [IGNORED] * 3 + found[1]["input_ids"][3:6] + [IGNORED] * 11})
    return found


@torch.no_grad()
def alone(model, sample) -> torch.Tensor:
    """The loss of one unpadded sample, by the book."""
    logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
    return functional.cross_entropy(
        logits, torch.tensor(sample["labels"][1:], dtype=torch.long), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def test_padded_losses_are_those_of_each_sample_alone(llama, samples) -> None:
    losses = label_losses(llama, collate(samples)).sum(dim=1)
    expected = torch.stack([alone(llama, sample) for sample in samples])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_absolute_positions_start_at_the_first_token_not_at_the_padding(samples) -> None:
    # A LLaMA's rotary positions are relative and would not notice.
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, initializer_range=0.3)).eval()
    losses = label_losses(gpt2, collate(samples)).sum(dim=1)
    torch.testing.assert_close(losses, torch.stack([alone(gpt2, s) for s in samples]), rtol=1e-5, atol=1e-5)
    packed = label_losses(gpt2, pack(samples)).sum()
    torch.testing.assert_close(packed, losses.sum(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_losses_are_those_of_each_sample_alone(llama, samples) -> None:
    samples = [*samples, {"input_ids": [3], "labels": [3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    batch = pack(samples)
    assert (
        batch.input_ids_BT.shape == (1, sum(len(sample["input_ids"]) for sample in samples)) == (1, batch.token_count)
    )
    losses = label_losses(llama, batch)[0]
    counts = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in samples]
    found = torch.stack([part.sum() for part in losses.split(counts)])
    torch.testing.assert_close(found, torch.stack([alone(llama, s) for s in samples]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_sample_does_not_see_its_neighbours(llama, samples) -> None:
    def losses_of_the_second(first: dict[str, list[int]]) -> torch.Tensor:
        return label_losses(llama, pack([first, samples[1]]))[0, -6:]

    other = samples[0] | {"input_ids": [1 + token % 60 for token in samples[0]["input_ids"]]}
    assert torch.equal(losses_of_the_second(samples[0]), losses_of_the_second(other))


@torch.no_grad()
def test_the_pad_token_does_not_matter(llama, samples) -> None:
    first, second = (label_losses(llama, collate(samples, pad_token=pad)) for pad in (0, 63))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_the_label_count_is_that_of_the_samples(samples) -> None:
    batch = collate(samples)
    expected = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in samples]
    assert (batch.labels_BK != IGNORED).sum(dim=1).tolist() == expected
    assert batch.token_count == sum(len(sample["input_ids"]) for sample in samples)


def test_shapes_and_positions() -> None:
    batch = collate([{"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9]}, {"input_ids": [5], "labels": [5]}])
    assert batch.input_ids_BT.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2], [0, 0, 0]]
    # The lone token has nothing to be predicted from.
    assert batch.labels_BK.tolist() == [[8, 9], [IGNORED, IGNORED]]


@torch.no_grad()
def test_a_batch_without_labels_has_no_loss(llama) -> None:
    batch = collate([{"input_ids": [7, 8, 9], "labels": [IGNORED] * 3}])
    assert label_losses(llama, batch).sum() == 0
