"""Products in bfloat16 where the processor has them: what they may round, and that the setting is left as it was found.

A processor without them ignores the setting, so what it does to products is done to them here.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from invariants import BASE, ROWS, Row, attend, build, directed, part, tokens
from torch.backends import mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

from attnconv.attention_modules import Geometry, bf16_products, create
from attnconv.attention_modules.base import AttentionModule

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}
BOUND = 2e-2


class Rounding(TorchDispatchMode):
    """Rounds the factors of fp32 products while torch is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_meant = func.overloadpacket in PRODUCTS and args[-1].dtype == torch.float32
        if is_meant and mkldnn.matmul.fp32_precision == "bf16":
            self.rounded += 1
            args = (*args[:-2], *(factor.bfloat16().float() for factor in args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounding]:
    monkeypatch.setattr(bf16_products, "multiplies_bf16", lambda: True)
    with Rounding() as mode:
        yield mode
    assert mkldnn.matmul.fp32_precision == "none"


def rounds(row: Row) -> bool:
    return build(row, directed(BASE, row.causal)).rounds_products


rounded_rows = pytest.mark.parametrize("row", [row for row in ROWS if rounds(row)], ids=lambda row: row.id)


@rounded_rows
def test_what_is_rounded_stays_within_the_bound_of_bfloat16(row: Row, rounding: Rounding) -> None:
    for causal in row.directions:
        inputs = {name: t.bfloat16() for name, t in tokens(150, batch=1).items()}
        geometry, exact = directed(BASE, causal), {name: t.double() for name, t in inputs.items()}
        expected = attend(build(row, geometry, implementation="naive"), exact)
        rounding.rounded = 0
        actual = attend(build(row, geometry).float(), inputs)
        assert rounding.rounded > 0
        assert (actual.double() - expected).abs().max() < BOUND * expected.abs().max()


@rounded_rows
def test_single_tokens_go_on_behind_a_rounded_prompt(row: Row, rounding: Rounding) -> None:
    if not row.causal:
        pytest.skip("there is no state")
    inputs = {name: t.bfloat16() for name, t in tokens(80, batch=1).items()}
    module = build(row).float()
    state = module.new_state()
    attend(module, part(inputs, 0, 70), state=state)
    outs = [attend(module, part(inputs, t, t + 1), state=state) for t in range(70, 80)]
    assert all(t.dtype in (torch.float32, torch.bool) for t in state.memory.values() if t.ndim < 4)
    expected = attend(module, inputs)[:, :, 70:]
    assert (torch.cat(outs, 2).float() - expected.float()).abs().max() < BOUND


def run(module: AttentionModule, dtype: torch.dtype) -> None:
    geometry = module.geometry
    module(*(torch.rand(1, heads, 40, 16, dtype=dtype) for heads in (geometry.num_heads, 2, 2)), scaling=0.3)


@pytest.mark.parametrize(
    ("method", "implementation", "dtype"),
    [
        ("lolcats", "torch", torch.float32),
        ("lolcats", "torch", torch.float16),
        ("lolcats", "naive", torch.bfloat16),
        # Choose by what products come to.
        ("lola", "torch", torch.bfloat16),
        ("xattention", "torch", torch.bfloat16),
    ],
)
def test_others_are_left_exact(rounding: Rounding, method: str, implementation: str, dtype: torch.dtype) -> None:
    run(create(method, Geometry(4, 2, 16, 16), implementation=implementation), dtype)
    assert rounding.rounded == 0


def test_a_processor_without_them_is_left_alone(rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_products, "multiplies_bf16", lambda: False)
    run(create("lolcats", Geometry(4, 2, 16, 16)), torch.bfloat16)
    assert rounding.rounded == 0


@pytest.fixture(params=["none", "tf32"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(bf16_products, "multiplies_bf16", lambda: True)
    mkldnn.matmul.fp32_precision = request.param
    yield request.param
    mkldnn.matmul.fp32_precision = "none"


def test_the_setting_is_what_it_was_after_the_last_of_several_calls(before: str) -> None:
    """Calls of several threads end in any order."""
    first, second = ExitStack(), ExitStack()
    for call in (first, second):
        call.enter_context(bf16_products.bf16_products(torch.bfloat16, torch.device("cpu")))
    first.close()
    assert mkldnn.matmul.fp32_precision == "bf16"
    second.close()
    assert mkldnn.matmul.fp32_precision == before


def test_the_setting_is_what_it_was_after_an_error(before: str) -> None:
    with pytest.raises(ZeroDivisionError), bf16_products.bf16_products(torch.bfloat16, torch.device("cpu")):
        raise ZeroDivisionError
    assert mkldnn.matmul.fp32_precision == before
