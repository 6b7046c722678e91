"""Publishing against a Hub on this machine: what gets there, what is refused, and what a broken connection leaves."""

import json
import types
from pathlib import Path

import pytest
import torch
from hub_server import READER, HubServer
from safetensors.torch import save_file

from attnconv.convert.writing.hub import push_folder
from attnconv.errors import CheckpointError, HubError

REPO = "tester/tiny-lolcats"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a converted model in three shards, with things around them that must stay at home."""
    folder = tmp_path / "converted"
    folder.mkdir()
    section = {"version": 1, "modules": {}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "attnconv": section}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "recipe.yaml").write_text("name: tiny\n")
    write_shards(folder, 3)
    for name in (
        ".hidden",
        "half.safetensors.tmp",
        "__pycache__/x.pyc",
        ".cache/lock",
        "model-00009-of-00009.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    return folder


def write_shards(folder: Path, count: int) -> None:
    for old in (*folder.glob("model*.safetensors"), *folder.glob(INDEX)):
        old.unlink()
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    else:
        (folder / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.full((64,), number + count / 8)}, folder / name)


def expected(folder: Path, *, shards: int = 3) -> dict[str, bytes]:
    names = ["config.json", "README.md", "recipe.yaml"]
    names += ["model.safetensors"] if shards == 1 else [INDEX]
    names += [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards) if shards > 1]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client's retries follow each other without their growing pauses."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))


def test_push_publishes_the_conversion_and_nothing_else(hub: HubServer, folder: Path) -> None:
    assert push_folder(folder, REPO) == f"{hub.url}/{REPO}"
    assert hub.files(REPO) == expected(folder)
    assert not hub.repository(REPO).private
    assert hub.calls["commit"] == 1


def test_name_without_a_user_goes_to_the_one_logged_in(hub: HubServer, folder: Path) -> None:
    assert push_folder(folder, "tiny-lolcats") == f"{hub.url}/{REPO}"
    assert hub.files(REPO) == expected(folder)


def test_private_reaches_the_server(hub: HubServer, folder: Path) -> None:
    push_folder(folder, REPO, private=True)
    assert hub.repository(REPO).private


def test_private_push_to_a_public_repository_is_refused(hub: HubServer, folder: Path) -> None:
    hub.store.create(REPO, private=False)
    with pytest.raises(HubError, match="exists already and is public"):
        push_folder(folder, REPO, private=True)
    assert hub.files(REPO) == {}


def test_push_to_a_branch_leaves_main_alone(hub: HubServer, folder: Path) -> None:
    for message in ("first", "second"):
        (folder / "recipe.yaml").write_text(f"name: {message}\n")
        assert push_folder(folder, REPO, revision="trial", message=message) == f"{hub.url}/{REPO}/tree/trial"
    assert hub.files(REPO) == {}
    assert hub.files(REPO, "trial") == expected(folder)
    assert hub.repository(REPO).messages[-2:] == ["first", "second"]


def test_second_push_sends_only_what_changed(hub: HubServer, folder: Path) -> None:
    push_folder(folder, REPO)
    assert hub.calls["upload"] == 3
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Better\n")
    push_folder(folder, REPO)
    assert hub.files(REPO) == expected(folder)
    assert hub.calls["upload"] == 3


def test_unchanged_folder_makes_no_commit(hub: HubServer, folder: Path) -> None:
    push_folder(folder, REPO)
    push_folder(folder, REPO)
    assert hub.calls["commit"] == 1


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2)])
def test_old_weights_do_not_outlive_a_push_with_other_shards(
    hub: HubServer, folder: Path, before: int, after: int
) -> None:
    write_shards(folder, before)
    push_folder(folder, REPO)
    write_shards(folder, after)
    push_folder(folder, REPO)
    assert hub.files(REPO) == expected(folder, shards=after)


def test_interrupted_push_shows_nothing_and_the_next_one_continues(
    hub: HubServer, folder: Path, no_waiting: None
) -> None:
    hub.fail("upload", skip=1)
    with pytest.raises(HubError, match=r"connection .* failed .*nothing was published.*run the same command again"):
        push_folder(folder, REPO)
    assert hub.files(REPO) == {}
    assert hub.calls["commit"] == 0
    hub.repair()
    stored = len(hub.store.objects)
    assert stored == 1
    hub.calls.clear()
    push_folder(folder, REPO)
    assert hub.files(REPO) == expected(folder)
    assert hub.calls["upload"] == 3 - stored


@pytest.mark.parametrize("status", [None, 503])
def test_passing_trouble_is_left_to_the_client(
    hub: HubServer, folder: Path, no_waiting: None, status: int | None
) -> None:
    hub.fail("upload", times=2, status=status)
    push_folder(folder, REPO)
    assert hub.files(REPO) == expected(folder)


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("create", 500, "answered with an error .500.*nothing was published"),
        ("batch", 500, "answered with an error .500.*nothing was published"),
        ("verify", 422, "answered with an error .422.*nothing was published"),
        ("preupload", None, "connection .* failed .*nothing was published"),
        ("commit", 413, "answered with an error .413, This failure was ordered.*nothing was published"),
        ("commit", 500, "answered with an error .500.*whether the commit was made is not known"),
        ("commit", None, "connection .* failed .*whether the commit was made is not known"),
    ],
)
def test_failure_says_where_it_happened_and_what_to_do(
    hub: HubServer, folder: Path, no_waiting: None, route: str, status: int | None, words: str
) -> None:
    hub.fail(route, status=status)
    with pytest.raises(HubError, match=words) as caught:
        push_folder(folder, REPO)
    assert "\n" not in str(caught.value)
    assert "again" in str(caught.value)
    hub.repair()
    push_folder(folder, REPO)
    assert hub.files(REPO) == expected(folder)


def test_hub_out_of_reach(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"connection to the Hub failed .*nothing was published"):
        push_folder(folder, REPO)


def test_offline_mode_is_named(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push_folder(folder, REPO)


def test_unknown_user_is_told_to_log_in(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="hf auth login"):
        push_folder(folder, REPO, token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        push_folder(folder, REPO)
    assert hub.store.repositories == {}


@pytest.mark.parametrize(("repo", "token"), [("someone-else/model", None), (REPO, READER)])
def test_missing_write_access_is_named(hub: HubServer, folder: Path, repo: str, token: str | None) -> None:
    with pytest.raises(HubError, match=r"may not write .*hf auth login"):
        push_folder(folder, repo, token=token)
    hub.store.create(repo, private=False)
    with pytest.raises(HubError, match=r"may not write .*hf auth login"):
        push_folder(folder, repo, token=token)
    assert hub.files(repo) == {}


@pytest.mark.parametrize(
    "repo", ["a/b/c", "tester/what is this", "tester/a--b", "datasets/tester/a", "tester/x.git", ""]
)
def test_invalid_names_are_refused_before_anything_is_sent(hub: HubServer, folder: Path, repo: str) -> None:
    with pytest.raises(HubError, match="not a valid repository name"):
        push_folder(folder, repo)
    assert not hub.calls


def test_card_that_the_hub_refuses_is_named_before_the_weights_go_up(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: unheard-of\n---\n")
    with pytest.raises(HubError, match=r"README.md .*license must be one of a list"):
        push_folder(folder, REPO)
    assert hub.calls["upload"] == 0


def test_only_finished_conversions_are_published(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        push_folder(tmp_path / "nowhere", REPO)
    config = folder / "config.json"
    converted = config.read_text()
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="nor an 'attnconv' section"):
        push_folder(folder, REPO)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        push_folder(folder, REPO)
    config.write_text(converted)
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"\x40")
    with pytest.raises(CheckpointError, match="truncated"):
        push_folder(folder, REPO)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00003\.safetensors .* is missing"):
        push_folder(folder, REPO)
    (folder / INDEX).write_text('{"weight_map": {"t": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside the folder"):
        push_folder(folder, REPO)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        push_folder(folder, REPO)
    assert not hub.calls


def test_link_that_leads_out_of_the_folder_is_not_followed(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt leads to .* outside the folder"):
        push_folder(folder, REPO)
    assert not hub.calls
