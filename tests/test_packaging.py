"""What lands on a user's machine: the contents of wheel and sdist, the requirements, the command, the public names."""

import email
import re
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attnconv

ROOMS = {"attention_modules", "commands", "convert", "distill", "evaluate", "files", "packaged", "recipes", "runs"}
NAME = f"attnconv-{attnconv.__version__}"
DATA = {".yaml", ".json", ".npz", ".safetensors", ".md", ".typed", ".txt", ".model", ".gz", ".html", ".css", ".js"}
# The names a user may rely on; a change here belongs in the changelog.
PUBLIC = [
    "Geometry",
    "Recipe",
    "__version__",
    "apply_plan",
    "available",
    "convert_model",
    "create",
    "load_recipe",
    "make_plan",
    "probe",
    "run_conversion",
]


def build(source: Path, target: Path, kind: str) -> Path:
    # In the environment of the tests, so that nothing is fetched.
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    return build(repository, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(repository, tmp_path_factory):
    return build(repository, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def root_modules(repository: Path) -> set[str]:
    return {path.name for path in repository.glob("*.py")} | {"py.typed"}


def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def test_a_wheel_installs_the_package_and_nothing_else(wheel, repository):
    tops = {name.split("/")[0] for name in names(wheel)}
    assert tops == {"attnconv", f"{NAME}.dist-info"}
    inside = {name.split("/")[1] for name in names(wheel) if name.startswith("attnconv/")}
    assert inside == ROOMS | root_modules(repository)


def test_a_wheel_holds_all_that_the_rooms_hold(wheel, repository):
    here = {
        path.relative_to(repository).as_posix()
        for room in ROOMS
        for path in (repository / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name.removeprefix("attnconv/") for name in names(wheel) if name.startswith("attnconv/")}
    assert packed - root_modules(repository) == here
    assert {Path(name).suffix for name in packed} <= DATA | {".py"}


def test_a_wheel_names_its_command_version_and_licence(unpacked):
    info = unpacked / f"{NAME}.dist-info"
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("attnconv", attnconv.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "attnconv = attnconv.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text(encoding="utf-8")


def test_an_unpacked_wheel_works_from_its_own_files(unpacked):
    code = f"""
import sys
sys.path.insert(0, {str(unpacked)!r})
import attnconv
from attnconv.recipes import list_recipes, load_recipe
assert attnconv.__file__.startswith({str(unpacked)!r})
assert [load_recipe(name, check_methods=False) for name in list_recipes()]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=unpacked)


def test_an_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        packed = {member.name.split("/", 1)[1] for member in archive.getmembers()}
        archive.extractall(tmp_path / "source", filter="data")
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "Makefile", "constraints.txt"} <= packed
    assert {"tests/conftest.py", "tests/test_packaging.py"} <= packed
    assert not {name for name in packed if name.startswith((".dev", ".venv", "out/", "attnconv/"))}
    rebuilt = build(tmp_path / "source" / NAME, tmp_path / "wheel", "wheel")
    assert names(rebuilt) == names(wheel)


def test_requirements_are_lower_bounds_that_the_tested_versions_meet(repository):
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    tested = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert tested["torch"] == "2.13.0"
    extras = project(repository)["project"]["optional-dependencies"]
    assert set(extras) == {"gguf", "eval", "dev"}
    every = project(repository)["project"]["dependencies"] + extras["eval"] + extras["gguf"] + extras["dev"]
    for requirement in map(Requirement, every):
        if requirement.name == "attnconv":
            continue
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement


def test_help_answers_at_once_and_without_torch():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "attnconv", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "convert" in done.stdout
    # Processor time, which on an idle machine is all the time it takes, and the same on a busy one.
    assert min(seconds) < 0.5
    code = """
import runpy, sys
sys.argv = ["attnconv", "--help"]
try:
    runpy.run_module("attnconv", run_name="__main__")
finally:
    heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names():
    assert sorted(attnconv.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(attnconv))
    for name in PUBLIC:
        assert getattr(attnconv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = attnconv.convrt


def test_importing_the_package_is_cheap():
    code = "import attnconv, sys; assert not {'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_names_every_method_and_recipe_and_the_commands(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test"):
        assert re.search(rf"^{command}\b", text, re.MULTILINE), command
    table = [line for line in text.splitlines() if line.startswith("| `") and "https://" in line]
    for method in set(attnconv.available()) - {"softmax"}:
        (row,) = [line for line in table if line.startswith(f"| `{method}`")]
        assert attnconv.attention_modules.get_method(method).paper in row
    from attnconv.recipes import list_recipes

    assert all(f"`{name}`" in text for name in list_recipes())
