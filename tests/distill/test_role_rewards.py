"""Shares of full attention that learn from generated answers."""

import pytest
import torch

from attnconv.distill.batches import Batch
from attnconv.distill.role_rewards import RewardedRoles, advantages, rewards_of
from attnconv.distill.roles import RoleTraining
from attnconv.errors import RecipeError, TrainingError
from attnconv.evaluate.diagnose.needles import divergences
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.recipes.stages.roles import RewardPart, RolesStage
from attnconv.runs import run_conversion

REWARD = RewardPart(answers=3, temperature=0.8, threshold=0.25)
STAGE = RolesStage(steps=1, sequence_length=160, learning_rate=0.1, keep=0.0, penalty=2.0, reward=REWARD)


@pytest.fixture
def trainee(make_trainee, tokenizer):
    trainee = make_trainee("head_roles", window=16, num_sinks=2)
    trainee.tokenizer = tokenizer
    for core in trainee.cores().values():
        core.alpha.data.fill_(0.6)
    return trainee


def test_rewards_count_what_an_answer_begins_with():
    answers = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]])
    rewards = rewards_of(answers, torch.tensor([1, 2, 3, 4]))
    assert rewards.tolist() == [1.0, 0.25, 0.0]
    found = advantages(rewards)
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std(unbiased=False)) == pytest.approx(1)
    assert advantages(torch.full((4,), 0.3)).tolist() == [0.0] * 4


@pytest.mark.parametrize("right", [True, False])
def test_gradients_are_those_of_the_formula(trainee, monkeypatch, right):
    """Answers of which one is better than the others, or none is any good: then there is no price either."""
    objective = STAGE.objective(trainee, None)
    assert isinstance(objective, RewardedRoles)
    trainee.train_only(objective.group.parameters.values())
    # Few logits at once, so that slices end among the answers, and among the tokens of the text.
    objective.head.positions_at_once = 7
    torch.manual_seed(0)
    hidden = objective.needles.hide(_ids())
    key = hidden.ids[0, hidden.answers + 1]
    answers = torch.stack([key, (key + 1) % 400, (key + 2) % 400])
    answers[1, 0] = key[0]
    if not right:
        answers[:, 0] = key[0] - 1
    monkeypatch.setattr(objective, "_drawn", lambda prompt, count: answers)
    monkeypatch.setattr(objective.needles, "hide", lambda ids: hidden)
    loss = float(objective.backward(Batch(_ids()[None]), 1).loss)
    found = {name: parameter.grad.clone() for name, parameter in objective.group.parameters.items()}

    rewards = rewards_of(answers, key)
    prompt = hidden.ids[:, : int(hidden.answers[0]) + 1].expand(3, -1)
    logits = trainee.model(torch.cat([prompt, answers], 1), use_cache=False).logits
    scores = (logits[:, hidden.answers] / 0.8).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    with torch.no_grad(), trainee.as_teacher():
        target = trainee.model(hidden.ids, use_cache=False).logits[:, hidden.others]
    text = divergences(logits[:1, hidden.others], target).mean()
    drawn = -(scores * advantages(rewards)[:, None]).mean()
    price = 2.0 * 0.6 * float(rewards.mean()) if right else 0.0
    assert loss == pytest.approx(float(drawn + text) + price + 1 - float(rewards.mean()), rel=1e-4)
    for parameter in objective.group.parameters.values():
        parameter.grad = None
    (drawn + text).backward()
    for name, parameter in objective.group.parameters.items():
        expected = parameter.grad + (2.0 * float(rewards.mean()) / 20 if right else 0.0)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


def test_answers_are_drawn_from_the_model_with_its_shares(trainee):
    objective = RewardedRoles(trainee, STAGE, RewardPart(answers=3, temperature=1e-4))
    prompt = _ids()[None, :60]
    answers = objective._drawn(prompt, 5)
    assert answers.shape == (3, 5)
    longer = prompt
    with torch.no_grad():
        for _ in range(5):
            longer = torch.cat([longer, trainee.model(longer, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert answers.tolist() == [longer[0, 60:].tolist()] * 3


def test_without_reward_it_is_what_it_was(trainee):
    plain = STAGE.model_copy(update={"reward": None}).objective(trainee, None)
    assert type(plain) is RoleTraining
    trainee.model.can_generate = lambda: False
    with pytest.raises(TrainingError, match="the model generates no text"):
        STAGE.objective(trainee, None)


def test_a_single_answer_teaches_nothing():
    with pytest.raises(RecipeError, match=r"reward\.answers"):
        load_recipe("head-roles", ["stages.0.reward.answers=1"])


def test_a_run_by_reward(tmp_path):
    text = """
name: a
attention: [{layers: all, method: head_roles, options: {window: 16, num_sinks: 2}}]
data: {embedded: true}
stages:
  - {kind: roles, steps: 2, sequence_length: 120, learning_rate: 0.1, keep: 0.0, reward: {answers: 2, threshold: 0}}
"""
    result = run_conversion(embedded_model_path(), parse_recipe(text), tmp_path / "roles")
    assert result.metrics


def _ids():
    return embedded_tokens("valid").flatten()[:160]
