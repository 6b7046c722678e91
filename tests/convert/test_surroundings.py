"""Small methods that ask for more than queries, keys and values get it from real models, or are refused."""

import inspect
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, LlamaConfig, PreTrainedModel

from attnconv.attention_modules import AttentionOptions, Call, Geometry, create, registry
from attnconv.attention_modules.softmax import SoftmaxAttention
from attnconv.convert import convert_model
from attnconv.convert.surgery.surroundings import embeddings_among
from attnconv.errors import PlanError

# Names that transformers changed, which the releases before it do not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
IDS = torch.arange(3, 21).view(2, 9)


class NoOptions(AttentionOptions):
    """None."""


class Asking(SoftmaxAttention):
    """Softmax that keeps what it was given."""

    calls: list[Call]

    def decode_torch(self, call: Call, state: Any) -> None:
        return None

    def attend_torch(self, call: Call, memory: dict[str, Tensor]) -> Tensor:
        self.__dict__.setdefault("calls", []).append(call)
        return super().attend_torch(call, memory)


class Unrotated(Asking):
    reads_unrotated = True
    reads_positions = True


class Writer(Asking):
    """The first layer of a pass chooses, the others read that."""

    reads_board = True

    def attend_torch(self, call: Call, memory: dict[str, Tensor]) -> Tensor:
        assert call.board is not None
        self.__dict__.setdefault("found", []).append(sorted(call.board))
        call.board[f"choice {len(call.board)}"] = call.query
        return super().attend_torch(call, memory)


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for name, cls in (("unrotated", Unrotated), ("writer", Writer)):
        registry.register(name=name, options=NoOptions, paper="", summary="for this test")(cls)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**SIZES, rope_parameters=YARN, max_position_embeddings=64),
        CohereConfig(**SIZES),
        GlmConfig(**SIZES, head_dim=16),
    ],
    ids=["halves", "yarn", "interleaved", "partial"],
)
def test_keys_before_rope_are_those_of_the_projection(config: Any) -> None:
    torch.manual_seed(0)
    model = convert_model(AutoModelForCausalLM.from_config(config).eval(), "unrotated")
    layer = model.model.layers[1].self_attn
    projected: list[Tensor] = []
    layer.k_proj.register_forward_hook(lambda *call: projected.append(call[2]))
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        cache = model(IDS[:, :8], attention_mask=mask[:, :8]).past_key_values
        model(IDS[:, 8:], attention_mask=mask, past_key_values=cache)
    call = layer.attnconv.calls[-1]
    expected = torch.cat(projected, 1).unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(call.tokens.signals["unrotated_keys"], expected, atol=1e-5, rtol=1e-5)
    assert call.tokens.positions.tolist() == [list(range(9))] * 2
    assert call.unrotated_query.shape == call.query.shape


def test_a_model_without_rotary_embedding_is_refused() -> None:
    with pytest.raises(PlanError, match="'unrotated' works before the rotary embedding, which GPT2Attention does not"):
        convert_model(tiny_gpt2(), "unrotated")


def test_a_core_alone_says_what_it_misses() -> None:
    module = create("unrotated", Geometry(2, 1, 8, 8))
    tensors = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"'unrotated' needs `positions`.*Surroundings"):
        module(*tensors, scaling=1.0)


def test_layers_share_a_board_for_one_pass() -> None:
    torch.manual_seed(0)
    model = convert_model(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval(), "writer")
    cores = [layer.self_attn.attnconv for layer in model.model.layers]
    for _ in range(2):
        model(IDS)
    assert [core.found for core in cores] == [[[], []], [["choice 0"], ["choice 0"]]]
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    model(IDS)
    assert cores[0].found[-1] == []


def test_no_board_outside_of_a_pass() -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = convert_model(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval(), "writer")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(PlanError, match="outside of one; turn gradient checkpointing off"):
        model(IDS, labels=IDS).loss.backward()


def test_where_embeddings_stand_is_looked_up_once_for_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = convert_model(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval(), "unrotated")
    layer, embeddings = module.model.layers[0].self_attn, object()
    assert embeddings_among(layer, (IDS, embeddings), {}) is embeddings
    monkeypatch.setattr(inspect, "signature", None)
    assert embeddings_among(layer, (IDS, embeddings), {}) is embeddings
    assert embeddings_among(layer, (IDS,), {}) is None
