"""train_text_to_image.py, with the samples that each process trains on written to OUT/samples-RANK.jsonl.

A line is a micro-batch: [step it belongs to is done by so many samples, [[position in the run, row], ...]].
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_recipes.commands.cli import train as main
from sd_recipes.data import batches

unrecorded = batches.TrainingBatches.__call__


def recorded(self: batches.TrainingBatches, *arguments: Any) -> Iterator[list[batches.Batch]]:
    path = Path(self.builder.config.output_dir) / f"samples-{os.environ.get('RANK', 0)}.jsonl"
    with path.open("a") as file:
        for micro_batches in unrecorded(self, *arguments):
            for plan in (batch.plan for batch in micro_batches):
                samples = list(zip(plan.positions.tolist(), plan.rows.tolist(), strict=True)) if plan.weight else []
                file.write(json.dumps([plan.samples_seen, samples]) + "\n")
            file.flush()
            yield micro_batches


if __name__ == "__main__":
    batches.TrainingBatches.__call__ = recorded  # type: ignore[method-assign]
    main()
