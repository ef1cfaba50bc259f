"""What a check found: counts, lengths, what is doubled, and every problem by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.data.lines import LineProblem
from luthier.errors import DataError

MAX_DETAILS = 100
"""Problems kept in full; the others are counted by kind."""
SHOWN_IN_ERROR = 5
"""Problems spelled out in the error that stops a run."""


@dataclass(frozen=True, slots=True)
class LengthBin:
    """`count` examples have `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class LongRow:
    """One of the longest rows: where it stands and how many tokens it has before anything is cut."""

    place: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """A row whose content stands elsewhere too, and where it stands first."""

    place: str
    first_place: str


@dataclass(slots=True)
class PartReport:
    """One side of the data: the training rows or the held-out rows.

    Attributes:
        files: The files it comes from.
        num_rows: Rows that hold, before any is left out for its length.
        num_examples: What the engine would train on; a conversation may become several. A preference pair is one.
        num_tokens: Tokens of all examples.
        num_supervised_tokens: Tokens that carry loss, or a tag. 0 for classification, whose loss is one class a row.
        num_cut: Rows that lose tokens to `max_length`.
        num_dropped: Rows left out for being longer than `max_length`.
        lengths: Example length in tokens -> number of examples; of preference pairs, of each side by itself.
        longest: The longest rows, longest first.
        classes: Class -> number of rows, for classification; type -> number of entities, for tagging.
    """

    files: list[str] = field(default_factory=list)
    num_rows: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    longest: list[LongRow] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)

    def histogram(self, max_bins: int = 12) -> list[LengthBin]:
        """Example lengths in at most `max_bins` bins of one round width."""
        return length_histogram(self.lengths, max_bins)

    def length_at(self, quantile: float) -> int:
        """The length in tokens that this share of the examples does not exceed; 0 without examples."""
        wanted = quantile * sum(self.lengths.values())
        passed = 0
        for length in sorted(self.lengths):
            passed += self.lengths[length]
            if passed >= wanted:
                return length
        return 0

    def to_json(self) -> dict[str, Any]:
        """The part as JSON values, with the histogram in place of single lengths."""
        values = asdict(self)
        values["classes"] = dict(sorted(self.classes.items()))
        values["lengths"] = {
            "median": self.length_at(0.5),
            "p95": self.length_at(0.95),
            "max": max(self.lengths, default=0),
            "histogram": [asdict(bin) for bin in self.histogram()],
        }
        return values


@dataclass(slots=True)
class DataReport:
    """The whole check.

    Attributes:
        task: Name of the task that the rows were read as.
        format: How the rows are shaped: "chat", "prompt", ... (for `auto`, what was recognized).
        labels: The classes in order, for classification; the types of entities, for tagging.
        train, validation: The two sides; `validation` is None when nothing is held out.
        problems: The first `MAX_DETAILS` problems, in the order of files and lines.
        problem_counts: Kind of problem -> number of rows, all of them.
        num_duplicates: Rows of the training files whose content stands earlier in them, before any are held out.
        duplicates: The first few of them.
        num_overlapping: Rows of the validation file that stand in the training data too.
        overlapping: The first few of them; `first_place` is the training row.
        warnings: What may be meant but is worth knowing, each in one sentence.
        tokenized: Whether rows were rendered; without a base there are no token counts.
    """

    task: str
    format: str
    labels: list[str] = field(default_factory=list)
    train: PartReport = field(default_factory=PartReport)
    validation: PartReport | None = None
    problems: list[LineProblem] = field(default_factory=list)
    problem_counts: Counter[str] = field(default_factory=Counter)
    num_duplicates: int = 0
    duplicates: list[Repeat] = field(default_factory=list)
    num_overlapping: int = 0
    overlapping: list[Repeat] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tokenized: bool = True

    @property
    def num_problems(self) -> int:
        """Rows that cannot be trained on."""
        return sum(self.problem_counts.values())

    @property
    def errors(self) -> list[str]:
        """The kept problems, each in one line of text; empty exactly when the data can be trained on."""
        return [problem.message for problem in self.problems]

    def add(self, problem: LineProblem) -> None:
        """Count a problem, and keep it while there is room."""
        self.problem_counts[problem.kind] += 1
        if len(self.problems) < MAX_DETAILS:
            self.problems.append(problem)

    def raise_for_errors(self) -> None:
        """Refuse data with any bad row: leaving rows out silently would train on something other than was given.

        Raises:
            DataError: spelling out the first problems and counting the others by kind.
        """
        if not self.num_problems:
            return
        shown = [f"  - {message}" for message in self.errors[:SHOWN_IN_ERROR]]
        rest = self.num_problems - len(shown)
        if rest:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in self.problem_counts.most_common())
            shown.append(f"  - and {rest} more (all by kind: {kinds})")
        raise DataError(
            f"{self.num_problems:,} {'row' if self.num_problems == 1 else 'rows'} cannot be trained on:\n"
            + "\n".join(shown),
            fix="mend or remove them; `luthier check` shows them by line; nothing was changed",
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "trainable": not self.num_problems,
            "task": self.task,
            "format": self.format,
            "labels": self.labels,
            "tokenized": self.tokenized,
            "train": self.train.to_json(),
            "validation": self.validation.to_json() if self.validation else None,
            "num_problems": self.num_problems,
            "problem_counts": dict(self.problem_counts),
            "problems": [asdict(problem) for problem in self.problems],
            "num_duplicates": self.num_duplicates,
            "duplicates": [asdict(repeat) for repeat in self.duplicates],
            "num_overlapping": self.num_overlapping,
            "overlapping": [asdict(repeat) for repeat in self.overlapping],
            "warnings": self.warnings,
        }


def report_from_json(values: Mapping[str, Any]) -> DataReport:
    """The report that `to_json` wrote; example lengths come back as the lower ends of their bins."""
    return DataReport(
        task=values["task"],
        format=values["format"],
        labels=list(values["labels"]),
        train=_part_from_json(values["train"]),
        validation=_part_from_json(values["validation"]) if values["validation"] else None,
        problems=[LineProblem(**problem) for problem in values["problems"]],
        problem_counts=Counter(values["problem_counts"]),
        num_duplicates=values["num_duplicates"],
        duplicates=[Repeat(**repeat) for repeat in values["duplicates"]],
        num_overlapping=values["num_overlapping"],
        overlapping=[Repeat(**repeat) for repeat in values["overlapping"]],
        warnings=list(values["warnings"]),
        tokenized=values["tokenized"],
    )


def _part_from_json(values: Mapping[str, Any]) -> PartReport:
    part = dict(values)
    bins = [LengthBin(**bin) for bin in part["lengths"]["histogram"]]
    part["lengths"] = Counter({bin.low: bin.count for bin in bins})
    part["longest"] = [LongRow(**row) for row in part["longest"]]
    part["classes"] = Counter(part["classes"])
    return PartReport(**part)


def length_histogram(lengths: Mapping[int, int], max_bins: int = 12) -> list[LengthBin]:
    """Count lengths in bins of one round width (1, 2 or 5 times a power of ten) from the shortest to the longest.

    Args:
        lengths: Length -> number of examples.
        max_bins: Most bins.
    """
    if not lengths:
        return []
    shortest, longest = min(lengths), max(lengths)
    width = next(width for width in _round_widths() if longest // width - shortest // width < max_bins)
    counts = Counter[int]()
    for length, count in lengths.items():
        counts[length // width] += count
    return [
        LengthBin(index * width, (index + 1) * width - 1, counts[index])
        for index in range(shortest // width, longest // width + 1)
    ]


def _round_widths() -> Iterable[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
