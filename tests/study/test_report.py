"""Contents of a report, and the runs that it names as missing."""

import dataclasses
import re
from pathlib import Path

import pytest

from tests.study import studies
from vlm_jax.infer.metrics.table import METRICS, Metric
from vlm_jax.study import Contrast, override, planning
from vlm_jax.study.report import (
    costs,
    curves,
    findings,
    page,
    results,
    samples,
    scores,
    sections,
    statistics,
)
from vlm_jax.study.run.folder import Folder


@pytest.fixture(scope="module")
def written(datasets_dir, tmp_path_factory):
    """The folder with the report of a study whose last run is missing."""
    folder = tmp_path_factory.mktemp("study")
    question = "Does <b>the</b> connector matter?"
    contrasts = {"gain": Contrast("shuffle - linear", "> 0", "a paper, table 1")}
    study = studies.study(datasets_dir, question=question, contrasts=contrasts)
    plan = studies.write_study(study, folder)
    page.write(sections.build_page(results.read_results(plan), "mine.py"), folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def html(written):
    return (written / "report.html").read_text()


@pytest.fixture(scope="module")
def markdown(written):
    return (written / "report.md").read_text()


def test_html_is_one_file_without_external_resources(html):
    sources = re.findall(r"""(?:src|href)=["'](?!#)(.{0,30})""", html)
    assert len(sources) > 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in html and "<script" not in html and "<link" not in html
    assert 'name="viewport"' in html


def test_questions_and_answers_are_escaped(html):
    assert "Does &lt;b&gt;the&lt;/b&gt; connector" in html
    assert "| &lt;b&gt;" in html
    assert not re.search(r"<b>[^<]*connector", html)


def test_every_picture_of_the_markdown_exists(written, markdown):
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(named) > 8
    assert all((written / name).stat().st_size > 500 for name in named)


def test_scores_and_tests_are_reported(markdown):
    assert "| linear | 0.531 (" in markdown
    assert "| linear - shuffle | -0.2" in markdown


def test_the_answer_is_a_sentence_for_each_contrast_and_a_figure(written, markdown):
    lead, _, rest = markdown.partition("## Answer")
    assert "\ngain: reproduced. shuffle - linear is +0.250 (" in lead
    assert "; published: > 0 (a paper, table 1).\n" in lead
    assert rest.lstrip().partition("## ")[0].count("![") == 1
    assert "| gain | shuffle - linear, at matched examples | > 0 |" in rest
    assert (written / "contrasts.png").exists()


def test_types_have_a_floor_and_their_number_of_questions(markdown):
    (columns,) = set(re.findall(r"^\| type .*", markdown, re.MULTILINE))
    assert columns == "| type | questions | floor | linear | shuffle |"
    assert re.search(r"^\| present \| [0-9]+ \| [01]\.[0-9]{3} \| ", markdown, re.MULTILINE)


def test_the_time_to_a_threshold_is_that_of_the_seeds_that_reach_it(copy_study, tmp_path):
    """Losses of 4.9, 4.8, ... in steps of 0.1 s; the arm with more steps reaches a lower one."""
    plan = copy_study(tmp_path / "study")
    study = dataclasses.replace(plan.study, loss_threshold=4.35)
    plan_results = results.read_results(dataclasses.replace(plan, study=study))
    rows = curves.threshold_section(plan_results).tables[0].rows
    times = {
        (axis.text, arm.text): (seeds.text, steps.text, seconds.text)
        for axis, arm, seeds, steps, _, seconds in rows
    }
    assert times["examples", "linear"] == ("0 of 2", "-", "-")
    assert times["training FLOPs", "shuffle"] == ("1 of 1", "7", "1")
    assert curves.threshold_section(results.read_results(plan)) is None


def test_contrasts_that_were_changed_after_a_run_are_called_so(datasets_dir, tmp_path):
    contrasts = {"gain": Contrast("shuffle - linear", "> 0", "a paper")}
    study = studies.study(datasets_dir, matched={"examples": None}, contrasts=contrasts)
    other = dataclasses.replace(
        study, contrasts={"gain": dataclasses.replace(contrasts["gain"], published="< 0")}
    )
    # Before the first run they may change.
    Folder(tmp_path).open(planning.build_plan(other, tmp_path, False, {}))
    plan = studies.write_study(study, tmp_path)
    for changed in (False, True):
        plan = dataclasses.replace(plan, study=other if changed else study)
        Folder(tmp_path).open(plan)
        found = results.read_results(plan)
        section = findings.answer_section(found, findings.find(found))
        assert (findings.CHANGED in section.text) == changed


def test_a_contrast_is_reported_for_each_version_of_a_prerequisite(copy_study, tmp_path):
    plan = copy_study(tmp_path / "study")
    base, contrasts = plan.study.base, {"gain": Contrast("shuffle - linear", "> 0", "a paper")}
    versions = (base, override(base, {"fusion.kind": "encoder_decoder"}))
    study = dataclasses.replace(plan.study, contrasts=contrasts, prerequisites={"eye": {}})
    plan = dataclasses.replace(plan, study=study, prerequisites={"eye": versions})
    found = results.read_results(plan)
    _, table = findings.answer_section(found, findings.find(found)).tables
    assert table.columns == [
        "contrast",
        "first version",
        "fusion.kind: unified -> encoder_decoder",
    ]
    assert [cell.text for cell in table.rows[0]] == ["gain", "+0.312", "+0.188"]


def test_pairs_have_no_verdict(markdown):
    (columns,) = set(re.findall(r"^\| pair .*", markdown, re.MULTILINE))
    assert columns == "| pair | difference (over seeds) | difference (over images) |"


def test_the_score_with_shuffled_images_is_beside_it(markdown):
    assert "| exact match with shuffled images |" in markdown
    assert re.search(r"^\| linear \| 0.531 .* \| 0.000 \|$", markdown, re.MULTILINE)


def test_prerequisites_are_reported_with_score_and_hours(copy_study, tmp_path):
    def hours(plan_results):
        table = costs.reproduction_section(plan_results, "mine.py").tables[0]
        return float(table.rows[-1][1].text)

    plan = copy_study(tmp_path / "study")
    without = results.read_results(plan)
    plan = dataclasses.replace(plan, prerequisites={"text": (plan.study.base,)})
    run = plan.prerequisite("text", 1)
    assert run.name == "first/text/seed_1"
    studies.write_run(run, 0.75, seconds=3600.0)
    with_prerequisite = results.read_results(plan)
    (row,) = scores.prerequisite_section(with_prerequisite).tables[0].rows
    assert [cell.text for cell in row] == ["text", "6", "-, 0.750"]
    assert hours(with_prerequisite) == hours(without) + 1
    assert scores.prerequisite_section(without) is None


def test_probes_are_reported_and_can_be_contrasted(datasets_dir, tmp_path):
    contrast = Contrast("shuffle@text:by_type.count - linear@text:by_type.count", "> 0", "a paper")
    study = studies.study(
        datasets_dir,
        matched={"examples": None},
        probes={"text": {"fusion.kind": "text_only"}},
        contrasts={"text": contrast},
    )
    plan = planning.build_plan(study, tmp_path, False, {})
    for run in plan.runs():
        studies.write_run(run, 0.5)
        (probe,) = run.probes
        folder = run.probe_folder(probe.name)
        asked = planning.probe_experiment(run.cfg, probe, folder)
        studies.write_run(dataclasses.replace(run, cfg=asked), 1.0 if run.arm == "shuffle" else 0.0)
    found = results.read_results(plan)
    assert not found.missing and not found.broken
    (table,) = scores.probe_section(found).tables
    assert table.columns[:3] == ["arm", "exact match", "count"]
    assert [[cell.text for cell in row[:3]] for row in table.rows] == [
        ["linear", "0.000", "0.000"],
        ["shuffle", "1.000", "1.000"],
    ]
    (finding,) = findings.find(found)
    assert finding.total.mean == 1.0


def facts(report):
    """The rows of "How to make it again"."""
    return {name.text: value.text for name, value in report.sections[-1].tables[0].rows}


def test_a_quick_report_says_so_and_its_commands_have_every_option(datasets_dir, tmp_path):
    plan = planning.build_plan(studies.study(datasets_dir), tmp_path, True, {})
    report = sections.build_page(results.read_results(plan), "mine.py")
    assert report.title == "Does the connector matter? (quick)"
    assert report.lead[0].startswith("This is a quick study (--quick: train.steps 2).")
    options = f"mine.py --quick --folder {tmp_path}"
    assert facts(report)["runs"] == f"python experiments/study.py run {options} --seeds 2"
    assert facts(report)["report"] == f"python experiments/study.py report {options}"
    for command in (
        "run mine.py --shard 1/2",
        "run mine.py --shard 2/2",
        "run mine.py --shard 1/2",
    ):
        Folder(tmp_path).open(plan, command)
    assert facts(sections.build_page(results.read_results(plan), "mine.py"))["runs"] == (
        "run mine.py --shard 1/2; run mine.py --shard 2/2"
    )


def test_a_whole_report_in_its_own_folder_needs_no_option(datasets_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = planning.build_plan(studies.study(datasets_dir), Path("runs/studies/mine"), False, {})
    report = sections.build_page(results.read_results(plan), "mine.py")
    assert "quick" not in report.title + report.lead[0]
    assert facts(report)["runs"] == "python experiments/study.py run mine.py --seeds 2"
    assert facts(report)["report"] == "python experiments/study.py report mine.py"


def test_samples_compare_arms_with_the_same_questions(copy_study, tmp_path):
    plan = copy_study(tmp_path / "study")
    result = results.read_results(plan).by_seed("examples", "linear")[0]
    other = dataclasses.replace(result, predictions=result.predictions[::-1])
    groups = samples.group_by_questions({"a": result, "b": other, "c": result})
    assert [list(group) for group in groups] == [["a", "c"]]


def test_a_missing_run_is_named(markdown):
    assert "1 of 6 runs are missing" in markdown
    assert "| training_flops/shuffle/seed_1 | not run yet |" in markdown


def test_all_sections_are_in_order(markdown):
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == [
        "Answer",
        "Missing runs",
        "Cost",
        "Score at matched examples",
        "Score at matched training FLOPs",
        "Score by type of question",
        "Learning curves",
        "Where the arms disagree",
        "Matching",
        "What differs",
        "How to make it again",
    ]
    assert "projector.kind: linear -> pixel_shuffle; train.steps: 6 -> 7" in markdown
    assert "| SHA-256 of the data | d0d0 |" in markdown


def test_a_bar_in_an_answer_does_not_break_a_table(markdown):
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_study_without_finished_runs_has_a_report(datasets_dir, tmp_path):
    plan = planning.build_plan(studies.study(datasets_dir), tmp_path, False, {})
    page.write(sections.build_page(results.read_results(plan), "mine.py"), tmp_path / "report")
    assert "At matched examples no run is done yet." in (tmp_path / "report/report.md").read_text()


def test_a_study_may_use_any_metric(datasets_dir, tmp_path, monkeypatch):
    def first_letter(prediction, references):
        return float(any(prediction[:1] == reference[:1] for reference in references))

    row = Metric(first_letter, variant="equal first letters", source="this test")
    monkeypatch.setitem(METRICS, "first_letter", row)
    base = override(studies.base(datasets_dir), {"eval.metrics": ("exact_match", "first_letter")})
    for metric in ("first_letter", "first_letter_by_type.present"):
        study = studies.study(datasets_dir, base=base, matched={"examples": None}, metric=metric)
        report = results.read_results(studies.write_study(study, tmp_path / metric))
        assert not report.broken
        assert len(report.scores("examples", "linear")) == 2
        (pair,) = statistics.pairs(report, "examples")
        assert pair.images is not None, "the scores of single answers are compared, too"
        columns = scores.score_table(report, "examples").columns
        assert columns[-1] == "first letter with shuffled images"
