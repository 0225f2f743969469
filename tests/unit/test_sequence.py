"""A file of requests becomes runs; the page says what became of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.base.errors import ConfigError, UnfedError
from unfed.cli import sequence
from unfed.report.sequence import START, Asked, Look, Scores, SequenceReport, table, write_sequence_page


def requests_of(tmp_path: Path, text: str) -> list[dict]:
    (tmp_path / "r.yaml").write_text(text)
    return sequence.read_requests(tmp_path / "r.yaml")


@settings(deadline=None)
@given(st.text(st.sampled_from("aB \"\\'[]{},:#=éñ")))
def test_hydra_reads_a_quoted_text_as_it_is(text):
    parsed = OverridesParser.create().parse_override(f"a=[{sequence.quoted(text)}]").value()
    assert [str(getattr(v, "text", v)) for v in parsed] == [text]


def test_a_request_as_overrides(tmp_path):
    first, second = requests_of(
        tmp_path,
        "- clients: [client_1, 2]\n  authors: O'Neil, Ann\n  recipe: retrain\n  overrides: [seed=3]\n"
        "- {name: rows, forget_split: 'forget01[:3]', retain_split: retain99, method: GradDiff}\n",
    )
    assert first["name"] == "request_1"
    assert sequence.tokens(first) == [
        'forget.clients=["client_1",2]', 'forget.authors=["O\'Neil, Ann"]', "recipe=retrain", "seed=3",
    ]  # fmt: skip
    assert sequence.tokens(second) == ['forget_split="forget01[:3]"', 'retain_split="retain99"', "method=GradDiff"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clients: [0]", "must be a list of requests"),
        ("[]", "must be a list of requests"),
        ("- [", "not YAML"),
        ("- client_1", "request 1: 'client_1' is not a mapping"),
        ("- {client: [0]}", r"request 1: client: no such key; did you mean 'clients'"),
        ("- {name: a}", "request 1: says nothing to forget"),
        ("- {clients: [0], forget_split: forget01}", "clients and forget_split: give one of them"),
        ("- {name: a, clients: [0]}\n- {name: a, clients: [1]}", "two requests are called a"),
        ("- {name: ../a, clients: [0]}", r"name=\.\./a: letters"),
        ("- {name: start, clients: [0]}", "name=start"),
        ("- {clients: [0], overrides: seed=1}", "overrides: must be a list"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, text, said):
    with pytest.raises(UnfedError, match=said):
        requests_of(tmp_path, text)


def test_every_requests_problems_are_told_before_anything_runs(tmp_path):
    (tmp_path / "r.yaml").write_text("- {clients: [0], method: NPOO}\n- {clients: [1], overrides: [seed=x]}\n")
    argv = ["experiment=unlearn/quickstart", "model=tiny-lora", "seed=1", "method=NPO"]
    asked = sequence.read_requests(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match=r"(?s)request request_1: method=NPOO.*request request_2: seed=x"):
        sequence.configurations(asked, tmp_path, argv, tmp_path / "r.yaml")
    assert sequence.main([str(tmp_path / "none.yaml")]) == 2


@pytest.fixture
def report() -> SequenceReport:
    """Two requests; the first comes back a little when the second is met."""

    def look(after: str, a: float, b: float, kept: float, utility: float | None = 0.5) -> Look:
        return Look(after, {"a": Scores(a, 0.5), "b": Scores(b)}, Scores(kept, 0.9), utility)

    asked = [Asked("a", "Ann <Lee>", "retrain", 3, {"client_0": 3}), Asked("b", "client_1", "NPO", 4, {"client_1": 4})]
    looks = [look(START, 0.9, 0.8, 0.7), look("a", 0.1, 0.75, 0.65), look("b", 0.15, 0.05, 0.6, 0.45)]
    return SequenceReport("Two", "unfed sequence r.yaml", asked, looks, ("A note.",))


def test_the_table_brackets_what_nobody_had_asked_for_yet(report):
    assert table(report) == [
        ["after", "a", "b", "kept", "utility"],
        ["start", "[0.900 (0.50)]", "[0.800]", "0.700 (0.90)", "0.500"],
        ["a", "0.100 (0.50)", "[0.750]", "0.650 (0.90)", "0.500"],
        ["b", "0.150 (0.50)", "0.050", "0.600 (0.90)", "0.450"],
    ]
    assert report.sentences() == [
        "a: 0.900 at the start, 0.100 after its request, and 0.150 after b.",
        "b: 0.800 at the start, 0.050 after its request.",
        "What is kept: 0.700 at the start, 0.600 after b; model utility 0.500 and 0.450.",
    ]


def test_the_page_is_whole_and_loads_nothing(report, tmp_path):
    write_sequence_page(tmp_path / "sequence.html", report)
    html = (tmp_path / "sequence.html").read_text()
    assert "Ann &lt;Lee&gt;" in html and "0.150 (0.50)" in html and "A note." in html
    assert 'src="data:image/png;base64,' in html and "http" not in html
    assert (tmp_path / "sequence.png").read_bytes().startswith(b"\x89PNG")
