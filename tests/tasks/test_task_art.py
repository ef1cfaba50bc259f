"""task: art: rows, prompts, scores of what is drawn, and drawings that must not be rendered."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_checks import check_exchange, check_missing_packages
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.art import renderer as renderer_module
from luthier.tasks.art.exhibit import exhibits, shared_beginning
from luthier.tasks.art.guard import MAX_CHARACTERS, DrawingError, check_drawing
from luthier.tasks.art.raster import ink_of, iou, picture_of
from luthier.tasks.art.schema import ArtConfig
from luthier.tasks.exhibit import Judged
from luthier.tasks.registry import task_for
from luthier.tasks.shapes import Shaper

TASK = task_for(ArtConfig())
OPEN = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:x="http://www.w3.org/1999/xlink" viewBox="0 0 8 8"'
SQUARE = f'{OPEN}><rect width="4" height="8"/></svg>'
OTHER = f'{OPEN}><rect width="8" height="4"/></svg>'
ROW = {"prompt": "a half-open door 🚪 ドア", "svg": SQUARE}


def svg(inside: str) -> str:
    return f"{OPEN}>{inside}</svg>"


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_the_description_is_the_prompt_and_the_drawing_carries_loss(family: str, tmp_path: Path) -> None:
    prompt = check_exchange(TASK, ROW, SQUARE, family, tmp_path)
    assert ROW["prompt"] in prompt.text
    assert prompt.reference == SQUARE
    assert "Draw this as SVG:" not in prompt.text
    described = {"description": ROW["prompt"], "svg": SQUARE}
    assert f"Draw this as SVG:\n\n{ROW['prompt']}" in check_exchange(TASK, described, SQUARE, family, tmp_path).text
    untold = task_for(ArtConfig(instruction="")).parse(described)
    assert untold.prompt == ROW["prompt"]


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"svg": ""}, "svg", "empty"),
        ({"svg": ["<svg/>"]}, "svg", "a list"),
        ({"svg": "a door"}, "svg", "no <svg> element"),
        ({"prompt": None}, "prompt", "instruction or description"),
        ({"prompt": 5}, "prompt", "a number"),
    ],
)
def test_what_does_not_hold_is_named(change: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse({**ROW, **change})
    assert caught.value.field == field
    assert said in caught.value.message


def test_rows_are_recognized_and_mapped() -> None:
    shaped = Shaper("art").shape({"description": "door", "svg": SQUARE, "id": 3})
    assert TASK.parse(shaped).prompt == "Draw this as SVG:\n\ndoor"
    mapped = Shaper("art", fields={"svg": "completion"}).shape({"prompt": "p", "completion": SQUARE})
    assert TASK.parse(mapped).svg == SQUARE
    query = TASK.parse_query(Shaper("art", fields={"svg": "completion"}).shape({"prompt": "p"}, is_query=True))
    assert (query.prompt, query.svg) == ("p", "")


def test_a_drawing_that_is_too_long_is_cut_refused_or_left_out(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    record = TASK.parse({**ROW, "svg": svg('<rect width="1" height="1"/>' * 50)})
    (cut,) = TASK.examples(record, renderer, 200, "end")
    assert renderer.end_of_turn_id not in cut.tokens[cut.weights > 0]
    assert TASK.examples(record, renderer, 200, "drop") == []
    with pytest.raises(RowError) as caught:
        TASK.examples(record, renderer, 200, "error")
    assert caught.value.kind == "truncated"


def test_pixels_and_their_overlap() -> None:
    left, top = ink_of(SQUARE, 64), ink_of(OTHER, 64)
    assert not isinstance(left, DrawingError)
    assert not isinstance(top, DrawingError)
    assert left[:, :32].all()
    assert not left[:, 32:].any()
    assert iou(left, left) == 1.0
    assert iou(left, top) == pytest.approx(1 / 3)
    assert iou(np.zeros_like(left), np.zeros_like(left)) == 1.0
    # A white shape leaves no ink, a pale yellow one does; a wide drawing keeps its proportions on the square.
    assert not np.any(ink_of(svg('<rect width="8" height="8" fill="#fff"/>'), 32))
    assert np.all(ink_of(svg('<rect width="8" height="8" fill="#ff8"/>'), 32))
    wide = OPEN.replace("0 0 8 8", "0 0 8 2") + '><rect width="8" height="2"/></svg>'
    assert np.asarray(ink_of(wide, 64)).sum(axis=0).tolist() == [16] * 64
    assert picture_of(SQUARE, 40).shape == (40, 40, 3)


def test_scores_of_drawings_and_of_garbage() -> None:
    record = TASK.parse(ROW)
    assert TASK.mark(record, f"\n{SQUARE}\n").ratios == {"valid": (1.0, 1.0), "iou": (1.0, 1.0)}
    assert TASK.mark(record, OTHER).ratios["iou"] == (pytest.approx(1 / 3), 1.0)
    assert TASK.mark(record, svg("")).ratios == {"valid": (1.0, 1.0), "iou": (0.0, 1.0)}
    for garbage in ("", "Sure!", SQUARE[:-3], f"```svg\n{SQUARE}\n```", "<svg/>", "😀", "\ud800", SQUARE * 2):
        marks = TASK.mark(record, garbage)
        assert marks.ratios == {"valid": (0.0, 1.0), "iou": (0.0, 1.0)}, garbage
        assert marks.reference_ratios == {"valid": (1.0, 1.0)}
    assert "64 by 64" in TASK.signatures([record])["iou"]


def test_what_is_predicted_says_whether_it_holds() -> None:
    record = TASK.parse_query({"prompt": "a door"})
    assert TASK.present(record, f" {SQUARE} ") == {"svg": SQUARE, "valid": True}
    found = TASK.present(record, svg("<script/>"))
    assert (found["valid"], found["problem"]) == (False, "it has a <script> element")


HOSTILE = {
    "script": (svg("<script>alert(1)</script>"), "<script>"),
    "script in another namespace": (svg('<s:SCRIPT xmlns:s="http://www.w3.org/1999/xhtml"/>'), "<SCRIPT>"),
    "event handler": (SQUARE.replace("<rect", '<rect onclick="run()"'), "event handler"),
    "image from a file": (svg('<image href="file:///etc/passwd"/>'), "<image>"),
    "image from an address": (svg('<image x:href="http://example.org/a.png"/>'), "<image>"),
    "image in a filter": (svg('<filter id="f"><feImage href="a.png"/></filter>'), "<feImage>"),
    "use of another file": (svg('<use x:href="other.svg#a"/>'), "outside it, 'other.svg#a'"),
    "data": (svg('<use href="data:image/svg+xml;base64,AA=="/>'), "outside it"),
    "fill from an address": (svg("<rect fill=\"url( 'http://example.org/#a')\"/>"), "outside it"),
    "imported style": (svg("<style>@import 'http://example.org/a.css';</style>"), "style"),
    "style from an address": (svg("<style>rect{fill:url(//example.org)}</style>"), "outside it"),
    "hidden address": (svg('<rect style="fill:u\\72l(http://example.org)"/>'), "style"),
    "style sheet": (f'<?xml-stylesheet href="http://example.org/a.css"?>{SQUARE}', "processing instruction"),
    "base address": (svg('<g xml:base="http://example.org/"/>'), "address"),
    "link": (svg('<a href="javascript:alert(1)"/>'), "outside it"),
    "foreign document": (svg("<foreignObject/>"), "<foreignObject>"),
    "animation": (svg('<rect><set attributeName="href" to="http://example.org"/></rect>'), "<set>"),
    "entities": (f'<!DOCTYPE a [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>{svg("<text>&b;</text>")}', "entity"),
    "external entity": (f'<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>{svg("<text>&a;</text>")}', "entity"),
    "huge canvas": (SQUARE.replace("viewBox", 'width="1e9" height="1e9" viewBox'), "beyond"),
    "huge box": (SQUARE.replace("0 0 8 8", "0 0 1e30 8"), "beyond"),
    "no length": (SQUARE.replace("0 0 8 8", "0 0 nan 8"), "no length"),
    "nested": (svg("<g>" * 3000 + "</g>" * 3000), "deeper"),
    "many": (svg("<g/>" * 6000), "elements"),
    "long": (svg(" " * MAX_CHARACTERS), "characters"),
    "use of itself": (svg('<g id="a"><use href="#a"/></g>'), "refers to itself"),
    "use in a ring": (svg('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'), "refers to itself"),
    "pattern of itself": (svg('<pattern id="p"><rect fill="url(#p)"/></pattern>'), "refers to itself"),
    "laughing uses": (
        svg('<g id="l0"/>' + "".join(f'<g id="l{n + 1}">{f"""<use href="#l{n}"/>""" * 10}</g>' for n in range(9))),
        "with repetitions",
    ),
    "no root": ("", "not XML"),
    "another root": ("<html/>", "its root"),
    "another namespace": ('<svg width="8" height="8"/>', "namespace"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_drawings_are_refused_before_rendering(name: str) -> None:
    drawing, said = HOSTILE[name]
    with pytest.raises(DrawingError) as caught:
        check_drawing(drawing)
    assert said in str(caught.value)
    assert TASK.mark(TASK.parse(ROW), drawing).ratios == {"valid": (0.0, 1.0), "iou": (0.0, 1.0)}


def test_what_is_safe_is_not_refused() -> None:
    drawing = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!-- url(http://a) stays a comment -->\n'
        '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">\n'
        f'{OPEN} width="100%" height="2.5em"><defs><linearGradient id="g"><stop stop-color="red"/></linearGradient>'
        '<g id="s"><rect width="4" height="8" fill="url(#g)"/></g></defs><style>.a{stroke:blue}</style>'
        '<use href="#s" class="a"/><use x:href="#missing"/><text>Tür 😀</text></svg>'
    )
    check_drawing(drawing)
    assert np.asarray(ink_of(drawing, 32)).any()


def test_rendering_is_bounded_in_time_and_goes_on_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements within all limits whose filters would run for minutes."""
    filters = '<feMorphology operator="dilate" radius="9000"/>' * 100
    costly = svg(
        f'<filter id="f" x="-9" y="-9" width="99" height="99">{filters}</filter>'
        + '<rect filter="url(#f)" width="8" height="8"/>' * 40
    )
    check_drawing(costly)
    with pytest.raises(DrawingError, match="too much time or memory"):
        picture_of(costly, 512)
    assert picture_of(SQUARE, 16).shape == (16, 16, 3)
    assert renderer_module.MAX_SECONDS <= 5


def test_the_missing_packages_are_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    check_missing_packages("art", TASK.needs, "defusedxml and resvg_py, which are not installed", monkeypatch)


def test_the_contact_sheet_shows_three_drawings_a_row() -> None:
    from matplotlib.image import imread

    rows = [
        Judged(n, TASK.parse({**ROW, "prompt": f"door $5 and $6 <b> 🚪 {n}"}), {"base": "no", "tuned": OTHER})
        for n in range(30)
    ]
    found = {exhibit.name: exhibit for exhibit in exhibits(TASK, rows)}
    assert {"drawings.png", "row-0-tuned.svg", "row-29-reference.svg"} <= found.keys()
    assert "row-0-base.svg" not in found
    assert len(found) == 1 + 2 * 12
    sheet = imread(io.BytesIO(found["drawings.png"].content))
    assert sheet.shape[0] > 6 * 150
    assert sheet.shape[1] > 6 * 150
    black = (sheet[..., :3].max(axis=2) < 0.1).mean()
    assert 0.1 < black < 0.5  # half of two of every three frames
    assert exhibits(TASK, []) == []


def test_no_text_is_drawn_with_another_error() -> None:
    draw = random.Random(7)
    letters = "<>/=\"'# 0123456789.eMLCZzhv-svgpathuse&;%\n\x00😀"
    kinds = set()
    for _ in range(300):
        text = list(svg('<g id="a"><path d="M1 1 6 6"/></g><use href="#a" x="2"/>'))
        for _ in range(draw.randint(1, 3)):
            text[draw.randrange(len(text))] = draw.choice(letters)
        kinds.add(type(ink_of("".join(text), 16)))
    assert kinds == {np.ndarray, DrawingError}


def test_the_sheet_leaves_out_what_all_prompts_begin_with() -> None:
    assert shared_beginning(["Draw:\n\na red door", "Draw:\n\na red window"]) == len("Draw:\n\na red ")
    assert shared_beginning(["Draw:\n\ndoor", "Draw:\n\nwindow"]) == len("Draw:\n\n")
    assert shared_beginning(["door"]) == shared_beginning(["door", "window"]) == 0
