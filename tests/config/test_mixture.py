"""The sources of a mixture: their fields, their shares, and the mixtures that are refused."""

import math
from dataclasses import replace

import pytest

from vlm_jax.config import ConfigError, Source, files
from vlm_jax.config.validate import validate
from vlm_jax.testing import tiny

TALKS = Source("talks", files=("talks.json",))
SCANS = Source("scans", files=("scans.csv",), image_dir="pages", template="vicuna")
WEIGHTED = (replace(TALKS, weight=3.0), replace(SCANS, weight=1.0))


def mixed(*sources, **data):
    cfg = tiny()
    data = {"source": "conversations", "image_dir": "pictures", **data}
    return replace(cfg, data=replace(cfg.data, mixture=sources, **data))


def test_a_source_has_its_own_fields_and_those_of_data():
    cfg = validate(mixed(TALKS, SCANS, template="caption"))
    talks, scans = cfg.data.parts.values()
    assert (talks.files, talks.image_dir, talks.template) == (
        ("talks.json",),
        "pictures",
        "caption",
    )
    assert (scans.files, scans.image_dir, scans.template) == (("scans.csv",), "pages", "vicuna")
    assert cfg.data.templates == {"caption", "vicuna"}
    assert replace(talks, files=scans.files) == replace(
        cfg.parts["scans"].data, template="caption", image_dir="pictures"
    )


def test_a_source_does_not_take_over_what_its_dataset_does_not_read():
    rows = Source("rows", source="tfds:rows", image_field="")
    assert validate(mixed(TALKS, rows)).data.parts["rows"].image_dir == ""


def test_without_a_mixture_the_data_is_its_only_part():
    data = tiny().data
    assert data.parts == {"": data}
    assert tiny().parts == {"": tiny()}


def test_shares_follow_the_weights_or_the_temperature():
    assert mixed(*WEIGHTED).data.mixture_shares([5, 5000]) == [0.75, 0.25]
    assert mixed(TALKS, SCANS).data.mixture_shares([100, 300]) == [0.25, 0.75]
    flat = mixed(TALKS, SCANS, mixture_temperature=2.0).data.mixture_shares([100, 400])
    assert flat == pytest.approx([1 / 3, 2 / 3])
    alike = mixed(TALKS, SCANS, mixture_temperature=1e9).data.mixture_shares([1, 10**9])
    assert alike == pytest.approx([0.5, 0.5])


def test_json_and_options_hold_a_mixture():
    cfg = mixed(*WEIGHTED)
    assert files.from_json(files.to_json(cfg), "config.json") == cfg
    options = ["--data.mixture.1.weight", "2", "--data.mixture.0.files", "a.json", "b.json"]
    other = files.override(cfg, options, "test")
    assert other.data.mixture[1].weight == 2
    assert other.data.mixture[0].files == ("a.json", "b.json")
    assert files.differences(cfg, other) == [
        "data.mixture.0.files: ('talks.json',) -> ('a.json', 'b.json')",
        "data.mixture.1.weight: 1.0 -> 2.0",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--data.mixture", "a"],
            "--data.mixture cannot be given as an option: set it in a config",
        ),
        (["--data.mixture.0.weight", "2"], "--data.mixture.0.weight is not a field"),
    ],
)
def test_a_mixture_is_not_an_option(options, message):
    with pytest.raises(ConfigError, match=message):
        files.override(tiny(), options, "test")


REFUSED = {
    "a name twice": (mixed(TALKS, TALKS), "data.mixture names talks twice"),
    "no name": (
        mixed(replace(TALKS, name="")),
        "data.mixture '' is not a name: a name has letters",
    ),
    "weight 0": (
        mixed(replace(TALKS, weight=0.0), replace(SCANS, weight=1.0)),
        "data.mixture talks has the weight 0.0: it must be above 0",
    ),
    "a tiny weight": (
        mixed(replace(TALKS, weight=1e-9), replace(SCANS, weight=1.0)),
        "data.mixture talks has the weight 1e-09, less than a millionth of 1.0",
    ),
    "an infinite weight": (
        mixed(replace(TALKS, weight=math.inf), replace(SCANS, weight=1.0)),
        "data.mixture.0.weight is inf: it must be a finite number",
    ),
    "weights for some": (
        mixed(TALKS, replace(SCANS, weight=1.0)),
        "data.mixture talks has no weight, but other sources have",
    ),
    "weights and a temperature": (
        mixed(*WEIGHTED, mixture_temperature=2.0),
        "data.mixture_temperature 2.0 and the weights of data.mixture both set the shares",
    ),
    "a temperature without a mixture": (
        mixed(files=("a.json",), mixture_temperature=2.0),
        "data.mixture_temperature 2.0 has no effect without data.mixture",
    ),
    "an unknown template": (
        mixed(TALKS, replace(SCANS, template="chat")),
        "data.mixture scans: data.template 'chat' is not a valid choice: choose plain, vicuna",
    ),
    "an unknown form": (
        mixed(TALKS, replace(SCANS, format="xml")),
        "data.mixture scans: data.format 'xml' is unknown: choose one of auto, arrow",
    ),
    "an unknown dataset": (
        mixed(TALKS, Source("shapes", source="easyvqa")),
        r"data.mixture shapes: data.source 'easyvqa' is unknown \(perhaps you meant easy_vqa\)",
    ),
    "no files": (
        mixed(TALKS, Source("scans")),
        "data.mixture scans: data.source conversations needs data.files",
    ),
    "questions and conversations": (
        mixed(TALKS, Source("shapes", source="easy_vqa")),
        r"data.mixture shapes \(data.source easy_vqa\) has rows of one image with its "
        r"questions, and talks \(data.source conversations\) packed conversations: mix sources of "
        "one kind",
    ),
    "a field that its dataset does not read": (
        mixed(TALKS, Source("rows", source="tfds:rows", image_dir="pages")),
        "data.mixture rows: data.image_dir applies only to data.source conversations",
    ),
    "a field that no source reads": (
        mixed(TALKS, SCANS, cell_px=7),
        "data.cell_px applies only to data.source glyphs, which no source of data.mixture is",
    ),
    "a URL": (
        mixed(TALKS, replace(SCANS, files=("gs://bucket/a.json",))),
        "data.mixture scans: data.files gs://bucket/a.json is a URL",
    ),
    "a text instead of files": (
        mixed(TALKS, replace(SCANS, files="scans.csv")),
        "data.mixture.1.files is 'scans.csv': it must be a tuple of str",
    ),
}


@pytest.mark.parametrize("cfg, message", REFUSED.values(), ids=REFUSED)
def test_a_mixture_that_cannot_be_is_refused_in_a_sentence(cfg, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        validate(cfg)
