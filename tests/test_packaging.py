"""What lands on a user's machine: the contents of wheel and sdist, the requirements, the command, the public names."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import attnconv

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
    "sparse",
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


def rooms(repository: Path) -> set[str]:
    """The packages at the top, which are all that belongs to the package beside its modules there."""
    return {path.parent.name for path in repository.glob("[a-z]*/__init__.py")}


def root_modules(repository: Path) -> set[str]:
    return {path.name for path in repository.glob("*.py")} | {"py.typed"}


def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def test_a_wheel_installs_the_package_and_nothing_else(wheel, repository):
    tops = {name.split("/")[0] for name in names(wheel)}
    assert tops == {"attnconv", f"{NAME}.dist-info"}
    inside = {name.split("/")[1] for name in names(wheel) if name.startswith("attnconv/")}
    assert inside == rooms(repository) | root_modules(repository)


def test_a_wheel_holds_all_that_the_rooms_hold(wheel, repository):
    here = {
        path.relative_to(repository).as_posix()
        for room in rooms(repository)
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


def pins(path: Path) -> dict[str, str]:
    """The versions that a file of constraints names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in found}


def bounds(repository: Path, *extras: str) -> dict[str, SpecifierSet]:
    """What the package and some of its extras ask for; each is a lower bound and nothing else."""
    table = project(repository)["project"]
    lines = sum((table["optional-dependencies"][extra] for extra in extras), table["dependencies"])
    found = [requirement for requirement in map(Requirement, lines) if requirement.name != "attnconv"]
    assert [r for r in found if [bound.operator for bound in r.specifier] != [">="]] == []
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in found}


def test_requirements_are_lower_bounds_that_the_tested_versions_meet(repository):
    assert set(project(repository)["project"]["optional-dependencies"]) == {"gguf", "eval", "test", "dev"}
    tested = pins(repository / "constraints.txt")
    assert tested["torch"] == "2.13.0"
    unmet = {n: b for n, b in bounds(repository, "gguf", "eval", "test", "dev").items() if not b.contains(tested[n])}
    assert unmet == {}


def test_every_lower_bound_is_run(repository):
    """By `make test-oldest`, which installs these very versions."""
    oldest = {name: Version(version) for name, version in pins(repository / "constraints-oldest.txt").items()}
    asked = {name: Version(next(iter(b)).version) for name, b in bounds(repository, "gguf", "eval", "test").items()}
    assert {name: oldest.get(name) for name in asked} == asked


def test_help_answers_without_torch():
    code = """
import runpy, sys
sys.argv = ["attnconv", "--help"]
try:
    runpy.run_module("attnconv", run_name="__main__")
finally:
    heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "convert" in done.stdout


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
