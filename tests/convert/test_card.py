"""Model cards and receipts."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import xxhash
from huggingface_hub import ModelCard

import attnconv
from attnconv.attention_modules import Geometry
from attnconv.convert.planning.plan import Plan, PlanEntry
from attnconv.convert.reading.checkpoint import Checkpoint, open_checkpoint
from attnconv.convert.writing.base_card import read_base
from attnconv.convert.writing.card import make_card
from attnconv.convert.writing.receipt import Receipt, digest_inputs, make_receipt, write_receipt
from attnconv.errors import INSTALL_COMMAND, INSTALL_PLACE

GEOMETRY = Geometry(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8)
PLAN = Plan(
    (
        PlanEntry("model.layers.0.self_attn", 0, "lolcats", {"window": 3}, GEOMETRY),
        PlanEntry("model.layers.1.self_attn", 1, "softmax", {}, GEOMETRY),
    )
)
METRICS: list[dict[str, Any]] = [
    {"stage": "teacher", "perplexity": 14.37},
    {"stage": "swap", "perplexity": 2181.4, "bits_per_character": float("nan")},
    {"stage": "attention_transfer", "perplexity": 40.6, "tokens": 61440},
]
BASE_CARD = """---
license: other
license_name: odd-licence
license_link: LICENSE
language: [en, de]
tags: [something, else]
base_model: someone/grandparent
---
# The base
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny_models.save(tiny_models.tiny_llama(), tmp_path / "base")
    (folder / "README.md").write_text(BASE_CARD)
    return folder


def receipt_of(checkpoint: Checkpoint) -> Receipt:
    return make_receipt(
        checkpoint,
        PLAN,
        start_distance={"mean_relative_squared_error": 0.25},
        metrics=METRICS,
        command=["attnconv", "convert", "my model", "--recipe", "lolcats"],
    )


def card_of(base: Path, **changes: Any) -> ModelCard:
    checkpoint = open_checkpoint(base)
    if "repo_id" in changes:
        object.__setattr__(checkpoint, "repo_id", changes.pop("repo_id"))
    options: dict[str, Any] = {"recipe_name": "lolcats", "recipe_yaml": "name: lolcats\nattention: []\n", **changes}
    text = make_card("tiny-lolcats", checkpoint=checkpoint, plan=PLAN, receipt=receipt_of(checkpoint), **options)
    return ModelCard(text)


def test_metadata_is_what_the_hub_reads(base: Path) -> None:
    data = card_of(base, repo_id="someone/tiny", papers=["https://arxiv.org/pdf/2402.04347.pdf"]).data.to_dict()
    assert data["base_model"] == "someone/tiny"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["attnconv", "lolcats", "arxiv:2410.10254", "arxiv:2402.04347"]


def test_the_licence_is_carried_over(base: Path) -> None:
    data = card_of(base).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "odd-licence", "LICENSE")
    assert data["language"] == ["en", "de"]


@pytest.mark.parametrize(
    ("front_matter", "configured", "models"),
    [
        ("base_model: someone/grandparent", "someone/else", "someone/grandparent"),
        ("base_model: [a/b, c/d]", None, ["a/b", "c/d"]),
        ("license: mit", "someone/else", "someone/else"),
        ("base_model: /home/me/base", "someone/else", "someone/else"),
        *(
            ("license: mit", path, None)
            for path in ("/home/me/a", "./a/b", "a", "out/llama", "me/checkpoint-10", "C:/m")
        ),
        ("license: mit", 3, None),
    ],
)
def test_a_local_base_is_named_by_its_own_files(base: Path, front_matter: str, configured: Any, models: Any) -> None:
    (base / "README.md").write_text(f"---\n{front_matter}\n---\n# The base\n")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": configured}))
    card = card_of(base)
    assert card.data.to_dict().get("base_model") == models
    known = "nearest model of the Hub that its own files name is ["
    assert (known in card.text) == (models is not None)
    assert ("names no model of the Hub, so this card has no `base_model`" in card.text) == (models is None)
    assert ("name no licence, so neither does this card" in card.text) == ("license" not in front_matter)


def test_a_folder_that_only_looks_like_a_model_of_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "mine" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(base)
    (base / "README.md").write_text("---\nbase_model: mine/tiny\n---\n")
    assert "base_model" not in card_of(base).data.to_dict()


def test_a_base_from_the_hub_needs_no_such_sentences(base: Path) -> None:
    (base / "README.md").unlink()
    assert "local copy" not in card_of(base, repo_id="someone/tiny").text


def test_how_to_install_is_said_alike_everywhere(base: Path, repository: Path) -> None:
    """There is no package on the index yet: whoever follows `pip install attnconv` would run somebody else's code."""
    assert f"```sh\n{INSTALL_COMMAND}  # {INSTALL_PLACE}\n```" in card_of(base).text
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert INSTALL_COMMAND in readme
    for path in [repository / "README.md", *repository.glob("[a-z]*/**/*.py")]:
        if "tests" not in path.relative_to(repository).parts:
            assert not re.search(r"pip install \S*attnconv", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "card", [None, "# no metadata\n", "---\n[1, {\n---\n", "---\n- a list\n---\n", b"---\nlicense: \xff\n---\n"]
)
def test_a_base_without_a_readable_card(base: Path, card: str | bytes | None) -> None:
    (base / "README.md").unlink()
    if card is not None:
        (base / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert read_base(open_checkpoint(base)).metadata == {}
    assert "license" not in card_of(base).data.to_dict()


def test_text_says_what_it_is_and_how_to_load_it(base: Path) -> None:
    text = card_of(base, repo_id="someone/tiny").text
    assert "# tiny-lolcats" in text
    assert "[someone/tiny](https://huggingface.co/someone/tiny)" in text
    assert "This is `base` with another attention" in card_of(base).text
    assert "| `lolcats` | 1 |" in text
    assert "| softmax | 1 | as in the base |" in text
    assert "import attnconv" in text
    assert 'AutoModelForCausalLM.from_pretrained("tiny-lolcats")' in text
    assert "```yaml\nname: lolcats\nattention: []\n```" in text
    assert "attnconv convert 'my model' --recipe lolcats" in text
    assert "<https://arxiv.org/abs/2410.10254>" in text


def test_a_self_contained_model_asks_for_no_attnconv(base: Path) -> None:
    text = card_of(base, self_contained=True).text
    assert "import attnconv" not in text
    assert "pip install" not in text
    assert 'AutoModelForCausalLM.from_pretrained("tiny-lolcats", trust_remote_code=True)' in text


def test_figures_come_as_a_table(base: Path) -> None:
    text = card_of(base).text
    assert "| | perplexity | bits per character | tokens |\n|---|---|---|---|\n| teacher | 14.37 |  |  |" in text
    assert "| attention_transfer | 40.6 |  | 61,440 |" in text
    assert "nan" not in text
    assert "mean relative squared error 0.25" in text


def test_nothing_published_tells_where_things_lie(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    command = ["/home/me/venv/bin/attnconv", "convert", str(base), "-r", "lolcats", "--set", f"data.path={base}/x.txt"]
    receipt = make_receipt(checkpoint, PLAN, command=[*command, "--output=~/models/tiny", "-o", "out/tiny"])
    assert receipt.command == ("attnconv convert base -r lolcats --set data.path=x.txt --output=tiny -o out/tiny")
    assert make_receipt(checkpoint, PLAN, command=["/x/attnconv/__main__.py", "demo"]).command == "attnconv demo"
    recipe = f"name: x\ndata:\n  path: '{base}/a b.txt'\nevaluate:\n  text: {base}/c.txt\n  path: here/d.txt\n"
    card = make_card("tiny", checkpoint=checkpoint, plan=PLAN, receipt=receipt, recipe_name="x", recipe_yaml=recipe)
    assert "path: 'a b.txt'\nevaluate:\n  text: c.txt\n  path: here/d.txt\n" in card
    assert str(base.parent) not in card
    assert str(base.parent) not in str(receipt)
    assert open_checkpoint(base / ".." / "base").name == "base"


def test_without_figures_there_is_no_such_section(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    receipt = make_receipt(checkpoint, PLAN)
    options = {"checkpoint": checkpoint, "plan": PLAN, "recipe_name": "x", "recipe_yaml": "name: x"}
    assert "Measured" not in make_card("tiny", receipt=receipt, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "architecture", "auto_class", "pipeline"),
    [
        (transformers.BertConfig, "BertForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        (
            transformers.ViTConfig,
            "ViTForImageClassification",
            "AutoModelForImageClassification",
            "image-classification",
        ),
        (transformers.T5Config, "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
        (
            transformers.LlamaConfig,
            "LlamaForSequenceClassification",
            "AutoModelForSequenceClassification",
            "text-classification",
        ),
    ],
)
def test_other_kinds_of_models(
    base: Path, config: Any, architecture: str, auto_class: str, pipeline: str | None
) -> None:
    changed = config(architectures=[architecture])
    checkpoint = Checkpoint("base", base, changed, changed.to_dict(), (), torch.float32)
    receipt = Receipt(source="base", plan=PLAN.to_config())
    card = ModelCard(
        make_card("tiny", checkpoint=checkpoint, plan=PLAN, receipt=receipt, recipe_name="x", recipe_yaml="name: x")
    )
    assert f"{auto_class}.from_pretrained" in card.text
    assert card.data.to_dict().get("pipeline_tag") == pipeline


def test_the_receipt_holds_input_versions_plan_and_figures(base: Path, tmp_path: Path) -> None:
    write_receipt(tmp_path, receipt_of(open_checkpoint(base)))
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    expected = xxhash.xxh3_128((base / "model.safetensors").read_bytes()).hexdigest()
    assert receipt["inputs"] == {"model.safetensors": f"xxh3_128:{expected}"}
    assert receipt["source"] == "base"
    assert receipt["plan"] == PLAN.to_config()
    assert receipt["versions"] == {
        "attnconv": attnconv.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    assert receipt["start_distance"] == {"mean_relative_squared_error": 0.25}
    # JSON has no NaN.
    assert receipt["metrics"] == [*METRICS[:1], {**METRICS[1], "bits_per_character": None}, *METRICS[2:]]
    assert receipt["command"] == "attnconv convert 'my model' --recipe lolcats"
    assert receipt["created"].endswith("+00:00")
    assert (receipt["tool"], receipt["version"]) == ("attnconv", 1)


def test_digests_that_are_known_are_not_taken_again(base: Path) -> None:
    assert make_receipt(open_checkpoint(base), PLAN, inputs={"a": "b"}).inputs == {"a": "b"}


def test_a_gguf_file_is_an_input_too(tmp_path: Path) -> None:
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package", exc_type=ImportError)
    checkpoint = open_checkpoint(tiny_gguf.write_gguf(tiny_models.tiny_llama(), tmp_path / "tiny.gguf"))
    assert set(digest_inputs(checkpoint)) == {"tiny.gguf"}
