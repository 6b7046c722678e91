"""The losses of healing as free functions; padded positions take part in none of them."""

import torch
from torch.nn import functional

IGNORED = -100
# Added to a teacher's power before dividing by it: a layer whose output is all zero must not make the loss infinite.
TINY_POWER = 1e-12


def mean_square(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mean of the squares over all heads and dimensions of the valid positions, in fp32.

    Args:
        values: `[batch, heads, T, value_dim]`.
        valid: `[batch, T]` bool, True = real token; None means all.
    """
    if valid is None:
        return values.float().square().mean()
    # where, not a product, and before squaring: NaN at a padded position must reach neither the loss nor a gradient.
    values = torch.where(valid[:, None, :, None], values.float(), 0.0)
    return values.square().mean(dim=(1, 3)).sum() / valid.sum().clamp_min(1)


def output_errors(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far a layer's attention output is from the teacher's: absolute and relative.

    Args:
        student: `[batch, heads, T, value_dim]`.
        teacher: the same shape.
        valid: `[batch, T]` bool, True = real token; None means all.

    Returns:
        the mean squared error, and the same divided by the mean square of the teacher's output (its power) over the
        same positions: 0 = equal, 1 = no better than an output of zeros.
    """
    error = mean_square(student.float() - teacher.float(), valid)
    return error, error / (mean_square(teacher, valid) + TINY_POWER)


def weight_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of attention weights, mean over heads and valid queries, in nats.

    Args:
        student: `[batch, heads, T, S]`, each row a distribution over the keys.
        teacher: the same shape.
        valid: `[batch, T]` bool, True = real token; None means all.
    """
    logarithm = student.float().clamp_min(1e-12).log()
    rows = -(teacher.float() * logarithm).sum(-1).mean(1)
    if valid is None:
        return rows.mean()
    return torch.where(valid, rows, rows.new_zeros(())).sum() / valid.sum().clamp_min(1)


def next_token_targets(input_ids: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The token that each position has to predict, or -100 where there is none.

    Args:
        input_ids: `[batch, T]`.
        valid: `[batch, T]` bool, True = real token; None means all.

    Returns:
        `[batch, T]`: the token to the right where both are real, -100 at the last position and wherever either is
        padding.
    """
    targets = functional.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
    if valid is None:
        return targets
    both = valid & functional.pad(valid[:, 1:], (0, 1), value=False)
    return targets.masked_fill(~both, IGNORED)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the targets of -log p(target), in nats and fp32.

    Args:
        logits: `[batch, T, vocabulary]`.
        targets: `[batch, T]`; -100 is left out.
    """
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None, *, temperature: float = 1.0
) -> torch.Tensor:
    """Sum over the valid positions of KL(teacher || student), in nats and fp32, times the temperature squared.

    The factor keeps the size of the gradients about the same at every temperature (https://arxiv.org/abs/1503.02531).

    Args:
        student: logits `[batch, T, vocabulary]`.
        teacher: the same shape.
        valid: `[batch, T]` bool, True = take part; None means all.
        temperature: what both logits are divided by, above 0.
    """
    target = (teacher.float() / temperature).log_softmax(-1)
    guess = (student.float() / temperature).log_softmax(-1)
    divergence = functional.kl_div(guess, target, reduction="none", log_target=True).sum(-1)
    if valid is not None:
        divergence = torch.where(valid, divergence, divergence.new_zeros(()))
    return divergence.sum() * temperature**2
