"""How much each KV head of a model matters, as a file that rules of recipes refer to."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ...errors import DataError, PlanError
from ...files.documents import Document, Number, OwnFile, parse_document, read_document
from ...files.json_files import write_json
from .probe import ProbedModule

AGAIN = "write it again by `attnconv diagnose MODEL --importance FILE`"


class HeadLayer(Document):
    """One self-attention layer.

    Attributes:
        name: its name in the model.
        class_name: its class in transformers.
        num_kv_heads: its KV heads.
    """

    name: str
    class_name: str
    num_kv_heads: int = Field(ge=1)

    @classmethod
    def of(cls, module: ProbedModule) -> "HeadLayer":
        """What is kept of a layer."""
        return cls(name=module.name, class_name=module.class_name, num_kv_heads=module.geometry.num_kv_heads)


class HeadImportance(OwnFile):
    """How much each KV head matters by some measures: the larger, the more is lost without its full attention.

    Attributes:
        kind: what the file is.
        source: the model as it was named.
        measure: the measure that counts where none is named.
        layers: the model's self-attention layers in order.
        measures: by name, a number for each KV head of each layer; null where it could not be measured.
        roles: what each KV head is for, by its query heads' attention; empty where that was not looked at.
        settings: what they were measured with.
    """

    kind: str = "head_importance"
    source: str = ""
    measure: str
    layers: list[HeadLayer] = Field(min_length=1)
    measures: dict[str, list[list[Number]]]
    roles: list[list[str]] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)

    def scores(self, measure: str | None, path: object = "the file") -> list[list[float]]:
        """A measure's numbers by layer and KV head; what could not be measured is below all others.

        Args:
            measure: its name; None = the file's own choice.
            path: the file, for the error.

        Raises:
            PlanError: the file has no such measure, or not for each head.
        """
        name = measure or self.measure
        if name not in self.measures:
            raise PlanError(f"{path} has no measure {name!r}; it has {', '.join(self.measures)}")
        found = self.measures[name]
        if [len(row) for row in found] != [layer.num_kv_heads for layer in self.layers]:
            raise PlanError(f"{path} is damaged: its measure {name!r} is not one number for each KV head; {AGAIN}")
        return [[float("-inf") if value is None else value for value in row] for row in found]

    def check(self, modules: Sequence[ProbedModule], path: object = "the file") -> None:
        """Insist that the file is about a model with these self-attention layers.

        Raises:
            PlanError: it is about another model.
        """
        ours = [HeadLayer.of(module) for module in modules]
        if ours == self.layers:
            return
        raise PlanError(
            f"{path} is about another model: {self.source or 'its model'} has {_described(self.layers)}, but this one "
            f"has {_described(ours)}; write one for this model by `attnconv diagnose MODEL --importance FILE`"
        )


def _described(layers: Sequence[HeadLayer]) -> str:
    classes = ", ".join(dict.fromkeys(layer.class_name for layer in layers))
    counts = ", ".join(str(count) for count in sorted({layer.num_kv_heads for layer in layers}))
    return f"{len(layers)} layers of {counts} KV heads in {classes} (first {layers[0].name})"


def read_importance(path: str | Path) -> HeadImportance:
    """Read a file of importance.

    Raises:
        DataError: there is no such file, or it is damaged or of something else.
    """
    found = read_document(HeadImportance, Path(path).expanduser(), remedy=AGAIN)
    if found is None:
        raise DataError(f"there is no file {path} with the importance of heads: {AGAIN}")
    return found


def write_importance(
    path: str | Path,
    *,
    source: str,
    modules: Iterable[ProbedModule],
    measures: Mapping[str, Sequence[Sequence[float | None]]],
    measure: str,
    roles: Sequence[Sequence[str]] = (),
    settings: Mapping[str, Any] | None = None,
) -> HeadImportance:
    """Write how much each KV head matters; a file that is there about the same model keeps its other measures.

    Args:
        path: the JSON file.
        source: the model as it was named.
        modules: its self-attention layers in order.
        measures: by name, numbers by layer and KV head.
        measure: the one that counts where none is named.
        roles: what each KV head is for, by layer.
        settings: what they were measured with.

    Returns:
        what the file holds now.

    Raises:
        DataError: another file is there.
    """
    target = Path(path).expanduser()
    layers = [HeadLayer.of(module) for module in modules]
    old = read_document(HeadImportance, target, remedy="remove it") if target.exists() else None
    kept = old if old is not None and old.layers == layers else None
    values = {
        "source": source,
        "measure": measure,
        "layers": layers,
        "measures": {**(kept.measures if kept else {}), **{k: [list(row) for row in v] for k, v in measures.items()}},
        "roles": [list(row) for row in roles] or (kept.roles if kept else []),
        "settings": {**(kept.settings if kept else {}), **(settings or {})},
    }
    made = parse_document(HeadImportance, values, target, remedy="report it")
    write_json(target, made.plain())
    return made
