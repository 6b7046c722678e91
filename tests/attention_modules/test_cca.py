"""`cca`: an exact start, transformers' own layer as the oracle, and real models with their rotary embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, LlamaConfig, PreTrainedModel

from attnconv.attention_modules import Geometry, Surroundings, create
from attnconv.attention_modules.tokens import Rotation
from attnconv.convert import convert_model
from attnconv.errors import PlanError

# Names that transformers changed, which the releases before it do not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
IDS = torch.arange(3, 27).view(2, 12)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "halves": LlamaConfig(**SIZES),
    "interleaved": CohereConfig(**SIZES),
    "partial": GlmConfig(**SIZES, head_dim=16),
}


def tiny(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".attnconv." in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_start_is_the_model_itself(name: str) -> None:
    base = tiny(CONFIGS[name])
    expected = base(IDS).logits
    found = convert_model(base, "cca")(IDS).logits
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@torch.no_grad()
def test_the_start_in_bfloat16_is_as_near_as_rounding_is() -> None:
    base = tiny(CONFIGS["halves"], torch.bfloat16)
    expected = base(IDS).logits.float()
    found = convert_model(base, "cca")(IDS).logits.float()
    assert float((found - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_padding_and_packing_are_the_whole_text(name: str) -> None:
    model = disturbed(convert_model(tiny(CONFIGS[name]), "cca", depthwise_kernel=3))
    whole = model(IDS).logits
    cache = model(IDS[:, :5]).past_key_values
    steps = [model(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 5:], atol=1e-5, rtol=1e-5)

    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    padded = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 4:], model(IDS[:1, 4:]).logits, atol=1e-5, rtol=1e-5)

    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
    apart = [model(IDS[:1, :7]).logits, model(IDS[:1, 7:]).logits]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-5, rtol=1e-5)


def test_every_parameter_learns() -> None:
    model = disturbed(convert_model(tiny(CONFIGS["halves"]), "cca", norm=True))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".attnconv." in n)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = disturbed(convert_model(tiny(CONFIGS["halves"]), "cca", norm=True, value_shift=1.0))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_it_is_the_layer_of_zaya() -> None:
    """With everything switched on, projections and norms are those of transformers' own compressed convolution."""
    zaya = pytest.importorskip("transformers.models.zaya.modeling_zaya", reason="these transformers have no Zaya")
    from transformers import ZayaConfig

    config = ZayaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, cca_time0=2, cca_time1=2
    )
    torch.manual_seed(0)
    theirs = zaya.ZayaCCAProjection(config, 0)
    norm = zaya.ZayaQKNorm(config)
    hidden = torch.randn(2, 11, 24)
    with torch.no_grad():
        norm.temp.uniform_(0.5, 2.0)
        query, key, value = theirs(hidden, None)
        query, key = norm(query, key)
        heads = {
            "query": theirs.q_proj(hidden).unflatten(-1, (4, 8)).transpose(1, 2),
            "key": theirs.k_proj(hidden).unflatten(-1, (2, 8)).transpose(1, 2),
            "value": torch.cat([theirs.v_proj_current(hidden), theirs.v_proj_delayed(hidden)], -1)
            .unflatten(-1, (2, 8))
            .transpose(1, 2),
        }
        ours = create("cca", Geometry(4, 2, 8, 8), mixing=1.0, value_shift=1.0, norm=True)
        ours.depthwise.copy_(theirs.conv_qk_depthwise.weight)
        ours.depthwise_bias.copy_(theirs.conv_qk_depthwise.bias)
        ours.grouped.copy_(theirs.conv_qk_grouped.weight)
        ours.grouped_bias.copy_(theirs.conv_qk_grouped.bias)
        ours.temperature.copy_(norm.temp)
        expected = create("softmax", Geometry(4, 2, 8, 8))(
            *(t.transpose(1, 2) for t in (query, key, value)), scaling=8**-0.5
        )
        found = ours(**heads, scaling=8**-0.5, around=unrotated(heads["query"], heads["key"]))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def unrotated(query: Tensor, key: Tensor) -> Surroundings:
    ones = torch.ones(len(key), key.shape[2], 1)
    return Surroundings(unrotated=(query, key), rotation=Rotation(ones, ones, lambda q, k, cos, sin: (q, k)))


def test_a_model_without_rotary_embedding_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot be converted: 'cca' works before the rotary embedding, which GPT2Att"):
        convert_model(tiny_gpt2(), "cca")


def test_a_core_alone_says_what_it_misses() -> None:
    tensors = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"'cca' needs query and key .*Surroundings\(unrotated=\.\.\., rotation="):
        create("cca", Geometry(2, 1, 8, 8))(*tensors, scaling=1.0)
