"""One flat file with all the code that a converted model needs, for `--self-contained` exports.

The file is put together from this package's own modules: starting from `native_model` and the classes of the methods
used, every top-level definition that is needed is taken over as it stands. Nothing is rewritten; only relative imports
fall away, since in one file every name is at hand. Two modules that give one name two meanings make the build fail.

In a process that holds several copies of the code, each model is served by the first that knows its methods: an
installed attnconv is preferred to the files, and each copy's hooks leave the models of the others alone (`copies`).
Nothing is registered by merely being defined.
"""

import ast
import builtins
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from ... import __version__
from ...attention_modules.registry import get_method
from ...errors import PlanError
from ...files.own_files import SECTION
from ..planning.plan import methods_of
from .reload import CLASS_PREFIX
from .save import MODELING_MODULE
from .source_trees import BundleError, Definition, Origin, SourceTree

PACKAGE = Path(__file__).resolve().parents[2]
NEEDED = (("convert.writing.reload", "native_model"), ("convert.planning.section", "SECTION_VERSION"))
"""What the end of the file refers to."""
# What this package takes from elsewhere and the flat file shall not need.
STAND_INS = {"pydantic": "convert.writing.plain_options"}
AT_HAND = {"torch", "transformers"}
"""Packages that whoever loads the file has, besides the standard library."""

HEADER = '''"""The attention of a model converted with attnconv, complete: attnconv need not be installed.

Generated from attnconv {version} (Apache-2.0). If attnconv is installed and knows the methods used
here, its own code runs instead of what follows.
"""
'''
FOOTER = '''def _serving():
    """What builds the classes: the installed attnconv if it knows this model's format and methods, else this file."""
    try:
        from attnconv.attention_modules import available as installed_methods
        from attnconv.convert.planning.section import SECTION_VERSION as installed_version
        from attnconv.convert.writing.reload import native_model as installed_model
    except ImportError:
        return native_model
    used = {{
{methods}    }}
    fits = installed_version == SECTION_VERSION and used.issubset(installed_methods())
    return installed_model if fits else native_model
'''


def bundle_source(methods: Iterable[str], architectures: Iterable[str], *, version: str) -> str:
    """The text of the flat modeling file.

    Args:
        methods: names of the methods that the model's plan uses.
        architectures: transformers' class names that the file offers, such as `LlamaForCausalLM`.
        version: attnconv's version, for the header.

    Returns:
        Python source that imports torch, transformers and the standard library only.

    Raises:
        ValueError: an unknown method.
        BundleError: the package's modules cannot be merged; a defect of the package, never of a model.
    """
    used = sorted(set(methods))
    tree = SourceTree(PACKAGE, STAND_INS)
    roots = [_class_of(tree, name) for name in used]
    roots += [tree.find(*name) for name in NEEDED]
    parts, imports = _collect(tree, roots)
    modules = tree.in_order([root.module for root in roots] + sorted({part.module for part in parts}))
    parts.sort(key=lambda part: (modules.index(part.module), part.line))
    future = any(tree.module(part.module).has_future_annotations for part in parts)
    _refuse_clashes(parts, imports)
    blocks = [
        HEADER.format(version=version)
        + ("\nfrom __future__ import annotations\n" if future else "")
        + _import_lines(imports),
        *_texts(parts),
        FOOTER.format(methods="".join(f'        "{name}",\n' for name in used)),
        "".join(f'AttnConv{name} = _serving()("{name}", __name__)\n' for name in architectures),
    ]
    source = "\n\n".join(blocks)
    _check(source)
    return source


def check_self_contained(architecture: str) -> None:
    """Insist that one file can hold all that a model needs, before any work goes into it.

    Args:
        architecture: name of the model's class.

    Raises:
        PlanError: it is not one of transformers' classes, so its own code would be needed too.
    """
    if not hasattr(transformers, architecture):
        raise PlanError(
            f"{architecture} is no class of transformers, so one file cannot hold all the code that this model needs; "
            "leave --self-contained out."
        )


def write_self_contained(folder: Path, config: Mapping[str, Any]) -> None:
    """Give a converted model's folder a modeling file that needs no attnconv, in place of the small one that does.

    Args:
        folder: the folder, with its config.json written already.
        config: the contents of that file.

    Raises:
        PlanError: see `check_self_contained`.
    """
    check_self_contained(config["architectures"][0])
    prefix = f"{MODELING_MODULE}.{CLASS_PREFIX}"
    references = [name for name in config["auto_map"].values() if name.startswith(prefix)]
    architectures = sorted({name.removeprefix(prefix) for name in references})
    modules = config[SECTION]["modules"].values()
    methods = {name for module in modules for name in methods_of(module["method"], module["options"])}
    source = bundle_source(methods, architectures, version=__version__)
    (folder / f"{MODELING_MODULE}.py").write_text(source, encoding="utf-8")


def is_self_contained(folder: Path) -> bool:
    """Whether a converted model's folder holds a modeling file that needs no attnconv."""
    path = folder / f"{MODELING_MODULE}.py"
    return path.is_file() and path.read_text(encoding="utf-8").startswith(HEADER.partition("\n")[0])


def _class_of(tree: SourceTree, method: str) -> Definition:
    module_class = get_method(method).module_class
    package = __name__.removesuffix(".convert.writing.self_contained")
    return tree.find(module_class.__module__.removeprefix(f"{package}."), module_class.__name__)


def _collect(tree: SourceTree, roots: list[Definition]) -> tuple[list[Definition], dict[str, Origin]]:
    """The roots and all that they need, directly or not; and what of it comes from other packages."""
    parts: dict[Definition, None] = {}
    imports: dict[str, Origin] = {}
    waiting = list(roots)
    while waiting:
        part = waiting.pop()
        if part in parts:
            continue
        parts[part] = None
        # Statements that bind nothing are there for their effect, so they belong to whatever else the module has.
        waiting += [other for other in tree.module(part.module).definitions if not other.names]
        for needed in tree.requirements(part):
            if isinstance(needed, Definition):
                waiting.append(needed)
                continue
            name, origin = needed
            if imports.setdefault(name, origin) != origin and _imported(imports[name]) is not _imported(origin):
                raise BundleError(f"{name} is imported as {imports[name]} and as {origin}, again in {part.module}")
    return list(parts), imports


def _refuse_clashes(parts: list[Definition], imports: Mapping[str, Origin]) -> None:
    for part in parts:
        for name in part.names:
            if name in imports:
                raise BundleError(
                    f"{name} is defined in {part.module} and imported from {imports[name].module} elsewhere"
                )
            if hasattr(builtins, name):
                raise BundleError(f"{name} of {part.module} would hide Python's own in every other module")


def _imported(origin: Origin) -> object:
    module = import_module(origin.module)
    return module if origin.name is None else getattr(module, origin.name)


def _texts(parts: list[Definition]) -> Iterator[str]:
    """The definitions' texts; one that several modules share word for word comes once."""
    bound: dict[str, Definition] = {}
    for part in parts:
        others = {bound[name].text for name in part.names if name in bound}
        if others == {part.text}:
            continue
        if others:
            name = next(name for name in part.names if name in bound)
            raise BundleError(f"{name} means one thing in {bound[name].module} and another in {part.module}")
        bound |= dict.fromkeys(part.names, part)
        yield part.text


def _import_lines(imports: Mapping[str, Origin]) -> str:
    plain, named = [], defaultdict(list)
    for name, origin in sorted(imports.items()):
        source = origin.module if origin.name is None else origin.name
        wanted = source if name == source else f"{source} as {name}"
        if origin.name is None:
            plain.append(f"import {wanted}\n")
        else:
            named[origin.module].append(wanted)
    lines = [*sorted(plain), *(f"from {module} import {', '.join(named[module])}\n" for module in sorted(named))]
    return "\n" + "".join(lines)


def _check(source: str) -> None:
    """Make sure that transformers' loader will take the file: no relative imports, nothing that must be installed."""
    tree = ast.parse(source)
    # The loader searches the text, docstrings included.
    if re.search(r"^\s*(from|import)\s+\.", source, flags=re.MULTILINE):
        raise BundleError("a relative import is left in the flat file")
    foreign = sorted(set(_packages(tree)) - AT_HAND - sys.stdlib_module_names)
    if foreign:
        raise BundleError(f"the flat file would need {', '.join(foreign)}")


def _packages(node: ast.AST) -> Iterator[str]:
    """Packages imported anywhere but under `try`, as the loader sees it."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module).split(".")[0]
    # Nothing is imported inside an expression, of which most of a tree consists.
    elif not isinstance(node, ast.Try | ast.expr):
        for child in ast.iter_child_nodes(node):
            yield from _packages(child)
