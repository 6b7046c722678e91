"""Experts out of several branches of one model, and routers that know their subjects."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXACT, PROMPTS, assert_equal, branch, dense, experts, loaded, logits
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_tokenizer
from transformers import AutoModelForCausalLM

from attnconv.convert.rewriting import rewrite_checkpoint
from attnconv.convert.rewriting.experts import Experts
from attnconv.errors import OutputError, PlanError, RecipeError, TrainingError
from attnconv.files.json_files import read_json
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.runs import run_conversion

MLP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = dense("llama", tmp_path / "base")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def branches(base: Path, tmp_path: Path) -> list[str]:
    folders = [branch(base, tmp_path / name, seed=place) for place, name in enumerate(("code", "maths"))]
    for folder in folders:
        write_tokenizer(folder)
    return [str(folder) for folder in folders]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_feed_forwards_become_experts_and_the_rest_is_averaged(base: Path, branches: list[str], tmp_path: Path) -> None:
    found = run_conversion(
        base, load_recipe("btx", ["stages=[]", f"rewrite.0.sources={json.dumps(branches)}"]), tmp_path / "out"
    )
    assert found.exactness is not None
    assert found.exactness.reasons == ("experts of several models",)
    loaded(tmp_path / "out")
    after, models = weights(tmp_path / "out"), [weights(folder) for folder in (base, *branches)]
    for expert, model in enumerate(models):
        assert torch.equal(after[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"], model[MLP])
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"):
        wanted = (models[0][name] + models[1][name] + models[2][name]) / 3
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-6)
    receipt = read_json(tmp_path / "out" / "receipt.json")
    assert list(receipt["inputs"]) == ["model.safetensors", "code:model.safetensors", "maths:model.safetensors"]
    assert receipt["rewrites"][0].endswith("out of those of the model, code, maths")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- code\n" in card
    assert str(tmp_path) not in card


def test_equal_branches_are_the_model_itself(base: Path, tmp_path: Path) -> None:
    # The mean of two equal numbers is not rounded.
    run_conversion(base, experts(sources=[str(base)], num_experts=4), tmp_path / "out")
    assert_equal(base, tmp_path / "out")


def test_the_rest_can_be_taken_from_one(base: Path, branches: list[str], tmp_path: Path) -> None:
    for rest, owner in {"base": base, branches[1]: branches[1]}.items():
        recipe = experts(sources=branches, include_base=False, rest=rest, granularity=2)
        run_conversion(base, recipe, tmp_path / Path(owner).name / "out")
        after, wanted = weights(tmp_path / Path(owner).name / "out"), weights(owner)
        assert torch.equal(after["lm_head.weight"], wanted["lm_head.weight"])
        name = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
        assert torch.equal(after[name.format(1)], weights(branches[0])[MLP][24:])
        assert torch.equal(after[name.format(2)], weights(branches[1])[MLP][:24])
        assert name.format(4) not in after


def test_one_branch_alone_computes_what_it_did(base: Path, branches: list[str], tmp_path: Path) -> None:
    run_conversion(base, experts(sources=branches[:1], include_base=False, num_experts=3), tmp_path / "out")
    before = logits(loaded(Path(branches[0])))
    assert (logits(loaded(tmp_path / "out")) - before).abs().max() <= EXACT * before.abs().max()


def test_odd_branches_are_refused_in_one_sentence(base: Path, branches: list[str], tmp_path: Path) -> None:
    def refused(said: str, source: Path | str, **settings: Any) -> None:
        with pytest.raises(PlanError, match=said):
            run_conversion(base, experts(sources=[branches[0], str(source)], **settings), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        "is of another shape: its intermediate_size is 64, and 48 in",
        dense("llama", tmp_path / "a", intermediate_size=64),
    )
    refused("is of another shape: its num_hidden_layers", dense("llama", tmp_path / "b", num_hidden_layers=2))
    refused("is a qwen2, and .* a llama", dense("qwen2", tmp_path / "c"))
    refused(r"is a mixture of experts already \(mixtral\)", dense("mixtral", tmp_path / "d", num_local_experts=2))
    refused("3 copies of .* multiple of 3|4 copies of 3 models", branches[1], num_experts=4)
    other = Path(branches[1])
    found = weights(other)
    cases = {
        "has no tensor 'model.norm.weight'": {k: v for k, v in found.items() if k != "model.norm.weight"},
        "has a tensor 'more'": found | {"more": torch.zeros(1)},
        r"'lm_head.weight' is \[96, 16\], and \[96, 32\]": found | {"lm_head.weight": torch.zeros(96, 16)},
        "as BF16, and the model as F32": found | {"lm_head.weight": torch.zeros(96, 32).bfloat16()},
    }
    for said, tensors in cases.items():
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        refused(said, other)
    save_file(found, other / "model.safetensors", metadata={"format": "pt"})
    edit_config(other, quantization_config={"quant_method": "fp8"})
    refused("is quantised", other)
    edit_config(other, quantization_config=None)
    words = read_json(other / "tokenizer.json")
    (other / "tokenizer.json").write_text(json.dumps({**words, "padding": None}, indent=3))
    run_conversion(base, experts(sources=branches), tmp_path / "same")
    words["model"]["vocab"] = {"<unk>": 0, "b": 1, "a": 2}
    (other / "tokenizer.json").write_text(json.dumps(words))
    refused(r"has another tokenizer than .*base \(tokenizer.json differs\)", other)


def test_routers_know_what_their_experts_are_for(base: Path, tmp_path: Path) -> None:
    """A token of a subject goes to the expert whose texts were about it."""
    subjects = [["a a a a"], ["b b b", "b"]]
    run_conversion(base, experts(num_experts=2, active=1, router="prompts", prompts=subjects), tmp_path / "out")
    mixture = assert_equal(base, tmp_path / "out")
    for token in (1, 2):
        found = mixture(torch.full((1, 3), token), output_router_logits=True).router_logits
        assert {int(expert) for layer in found for expert in layer.argmax(-1)} == {token - 1}
    router = weights(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"]
    torch.testing.assert_close(router.norm(dim=-1), torch.ones(2))
    assert not router.sum(0).abs().max() > 1e-6
    (tmp_path / "a.txt").write_text("a a a a")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "b b b"}\n{"text": "b"}\n')
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl.gz")]
    counts = {"num_experts": 4, "active": 2, "granularity": 2}
    run_conversion(base, experts(router="centroids", domains=files, **counts), tmp_path / "fine")
    assert_equal(base, tmp_path / "fine")
    again = weights(tmp_path / "fine")["model.layers.0.block_sparse_moe.gate.weight"]
    torch.testing.assert_close(again, router.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router: similarity", "router: similarity mixes a token's routing .*: write random, prompts or centroids"),
        ("router: attention", "router: attention mixes a token's routing with that of earlier tokens"),
        ("router: prompts", "router: prompts needs prompts: one for each copy, 4 here"),
        ("router: centroids, granularity: 2", "router: centroids needs domains: one for each copy, 2 here"),
        ("prompts: [[a]]", "prompts are for router: prompts, and router is random"),
        ("router: prompts, prompts: [[a], []]", "some text for each copy"),
        ("sources: [a, b], active: 4", "active is 4, and there are only 3 experts"),
        ("include_base: false", "leaves nothing to make experts of"),
        ("sources: [a], rest: b", "rest is 'b': write average, base, or one of the sources"),
    ],
)
def test_a_recipe_says_what_its_branches_lack(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\nrewrite: [{{kind: experts, {text}}}]")


def test_texts_for_other_copies_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = experts(router="prompts", prompts=[["a"], ["b"]], num_experts=3, active=1)
    with pytest.raises(PlanError, match="are 3 copies, and there are texts for 2"):
        run_conversion(base, recipe, tmp_path / "out")


def test_python_rewrites_a_checkpoint_by_steps(base: Path, tmp_path: Path) -> None:
    steps = [Experts(num_experts=3, active=2)]
    found = rewrite_checkpoint(base, steps, tmp_path / "out")
    assert found.promised
    assert_equal(base, tmp_path / "out")
    assert read_json(tmp_path / "out" / "receipt.json")["exactness"] == found.to_dict()
    with pytest.raises(OutputError, match="overwrite"):
        rewrite_checkpoint(base, steps, tmp_path / "out")
    rewrite_checkpoint(base, steps, tmp_path / "out", overwrite=True)
    assert PROMPTS.shape == (2, 40)


def test_an_upcycled_hybrid_goes_on_unless_a_branch_changed(
    base: Path, branches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnconv.distill.work_folder import WorkFolder

    (tmp_path / "text.txt").write_text("a b " * 300)
    text = (
        f"name: hybrid\nrewrite: [{{kind: experts, sources: {json.dumps(branches)}}}]\n"
        f"attention: [{{layers: '1', method: hedgehog}}]\ndata: {{path: {tmp_path / 'text.txt'}}}\n"
        "stages: [{kind: attention_transfer, steps: 2, sequence_length: 8, learning_rate: 0.001, save_every: 1}]\n"
    )
    saved = WorkFolder.save

    def stop(self: WorkFolder, *arguments: Any) -> None:
        saved(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run_conversion(base, parse_recipe(text), tmp_path / "out")
    monkeypatch.undo()
    tensors = weights(branches[0])
    save_file(tensors | {MLP: tensors[MLP] * 2}, Path(branches[0]) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="rewritten from|weights"):
        run_conversion(base, parse_recipe(text), tmp_path / "out", resume=True)
    save_file(tensors, Path(branches[0]) / "model.safetensors", metadata={"format": "pt"})
    result = run_conversion(base, parse_recipe(text), tmp_path / "out", resume=True)
    assert [row["stage"] for row in result.metrics] == ["attention_transfer"]
    assert result.exactness is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "mixtral"
    assert "code:model.safetensors" in read_json(tmp_path / "out" / "receipt.json")["inputs"]
