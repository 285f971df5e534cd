"""The learned uncertainty as a picture: e^u(t), the loss to expect at a timestep."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from sd_recipes.runtime.output_dir import NO_ROOM

logger = logging.getLogger(__name__)


def draw_uncertainty(u: Tensor, path: Path) -> None:
    """Draw e^u of all timesteps, (T,), to a PNG file; where there is no room for it, a warning says so."""
    from matplotlib.figure import Figure  # takes long to import, and few runs need it

    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.subplots()
    axes.semilogy(u.detach().float().exp().cpu().numpy())
    axes.set(xlabel="timestep", ylabel="$e^{u(t)}$, the expected loss", title="Learned uncertainty")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        logger.warning("%s cannot be written (%s): the run goes on without it.", path, error)
