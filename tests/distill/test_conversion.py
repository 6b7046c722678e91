"""Whole conversions of the packaged model, through every kind of stage, and what is refused before anything is done."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from attnconv.attention_modules.paths import leaving_out
from attnconv.commands.tables import show_conversion
from attnconv.distill.metrics import MetricsFile
from attnconv.distill.plots import plot_layers, plot_losses
from attnconv.errors import AttnConvError, DataError, OutputError, PlanError, TrainingError
from attnconv.evaluate import perplexity
from attnconv.evaluate.report.gathering import gather
from attnconv.evaluate.report.receipt_part import receipt_section
from attnconv.recipes import Recipe
from attnconv.runs import embedded_model_path, embedded_tokens, run_conversion

FIRST_SHARD = "model-00001-of-00002.safetensors"

TRANSFER = {"kind": "attention_transfer", "steps": 12, "sequence_length": 64, "batch_size": 2, "learning_rate": 1e-2}
LORA = {"kind": "lora", "steps": 4, "sequence_length": 64, "learning_rate": 1e-3, "rank": 2, "targets": ["q_proj"]}
LOGITS = {
    "kind": "logits",
    "steps": 4,
    "sequence_length": 64,
    "learning_rate": 1e-3,
    "temperature": 2.0,
    "lora": {"rank": 2, "targets": ["v_proj"]},
}


def make_recipe(*stages, method="lolcats", options=None, **sections):
    settings = {
        "name": "test",
        "attention": [{"layers": "all", "method": method, "options": options or {"window": 8}}],
        "data": {"embedded": True},
        "evaluate": {"embedded": True, "tokens": 1000, "context": 128},
        "stages": list(stages),
    }
    return Recipe(**settings | sections)


@pytest.fixture(scope="module")
def healed(tmp_path_factory):
    """A conversion through all three kinds of stage, and its folder, with its pictures."""
    recipe = make_recipe(TRANSFER, LORA, LOGITS)
    with pytest.MonkeyPatch.context() as patch:
        for draw in (plot_losses, plot_layers):
            patch.setattr(f"attnconv.runs.figures.{draw.__name__}", draw)
        return run_conversion(embedded_model_path(), recipe, tmp_path_factory.mktemp("healed") / "model", device="cpu")


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=embedded_tokens("valid")[:2, :100]).logits


def test_the_result_says_what_was_measured(healed):
    assert [row["stage"] for row in healed.metrics] == ["teacher", "swap", "attention_transfer", "lora", "logits"]
    teacher, swap, transfer, *_ = (row["perplexity"] for row in healed.metrics)
    assert teacher < 4 < transfer < swap
    assert healed.metrics[2]["tokens"] == 12 * 2 * 64
    assert 0 < healed.start_distance["mean_relative_squared_error"] < 2
    assert (
        healed.start_distance["largest_relative_squared_error"] >= healed.start_distance["mean_relative_squared_error"]
    )


def test_the_saved_model_is_the_healed_one(healed):
    model = AutoModelForCausalLM.from_pretrained(healed.output)
    result = perplexity(model, embedded_tokens("valid"), context=128, limit=1000)
    assert result.perplexity == pytest.approx(healed.metrics[-1]["perplexity"], rel=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_receipt_says_how_much_each_path_is_used(healed):
    model = AutoModelForCausalLM.from_pretrained(healed.output)
    receipt = json.loads((healed.output / "receipt.json").read_text())
    assert list(receipt["path_use"]) == ["window", "linear"]
    for path, ratio in receipt["path_use"].items():
        with leaving_out(model, path):
            without = perplexity(model, embedded_tokens("valid"), context=128, limit=1000).perplexity
        assert ratio == pytest.approx(without / healed.metrics[-1]["perplexity"], rel=1e-4)
        assert abs(ratio - 1) > 0.01
        assert f"Perplexity without the {path} path" in (healed.output / "README.md").read_text()


def test_the_receipt_says_what_the_attention_does(healed):
    counted = json.loads((healed.output / "receipt.json").read_text())["attention"]
    assert counted["text"] == "book"
    assert len(counted["layers"]) == 5
    # Of 504 tokens each sees itself and seven before it, the others through a state.
    seen = 28 + (counted["tokens"] - 7) * 8
    assert {layer["exact_pairs"] for layer in counted["layers"].values()} == {seen}
    assert counted["total"]["density"] + counted["total"]["summarized"] == pytest.approx(1)
    words = f"What the attention of 5 converted layers does: at {counted['tokens']} tokens"
    assert words in (healed.output / "README.md").read_text()


def test_a_model_that_computes_dense_attention_is_neither_healed_nor_saved(tmp_path, monkeypatch):
    def dense(self, call, memory):
        keys, values = (
            t.repeat_interleave(self.geometry.num_groups, 1) for t in (call.tokens.keys, call.tokens.values)
        )
        return scaled_dot_product_attention(call.query, keys, values, is_causal=True, scale=call.scaling)

    monkeypatch.setattr("attnconv.attention_modules.sparse.sliding_window.SlidingWindowAttention.attend_torch", dense)
    for number, stages in enumerate([(TRANSFER | {"steps": 1},), ()]):
        recipe = make_recipe(
            *stages, method="sliding_window", evaluate={"embedded": True, "tokens": 100, "context": 50}
        )
        with pytest.raises(PlanError, match="compute dense softmax attention"):
            run_conversion(embedded_model_path(), recipe, tmp_path / str(number), device="cpu")
        assert not (tmp_path / str(number)).exists()


def test_the_folder_is_complete_and_nothing_is_left_beside_it(healed):
    names = {path.name for path in healed.output.iterdir()}
    told = {"recipe.yaml", "receipt.json", "README.md", "metrics.jsonl", "losses.png", "layer_errors.png"}
    assert names >= {"config.json", FIRST_SHARD, "tokenizer.json"} | told
    assert [path.name for path in healed.output.parent.iterdir()] == ["model"]
    for picture in ("losses.png", "layer_errors.png"):
        content = (healed.output / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    receipt = json.loads((healed.output / "receipt.json").read_text())
    assert [row["stage"] for row in receipt["metrics"]] == [row["stage"] for row in healed.metrics]
    assert receipt["start_distance"] == healed.start_distance
    records = list(MetricsFile(healed.output / "metrics.jsonl").records())
    assert [(record.index, record.step) for record in records] == [(0, 10), (0, 12), (1, 4), (2, 4)]


def test_stages_of_one_data_section_go_on_where_the_last_one_stopped(healed, monkeypatch, tmp_path):
    starts = []
    from attnconv.distill import data

    sequences = data.TokenStream.sequences

    def watched(stream, length, start=None):
        starts.append(start)
        return sequences(stream, length, start)

    monkeypatch.setattr(data.TokenStream, "sequences", watched)
    other = {**LORA, "data": {"embedded": True, "seed": 5}}
    run_conversion(embedded_model_path(), make_recipe(TRANSFER, other, LORA, evaluate=None), tmp_path / "model")
    begins = [start for start in starts if start is not None]
    assert [(begin.document, begin.offset) for begin in begins] == [(0, 0), (0, 0), (4, 0)]


def test_bf16_stages_leave_the_other_weights_untouched(tmp_path):
    bf16 = {"precision": "bf16"}
    recipe = make_recipe(TRANSFER | bf16, LORA | bf16, evaluate=None)
    result = run_conversion(embedded_model_path(), recipe, tmp_path / "model")
    before = load_file(embedded_model_path() / "model.safetensors")
    after = load_file(result.output / FIRST_SHARD)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model.layers.{number}.self_attn.q_proj.weight" for number in range(5)}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_the_output_can_have_another_dtype(tmp_path):
    recipe = make_recipe(TRANSFER | {"steps": 1}, evaluate=None, output={"dtype": "bfloat16"})
    after = load_file(run_conversion(embedded_model_path(), recipe, tmp_path / "model").output / FIRST_SHARD)
    assert {t.dtype for name, t in after.items() if ".attnconv." not in name} == {torch.bfloat16}
    assert {t.dtype for name, t in after.items() if ".attnconv." in name} == {torch.float32}


def test_an_adapter_can_be_kept(tmp_path):
    from peft import PeftModel

    merged, kept = (
        run_conversion(
            embedded_model_path(),
            make_recipe(TRANSFER, LORA, evaluate=None, output={"merge_lora": merge}),
            tmp_path / f"merged-{merge}",
        ).output
        for merge in (True, False)
    )
    base = AutoModelForCausalLM.from_pretrained(kept)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(merged))
    assert not torch.allclose(logits_of(base), expected, atol=1e-3)
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(base, kept / "adapter")), expected, rtol=1e-4, atol=1e-4
    )
    assert json.loads((kept / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(kept)


def test_without_stages_the_model_is_never_built(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("attnconv.distill.healing.load_model", never)
    recipe = make_recipe(method="sliding_window", data=None, evaluate=None)
    result = run_conversion(embedded_model_path(), recipe, tmp_path / "model")
    assert result.metrics == ()
    assert (
        "were taken over as files"
        in json.loads((result.output / "receipt.json").read_text())["attention"]["not_measured"]
    )
    assert "What the attention does was not counted: the weights were" in (result.output / "README.md").read_text()
    monkeypatch.undo()
    converted = AutoModelForCausalLM.from_pretrained(result.output)
    assert all(type(layer.self_attn.attnconv).__name__ == "SlidingWindowAttention" for layer in converted.model.layers)


def test_without_stages_perplexity_can_be_measured(tmp_path):
    result = run_conversion(embedded_model_path(), make_recipe(method="sliding_window", data=None), tmp_path / "model")
    teacher, swap = (row["perplexity"] for row in result.metrics)
    assert teacher < swap


def test_self_contained_writes_the_code_of_the_attention(tmp_path, capsys):
    recipe = make_recipe(method="sliding_window", data=None, evaluate=None)
    result = run_conversion(embedded_model_path(), recipe, tmp_path / "model", self_contained=True)
    assert "class SlidingWindowAttention" in (result.output / "modeling_attnconv.py").read_text()
    # Whoever reads of it is not sent to install what it does without.
    assert "import attnconv" not in (result.output / "README.md").read_text()
    show_conversion(result, base="org/base")
    said = capsys.readouterr().out
    assert "trust_remote_code=True" in said
    assert "import attnconv" not in said
    flat = gather(result.output)
    assert "import attnconv" not in "".join(str(block) for block in receipt_section(flat).blocks)


REFUSED = {
    "no data file": (make_recipe(TRANSFER, data={"path": "nowhere.jsonl"}), DataError, "no data file"),
    "unknown target": (make_recipe(LORA | {"targets": ["qq"]}), TrainingError, 'no module "qq" for LoRA.*q_proj'),
    "head as target": (make_recipe(LORA | {"targets": ["lm_head"]}), TrainingError, 'no module "lm_head"'),
    "nothing learns": (make_recipe(TRANSFER, method="sliding_window"), TrainingError, "nothing to train"),
    "short window": (make_recipe(TRANSFER, options={"window": 64}), TrainingError, "nothing to learn from sequences"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_sentence(tmp_path, name):
    recipe, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        run_conversion(embedded_model_path(), recipe, tmp_path / "model")
    assert isinstance(caught.value, AttnConvError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_foreign_output_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError):
        run_conversion(embedded_model_path(), make_recipe(TRANSFER), tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_resuming_nothing_starts_at_the_beginning(tmp_path, caplog):
    longer = {"steps": 1, "sequence_length": 520, "batch_size": 1}
    recipe = make_recipe(TRANSFER | longer, evaluate=None)
    with caplog.at_level(logging.WARNING):
        result = run_conversion(embedded_model_path(), recipe, tmp_path / "model", resume=True)
    assert result.output.is_dir()
    assert len(repr(result)) < 300
    assert "There is no unfinished run" in caplog.text
    assert "sequences of 520 tokens, but the model was made for 512 positions" in caplog.text
    assert "ends the healing" not in caplog.text


def test_stages_refuse_an_encoder_decoder(tmp_path, tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(TrainingError, match="is an encoder-decoder, which no stage can train"):
        run_conversion(tmp_path / "t5", make_recipe(TRANSFER), tmp_path / "model", allow_lossy=True)
