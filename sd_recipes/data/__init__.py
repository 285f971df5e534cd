"""From rows to batches: rows, images, captions, order, draws, batches."""
