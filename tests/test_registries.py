"""Being in a folder is enough: files there register themselves, and none is forgotten.

A method, a healing stage and an evaluation task are one file each, in a folder that is searched. What a file needs
beside it (a recipe, a row of the matrix, a line of the README) is asked for here in one sentence.
"""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fresh_process
import pytest
from invariants import ROWS

from attnconv.attention_modules import FAMILIES, available, get_method
from attnconv.evaluate.tasks.base import TASKS, task_classes
from attnconv.recipes import list_recipes, load_recipe
from attnconv.recipes.kinds import Kinds
from attnconv.recipes.stages.base import STAGES

METHODS = "@register(", [f"attention_modules/{family}" for family in FAMILIES]
STAGE_FILES = "@STAGES.register", ["recipes/stages"]
TASK_FILES = "@register_task(", ["evaluate/tasks"]

TOY_METHOD = '''"""Every token looks at itself alone."""

from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..registry import register
from ..tokens import Call, Tokens


class ToyOptions(AttentionOptions):
    """Options of `toy`."""


@register(name="toy", options=ToyOptions, paper="https://arxiv.org/abs/1706.03762", summary="each token by itself")
class ToyAttention(AttentionModule):
    """The values of the tokens themselves."""

    @property
    def tail_tokens(self) -> int:
        return 0

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        return memory

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        return call.tokens.values[:, :, -call.length :].repeat_interleave(self.geometry.num_groups, 1)

    attend_torch = attend_naive
'''
TOY_RECIPE = """# Each token by itself.
name: toy
description: Each token by itself.
paper: https://arxiv.org/abs/1706.03762
# No options.
attention: [{layers: all, method: toy, options: {}}]
stages: []
"""
TOY_ROWS = """from matrix_row import Row

ROWS = [Row("toy", no_degenerate_because="each token is by itself")]
"""
TOY_LINE = "| `toy` | [Toy](https://arxiv.org/abs/1706.03762) | each token by itself | `toy` |"
TOY_STAGE = '''"""A stage that does nothing new."""

from typing import Literal

from .base import STAGES, TrainingStage


@STAGES.register
class ToyStage(TrainingStage):
    """Nothing new."""

    kind: Literal["toy"] = "toy"

    def objective(self, trainee, adapter):
        raise NotImplementedError
'''
TOY_TASK = '''"""A task that asks nothing."""

from typing import Literal

from .base import Task, TaskSettings, register_task


class ToySettings(TaskSettings):
    """No keys."""

    kind: Literal["toy"] = "toy"


@register_task(ToySettings)
class ToyTask(Task[ToySettings]):
    """Nothing."""

    def units(self, evaluated, scope):
        return []

    def measure(self, evaluated, unit):
        raise NotImplementedError
'''
USES_TOYS = """
import torch
from attnconv.attention_modules import Geometry, available, create
from attnconv.commands.method_list import LIST_FILE, make_method_list, method_list_text
from attnconv.evaluate.engine.suite import Suite
from attnconv.evaluate.tasks.base import make_task
from attnconv.recipes import load_recipe, parse_recipe

assert "toy" in available()
values = torch.randn(1, 1, 3, 4)
out = create("toy", Geometry(2, 1, 4, 4))(torch.randn(1, 2, 3, 4), values, values, scaling=1.0)
assert torch.equal(out, values.expand(1, 2, 3, 4))
stage = "stages: [{kind: toy, tokens: 10, sequence_length: 5, learning_rate: 1}]"
assert parse_recipe("name: a\\nattention: [{layers: all, method: toy}]\\ndata: {embedded: true}\\n" + stage)
assert load_recipe("toy").attention[0].method == "toy"
suite = Suite(name="a", tasks={"mine": {"kind": "toy"}})
assert type(make_task(suite.tasks["mine"])).__name__ == "ToyTask"
from invariants import ROWS
assert "toy" in [row.method for row in ROWS]
LIST_FILE.write_text(method_list_text(make_method_list()), encoding="utf-8")
"""


def modules(package: Path, folders: list[str]) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((package / folder).glob("*.py")) if path.name != "__init__.py")


def imported_by(path: Path) -> set[str]:
    """Last parts of the modules that a file imports by relative names."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {part for node in nodes for part in (node.module or "").split(".")[-1:] + [a.name for a in node.names]}


def forgotten(package: Path, mark: str, folders: list[str]) -> list[str]:
    """A sentence for each file of some folders that neither registers anything nor serves another file."""
    found = list(modules(package, folders))
    others = [path for path in package.rglob("*.py") if "tests" not in path.parts and ".dev" not in path.parts]
    used = {path: imported_by(path) for path in others}
    return [
        f"{path.relative_to(package)} registers nothing: put {mark} over its class, or use it in a file that does"
        for path in found
        if mark not in path.read_text(encoding="utf-8")
        and not any(path.stem in names for other, names in used.items() if other != path)
    ]


@pytest.mark.parametrize(("mark", "folders"), [METHODS, STAGE_FILES, TASK_FILES], ids=["methods", "stages", "tasks"])
def test_no_file_in_a_folder_that_is_searched_registers_nothing(repository, tmp_path, mark, folders):
    problems = forgotten(repository, mark, folders)
    assert not problems, "; ".join(problems)
    place = tmp_path / folders[0]
    place.mkdir(parents=True)
    (place / "lonely.py").write_text("class Lonely: ...\n")
    (sentence,) = forgotten(tmp_path, mark, folders)
    assert sentence.startswith(f"{folders[0]}/lonely.py registers nothing: put {mark}")


@pytest.mark.parametrize(("mark", "folders"), [METHODS, STAGE_FILES, TASK_FILES], ids=["methods", "stages", "tasks"])
def test_every_file_that_says_so_has_registered(repository, mark, folders):
    marked = {path.stem for path in modules(repository, folders) if mark in path.read_text(encoding="utf-8")} - {"base"}
    registered = {
        "@register(": [get_method(name).module_class for name in available() if name != "softmax"],
        "@STAGES.register": list(STAGES.classes.values()),
        "@register_task(": list(task_classes().values()),
    }[mark]
    assert {found.__module__.rsplit(".", 1)[-1] for found in registered} == marked


def missing_rows(method: str, *, rows: set[str], recipes: set[str], readme: list[str]) -> list[str]:
    """A sentence for each thing that a method needs beside its file and does not have."""
    needs = {
        "needs a file with its rows in tests/support/method_rows": method in rows,
        "needs a recipe in recipes/shipped that uses it": method in recipes or method == "softmax",
        "needs a line in the README's table of methods": method in readme or method == "softmax",
    }
    return [f"the method {method!r} {need}" for need, met in needs.items() if not met]


def test_every_method_has_its_rows(repository):
    lines = (repository / "README.md").read_text(encoding="utf-8").splitlines()
    has = {
        "rows": {row.method for row in ROWS},
        # A rule that names heads makes layers of `by_head`.
        "recipes": {
            method
            for name in list_recipes()
            for rule in load_recipe(name).attention
            for method in (rule.method, *(["by_head"] if rule.heads is not None else []))
        },
        "readme": [line.split("`")[1] for line in lines if line.startswith("| `") and "https://" in line],
    }
    problems = [problem for method in available() for problem in missing_rows(method, **has)]
    assert not problems, "; ".join(problems)
    assert len(missing_rows("toy", **has)) == 3


def test_kinds_say_what_is_wrong_with_a_section():
    from typing import Literal

    from attnconv.recipes.fields import Section

    kinds: Kinds[Section] = Kinds("toy", "attnconv.recipes.stages")

    class Open(Section):
        kind: str = "open"

    class Named(Section):
        kind: Literal["named"] = "named"

    with pytest.raises(ValueError, match='Open needs its kind written as kind: Literal\\["name"\\] = "name"'):
        kinds.register(Open)
    kinds.register(Named)
    with pytest.raises(ValueError, match="toy 'named' is registered already by .*Named"):
        kinds.register(Named)
    assert kinds.validate({"kind": "named"}) == Named()
    assert set(TASKS.classes) == set(task_classes())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_adding_a_method_touches_five_files_and_edits_no_list(repository, tmp_path):
    """Three are new, `attnconv.commands.method_list` writes the fourth, and the README gets one more line."""
    package = tmp_path / "attnconv"
    left_out = shutil.ignore_patterns(
        ".*", "__pycache__", "out", "build", "dist", "venv", "results", "assets", "tests", "benchmarks"
    )
    shutil.copytree(repository, package, ignore=left_out)
    support = package / "tests" / "support"
    shutil.copytree(repository / "tests" / "support", support, ignore=shutil.ignore_patterns("__pycache__"))
    before = snapshot(package)
    new = {
        "attention_modules/sparse/toy.py": TOY_METHOD,
        "recipes/shipped/toy.yaml": TOY_RECIPE,
        "tests/support/method_rows/toy.py": TOY_ROWS,
        "recipes/stages/toy.py": TOY_STAGE,
        "evaluate/tasks/toy.py": TOY_TASK,
    }
    for name, text in new.items():
        (package / name).write_text(text, encoding="utf-8")
    readme = (package / "README.md").read_text(encoding="utf-8")
    softmax = "\n\n`softmax` keeps a layer as it is."
    assert softmax in readme
    (package / "README.md").write_text(readme.replace(softmax, f"\n{TOY_LINE}{softmax}"), encoding="utf-8")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(support)!r}]\n{USES_TOYS}"
    done = fresh_process.run("-c", code, cwd=tmp_path, env={"PATH": "/usr/bin", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    after = snapshot(package)
    touched = {name for name in after if after[name] != before.get(name)}
    of_method = touched - {"recipes/stages/toy.py", "evaluate/tasks/toy.py"}
    assert of_method == {
        "attention_modules/sparse/toy.py",
        "recipes/shipped/toy.yaml",
        "tests/support/method_rows/toy.py",
        "commands/methods.json",
        "README.md",
    }
    described = json.loads(after["commands/methods.json"])
    assert [method["name"] for method in described if method["name"] == "toy"] == ["toy"]
    lines = after["README.md"].decode().splitlines()
    readme_names = [line.split("`")[1] for line in lines if line.startswith("| `") and "https://" in line]
    assert not missing_rows("toy", rows={"toy"}, recipes={"toy"}, readme=readme_names)
