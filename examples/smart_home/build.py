"""Write train.jsonl and test.jsonl from the wordings: `python examples/smart_home/build.py`.

The wordings are written by hand in wordings/train.txt and wordings/test.txt; this script fills their slots with rooms,
devices, values and times, and writes the reply that belongs to each. The same wordings give the same bytes.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SYSTEM = "Smart home to JSON."
SEED = 20
SPLITS = ("train", "test")

REFUSAL = "unsupported"
ACTIONS = (
    *("on", "off", "set", "open", "close", "lock", "unlock", "play", "pause"),
    *("brighter", "dimmer", "warmer", "cooler", "louder", "quieter"),
)


def _same(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def _as(canonical: str, *names: str) -> list[tuple[str, str]]:
    return [(name, canonical) for name in names]


ROOMS = _same("kitchen", "bedroom", "living room", "bathroom", "office", "hallway")
CLOCK = _same(
    *("5 am", "6 am", "6:30 am", "7 am", "7:45 am", "8 am", "8:20 am", "9:30 am", "10 am", "11:10 am", "noon"),
    *("1 pm", "2:30 pm", "3 pm", "4:45 pm", "5 pm", "5:30 pm", "6:15 pm", "7 pm", "7:30 pm", "8 pm", "8:45 pm"),
    *("9 pm", "10 pm", "10:30 pm", "11 pm", "midnight"),
)
MINUTES = [
    *[(f"{number} minutes", str(number)) for number in (2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 45, 50)],
    *[("an hour", "60"), ("an hour", "60")],
]

# Slot -> what a person says and what the reply says.
SLOTS: dict[str, list[tuple[str, str]]] = {
    "room": ROOMS,
    "rd": _same("light", "light", "fan", "heating", "TV", "speaker"),
    "lamp": _as("light", "light", "lamp"),
    "blinds": _as("blinds", "blinds", "curtains", "shutters"),
    "telly": _as("TV", "TV", "television"),
    "door": _same("front door", "back door"),
    "machine": _same("dishwasher", "washing machine", "coffee maker", "vacuum"),
    "gadget": _same("kettle", "toaster", "microwave", "fridge", "printer", "projector", "sauna", "lawn mower"),
    "hatch": _same("window", "gate", "cupboard"),
    "pct": _same(*(str(number) for number in range(5, 100, 5))),
    "deg": _same(*(str(number) for number in range(16, 26))),
    "speed": _same("1", "2", "3", "4", "5"),
    "oven": _same(*(str(number) for number in range(150, 260, 10))),
    "genre": _same("jazz", "rock", "pop", "disco", "reggae", "techno"),
    "clock": CLOCK,
    "dur": MINUTES,
}


class Wording(NamedTuple):
    """One hand-written sentence and the reply that belongs to it, both with slots."""

    request: str
    reply: str


class Deck:
    """Deals a slot's fillings in shuffled rounds, so that all of them occur about equally often."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._cards: dict[str, list[tuple[str, str]]] = {}

    def deal(self, slot: str, taken: set[str]) -> tuple[str, str]:
        """The next filling of `slot` whose canonical name is not in `taken`."""
        while True:
            cards = self._cards.setdefault(slot, [])
            free = [index for index, (_, canonical) in enumerate(cards) if canonical not in taken]
            if free:
                return cards.pop(free[0])
            # random() alone is promised to give the same numbers in every Python version.
            fresh = sorted(SLOTS[slot], key=lambda _: self._generator.random())
            cards.extend(fresh)


def read_wordings(path: Path) -> list[Wording]:
    """The wordings of a file, comments and blank lines left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split(" => ") for line in lines if line and not line.startswith("#")]
    return [Wording(request.strip(), reply.strip()) for request, reply in pairs]


def fill(wording: Wording, deck: Deck) -> dict[str, Any]:
    """One chat row: the wording with its slots dealt, and the canonical reply."""
    said: dict[str, str] = {}
    meant: dict[str, str] = {}
    for name in dict.fromkeys(re.findall(r"{(\w+)}", wording.request)):
        slot = name.lower().rstrip("0123456789")
        taken = {value for other, value in meant.items() if other.rstrip("0123456789") == slot}
        text, canonical = deck.deal(slot, taken)
        said[name] = text[0].upper() + text[1:] if name[0].isupper() else text
        meant[name.lower()] = canonical
    request = wording.request.format(**said)
    reply = wording.reply.format(**meant)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request},
            {"role": "assistant", "content": canonical_reply(reply)},
        ]
    }


def canonical_reply(shorthand: str) -> str:
    """The JSON that a filled shorthand such as "kitchen light set 40 at 7 am; front door lock" stands for."""
    if shorthand == REFUSAL:
        return _compact({"error": REFUSAL})
    return _compact([_step(part) for part in shorthand.split("; ")])


def _step(text: str) -> dict[str, Any]:
    words = text.split()
    place = max(index for index, word in enumerate(words) if word in ACTIONS)
    step: dict[str, Any] = {"device": " ".join(words[:place]), "action": words[place]}
    rest = words[place + 1 :]
    if rest and rest[0] not in ("at", "in"):
        value = rest.pop(0)
        step["value"] = int(value) if value.isdigit() else value
    if rest:
        step[rest[0]] = " ".join(rest[1:]) if rest[0] == "at" else int(rest[1])
    return step


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def rows(split: str) -> Iterator[dict[str, Any]]:
    """The rows of "train" or "test", in their final order, no request twice."""
    generator = random.Random(f"{SEED} {split}")
    deck = Deck(generator)
    made: dict[str, dict[str, Any]] = {}
    for wording in read_wordings(HERE / "wordings" / f"{split}.txt"):
        row = fill(wording, deck)
        made.setdefault(row["messages"][1]["content"], row)
    yield from sorted(made.values(), key=lambda _: generator.random())


def text(split: str) -> str:
    """The whole file of a split."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))


def main() -> None:
    """Write both files beside this script."""
    for split in SPLITS:
        (HERE / f"{split}.jsonl").write_text(text(split), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
