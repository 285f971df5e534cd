"""Model card and upload. Only what belongs to the pipeline, or to the LoRA, leaves the machine."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path

from diffusers import StableDiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects

from sd_recipes.assets import ASSETS
from sd_recipes.errors import RecipeError, RunError, one_line
from sd_recipes.evaluation.verdict import figures_by_step, judge
from sd_recipes.flags import recipe_text
from sd_recipes.model.family import Family
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.model.weight_files import SUFFIXES
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted, shown
from sd_recipes.runtime.trackers import read_metrics

logger = logging.getLogger(__name__)

# Never checkpoints, logs or the data: a run's folder may hold much more than a model. Nor its recipe as it is there,
# with this machine's paths.
ALLOWED = ["README.md", "samples.png"]


class PushError(RunError):
    """The model is saved, but could not be pushed; the message has the command that pushes it."""

    status = 4


def create_repository(recipe: Recipe) -> str:
    """The repository to push to, made before training, so that missing permissions show first. Raises RecipeError."""
    name = recipe.hub_model_id or Path(recipe.output_dir).resolve().name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    # Besides its own errors huggingface_hub lets those of its HTTP client through, whose package has changed
    # between its versions; all of them are about the repository that the user named.
    except Exception as error:
        raise RecipeError(
            f"--push_to_hub: cannot create {name} ({one_line(error, 200)}): log in with `hf auth login`, "
            "or drop the flag and upload later"
        ) from error


# How a card's reader draws from scores, of which diffusers has no sampler, with diffusers alone.
FROM_SCORES = """
# The UNet predicts the score s = -ε / σ_t, of which diffusers cannot sample: the sampler gets ε.
sigmas = (1 - pipeline.scheduler.alphas_cumprod).sqrt()
pipeline.unet.register_forward_hook(lambda unet, inputs, outputs: (-sigmas[int(inputs[1])] * outputs[0],))
settings = {"prediction_type": "epsilon", "clip_sample": False}
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
"""
# How a card's reader draws with a --clip_skip and Stable Diffusion 1 or 2.
FOR_CLIP_SKIP = """
# diffusers looks for a name that transformers has dropped (huggingface/diffusers#14124).
if not hasattr(pipeline.text_encoder, "text_model"):
    type(pipeline.text_encoder).text_model = property(lambda text_encoder: text_encoder)
"""


def publish(
    output_dir: Path, repo_id: str, recipe: Recipe, family: Family, prediction_type: str, best_step: int | None = None
) -> str:
    """Write the model card and upload the pipeline; returns the repository's address. Raises PushError.

    `best_step` is that of the weights, if these are not the last step's.
    """
    write_model_card(output_dir, repo_id, recipe, family, prediction_type, best_step)
    allowed = [*ALLOWED, LORA_FILE]
    if not recipe.trains_lora:
        allowed = [*ALLOWED, "model_index.json", *(f"{folder}/*" for folder in family.folders)]
    api = HfApi()
    names = (path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file())
    chosen = sorted(filter_repo_objects(names, allow_patterns=allowed))
    files = [
        *(CommitOperationAdd(name, output_dir / name) for name in chosen),
        CommitOperationAdd("recipe.yaml", recipe_text(recipe, shared=True).encode()),
    ]
    try:
        api.create_commit(repo_id, files, commit_message="End of training")
    except Exception as error:  # as above; the model is saved, and the error is passed on
        includes = " ".join(f"--include '{pattern}'" for pattern in allowed)
        raise PushError(
            f"the model is saved in {output_dir} and was not pushed ({one_line(error, 200)}). "
            "Push it, but for recipe.yaml, which holds local paths, with: "
            f"hf upload {repo_id} {output_dir} . {includes}"
        ) from error
    return f"{api.endpoint}/{repo_id}"


def _hub_id(name: str | None) -> str | None:
    """The name, if it is a repository's; a folder's or an asset's would make the card's metadata invalid."""
    if (
        name is None
        or redacted(name) != name
        or name in ASSETS
        or Path(name).exists()
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    ):
        return None
    return name


def sample_command(model: str, prompt: str, lora: str | None = None, clip_skip: int | None = None) -> str:
    """The command that draws a prompt with a model, whatever it predicts."""
    words = ["--pretrained_model_name_or_path", model, *(["--lora", lora] if lora else []), "--prompts", prompt]
    words += ["--clip_skip", str(clip_skip)] if clip_skip else []
    return f"sd-recipes sample {shlex.join(words)}"


def _loading(recipe: Recipe, pipeline_class: str, repo_id: str, base: str) -> str:
    """The lines of Python that load what was pushed; a LoRA into its base."""
    if not recipe.trains_lora:
        return f"pipeline = {pipeline_class}.from_pretrained({json.dumps(repo_id)})"
    load = "from_single_file" if base.endswith(SUFFIXES) else "from_pretrained"
    return (
        f"pipeline = {pipeline_class}.{load}({json.dumps(base)})  # the model that it was trained on\n"
        f"pipeline.load_lora_weights({json.dumps(repo_id)})"
    )


def write_model_card(
    output_dir: Path,
    repo_id: str,
    recipe: Recipe,
    family: Family,
    prediction_type: str,
    best_step: int | None = None,
) -> None:
    """README.md of the model: what it was made from, with what settings, what it has learned, and how to use it."""
    pipeline_class = family.pipeline_class.__name__
    base = _hub_id(recipe.pretrained_model_name_or_path)
    data_set = _hub_id(recipe.dataset_name)
    made_from, with_data = in_texts(shown, [recipe.pretrained_model_name_or_path, recipe.dataset_name])
    data = ModelCardData(
        base_model=base if not recipe.train_from_scratch else None,
        datasets=[data_set] if data_set else None,
        tags=[
            "stable-diffusion",
            "stable-diffusion-diffusers",
            *(["stable-diffusion-xl"] if "XL" in pipeline_class else []),
            "text-to-image",
            "diffusers",
            "diffusers-training",
            *(["lora"] if recipe.trains_lora else []),
        ],
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )
    prompts = in_texts(redacted, recipe.validation_prompts or ["a photo"])
    judgement = judge(figures_by_step(read_metrics(output_dir / "metrics.jsonl")))
    learned = " ".join(judgement.sentences) + "\n" if judgement.best_step else ""
    if best_step is not None:
        learned += f"\nThese are the weights of step {best_step}.\n"
    pictures = "![samples](samples.png)\n" if (output_dir / "samples.png").is_file() else ""
    lora = LORA_FILE if recipe.trains_lora else None
    predicts_score = prediction_type == "score"
    before_drawing = FROM_SCORES if predicts_score else ""
    arguments = json.dumps(prompts[0])
    if recipe.clip_skip:
        if family.pipeline_class is StableDiffusionPipeline:
            before_drawing += FOR_CLIP_SKIP
        arguments += f", clip_skip={recipe.clip_skip}"
    drawn_with = f" Draw with {family.clip_skip_in_words(recipe.clip_skip)}." if recipe.clip_skip else ""
    imported = f"DDIMScheduler, {pipeline_class}" if predicts_score else pipeline_class
    content = f"""---
{data.to_yaml()}
---

# {repo_id}

{"A LoRA, trained on" if recipe.trains_lora else "Made from"} **{made_from}** with **{with_data or "its own images"}**
by sd-recipes. All settings are in `recipe.yaml`.{drawn_with}

{learned}
{pictures}
```python
from diffusers import {imported}

{_loading(recipe, pipeline_class, repo_id, base or made_from)}
{before_drawing}pipeline({arguments}).images[0].save("image.png")
```

Or with sd-recipes, which also compares models and adds LoRAs:

    {sample_command((base or made_from) if lora else repo_id, prompts[0], lora, recipe.clip_skip)}
"""
    ModelCard(redacted(content)).save(output_dir / "README.md")
