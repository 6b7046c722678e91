"""From the name of a shipped recipe, or a file, to a checked recipe."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError
from ..files.own_files import RECIPE_FILE
from .methods import method_problems
from .overrides import apply_overrides
from .problems import Problem, nearest, problems_of, recipe_error
from .schema import Recipe
from .yaml_text import parse_yaml

SHIPPED = Path(__file__).parent / "shipped"
SUFFIXES = (".yaml", ".yml")


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, comments included.

    Raises:
        RecipeError: no such recipe is shipped; the message names the nearest.
    """
    if name not in list_recipes():
        raise RecipeError(f"there is no recipe {name!r}; {nearest(name, list_recipes())}")
    return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, check_methods: bool = True) -> Recipe:
    """Load a recipe, change it by overrides, and check all of it.

    Args:
        name_or_path: name of a shipped recipe, or path of a YAML file.
        overrides: each `path.to.key=value`, such as `stages.0.tokens=2e6`; list items are numbered from 0, `*` means
            all of them, and the value is YAML.
        check_methods: also check that the methods exist and that their options are right, which imports torch.

    Raises:
        RecipeError: no such recipe, no YAML, or anything in it is wrong; all problems are in the one message.
    """
    name = str(name_or_path)
    if name in list_recipes():
        return parse_recipe(recipe_text(name), overrides, source=f"recipe {name!r}", check_methods=check_methods)
    return parse_recipe(_read_file(name), overrides, source=f"recipe file {name}", check_methods=check_methods)


def parse_recipe(
    text: str, overrides: Sequence[str] = (), *, source: str = "recipe", check_methods: bool = True
) -> Recipe:
    """As `load_recipe`, from the YAML itself.

    Args:
        text: the YAML.
        overrides: as for `load_recipe`.
        source: what messages call the recipe.
        check_methods: as for `load_recipe`.

    Raises:
        RecipeError: the text is no YAML, or anything in it is wrong.
    """
    return build_recipe(parse_yaml(text, source), overrides, source=source, check_methods=check_methods)


def build_recipe(
    data: object, overrides: Sequence[str] = (), *, source: str = "recipe", check_methods: bool = True
) -> Recipe:
    """As `load_recipe`, from plain data as YAML or JSON give it.

    Args:
        data: a mapping with the recipe's keys; it is not changed.
        overrides: as for `load_recipe`.
        source: what messages call the recipe.
        check_methods: as for `load_recipe`.

    Raises:
        RecipeError: anything in it is wrong.
    """
    if data is None:
        raise RecipeError(f"{source} is empty; it needs at least the keys name and attention, or rewrite")
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{source} holds a {type(data).__name__} at its top, but a recipe is a mapping of keys such as name, "
            "attention and stages"
        )
    changed: dict[str, Any] = deepcopy(dict(data))
    problems = apply_overrides(changed, overrides)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(changed)
    except ValidationError as error:
        problems += problems_of(error, Recipe)
    if check_methods:
        problems += method_problems(changed.get("attention"))
    if problems or recipe is None:
        raise recipe_error(source, _without_echoes(problems))
    return recipe


def _without_echoes(problems: Sequence[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _read_file(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = path / RECIPE_FILE
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise RecipeError(f"{name} is a folder, not a recipe{hint}")
    if not path.exists():
        if path.suffix in SUFFIXES or len(path.parts) > 1:
            raise RecipeError(f"there is no recipe file {name}")
        raise RecipeError(f"there is no recipe or file {name!r}; {nearest(name, list_recipes())}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe file {name} is no text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise RecipeError(f"recipe file {name} cannot be read: {error.strerror or error}") from error
