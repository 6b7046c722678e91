"""Routers of experts in training: balance as transformers takes it, loads as they were, and nothing else moved."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from attnconv.convert.reading.checkpoint import load_model, open_checkpoint
from attnconv.distill.balance import RouterBalance
from attnconv.distill.batches import Batch
from attnconv.distill.metrics import ExpertLoad, MetricsFile
from attnconv.distill.mixtures import RouterWatch, router_weights, routers_of
from attnconv.distill.own_weights import OwnWeights
from attnconv.distill.trainee import Trainee
from attnconv.errors import RecipeError, TrainingError
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import Recipe, parse_recipe
from attnconv.recipes.stages.balance import BalanceStage
from attnconv.runs import run_conversion

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
}
IDS = torch.arange(3, 51).view(2, 24)
MASK = torch.ones(2, 24, dtype=torch.bool)
MASK[0, :9] = False


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **EXPERTS[kind]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for router in routers_of(model).values():
        for parameter in router.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("kind", EXPERTS)
def test_every_class_shows_its_routers_and_where_tokens_went(kind: str) -> None:
    model = tiny(kind)
    watch = RouterWatch(model, balance=1.0)
    assert list(watch.routers) == list(routers_of(model))
    assert len(watch.routers) == 2
    assert len(router_weights(model)) == 2
    given: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK.long()}
    with watch.watching():
        out = model(**given, output_router_logits=True)
    loads = watch.loads(MASK)
    assert all(int(load.sum()) == 2 * int(MASK.sum()) for load in loads.values())
    term = watch.term(MASK)
    assert term is not None
    assert term.requires_grad
    if getattr(out, "aux_loss", None) is not None:
        assert torch.allclose(term, out.aux_loss)
    with watch.watching():
        model(**given)
    # Padding counts for nothing.
    assert all(torch.equal(load, loads[name]) for name, load in watch.loads(MASK).items())


def test_the_z_loss_is_the_mean_square_of_the_normaliser() -> None:
    model = tiny("mixtral")
    watch = RouterWatch(model, z=0.5)
    with watch.watching():
        out = model(input_ids=IDS, attention_mask=MASK.long(), output_router_logits=True)
    squares = [layer.logsumexp(-1)[MASK.flatten()].square().mean() for layer in out.router_logits]
    term = watch.term(MASK)
    assert term is not None
    assert torch.allclose(term, 0.5 * (squares[0] + squares[1]) / 2)


def test_weights_in_bfloat16_are_trained_in_float32() -> None:
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    own = OwnWeights()
    own.add({"weight": layer.weight})
    copy = own.trained["weight"]
    assert copy.dtype == torch.float32
    own.open([copy])
    start, inputs = copy.detach().clone(), torch.randn(3, 8).bfloat16()
    for _ in range(2):
        layer(inputs).sum().backward()
    assert copy.grad is not None
    assert torch.allclose(copy.grad, 2 * inputs.float().sum(0).expand(8, 8), rtol=0.02)
    torch.optim.SGD([copy], 1e-5).step()
    own.push()
    # The step is too small for bfloat16, and is not lost.
    assert torch.equal(layer.weight, copy.bfloat16())
    assert int((layer.weight != start.bfloat16()).sum()) < int((copy != start).sum()) == 64
    own.open([])
    assert not layer.weight.requires_grad


def test_a_model_that_is_its_own_teacher_teaches_with_the_routers_it_began_with() -> None:
    trainee = Trainee(tiny("mixtral"))
    batch = Batch(IDS)
    with torch.no_grad():
        before = trainee.model(**batch.inputs(torch.float32)).logits
        trainee.open_routers()
        for weight in trainee.own.trained.values():
            weight.neg_()
        after = trainee.model(**batch.inputs(torch.float32)).logits
        with trainee.as_teacher() as teacher:
            assert torch.equal(teacher(**batch.inputs(torch.float32)).logits, before)
        assert torch.equal(trainee.model(**batch.inputs(torch.float32)).logits, after)
    assert not torch.equal(before, after)


def test_the_routers_warm_up_alone(tmp_path: Path) -> None:
    upcycle = {"kind": "experts", "target": "mixtral", "num_experts": 4, "active": 1, "init": {"kind": "noise"}}
    recipe = Recipe(name="start", rewrite=[upcycle])
    run_conversion(embedded_model_path(), recipe, tmp_path / "start")
    stage = {"kind": "balance", "steps": 16, "sequence_length": 64, "batch_size": 4, "learning_rate": 5e-3}
    stage |= {"balance": 1.0, "log_every": 1}
    recipe = Recipe(name="warm", rewrite=[upcycle], data={"embedded": True}, stages=[stage])
    run_conversion(embedded_model_path(), recipe, tmp_path / "out", device="cpu")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if name.endswith("gate.weight")}
    records = list(MetricsFile(tmp_path / "out" / "metrics.jsonl").records())
    assert len(records) == 16
    assert all(len(record.experts) == 5 for record in records)
    entropies = [sum(load.entropy for load in record.experts.values()) / 5 for record in records]
    assert sum(entropies[-5:]) / 5 > entropies[0] + 0.02
    assert records[-1].loss < records[0].loss
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_loads_in_words() -> None:
    assert ExpertLoad.of([4, 4]).entropy == pytest.approx(1)
    assert ExpertLoad.of([8, 0]) == ExpertLoad([1.0, 0.0], 0.0)
    assert ExpertLoad.of([3, 1]).entropy == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_what_cannot_be_balanced_is_refused() -> None:
    stage = BalanceStage(steps=1, sequence_length=8, learning_rate=1e-3)
    dense = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    with pytest.raises(TrainingError, match="there are no experts"):
        RouterBalance(Trainee(dense), stage)
    with pytest.raises(TrainingError, match="the model has none"):
        RouterBalance(Trainee(dense), stage.model_copy(update={"balance": 0.0, "z": 0.0}))
    tied = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4))
    for router in routers_of(tied).values():
        nn.init.zeros_(router.weight)
    with pytest.raises(TrainingError, match="every token goes through the same experts"):
        RouterBalance(Trainee(tied), stage)
    with pytest.raises(RecipeError, match="are all 0"):
        parse_recipe(
            "name: a\nrewrite: [{kind: degroup}]\ndata: {embedded: true}\nstages: [{kind: balance, steps: 1, "
            "balance: 0, z: 0, next_token: 0, sequence_length: 8, learning_rate: 1.0e-3}]"
        )


def test_experts_of_any_width_run_in_bfloat16(tmp_path: Path) -> None:
    # 172 numbers of two bytes are no multiple of what grouped products take.
    recipe = Recipe(name="a", rewrite=[{"kind": "experts", "target": "mixtral"}])
    run_conversion(embedded_model_path(), recipe, tmp_path / "out")
    model = load_model(open_checkpoint(tmp_path / "out"), dtype=torch.bfloat16)
    with torch.no_grad():
        assert bool(model(torch.arange(3, 20)[None]).logits.isfinite().all())
