"""Who waits for a row, fairly among slots: one slot's thousand requests do not hold up another's single one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Waiting(Generic[Item]):
    """Queues by slot. Within a slot the first to come is the first to go."""

    def __init__(self) -> None:
        self._queues: dict[int, dict[str, Item]] = {}
        self._slot_of: dict[str, int] = {}
        self._order: dict[str, int] = {}
        self._num_ever = 0

    def __bool__(self) -> bool:
        return bool(self._slot_of)

    def __contains__(self, name: str) -> bool:
        return name in self._slot_of

    def put(self, name: str, slot: int, item: Item) -> None:
        self._queues.setdefault(slot, {})[name] = item
        self._slot_of[name] = slot
        self._order[name] = self._num_ever
        self._num_ever += 1

    def take(self, name: str) -> Item | None:
        """Take out by name; None where it does not wait."""
        if name not in self._slot_of:
            return None
        slot = self._slot_of.pop(name)
        del self._order[name]
        queue = self._queues[slot]
        item = queue.pop(name)
        if not queue:
            del self._queues[slot]
        return item

    def next(self, num_held: Mapping[int, int]) -> Item:
        """Take out the next: of the slot that holds the fewest rows now, and of such slots the one that waits longest.

        Raises:
            IndexError: when nobody waits.
        """
        if not self:
            raise IndexError("nobody waits")
        heads = [next(iter(queue)) for queue in self._queues.values()]
        name = min(heads, key=lambda name: (num_held.get(self._slot_of[name], 0), self._order[name]))
        item = self.take(name)
        assert item is not None
        return item

    def slots(self) -> list[int]:
        return list(self._queues)

    def names(self, slot: int | None = None) -> Iterator[str]:
        """Names of those who wait, of one slot or of all."""
        return iter(list(self._slot_of) if slot is None else list(self._queues.get(slot, ())))
