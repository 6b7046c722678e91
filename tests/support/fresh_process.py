"""Fresh processes in a moment: one process has imported torch and transformers, and is forked for every program.

A start of Python that loads a model takes some seconds, nearly all of them for imports of others' packages. What is run
here finds those imported already and this package not; everything else is as in a process of its own: arguments,
environment, module path, working directory, output and exit status.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

SERVER = """
import gc
import importlib
import json
import os
import runpy
import sys
import traceback

if sys.argv[1:] == ["interpreted"]:
    import quick_triton
    import torch._dynamo
else:
    import safetensors.torch
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.models.llama import modeling_llama
from huggingface_hub import constants

assert "attnconv" not in sys.modules
PATH, BEFORE = sys.path[:], dict(os.environ)


def become(job):
    for number, name in enumerate(("input", "output", "errors")):
        file = os.open(job[name], os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    # The first was iterated over, which left it with a buffer.
    sys.stdin = open(0, closefd=False)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if any(BEFORE.get(name) != os.environ.get(name) for name in {*BEFORE, *os.environ} if name.startswith("HF_")):
        importlib.reload(constants)


def run(first, *arguments):
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    place = {"-c": "", "-m": os.getcwd()}.get(first, os.path.dirname(os.path.abspath(first)))
    sys.path[:] = [place, *paths, *PATH[1:]]
    if first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        runpy.run_path(first, run_name="__main__")


def status_of(arguments):
    try:
        run(*arguments)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        become(job)
        status = status_of(job["arguments"])
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(status & 255)
    print(0 if job["stays"] else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def run(
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    input: str = "",
    check: bool = False,
    interpreted: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run what `python` would with these arguments: `-c` and a program, `-m` and a module, or a script's path.

    With `interpreted`, of others' packages torch alone is imported, and Triton with its interpreter.
    """
    words = [str(argument) for argument in arguments]
    job = {"arguments": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("input", "output", "errors")}
        Path(files["input"]).write_text(input)
        status = _order(job | files | {"stays": False}, interpreted)
        said = [Path(files[name]).read_text() for name in ("output", "errors")]
    done = subprocess.CompletedProcess([sys.executable, *words], status, *said)
    if check:
        assert status == 0, done.stderr
    return done


def talk(*arguments: str | Path, env: dict[str, str], interpreted: bool = False) -> tuple[TextIO, TextIO]:
    """As `run`, of a program that answers lines; it ends when what leads to it is closed.

    Returns:
        what leads to it and what comes from it.
    """
    job = {"arguments": [str(argument) for argument in arguments], "env": env, "cwd": str(Path.cwd())}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("input", "output")}
        for path in files.values():
            os.mkfifo(path)
        _order(job | files | {"errors": os.devnull, "stays": True}, interpreted)
        # In the order in which the other side opens them.
        return open(files["input"], "w"), open(files["output"])


def _order(job: dict[str, Any], interpreted: bool) -> int:
    """Have a program run; its exit status, or 0 if it stays."""
    server = _server(interpreted)
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server(interpreted: bool) -> "subprocess.Popen[str]":
    # Without the package on its path, so that no import of others' finds it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SERVER]
    if interpreted:
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        command.append("interpreted")
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_end, process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
