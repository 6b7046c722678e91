"""Gates on heads while they heal: stages that cannot train them, routers that cannot be trained, and balance."""

import pytest
import torch

from attnconv.convert import convert_model
from attnconv.distill.features import FeatureDistillation
from attnconv.distill.logits import LogitDistillation
from attnconv.distill.lora import LoraTuning
from attnconv.distill.trainee import Trainee
from attnconv.distill.transfer import AttentionTransfer
from attnconv.errors import TrainingError
from attnconv.recipes.stages.attention_transfer import AttentionTransferStage
from attnconv.recipes.stages.features import FeaturesStage
from attnconv.recipes.stages.logits import LogitsStage
from attnconv.recipes.stages.lora import LoraStage

COMMON = {"steps": 1, "sequence_length": 48, "learning_rate": 1e-3}


def moa(make_trainee, **options):
    return make_trainee("moa", **{"num_experts": 2, "active": 1, **options})


def test_attention_transfer_is_refused(make_trainee):
    with pytest.raises(
        TrainingError, match="'moa' weighs them on purpose: take a stage logits or lora with train_cores"
    ):
        AttentionTransfer(moa(make_trainee), AttentionTransferStage(**COMMON))


def test_equal_rows_of_a_router_are_no_start(make_trainee):
    trainee = moa(make_trainee)
    with torch.no_grad():
        trainee.cores()["model.layers.1.self_attn"].router[:] = 1.0
    said = r"logits cannot start from model.layers.1.self_attn \('moa'\): the rows of its router are equal.*calibrate"
    with pytest.raises(TrainingError, match=said):
        LogitDistillation(trainee, LogitsStage(**COMMON), None)
    trainee = moa(make_trainee, active=None)
    for core in trainee.cores().values():
        torch.nn.init.zeros_(core.router)
    LogitDistillation(trainee, LogitsStage(**COMMON), None)


def test_balance_is_about_gates(make_trainee):
    with pytest.raises(TrainingError, match="has a balance of 0.1, but no converted layer weighs its heads"):
        LogitDistillation(make_trainee(), LogitsStage(**COMMON, balance=0.1), None)


def gradients_of(trainee, objective, batches):
    parameters = trainee.core_parameters()
    trainee.train_only(parameters.values())
    total = sum(objective.count(batch) for batch in batches)
    loss = sum(float(objective.backward(batch, total).loss) for batch in batches)
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    trainee.model.zero_grad()
    return loss, found


def looked_at(trainee, batch, function):
    found = []
    with trainee.as_student(lambda call: found.append(function(call))):
        trainee.model(**batch.inputs(torch.float32))
    return found


def balance_of(call):
    return call.core.balance_loss(call.query, call.hidden_states, call.padding_mask)


def routing_of(call):
    return call.core.routing(call.query, call.hidden_states)


@pytest.mark.parametrize("recompute", [False, True])
def test_balance_adds_to_loss_and_gradients(make_trainee, batch, padded_batch, monkeypatch, recompute):
    """With the same weights, whether layers are computed again or not; padding counts nowhere."""
    monkeypatch.setattr("attnconv.distill.trainee.RECOMPUTE_ABOVE", 0 if recompute else 1 << 60)
    trainee = moa(make_trainee)
    results = []
    for balance in (0.0, 0.5):
        objective = LogitDistillation(trainee, LogitsStage(**COMMON, balance=balance), None)
        results.append(gradients_of(trainee, objective, [batch, padded_batch]))
    cores = trainee.cores()
    seen = []
    total = batch.num_tokens + padded_batch.num_tokens
    for part in (batch, padded_batch):
        losses = looked_at(trainee, part, balance_of)
        assert len(losses) == len(cores)
        seen.append(torch.stack(losses).mean() * part.num_tokens / total)
    assert results[1][0] - results[0][0] == pytest.approx(0.5 * float(sum(seen).detach()), rel=1e-4)
    wanted = torch.autograd.grad(0.5 * sum(seen), list(trainee.core_parameters().values()))
    for (name, plain), more in zip(results[0][1].items(), wanted, strict=True):
        torch.testing.assert_close(results[1][1][name], plain + more, atol=1e-6, rtol=1e-3)


def test_padding_takes_no_part_in_the_balance(make_trainee, padded_batch, single_rows):
    trainee = moa(make_trainee)
    found = []
    for part in (padded_batch, *single_rows):
        found.append(looked_at(trainee, part, routing_of)[0])
    mask = padded_batch.padding_mask
    apart = torch.cat([routing.scores[0] for routing in found[1:]])
    torch.testing.assert_close(found[0].scores[mask], apart, atol=1e-5, rtol=1e-4)
    core = next(iter(trainee.cores().values()))
    hidden = torch.randn(2, 5, core.geometry.hidden_size)
    query = torch.zeros(2, core.geometry.num_heads, 5, core.geometry.head_dim)
    valid = torch.tensor([[True] * 5, [False] * 5])
    torch.testing.assert_close(core.balance_loss(query, hidden, valid), core.balance_loss(query[:1], hidden[:1]))


def test_balance_is_one_where_all_are_used_alike(make_trainee):
    core = next(iter(moa(make_trainee).cores().values()))
    size = core.geometry.hidden_size
    hidden = torch.zeros(1, 4, size)
    hidden[0, :2, 0], hidden[0, 2:, 0] = 1.0, -1.0
    query = torch.zeros(1, core.geometry.num_heads, 4, core.geometry.head_dim)
    with torch.no_grad():
        core.router.zero_()
        core.router[0, 0] = 1.0
    assert float(core.balance_loss(query, hidden)) == pytest.approx(1.0)
    assert float(core.balance_loss(query, hidden.abs())) == pytest.approx(2 * float(torch.tensor(1.0).sigmoid()))


def test_lora_and_features_take_it_too(make_trainee, batch):
    from transformers import AutoModel

    from attnconv.packaged.model import embedded_model_path

    trainee = moa(make_trainee)
    stage = LoraStage(**COMMON, rank=2, targets=["q_proj"], train_cores=True, balance=1.0)
    objective = LoraTuning(trainee, stage, trainee.add_adapter(stage, seed=0))
    trainee.train_only(trainee.core_parameters().values())
    assert float(objective.backward(batch, objective.count(batch)).loss) > 1.0
    model = convert_model(AutoModel.from_pretrained(embedded_model_path()), "moa", num_experts=2, active=1)
    trainee = Trainee(model)
    trainee.train_only(trainee.core_parameters().values())
    losses = [
        FeatureDistillation(trainee, FeaturesStage(**COMMON, balance=weight)).backward(batch, batch.num_tokens).loss
        for weight in (0.0, 1.0)
    ]
    assert float(losses[1] - losses[0]) >= 0.9
