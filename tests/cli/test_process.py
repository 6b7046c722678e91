import os
import resource
import signal
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


@pytest.mark.parametrize(
    "command",
    [*(f"{command} --help" for command in COMMANDS), "methods", "methods lolcats --json", "recipes list"],
)
def test_what_needs_no_torch(environment: dict[str, str], command: str) -> None:
    code = f"""
import sys
from attnconv.cli import app
sys.argv = ["attnconv", *{command.split()!r}]
try:
    app()
finally:
    print(sorted({{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


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
    command = [sys.executable, "-c", "import attnconv.distill.work_folder"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
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


def test_ctrl_c_then_resume(environment: dict[str, str], teacher: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["convert", teacher, "--recipe", "quickstart", "--output", output]
    for change in ("stages.*.tokens=7680", "stages.*.batch_size=1", "stages.*.save_every=1", "evaluate.tokens=768"):
        arguments += ["--set", change]
    command = [sys.executable, "-m", "attnconv", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step " in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stdout == ""
    assert "Interrupted" in stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    resumed = attnconv(environment, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "done already" in resumed.stderr
    assert (output / "config.json").is_file()
