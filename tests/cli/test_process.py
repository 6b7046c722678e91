import os
import resource
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest

COMMANDS = [
    "",
    "convert",
    "inspect",
    "diagnose",
    "plan",
    "methods",
    "eval",
    "push",
    "demo",
    "doctor",
    "data score",
    "recipes",
    "recipes show",
]


@pytest.fixture
def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repository / ".dev"), "OMP_NUM_THREADS": "1"}


def attnconv(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return fresh_process.run("-m", "attnconv", *map(str, arguments), env=environment)


LIGHT = [*(f"{command} --help" for command in COMMANDS), "methods", "methods lolcats --json", "recipes list"]
# One start of Python for all of them; each command runs in a copy of it, which has imported no more than the app.
EACH_BY_ITSELF = """
import os
import sys
from attnconv.cli import app

for command in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["attnconv", *command.split()]
        try:
            app()
        finally:
            found = sorted({"torch", "transformers", "numpy", "datasets"} & set(sys.modules))
            os.write(2, f"{command}: {found}, ".encode())
    os.write(2, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n".encode())
"""


@pytest.fixture(scope="module")
def light(repository: Path) -> dict[str, str]:
    """What each of the commands imported, and its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(repository / ".dev")}
    command = [sys.executable, "-c", EACH_BY_ITSELF, *LIGHT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in done.stderr.splitlines())


@pytest.mark.parametrize("command", LIGHT)
def test_what_needs_no_torch(light: dict[str, str], command: str) -> None:
    assert light[command] == "[], 0"


@pytest.mark.parametrize(
    ("words", "found"),
    [("conv", "convert"), ("convert m --recipe lolcats-p", "lolcats-plus"), ("methods lolc", "lolcats")],
)
def test_the_shell_completes(environment: dict[str, str], words: str, found: str) -> None:
    line = f"attnconv {words}"
    asked = {"_ATTNCONV_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    code = "import sys; from attnconv.cli import app; sys.argv = ['attnconv']; app(prog_name='attnconv')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [found]


@pytest.mark.slow
def test_help_is_quick(environment: dict[str, str]) -> None:
    """Under half a second of the processor's time, which unlike the wall's does not depend on who else is working."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(4):
        before = used()
        assert attnconv(environment, "--help").returncode == 0
        seconds.append(used() - before)
    assert min(seconds) < 0.5


def test_a_module_of_a_run_can_be_the_first_to_be_imported(environment: dict[str, str]) -> None:
    done = fresh_process.run("-c", "import attnconv.distill.work_folder", env=environment)
    assert done.returncode == 0, done.stderr


def test_exit_codes(environment: dict[str, str], tmp_path: Path) -> None:
    assert attnconv(environment, "--version").returncode == 0
    assert attnconv(environment, "convert").returncode == 2
    failed = attnconv(environment, "inspect", tmp_path / "none")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("Error: ")
    assert len(failed.stderr.splitlines()) == 1


def test_a_closed_pipe_is_no_error(environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m attnconv recipes show lolcats | head -n 1"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# A run that gets Ctrl-C as soon as it has said that a step is done.
INTERRUPTED = """
import os, runpy, signal, sys

ours, theirs = os.pipe()
child = os.fork()
if child:
    os.close(theirs)
    interrupted = False
    for line in open(ours):
        print(line, end="", file=sys.stderr)
        if "step " in line and not interrupted:
            os.kill(child, signal.SIGINT)
            interrupted = True
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.close(ours)
os.dup2(theirs, 2)
os.close(theirs)
sys.argv[0] = "attnconv"
runpy.run_module("attnconv", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_then_resume(environment: dict[str, str], teacher: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["convert", teacher, "--recipe", "quickstart", "--output", output]
    for change in ("stages.*.tokens=3840", "stages.*.batch_size=1", "stages.*.save_every=1", "evaluate.tokens=768"):
        arguments += ["--set", change]
    stopped = fresh_process.run("-c", INTERRUPTED, *map(str, arguments), env=environment)
    assert stopped.returncode == 130
    assert stopped.stdout == ""
    assert "Interrupted" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not output.exists()
    resumed = attnconv(environment, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "done already" in resumed.stderr
    assert (output / "config.json").is_file()
