"""Tables of losses as validations write them, made up: a loss by timestep, times what each row has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from sd_recipes.evaluation.sample_errors import of_set, table_path, write_table

NUM_TIMESTEPS = 1000


def write_losses(
    output_dir: Path,
    step: int,
    factors: Mapping[str, np.ndarray],
    *,
    samples: int = 4,
    weights: str = "raw",
    noise: float = 0.1,
) -> Path:
    """One validation: `factors` are the rows' own by set, (R,); timesteps and noise are those of every validation."""
    tables = []
    for number, (name, of_rows) in enumerate(factors.items()):
        generator = np.random.default_rng(number)
        row = np.tile(np.arange(len(of_rows)), samples)
        # Stratified, as validations do it: each row has another part of the timesteps in each pass.
        timestep = generator.permuted(np.linspace(0, NUM_TIMESTEPS - 1, len(row)).astype(int))
        usual = 0.02 + 0.9 * (1 - timestep / NUM_TIMESTEPS) ** 3  # far more between timesteps than between rows
        loss = usual * of_rows[row] * np.exp(noise * generator.standard_normal(len(row)))
        tables.append(of_set(pa.table({"row": row, "timestep": timestep, "loss": loss}), name, weights))
    path = table_path(output_dir, step)
    output_dir.mkdir(exist_ok=True)
    about = {"step": step, "num_train_timesteps": NUM_TIMESTEPS, "prediction_type": "epsilon"}
    write_table(pa.concat_tables(tables), path, about)
    return path
