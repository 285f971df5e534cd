"""`sd-recipes inspect`: look at a data set before training on it.

    sd-recipes inspect --train_data_dir my_pictures --output_dir inspection
    sd-recipes inspect --dataset_name sd-recipes/emoji --resolution 64 \
        --pretrained_model_name_or_path sd-recipes/tiny-emoji

Exit status: 0 clean, 1 problems, 2 unusable, or a mistake in the flags.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sd_recipes.errors import RecipeError, RunError
from sd_recipes.flags import Command, build_parser, explain, parse_flags, read_files
from sd_recipes.inspection.settings import InspectConfig, Inspection
from sd_recipes.recipe import (
    CacheConfig,
    CaptionConfig,
    DataConfig,
    ImageConfig,
    MaskConfig,
    ModelConfig,
)
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.console import say, set_up_console

if TYPE_CHECKING:
    from sd_recipes.inspection.summary import Inspected

NAMED = 3  # rows of each kind that the console names


# What an inspection takes from a recipe: not the output folder and the workers, which are the run's own.
OF_A_RECIPE = {"train_batch_size"}.union(
    *(section.model_fields for section in (DataConfig, ImageConfig, MaskConfig, CaptionConfig, ModelConfig))
)
SECTIONS = (InspectConfig, DataConfig, ImageConfig, MaskConfig, CaptionConfig, ModelConfig, CacheConfig)


def read_settings(argv: list[str]) -> Inspection:
    """The settings in `argv`. Raises RecipeError."""
    parser = build_parser(
        SECTIONS,
        Command(
            "sd-recipes inspect",
            "Look at a data set before training on it: broken rows, duplicates, sizes, captions,\n"
            "and its pixels and latents as a distribution. Exit status: 0 clean, 1 problems, 2 unusable.",
            """
    sd-recipes inspect --train_data_dir my_pictures --output_dir inspection
    sd-recipes inspect --dataset_name sd-recipes/emoji --resolution 64
""",
        ),
    )
    flags = parse_flags(argv, parser)
    recipe, places = read_files(flags)
    settings = {name: value for name, value in recipe.items() if name in OF_A_RECIPE}
    try:
        return Inspection(**{**settings, **flags})
    except ValidationError as error:
        raise RecipeError("; ".join(explain(problem, places) for problem in error.errors())) from None


def main(argv: list[str]) -> None:
    """Inspect as the flags in `argv` say, and exit with the status. A mistake prints one line on stderr."""
    try:
        set_up_console()  # first, since reading the settings may warn
        config = read_settings(argv)
        status = run(config)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)  # also where training exits with another status: here 1 means that a report was written
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(status)


def run(config: Inspection) -> int:
    """Inspect, write the JSON file and the page, and print a summary; returns the exit status. Raises RecipeError."""
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output_dir {output_dir} cannot be made: {error.strerror}") from None
    inspected = inspect(config)
    # Imported here and below, because it takes seconds: mistakes are reported and workers started before that.
    from sd_recipes.inspection.page import write_page
    from sd_recipes.inspection.summary import as_json

    content = in_texts(redacted, as_json(inspected))
    (output_dir / "inspection.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    write_page(inspected, content, output_dir / "inspection.html")
    say(_summary(content, output_dir))
    return inspected.status


def inspect(config: Inspection) -> Inspected:
    """Everything that one pass over the rows finds. Raises RecipeError."""
    from sd_recipes.inspection.workers import ImageWorkers
    from sd_recipes.runtime.hub_access import check_hub_access

    began = time.perf_counter()
    check_hub_access(config)
    # Workers first: they start up while this process opens the data.
    with contextlib.closing(ImageWorkers(config.image_workers)) as workers:
        from sd_recipes.data.first_words import first_words
        from sd_recipes.inspection.scan import Rows, scan

        rows = Rows(config)
        say(first_words(config, rows.recognised, rows.available, rows.examples()))
        model = None
        if config.pretrained_model_name_or_path is not None:
            from sd_recipes.inspection.latents import latent_distribution, load_model
            from sd_recipes.runtime.console import hide_library_bars

            hide_library_bars()
            model = load_model(config)
        result = scan(rows, config, model and model.tokenizer, config.num_samples, workers)
    from sd_recipes.inspection.folder import NamedFiles, files_without_row
    from sd_recipes.inspection.summary import Inspected, find_duplicates

    duplicates = find_duplicates(result)  # before torch takes memory for the pictures
    folder = config.sources[0].train_data_dir
    if folder is not None and config.sources[0].dataset_name is None and not config.streaming:
        named = NamedFiles(rows.paths())
        result.findings.add(files_without_row(Path(folder), named, follow_links=config.follow_links))
    from sd_recipes.data.images import fit_image, open_image

    pictures = []
    for _, name, row in result.samples:
        size = (config.resolution, config.resolution)
        image = open_image(row[config.image_column], at_least=size, max_megapixels=config.max_image_megapixels)
        crop_u = None if config.cropping == "none" else (0.5, 0.5)
        fitted = fit_image(image, size, interpolation=config.image_interpolation_mode, crop_u=crop_u, flip=False)
        pictures.append((name, fitted))
    latents = None
    if model is not None and pictures:
        latents = latent_distribution(model.vae, [pixels for _, pixels in pictures])
    return Inspected(
        config=config,
        rows=rows,
        scan=result,
        duplicates=duplicates,
        pictures=pictures,
        model=model,
        latents=latents,
        seconds=time.perf_counter() - began,
    )


def _summary(content: dict[str, Any], output_dir: Path) -> str:
    rows = content["rows"]
    sampled = "" if rows["available"] in (None, rows["inspected"]) else f" of {rows['available']:,}, drawn at random"
    lines = [
        f"{rows['inspected']:,} rows inspected{sampled}, {rows['usable']:,} usable, in {content['seconds']:.0f} s "
        f"({rows['inspected'] / max(content['seconds'], 0.01):.0f} a second)"
    ]
    for finding in content["findings"].values():
        named = [found["name"] for found in finding["listed"][:NAMED]]
        rest = ", …" if finding["count"] > NAMED else ""
        lines.append(f"  {finding['severity']:<8} {finding['count']:>7,}  {finding['title']}: {', '.join(named)}{rest}")
    for name, title in (
        ("images", "image files that occur more than once"),
        ("near_images", "different files that look alike"),
        ("captions", "captions that occur more than once"),
    ):
        groups = content["duplicates"][name]
        if groups["rows"]:
            example = ", ".join(groups["largest"][0]["names"][:NAMED])
            lines.append(f"  {'note':<8} {groups['rows']:>7,}  {title} ({groups['groups']:,} different): {example}, …")
    if "latents" in content:
        latents = content["latents"]
        lines.append(
            f"scaling factor: {latents['scaling_factor']:.5g} in use, this data would give "
            f"{latents['scaling_factor_of_this_data']:.5g}"
        )
    lines += [f"{content['status']}: {output_dir / 'inspection.html'} and {output_dir / 'inspection.json'}"]
    return "\n".join(lines)
