"""Rows from the generator, a local folder and the hub; what is said when they cannot be read."""

import json
from pathlib import Path

import datasets
import pytest

from unfed.base.errors import DataError
from unfed.data.datasets import DatasetSpec, data_digest, example_ids, load_rows, preflight

GOOD = [{"question": f"q{n}", "answer": f"a{n}", "other": n} for n in range(5)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with ``tofu/full.json`` and ``tofu/retain90.json`` (its first three rows)."""
    write(tmp_path, "full", GOOD)
    write(tmp_path, "retain90", GOOD[:3])
    return tmp_path


def write(root: Path, name: str, rows: list) -> Path:
    path = root / "tofu" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def spec(name: str, **fields) -> DatasetSpec:
    return DatasetSpec("locuslab/TOFU", name, **fields)


def test_local_rows_keep_their_columns_and_have_the_same_id_in_every_file(root: Path):
    full, retain = load_rows(spec("full"), root), load_rows(spec("retain90"), root)
    assert [e["other"] for e in full] == [0, 1, 2, 3, 4]
    assert [e["id"] for e in retain] == [e["id"] for e in full[:3]]
    assert len({e["id"] for e in full}) == 5 and all(len(e["id"]) == 16 for e in full)


def test_the_id_is_the_digest_of_question_and_answer():
    # echo -n 'q\x1fa' | sha256sum, first 16 digits; repeated rows are numbered in order.
    import hashlib

    digest = hashlib.sha256(b"q\x1fa").hexdigest()[:16]
    assert example_ids([("q", "a"), ("q", "b"), ("q", "a"), ("q", "a")])[::2] == [digest, f"{digest}#2"]
    assert example_ids([("q", "a")] * 3)[2] == f"{digest}#3"
    assert example_ids([("ab", "c")]) != example_ids([("a", "bc")])


def test_tofu_rows_have_one_id_in_full_retain_forget_and_perturbed(shared_dir: Path):
    data = shared_dir / "data"
    full = [e["id"] for e in load_rows(spec("full"), data)]
    assert len(set(full)) == 4000
    assert [e["id"] for e in load_rows(spec("retain90"), data)] == full[:3600]
    for name in ("forget10", "forget10_perturbed"):
        assert [e["id"] for e in load_rows(spec(name), data)] == full[3600:]


def test_limit_keeps_the_first_rows_and_reads_no_further(root: Path):
    write(root, "torn", [*GOOD[:2], "{broken"])
    assert [e["question"] for e in load_rows(spec("torn", limit=2), root)] == ["q0", "q1"]
    with pytest.raises(DataError, match="limit=0"):
        load_rows(spec("full", limit=0), root)


def test_other_column_names(root: Path):
    write(root, "own", [{"prompt": "p", "reply": "r"}])
    [row] = load_rows(spec("own", question_key="prompt", answer_key="reply"), root)
    assert (row["question"], row["answer"], row["id"]) == ("p", "r", example_ids([("p", "r")])[0])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{broken", "torn.json:3: not a JSON object on one line"),
        ("[1, 2]", "torn.json:3: a list where a JSON object"),
        (json.dumps({"question": "q"}), "torn.json:3 has no column 'answer' .answer_key..*choices: question"),
        (json.dumps({"question": "q", "answer": ["a"]}), "torn.json:3: column 'answer' .answer_key. holds list"),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(root: Path, bad: str, said: str):
    # The blank second line counts as a line, as an editor counts.
    write(root, "torn", [GOOD[0], "", bad, GOOD[1]])
    with pytest.raises(DataError, match=said):
        load_rows(spec("torn"), root)


def test_a_line_that_is_not_utf8_is_named(root: Path):
    (root / "tofu" / "latin.json").write_bytes(b'{"question": "q", "answer": "a"}\n{"question": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.json:2: not UTF-8"):
        load_rows(spec("latin"), root)


def test_an_empty_file_is_an_error(root: Path):
    write(root, "void", [""])
    with pytest.raises(DataError, match=r"void\.json has no rows"):
        load_rows(spec("void"), root)
    assert preflight(spec("void"), root) == [f"{root / 'tofu' / 'void.json'} has no rows"]


def test_an_unknown_name_lists_what_the_folder_has(root: Path):
    with pytest.raises(DataError, match=r"no data set 'retain9'; did you mean 'retain90'.*choices: full, retain90"):
        load_rows(spec("retain9"), root)


def test_a_data_root_that_does_not_exist(tmp_path: Path):
    with pytest.raises(DataError, match=r"paths\.data_dir .or UNFED_DATA_DIR. is .*nowhere, which is not a directory"):
        load_rows(spec("full"), tmp_path / "nowhere")


def test_a_local_file_of_another_split(root: Path):
    with pytest.raises(DataError, match=r"no data set 'full/test'; did you mean 'full'.*full/test\.json is not there"):
        load_rows(spec("full", split="test"), root)
    (root / "tofu" / "full").mkdir()
    (root / "tofu" / "full" / "test.json").write_text('{"question": "Q?", "answer": "A."}\n')
    assert [r["answer"] for r in load_rows(spec("full", split="test"), root)] == ["A."]
    with pytest.raises(DataError, match="only 'train'"):
        load_rows(DatasetSpec("fictional", "full", split="test"))


def test_plain_text_has_no_question(root: Path):
    (root / "tofu" / "news.json").write_text('{"text": "Rain fell."}\n{"text": "It stopped."}\n')
    rows = load_rows(DatasetSpec("locuslab/TOFU", "news", question_key=None, answer_key="text"), root)
    assert [(r["question"], r["answer"]) for r in rows] == [("", "Rain fell."), ("", "It stopped.")]
    assert rows[0]["id"] != rows[1]["id"]


def test_the_generator_needs_no_folder():
    rows = load_rows(DatasetSpec("fictional", "forget25", limit=3))
    assert len(rows) == 3 and {"id", "question", "answer", "author"} <= set(rows[0])
    with pytest.raises(DataError, match="no split 'forget2'; did you mean 'forget25'"):
        load_rows(DatasetSpec("fictional", "forget2"))


def test_joined_names_are_read_one_after_the_other(root: Path):
    rows = load_rows(spec("full[:2]+retain90"), root)
    assert [e["question"] for e in rows] == ["q0", "q1", "q0", "q1", "q2"]
    assert [e["id"].endswith("#2") for e in rows] == [False, False, True, True, False]


def test_preflight_sees_what_a_first_line_shows(root: Path):
    assert preflight(spec("full"), root) == []
    assert preflight(DatasetSpec("fictional", "full")) == []
    assert "did you mean 'full'" in preflight(spec("fulll"), root)[0]
    assert "no column 'reply'" in preflight(spec("full", answer_key="reply"), root)[0]
    assert "limit=-1" in preflight(spec("full", limit=-1), root)[0]
    write(root, "torn", ["{broken"])
    assert "torn.json:1" in preflight(spec("torn"), root)[0]


def test_the_hub_is_asked_with_path_name_and_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # The data root has no folder ``tofu``, so the hub is next.
    rows = load_rows(spec("forget10", split="test", limit=1), tmp_path)
    assert asked == [("locuslab/TOFU", "forget10", "test")]
    assert [(e["question"], e["answer"]) for e in rows] == [("q", "a")]


def test_without_network_the_message_says_where_to_put_the_files():
    with pytest.raises(DataError, match=r"cannot load locuslab/TOFU .*tofu/forget10\.json.*UNFED_DATA_DIR.*data_dir"):
        load_rows(spec("forget10"))
    with pytest.raises(DataError, match=r"<data root>/tofu/verbmem/forget\.json .* to the data root$"):
        load_rows(spec("verbmem", split="forget"))


def test_the_data_digest_depends_on_texts_and_order(root: Path):
    rows = load_rows(spec("full"), root)
    assert data_digest(rows) == data_digest([{**e, "other": None} for e in rows])
    assert data_digest(rows) != data_digest(rows[::-1])
