"""Reading YAML strictly: numbers as people write them, and no key twice."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from ..errors import RecipeError


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads `2e6` and `1e-4` as numbers and refuses a key that is there twice.

    An anchored value must not hold aliases: a few lines of those in each other stand for billions of values.
    """

    _inside_anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a value, or say that aliases are nested."""
        parser: Any = self
        event = parser.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if self._inside_anchors and event.anchor in parser.anchors:
                nested = f"the alias *{event.anchor} stands inside a value that has an anchor itself"
                mark: Any = event.start_mark
                raise yaml.composer.ComposerError(None, None, nested, mark)
            return super().compose_node(parent, index)
        anchored = event.anchor is not None
        self._inside_anchors += anchored
        node = super().compose_node(parent, index)
        self._inside_anchors -= anchored
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, or say which key is there twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break
            if key in seen:
                twice = f"the key {key!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point and a sign in such numbers; nobody who writes a learning rate does.
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML.

    Args:
        text: the YAML.
        source: where it came from, for the message.

    Raises:
        RecipeError: the text is no YAML, or has a key twice.
    """
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except RecursionError:
        raise RecipeError(f"{source} is no valid YAML: its values lie too deep in each other") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{source} is no valid YAML: {error.problem or error.context}{place}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is no valid YAML: {' '.join(str(error).split())}") from error
