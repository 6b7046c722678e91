"""The registry, geometry checks and messages of the attention modules."""

import pytest
import torch
from pydantic import ValidationError

from attnconv.attention_modules import AttentionModule, Geometry, available, create, get_method, register
from attnconv.attention_modules.contract import AttentionOptions

GEOMETRY = Geometry(4, 2, 8, 8)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lolcats'"):
        create("lolcat", GEOMETRY)


def test_unknown_option_and_bad_value_are_reported() -> None:
    with pytest.raises(ValueError, match=r"lolcats.*windw"):
        create("lolcats", GEOMETRY, windw=3)
    with pytest.raises(ValueError, match="mixing"):
        create("lolcats", GEOMETRY, mixing=1.5)


def test_unknown_implementation_lists_the_known() -> None:
    with pytest.raises(ValueError, match="auto, naive, torch, triton"):
        create("lolcats", GEOMETRY, implementation="cuda")
    with pytest.raises(ValueError, match="auto, naive, torch$"):
        create("softmax", GEOMETRY, implementation="triton")


def test_every_method_documents_itself() -> None:
    for name in available():
        info = get_method(name)
        assert info.name == name == info.module_class.name
        assert info.summary
        assert info.options_class.__doc__
        assert not info.paper or info.paper in (info.module_class.__doc__ or "")


@pytest.mark.parametrize("changes", [{"num_heads": 0}, {"num_kv_heads": 3}, {"head_dim": 0}])
def test_geometry_is_checked(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="num_kv_heads|at least 1"):
        Geometry(**{**GEOMETRY.to_dict(), **changes})


def test_register_validates() -> None:
    class Options(AttentionOptions):
        pass

    kwargs = {"options": Options, "paper": "", "summary": "x"}
    for name, message in (("Bad-Name", "snake_case"), ("lolcats", "registered already")):
        with pytest.raises(ValueError, match=message):
            register(name=name, **kwargs)
    with pytest.raises(ValueError, match="https"):
        register(name="new", options=Options, paper="arxiv", summary="x")
    with pytest.raises(ValidationError):
        Options(unknown=1)


def call(module: AttentionModule, *shapes: tuple[int, ...], **kwargs: object) -> torch.Tensor:
    out: torch.Tensor = module(*(torch.zeros(shape) for shape in shapes), scaling=1.0, **kwargs)
    return out


def test_shapes_are_checked() -> None:
    module = create("lolcats", GEOMETRY)
    with pytest.raises(ValueError, match="query has shape"):
        call(module, (1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    with pytest.raises(ValueError, match="key has shape"):
        call(module, (1, 4, 5, 8), (1, 4, 5, 8), (1, 2, 5, 8))
    with pytest.raises(ValueError, match="padding_mask has shape"):
        call(module, (1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), padding_mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="keys do not fit"):
        call(module, (1, 4, 5, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    bidirectional = create("lolcats", Geometry(4, 2, 8, 8, causal=False))
    with pytest.raises(ValueError, match="no state"):
        call(bidirectional, (1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), state=bidirectional.new_state())


def test_state_refuses_another_batch() -> None:
    module = create("lolcats", GEOMETRY)
    state = module.new_state()
    call(module, (2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8), state=state)
    with pytest.raises(ValueError, match="2 sequences, but 3"):
        call(module, (3, 4, 1, 8), (3, 2, 1, 8), (3, 2, 1, 8), state=state)


def test_maths_stays_in_fp32_under_autocast() -> None:
    module = create("lolcats", GEOMETRY, window=4)
    shapes = (1, 4, 50, 8), (1, 2, 50, 8), (1, 2, 50, 8)
    inputs = [torch.randn(shape) for shape in shapes]
    expected = module(*inputs, scaling=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(*inputs, scaling=1.0), expected)


def test_state_per_kv_head_divides_the_state() -> None:
    query_heads, kv_heads = (
        create("hedgehog", GEOMETRY, state_per=per).state_bytes(1, 100, torch.float32)
        for per in ("query_head", "kv_head")
    )
    assert query_heads == 2 * kv_heads
