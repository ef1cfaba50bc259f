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
ACTIONS = ("on", "off", "set", "up", "down", "open", "close", "lock", "unlock", "play", "pause")


def _same(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def _as(canonical: str, *names: str) -> list[tuple[str, str]]:
    return [(name, canonical) for name in names]


def _spoken(**numbers: int) -> list[tuple[str, str]]:
    return [(word.replace("_", "-"), str(number)) for word, number in numbers.items()]


ROOMS = _same("kitchen", "bedroom", "living room", "bathroom", "office", "hallway", "nursery", "dining room")
PERCENT = _same(*(str(number) for number in range(5, 100, 5)))
PERCENT_WORDS = _spoken(
    ten=10, twenty=20, thirty=30, forty=40, fifty=50, sixty=60, seventy=70, eighty=80, ninety=90, twenty_five=25,
    thirty_five=35, sixty_five=65, seventy_five=75, fifteen=15,
)  # fmt: skip
DEGREES = _same(*(str(number) for number in range(16, 26)))
CLOCK = _same(
    *("5:15 am", "6 am", "6:30 am", "7 am", "7:45 am", "8 am", "8:20 am", "9:30 am", "10 am", "11:10 am", "noon"),
    *("1 pm", "2:30 pm", "3 pm", "4:45 pm", "5 pm", "5:30 pm", "6:15 pm", "7 pm", "7:30 pm", "8 pm", "8:45 pm"),
    *("9 pm", "10 pm", "10:30 pm", "11 pm", "midnight", "6:40", "7:05", "12:15", "14:20", "17:05", "19:45", "21:30"),
)
MINUTES = [
    *[(f"{number} minutes", str(number)) for number in (2, 3, 5, 8, 10, 12, 15, 20, 25, 40, 45, 50)],
    *[(f"{word} minutes", number) for word, number in _spoken(five=5, ten=10, fifteen=15, twenty=20, thirty=30)],
    *[("half an hour", "30"), ("half an hour", "30"), ("an hour", "60"), ("an hour", "60")],
]

# Slot -> what a person says and what the reply says.
SLOTS: dict[str, list[tuple[str, str]]] = {
    "room": ROOMS,
    "rd": _same("light", "light", "fan", "heating", "TV", "speaker"),
    "lamp": _as("light", "light", "lamp", "ceiling light"),
    "blinds": _as("blinds", "blinds", "curtains", "shutters", "shades"),
    "warmer": _as("heating", "heating", "radiator", "thermostat"),
    "fan": _as("fan", "fan", "ceiling fan"),
    "telly": _as("TV", "TV", "telly", "television"),
    "door": _same("front door", "back door"),
    "machine": [
        *_same("dishwasher", "washing machine", "coffee maker", "vacuum"),
        *[("robot vacuum", "vacuum"), ("coffee machine", "coffee maker")],
    ],
    "gadget": [
        *_same(
            "sauna", "hot tub", "pool pump", "kettle", "toaster", "microwave", "dryer", "humidifier", "air purifier"
        ),
        *_same("printer", "projector", "fountain", "lawn mower", "sprinkler", "fridge", "freezer", "electric blanket"),
        *_same("treadmill", "game console", "laptop", "rice cooker", "blender", "shower", "record player", "sunbed"),
    ],
    "hatch": _same("window", "skylight", "gate", "cupboard", "safe", "mailbox", "cat flap", "wardrobe", "drawer"),
    "appliance": _same("oven", "alarm", "dishwasher", "washing machine", "coffee maker", "vacuum"),
    "pct": PERCENT,
    "pctw": PERCENT_WORDS,
    "deg": DEGREES,
    "degw": _spoken(seventeen=17, eighteen=18, nineteen=19, twenty=20, twenty_one=21, twenty_two=22, twenty_three=23),
    "speed": _same("1", "2", "3", "4", "5"),
    "speedw": _spoken(one=1, two=2, three=3, four=4, five=5),
    "oven": _same(*(str(number) for number in range(150, 260, 10))),
    "genre": _same("jazz", "rock", "pop", "blues", "soul", "folk", "disco", "opera", "reggae", "techno"),
    "clock": CLOCK,
    "dur": MINUTES,
}

# A reply names a spoken number by the slot of its digits.
REPLY_NAME = {"pctw": "pct", "degw": "deg", "speedw": "speed"}


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
        key = name.lower()
        meant[REPLY_NAME.get(key, key)] = canonical
    fixed = {slot: fillings[0][1] for slot, fillings in SLOTS.items()}
    request = wording.request.format(**said)
    reply = wording.reply.format(**{**fixed, **meant})
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
        for _ in range(_num_rows(wording, split)):
            row = fill(wording, deck)
            made.setdefault(row["messages"][1]["content"], row)
    yield from sorted(made.values(), key=lambda _: generator.random())


def _num_rows(wording: Wording, split: str) -> int:
    """Two training rows for a wording that says two or more things; every other wording gives one."""
    return 2 if split == "train" and wording.reply != REFUSAL and wording.request.count("{") > 1 else 1


def text(split: str) -> str:
    """The whole file of a split."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))


def main() -> None:
    """Write both files beside this script."""
    for split in SPLITS:
        (HERE / f"{split}.jsonl").write_text(text(split), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
