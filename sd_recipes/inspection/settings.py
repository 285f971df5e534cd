"""The settings of `sd-recipes inspect`."""

from __future__ import annotations

from pydantic import Field

from sd_recipes.recipe import DataSettings, ModelConfig, Section
from sd_recipes.runtime.cores import num_cores


class InspectConfig(Section):
    """Inspection: what is looked at, and where the report is written."""

    config: str | None = Field(
        None,
        description="Recipe of a run, a YAML file or the name of a shipped one: its data and model settings are used.",
    )
    output_dir: str = Field("inspection", description="Where inspection.json and inspection.html are written.")
    max_rows: int | None = Field(
        None, ge=1, description="Inspect this many rows, drawn at random; from a stream, the first ones."
    )
    num_workers: int | None = Field(
        None, ge=0, description="Processes that decode images; by default one per core. 0 decodes in this process."
    )
    train_batch_size: int = Field(16, ge=1, description="Batch size that the buckets are compared with.")
    num_samples: int = Field(
        64, ge=1, description="Images, drawn at random, that are shown or go through the model's VAE."
    )


class Inspection(InspectConfig, ModelConfig, DataSettings):
    """All settings of an inspection; the data settings are those of a training run."""

    @property
    def image_workers(self) -> int:
        """How many processes decode images."""
        if self.num_workers is not None:
            return self.num_workers
        return num_cores()
