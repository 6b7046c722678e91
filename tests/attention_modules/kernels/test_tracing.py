"""torch.compile takes a whole call as one graph: the kernels are operators to it, with shapes that need no values."""

import json
import logging

import pytest
import torch
from interpreted_cases import interpreted

pytest.importorskip("triton")

from attnconv.attention_modules.kernels import selection

# A process of its own, for triton reads TRITON_INTERPRET once.
SCRIPT = """
import json
import quick_triton
import torch
from torch import Tensor
from attnconv.attention_modules import Geometry, create

module = create("lolcats", Geometry(2, 1, 16, 16), window=4, implementation="triton")
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
torch.manual_seed(0)
mask = torch.arange(9) >= torch.tensor([[4], [0]])

def attend(function) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 9, 16, generator=generator, requires_grad=True) for heads in (2, 1, 1)]
    out = function(*inputs, scaling=0.3, padding_mask=mask)
    out.square().sum().backward()
    gradients = [t.grad for t in (*inputs, *module.parameters())]
    module.zero_grad()
    return [out, *gradients]

def decode(function) -> list[Tensor]:
    with torch.no_grad():
        state = module.new_state()
        prompt = [torch.linspace(-1, 1, 2 * heads * 96).view(2, heads, 6, 16) for heads in (2, 1, 1)]
        module(*prompt, scaling=0.3, state=state)
        return [function(*(t[:, :, i : i + 1] for t in prompt), scaling=0.3, state=state) for i in range(3)]

pairs = [*zip(attend(compiled), attend(module)), *zip(decode(compiled), decode(module))]
print(json.dumps([float((a - b).detach().abs().max()) for a, b in pairs]))
"""


@pytest.mark.slow
def test_one_graph_forward_backward_and_decoding() -> None:
    errors = json.loads(interpreted("-c", SCRIPT))
    assert len(errors) == 4 + 3 + 3
    assert max(errors) < 1e-5


def test_why_a_compiled_model_falls_back_is_said_while_it_is_traced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_said", set())

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def attend(x: torch.Tensor) -> torch.Tensor:
        return -x if selection.use_triton("auto", f"{x.shape[1]} heads are too many", torch.device("cuda")) else x

    with caplog.at_level(logging.WARNING):
        for rows in (2, 3, 4):
            attend(torch.zeros(rows, 5))
    assert [record.message for record in caplog.records] == ["attention falls back to torch: 5 heads are too many"]
