"""`attnconv methods`: what a layer's attention can become."""

from typing import TYPE_CHECKING, Annotated

import typer

from .session import AsJson, AsMarkdown, examples, print_json

if TYPE_CHECKING:
    from .method_list import MethodDescription

methods_app = typer.Typer()


def _complete_methods(incomplete: str) -> list[str]:
    from .method_list import read_method_list

    return [method.name for method in read_method_list() if method.name.startswith(incomplete)]


@methods_app.command(epilog=examples("attnconv methods", "attnconv methods lolcats"))
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this method.", autocompletion=_complete_methods)
    ] = None,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """List the attention methods with their options: values, defaults and meanings."""
    from .method_list import read_method_list

    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown exclude each other")
    found = read_method_list()
    if name is not None:
        known = ", ".join(method.name for method in found)
        found = [method for method in found if method.name == name]
        if not found:
            raise typer.BadParameter(f"there is no method {name}; the methods are {known}")
    if as_json:
        print_json([method.model_dump() for method in found])
    elif as_markdown:
        from ..recipes import list_recipes, load_recipe
        from .markdown import methods_markdown

        typer.echo(methods_markdown(found, [load_recipe(each, check_methods=False) for each in list_recipes()]))
    else:
        _show_methods(found)


def _show_methods(methods: "list[MethodDescription]") -> None:
    """Each method, and below it each of its options: what it may be and is by default, and what it means."""
    from rich.padding import Padding
    from rich.text import Text

    from .tables import make_console

    console = make_console()
    for place, method in enumerate(methods):
        if place:
            console.print()
        console.print(Text.assemble((method.name, "bold"), f": {method.summary}"))
        if method.paper:
            console.print(f"  paper: {method.paper}")
        for option in method.options:
            head = f"{option.name}={option.default}: {option.values}"
            console.print(Padding(head, (0, 0, 0, 2), expand=False))
            console.print(Padding(option.meaning, (0, 0, 0, 6), expand=False))
        if not method.options:
            console.print("  no options")
