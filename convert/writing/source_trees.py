"""The package's own modules as trees of source, and which of their top-level definitions need which others."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

NEEDS_PACKAGE = "needs_package"
"""The decorator of methods that a flat file does without."""


class BundleError(Exception):
    """The package's modules cannot be merged into one file: a defect of the package, never of a model."""


@dataclass(frozen=True)
class Definition:
    """One top-level statement of a module, with what belongs to it.

    Attributes:
        module: dotted name of the module inside the package.
        node: the statement.
        names: what it binds at the top level.
        text: its lines, with decorators, the comment above and the docstring below; nested relative imports left out.
    """

    module: str
    node: ast.stmt
    names: tuple[str, ...]
    text: str

    def __hash__(self) -> int:
        return hash((self.module, self.node.lineno))

    @property
    def line(self) -> int:
        """Where it starts, for the order of a module's definitions."""
        return self.node.lineno

    @cached_property
    def used(self) -> tuple[str, ...]:
        """Every name that stands anywhere in it, sorted."""
        return tuple(sorted({node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}))


@dataclass(frozen=True)
class Origin:
    """Where an imported name comes from: `name` of `module`; `name` is None for `import module`."""

    module: str
    name: str | None


class SourceModule:
    """One source file.

    Args:
        name: dotted name inside the package.
        text: what it holds.
        is_package: whether it is the `__init__.py` of a folder.
    """

    def __init__(self, name: str, text: str, *, is_package: bool) -> None:
        self.name = name
        self.is_package = is_package
        self._lines = text.splitlines(keepends=True)
        self._tree = ast.parse(text)
        self._left_out = set(_leave_out(self._tree, self._lines))

    @cached_property
    def has_future_annotations(self) -> bool:
        """Whether its annotations are never evaluated."""
        return any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in self._tree.body)

    @cached_property
    def definitions(self) -> tuple[Definition, ...]:
        """Top-level statements in order, without imports, docstrings, `__all__` and `if TYPE_CHECKING:`."""
        found = []
        body = self._tree.body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node) or _is_for_typing(node):
                continue
            names = tuple(dict.fromkeys(_bound_names(node)))
            if names == ("__all__",):
                continue
            last = following if following is not None and _is_docstring(following) else node
            found.append(Definition(self.name, node, names, self._text(node, last)))
        return tuple(found)

    @cached_property
    def own(self) -> dict[str, Definition]:
        """The definition that binds each top-level name."""
        return {name: definition for definition in self.definitions for name in definition.names}

    @cached_property
    def imported(self) -> dict[str, Origin]:
        """Names from elsewhere: of the top-level imports all, of those inside functions the relative ones."""
        nested = {name: origin for node in ast.walk(self._tree) for name, origin in self._relative(node).items()}
        return nested | self.imported_first

    @cached_property
    def imported_first(self) -> dict[str, Origin]:
        """Names that are imported when the module is; the modules of relative ones start with a dot."""
        origins: dict[str, Origin] = {}
        for node in self._tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.split(".")[0]
                    origins[name] = Origin(alias.name if alias.asname else name, None)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
                origins |= {alias.asname or alias.name: Origin(str(node.module), alias.name) for alias in node.names}
            else:
                origins |= self._relative(node)
        return origins

    def _relative(self, node: ast.AST) -> dict[str, Origin]:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            return {}
        parts = self.name.split(".") if self.name else []
        parts = parts if self.is_package else parts[:-1]
        base = parts[: len(parts) - (node.level - 1)]
        target = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            if alias.asname is not None or alias.name == "*":
                raise BundleError(f"{self.name}, line {node.lineno}: relative imports must keep names as they are")
        return {alias.name: Origin(f".{target}", alias.name) for alias in node.names}

    def _text(self, node: ast.stmt, last: ast.stmt) -> str:
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        while start and self._lines[start - 1].startswith("#"):
            start -= 1
        dropped = {
            line
            for inner in ast.walk(node)
            if isinstance(inner, ast.ImportFrom) and inner.level
            for line in range(inner.lineno - 1, (inner.end_lineno or inner.lineno))
        }
        # With an import goes the empty line that parts it from the code below.
        dropped |= {line + 1 for line in dropped if not self._lines[line + 1].strip()}
        dropped |= self._left_out
        end = last.end_lineno or last.lineno
        return "".join(self._lines[number] for number in range(start, end) if number not in dropped)


class SourceTree:
    """The modules of the package, read when asked for.

    Args:
        root: the package's folder.
        stand_ins: for a package from elsewhere, the module of ours that takes its place.
    """

    def __init__(self, root: Path, stand_ins: Mapping[str, str]) -> None:
        self._root = root
        self._stand_ins = stand_ins
        self._modules: dict[str, SourceModule] = {}

    def module(self, name: str) -> SourceModule:
        """A module by its dotted name inside the package; the empty name is the package itself."""
        if name not in self._modules:
            base = self._root.joinpath(*name.split(".")) if name else self._root
            path = base / "__init__.py" if base.is_dir() else base.with_name(f"{base.name}.py")
            if not path.is_file():
                raise BundleError(f"there is no module {name}")
            self._modules[name] = _parsed(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        return self._modules[name]

    def find(self, module: str, name: str) -> Definition:
        """The definition of a module's name, wherever it was imported from."""
        source = self.module(module)
        if name in source.own:
            return source.own[name]
        origin = self.origin(source, name)
        if origin is None or origin.name is None or not origin.module.startswith("."):
            raise BundleError(f"{module} has no definition of {name} that can stand in one file")
        return self.find(origin.module[1:], origin.name)

    def origin(self, source: SourceModule, name: str) -> Origin | None:
        """Where a module imports a name from, stand-ins considered; None if it does not."""
        origin = source.imported.get(name)
        stand_in = self._stand_ins.get(origin.module) if origin is not None else None
        return Origin(f".{stand_in}", name) if stand_in is not None else origin

    def requirements(self, definition: Definition) -> Iterator[Definition | tuple[str, Origin]]:
        """What a definition refers to: definitions of the package, and names imported from elsewhere.

        Every name counts that stands anywhere in it, so that too much may be found but never too little.
        """
        source = self.module(definition.module)
        for name in definition.used:
            origin = self.origin(source, name)
            if name in source.own:
                yield source.own[name]
            elif origin is not None and origin.module.startswith("."):
                yield self.find(origin.module[1:], str(origin.name))
            elif origin is not None:
                yield name, origin

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The named modules and all that they import, each after the ones it imports."""
        done: dict[str, None] = {}
        for name in names:
            self._visit(name, done, ())
        return list(done)

    def _visit(self, name: str, done: dict[str, None], path: tuple[str, ...]) -> None:
        if name in path:
            raise BundleError(f"modules import each other: {' -> '.join([*path, name])}")
        if name in done:
            return
        source = self.module(name)
        origins = (self.origin(source, bound) for bound in source.imported_first)
        for target in dict.fromkeys(o.module[1:] for o in origins if o is not None and o.module.startswith(".")):
            self._visit(target, done, (*path, name))
        done[name] = None


# Reading all of the package takes a second, and a process may write several files.
@lru_cache(maxsize=1024)
def _parsed(name: str, text: str, is_package: bool) -> SourceModule:
    return SourceModule(name, text, is_package=is_package)


def _leave_out(tree: ast.Module, lines: Sequence[str]) -> Iterator[int]:
    """Take the methods that are marked with `NEEDS_PACKAGE` out of their classes; yields the indices of their lines."""
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        marked = [node for node in owner.body if isinstance(node, ast.FunctionDef) and _is_marked(node)]
        owner.body = [node for node in owner.body if node not in marked]
        for node in marked:
            start = min(decorator.lineno for decorator in node.decorator_list) - 1
            # With a method goes the empty line above it.
            start -= not lines[start - 1].strip()
            yield from range(start, node.end_lineno or node.lineno)


def _is_marked(node: ast.FunctionDef) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == NEEDS_PACKAGE for mark in node.decorator_list)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_for_typing(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in inner.names)
