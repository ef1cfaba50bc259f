"""Tunes to see and hear: piano rolls of base, tuned model and reference, and MIDI files."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.tasks.exhibit import Exhibit, Judged, spread
from luthier.tasks.music.midi import midi_file
from luthier.tasks.music.notation import NotationError, Tune, read_or_fault
from luthier.tasks.music.render import MusicTask
from luthier.tasks.music.roll import piano_rolls

MAX_TUNES, MAX_PICTURES = 20, 6


def exhibits(task: MusicTask, rows: Sequence[Judged]) -> list[Exhibit]:
    """A picture of some rows' tunes, one under another, and MIDI and ABC files of more.

    A tune that cannot be read has no MIDI file; its picture says where it breaks off.
    """
    found = []
    chosen = spread(rows, MAX_TUNES)
    pictured = {judged.row for judged in spread(chosen, MAX_PICTURES)}
    for judged in chosen:
        answers = {**judged.replies, "reference": task.reference(judged.record)}
        tunes: dict[str, Tune | NotationError] = {}
        for who, answer in answers.items():
            abc = task.whole_tune(judged.record, answer)
            name = f"row-{judged.row}-{who}"
            found.append(Exhibit(f"{name}.abc", f"{abc}\n".encode("utf-8", "replace")))
            tune = read_or_fault(abc)
            tunes[who] = tune
            if isinstance(tune, Tune):
                found.append(Exhibit(f"{name}.mid", midi_file(tune)))
        if judged.row in pictured:
            picture = piano_rolls(tunes).encode("utf-8")
            titles = [tune.fields.get("T", "") for tune in tunes.values() if isinstance(tune, Tune)]
            title = next(filter(None, titles), "")
            found.append(
                Exhibit(f"row-{judged.row}.svg", picture, f"Row {judged.row}" + (f": {title}" if title else ""))
            )
    return found
