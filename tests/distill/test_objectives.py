"""Losses and gradients of the three kinds of stage against their plain forms on the whole model."""

import copy

import pytest
import torch
from torch.nn import functional

from attnconv.convert.surgery.attention_function import attention_hook
from attnconv.distill.distance import output_distance
from attnconv.distill.head import TrainedHead
from attnconv.distill.logits import LogitDistillation
from attnconv.distill.lora import LoraTuning
from attnconv.distill.objective import Figures
from attnconv.distill.transfer import AttentionTransfer, attention_weight_loss
from attnconv.errors import TrainingError
from attnconv.recipes import LoraPart
from attnconv.recipes.stages.attention_transfer import AttentionTransferStage
from attnconv.recipes.stages.logits import LogitsStage
from attnconv.recipes.stages.lora import LoraStage

COMMON = {"steps": 1, "sequence_length": 48, "learning_rate": 1e-3}
TARGETS = ["q_proj", "v_proj"]


def transfer_stage(**loss):
    return AttentionTransferStage(**COMMON, loss=loss)


def make_objective(kind, trainee, adapter_seed=1):
    """An objective of the kind, its adapter's B filled so that the adapter matters."""
    if kind == "attention_transfer":
        return AttentionTransfer(trainee, transfer_stage(output_mse=1000))
    part = {"rank": 2, "alpha": 4, "targets": TARGETS}
    if kind == "lora":
        stage = LoraStage(**COMMON, **part, train_cores=True)
    else:
        stage = LogitsStage(**COMMON, lora=LoraPart(**part), temperature=2.0)
    adapter = trainee.add_adapter(stage if kind == "lora" else stage.lora, seed=adapter_seed)
    torch.manual_seed(adapter_seed)
    with torch.no_grad():
        for name, parameter in trainee.adapter_parameters(adapter).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return (LoraTuning if kind == "lora" else LogitDistillation)(trainee, stage, adapter)


def parameters_of(objective):
    return {name: p for group in objective.parameter_groups() for name, p in group.parameters.items()}


def run(objective, trainee, batches):
    """Figures and gradients of one step over some micro-batches."""
    parameters = parameters_of(objective)
    trainee.train_only(parameters.values())
    total = sum(objective.count(batch) for batch in batches)
    figures = Figures.total([objective.backward(batch, total) for batch in batches])
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    trainee.model.zero_grad()
    return figures, gradients


def assert_same(left, right, tolerance=2e-5):
    torch.testing.assert_close(left[0].loss, right[0].loss, rtol=tolerance, atol=1e-6)
    for name, gradient in left[1].items():
        scale = float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(right[1][name], gradient, rtol=1e-3, atol=tolerance * 10 * scale, msg=name)


def summed_transfer(trainee, batch, parameters):
    """Loss and gradients with every layer's graph kept to the end."""
    pairs = []

    def record(call):
        pairs.append((call.student(), call.teacher()))
        return pairs[-1][1]

    trainee.train_only(parameters.values())
    with attention_hook(trainee.model, record):
        trainee.model(input_ids=batch.input_ids, use_cache=False)
    loss = 1000 * sum(functional.mse_loss(student, teacher) for student, teacher in pairs) / len(pairs)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    trainee.model.zero_grad()
    return Figures(loss.detach()), gradients


def test_layer_local_backward_equals_the_summed_loss(make_trainee, batch):
    trainee = make_trainee()
    objective = make_objective("attention_transfer", trainee)
    figures, gradients = run(objective, trainee, [batch])
    assert_same(summed_transfer(trainee, batch, parameters_of(objective)), (figures, gradients))
    assert len(figures.layers) == 5


def test_only_one_layer_is_alive_at_a_time(make_trainee, batch):
    trainee = make_trainee()
    alive = []
    backward = torch.Tensor.backward

    def counted(tensor, *args, **kwargs):
        alive.append(sum(p.grad is not None for p in trainee.core_parameters().values()))
        return backward(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", counted)
        run(make_objective("attention_transfer", trainee), trainee, [batch])
    assert alive == [0, 3, 6, 9, 12]


def test_the_teacher_is_the_model_before_the_swap(make_trainee, batch):
    trainee = make_trainee()
    dense = copy.deepcopy(trainee.model)
    for module in dense.modules():
        if hasattr(module, "attnconv"):
            module.__class__ = type(module)._attnconv_original
            (module.config,) = module.__dict__["_attnconv_config"]
    with torch.no_grad(), trainee.as_teacher():
        taught = trainee.model(input_ids=batch.input_ids, use_cache=False).logits
        torch.testing.assert_close(taught, dense(input_ids=batch.input_ids, use_cache=False).logits)
    assert not torch.allclose(trainee.model(input_ids=batch.input_ids, use_cache=False).logits, taught, atol=0.1)


@pytest.mark.parametrize("kind", ["attention_transfer", "lora", "logits"])
def test_padding_does_not_count_and_batches_add_up(make_trainee, padded_batch, single_rows, kind):
    trainee = make_trainee()
    objective = make_objective(kind, trainee)
    together = run(objective, trainee, [padded_batch])
    assert_same(together, run(objective, trainee, single_rows))


def test_lora_is_the_plain_next_token_loss(make_trainee, batch):
    trainee = make_trainee()
    objective = make_objective("lora", trainee)
    figures, gradients = run(objective, trainee, [batch])
    trainee.train_only(parameters_of(objective).values())
    loss = trainee.model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
    loss.backward()
    plain = {name: parameter.grad for name, parameter in parameters_of(objective).items()}
    assert_same((Figures(loss.detach()), plain), (figures, gradients))


def test_logits_is_the_divergence_from_the_plain_teacher(make_trainee, batch):
    trainee = make_trainee()
    objective = make_objective("logits", trainee)
    figures, _ = run(objective, trainee, [batch])
    with torch.no_grad():
        student = trainee.model(input_ids=batch.input_ids, use_cache=False).logits
        teacher = make_trainee()
        with teacher.as_teacher():
            target = teacher.model(input_ids=batch.input_ids, use_cache=False).logits
    p, q = (target / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    expected = 4 * functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(figures.loss, expected, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_logits(make_trainee, batch):
    trainee = make_trainee(window=64)
    stage = LogitsStage(**COMMON, lora=LoraPart(rank=2, targets=TARGETS))
    objective = LogitDistillation(trainee, stage, trainee.add_adapter(stage.lora, seed=0))
    assert float(run(objective, trainee, [batch])[0].loss) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "logits"])
def test_the_head_in_pieces_gives_the_same(make_trainee, batch, monkeypatch, kind):
    trainee = make_trainee()
    objective = make_objective(kind, trainee)
    whole = run(objective, trainee, [batch])
    objective.head.positions_at_once = 21
    assert [s.stop - s.start for s in objective.head.slices(3, 48)] == [7] * 6 + [6]
    assert_same(whole, run(objective, trainee, [batch]))


def test_the_head_refuses_what_it_cannot_take_apart(make_trainee, batch):
    trainee = make_trainee()
    with pytest.raises(
        TrainingError,
        match="no language-model head, which the stage lora needs: take a stage attention_transfer or features",
    ):
        TrainedHead(trainee.model.model, "lora")
    plain = type(trainee.model).forward

    def shifted(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        if kwargs["input_ids"].sum() > 0:
            output.logits = output.logits + 5
        return output

    trainee.model.forward = shifted.__get__(trainee.model)
    with pytest.raises(TrainingError, match="more than its layers and its head"):
        TrainedHead(trainee.model, "lora")


def test_normalising_makes_the_loss_the_relative_error(make_trainee, batch):
    trainee = make_trainee()
    objective = AttentionTransfer(trainee, transfer_stage(output_mse=1, normalize_per_layer=True))
    figures, _ = run(objective, trainee, [batch])
    torch.testing.assert_close(figures.loss, torch.stack(list(figures.layers.values())).mean())
    distance = output_distance(trainee, batch)
    assert distance == pytest.approx({name: float(value) for name, value in figures.layers.items()})


def test_weight_cross_entropy_compares_weights_with_the_teachers(make_trainee, batch, padded_batch, single_rows):
    losses = {}
    for window in (4, 48):
        calls = []
        trainee = make_trainee(window=window)
        with attention_hook(trainee.model, lambda call, calls=calls: calls.append(call) or call.teacher()):
            trainee.model(input_ids=batch.input_ids, use_cache=False)
        losses[window] = sum(float(attention_weight_loss(call)) for call in calls)
    assert losses[48] < losses[4]
    objective = AttentionTransfer(trainee, transfer_stage(output_mse=0, weight_cross_entropy=1.0))
    trainee = objective.trainee = make_trainee(window=4)
    objective = AttentionTransfer(trainee, transfer_stage(output_mse=0, weight_cross_entropy=1.0))
    together = run(objective, trainee, [padded_batch])
    assert_same(together, run(objective, trainee, single_rows))
    assert any(float(gradient.abs().max()) > 0 for gradient in together[1].values())


def test_transfer_refuses_a_method_without_parameters(make_trainee):
    with pytest.raises(TrainingError, match="nothing to train"):
        AttentionTransfer(make_trainee("sliding_window", window=8), transfer_stage())


@pytest.mark.compat
def test_in_bf16_the_cores_stay_fp32_and_learn(make_trainee, batch):
    trainee = make_trainee(dtype=torch.bfloat16)
    assert trainee.model.dtype == torch.bfloat16
    for kind in ("attention_transfer", "lora", "logits"):
        objective = make_objective(kind, trainee)
        assert all(parameter.dtype == torch.float32 for parameter in parameters_of(objective).values())
        figures, gradients = run(objective, trainee, [batch])
        assert torch.isfinite(figures.loss)
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_weights_of_gated_layers_are_compared_with_softmax(make_trainee, padded_batch, single_rows):
    trainee = make_trainee("gated", activation="softmax", normalizer=True)
    objective = AttentionTransfer(trainee, transfer_stage(output_mse=0, weight_cross_entropy=1.0))
    together = run(objective, trainee, [padded_batch])
    assert_same(together, run(objective, trainee, single_rows))
    gates = {name: gradient for name, gradient in together[1].items() if "gate_projection.weight" in name}
    assert all(float(gradient.abs().max()) > 0 for gradient in gates.values())


def test_weights_that_are_no_distribution_are_not_compared_with_softmax(make_trainee):
    trainee = make_trainee("linear", normalizer=False)
    with pytest.raises(TrainingError, match="'linear' are no distribution.*weight_cross_entropy to 0"):
        AttentionTransfer(trainee, transfer_stage(output_mse=1, weight_cross_entropy=1))
    AttentionTransfer(trainee, transfer_stage(output_mse=1))
    AttentionTransfer(make_trainee("linear"), transfer_stage(output_mse=0, weight_cross_entropy=1))
