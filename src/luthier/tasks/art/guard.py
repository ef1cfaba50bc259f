"""Whether a text is an SVG that is safe to render: read as XML without entities, then looked through.

What a model writes is not to be trusted: a drawing may name files and addresses, run scripts, or grow without bound
from a few lines. Nothing of that is loaded, run or cut out: a drawing that has it is refused as a whole.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element, ParseError

MAX_CHARACTERS = 200_000
MAX_ELEMENTS = 5_000
"""Elements, those that `use` and other references repeat counted each time."""
MAX_DEPTH = 64
MAX_SIDE = 10_000.0
"""Units of width, height and viewBox."""

_SVG = "http://www.w3.org/2000/svg"
_FORBIDDEN = frozenset(
    {
        *("script", "foreignObject", "image", "feImage", "iframe", "object", "embed", "audio", "video", "canvas"),
        *("animate", "animateMotion", "animateTransform", "animateColor", "set", "discard", "handler", "listener"),
    }
)
"""What runs, loads, or holds another kind of document. Names are compared in lower case."""
_FORBIDDEN_LOWER = frozenset(name.lower() for name in _FORBIDDEN)
_URL = re.compile(r"url\(\s*['\"]?\s*([^)'\"]*)", re.IGNORECASE)
_INSTRUCTION = re.compile(r"<\?(?!xml[\s?])")
_STYLE_LOADS = re.compile(r"@import|@font-face|expression\(|javascript:|\\", re.IGNORECASE)
_LENGTH = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(px|pt|pc|mm|cm|in|em|ex|rem|%)?\s*")


class DrawingError(ValueError):
    """Why a text is no drawing, or not one to render."""


def check_drawing(text: str) -> None:
    """Refuse what is no SVG or not safe.

    Raises:
        DrawingError: for what is no XML or no SVG, entities, processing instructions, scripts and event handlers,
            animation, images, references to anything outside the drawing, a size beyond `MAX_SIDE`, elements nested
            deeper than `MAX_DEPTH`, and more than `MAX_ELEMENTS` of them, with repetitions.
    """
    if len(text) > MAX_CHARACTERS:
        raise DrawingError(f"it has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    if _INSTRUCTION.search(text):
        raise DrawingError("it has a processing instruction, which may load something")
    root = _parsed(text)
    if _local(root.tag) != "svg" or _namespace(root.tag) != _SVG:
        raise DrawingError(f'its root is {_shown(root.tag)}; expected <svg xmlns="{_SVG}">')
    references: dict[int, list[str]] = {}
    by_id: dict[str, Element] = {}
    stack = [(root, 1)]
    num_elements = 0
    while stack:
        element, depth = stack.pop()
        num_elements += 1
        if depth > MAX_DEPTH:
            raise DrawingError(f"its elements are nested deeper than {MAX_DEPTH}")
        if num_elements > MAX_ELEMENTS:
            raise DrawingError(f"it has more than {MAX_ELEMENTS:,} elements")
        references[id(element)] = _check_element(element)
        if "id" in element.attrib:
            by_id.setdefault(element.attrib["id"], element)
        stack += [(child, depth + 1) for child in element]
    _check_size(root)
    _Expansion(references, by_id).count(root, 0)


def _parsed(text: str) -> Element:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        root: Element = fromstring(text.strip().encode("utf-8"))
    except DefusedXmlException:
        raise DrawingError("it declares an entity") from None
    except (ParseError, ValueError, LookupError) as error:
        raise DrawingError(f"it is not XML: {error}") from None
    return root


def _check_element(element: Element) -> list[str]:
    """Refuse an element that runs or loads something; returns the ids that it refers to."""
    name = _local(element.tag)
    if name.lower() in _FORBIDDEN_LOWER:
        raise DrawingError(f"it has a <{name}> element")
    if name == "style":
        _check_style("".join(element.itertext()))
    found: list[str] = []
    for attribute, value in element.attrib.items():
        key = _local(attribute).lower()
        if key.startswith("on"):
            raise DrawingError(f"it has an event handler, {key}")
        if key == "base":
            raise DrawingError("it names an address that its references start from")
        if key in ("href", "src"):
            found.append(_inside(value))
        if key == "style":
            _check_style(value)
        found += [_inside(target) for target in _URL.findall(value)]
    return found


def _check_style(style: str) -> None:
    if _STYLE_LOADS.search(style):
        raise DrawingError("its style loads something, or hides that it does")
    for target in _URL.findall(style):
        _inside(target)


def _inside(target: str) -> str:
    """The id of a reference within the drawing."""
    target = target.strip()
    if not target.startswith("#"):
        raise DrawingError(f"it refers to something outside it, {target[:40]!r}")
    return target[1:]


def _check_size(root: Element) -> None:
    sizes = [root.attrib[name] for name in ("width", "height") if name in root.attrib]
    box = re.split(r"[\s,]+", root.attrib.get("viewBox", "").strip())
    for size in [*sizes, *(box if box != [""] else [])]:
        match = _LENGTH.fullmatch(size)
        if match is None:
            raise DrawingError(f"its size {size[:20]!r} is no length")
        if abs(float(match[1])) > MAX_SIDE:
            raise DrawingError(f"its size {size[:20]} is beyond {MAX_SIDE:,.0f}")


class _Expansion:
    """Counts the elements that a renderer meets when it follows every reference."""

    def __init__(self, references: dict[int, list[str]], by_id: dict[str, Element]) -> None:
        self.references, self.by_id = references, by_id
        self.known: dict[int, int] = {}
        self.open: set[int] = set()

    def count(self, element: Element, depth: int) -> int:
        """The elements under `element`, itself and what is referred to included.

        Raises:
            DrawingError: for a reference that comes back to itself, and beyond the limits.
        """
        if id(element) in self.known:
            return self.known[id(element)]
        if id(element) in self.open:
            raise DrawingError("an element refers to itself")
        if depth > 4 * MAX_DEPTH:
            raise DrawingError("its references are nested too deep")
        self.open.add(id(element))
        total = 1
        targets = [self.by_id[name] for name in self.references[id(element)] if name in self.by_id]
        for part in [*element, *targets]:
            total += self.count(part, depth + 1)
            if total > MAX_ELEMENTS:
                raise DrawingError(f"with repetitions it has more than {MAX_ELEMENTS:,} elements")
        self.open.remove(id(element))
        self.known[id(element)] = total
        return total


def _local(tag: Any) -> str:
    return str(tag).rpartition("}")[2]


def _namespace(tag: Any) -> str:
    return str(tag).rpartition("}")[0].removeprefix("{")


def _shown(tag: Any) -> str:
    name = f"<{_local(tag)[:30]}>"
    return name if _namespace(tag) else f"{name} without a namespace"
