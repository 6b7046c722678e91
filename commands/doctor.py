"""`attnconv doctor`: what there is to work with, and whether it works."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..formats import duration, size
from .session import FAILED, AsJson, examples, print_json, session_of

if TYPE_CHECKING:
    from ..runs.environment import Environment
    from ..runs.self_check import SelfCheck

doctor_app = typer.Typer()


@doctor_app.command(epilog=examples("attnconv doctor", "attnconv doctor --device cpu --json"))
def doctor(
    ctx: typer.Context,
    device: Annotated[
        list[str] | None, typer.Option(help="Check here, such as cpu; every device there is, if left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices and kernels, then convert the small packaged model and check what it says."""
    session = session_of(ctx)
    session.silence_libraries()
    import torch

    from ..runs.environment import describe_environment
    from ..runs.self_check import run_self_check
    from .progress import measuring_progress

    environment = describe_environment()
    known = [found.device for found in environment.devices]
    for name in device or ():
        if name not in known:
            raise typer.BadParameter(f"there is no device {name}; here are {', '.join(known)}")
    if not as_json:
        _show_environment(environment)
    with measuring_progress(quiet=session.quiet) as progress:
        result = run_self_check(tuple(torch.device(name) for name in device or known), progress=progress)
    sentence = _sentence(result)
    if as_json:
        document = {"environment": environment.to_dict(), **result.to_dict(), "failed": len(result.failed)}
        print_json({**document, "conclusion": sentence})
    else:
        _show_checks(result)
    if result.failed:
        typer.echo(f"Error: {sentence}", err=True)
        raise typer.Exit(FAILED)
    if not as_json:
        typer.echo(sentence)


def _show_environment(environment: "Environment") -> None:
    from .tables import make_console, make_table

    console = make_console()
    versions = make_table(["package", "version"])
    for name, version in environment.versions.items():
        versions.add_row(name, version)
    console.print(versions)
    console.print(f"\n{environment.system}")
    for device in environment.devices:
        memory = "" if device.memory_bytes is None else f", {size(device.memory_bytes)}"
        console.print(f"{device.device}: {device.name}{memory}")
    console.print("\nTriton kernels:")
    for name in environment.kernels:
        console.print(f"  {name}")
    for device in environment.devices:
        why = device.kernel_problem
        console.print(f"{device.device}: " + ("they can run" if why is None else f"torch runs instead: {why}"))
    console.print()


def _show_checks(result: "SelfCheck") -> None:
    from .tables import make_console, make_table

    console = make_console()
    table = make_table(["method", "device", "check", ">difference", ""])
    for check in result.checks:
        difference = "" if check.difference is None else f"{check.difference:.0e}"
        verdict = "ok" if check.problem is None else check.problem
        table.add_row(check.method, check.device, check.name, difference, verdict)
    console.print(table)
    console.print()


def _sentence(result: "SelfCheck") -> str:
    """What the checks came to."""
    if not result.failed:
        return f"All is well: {len(result.checks)} checks of the packaged model in {duration(result.seconds)}."
    first = result.failed[0]
    return (
        f"{len(result.failed)} of {len(result.checks)} checks failed; the first is {first.name} of {first.method} "
        f"on {first.device}: {first.problem}."
    )
