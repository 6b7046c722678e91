"""LoRA on experts whose weights are one tensor for each projection: merged as unmerged, and never half of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from attnconv.convert import convert_model
from attnconv.distill.trainee import Trainee
from attnconv.errors import TrainingError
from attnconv.recipes.stages.base import LoraPart

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=48, norm_topk_prob=True
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
    ),
    "granitemoe": lambda: GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
IDS = torch.arange(3, 51).view(2, 24)


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    return model


def settings(*targets: str, dropout: float = 0.0, rank: int = 4) -> LoraPart:
    return LoraPart(rank=rank, alpha=8.0, dropout=dropout, targets=list(targets))


def disturbed(trainee: Trainee) -> None:
    torch.manual_seed(1)
    for name, parameter in trainee.model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("targets", "bound"),
    # A product of three matrices is rounded elsewhere once the projections' own update is added to them.
    [(("experts",), 1e-6), (("q_proj", "v_proj", "experts"), 5e-6)],
    ids=["experts", "beside-projections"],
)
def test_merged_is_unmerged(name: str, targets: tuple[str, ...], bound: float, tmp_path: Path) -> None:
    trainee = Trainee(convert_model(tiny(name), "sliding_window"))
    with torch.no_grad():
        plain = trainee.model(IDS).logits
        adapter = trainee.add_adapter(settings(*targets), seed=0)
        disturbed(trainee)
        tuned = trainee.model.eval()(IDS).logits
        with trainee.as_teacher():
            taught = trainee.model(IDS, use_cache=False).logits
    parameters = trainee.adapter_parameters(adapter)
    trainee.train_only(parameters.values())
    trainee.model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    merged = trainee.merge_adapters()
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        after = merged(IDS).logits
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    largest = float(tuned.abs().max())
    assert float((tuned - plain).abs().max()) > 1e-2 * largest
    assert float((taught - plain).abs().max()) <= 1e-5 * largest
    assert float((after - tuned).abs().max()) <= bound * largest
    assert torch.equal(after, reloaded)


def test_two_adapters_and_what_is_kept_of_them() -> None:
    trainee = Trainee(tiny("mixtral"))
    for seed in range(2):
        trainee.add_adapter(settings("q_proj", "experts"), seed=seed)
    disturbed(trainee)
    again = Trainee(tiny("mixtral"))
    for seed in range(2):
        again.add_adapter(settings("q_proj", "experts"), seed=seed)
    again.load_trained(trainee.trained_tensors())
    with torch.no_grad():
        tuned = trainee.model.eval()(IDS).logits
        assert torch.equal(again.model.eval()(IDS).logits, tuned)
        merged = trainee.merge_adapters()(IDS).logits
    assert float((merged - tuned).abs().max()) <= 5e-6 * float(tuned.abs().max())


@pytest.mark.parametrize(
    ("name", "target"),
    [("mixtral", "down_proj"), ("mixtral", "gate_proj"), ("mixtral", "all-linear"), ("qwen2_moe", "up_proj")],
)
def test_half_of_the_weights_are_refused(name: str, target: str) -> None:
    with pytest.raises(TrainingError, match=f'"{target}" does not reach the experts.*name "experts" for them'):
        Trainee(tiny(name)).add_adapter(settings("q_proj", target), seed=0)


def test_dropout_is_refused() -> None:
    with pytest.raises(TrainingError, match="set dropout to 0"):
        Trainee(tiny("mixtral")).add_adapter(settings("experts", dropout=0.1), seed=0)


def test_a_mistaken_name_is_told_what_there_is() -> None:
    with pytest.raises(TrainingError, match='no module "expert" .*experts'):
        Trainee(tiny("mixtral")).add_adapter(settings("expert"), seed=0)


def test_a_model_without_experts_has_no_such_target() -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with pytest.raises(TrainingError, match='no module "experts" for LoRA to update; it has: [^.]*up_proj'):
        Trainee(dense).add_adapter(settings("experts"), seed=0)


def test_the_rank_fits_the_experts() -> None:
    with pytest.raises(TrainingError, match="LoRA's rank 33 is more than the 32"):
        Trainee(tiny("mixtral")).add_adapter(settings("experts", rank=33), seed=0)
