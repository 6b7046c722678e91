"""What a push publishes tells nothing of where things lie on the machine that it came from."""

import json
from pathlib import Path

import pytest

from attnconv.convert.writing.public_text import public_content

HOME = "/home/anna.b/My Models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "results").mkdir(parents=True)
    (folder / "adapter").mkdir()
    document = {"model": {"source": f"{HOME}/out"}, "base": {"source": "~/bases/tiny"}, "ppl": 3.5}
    (folder / "results" / "eval.json").write_text(json.dumps(document))
    (folder / "results" / "report.md").write_text(
        f"see `{HOME}/out` and [x](https://a.org/home/b/c) and /tmp/secret/y."
    )
    (folder / "results" / "report.html").write_text(f"<td>{HOME}/out</td><p>a</p><i>/work/deep/er</i>")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{HOME}/out"}))
    (folder / "recipe.yaml").write_text(
        f"data:\n  path: {HOME}/text.jsonl\n  dataset: user/name\nfiles:\n- '~/a b/c.txt'\n- D:\\x\\y.txt\n"
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": "lora", "loss": 1.0}) + "\n")
    (folder / "tokenizer.json").write_text('{"vocab": ["/home/anna.b/x"]}')
    return folder


def published(folder: Path, name: str) -> str:
    content = public_content(folder, name)
    return (folder / name).read_text() if content is None else content.decode()


def test_no_path_of_this_machine_is_published(folder: Path) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "tokenizer.json":
            text = published(folder, name)
            for word in ("anna", "My Models", "bases", "secret", "deep", "a b", "D:", str(folder)):
                assert word not in text, (name, text)


def test_what_is_no_path_stays(folder: Path) -> None:
    assert published(folder, "results/report.md") == "see `out` and [x](https://a.org/home/b/c) and y."
    assert published(folder, "results/report.html") == "<td>out</td><p>a</p><i>er</i>"
    assert json.loads(published(folder, "results/eval.json")) == {
        "model": {"source": "out"},
        "base": {"source": "tiny"},
        "ppl": 3.5,
    }
    assert published(folder, "recipe.yaml") == (
        "data:\n  path: text.jsonl\n  dataset: user/name\nfiles:\n- 'c.txt'\n- y.txt\n"
    )
    # Files that need no change, and files of the base, are published byte for byte.
    assert public_content(folder, "metrics.jsonl") is None
    assert public_content(folder, "tokenizer.json") is None
