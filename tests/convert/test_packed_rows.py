"""Models on packed rows, however transformers says where documents begin."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from attnconv.compat import cache_argument
from attnconv.convert import convert_model, converted_modules
from attnconv.convert.surgery.attention_function import AttentionCall, attention_hook
from attnconv.errors import PlanError

CACHE = cache_argument(LlamaForCausalLM.forward)
LENGTHS = (5, 1, 9, 3)
IDS = torch.randint(3, 60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
METHODS = {"lolcats": {"window": 4}, "hedgehog": {}, "gated_delta": {}, "sliding_window": {"window": 4}}


def converted(method: str) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = convert_model(AutoModelForCausalLM.from_config(config).eval(), method, **METHODS[method])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def lengths() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def by_positions() -> dict[str, Any]:
    return {"position_ids": POSITIONS}


def by_lengths() -> dict[str, Any]:
    longest = max(LENGTHS)
    given = {"cu_seq_lens_q": lengths(), "cu_seq_lens_k": lengths(), "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": POSITIONS, **given}


def by_mask() -> dict[str, Any]:
    own = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (own[:, None] == own) & torch.ones(len(own), len(own), dtype=torch.bool).tril()
    return {"attention_mask": mask[None, None], "position_ids": POSITIONS}


WAYS = {"positions": by_positions, "lengths": by_lengths, "mask": by_mask}


def one_by_one(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in IDS.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_row_is_its_documents(method: str, way: str) -> None:
    model = converted(method)
    weight = torch.randn(1, IDS.shape[1], 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logits in (model(input_ids=IDS, use_cache=False, **WAYS[way]()).logits, one_by_one(model)):
        model.zero_grad()
        (logits * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(logits, model(input_ids=IDS, use_cache=False, **WAYS[way]()).logits, atol=1e-5, rtol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        wanted = gradients[1][name]
        assert (gradient - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max())), name


def test_a_mask_alone_tells() -> None:
    model = converted("lolcats")
    mask = by_mask()["attention_mask"]
    positions = torch.arange(IDS.shape[1])[None]
    found = model(input_ids=IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    without = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
    assert not torch.allclose(found, without, atol=1e-3)
    first = IDS[:, : LENGTHS[0]]
    torch.testing.assert_close(found[:, : LENGTHS[0]], model(input_ids=first).logits, atol=1e-5, rtol=0)


def test_more_tokens_continue_the_last_document() -> None:
    model = converted("lolcats")
    cache, alone = DynamicCache(config=model.config), DynamicCache(config=model.config)
    following, last = torch.tensor([[7]]), IDS[:, -LENGTHS[-1] :]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=True, **{CACHE: cache}, **by_positions())
        model(input_ids=last, use_cache=True, **{CACHE: alone})
        found, wanted = (
            model(input_ids=following, position_ids=torch.tensor([[LENGTHS[-1]]]), use_cache=True, **{CACHE: c}).logits
            for c in (cache, alone)
        )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(PlanError, match="packed documents cannot continue a cache"):
        model(input_ids=IDS, use_cache=True, **{CACHE: cache}, **by_positions())


def test_healing_sees_the_documents_of_a_packed_row() -> None:
    model = converted("lolcats")
    weights: dict[str, torch.Tensor] = {}

    def look(call: AttentionCall) -> torch.Tensor:
        weights[call.name] = call.student_weights()
        assert [query.shape[2] for query, *_ in call.rows()] == sorted(LENGTHS)
        torch.testing.assert_close(call.student(), call.converted(), atol=1e-6, rtol=0)
        assert call.statistics()
        return call.teacher()

    with attention_hook(model, look), torch.no_grad():
        model(input_ids=IDS, use_cache=False, **by_positions())
    assert len(weights) == len(converted_modules(model))
    apart = by_mask()["attention_mask"]
    for found in weights.values():
        assert torch.equal(found != 0, apart.expand_as(found))


# trl gives its own base class arguments that transformers 5.24 no longer likes.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_trains_on_packed_rows(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    documents = [IDS[0, :5].tolist(), IDS[0, 5:12].tolist(), IDS[0, 12:].tolist()]
    data = datasets.Dataset.from_list([{"input_ids": ids} for ids in documents])
    losses = {}
    for packing in (True, False):
        settings = trl.SFTConfig(
            output_dir=str(tmp_path / str(packing)),
            packing=packing,
            max_length=18 if packing else 16,
            per_device_train_batch_size=1 if packing else 3,
            max_steps=1,
            learning_rate=0.0,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_steps=1,
        )

        vocabulary = {f"w{i}": i for i in range(64)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")), pad_token="w0", eos_token="w2"
        )
        trainer = trl.SFTTrainer(converted("lolcats"), args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses[packing] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
