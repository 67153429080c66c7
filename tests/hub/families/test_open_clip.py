"""OpenCLIP's own format: the numbers of open_clip_torch itself, see `open_clip/README.md`."""

from pathlib import Path

from tests.hub.parity import assert_round_trip
from vlm_jax.infer.verify import table, verify

FOLDER = Path(__file__).parent / "open_clip"


def test_the_outputs_are_those_of_open_clip():
    verification = verify(FOLDER, FOLDER / "reference.npz")
    outputs = {comparison.output for comparison in verification.comparisons}
    assert outputs == {"image_embeds", "text_embeds", "logits_per_image"}
    assert verification.agrees, table(verification.comparisons)


def test_an_export_is_what_open_clip_wrote(tmp_path):
    assert_round_trip(FOLDER, tmp_path)
