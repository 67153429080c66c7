"""Base class of the TFDS builders of this package."""

import tensorflow_datasets as tfds


class LocalDatasetInfo(tfds.core.DatasetInfo):
    """Metadata that no public bucket has."""

    def initialize_from_bucket(self) -> None:
        """Looks nothing up: TFDS would leave an empty temporary folder behind each time."""


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of a dataset whose rows keep the order in which they are generated."""

    # TFDS would look for it with importlib_resources, which it does not install.
    code_path = None

    def describe(
        self, metadata: tfds.core.Metadata | None = None, **features
    ) -> tfds.core.DatasetInfo:
        """Returns the dataset's description, for `_info`."""
        return LocalDatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=metadata,
        )
