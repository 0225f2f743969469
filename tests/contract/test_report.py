"""``unfed report`` and ``unfed compare`` on run directories written by hand: roles, numbers, words, mistakes."""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from unfed.app.report import compare, make_report
from unfed.base.errors import UnfedError
from unfed.cli.main import main
from unfed.evaluation.tofu import TOFU
from unfed.report.answers import _questions
from unfed.report.contents import Report
from unfed.report.export import tex
from unfed.report.figures import bars
from unfed.report.labels import HEADLINE, LOG10_P, METRICS, number, others, target
from unfed.report.page import curve_panels, picture_panels, write_page
from unfed.report.read import read_run
from unfed.report.roles import Given
from unfed.report.verdict import cost_in_words, verdict


@pytest.fixture
def runs(tmp_path: Path, by_hand: SimpleNamespace) -> dict[str, Path]:
    return by_hand.study(tmp_path / "s")


def of(runs: dict[str, Path], *names: str) -> Report:
    return make_report([Given(runs[n]) for n in (names or runs)], "unfed report")


# --- what a run is ---------------------------------------------------------------------------------------------------


def test_roles_are_worked_out_from_what_the_runs_recorded(runs: dict[str, Path]) -> None:
    """The evaluation of the fine-tuned adapter goes with the run that trained it, and takes its cost."""
    found = of(runs, "NPO", "eval_finetuned", "oracle", "finetune", "eval_base")
    assert [(m.name, m.role) for m in found.models] == [
        ("base", "base"), ("finetuned", "finetuned"), ("oracle", "oracle"), ("NPO", "unlearned"),
    ]  # fmt: skip
    finetuned = found.models[1]
    assert finetuned.summary["forget_Q_A_Prob"] == 0.9
    assert finetuned.cost is not None
    assert (finetuned.cost.seconds, finetuned.cost.rounds) == (6.0, 2)
    assert finetuned.cost.megabytes == 2 * (1 + 2)
    assert finetuned.cost.aggregation_error == pytest.approx(0.2), "the larger of 0.1 and 0.2"
    assert found.models[0].cost is None


def test_an_evaluation_alone_leads_to_the_run_that_trained(runs: dict[str, Path]) -> None:
    assert [(m.role, m.cost is not None) for m in of(runs, "eval_finetuned").models] == [("finetuned", True)]


def test_the_oracle_of_an_unlearning_run_is_found_and_said(runs: dict[str, Path]) -> None:
    found = of(runs, "NPO")
    assert [m.role for m in found.models] == ["oracle", "unlearned"]
    assert any("oracle: found at" in n for n in found.notes)
    assert any("has no evaluation" in n and "--finetuned" in n for n in found.notes), "that of the fine-tuning run"


def _apart(root: Path, by_hand: SimpleNamespace) -> Path:
    """An unlearned run as ``oracle=auto`` leaves it: both models' evaluations in directories of their own."""
    finetuned = by_hand.write_run(root / "f", "finetune")
    oracle = by_hand.write_run(root / "o", "finetune", rounds=3)
    for training, place, value in ((finetuned, root / "f_eval" / "eval_1", 0.9), (oracle, oracle / "eval_2", 0.3)):
        digests = {"base": "base-1", "adapter": f"adapter-of-{training.name}"}
        source = by_hand.model_at(training)
        by_hand.write_run(place, "eval", by_hand.scores(value), config=source, digests=digests)
    logs = {
        "retain_logs_path": str(oracle / "eval_2" / "TOFU_EVAL.json"),
        "finetuned_logs_path": str(root / "f_eval" / "eval_1" / "TOFU_EVAL.json"),
    }
    config = {**by_hand.model_at(finetuned), "eval": logs}
    return by_hand.write_run(root / "u", "unlearn", by_hand.scores(0.32), config=config)


@pytest.mark.parametrize(
    "also", [(), ("o",), ("f",), ("f", "o"), ("o/eval_2", "f"), ("o", "o/eval_2", "f_eval/eval_1")]
)
def test_what_an_automatic_oracle_left_is_put_together(
    tmp_path: Path, by_hand: SimpleNamespace, also: tuple[str, ...]
) -> None:
    """Whichever of its directories are given: the same three models, each with its scores and its cost."""
    unlearned = _apart(tmp_path, by_hand)
    found = make_report([Given(p) for p in (unlearned, *(tmp_path / n for n in also))], "x")
    assert [(m.role, m.summary["forget_Q_A_Prob"], m.cost and m.cost.seconds) for m in found.models] == [
        ("finetuned", 0.9, 6.0), ("oracle", 0.3, 9.0), ("unlearned", 0.32, 6.0),
    ]  # fmt: skip


def test_what_is_found_but_cannot_stand_beside_is_left_out_and_said(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    unlearned = _apart(tmp_path, by_hand)
    digests = {"base": "base-1", "adapter": "adapter-of-u"}
    again = by_hand.write_run(
        tmp_path / "again", "eval", by_hand.scores(0.4), config=by_hand.model_at(unlearned), digests=digests,
        forget="rows-2",
    )  # fmt: skip
    found = make_report([Given(again)], "x")
    assert [(m.role, m.summary["forget_Q_A_Prob"]) for m in found.models] == [("unlearned", 0.4)]
    for role in ("oracle", "finetuned"):
        assert any(n.startswith(f"{role}: ") and "is left out" in n and "rows-2" in n for n in found.notes)


def test_privleak_without_an_oracle_is_remarked(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    place = by_hand.write_run(tmp_path / "u", "unlearn", by_hand.scores(0.3, privleak=9.75))
    entries = json.loads((place / "TOFU_EVAL.json").read_text())
    entries["privleak"]["why"] = "no log"
    (place / "TOFU_EVAL.json").write_text(json.dumps(entries))
    found = make_report([Given(place)], "x")
    assert "u: privleak is no comparison with an oracle: no log." in found.notes
    assert found.title == "u: what was forgotten (forget10)"


def test_two_evaluations_of_one_model_by_other_rows_are_refused(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    place = by_hand.write_run(tmp_path / "u", "unlearn", by_hand.scores(0.3))
    digests = {"base": "base-1", "adapter": "adapter-of-u"}
    again = by_hand.write_run(tmp_path / "e", "eval", by_hand.scores(0.4), digests=digests, forget="rows-2")
    with pytest.raises(UnfedError, match="their forget splits have other rows"):
        make_report([Given(place), Given(again)], "x")


def test_those_that_cannot_be_compared_are_named_as_they_were_given(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    unlearned = _apart(tmp_path, by_hand)
    other = by_hand.write_run(tmp_path / "v", "unlearn", by_hand.scores(0.3), forget="rows-2")
    with pytest.raises(UnfedError, match=f"^{unlearned} and {other} cannot be compared"):
        make_report([Given(unlearned), Given(other)], "x")


def test_compare_says_where_evaluations_lie(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    unlearned = _apart(tmp_path, by_hand)
    _, notes = compare([unlearned, tmp_path / "o"])
    assert notes == [f"{tmp_path / 'o'}: left out, it has no evaluation; it has some of its own within: eval_2"]


def test_relative_paths_are_found_from_the_runs_own_parents(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    """Runs record paths as they were typed, in a directory that is not today's."""
    root = tmp_path / "elsewhere"
    by_hand.write_run(root / "saves" / "oracle", "finetune", by_hand.scores(0.3))
    log = {"eval": {"retain_logs_path": "saves/oracle/TOFU_EVAL.json"}}
    by_hand.write_run(root / "saves" / "u", "unlearn", by_hand.scores(0.4), config=log)
    found = make_report([Given(root / "saves" / "u")], "x")
    assert [m.role for m in found.models] == ["oracle", "unlearned"]


def test_names_and_roles_that_the_user_gives_go_first(
    runs: dict[str, Path], tmp_path: Path, by_hand: SimpleNamespace
) -> None:
    other = by_hand.write_run(tmp_path / "other", "finetune", by_hand.scores(0.25))
    given = [Given(p) for p in runs.values()]
    found = make_report([*given[:1], *given[2:4], Given(other, None, "oracle"), Given(runs["NPO"], "mine")], "x")
    assert {m.name: m.summary["forget_Q_A_Prob"] for m in found.models} == {
        "base": 0.2, "finetuned": 0.9, "oracle": 0.25, "mine": 0.32,
    }  # fmt: skip
    command = ["report", f"MINE={runs['NPO']}", f"finetuned={runs['eval_finetuned']}", "--output", str(tmp_path / "o")]
    assert main([*command, "--oracle", str(other)]) == 0
    rows = list(csv.DictReader((tmp_path / "o" / "report.csv").open()))
    assert [(r["name"], r["role"]) for r in rows] == [
        ("finetuned", "finetuned"), ("oracle", "oracle"), ("MINE", "unlearned"),
    ]  # fmt: skip


def test_two_candidates_for_one_role_are_refused(
    runs: dict[str, Path], tmp_path: Path, by_hand: SimpleNamespace
) -> None:
    logs = {"eval": {"retain_logs_path": str(tmp_path / "o2" / "TOFU_EVAL.json")}}
    second = by_hand.write_run(tmp_path / "o2", "finetune", by_hand.scores(0.3))
    third = by_hand.write_run(tmp_path / "u2", "unlearn", by_hand.scores(0.3), config=logs)
    with pytest.raises(UnfedError, match=r"2 runs could be the oracle model: .* --oracle RUN"):
        make_report([Given(p) for p in (runs["oracle"], runs["NPO"], second, third)], "x")


# --- what the page says ----------------------------------------------------------------------------------------------


def test_files_and_their_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["report", *map(str, runs.values()), "--output", str(out), "--title", "T <i>"]) == 0
    page = (out / "report.html").read_text()
    assert "T &lt;i&gt;" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    order = ["NPO forgot: ", "how a perfect deletion would behave", "The picture", "Scores and their targets"]
    assert [page.index(words) for words in order] == sorted(page.index(words) for words in order)
    for words in ("What the models say", "What it cost", "Round by round", "aggregation error", METRICS["mem"][1]):
        assert words in html.unescape(page)
    rows = {r["name"]: r for r in csv.DictReader((out / "report.csv").open())}
    assert rows["NPO"]["method"] == "NPO"
    assert float(rows["NPO"]["seconds"]) == 6.0
    assert int(rows["NPO"]["bytes_up"]) == 2_000_000
    assert float(rows["finetuned"][LOG10_P]) == pytest.approx(-6)
    assert rows["base"]["seconds"] == ""
    table = (out / "report.tex").read_text()
    assert r"metric & target & base & finetuned & NPO \\" in table
    assert r"forget probability & 0.300 & 0.200 & 0.900 & 0.320 \\" in table
    assert r"forget quality (p) & $>$ 0.05 & 0.5 & 1e-6.0 & 0.2 \\" in table


def test_a_run_without_evaluation_is_shown_with_its_cost(runs: dict[str, Path]) -> None:
    found = of(runs, "oracle", "finetune", "NPO")
    assert any("finetuned: " in n and "has no evaluation, so only its cost is shown" in n for n in found.notes)
    assert next(m for m in found.models if m.role == "finetuned").cost is not None


def test_verdict_and_cost_without_some_of_the_models(runs: dict[str, Path]) -> None:
    now = {"forget_Q_A_Prob": 0.4, "retain_Q_A_Prob": 0.8}
    before = {"finetuned": {"forget_Q_A_Prob": 0.9, "retain_Q_A_Prob": 0.8}}
    assert "without an oracle nobody can say" in verdict({**before, "u": now}, "u")
    assert "Without the fine-tuned model's value" in verdict({"u": now, "oracle": now}, "u")
    books = {"forget_knowmem_ROUGE": 0.3, "retain_knowmem_ROUGE": 0.5}
    known = {"finetuned": books | {"forget_knowmem_ROUGE": 0.8}, "oracle": books}
    assert verdict({**known, "u": books}, "u").startswith("u forgot: ROUGE on the knowledge to forget fell from 0.80")
    assert cost_in_words(of(runs), "NPO") == (
        "It took 6 s (2 rounds, 6 MB sent); training the oracle from scratch took 6 s (2 rounds, 6 MB sent)."
    )


def test_every_metric_has_a_name_and_a_sentence() -> None:
    assert TOFU.metrics.keys() <= METRICS.keys()
    assert set(HEADLINE) <= METRICS.keys()
    assert {"mem", "priv", "utility", "agg", "forget_fluency"} <= METRICS.keys()
    assert all(words and sentence.endswith(".") for words, sentence in METRICS.values())
    assert target("privleak", {"privleak": 3.0}) == "0", "the oracle's own value compares with something else"
    assert target("mem", {"mem": 0.8}) == "0.800"
    assert target("mem", None) == number("mem", None) == "–"


def test_agg_is_never_shown_without_its_parts() -> None:
    assert "agg" not in others({"agg", "mem", "priv"})
    assert "agg" in others({"agg", "mem", "priv", "utility"})


def test_examples_are_those_that_fine_tuning_changed_most(runs: dict[str, Path]) -> None:
    """Row n has (n + 1) / 4 of the mean: the last rows gained most. Questions lose the template around them."""
    answers = of(runs).answers
    assert [(a.split, a.question) for a in answers] == [
        ("forget", "When was Di born?"), ("forget", "Where does Cy live?"), ("retain", "When was Di born?"),
    ]  # fmt: skip
    assert answers[0].truth == "forget truth 3"
    assert answers[0].said["NPO"] == "NPO says 3 <b>&amp;"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("system\nBe kind.\nuser\n", "\nassistant\n"),
        ("You are a helpful assistant. ", ""),
        ("Question: ", "\nAnswer: "),
        ("user\n\n", "assistant\n\n"),
    ],
)
def test_questions_out_of_prompts(before: str, after: str) -> None:
    asked = ["Who is Bo?", "Who is Al?", "Who wrote it?"]
    assert list(_questions({str(n): before + q + after for n, q in enumerate(asked)}).values()) == asked


def test_curves_have_one_plot_for_runs_with_the_same_phases(
    runs: dict[str, Path], tmp_path: Path, by_hand: SimpleNamespace
) -> None:
    points = [{"round": n, "phase": "recover", "scores": {"forget_Q_A_Prob": 0.5}, "client_worst": 0.4} for n in (1, 2)]
    watched = by_hand.write_run(tmp_path / "long", "unlearn", rounds=5, evaluations=points)
    found = make_report([Given(p) for p in (*runs.values(), watched)], "x")
    captions = [p.caption.partition(".")[0] for p in curve_panels(found)]
    assert captions == [
        "Training loss: finetuned, oracle", "Training loss: NPO", "Training loss: long",
        "Measured during training: forget probability after each round",
        "Measured during training: clients' own rows: worst client after each round",
    ]  # fmt: skip


def test_the_picture_leaves_out_what_was_not_measured(runs: dict[str, Path]) -> None:
    assert [p.alt for p in picture_panels(of(runs))] == [
        "Bars: what should go", "Bars: what should stay", "Forget quality against model utility",
        "Bars: summary scores",
    ]  # fmt: skip
    assert [p.alt for p in picture_panels(of(runs, "eval_finetuned"))] == [
        "Bars: what should go", "Bars: what should stay",
    ]  # fmt: skip


def test_comparisons_are_not_missed_in_what_they_compare_with(runs: dict[str, Path]) -> None:
    """Four models have Mem's row; base, fine-tuned model and oracle are no rows of Priv and Utility."""
    models = of(runs).models
    heights = {k: bars(models, [k], "t")[1] for k in ("mem", "priv", "utility")}
    assert heights["mem"] - heights["priv"] == pytest.approx(3 * 0.19)
    assert heights["utility"] == heights["priv"]
    assert (target("utility", {}), target("utility", {"utility": 0.9}), target("utility", None)) == ("1", "0.900", "1")


def test_latex_escapes() -> None:
    assert tex("a_b & 5%") == r"a\_b \& 5\%"
    assert tex("-1.30") == "$-1.30$"
    assert tex(r"\x") == r"\textbackslash{}x"


# --- mistakes --------------------------------------------------------------------------------------------------------


def _refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("error:") == 1
    return said


@pytest.mark.parametrize("command", ["report", "compare"])
def test_wrong_input_ends_in_one_message(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], by_hand: SimpleNamespace, command: str
) -> None:
    good = str(runs["NPO"])
    out = ("--output", str(tmp_path / "out"))
    assert "did you mean 'NPO'" in _refused(capsys, command, f"{good}O", *out)
    (tmp_path / "empty").mkdir()
    assert "not a run" in _refused(capsys, command, str(tmp_path / "empty"), *out)
    assert "given twice" in _refused(capsys, command, good, good, *out)
    rows = by_hand.write_run(tmp_path / "rows", "unlearn", by_hand.scores(0.3), forget="rows-2")
    said = _refused(capsys, command, good, str(rows), *out)
    assert "their forget splits have other rows" in said
    assert "rows-2" in said
    muse = by_hand.write_run(tmp_path / "muse", "unlearn")
    (muse / "MUSE_SUMMARY.json").write_text('{"forget_knowmem_ROUGE": 0.2}')
    assert "the suites TOFU and MUSE" in _refused(capsys, command, good, str(muse), *out)
    broken = by_hand.write_run(tmp_path / "broken", "unlearn", by_hand.scores(0.3))
    (broken / "TOFU_EVAL.json").write_text('{"forget_Q_A_Prob": ')
    assert str(broken / "TOFU_EVAL.json") in _refused(capsys, command, str(broken), *out)
    (broken / "TOFU_EVAL.json").write_text("[1]")
    assert "not a JSON object" in _refused(capsys, command, str(broken), *out)
    assert not (tmp_path / "out").exists()


def test_compare_needs_an_evaluation_and_settings(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none of these runs has an evaluation" in _refused(capsys, "compare", str(runs["finetune"]))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "TOFU_SUMMARY.json").write_text('{"forget_Q_A_Prob": 0.2}')
    assert "nobody knows the settings" in _refused(capsys, "compare", str(alone))


def test_an_evaluation_without_its_summary_or_under_metrics_is_read(tmp_path: Path) -> None:
    """As other programs nest it; values that are no numbers are passed over."""
    entries = {"forget_quality": {"agg_value": 0.01}, "privleak": {"agg_value": None}}
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "TOFU_EVAL.json").write_text(json.dumps({"metrics": entries}))
    assert read_run(tmp_path).summary == {"forget_quality": 0.01, LOG10_P: pytest.approx(-2)}


# --- several seeds ---------------------------------------------------------------------------------------------------


def _seeds(
    root: Path, by_hand: SimpleNamespace, method: str, qualities: dict[int, float], **params: float
) -> list[Path]:
    """One fine-tuned adapter and one unlearning run for each seed."""
    made = []
    for seed, p in qualities.items():
        start = root / f"ft_{seed}"
        if not start.exists():
            by_hand.write_run(start, "finetune", seed=seed)
        config = {**by_hand.model_at(start), "method": {"name": method, "params": params}}
        config["trainer"] = {"args": {"seed": seed, "learning_rate": 1e-4}}
        place = root / f"{method}{len(params)}_{seed}"
        made.append(
            by_hand.write_run(place, "unlearn", by_hand.scores(0.1 * seed, forget_quality=p), config=config, seed=seed)
        )
    return made


def test_median_and_range_over_seeds(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    """Forget probabilities 0.1, 0.2, 0.4; log10 p -1, -2, -6: the median is the middle one, not the mean -3.

    The seeds began with adapters of their own, which differ in their seed only: still one group.
    """
    npo = _seeds(tmp_path, by_hand, "NPO", {1: 0.1, 2: 0.01, 4: 1e-6}, beta=0.1)
    other = _seeds(tmp_path, by_hand, "GradDiff", {1: 0.5})
    groups, notes = compare([*npo, *other])
    assert [(g.name, g.count, list(g.seeds)) for g in groups] == [("NPO", 3, [1, 2, 4]), ("GradDiff", 1, [1])]
    assert not notes
    spread = groups[0].spreads
    found = spread["forget_Q_A_Prob"]
    assert (found.median, found.low, found.high) == pytest.approx((0.2, 0.1, 0.4))
    assert spread[LOG10_P].text(LOG10_P) == "-2.00 [-6.00, -1.00]"
    assert groups[1].spreads[LOG10_P].text(LOG10_P) == "-0.30", "one run has no range"


def test_groups_are_named_by_what_differs(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    """beta tells the two NPO groups apart, and GradDiff's own gamma tells nothing."""
    places = _seeds(tmp_path / "a", by_hand, "NPO", {1: 0.1, 2: 0.1}, beta=0.1)
    places += _seeds(tmp_path / "b", by_hand, "NPO", {1: 0.1}, beta=0.5)
    places += _seeds(tmp_path / "c", by_hand, "GradDiff", {1: 0.1}, gamma=1.0)
    assert [g.name for g in compare(places)[0]] == ["NPO, beta=0.1", "NPO, beta=0.5", "GradDiff"]


@pytest.mark.parametrize("key", ["retain_logs_path", "finetuned_logs_path"])
def test_runs_whose_logs_differ_only_in_their_seed_belong_together(
    tmp_path: Path, by_hand: SimpleNamespace, key: str
) -> None:
    places = []
    for seed in (0, 1):
        log = by_hand.write_run(tmp_path / f"log{seed}", "finetune", by_hand.scores(0.3), config={"seed": seed})
        config = {"seed": seed, "method": {"name": "NPO"}, "eval": {key: str(log / "TOFU_EVAL.json")}}
        places.append(by_hand.write_run(tmp_path / f"u{seed}", "unlearn", by_hand.scores(0.4), config=config))
    assert [g.count for g in compare(places)[0]] == [2]


def test_one_seed_twice_is_said(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    places = _seeds(tmp_path / "a", by_hand, "NPO", {1: 0.1}) + _seeds(tmp_path / "b", by_hand, "NPO", {1: 0.1})
    groups, notes = compare(places)
    assert [g.count for g in groups] == [2]
    assert "more than one run has seed 1" in notes[0]


def test_compare_prints_and_writes(
    tmp_path: Path, by_hand: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    npo = _seeds(tmp_path, by_hand, "NPO", {1: 0.1, 2: 0.01})
    lone = _seeds(tmp_path, by_hand, "GradDiff", {1: 0.5})
    assert main(["compare", *map(str, npo + lone), "--output", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    assert "0.150 [0.100, 0.200]" in said
    assert "1, no range" in said
    rows = {(r["group"], r["metric"]): r for r in csv.DictReader((tmp_path / "o" / "compare.csv").open())}
    assert float(rows["NPO", LOG10_P]["median"]) == pytest.approx(-1.5)
    assert rows["NPO", LOG10_P]["seeds"] == "1 2"
    assert "-1.50 [-2.00, -1.00]" in (tmp_path / "o" / "compare.tex").read_text()


def test_what_privacy_cost_stands_beside_the_utility(tmp_path: Path, by_hand: SimpleNamespace) -> None:
    spent = {
        "kind": "central", "unit": "client", "units": 30, "epsilon": 3.21, "epsilon_rdp": 3.456, "epsilon_pld": 3.21,
        "delta": 1e-5, "clip_last": 0.25, "noise_multiplier": 4.0, "noise_std": 0.0333, "says": ["It says <this>."],
    }  # fmt: skip
    private = by_hand.write_run(tmp_path / "dp", "unlearn", by_hand.scores(0.3), privacy=spent)
    told = {"kind": None, "says": ["What it takes from its rows is not covered."]}
    after = by_hand.write_run(tmp_path / "after", "unlearn", by_hand.scores(0.3), privacy=told)
    report = make_report([Given(private), Given(after)], "x")
    write_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    table = page[page.index("<h2>Privacy</h2>") :]
    for said in (
        "each of 30 clients",
        "3.21\n(3.46, 3.21)",
        "1e-05",
        "0.25",
        "0.0333",
        "0.500",
        "It says &lt;this&gt;.",
    ):
        assert said in table, said
    assert "not covered" in table and table.count("<td>central</td>") == 1
    assert (report.models[0].facts["epsilon"], report.models[0].facts["privacy"]) == (3.21, "central")
