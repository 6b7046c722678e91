"""The Triton kernels against float64 oracles, interpreted on the CPU; and who is told what when they cannot run."""

import logging
from pathlib import Path

import pytest
import torch
from interpreted_cases import cases_of, check

pytest.importorskip("triton")

from attnconv.attention_modules.kernels import launching, selection
from attnconv.attention_modules.kernels.chunk_linear.forward import chunk_linear
from attnconv.attention_modules.kernels.delta_rule.forward import delta_rule

SCRIPT = Path(__file__).with_name("interpreted.py")


# A second or two each.
LONG = {"fused-37-padded", "hybrid-features-512", "hybrid-memory-bf16", "module-lolcats-long-window"}
LONG |= {"module-lolcats-absolute", "hybrid-absolute-bf16", "fused-absolute-bf16"}
LONG |= {"hybrid-fp16", "fused-fp16", "fused-wide-bf16"}


@pytest.mark.parametrize("case", cases_of(SCRIPT, long=LONG))
def test_outputs_and_gradients(case: str) -> None:
    check(SCRIPT, case)


def tensors(dtype: torch.dtype = torch.float32, features: int = 16) -> tuple[torch.Tensor, ...]:
    return tuple(torch.rand(1, 2, 5, features, dtype=dtype) for _ in range(3))


def test_triton_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="'cpu' is not a CUDA device"):
        chunk_linear(*tensors(), implementation="triton")


def test_heads_and_lengths_are_checked() -> None:
    query, key, value = tensors()
    with pytest.raises(ValueError, match=r"divide each other.*\(2, 1, 2\)"):
        chunk_linear(query, key[:, :1], value)
    with pytest.raises(ValueError, match="5, 4 and 5 tokens"):
        chunk_linear(query, key[:, :, :4], value)


def test_packed_sequences_stand_in_one_row_and_without_padding() -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    (numerator, _), (sums, _) = chunk_linear(*tensors(), cu_seqlens=cu_seqlens)
    assert (*numerator.shape, *sums.shape) == (1, 2, 5, 16, 2, 2, 16, 16)
    with pytest.raises(ValueError, match="there are 2 rows"):
        chunk_linear(*(torch.cat([t, t]) for t in tensors()), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="a start of each"):
        chunk_linear(*tensors(), cu_seqlens=cu_seqlens, start=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"int32 \[num_seqs \+ 1\]"):
        chunk_linear(*tensors(), cu_seqlens=cu_seqlens.long())


def test_what_the_kernels_do_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_interpreted", lambda: True)
    assert selection.problem_with(*tensors(), dims=(16, 256)) is None
    assert "float64" in (selection.problem_with(*tensors(torch.float64)) or "")
    assert selection.problem_with(*tensors(), features=512) is None
    assert "600 features" in (selection.problem_with(*tensors(), features=600) or "")
    assert "300 numbers" in (selection.problem_with(*tensors(), dims=(16, 300)) or "")
    rows = torch.empty(70_000, 1, 1, 1)
    assert "70000 rows of 1 heads" in (selection.problem_with(rows) or "")
    monkeypatch.setattr(selection, "has_triton", lambda: False)
    assert selection.problem_with(*tensors()) == "triton is not installed"


def test_no_axis_of_a_grid_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks have at least 16 tokens, and each sequence begins one of its own; every sequence has all heads' states."""
    monkeypatch.setattr(selection, "is_interpreted", lambda: True)
    long = torch.empty(1).expand(1, 1, 2**20, 1)
    assert "1048576 tokens, and a launch takes fewer than 1048560" in (selection.problem_with(long) or "")
    fits = long[:, :, : 65_534 * 16]
    assert selection.problem_with(fits) is selection.problem_with(fits, sequences=1) is None
    assert "tokens" in (selection.problem_with(fits, sequences=2) or "")
    heads = torch.empty(1).expand(1, 32, 4096, 1)
    assert selection.problem_with(heads, sequences=2047) is None
    problem = selection.problem_with(heads, sequences=2048)
    assert problem == "there are 2048 packed sequences of 32 heads, and a launch takes 65535 heads"


def test_packed_sequences_are_counted_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_interpreted", lambda: True)
    query = torch.rand(1, 2, 8, 16)
    gates = torch.zeros(1, 2, 8)
    cu_seqlens = torch.zeros(40_001, dtype=torch.int32)
    with pytest.raises(ValueError, match="40000 packed sequences of 2 heads"):
        chunk_linear(query, query, query, cu_seqlens=cu_seqlens, implementation="triton")
    with pytest.raises(ValueError, match="cannot follow the delta rule.*40000 packed sequences of 2 heads"):
        delta_rule(query, query, query, gates, gates, cu_seqlens=cu_seqlens)


def test_the_delta_rule_is_refused_where_it_cannot_run() -> None:
    query = torch.rand(1, 2, 8, 16)
    gates = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="'cpu' is not a CUDA device"):
        delta_rule(query, query, query, gates, gates)


def test_old_and_foreign_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in (selection.gpu_problem(torch.device("cuda")) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert selection.gpu_problem(torch.device("cuda")) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in (selection.gpu_problem(torch.device("cuda")) or "")


def test_auto_on_a_gpu_says_once_why_it_is_torch(caplog: pytest.LogCaptureFixture) -> None:
    cuda = torch.device("cuda")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not selection.use_triton("auto", "the moon is full", cuda)
    assert [record.message for record in caplog.records] == ["attention falls back to torch: the moon is full"]
    assert selection.use_triton("auto", None, cuda)
    assert not selection.use_triton("auto", None, torch.device("cpu"))
    assert not selection.use_triton("torch", None, cuda)


@pytest.mark.parametrize(("asked", "given"), [("none", "tf32x3"), ("ieee", "tf32x3"), ("tf32", "tf32")])
def test_products_of_fp32_are_as_exact_as_torch_is_told(asked: str, given: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = asked
        assert launching.precision(torch.float32)["PRECISION"] == given
        assert launching.precision(torch.float16)["PRECISION"] == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_operators_have_shapes_without_values() -> None:
    """What torch.compile asks before it runs anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, value = torch.rand(2, 4, 9, 16), torch.rand(2, 2, 9, 16), torch.rand(2, 1, 9, 8)
        gates = torch.rand(2, 4, 9)
        outs = torch.ops.attnconv.chunk_linear(query, key, value, gates, None, None, None, 16)
        cu_seqlens = torch.zeros(4, dtype=torch.int32)
        packed = torch.ops.attnconv.chunk_linear(query[:1], key[:1], value[:1], None, None, None, None, 16, cu_seqlens)
        strengths = torch.rand(2, 4, 9)
        delta = torch.ops.attnconv.delta_rule(query, key, value, gates, strengths, None, None, 16)
    assert [tuple(out.shape) for out in delta] == [(2, 4, 9, 8), (2, 4, 16, 8)]
    assert [tuple(out.shape) for out in outs] == [(2, 4, 9, 8), (2, 4, 9), (2, 4, 16, 8), (2, 4, 16)]
    assert [tuple(out.shape) for out in packed] == [(1, 4, 9, 8), (1, 4, 9), (3, 2, 16, 8), (3, 2, 16)]
