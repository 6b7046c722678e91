"""Merging modules into one file: what is taken over, in which order, and what makes the build fail."""

import re
from pathlib import Path

import pytest

from attnconv.attention_modules import available, get_method
from attnconv.convert.writing import plain_options
from attnconv.convert.writing import self_contained as bundle
from attnconv.convert.writing.self_contained import bundle_source
from attnconv.convert.writing.source_trees import BundleError

BASE = '''"""Base."""

import math

from pydantic import Field

# Why it is seven.
SEVEN = 7
"""The number seven."""

UNUSED = 8


@staticmethod
def unused():
    return UNUSED


class Base:
    size: int = Field(SEVEN)

    def area(self):
        from .later import helper

        return helper(math.pi)
'''
METHOD = """import torch.nn.functional as F
from torch import nn

from .base import Base


class Method(Base):
    act = F.relu, nn
"""
MODULES = {
    "base": BASE,
    "method": METHOD,
    "later": "from .base import Base\n\n\ndef helper(x):\n    return x, Base\n",
    "options": "def Field(default):\n    return default\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few lines, in place of ours."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(bundle, "PACKAGE", tmp_path)
    monkeypatch.setattr(bundle, "STAND_INS", {"pydantic": "options"})
    monkeypatch.setattr(bundle, "NEEDED", (("method", "Method"),))
    return tmp_path


def body(source: str) -> str:
    """What stands between the imports and the end that every file has."""
    return source.partition("from torch import nn\n")[2].partition("def _serving")[0].strip()


def test_only_what_is_needed_is_taken_over_word_for_word_and_in_order(package: Path) -> None:
    source = bundle_source([], [], version="1")
    assert (
        body(source)
        == '''def Field(default):
    return default


# Why it is seven.
SEVEN = 7
"""The number seven."""


class Base:
    size: int = Field(SEVEN)

    def area(self):
        return helper(math.pi)


class Method(Base):
    act = F.relu, nn


def helper(x):
    return x, Base'''
    )
    assert "import math\nimport torch.nn.functional as F\nfrom torch import nn\n" in source
    assert "pydantic" not in source


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("method", "from .base import Base\nSEVEN = 8\nclass Method(Base):\n x = SEVEN\n", "SEVEN means one thing"),
        ("method", "from .base import Base as B\nclass Method(B):\n pass\n", "must keep names"),
        ("method", "import numpy as np\nclass Method:\n x = np\n", "would need numpy"),
        ("method", "class Method:\n def f(self):\n  import numpy\n", "would need numpy"),
        ("method", 'class Method:\n """\n from .base import Base\n """\n', "relative import is left"),
        ("method", "from .base import nowhere\nclass Method:\n x = nowhere\n", "no definition of nowhere"),
        ("method", "from .absent import Base\nclass Method(Base):\n pass\n", "no module absent"),
        ("method", "from .base import Base\nmath = 3\nclass Method(Base):\n x = math\n", "math is defined in method"),
        ("method", "def sum():\n return 1\nclass Method:\n x = sum\n", "hide Python's own"),
        ("base", "from .method import Method\nclass Base:\n x = Method\n", "import each other"),
        ("options", "from torch import Tensor as nn\ndef Field(x):\n return nn\n", "nn is imported as"),
    ],
)
def test_what_cannot_be_merged_fails_the_build(package: Path, module: str, text: str, message: str) -> None:
    (package / f"{module}.py").write_text(text)
    with pytest.raises(BundleError, match=message):
        bundle_source([], [], version="1")


def test_optional_imports_stay_guarded(package: Path) -> None:
    guarded = "try:\n    import numpy\nexcept ImportError:\n    numpy = None\n"
    (package / "method.py").write_text(f"{guarded}\n\nclass Method:\n    x = numpy\n")
    assert guarded in bundle_source([], [], version="1")


def test_definition_shared_word_for_word_comes_once(package: Path) -> None:
    line = "logger = __name__\n"
    (package / "later.py").write_text(f"{line}\n\ndef helper(x):\n    return logger\n")
    (package / "method.py").write_text(f"from .base import Base\n\n{line}\n\nclass Method(Base):\n    x = logger\n")
    assert bundle_source([], [], version="1").count(line) == 1


def test_effects_of_a_needed_module_are_kept(package: Path) -> None:
    (package / "method.py").write_text(
        "from .base import SEVEN\n\nTABLE = {}\nTABLE[SEVEN] = 1\n\n\nclass Method:\n    pass\n"
    )
    assert "TABLE = {}\n\n\nTABLE[SEVEN] = 1" in bundle_source([], [], version="1")


def test_the_order_of_methods_changes_nothing() -> None:
    source = bundle_source(available(), ["LlamaForCausalLM"], version="1")
    assert source == bundle_source(reversed(available()), ["LlamaForCausalLM"], version="1")


@pytest.mark.parametrize("methods", [[name] for name in available()] + [available()])
def test_every_method_fits_into_one_file(methods: list[str]) -> None:
    source = bundle_source(methods, ["LlamaForCausalLM"], version="1")
    classes = set(re.findall(r"^class (\w+)", source, re.MULTILINE))
    assert {get_method(name).module_class.__name__ for name in methods} <= classes
    assert not re.search(r"^\s*(import|from) pydantic", source, re.MULTILINE)
    assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize("name", available())
def test_plain_options_hold_what_pydantic_would(name: str) -> None:
    """The stand-in gives a class with the same annotations and defaults the same options."""
    options = get_method(name).options_class()
    dumped = options.model_dump(mode="json")
    fields = {key: plain_options.Field(value) for key, value in dumped.items()}
    plain = type("Plain", (plain_options.BaseModel,), {**fields, "__annotations__": dict.fromkeys(fields, object)})
    assert plain().model_dump() == dumped
    assert plain(**dumped).model_dump(mode="json") == dumped
    assert all(getattr(plain(**dumped), key) == value for key, value in dumped.items())
    with pytest.raises(plain_options.ValidationError, match="unknown"):
        plain(**dumped, no_such_option=1)


def test_plain_options_without_a_default_are_required() -> None:
    class Needy(plain_options.BaseModel):
        model_config = plain_options.ConfigDict(extra="forbid")
        window: int
        sizes: list[int] = plain_options.Field(default_factory=lambda: [1], min_length=1)

    assert repr(Needy(window=3)) == "Needy(window=3, sizes=[1])"
    with pytest.raises(plain_options.ValidationError, match=r"missing \['window'\]") as caught:
        Needy()
    assert caught.value.errors()[0]["loc"] == ()


def test_kernels_stay_behind() -> None:
    source = bundle_source(["lolcats"], ["LlamaForCausalLM"], version="0")
    for name in ("needs_package", "runs_in_triton", "hybrid_window_linear", "custom_op"):
        assert name not in source
    # The classes around them stay whole.
    assert "def attend_torch" in source
    assert "def statistics" in source
