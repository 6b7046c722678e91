"""The `attnconv recipes` commands."""

from pathlib import Path
from typing import Annotated

import typer

from .options import complete_recipes
from .session import AsJson, AsMarkdown, HelpfulGroup, examples, print_json

ShippedRecipe = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.", autocompletion=complete_recipes)
]

recipes_app = typer.Typer(
    cls=HelpfulGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List, show, copy and check recipes.",
    epilog=examples("attnconv recipes list", "attnconv recipes copy lolcats my-recipe.yaml"),
)


@recipes_app.command("list", epilog=examples("attnconv recipes list", "attnconv recipes list --json"))
def list_command(as_json: AsJson = False, as_markdown: AsMarkdown = False) -> None:
    """List the shipped recipes."""
    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown exclude each other")
    from ..recipes import list_recipes, load_recipe
    from .tables import show_recipes

    recipes = [load_recipe(name, check_methods=False) for name in list_recipes()]
    if as_json:
        print_json([{"name": recipe.name, "description": recipe.description} for recipe in recipes])
    elif as_markdown:
        from .markdown import recipes_markdown

        typer.echo(recipes_markdown(recipes))
    else:
        show_recipes(recipes)


@recipes_app.command(epilog=examples("attnconv recipes show lolcats", "attnconv recipes show hybrid > my-recipe.yaml"))
def show(name: ShippedRecipe) -> None:
    """Print a shipped recipe with its comments."""
    from ..recipes import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes_app.command(epilog=examples("attnconv recipes copy lolcats", "attnconv recipes copy lolcats my-recipe.yaml"))
def copy(
    name: ShippedRecipe,
    path: Annotated[Path | None, typer.Argument(metavar="FILE", help="File to write; NAME.yaml if left out.")] = None,
) -> None:
    """Copy a shipped recipe to a file of yours."""
    from ..errors import OutputError
    from ..recipes import recipe_text

    target = (path or Path(f"{name}.yaml")).expanduser()
    text = recipe_text(name)
    if target.exists():
        raise OutputError(f"{target} exists already; name another file.")
    target.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {target}; convert with --recipe {target}.")


@recipes_app.command(epilog=examples("attnconv recipes validate my-recipe.yaml", "attnconv recipes validate *.yaml"))
def validate(paths: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipes to check.")]) -> None:
    """Check recipes; all problems of all files are reported. Whether a model has their layers is what inspect says."""
    from ..errors import RecipeError
    from ..recipes import load_recipe

    wrong = 0
    for path in paths:
        try:
            load_recipe(path)
        except RecipeError as error:
            wrong += 1
            typer.echo(f"{path}: {error}", err=True)
        else:
            typer.echo(f"{path}: valid")
    if wrong:
        raise typer.Exit(1)
