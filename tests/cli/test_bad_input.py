"""What a user can get wrong: each time a message that says what was found and what to do, exit code 2, nothing lost."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from luthier.cli import main as cli
from luthier.errors import StorageError


def conversation(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


GOOD = [conversation(("user", f"question {row}"), ("assistant", f"answer {row}")) for row in range(20)]
REPLY = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": %s}]}'


def line_7(bad: str | bytes) -> bytes:
    lines = [line.encode() for line in GOOD]
    lines[6] = bad if isinstance(bad, bytes) else bad.encode()
    return b"\n".join(lines) + b"\n"


ROWS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "broken JSON": ('{"messages": [{"role" "user"}]}', ("broken JSON at column 23", "expected: one whole JSON object")),
    "a missing field": (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}',
        ("(messages[1].content): is missing", "expected: a text"),
    ),
    "another shape": ('{"text": "q"}', ("the columns are text", "prompt, completion")),
    "a wrong order": (
        conversation(("assistant", "a"), ("user", "q")),
        ("an assistant turn comes before any user turn", "to fix:   put the turns in order"),
    ),
    "no assistant": (conversation(("user", "q")), ("there is no assistant turn", "to fix:   add the reply")),
    "invalid UTF-8": (b'{"prompt": "caf\xe9"}', ("byte 0xe9 at position 16", "expected: text in UTF-8", "iconv")),
    "10 MB": (conversation(("user", "x" * 10_100_000), ("assistant", "a")), ("the line is 10.1 MB long", "split it")),
    "no weight": (REPLY % "0", ("no assistant turn has a weight above 0",)),
    "a weight past any float": (REPLY % ("1" + "0" * 400), ("(messages[1].weight): is 1000", "0.001 to 1,000")),
    "a weight past float32": (REPLY % "1e40", ("(messages[1].weight): is 1e+40",)),
    "a weight that vanishes": (REPLY % "1e-60", ("(messages[1].weight): is 1e-60",)),
    "a huge number": (REPLY % ("1" + "0" * 5000), ("a whole number has too many digits",)),
    "a null character": (
        conversation(("user", "q\0"), ("assistant", "a")),
        ("(messages[0].content): holds a null character (U+0000)",),
    ),
    "a raw null byte": (b'{"messages": "\0"}', ("invalid control character", "mend the JSON")),
    "half a character": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}',
        ("half of a character",),
    ),
    "deep nesting": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", ("nested too deeply",)),
    "no object": ("[1]", ("a JSON array", "write each row as an object")),
    "NaN": ('{"messages": NaN}', ("NaN is not JSON",)),
}


@pytest.fixture
def luthier(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; gives its exit code and all that it said."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return int(ended.value.code or 0), said.out + said.err

    return run


Luthier = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_by_line(name: str, tmp_path: Path, luthier: Luthier, tiny_llama: Path) -> None:
    bad, expected = ROWS[name]
    data = tmp_path / "train.jsonl"
    data.write_bytes(line_7(bad))
    code, said = luthier("check", data, "--base", tiny_llama)
    assert code == 2
    assert "1 row cannot be trained on" in said
    assert f"{data}, line 7" in said
    for words in expected:
        assert words in said
    assert data.read_bytes() == line_7(bad)


FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("train.jsonl", b"", ("is empty", "at least one row")),
    "blank": ("train.jsonl", b"\n \n", ("holds no rows", "write the rows into it")),
    "a header alone": ("train.csv", b"prompt,completion\n", ("holds no rows",)),
    "nothing readable": ("train.jsonl", b"{\n{\n", ("line 1: broken JSON", "expected: one whole JSON object")),
    "carriage returns": ("train.jsonl", "\r".join(GOOD).encode(), ("a bare carriage return", "tr ")),
    "UTF-16": ("train.jsonl", "\n".join(GOOD).encode("utf-16"), ("UTF-16", "iconv")),
    "a ragged row": ("train.csv", b"prompt,completion\nq,a\nq,a,x\n", ("line 3: 3 columns", "2 columns")),
    "an open quote": ("train.csv", b'prompt,completion\nq,"a\n', ("a quote opens in this record",)),
    "semicolons": ("train.csv", b"prompt;completion\nq;a\n", ("holds ';'", "columns parted by a comma")),
    "a null byte in a table": (
        "train.csv",
        b"prompt,completion\nq\0,a\nq,b\n",
        ("line 2 (messages[0].content)", "null character"),
    ),
    "no gzip": ("train.jsonl.gz", b"{}", ("not a whole gzip file",)),
    "half a gzip": ("train.jsonl.gz", gzip.compress("\n".join(GOOD).encode())[:100], ("not a whole gzip file",)),
    "no Parquet": ("train.parquet", b"PAR1 and no more", ("cannot be read as Parquet", "write it again")),
    "a spreadsheet": ("train.xlsx", b"PK\3\4", ("the ending '.xlsx'", "convert it to JSON Lines")),
    "one object": ("train.json", b'{"messages":\n []}', ("one JSON object at its top level",)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name: str, tmp_path: Path, luthier: Luthier, tiny_llama: Path) -> None:
    file, content, expected = FILES[name]
    data = tmp_path / file
    data.write_bytes(content)
    code, said = luthier("check", data, "--base", tiny_llama)
    assert code == 2
    for words in (str(data), *expected):
        assert words in said


def test_half_a_parquet_file_is_named(tmp_path: Path, luthier: Luthier, tiny_llama: Path) -> None:
    data = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"] * 900, "completion": ["a"] * 900}), data)
    data.write_bytes(data.read_bytes()[:-100])
    code, said = luthier("check", data, "--base", tiny_llama)
    assert (code, f"{data} cannot be read as Parquet" in said) == (2, True)


def test_a_folder_a_missing_file_and_one_that_may_not_be_read(
    tmp_path: Path, luthier: Luthier, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = luthier("check", tmp_path)
    assert (code, "ending" in said) == (2, True)
    folder = tmp_path / "train.jsonl"
    folder.mkdir()
    code, said = luthier("check", folder)
    assert (code, "is a folder" in said) == (2, True)
    code, said = luthier("check", tmp_path / "trian.jsonl")
    assert (code, "did you mean 'train.jsonl'?" in said) == (2, True)
    locked = tmp_path / "locked.jsonl"
    locked.write_bytes(line_7(GOOD[6]))
    real_open = open

    def refuse(file: Any, *rest: Any, **named: Any) -> Any:  # root may read anything, so the refusal is staged
        if str(file) == str(locked):
            raise PermissionError(13, "Permission denied", str(file))
        return real_open(file, *rest, **named)

    monkeypatch.setattr("builtins.open", refuse)
    code, said = luthier("check", locked)
    assert (code, f"{locked} cannot be read: Permission denied" in said) == (2, True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a byte-order mark", b"\xef\xbb\xbf" + line_7(GOOD[6])),
        ("CRLF", line_7(GOOD[6]).replace(b"\n", b"\r\n")),
        ("no last line end", line_7(GOOD[6]).rstrip()),
    ],
)
def test_what_only_looks_odd_is_read(name: str, content: bytes, tmp_path: Path, luthier: Luthier) -> None:
    data = tmp_path / "train.jsonl"
    data.write_bytes(content)
    code, said = luthier("check", data, "--no-base", "--json")
    report = json.loads(said)
    assert (code, report["train"]["num_rows"], report["num_problems"]) == (0, 20, 0)


def test_labels_that_are_whole_numbers_are_read_and_others_refused(tmp_path: Path, luthier: Luthier) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": f"t{row}", "label": row % 3}) + "\n" for row in range(9)))
    code, said = luthier("check", data, "--no-base", "--json")
    assert (code, json.loads(said)["labels"]) == (0, ["0", "1", "2"])
    with data.open("a") as file:
        file.write('{"text": "x", "label": 2.5}\n')
    code, said = luthier("check", data, "--no-base")
    assert (code, "line 10 (label): is 2.5" in said) == (2, True)


RECIPES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a list": ("- base: x\n", ("holds a list", "a mapping of fields")),
    "a text": ("hello", ("holds a text",)),
    "empty": ("", ("holds nothing", "luthier init")),
    "a tab": ("data:\n\ttrain: x\n", ("not valid YAML in line 2, column 1",)),
    "not UTF-8": (b"\xff\xfe\0\1", ("cannot be read", "UTF-8")),
    "a null character": ("base: a\0b", ("the character U+0000",)),
    "deep nesting": ("[" * 3000, ("nested too deeply",)),
    "a field twice": ("base: a\ndata: {train: x}\nbase: b\n", ("line 3", "'base' stands here and in line 1")),
    "an object": ('data: !!python/object/apply:os.system ["id"]', ("could not determine a constructor",)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_named(name: str, tmp_path: Path, luthier: Luthier) -> None:
    content, expected = RECIPES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, said = luthier("train", recipe)
    assert code == 2
    for words in (str(recipe), *expected):
        assert words in said


SETTINGS = {
    "train.learning_rate=.nan": "found nan; input should be a finite number",
    "train.learning_rate=.inf": "found inf; input should be a finite number",
    "train.betas=[2,3]": "each of the two lies from 0 to below 1",
    "train.seed=99999999999999999999": "train.seed: found 99999999999999999999",
    "train.batch_size=many": "train.batch_size: found 'many'",
    "train.epoch=3": "did you mean 'epochs'?",
    "trian.epochs=3": "did you mean 'train'?",
    "epochs=3": "did you mean 'train.epochs'?",
    "train=3": "expected a section, as in `train: {field: value}`",
    "train.epochs=[": "the value is not valid YAML",
    "train.epochs": "the form FIELD=VALUE",
    "base.x=3": "base holds a single value",
    "compute.device=tpu": "a device is auto, cpu, cuda, or cuda:N",
    "compute.threads=100000": "less than or equal to 1024",
    "data.validation=0.7": "a share of rows lies between 0 and 0.5",
    "data.train=[]": "at least 1 item",
    "task=caht": "did you mean 'chat'?",
    "format=2": "format: found 2",
    "base=no-such-base": "the base 'no-such-base' does not exist",
    "base=/no/such/folder": "the base '/no/such/folder' does not exist",
    "data.validation=nope.jsonl": "there is no data file at nope.jsonl",
    "method.rank=100000": "method.rank is 100000, and model.layers.0.self_attn.q_proj is a matrix of",
    "method.targets=[nope]": "no linear layer of the base is named 'nope'",
    "method.modules_to_save=[nope]": "no module of the base is named 'nope'",
    "start_from=/no/where": "there is no folder /no/where",
    "output=good.jsonl": "good.jsonl is a file",
    "output=.": "is not empty",
}


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that holds, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_OFFLINE", "1")
    (tmp_path / "good.jsonl").write_bytes(line_7(GOOD[6]))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {tiny_llama}\ndata: {{train: good.jsonl, validation: 0.2}}\noutput: run\n"
        "train: {max_steps: 1, max_length: 128}\nevaluation: {rows: 0}\ncompute: {device: cpu, threads: 1}\n"
    )
    return path


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_bad_setting_is_named(setting: str, recipe: Path, luthier: Luthier) -> None:
    code, said = luthier("train", recipe, "--set", setting)
    assert code == 2
    assert SETTINGS[setting] in said
    assert not Path("run/adapter").exists()


def test_a_run_that_never_came_to_its_training_gives_way_to_the_mended_one(recipe: Path, luthier: Luthier) -> None:
    Path("good.jsonl").write_bytes(line_7("{"))
    code, said = luthier("train", recipe)
    assert (code, "line 7" in said) == (2, True)
    Path("good.jsonl").write_bytes(line_7(GOOD[6]))
    code, said = luthier("train", recipe, "--set", "train.max_length=64", "--json")
    assert code == 0
    code, said = luthier("train", recipe)
    assert (code, "holds a run already (done)" in said) == (2, True)


def test_two_recipes_may_not_write_to_one_folder(recipe: Path, luthier: Luthier) -> None:
    shutil.copy(recipe, "other.yaml")
    Path("other.yaml").write_text(Path("other.yaml").read_text().replace("output: run", "output: ./run"))
    code, said = luthier("train", recipe, "other.yaml")
    assert (code, "two recipes write to" in said) == (2, True)


def test_a_full_disk_names_the_way_on(recipe: Path, luthier: Luthier, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.worker import run

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("run/checkpoints/step-000001 could not be written: the disk is full", "room", "free some")

    monkeypatch.setattr(run, "save_checkpoint", full)
    code, said = luthier("train", recipe)
    assert code == 2
    assert "the disk is full" in said
    assert f"luthier train {recipe} --resume" in said
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)  # undone with the rest, and taken back at the end
    code, _ = luthier("train", recipe, "--resume", "--quiet")
    assert (code, Path("run/adapter/adapter_model.safetensors").exists()) == (0, True)
