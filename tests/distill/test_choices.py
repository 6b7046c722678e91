"""Gates and indexes trained on where a frozen layer looks."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from attnconv.convert import converted_modules
from attnconv.convert.surgery.attention_function import attention_hook
from attnconv.distill import Silent
from attnconv.distill.batches import Batch
from attnconv.distill.choices import ChoiceTraining, exact_call
from attnconv.distill.head import run_layers
from attnconv.distill.index_fit import IndexFit
from attnconv.distill.team import find_team
from attnconv.errors import InterruptedRun, TrainingError
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import parse_recipe
from attnconv.recipes.stages.calibrate import CalibrateStage
from attnconv.recipes.stages.gate import GateStage
from attnconv.runs import run_conversion

STAGE = GateStage(steps=1, sequence_length=48, learning_rate=1e-2)
OPTIONS = {
    "seer": {"block": 8, "gate_dim": 8},
    "dsa": {"index_dim": 4, "density": 0.3},
}


def gradients(objective, batches):
    (group,) = objective.parameter_groups()
    for parameter in group.parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    total = sum(objective.count(batch) for batch in batches)
    loss = sum(float(objective.backward(batch, total).loss) for batch in batches)
    return loss, {name: parameter.grad.clone() for name, parameter in group.parameters.items()}


@pytest.mark.parametrize("method", OPTIONS)
def test_the_loss_is_the_divergence_written_out(make_trainee, batch, method):
    """A layer's, with autograd through all of it at once; the strips of the stage add up to it."""
    objective = ChoiceTraining(make_trainee(method, **OPTIONS[method]), STAGE.model_copy(update={"pooling": "mass"}))
    one = Batch(batch.input_ids[:1])
    loss, found = gradients(objective, [one])
    block, parts = objective.cores[next(iter(objective.cores))].slots.block, []

    def look(call):
        core, query, key = call.core, call.query.float(), call.key.float()
        length, groups = query.shape[2], query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * call.scaling
        weights = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        blocks = F.pad(weights, (0, -length % block)).unflatten(-1, (-1, block)).sum(-1)
        together = core.queries_together
        rows = F.pad(blocks, (0, 0, 0, -length % together)).unflatten(2, (-1, together)).sum(3)
        wanted = rows.unflatten(1, (-1, groups)).sum(2)
        with torch.enable_grad():
            given = exact_call(core, query, key, None, call.around, call.scaling)
            scores = core.logits(*core.stand_ins(given))[0]
            sums = []
            for row in range(block // together, scores.shape[1]):
                own = row * together // block
                target = wanted[0, :, row, :own]
                target = target / target.sum(-1, keepdim=True)
                guess = scores[:, row, :own].log_softmax(-1)
                sums.append((target * (target.log() - guess)).sum(-1).mean())
            parts.append(torch.stack(sums).mean() / len(objective.cores))
        return call.teacher()

    with torch.no_grad(), attention_hook(objective.trainee.model, look):
        run_layers(objective.trainee.model, one)
    whole = torch.stack(parts).sum()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4)
    parameters = objective.group.parameters
    for name, wanted in zip(parameters, torch.autograd.grad(whole, parameters.values()), strict=True):
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_padding_is_absent(make_trainee, padded_batch, single_rows):
    """Rows weigh as their tokens do, so a batch without padding of its own is compared row by row."""
    objective = ChoiceTraining(make_trainee("seer", **OPTIONS["seer"]), STAGE)
    for number, row in enumerate(single_rows):
        alone = gradients(objective, [row])
        mask = padded_batch.padding_mask[number : number + 1]
        padded = gradients(objective, [Batch(padded_batch.input_ids[number : number + 1], mask)])
        assert alone[0] == pytest.approx(padded[0], rel=1e-4)
        for name, wanted in alone[1].items():
            torch.testing.assert_close(padded[1][name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", OPTIONS)
def test_it_learns_where_the_model_looks(make_trainee, method):
    trainee = make_trainee(method, **OPTIONS[method])
    objective = ChoiceTraining(trainee, STAGE.model_copy(update={"queries": 0.5}))
    parameters = objective.group.parameters
    trainee.train_only(parameters.values())
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    rows, losses = embedded_tokens("train")[:12, :96], []
    for step in range(12):
        torch.manual_seed(step)
        losses.append(float(objective.backward(Batch(rows[step : step + 1]), 96).loss))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(not p.requires_grad for name, p in trainee.model.named_parameters() if ".attnconv." not in name)


def test_an_index_starts_as_the_nearest_of_its_size(make_trainee, batch, padded_batch):
    """As wide as a head it gives the products themselves; narrower it is nearer than one by chance."""
    losses = {}
    for width in (8, 4):
        objective = ChoiceTraining(make_trainee("dsa", index_dim=width, density=0.3), STAGE)
        losses[width, "chance"] = gradients(objective, [batch])[0]
        fit = CalibrateStage(steps=1, sequence_length=48, ridge=1e-3).objective(objective.trainee, None)
        assert isinstance(fit, IndexFit)
        fit.observe(padded_batch)
        fit.settle(find_team("cpu"))
        losses[width, "fitted"] = gradients(objective, [batch])[0]
        core = next(iter(objective.cores.values()))
        products = core.index_query @ core.index_key.repeat_interleave(core.geometry.num_groups, 0).mT
        if width == core.geometry.head_dim:
            torch.testing.assert_close(products, torch.eye(8).expand_as(products), rtol=0, atol=1e-3)
    assert losses[4, "fitted"] < 0.9 * losses[4, "chance"]
    assert losses[8, "fitted"] < losses[4, "fitted"]


def test_what_it_needs_is_named(make_trainee):
    with pytest.raises(TrainingError, match="no converted layer learns that: it is for the methods 'seer' and 'dsa'"):
        ChoiceTraining(make_trainee(), STAGE)


RECIPE = """
name: test
attention: [{layers: all, method: seer, options: {block: 8, gate_dim: 8, mass: 0.6}}]
data: {embedded: true}
stages:
  - {kind: gate, steps: 5, sequence_length: 64, queries: 0.5, learning_rate: 1.0e-2, schedule: cosine, save_every: 2}
"""
INDEX = """
name: test
attention: [{layers: all, method: dsa, options: {index_dim: 4, density: 0.3}}]
data: {embedded: true}
evaluate: {embedded: true, tokens: 512, context: 128}
stages:
  - {kind: calibrate, steps: 2, sequence_length: 64}
  - {kind: gate, steps: 2, sequence_length: 64, pooling: mass, learning_rate: 1.0e-2}
"""


class Stopping(Silent):
    """Interrupts the run in its third step, as a signal would."""

    def step(self, loss, per_second):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            raise InterruptedRun("stopped")


def test_an_interrupted_stage_goes_on_to_the_same_bits(tmp_path):
    recipe, model = parse_recipe(RECIPE), embedded_model_path()
    whole = run_conversion(model, recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(InterruptedRun):
        run_conversion(model, recipe, tmp_path / "model", device="cpu", progress=Stopping())
    again = run_conversion(model, recipe, tmp_path / "model", device="cpu", resume=True)
    files = sorted(path.name for path in whole.output.glob("*.safetensors"))
    assert files
    assert all((whole.output / name).read_bytes() == (again.output / name).read_bytes() for name in files)
    loaded = AutoModelForCausalLM.from_pretrained(again.output)
    gates = [module.attnconv.gate_query for module in converted_modules(loaded).values()]
    assert len(gates) == 5
    assert all(gate.isfinite().all() for gate in gates)


def test_an_index_that_was_fitted_costs_less_than_one_by_chance(tmp_path):
    result = run_conversion(embedded_model_path(), parse_recipe(INDEX), tmp_path / "model", device="cpu")
    found = {row["stage"]: row["perplexity"] for row in result.metrics}
    assert found["calibrate"] < found["swap"]
