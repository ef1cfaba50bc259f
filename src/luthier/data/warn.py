"""What in a dataset may be meant, but is worth knowing before it is trained on."""

from __future__ import annotations

from luthier.data.report import DataReport, PartReport

NUM_CLASSES_SHOWN = 5


def find_warnings(report: DataReport, max_length: int) -> list[str]:
    """One sentence for each thing to know: rows cut or left out, repeats, overlap, classes without rows.

    Args:
        report: With all its counts.
        max_length: Most tokens in one example.
    """
    warnings = _length_warnings("training", report.train, max_length)
    if report.validation:
        warnings += _length_warnings("held-out", report.validation, max_length)
    if report.num_duplicates:
        verb = "repeats" if report.num_duplicates == 1 else "repeat"
        warnings.append(f"{count_rows(report.num_duplicates, 'training ')} {verb} an earlier row word for word")
    if report.num_overlapping and report.validation:
        warnings.append(
            f"{report.num_overlapping} of {count_rows(report.validation.num_rows, 'held-out ')} can be found "
            "in the training data too, so scores on them say nothing about new rows"
        )
    return warnings + _class_warnings(report)


def count_rows(number: int, kind: str = "") -> str:
    """The number with its noun, as in "1 training row" and "2 training rows"."""
    return f"{number:,} {kind}{'row' if number == 1 else 'rows'}"


def _length_warnings(kind: str, part: PartReport, max_length: int) -> list[str]:
    warnings: list[str] = []
    of = f"of {count_rows(part.num_rows, kind + ' ')}"
    limit = f"train.max_length ({max_length:,} tokens)"
    if part.num_cut:
        longest = part.longest[0].num_tokens
        warnings.append(f"{part.num_cut:,} {of} will be cut to {limit}; the longest has {longest:,} tokens")
    if part.num_dropped:
        warnings.append(f"{part.num_dropped:,} {of} will be left out, being longer than {limit}")
    return warnings


def _class_warnings(report: DataReport) -> list[str]:
    if not report.labels:
        return []
    warnings: list[str] = []
    num_rows = report.train.num_rows
    if num_rows >= 20 and len(report.labels) > num_rows / 2:
        warnings.append(f"{len(report.labels):,} classes over {num_rows:,} training rows: is the label column a label?")
    empty = [label for label in report.labels if not report.train.classes[label]]
    if empty:
        named = ", ".join(map(repr, empty[:NUM_CLASSES_SHOWN])) + (", ..." if len(empty) > NUM_CLASSES_SHOWN else "")
        without = "1 class has" if len(empty) == 1 else f"{len(empty):,} classes have"
        warnings.append(f"{without} no training row: {named}")
    return warnings
