"""Losses against their plain definitions, and blind to padding."""

import pytest
import torch

from attnconv.distill.losses import (
    distillation_loss,
    mean_square,
    next_token_loss,
    next_token_targets,
    output_errors,
    weight_cross_entropy,
)

VALID = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])


def spoiled(tensor, valid):
    """The tensor `[batch, heads, T, dim]` with NaN at its padded positions."""
    return torch.where(valid[:, None, :, None], tensor, torch.nan)


def test_mean_square_leaves_padding_out():
    values = torch.randn(2, 3, 5, 4)
    expected = torch.cat([values[0, :, 2:].flatten(), values[1].flatten()]).square().mean()
    torch.testing.assert_close(mean_square(spoiled(values, VALID), VALID), expected)
    torch.testing.assert_close(mean_square(values, None), values.square().mean())


def test_output_errors_are_absolute_and_relative():
    teacher = torch.randn(2, 3, 5, 4)
    assert [float(error) for error in output_errors(teacher, teacher, None)] == [0, 0]
    absolute, relative = output_errors(torch.zeros_like(teacher), 3 * teacher, None)
    torch.testing.assert_close(absolute, 9 * teacher.square().mean())
    torch.testing.assert_close(relative, torch.tensor(1.0))


def test_no_gradient_and_no_nan_comes_from_padding():
    student = spoiled(torch.randn(2, 3, 5, 4), VALID).requires_grad_()
    _, relative = output_errors(student, torch.randn(2, 3, 5, 4), VALID)
    relative.backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[0, :, :2] == 0).all()


def test_a_teacher_that_is_all_zero_gives_a_finite_loss():
    _, relative = output_errors(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), None)
    assert torch.isfinite(relative)


def test_bf16_is_measured_in_fp32():
    student, teacher = torch.randn(1, 2, 64, 8).bfloat16(), torch.randn(1, 2, 64, 8).bfloat16()
    assert torch.equal(output_errors(student, teacher, None)[0], (student.float() - teacher.float()).square().mean())


def test_weight_cross_entropy_is_least_at_the_teacher():
    teacher = torch.softmax(torch.randn(2, 3, 5, 5), -1)
    entropy = -(teacher * teacher.log()).sum(-1).mean()
    torch.testing.assert_close(weight_cross_entropy(teacher, teacher, None), entropy)
    assert weight_cross_entropy(torch.softmax(torch.randn(2, 3, 5, 5), -1), teacher, None) > entropy
    row = (
        weight_cross_entropy(teacher[1:], teacher[1:], None) * 5
        + weight_cross_entropy(teacher[:1, :, 2:], teacher[:1, :, 2:], None) * 3
    )
    torch.testing.assert_close(weight_cross_entropy(teacher, teacher, VALID), row / 8)


def test_targets_are_the_real_tokens_to_the_right():
    tokens = torch.arange(1, 6)[None].repeat(3, 1)
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert next_token_targets(tokens, None)[0].tolist() == [2, 3, 4, 5, -100]
    assert next_token_targets(tokens, left).tolist() == [
        [-100, -100, 4, 5, -100],
        [2, 3, -100, -100, -100],
        [2, 3, 4, 5, -100],
    ]


def test_next_token_loss_sums_over_targets():
    logits, targets = torch.randn(1, 3, 7), torch.tensor([[4, -100, 2]])
    logarithm = logits.log_softmax(-1)
    torch.testing.assert_close(next_token_loss(logits, targets), -(logarithm[0, 0, 4] + logarithm[0, 2, 2]))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_the_divergence(temperature):
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1) * temperature**2
    torch.testing.assert_close(distillation_loss(student, teacher, None, temperature=temperature), divergence.sum())
    torch.testing.assert_close(
        distillation_loss(student, teacher, VALID, temperature=temperature), divergence[VALID].sum()
    )
    assert float(distillation_loss(teacher, teacher, None, temperature=temperature).abs()) < 1e-6
