"""Converted models behave like models: copies, dtypes, training, compilation, adapters."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from attnconv.convert import apply_plan, convert_model, converted_modules, make_plan, probe
from attnconv.convert.surgery.attention_function import AttentionCall, attention_hook
from attnconv.convert.surgery.in_memory import _EveryLayer
from attnconv.errors import PlanError

IDS = torch.arange(3, 21).view(2, 9)


def llama(**changes: Any) -> PreTrainedModel:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes})).eval()


def converted(**changes: Any) -> PreTrainedModel:
    model = convert_model(llama(**changes), "lolcats", window=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attnconv" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(8)
    return model


def logits(model: PreTrainedModel, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False, **kwargs).logits
    return out


def test_conversion_changes_the_output_and_keeps_all_names() -> None:
    model, plain = convert_model(llama(), "lolcats", window=3), llama()
    assert not torch.allclose(logits(model), logits(plain), atol=1e-6)
    assert set(plain.state_dict()) < set(model.state_dict())
    assert list(converted_modules(model)) == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_window_over_everything_is_the_teacher() -> None:
    torch.testing.assert_close(logits(convert_model(llama(), "lolcats", window=64)), logits(llama()))


def test_softmax_method_keeps_layers() -> None:
    with pytest.raises(PlanError, match="leave every layer"):
        convert_model(llama(), "softmax")


def test_applying_twice_changes_nothing() -> None:
    model = converted()
    expected = logits(model)
    apply_plan(model, make_plan([_EveryLayer("lolcats", {"window": 3})], probe(llama().config, type(model))))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_cannot_undo_the_conversion(implementation: str) -> None:
    model = converted()
    expected = logits(model)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(model), expected)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    padded = logits(model, attention_mask=mask)[0, 4:]
    alone = model(input_ids=IDS[:1, 4:], use_cache=False).logits[0]
    torch.testing.assert_close(padded, alone.detach(), atol=1e-4, rtol=1e-4)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, torch_saved])
def test_copies_are_converted(duplicate: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model = converted()
    other = duplicate(model)
    assert len(converted_modules(other)) == 3
    assert torch.equal(logits(other), logits(model))


def test_cores_stay_fp32_in_a_bf16_model() -> None:
    model = convert_model(llama().bfloat16(), "lolcats", window=3)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "attnconv" in name}
    assert dtypes == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_reach_every_parameter(reentrant: bool | None) -> None:
    gradients = []
    for checkpointing in (False, reentrant is not None):
        model = converted().train()
        if checkpointing:
            # Called activation checkpointing since transformers 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_compiles_as_one_graph() -> None:
    # Tracing takes seconds for every layer.
    model = converted(num_hidden_layers=1)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)


def test_lora_trains_beside_the_cores() -> None:
    adapter = LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["attnconv"], init_lora_weights=False
    )
    model = get_peft_model(converted(), adapter)
    expected = logits(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("attnconv" in name for name in names)
    assert any("lora_A" in name for name in names)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_tap_sees_teacher_and_student() -> None:
    model, plain = converted(), llama()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "attnconv" not in k})
    seen = []

    def hook(call: AttentionCall) -> torch.Tensor:
        teacher, student = call.teacher(), call.student()
        assert teacher.shape == student.shape == (2, 4, 9, 8)
        assert not teacher.requires_grad
        assert student.requires_grad
        seen.append(call.name)
        return teacher

    with attention_hook(model, hook):
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, logits(plain))
    assert seen == list(converted_modules(model))
    assert not torch.allclose(logits(model), logits(plain), atol=1e-4)


def test_a_module_of_the_plan_that_is_missing_is_refused() -> None:
    plan = make_plan([_EveryLayer("lolcats")], probe(llama().config, type(llama())))
    with pytest.raises(PlanError, match=r"model\.layers\.2\.self_attn"):
        apply_plan(llama(num_hidden_layers=2), plan)
