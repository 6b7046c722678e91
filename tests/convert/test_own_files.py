"""Which files of a result are ours: those that --overwrite may replace."""

import ast
import json

import pytest

from attnconv.errors import OutputError
from attnconv.files import own_files
from attnconv.files.output_folder import check_output


@pytest.fixture
def result(tmp_path):
    """A result of ours with its receipt."""
    (tmp_path / "config.json").write_text('{"attnconv": {}}')
    (tmp_path / "model.safetensors").write_text("weights")
    files = own_files.list_files(tmp_path)
    (tmp_path / "receipt.json").write_text(json.dumps({"tool": "attnconv", "files": files}))
    return tmp_path


def add(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("words")


def test_a_result_downloaded_from_the_hub_is_still_ours(result):
    add(result, ".gitattributes", ".cache/huggingface/.gitignore", ".cache/huggingface/CACHEDIR.TAG")
    add(result, ".cache/huggingface/download/model.safetensors.metadata")
    add(result, ".cache/huggingface/download/results/eval.json.lock")
    check_output(result, overwrite=True)


@pytest.mark.parametrize("name", [".cache/notes.txt", ".cache/huggingface-mine/a", "deep/.gitattributes", ".git/HEAD"])
def test_what_only_looks_like_a_download_is_not(result, name):
    add(result, name)
    with pytest.raises(OutputError, match=rf"did not write and --overwrite would delete \({name}\)"):
        check_output(result, overwrite=True)


def test_the_names_of_our_files_stand_in_one_place(repository):
    """Written twice, one of them would some day be another."""
    names = {name for key, name in vars(own_files).items() if key.endswith(("_FILE", "_PICTURE"))}
    assert len(names) == 7
    found = set()
    for path in repository.rglob("*.py"):
        place = path.relative_to(repository).parts
        if place[0] in ("tests", "benchmarks") or any(part.startswith(".") for part in place):
            continue
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if names & texts:
            found.add("/".join(place))
    assert found == {"files/own_files.py"}
