"""The check of a rewrite: what is not as it was promised is not written, and the figure is told."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import edit_config, save, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM, ViTConfig, ViTModel

from attnconv.commands.tables import show_conversion
from attnconv.convert.reading.checkpoint import open_checkpoint
from attnconv.convert.rewriting import exactness
from attnconv.convert.rewriting.cast import Cast
from attnconv.convert.rewriting.cut import Cut, choose_layers, cut_config, cut_tensors
from attnconv.convert.rewriting.exactness import Exactness, check_exactness
from attnconv.convert.rewriting.experts import Experts
from attnconv.convert.rewriting.plan import RewritePlan, State, plan_rewrite
from attnconv.convert.rewriting.steps import Step
from attnconv.convert.rewriting.tensors import Target, elementwise, made
from attnconv.errors import PlanError
from attnconv.files.json_files import read_json
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.runs import run_conversion

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3, **HEADS}


class Change(Step):
    """Whatever a test wants done to some tensors and to the configuration."""

    summary = "something changed"

    def __init__(
        self,
        of: str = "nothing",
        change: Callable[[Target], Iterable[Target]] = lambda tensor: [tensor],
        settings: Mapping[str, Any] | None = None,
        inexact: str | None = None,
    ) -> None:
        self.of, self.change, self.settings, self.reason = of, change, settings or {}, inexact

    @property
    def inexact(self) -> str | None:
        return self.reason

    def check(self, config: Mapping[str, Any]) -> None:
        pass

    def claims(self, tensor: Target) -> bool:
        return self.of in tensor.name

    def drops(self, name: str) -> bool:
        return True

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        for tensor in claimed.values():
            yield from self.change(tensor)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, **self.settings}


def scaled(tensor: Target) -> list[Target]:
    return [elementwise(tensor, torch.float32, lambda piece: piece.float() * 1.001)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tiny_llama(num_hidden_layers=4, initializer_range=0.3), tmp_path / "base")


def plan_of(folder: Path, *steps: Step) -> RewritePlan:
    return plan_rewrite(open_checkpoint(folder), steps)


def mistral(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    return save(MistralForCausalLM(MistralConfig(**TINY, num_hidden_layers=2, **settings)), folder)


def test_the_figure_goes_into_receipt_card_and_terminal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_conversion(base, load_recipe("upcycle-mixtral"), tmp_path / "out")
    found = result.exactness
    assert found is not None
    assert found.difference is not None
    assert found.largest_logit is not None
    assert found.difference <= 2e-6 * found.largest_logit
    assert found.layers == (0, 3)
    assert Exactness.from_dict(read_json(tmp_path / "out" / "receipt.json")["exactness"]) == found
    assert f"The start: {found.sentence}." in (tmp_path / "out" / "README.md").read_text()
    assert "exact as promised" in found.sentence
    show_conversion(result, base="base")
    assert f"The start: {found.sentence}." in capsys.readouterr().out


def test_a_conversion_of_a_rewritten_model_tells_it_too(base: Path, tmp_path: Path) -> None:
    text = "name: a\nrewrite: [{kind: experts}]\nattention: [{layers: all, method: sliding_window}]"
    result = run_conversion(base, parse_recipe(text), tmp_path / "out")
    assert result.exactness is not None
    assert read_json(tmp_path / "out" / "receipt.json")["exactness"] == result.exactness.to_dict()
    assert run_conversion(base, load_recipe("sliding-window"), tmp_path / "plain").exactness is None


def test_a_result_that_is_not_what_was_promised_is_not_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"change nothing, and logits are [\d.]+ off, .*: nothing was written; --allow-inexact"
    for name, text in {"native": "", "mixed": "attention: [{layers: all, method: sliding_window}]"}.items():
        recipe = parse_recipe(f"name: a\nrewrite: [{{kind: experts}}]\n{text}")
        with monkeypatch.context() as patch:
            patch.setattr(Experts, "config", _with(Experts.config, rms_norm_eps=0.1))
            with pytest.raises(PlanError, match=said):
                run_conversion(base, recipe, tmp_path / name)
            assert not (tmp_path / name).exists()
            result = run_conversion(base, recipe, tmp_path / name, allow_inexact=True)
        assert result.exactness is not None
        assert "not as promised" in result.exactness.sentence
        assert "not as promised" in (tmp_path / name / "README.md").read_text()


def _with(config: Callable[..., dict[str, Any]], **settings: Any) -> Callable[..., dict[str, Any]]:
    return lambda step, before: {**config(step, before), **settings}


def test_the_command_line_can_allow_it_and_ask_for_more() -> None:
    from typer.main import get_command

    from attnconv.cli import app

    options = {option.name: option.opts for option in get_command(app).commands["convert"].params}
    assert options["allow_inexact"] == ["--allow-inexact"]
    assert options["compare_on"] == ["--compare-on"]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Change("mlp.up_proj", scaled), "logits are .* off"),
        (Change(settings={"rms_norm_eps": 1e-2}), "logits are .* off"),
        (Change("layernorm", lambda tensor: []), "finds other tensors than those of a llama model, model.layers.0.inp"),
        (Change("layers.3.mlp.up_proj", lambda t: [t, replace(t, name=f"{t.name}.more")]), r"up_proj\.weight\.more"),
        (Change("q_proj", lambda t: [replace(t, shape=t.shape[:1], nbytes=4 * t.shape[0])]), "q_proj"),
        (Change(settings={"num_key_value_heads": 3}), "cannot load the result"),
    ],
)
def test_what_a_step_gets_wrong_is_seen(base: Path, step: Step, said: str) -> None:
    with pytest.raises(PlanError, match=f"^something changed: .*{said}"):
        check_exactness(plan_of(base, step))


def test_a_step_that_promises_nothing_is_measured_and_must_load(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    reason = "things scaled"
    found = check_exactness(plan_of(base, Change("mlp.up_proj", scaled, inexact=reason)))
    assert not found.promised
    assert found.objection is None
    assert found.difference is not None
    assert found.difference > 1e-5
    assert found.sentence.endswith("; things scaled")
    broken = plan_of(base, Change("layernorm", lambda tensor: [], inexact=reason))
    with pytest.raises(PlanError, match="other tensors than those of"):
        check_exactness(broken)
    with caplog.at_level(logging.WARNING):
        assert check_exactness(broken, allow_inexact=True).objection in caplog.text


def test_each_step_is_held_to_its_own_promise(base: Path) -> None:
    rounding, upcycling = Cast(torch.bfloat16), Experts(num_experts=3, active=2)
    assert check_exactness(plan_of(base, rounding, upcycling)).reasons == ("weights rounded to bfloat16",)
    with pytest.raises(PlanError, match="something changed"):
        check_exactness(plan_of(base, rounding, Change("mlp.up_proj", scaled)))
    assert check_exactness(plan_of(base, Cast(torch.float32))).promised


def test_a_lost_window_is_seen_however_long_it_was(tmp_path: Path) -> None:
    base = mistral(tmp_path / "base", sliding_window=4096)
    with pytest.raises(PlanError, match="change nothing"):
        check_exactness(plan_of(base, Change(settings={"sliding_window": None})))
    assert check_exactness(plan_of(base, Experts(num_experts=2, active=1))).promised


def test_large_vocabularies_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tiny_llama(vocab_size=200, pad_token_id=199), tmp_path / "base")
    monkeypatch.setattr(exactness, "WORDS", 50)
    assert check_exactness(plan_of(base, Cast(torch.bfloat16), Experts(num_experts=2, active=1))).difference is not None
    state = plan_of(base, Cast(torch.bfloat16)).states[-1]
    cut = {tensor.name: tensor for tensor in cut_tensors(state, Cut((1,), 50, 16))}
    head = AutoModelForCausalLM.from_pretrained(base).lm_head.weight
    assert torch.equal(cut["lm_head.weight"].read(), head[:50].bfloat16())
    assert sum("layers" in name for name in cut) == sum("layers.0." in name for name in cut) == 9


def test_the_layers_that_changed_are_compared_and_one_of_each_further_type(tmp_path: Path) -> None:
    base = save(tiny_llama(num_hidden_layers=7), tmp_path / "base")
    assert choose_layers(plan_of(base, Cast(torch.bfloat16))) == (0, 6)
    assert choose_layers(plan_of(base, Change("layers.3.mlp", scaled))) == (3,)
    types = ["a", "a", "b", "c", "b", "a", "a"]
    assert choose_layers(plan_of(base, Change("layers.5.mlp", scaled, {"layer_types": types}))) == (2, 3, 5)


def test_settings_about_layers_are_those_of_the_layers_that_stay() -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "vocab_size": 3000,
        "layer_types": list("abcdef"),
        "mlp_only_layers": [0, 4, 5],
        "max_window_layers": 5,
        "first_k_dense_replace": 1,
        "moe_layer_end_index": 4,
        "sliding_window": 512,
        "eos_token_id": [1, 2],
    }
    assert cut_config(State({}, config), Cut((0, 4), 1024, 16)) == {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "vocab_size": 1024,
        "layer_types": ["a", "e"],
        "mlp_only_layers": [0, 1],
        "max_window_layers": 2,
        "first_k_dense_replace": 1,
        "moe_layer_end_index": 1,
        "sliding_window": 16,
        "eos_token_id": None,
    }


def test_other_names_of_layers_and_left_out_settings_are_understood(tmp_path: Path) -> None:
    found = check_exactness(plan_of(save(tiny_gpt2(), tmp_path / "gpt2"), Cast(torch.bfloat16)))
    assert found.layers == (0, 1)
    assert found.difference is not None
    whole = save(tiny_llama(num_hidden_layers=LlamaConfig().num_hidden_layers), tmp_path / "llama")
    edit_config(whole, num_hidden_layers=None)
    assert check_exactness(plan_of(whole, Cast(torch.bfloat16))).layers == (0, 31)


def test_whole_models_are_compared_on_a_text_if_one_is_named(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small dog, and it lived in a large house.")
    recipe = load_recipe("upcycle-mixtral")
    found = run_conversion(embedded_model_path(), recipe, tmp_path / "out", compare_on=text).exactness
    assert found is not None
    assert found.promised
    assert found.layers == tuple(range(5))
    assert found.text_tokens is not None
    assert 10 < found.text_tokens < 70
    assert f"float32, all layers, on {found.text_tokens} tokens of text" in found.sentence
    assert Exactness.from_dict(read_json(tmp_path / "out" / "receipt.json")["exactness"]) == found
    with pytest.raises(PlanError, match="base has no tokenizer to read .*text.txt with"):
        run_conversion(base, recipe, tmp_path / "b", compare_on=text)
    with pytest.raises(PlanError, match="the recipe has no rewrite"):
        run_conversion(base, load_recipe("sliding-window"), tmp_path / "b", compare_on=text)


def test_a_text_reaches_words_that_no_cut_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tiny_llama(vocab_size=64, initializer_range=0.3), tmp_path / "base")
    monkeypatch.setattr(exactness, "WORDS", 16)
    last = with_doubled_row(40)
    plan = plan_of(base, Change("embed_tokens", lambda tensor: [last(tensor)]))
    assert check_exactness(plan).objection is None
    assert check_exactness(plan, text=torch.arange(20)).objection is None
    with pytest.raises(PlanError, match="logits are .* off"):
        check_exactness(plan, text=torch.arange(30, 50))


def test_on_a_text_rounding_is_measured(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, text = plan_of(base, Experts(num_experts=3, active=2)), torch.arange(60)
    monkeypatch.setattr(exactness, "BOUND", 0.0)
    assert check_exactness(plan, text=text).objection is None
    assert check_exactness(plan, allow_inexact=True).objection is not None
    with pytest.raises(PlanError, match="logits are .* off"):
        check_exactness(plan_of(base, Change("layers.2.mlp.up_proj", scaled)), text=text)


def with_doubled_row(row: int) -> Callable[[Target], Target]:
    """What doubles a row of a matrix."""

    def doubled(tensor: Target) -> Target:
        def weights(matrix: torch.Tensor) -> torch.Tensor:
            matrix = matrix.clone()
            matrix[row] *= 2
            return matrix

        return made(tensor.name, tensor.shape, torch.float32, (tensor,), weights)

    return doubled


def test_what_cannot_be_measured_says_so(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    images = save(ViTModel(ViTConfig(**sizes)), tmp_path / "images")
    found = check_exactness(plan_of(images, Cast(torch.bfloat16)))
    assert found.sentence.endswith("not measured: it is no language model of text alone")
    assert not caplog.text
    monkeypatch.setattr(exactness.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    with caplog.at_level(logging.WARNING):
        found = check_exactness(plan_of(base, Experts(num_experts=2, active=1)))
    assert "2 layers of it take" in str(found.unmeasured)
    assert found.sentence in caplog.text
