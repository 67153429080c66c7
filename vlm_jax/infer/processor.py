"""The interface between text and a model, shared by training runs and public checkpoints."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from vlm_jax.hub.images.steps import ImageInput, ImageInputs, PixelScale
from vlm_jax.hub.text.prompts import Prompts
from vlm_jax.hub.text.tokenizer import TextStream
from vlm_jax.structs import Batch


@runtime_checkable
class Processor(Protocol):
    """Encodes prompts and images for a model, and decodes the tokens that it generates.

    `hub.processor.HubProcessor` implements it for a public checkpoint, `infer.run.RunProcessor` for
    a training run. Code that takes a `Processor` works with either.
    """

    def __call__(
        self,
        prompts: Prompts,
        images: ImageInputs = (),
        *,
        chat: bool = ...,
        answers: Sequence[str] | None = None,
        pad_to_multiple_of: int = 1,
    ) -> Batch:
        """Encodes prompts and the images of each as a left-padded batch (B, S).

        Args:
          prompts: texts or conversations; a single one is a batch of one.
          images: one list of images for each prompt, or another nesting that
            `hub.images.steps.to_rows` accepts.
          chat: formats prompts as user messages. A run always formats them as its training data.
          answers: one for each prompt, to score: the batch then has `targets` and `loss_weights`.
          pad_to_multiple_of: S is rounded up to a multiple of it.

        Raises:
          UserError: the images or answers do not match the prompts, or an image cannot be read.
        """

    def pixel_scale(self) -> PixelScale:
        """Returns the scale of the pixel values of a batch."""

    def tile_grids(self, images: Sequence[ImageInput]) -> list[tuple[int, int]] | None:
        """Returns the rows and columns of tiles that each image is cut into.

        None: they follow from the settings of the encoder.
        """

    @property
    def takes_conversations(self) -> bool:
        """True if a prompt may have turns before its question."""

    @property
    def takes_system_turn(self) -> bool:
        """True if a conversation may begin with a system turn."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of an answer up to its end token."""

    def decode_stream(self) -> TextStream:
        """Returns a decoder that takes the ids of an answer as they are generated.

        Its pieces of text join to the text that `decode` returns.
        """
