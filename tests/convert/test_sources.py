"""Models from a Hub on this machine, through the real client: what is fetched, and what is said if it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, constants

from attnconv.convert.reading.checkpoint import load_model, load_tokenizer, open_checkpoint
from attnconv.convert.writing.stream import stream_convert
from attnconv.errors import CheckpointError

REPO = "tester/tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, filled from the Hub on this machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # The client puts this together from the Hub's address when it is imported.
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny_models.save(tiny_models.tiny_llama(), tmp_path / "base", shards=True)
    tiny_models.write_tokenizer(folder)
    for name in ("LICENSE", "README.md", "original/params.json", "onnx/model.onnx", "original/weights.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    for name in ("pytorch_model.bin", "modeling_odd.py", "tf_model.h5", "model.fp16.safetensors", "old.gguf"):
        (folder / name).write_bytes(b"not wanted")
    return folder


def publish(folder: Path, repo: str = REPO) -> str:
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=folder).oid)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetches_what_is_needed_and_nothing_else(base: Path) -> None:
    commit = publish(base)
    checkpoint = open_checkpoint(REPO)
    assert (checkpoint.repo_id, checkpoint.revision, checkpoint.source) == (REPO, commit, REPO)
    fetched = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()}
    wanted = {path.name for path in base.iterdir() if path.is_file()}
    wanted -= {"pytorch_model.bin", "modeling_odd.py", "tf_model.h5", "model.fp16.safetensors", "old.gguf"}
    assert fetched == wanted | {"original/params.json"}
    assert load_tokenizer(checkpoint)("a")["input_ids"] == [1]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(ids).logits, tiny_models.tiny_llama()(ids).logits)


def test_a_revision_is_a_commit_a_branch_or_nothing(base: Path) -> None:
    first = publish(base)
    tiny_models.edit_config(base, rms_norm_eps=0.5)
    second = publish(base)
    assert open_checkpoint(REPO).config.rms_norm_eps == 0.5
    assert open_checkpoint(REPO, revision=first).config.rms_norm_eps != 0.5
    assert open_checkpoint(REPO, revision="main").revision == second
    assert "has no revision 'v9'" in refusal(REPO, revision="v9")


def test_what_is_refused_is_not_fetched(base: Path, cache: Path) -> None:
    tiny_models.edit_config(base, model_type="lama")
    publish(base)
    assert "model_type 'lama'" in refusal(REPO)
    assert not list(cache.rglob("*.safetensors"))


def test_a_gguf_file_of_a_repository(tmp_path: Path) -> None:
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package", exc_type=ImportError)
    (tmp_path / "files").mkdir()
    for name in ("tiny.Q8_0.gguf", "tiny.F32.gguf"):
        tiny_gguf.write_gguf(tiny_models.tiny_llama(), tmp_path / "files" / name)
    publish(tmp_path / "files")
    checkpoint = open_checkpoint(f"{REPO}/tiny.F32.gguf")
    assert (checkpoint.gguf_file, checkpoint.repo_id) == ("tiny.F32.gguf", REPO)
    assert [path.name for path in checkpoint.path.glob("*.gguf")] == ["tiny.F32.gguf"]
    assert "has no file missing.gguf" in refusal(f"{REPO}/missing.gguf")


def test_what_is_not_on_the_hub() -> None:
    assert "is neither a folder here nor a model on the Hub" in refusal("tester/nothing")


def test_what_is_not_for_everyone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HfApi().create_repo(REPO, private=True)
    publish(base)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "hf auth login" in refusal(REPO)


def test_a_repository_without_safetensors(base: Path) -> None:
    for path in base.glob("model*.safetensors*"):
        path.unlink()
    publish(base)
    assert "holds no weights" in refusal(REPO)


def test_a_download_that_is_refused(base: Path, hub: HubServer) -> None:
    publish(base)
    hub.fail("resolve", status=403)
    assert "could not be downloaded from the Hub" in refusal(REPO)
    hub.repair()
    assert open_checkpoint(REPO).nbytes > 0


def test_a_conversion_shares_the_files_of_the_cache(base: Path, tmp_path: Path) -> None:
    from attnconv.convert.planning.plan import Plan

    publish(base)
    checkpoint = open_checkpoint(REPO)
    (tmp_path / "out").mkdir()
    stream_convert(checkpoint, Plan(()), tmp_path / "out")
    # In the same order, under the names of a checkpoint with one shard more.
    written = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(written) == len(checkpoint.shards) + 1
    for ours, shard in zip(written, checkpoint.shards, strict=False):
        assert ours.samefile(shard.path)
