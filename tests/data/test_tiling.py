"""Tiles of an image: their layout, their tokens in the text, and the tiles that a token reads."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import (
    ConfigError,
    Data,
    Decoder,
    Experiment,
    Fusion,
    Projector,
    Train,
    UserError,
    Vision,
)
from vlm_jax.data import (
    images,
    packing,
    pipeline,
    questions,
    text,
    tiling,
)
from vlm_jax.data.tokenizer import (
    EOS,
    IMAGE,
    PAD,
    Tokenizer,
)
from vlm_jax.testing import tiny, write_conversations

SMALL = Vision(image_size_px=64, tiles=16)


@pytest.mark.parametrize(
    ("width", "height", "most", "layout"),
    [
        (64, 64, 16, (1, 1)),
        (90, 90, 16, (1, 1)),
        (128, 128, 16, (2, 2)),
        (224, 224, 16, (4, 4)),
        (224, 224, 9, (3, 3)),
        (448, 448, 16, (4, 4)),
        (448, 448, 3, (1, 1)),
        (180, 90, 16, (1, 2)),
        (200, 100, 16, (2, 4)),
        (100, 290, 6, (3, 1)),
        (40, 400, 6, (6, 1)),
        (300, 200, 6, (2, 3)),
        (24, 18, 6, (2, 3)),
        (1, 1000, 1, (1, 1)),
    ],
)
def test_the_layout_of_an_image(width, height, most, layout):
    vision = replace(SMALL, tiles=most)
    assert tiling.best_layout(width, height, vision) == layout
    assert tiling.tile_count(width, height, vision) == layout[0] * layout[1]
    pixels = tiling.resize_to_grid(Image.new("RGB", (width, height)), vision)
    assert pixels.shape == (64 * layout[0], 64 * layout[1], 3)
    assert tiling.count_tiles(pixels, vision) == layout[0] * layout[1]


def test_an_encoder_that_reads_tiles_together_is_given_one():
    together = replace(SMALL, tiles=4, tile_layouts=((1, 1), (2, 2)))
    assert tiling.best_layout(400, 400, together) == (1, 1)
    assert (together.views, together.has_tags) == (1, False)


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_their_mean():
    vision = Vision(image_size_px=2, tiles=6)
    pixels = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)
    views = tiling.split_into_views(pixels, vision)
    assert views.shape == (7, 2, 2, 3)
    np.testing.assert_array_equal(views[4], pixels[2:, 2:4])
    np.testing.assert_array_equal(views[-1, 0, 1], pixels[:2, 3:].mean((0, 1)))
    np.testing.assert_array_equal(
        tiling.split_into_views(pixels, replace(vision, thumbnail=False)), views[:-1]
    )
    np.testing.assert_array_equal(tiling.split_into_views(pixels[:2, :2], vision), views[:1])


def test_absent_views_are_zeros_and_the_thumbnail_has_the_last_place():
    vision = Vision(image_size_px=2, tiles=3)
    views = tiling.stack_views([np.ones((2, 2, 3)), np.ones((4, 2, 3))], vision)
    there = [1, 0, 0, 0, 1, 1, 0, 1]
    assert views.shape == (8, 2, 2, 3)
    assert views[:, 0, 0, 0].tolist() == there
    assert tiling.view_mask([1, 2], vision).tolist() == there
    assert tiling.view_mask([0, 3], vision).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("turn", [None, 3, 6, 8])
def test_the_size_of_a_file_is_that_of_the_image_it_holds(turn):
    exif, file = Image.Exif(), io.BytesIO()
    if turn:
        exif[images.ORIENTATION] = turn
    Image.new("RGB", (40, 20)).save(file, "jpeg", exif=exif)
    assert images.upright_size(file.getvalue()) == images.decode(file.getvalue()).size


def test_a_file_that_is_no_image_has_no_size():
    with pytest.raises(UserError, match="it.png is not a readable image"):
        images.upright_size(b"no", "it.png")


# Rows


def experiment(kind, **vision) -> Experiment:
    """One image token a view, at most four tiles."""
    vision = {"image_size_px": 16, "patch_size_px": 8, "tiles": 4} | vision
    return Experiment(
        data=Data(text_length=3),
        vision=Vision(**vision),
        projector=Projector("resampler", queries=1),
        fusion=Fusion(kind),
    )


I, E, P = IMAGE, EOS, PAD  # noqa: E741
DRAWN = {  # tags are 4 to 7, and 8 for the thumbnail
    "unified": ([4, I, 5, I, 8, I, 10, E, P, P, P, P, P], [-1, 0, -1, 1, -1, 4, *[-1] * 7]),
    "hybrid": ([4, 5, 8, I, 10, E, P, P, P], [-1, -1, -1, 4, *[-1] * 5]),
    "cross_attention": ([4, 5, 8, 10, E, P, P, P], [-1] * 8),
    "encoder_decoder": ([4, 5, 8, 10, E, P, P, P], [-1] * 8),
}
ONE_TILE = {"unified": [4, I, 10, E], "hybrid": [4, I, 10, E], "cross_attention": [4, 10, E]}
NO_THUMBNAIL = {"unified": [4, I, 5, I, 10, E], "cross_attention": [4, 5, 10, E]}
NO_TAGS = {"unified": [I, I, I, 10, E], "hybrid": [I, 10, E], "cross_attention": [10, E]}


def tokens(cfg, number):
    found = text.pack_row(cfg, [([10], [E])], number)["tokens"].tolist()
    assert len(found) == cfg.row_length
    return [token for token in found if token != P]


@pytest.mark.parametrize("kind", DRAWN)
def test_a_row_about_an_image_of_two_tiles(kind):
    cfg = experiment(kind)
    row = text.pack_row(cfg, [([10], [E])], 2)
    drawn = DRAWN[kind]
    length = len([token for token in drawn[0] if token != P])
    assert row["tokens"].tolist()[:length] == drawn[0][:length]
    assert (row["tokens"][length:] == P).all()
    assert row["image_token_index"].tolist()[:length] == drawn[1][:length]
    assert row["positions"][:length].tolist() == list(range(length))
    reads = {4: [1, 0, 0, 0, 0], 5: [0, 1, 0, 0, 0], 8: [0, 0, 0, 0, 1]}
    for token, mask in zip(row["tokens"][:length], row["image_mask"].tolist()):
        assert mask == reads.get(token, [1, 1, 0, 0, 1])
    assert not row["image_mask"][length:].any()


@pytest.mark.parametrize("kind", ONE_TILE)
def test_an_image_of_one_tile_has_no_thumbnail_beside_it(kind):
    cfg = experiment(kind)
    assert tokens(cfg, 1) == ONE_TILE[kind]
    assert text.pack_row(cfg, [([10], [E])], 1)["image_mask"][0].tolist() == [1, 0, 0, 0, 0]
    assert tokens(experiment(kind, tiles=1), 1) == [token for token in ONE_TILE[kind] if token != 4]


@pytest.mark.parametrize("kind", NO_THUMBNAIL)
def test_the_thumbnail_can_be_left_out(kind):
    assert tokens(experiment(kind, thumbnail=False), 2) == NO_THUMBNAIL[kind]


@pytest.mark.parametrize("kind", NO_TAGS)
def test_tags_can_be_left_out(kind):
    assert tokens(experiment(kind, tile_tags="none"), 2) == NO_TAGS[kind]


def test_a_public_tokenizer_spells_tags_with_several_tokens():
    cfg = experiment("hybrid", tiles=2)
    cfg = replace(cfg, data=replace(cfg.data, tag_ids=((60, 61), (60, 62), (60, 63, 64))))
    row = text.pack_row(cfg, [([10], [E])], 2)
    assert row["tokens"].tolist()[:8] == [60, 61, 60, 62, 60, 63, 64, I]
    assert row["image_mask"].tolist()[:8] == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2 + [[0, 0, 1]] * 3 + [
        [1, 1, 1]
    ]
    assert len(row["tokens"]) == 7 + 1 + 3


def test_the_largest_image_fills_its_row():
    for kind in DRAWN:
        cfg = experiment(kind)
        assert len(tokens(cfg, 4)) == cfg.image_slots_in_row + 2


def test_a_prompt_is_the_start_of_its_row():
    for kind in DRAWN:
        cfg = experiment(kind)
        row, prompt = text.pack_row(cfg, [([10], [E])], 3), text.prompt_row(cfg, [10], [3])
        for name, values in prompt.items():
            np.testing.assert_array_equal(values, row[name][: len(values)])


def test_tags_are_tokens_of_the_tokenizer_and_no_text_of_a_user():
    names = tiling.tag_names(Vision(tiles=2))
    assert names == ["<tile_1>", "<tile_2>", "<tile_global_thumbnail>"]
    tokenizer = Tokenizer.train(["is it red?"] * 4, 300, names)
    assert [tokenizer._bpe.token_to_id(name) for name in names] == [4, 5, 6]
    assert tokenizer.decode(tokenizer.encode("<tile_1>")) == "<tile_1>"
    assert min(tokenizer.encode("<tile_1>")) > 6
    with pytest.raises(
        ConfigError, match=r"decoder.vocab_size 262 .* 3 tags of vision.tiles included"
    ):
        Tokenizer.train(["a"], 262, names)


# Batches


def picture(rows, columns, side=16):
    return (
        np.random.default_rng(rows)
        .uniform(-1, 1, (rows * side, columns * side, 3))
        .astype(np.float32)
    )


class Letters:
    def encode(self, said):
        return list(said.encode())


@pytest.mark.parametrize("kind", DRAWN)
def test_prompts_about_images_of_all_sizes(kind):
    cfg = experiment(kind)
    shown = [[picture(1, 1), picture(2, 2)], [picture(1, 3)], []]
    batch = questions.prompt_batch(cfg, Letters(), shown, ["a", "b", "c"])
    assert batch.images.shape == (3, 10, 16, 16, 3)
    np.testing.assert_array_equal(
        batch.images[0, 5:9], tiling.split_into_views(shown[0][1], cfg.vision)[:4]
    )
    assert batch.image_mask[:, -1].sum(-1).tolist() == [6, 4, 0]
    last = batch.image_token_index.max(1).tolist()
    assert last == ([9, 4, -1] if cfg.fusion.image_in_sequence else [-1] * 3)


def test_a_question_is_evaluated_with_the_views_that_it_is_trained_with(datasets_dir):
    data = Data(dir=datasets_dir, train_split="test[:8]", augment=("turn",), questions_per_row=1)
    vision = Vision(image_size_px=32, tiles=4)
    cfg = Experiment(
        data=data, vision=vision, train=Train(batch_size=8), decoder=Decoder(max_positions=512)
    )
    tokenizer = pipeline.train_tokenizer(cfg)
    trained = next(pipeline.training_iterator(cfg, tokenizer)).images
    assert trained.shape == (8, 5, 32, 32, 3)
    asked = {question.image_id: question for question in questions.load(cfg, "test[:8]")}
    shown = [[images.normalize(question.images()[0], vision)] for question in asked.values()]
    assert shown[0][0].shape == (64, 64, 3)
    asked_about = questions.prompt_batch(cfg, tokenizer, shown, ["red?"] * 8).images

    def symmetries(thumbnails):
        return {
            min(np.rot90(one, k).round(4).tobytes() for k in range(4)) for one in thumbnails[:, -1]
        }

    assert symmetries(trained) == symmetries(asked_about)


@pytest.mark.parametrize("kind", DRAWN)
def test_packed_conversations_about_images_in_tiles(kind, tmp_path):
    """Pictures of 24 x 18 px; of eight tiles at the most, 2 x 3 have the nearest shape."""
    cfg = tiny(kind, data=write_conversations(tmp_path, count=24))
    cfg = replace(
        cfg, vision=replace(cfg.vision, tiles=8), decoder=replace(cfg.decoder, max_positions=256)
    )
    tokenizer = pipeline.train_tokenizer(cfg)
    number = tiling.tile_count(24, 18, cfg.vision)
    assert number == 6
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    assert batch.images.shape == (8, 3 * 9, 16, 16, 3)
    assert batch.tokens.shape == (8, cfg.row_length)
    there = batch.image_mask.any(1).reshape(8, 3, 9)
    shapes = {(False,) * 9, (*(place < number for place in range(8)), True)}
    assert {tuple(one) for one in there.reshape(-1, 9).tolist()} <= shapes
    in_sequence = {"unified": number + 1, "hybrid": 1}.get(kind, 0)
    per_row = cfg.image_tokens * in_sequence * there.any(-1).sum(-1)
    assert (batch.image_token_index >= 0).sum(1).tolist() == per_row.tolist()
    tagged = (batch.tokens >= 4) & (batch.tokens < 13)
    assert (batch.image_mask[tagged].sum(-1) == 1).all()
    assert tagged.sum() == there.sum()


def test_tiles_are_counted_once_from_the_file_alone(tmp_path):
    cfg = tiny(data=write_conversations(tmp_path))
    cfg = replace(cfg, vision=replace(cfg.vision, tiles=6))
    source = pipeline.conversation_source(cfg.data, "train")
    count, read = packing.tile_counter(cfg, source), packing.pixel_reader(cfg, source)
    assert count(0) == tiling.count_tiles(read(0), cfg.vision) > 1
    assert packing.tile_counter(replace(cfg, fusion=Fusion("text_only")), source)(0) == 1
