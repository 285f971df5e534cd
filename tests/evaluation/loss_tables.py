"""Tables of losses as validations write them, made up: a loss by timestep, times what each row has of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
    columns: dict[str, list] = {name: [] for name in ("set", "weights", "row", "timestep", "loss")}
    for number, (name, of_rows) in enumerate(factors.items()):
        generator = np.random.default_rng(number)
        row = np.tile(np.arange(len(of_rows)), samples)
        # Stratified, as validations do it: each row has another part of the timesteps in each pass.
        timestep = generator.permuted(np.linspace(0, NUM_TIMESTEPS - 1, len(row)).astype(int))
        usual = 0.02 + 0.9 * (1 - timestep / NUM_TIMESTEPS) ** 3  # far more between timesteps than between rows
        loss = usual * of_rows[row] * np.exp(noise * generator.standard_normal(len(row)))
        for column, values in zip(columns, ([name] * len(row), [weights] * len(row), row, timestep, loss), strict=True):
            columns[column] += list(values)
    about = json.dumps({"step": step, "num_train_timesteps": NUM_TIMESTEPS, "prediction_type": "epsilon"}).encode()
    path = output_dir / "validation" / f"step-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata({b"sd_recipes": about}), path)
    return path
