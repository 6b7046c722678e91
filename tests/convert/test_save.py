"""The format of a converted model, and what goes with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers

from attnconv.attention_modules import Geometry
from attnconv.convert import apply_plan
from attnconv.convert.planning.plan import Plan, PlanEntry
from attnconv.convert.reading.checkpoint import Checkpoint, load_model, open_checkpoint
from attnconv.convert.writing.receipt import Receipt
from attnconv.convert.writing.save import auto_classes, mark_config, mark_folder, save_converted, write_companions
from attnconv.convert.writing.stream import stream_convert
from attnconv.files.output_folder import atomic_folder, is_ours

IDS = torch.tensor([[1, 5, 9, 33, 2, 7, 40]])
GEOMETRY = Geometry(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8)
PLAN = Plan(tuple(PlanEntry(f"model.layers.{i}.self_attn", i, "lolcats", {"window": 3}, GEOMETRY) for i in range(2)))
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny_models.save(tiny_models.tiny_llama(), tmp_path / "base")
    tiny_models.write_tokenizer(folder)
    for name in ("LICENSE", "README.md", "chat_template.jinja", "vocab.txt"):
        (folder / name).write_text(f"{name} of the base, with odd  spacing\r\n")
    return folder


def converted(checkpoint: Checkpoint) -> Any:
    """The model with new parameters that no initialisation gives."""
    model = apply_plan(load_model(checkpoint), PLAN)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".attnconv." in name:
            parameter.data.normal_()
    return model


def saved(checkpoint: Checkpoint, output: Path, **options: Any) -> Any:
    model = converted(checkpoint)
    with atomic_folder(output) as folder:
        save_converted(model, folder, checkpoint=checkpoint, plan=PLAN, **options)
    return model


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM", {"AutoModelForCausalLM": "LlamaForCausalLM", "AutoModel": "LlamaModel"}),
        ("bert", "BertForMaskedLM", {"AutoModelForMaskedLM": "BertForMaskedLM", "AutoModel": "BertModel"}),
        ("vit", "ViTForImageClassification", {"AutoModel": "ViTModel"}),
        ("t5", "T5ForConditionalGeneration", {"AutoModelForSeq2SeqLM": "T5ForConditionalGeneration"}),
        ("clip_vision_model", "CLIPVisionModel", {"AutoModel": "CLIPVisionModel"}),
    ],
)
def test_auto_classes_are_those_of_transformers(model_type: str, architecture: str, expected: dict[str, str]) -> None:
    found = auto_classes(model_type, architecture)
    assert expected.items() <= found.items()
    for auto_class, model_class in found.items():
        assert hasattr(transformers, auto_class)
        assert hasattr(transformers, model_class)
        assert model_class == architecture or auto_class == "AutoModel"


def test_auto_classes_of_foreign_code_are_none() -> None:
    assert auto_classes("llama", "TelepathyForCausalLM") == {}


def test_a_marked_config_keeps_the_model_type_and_fails_closed() -> None:
    marked = mark_config(CONFIG, PLAN)
    assert CONFIG.items() <= marked.items()
    assert Plan.from_config(marked["attnconv"]).to_config() == PLAN.to_config()
    assert marked["attn_implementation"] == "attnconv"
    assert marked["auto_map"]["AutoModelForCausalLM"] == "modeling_attnconv.AttnConvLlamaForCausalLM"
    assert marked["auto_map"]["AutoModel"] == "modeling_attnconv.AttnConvLlamaModel"
    assert "attnconv" not in CONFIG
    assert mark_config(marked, PLAN) == marked


def test_a_model_loaded_through_our_file_is_marked_as_the_native_one() -> None:
    assert mark_config({**CONFIG, "architectures": ["AttnConvLlamaForCausalLM"]}, PLAN) == mark_config(CONFIG, PLAN)


def test_foreign_code_keeps_its_own_map() -> None:
    references = {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    marked = mark_config({"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": references}, PLAN)
    assert marked["auto_map"] == references
    assert marked["attn_implementation"] == "attnconv"


def test_saves_and_reloads_exactly(base: Path, tmp_path: Path) -> None:
    model = saved(open_checkpoint(base), tmp_path / "out")
    assert is_ours(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    # So does the one way to open it that this package has.
    with torch.no_grad():
        again = load_model(open_checkpoint(tmp_path / "out", allow_converted=True))
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_the_base_brought_along_is_taken_over_byte_for_byte(base: Path, tmp_path: Path) -> None:
    saved(open_checkpoint(base), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    taken = {"LICENSE", "chat_template.jinja", "vocab.txt", "tokenizer.json", "tokenizer_config.json"}
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert names == taken | weights | {"config.json", "generation_config.json", "modeling_attnconv.py"}
    for name in taken | {"generation_config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_streamed_and_a_saved_conversion_have_the_same_marks(base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    saved(checkpoint, tmp_path / "saved")
    with atomic_folder(tmp_path / "streamed") as folder:
        stream_convert(checkpoint, PLAN, folder)
    first, second = (read(tmp_path / name / "config.json") for name in ("saved", "streamed"))
    assert first == second
    assert str(tmp_path) not in json.dumps(first)
    code = [(tmp_path / name / "modeling_attnconv.py").read_text() for name in ("saved", "streamed")]
    assert code[0] == code[1]


def test_large_models_are_sharded(base: Path, tmp_path: Path) -> None:
    model = saved(open_checkpoint(base), tmp_path / "out", shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_plain_save_of_a_reloaded_model_is_marked_too(base: Path, tmp_path: Path) -> None:
    saved(open_checkpoint(base), tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again" / "config.json") == read(tmp_path / "out" / "config.json")
    assert (tmp_path / "again" / "modeling_attnconv.py").is_file()


def test_folders_that_carry_no_plan_are_not_marked(base: Path, tmp_path: Path) -> None:
    before = (base / "config.json").read_bytes()
    mark_folder(base)
    mark_folder(tmp_path / "nowhere")
    assert (base / "config.json").read_bytes() == before
    assert not (base / "modeling_attnconv.py").exists()


def test_a_modeling_file_with_all_classes_is_kept(base: Path, tmp_path: Path) -> None:
    saved(open_checkpoint(base), tmp_path / "out")
    path = tmp_path / "out" / "modeling_attnconv.py"
    longer = path.read_text() + "\n# and everything else\n"
    path.write_text(longer)
    mark_folder(tmp_path / "out")
    assert path.read_text() == longer
    path.write_text("AttnConvSomethingElse = None\n")
    mark_folder(tmp_path / "out")
    assert "AttnConvLlamaForCausalLM = " in path.read_text()


def test_with_trust_the_modeling_file_gives_the_native_class(base: Path, tmp_path: Path) -> None:
    model = saved(open_checkpoint(base), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "AttnConvLlamaForCausalLM"
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again" / "config.json")["architectures"] == ["LlamaForCausalLM"]


def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package", exc_type=ImportError)
    (tmp_path / "base").mkdir()
    checkpoint = open_checkpoint(tiny_gguf.write_gguf(tiny_models.tiny_llama(), tmp_path / "base" / "tiny.gguf"))
    model = saved(checkpoint, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 64
    assert "quantization_config" not in read(tmp_path / "out" / "config.json")


def test_companions_of_the_run(tmp_path: Path) -> None:
    receipt = Receipt(source="base", plan=PLAN.to_config())
    write_companions(tmp_path, recipe_yaml="name: ü\n", receipt=receipt, card="# card\n")
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "name: ü\n"
    assert (tmp_path / "README.md").read_text() == "# card\n"
    assert read(tmp_path / "receipt.json")["tool"] == "attnconv"
    assert is_ours(tmp_path)
