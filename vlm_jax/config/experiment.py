"""The experiment: frozen dataclasses, one for each section.

Derived values are properties, so that an override on the command line never leaves a stale copy.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from vlm_jax.config.data import Data
from vlm_jax.config.devices import Distributed, Mesh
from vlm_jax.config.evaluation import Eval
from vlm_jax.config.model import PRETRAINED_PARTS, Decoder, Fusion, Lora, Model, Projector, Vision
from vlm_jax.config.tile_maps import has_maps_in_sequence, image_length, longest_image
from vlm_jax.config.training import Optim, Train


@dataclass(frozen=True)
class Experiment:
    data: Data = field(default_factory=Data)
    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    fusion: Fusion = field(default_factory=Fusion)
    decoder: Decoder = field(default_factory=Decoder)
    # Not a factory: config.json of older runs lacks the section.
    lora: Lora = Lora()
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    distributed: Distributed = field(default_factory=Distributed)
    eval: Eval = field(default_factory=Eval)
    #: folder of a public checkpoint or of a run: its model, tokenizer and initial weights
    init_from: str = ""
    #: the parts of init_from to use; (): all
    init_parts: tuple[Literal["vision", "projector", "decoder"], ...] = ()
    #: folder of a LoRA adapter of init_from, in PEFT's format: its training continues
    adapter: str = ""
    workdir: str = ""  # folder of the run; empty: runs/<config name>
    seed: int = 0  # seed of new parameters and of the order of the data

    @property
    def begins_with_any(self) -> bool:
        """True if a checkpoint is named, whose settings replace the experiment's."""
        return bool(self.init_from or self.pretrained_parts)

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """Parts that are initialized from a checkpoint."""
        return tuple(part for part in PRETRAINED_PARTS if getattr(self, part).checkpoint)

    @property
    def eval_data(self) -> Data:
        """The dataset that `eval.read_split` is a split of."""
        if self.eval.files:
            return self.data.alone(files=self.eval.files)
        return self.data.parts[self.eval.source] if self.eval.source else self.data

    @property
    def parts(self) -> dict[str, "Experiment"]:
        """The experiment with the data of each source of the mixture, as `Data.parts`."""
        return {name: replace(self, data=part) for name, part in self.data.parts.items()}

    def validation_data(self, split: str) -> Data:
        """The dataset of a value of `eval.named_splits`, which is its `train_split`.

        Images are not augmented. Conversations have no other split than train: all other values are
        files. Of a mixture it is the split of every source.
        """
        data = replace(self.eval_data, train_split=split, augment=())
        if "files" in data.dataset.fields and split.partition("[")[0] != "train":
            return data.alone(files=(split,), train_split="train")
        sources = (replace(source, train_split=None, augment=None) for source in data.mixture)
        return replace(data, mixture=tuple(sources))

    @property
    def model(self) -> Model:
        """The sections that `nn/` builds the model from."""
        return Model(self.vision, self.projector, self.fusion, self.decoder, self.lora)

    @property
    def image_tokens(self) -> int:
        """M: number of tokens of one view of an image after the projector."""
        return self.model.image_tokens

    @property
    def views_in_sequence(self) -> int:
        """Maximum number of views of an image in the decoder's sequence."""
        if not self.fusion.image_in_sequence:
            return 0
        return 1 if self.fusion.splits_views else self.vision.views

    @property
    def has_maps_in_sequence(self) -> bool:
        """True if image tokens are in the sequence as maps of tiles."""
        return has_maps_in_sequence(self.vision, self.fusion)

    @property
    def tile_tags(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the text tokens that name each of the J views of an image; empty without tags."""
        # The tokens of a map have their place in the sequence, but not in cross-attention.
        is_named = self.vision.has_tags and not self.has_maps_in_sequence
        if not (is_named and self.fusion.has_images):
            return ()
        first = max(self.data.special_ids) + 1
        return self.data.tag_ids or tuple((first + view,) for view in range(self.vision.views))

    @property
    def image_slots_in_row(self) -> int:
        """Maximum length of an image in the sequence, with newlines, tags and placeholder."""
        if self.has_maps_in_sequence:
            longest = longest_image(self.vision, self.projector)
            return image_length(self.vision, self.projector, longest)
        beside = sum(map(len, self.tile_tags)) + self.fusion.placeholder
        return self.views_in_sequence * (self.image_tokens + self.newlines_per_view) + beside

    @property
    def newlines_per_view(self) -> int:
        """Maximum number of newlines in the tokens of a view."""
        if not self.vision.newline_token:
            return 0
        if self.vision.is_native:
            return self.vision.max_squares - 1
        return self.projector.output_grid(self.vision)[0]

    @property
    def row_length(self) -> int:
        """S: length of a training row in tokens."""
        image_slots = self.data.images_per_row * self.image_slots_in_row
        if self.vision.is_native and self.fusion.image_in_sequence:
            image_slots = self.image_tokens_per_row
            image_slots += self.data.images_per_row * self.fusion.placeholder
        return image_slots + self.data.text_length

    @property
    def image_tokens_per_row(self) -> int:
        """Maximum number of image tokens of a training row at native resolution."""
        if self.model.has_tokens_by_size:
            return self.squares_per_row
        return self.data.images_per_row * self.image_tokens

    @property
    def squares_per_row(self) -> int:
        """Maximum number of squares of patches in a training row at native resolution."""
        if self.data.patches_per_row is None:
            return self.data.images_per_row * self.vision.max_squares
        return self.data.patches_per_row // self.vision.patch_square**2

    @property
    def patches_per_row(self) -> int | None:
        """P: number of patches in a training row at native resolution, with padding, or None."""
        if not self.vision.is_native:
            return None
        return self.squares_per_row * self.vision.patch_square**2
