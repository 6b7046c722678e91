import json
import os
from collections.abc import Callable
from pathlib import Path

import fresh_process
import pytest

SCRIPTS = [
    "attention_speed",
    "bench_conversion",
    "branch_train_mix",
    "decode_state",
    "demo",
    "dinov2_features",
    "growing_state",
    "healed_attention",
    "kernels",
    "kernels_static",
    "minilm_sst2",
    "method_table",
    "moh_speed",
    "multiple_choice_check",
    "rewrites",
    "native_attention",
    "smollm2_heads",
    "smollm2_lolcats",
    "smollm2_moh",
    "smollm2_passkeys",
    "sparse_decode",
    "sparse_passkeys",
    "sparse_quality",
    "sparse_speed",
    "stream_memory",
    "transfer_speed",
]


WITHOUT_MODEL = ("attention_speed", "demo", "growing_state", "kernels", "kernels_static", "moh_speed", "sparse_speed")
MEASURING_A_MODEL = [script for script in SCRIPTS if script not in WITHOUT_MODEL]
NEEDING_DATA = [
    "branch_train_mix",
    "healed_attention",
    "method_table",
    "native_attention",
    "smollm2_lolcats",
    "smollm2_moh",
    "sparse_passkeys",
    "sparse_quality",
    "transfer_speed",
]
# Runs every script in one process, for importing torch takes longer than all else that they do here.
RUN_ALL = """
import contextlib, io, json, runpy, sys
done = {}
for path, arguments in json.loads(sys.stdin.read()):
    sys.argv, status = [path, *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            status = left.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    done[path] = [status, out.getvalue(), err.getvalue()]
print(json.dumps(done))
"""
# Exit status, stdout and stderr of a script.
Done = tuple[int, str, str]


@pytest.fixture(scope="module")
def run_all(repository: Path) -> Callable[..., dict[str, Done]]:
    """Run several scripts with the same arguments, by name."""

    def run(scripts: list[str], *arguments: str, **environment: str) -> dict[str, Done]:
        paths = {str(repository / "benchmarks" / f"{script}.py"): script for script in scripts}
        folders = os.pathsep.join([str(repository / ".dev"), str(repository / "benchmarks")])
        asked = json.dumps([(path, arguments) for path in paths])
        variables = {**os.environ, "PYTHONPATH": folders, **environment}
        done = fresh_process.run("-c", RUN_ALL, input=asked, env=variables, check=True)
        return {paths[path]: tuple(said) for path, said in json.loads(done.stdout).items()}

    return run


def test_every_script_is_known(repository: Path) -> None:
    found = {path.stem for path in (repository / "benchmarks").glob("*.py")}
    assert found >= {*SCRIPTS, "common"}
    table = (repository / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert all(f"benchmarks/{script}.py" in table for script in SCRIPTS)


@pytest.fixture(scope="module")
def help_texts(run_all: Callable[..., dict[str, Done]]) -> dict[str, Done]:
    return run_all(SCRIPTS, "--help")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(help_texts: dict[str, Done], script: str) -> None:
    status, text, errors = help_texts[script]
    assert status == 0, errors
    # Where lines break is a matter of the terminal's width.
    assert f"python benchmarks/{script}.py" in " ".join(text.split())


@pytest.fixture(scope="module")
def without_models(
    run_all: Callable[..., dict[str, Done]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Done]:
    return run_all(MEASURING_A_MODEL, ATTNCONV_MODELS=str(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("script", MEASURING_A_MODEL)
def test_a_missing_model_is_said(without_models: dict[str, Done], script: str) -> None:
    status, _, errors = without_models[script]
    assert status == 1
    assert "ATTNCONV_MODELS" in errors
    assert len(errors.splitlines()) == 1


@pytest.fixture(scope="module")
def without_data(
    run_all: Callable[..., dict[str, Done]], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Done]:
    model = repository / "packaged" / "assets" / "stories260K"
    return run_all(NEEDING_DATA, "--model", str(model), ATTNCONV_SHARED=str(tmp_path_factory.mktemp("shared")))


@pytest.mark.parametrize("script", NEEDING_DATA)
def test_missing_data_are_said(without_data: dict[str, Done], script: str) -> None:
    status, _, errors = without_data[script]
    assert status == 1
    assert "ATTNCONV_SHARED" in errors
    assert len(errors.splitlines()) == 1
