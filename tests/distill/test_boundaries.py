"""Healing on documents that are packed but do not see each other."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from attnconv.convert import convert_model
from attnconv.distill.data import TokenStream
from attnconv.distill.losses import IGNORED
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import DataSection, Recipe
from attnconv.recipes.stages.attention_transfer import AttentionTransferStage
from attnconv.recipes.stages.lora import LoraStage
from attnconv.runs import run_conversion

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "short.txt"
    story = "Once upon a time there was a little {} who liked to play in the garden all day."
    path.write_text("\n\n".join(story.format(name) for name in ("girl", "boy", "dog", "cat", "bird", "frog") * 8))
    return str(path)


def stream(data: str, tokenizer: PreTrainedTokenizerBase, boundaries: str) -> TokenStream:
    return TokenStream(DataSection(path=data, boundaries=boundaries), tokenizer)


def test_positions_tell_the_documents(data: str, tokenizer: PreTrainedTokenizerBase) -> None:
    source = stream(data, tokenizer, "apart")
    sequences = list(itertools.islice(source.sequences(LENGTH), 3))
    batch = source.collate(sequences)
    assert batch.position_ids is not None
    begins = batch.position_ids == 0
    assert begins[:, 0].all()
    # Each document begins with the same token; a sequence may begin in the middle of one.
    first = next(source.token_lists())[0]
    assert (batch.input_ids[:, 1:][begins[:, 1:]] == first).all()
    assert int(begins.sum()) == int((batch.input_ids[:, 1:] == first).sum()) + len(sequences)
    assert (batch.targets[:, :-1][begins[:, 1:]] == IGNORED).all()
    joined = stream(data, tokenizer, "joined").collate(sequences)
    assert joined.position_ids is None
    assert joined.num_targets - batch.num_targets == int(begins[:, 1:].sum())


def test_a_batch_of_packed_documents_is_its_documents(data: str, tokenizer: PreTrainedTokenizerBase) -> None:
    source = stream(data, tokenizer, "apart")
    batch = source.collate(list(itertools.islice(source.sequences(LENGTH), 2)))
    assert batch.position_ids is not None
    teacher = AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval()
    converted = convert_model(AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval(), "lolcats", window=8)
    with torch.no_grad():
        for model in (teacher, converted):
            together = model(**batch.inputs(torch.float32)).logits
            for row, ids in enumerate(batch.input_ids):
                starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
                for start, stop in itertools.pairwise([*starts, LENGTH]):
                    alone = model(ids[None, start:stop], use_cache=False).logits[0]
                    torch.testing.assert_close(together[row, start:stop], alone, atol=2e-4, rtol=0)


def test_both_stages_heal_on_documents_apart(data: str, tmp_path: object) -> None:
    section = DataSection(path=data, boundaries="apart")
    common = {"data": section, "sequence_length": LENGTH, "batch_size": 2, "tokens": 4 * 2 * LENGTH}
    recipe = Recipe(
        name="apart",
        description="Documents apart.",
        attention=[{"layers": "all", "method": "lolcats", "options": {"window": 8}}],
        stages=[AttentionTransferStage(**common, learning_rate=1e-2), LoraStage(**common, learning_rate=1e-4)],
    )
    result = run_conversion(str(embedded_model_path()), recipe, f"{tmp_path}/out")
    assert result.output.is_dir()
