"""Row 10 of the invariant matrix: documents packed in one row are what they are one by one, gradients included."""

import pytest
import torch
from invariants import (
    BASE,
    Row,
    around,
    attend,
    build,
    close,
    directed,
    part,
    rows_and_directions,
    tokens,
)

from attnconv.attention_modules.packing import Documents, attend_documents

# Two rows of 40 tokens: documents of very unlike lengths, one of them padded on both sides.
LENGTHS = [[1, 23, 9, 7], [17, 16]]
PADDING = [0, 3]
TOTAL = 40


def starts_and_valid() -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.zeros(2, TOTAL, dtype=torch.bool)
    valid = torch.zeros(2, TOTAL, dtype=torch.bool)
    for row, (lengths, before) in enumerate(zip(LENGTHS, PADDING, strict=True)):
        at = before
        for length in lengths:
            starts[row, at] = True
            valid[row, at : at + length] = True
            at += length
    return starts, valid


def packed(module: torch.nn.Module, inputs: dict[str, torch.Tensor], documents: Documents) -> torch.Tensor:
    heads = {name: t for name, t in inputs.items() if name != "hidden_states"}
    hidden_states = inputs["hidden_states"].squeeze(1)
    given = {"scaling": BASE.head_dim**-0.5, "hidden_states": hidden_states, "around": around(inputs)}
    return attend_documents(module, documents, **heads, **given)


@rows_and_directions
@pytest.mark.parametrize("implementation", ["torch", "naive"])
def test_packed_is_apart(row: Row, causal: bool, implementation: str) -> None:
    module = build(row, directed(BASE, causal), implementation=implementation)
    starts, valid = starts_and_valid()
    documents = Documents.from_starts(starts, valid)
    assert documents is not None
    inputs = {name: tensor.requires_grad_() for name, tensor in tokens(TOTAL).items()}
    weight = torch.randn(2, BASE.num_heads, TOTAL, BASE.value_dim, dtype=torch.float64)
    leaves = [*inputs.values(), *module.parameters()]

    together = packed(module, inputs, documents)
    gradients = torch.autograd.grad((together * weight).sum(), leaves, allow_unused=True)
    apart = torch.zeros_like(together)
    for index, (lengths, at) in enumerate(zip(LENGTHS, PADDING, strict=True)):
        for length in lengths:
            own = {name: t[index : index + 1] for name, t in part(inputs, at, at + length).items()}
            apart[index, :, at : at + length] = attend(module, own)[0]
            at += length
    close(together, apart)
    expected = torch.autograd.grad((apart * weight).sum(), leaves, allow_unused=True)
    for found, wanted in zip(gradients, expected, strict=True):
        if wanted is not None:
            close(found, wanted, 1e-8)


def test_rows_of_one_document_are_not_packed() -> None:
    starts = torch.zeros(2, 5, dtype=torch.bool)
    assert Documents.from_starts(starts) is None
    starts[:, 0] = True
    assert Documents.from_starts(starts) is None
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    padded = starts.clone()
    padded[0, 2] = True
    assert Documents.from_starts(padded, valid) is None


def test_documents_of_a_group_are_of_similar_length_and_each_token_is_in_one() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(3, 200, generator=generator) < 0.1
    documents = Documents.from_starts(starts)
    assert documents is not None
    held = torch.cat(list(documents.one_by_one()))
    assert sorted(held.tolist()) == list(range(600))
    for group in documents.groups:
        shortest = group.places.shape[1] if group.valid is None else int(group.valid.sum(1).min())
        assert 2 * shortest > group.places.shape[1]
    joined = documents.joined()
    assert joined.valid is not None
    assert int(joined.valid.sum()) == 600
