"""Head roles by reward: which KV heads must see everything for the answers that a model generates to be right."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..convert.surgery.head import evaluating
from ..errors import TrainingError
from ..evaluate.diagnose.needles import Hidden, divergences
from ..evaluate.tasks.generation import generating_by
from ..recipes.stages.roles import RewardPart, RolesStage
from .batches import Batch
from .roles import RoleTraining
from .trainee import Trainee

# Of rewards that are all but equal nothing is to be learned.
LEAST_SPREAD = 1e-4


def advantages(rewards: Tensor) -> Tensor:
    """How much better than the mean each answer to a question is, in standard deviations; 0 if all are alike.

    Args:
        rewards: `[answers]`.
    """
    spread = rewards.std(unbiased=False)
    return (rewards - rewards.mean()) / spread if float(spread) > LEAST_SPREAD else torch.zeros_like(rewards)


def rewards_of(answers: Tensor, right: Tensor) -> Tensor:
    """The share of the right answer's tokens that each answer begins with: `[answers]` in [0, 1].

    Args:
        answers: `[answers, n]` int64.
        right: `[n]` int64.
    """
    return (answers == right).cumprod(-1).float().mean(-1)


class RewardedRoles(RoleTraining):
    """`-Σ A log p(answer)` over answers drawn from the student, KL(teacher || student) elsewhere, and a price.

    Answers to what is hidden are drawn with the shares as they are; A says by how much each is better than the others,
    so heads stay full as far as right answers need them. Full heads cost in proportion to the mean reward, and nothing
    where it is below a threshold: a model that has lost the thread gives no sign of what it needs.

    Args:
        trainee: the converted model, with its tokenizer.
        stage: the recipe's stage.
        reward: its part about rewards.

    Raises:
        TrainingError: as for `RoleTraining`, or the model generates no text.

    Paper: https://arxiv.org/abs/2510.08525
    """

    def __init__(self, trainee: Trainee, stage: RolesStage, reward: RewardPart) -> None:
        super().__init__(trainee, stage)
        if not trainee.model.can_generate():
            raise TrainingError("The stage roles draws answers for its reward, and the model generates no text")
        self.reward = reward

    def _row(self, hidden: Hidden, share: float) -> Tensor:
        device = self.trainee.model.device
        ids, asked, others = (part.to(device) for part in (hidden.ids, hidden.answers, hidden.others))
        prompt, right = ids[:, : int(asked[0]) + 1], ids[0, asked + 1]
        answers = self._drawn(prompt, len(right))
        rewards = rewards_of(answers, right)
        with torch.no_grad(), self.trainee.as_teacher():
            taught = self.teaching_head.run(Batch(ids))[:, others]
        with self.trainee.as_student():
            found = self.head.run(Batch(torch.cat([prompt.expand(len(answers), -1), answers], 1)))
        # All answers behind each other, then some tokens of the text, which is the same in all rows.
        places = torch.cat([found[:, asked].flatten(0, 1), found[0, others]])[None]
        pulls = (advantages(rewards) / answers.numel()).repeat_interleave(len(right))

        def loss(logits: Tensor, positions: slice) -> Tensor:
            split = max(0, answers.numel() - positions.start)
            behind = slice(max(0, positions.start - answers.numel()), max(0, positions.stop - answers.numel()))
            drawn = self._pulled(logits[0, :split], answers.flatten()[positions], pulls[positions])
            with torch.no_grad():
                target = self.teaching_head.logits(taught[:, behind])
            text = divergences(logits[:, split:], target).sum() / max(1, len(others))
            return (drawn + self.stage.text_weight * text) * share

        mean = float(rewards.mean())
        price = self.price() * (mean if mean >= self.reward.threshold else 0.0)
        # What is said of the step is how much of the answers was wrong, beside text and price.
        return self.head.backward(places, loss, price * share) + (1 - mean) * share

    def _pulled(self, logits: Tensor, drawn: Tensor, pulls: Tensor) -> Tensor:
        """The policy's loss of some tokens `[n]` that were drawn from `[n, vocabulary]`; a number near 0."""
        scores = (logits.float() / self.reward.temperature).log_softmax(-1)
        return -(scores.gather(-1, drawn[:, None])[:, 0] * pulls).sum()

    @torch.no_grad()
    def _drawn(self, prompt: Tensor, count: int) -> Tensor:
        """Answers `[answers, count]` to a prompt `[1, T]`, drawn with the shares as they are."""
        model = self.trainee.model
        config = GenerationConfig(
            do_sample=True,
            temperature=self.reward.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=self.reward.answers,
            max_new_tokens=count,
            # Of equal length, so that no answer is better for being short.
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        generate: Any = model.generate
        with evaluating(model), generating_by(model, config):
            output = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        drawn: Tensor = output[:, prompt.shape[1] :]
        return drawn
