"""Selecting modules: every pattern either selects something or is an error that names what is near."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kasa import find_targets
from kasa.errors import TargetError
from kasa.targets import check_rank


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))


def test_all_linear_is_everything_but_the_output_head(llama) -> None:
    found = find_targets(llama, "all-linear")
    assert len(found) == 2 * 7
    assert not any("lm_head" in target.name for target in found)
    shapes = {target.name: (target.out_features, target.in_features) for target in found}
    assert shapes["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert shapes["model.layers.1.mlp.down_proj"] == (32, 48)


def test_conv1d_is_seen_as_out_by_in(gpt2) -> None:
    (target,) = find_targets(gpt2, "c_attn")
    assert (target.out_features, target.in_features, target.transposed) == (96, 32, True)
    assert target.smaller_side == 32


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "v_proj"], 4),
        ("layers.0.self_attn.q_proj", 1),
        ("model.layers.1.mlp.up_proj", 1),
        (r"re:layers\.1\..*(up|down)_proj$", 2),
        ("lm_head", 0),
        ("_proj", 0),
    ],
    ids=str,
)
def test_names_suffixes_and_expressions(llama, wanted, count) -> None:
    if count:
        assert len(find_targets(llama, wanted)) == count
    else:
        with pytest.raises(TargetError):
            find_targets(llama, wanted)


def test_the_order_is_the_models(llama) -> None:
    assert [t.name.rsplit(".", 1)[-1] for t in find_targets(llama, ["v_proj", "q_proj"])] == ["q_proj", "v_proj"] * 2


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("q_porj", r"'q_porj' matches no module; .*did you mean .*q_proj"),
        (["q_proj", "query"], "'query' matches no module"),
        ("all", r"'all' matches no module; .*down_proj \(all-linear: all of them\)$"),
        ("input_layernorm", "'input_layernorm' is a LlamaRMSNorm, which cannot carry an adapter"),
        ("re:nothing_like_it", "matches none of 14 linear modules, such as q_proj"),
        ("re:(", r"'\(' is no regular expression"),
    ],
)
def test_what_matches_nothing_is_an_error_with_a_hint(llama, wanted, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        find_targets(llama, wanted)


def test_the_rank_must_stay_below_the_smaller_side(llama) -> None:
    targets = find_targets(llama, "all-linear")
    check_rank(targets, 15, "adapter.rank")
    with pytest.raises(
        TargetError, match=r"adapter\.rank 16 must be below 16, the smaller side of .*k_proj \(16 x 32\)"
    ):
        check_rank(targets, 16, "adapter.rank")
