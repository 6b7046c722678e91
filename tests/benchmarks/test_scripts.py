import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [
    "attention_speed",
    "bench_conversion",
    "decode_state",
    "demo",
    "dinov2_features",
    "growing_state",
    "kernels",
    "kernels_static",
    "minilm_sst2",
    "method_table",
    "multiple_choice_check",
    "smollm2_lolcats",
    "smollm2_passkeys",
    "stream_memory",
    "transfer_speed",
]


def run(repository: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, repository / "benchmarks" / f"{script}.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(repository / ".dev"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_script_is_known(repository: Path) -> None:
    found = {path.stem for path in (repository / "benchmarks").glob("*.py")}
    assert found >= {*SCRIPTS, "common"}
    table = (repository / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert all(f"benchmarks/{script}.py" in table for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(repository: Path, script: str) -> None:
    done = run(repository, script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}.py" in done.stdout


@pytest.mark.parametrize(
    "script",
    [
        script
        for script in SCRIPTS
        if script not in ("attention_speed", "demo", "growing_state", "kernels", "kernels_static")
    ],
)
def test_a_missing_model_is_said(repository: Path, script: str, tmp_path: Path) -> None:
    done = run(repository, script, ATTNCONV_MODELS=str(tmp_path))
    assert done.returncode == 1
    assert "ATTNCONV_MODELS" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["method_table", "smollm2_lolcats", "transfer_speed"])
def test_missing_data_are_said(repository: Path, script: str, tmp_path: Path) -> None:
    model = repository / "packaged" / "assets" / "stories260K"
    done = run(repository, script, "--model", str(model), ATTNCONV_SHARED=str(tmp_path))
    assert done.returncode == 1
    assert "ATTNCONV_SHARED" in done.stderr
    assert len(done.stderr.splitlines()) == 1
