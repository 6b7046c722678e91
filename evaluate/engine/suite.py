"""Suites: which tasks an evaluation runs, with their settings; those that ship are YAML files beside this one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ...errors import DataError, RecipeError
from ...recipes.fields import Section, Text
from ...recipes.problems import nearest, problems_of
from ...recipes.yaml_text import parse_yaml
from ..tasks.base import AnyTask
from ..tasks.packaged import packaged_names

SHIPPED = Path(__file__).parent / "suites"
SUFFIXES = (".yaml", ".yml")
# Keys of a task that name a file or folder.
PATHS = ("data", "include_path")


class Suite(Section):
    """What an evaluation measures.

    Attributes:
        name: its name.
        description: one sentence.
        tasks: settings of each task, by the name that results give it.
    """

    name: Text
    description: str = ""
    tasks: dict[Text, AnyTask] = Field(min_length=1)


def list_suites() -> list[str]:
    """Names of the shipped suites, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_suite(name_or_path: str | Path) -> Suite:
    """Load a suite and check all of it.

    Args:
        name_or_path: name of a shipped suite, or path of a YAML file, whose own paths are relative to its folder.

    Raises:
        DataError: there is no such suite, or anything in it is wrong; all problems are in the one message.
    """
    name = str(name_or_path)
    if name in list_suites():
        path = SHIPPED / f"{name}.yaml"
    else:
        path = Path(name).expanduser()
        if path.suffix not in SUFFIXES or not path.is_file():
            hint = nearest(name, list_suites())
            raise DataError(f"There is no evaluation suite {name!r}; {hint} A YAML file's path works too.")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), source=f"suite {name}")
    except RecipeError as error:
        raise DataError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The suite {path} cannot be read: {error}.") from error
    try:
        suite = Suite.model_validate({"name": path.stem, **raw} if isinstance(raw, dict) else raw)
    except ValidationError as error:
        raise _suite_error(name, [str(problem) for problem in problems_of(error, Suite)]) from None
    return suite.model_copy(update={"tasks": {key: _located(task, path.parent) for key, task in suite.tasks.items()}})


def _located(task: Any, folder: Path) -> Any:
    """A task whose paths are found from anywhere, not only from the folder of the suite."""
    changes = {}
    for key in PATHS:
        given = getattr(task, key, None)
        if given is not None and given not in packaged_names() and (folder / given).exists():
            changes[key] = str(folder / given)
    return task.model_copy(update=changes)


def _suite_error(name: str, problems: Sequence[str]) -> DataError:
    if len(problems) == 1:
        return DataError(f"suite {name}: {problems[0]}")
    return DataError(f"suite {name} has {len(problems)} problems:" + "".join(f"\n  {problem}" for problem in problems))
