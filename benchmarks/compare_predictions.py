"""ε, v, x_0 and score, trained from scratch on the emoji with equal budgets: errors, bounds, scores and pictures.

    python benchmarks/compare_predictions.py --work_dir runs/predictions

Every type is trained by train_text_to_image.py once for each seed. Those of one seed begin with the same weights and
meet the same rows, timesteps and noise; all are measured on the same held-out rows, timesteps and noise. What is done
is kept in the work folder and not done again: after a kill, type the same command. It prints tables in Markdown
(--tables prints those of the seeds that are done so far), and draws predictions.jpg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
SCRIPT = HERE.parent / "train_text_to_image.py"
RECIPE = HERE.parent / "sd_recipes" / "recipes" / "tiny_from_scratch.yaml"

from sd_recipes.evaluation.bound import variational_bound  # noqa: E402
from sd_recipes.evaluation.diffusion_process import DiffusionProcess  # noqa: E402
from sd_recipes.evaluation.figures import NUM_BINS  # noqa: E402
from sd_recipes.evaluation.picture_scores import SCORES  # noqa: E402
from sd_recipes.evaluation.timestep_sampling import TimestepSampling  # noqa: E402
from sd_recipes.writing import replace_file  # noqa: E402

TYPES = {"epsilon": "ε", "v_prediction": "v", "sample": "x₀", "score": "score"}
LOSSES = {"epsilon": "loss of ε, and of the score", "v_prediction": "loss of v", "sample": "loss of x₀"}
PACKAGED = "sd-recipes/tiny-emoji"  # what the recipe gives after all its steps
NUM_HELD_OUT = 87
EVALUATIONS = 64  # timesteps of an image in its bound
DRAWN = {"validation_inference_steps": 20, "validation_guidance_scale": 3.0}
SHOWN_PROMPTS = 8


def run_dir(work: Path, prediction_type: str, seed: int) -> Path:
    return work / f"{prediction_type}-{seed}"


# ------------------------------------------------------------------------------------------ training


def recipe_of(work: Path, prediction_type: str, seed: int, steps: int) -> dict[str, Any]:
    """The shipped recipe with a smaller budget, and without the pictures during training."""
    recipe = yaml.safe_load(RECIPE.read_text())
    del recipe["validation_prompts"]
    return recipe | {
        "prediction_type": prediction_type, "seed": seed, "train_batch_size": 16, "max_train_steps": steps,
        "lr_warmup_steps": steps // 10, "validation_pictures": 0, "validation_samples": NUM_HELD_OUT,
        "cache_latents": "disk", "latent_cache_dir": str(work / "latents"), "cache_text": True,
        "checkpointing_steps": 100, "report_to": "none", "output_dir": str(run_dir(work, prediction_type, seed)),
    }  # fmt: skip


def train(work: Path, prediction_type: str, seed: int, steps: int) -> None:
    """Train to the end, or from where an earlier call was killed. Ends this program if that had another budget."""
    output_dir = run_dir(work, prediction_type, seed)
    recipe = work / f"{output_dir.name}.yaml"
    begun_with = yaml.safe_load(recipe.read_text())["max_train_steps"] if recipe.is_file() else steps
    if begun_with != steps:
        sys.exit(f"error: --work_dir {work} holds runs of {begun_with} steps: give those, or another folder")
    if not (output_dir / "model_index.json").is_file():
        replace_file(recipe, yaml.safe_dump(recipe_of(work, prediction_type, seed, steps)))
        call([SCRIPT, "--config", recipe])


def call(command: Sequence[Any]) -> None:
    """Run Python in a process of its own, whose output is shown. Ends this program if it fails."""
    words = [sys.executable, *map(str, command)]
    status = subprocess.run(words, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if status:
        sys.exit(f"error: {' '.join(words)} failed with {status}")


# ------------------------------------------------------------------------------------------ measuring


def evaluate(work: Path, run: Path) -> None:
    """`sd-recipes evaluate`: errors of the same samples, and scores of pictures of all held-out captions."""
    output_dir = work / "evaluation" / run.name
    if not (output_dir / "evaluation.html").is_file():  # written last
        flags = {"validation_samples": 1000, "num_pictures": NUM_HELD_OUT, "output_dir": output_dir, "seed": 0, **DRAWN}
        call(["-m", "sd_recipes.commands.cli", "evaluate", run, *(f"--{name}={flags[name]}" for name in flags)])


def bound_path(work: Path, model: str | Path) -> Path:
    return work / "bounds" / f"{Path(model).name}.json"


def measure_bound(work: Path, model: str | Path, sampling: TimestepSampling | None) -> TimestepSampling:
    """Write the bound of held-out latents by a model; returns how its timesteps were drawn: as `sampling` if given."""
    path = bound_path(work, model)
    if path.is_file():
        return TimestepSampling(np.array(json.loads(path.read_text())["probabilities"]), EVALUATIONS)
    pipeline = load(model)
    latents, states = held_out_latents(pipeline)
    bound = variational_bound(
        lambda noisy_latents, timesteps, states: pipeline.unet(noisy_latents, timesteps, states).sample,
        latents, pipeline.scheduler, prediction_type=pipeline.scheduler.config.prediction_type,
        variance="fitted", timesteps=sampling or EVALUATIONS, batch_size=64, conditioning={"states": states},
    )  # fmt: skip
    content = {
        "images": bound.images.total.tolist(),
        "prior": bound.prior, "denoising": bound.denoising.sum(), "reconstruction": bound.reconstruction,
        "latent_variance": latents.square().mean().item(), "probabilities": bound.sampling.probabilities.tolist(),
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps(content))
    return bound.sampling


def load(model: str | Path) -> Any:
    from diffusers import StableDiffusionPipeline

    from sd_recipes import assets

    pipeline = StableDiffusionPipeline.from_pretrained(assets.resolve(str(model)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out_latents(pipeline: Any) -> tuple[Any, Any]:
    """Latents (N, 4, 8, 8), drawn from the VAE's posterior as in training, and text states (N, 77, 128)."""
    import torch

    from sd_recipes.data.rows import load_rows
    from sd_recipes.evaluation.real_pictures import real_pictures
    from sd_recipes.recipe import Recipe

    recipe = Recipe(
        pretrained_model_name_or_path=PACKAGED, dataset_name="sd-recipes/emoji", train_split="train_heldout"
    )
    rows = load_rows(recipe)
    with torch.no_grad():
        pixels = torch.stack([each for _, each in real_pictures(rows, recipe, (64, 64))]) / 127.5 - 1
        posterior = pipeline.vae.encode(pixels).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(0)) * pipeline.vae.config.scaling_factor
        states, _ = pipeline.encode_prompt(list(rows["text"]), "cpu", 1, False)
    return latents, states


def draw(work: Path, names: Mapping[str, Path]) -> None:
    """predictions.jpg: the recipe's first prompts in columns, drawn with the same noise by the runs in rows."""
    from sd_recipes.evaluation.pictures import draw_pictures, picture_grid
    from sd_recipes.model.samplers import drawing_sampler
    from sd_recipes.recipe import Recipe

    path = work / "predictions.jpg"
    if path.is_file():
        return
    prompts = yaml.safe_load(RECIPE.read_text())["validation_prompts"][:SHOWN_PROMPTS]
    recipe = Recipe(pretrained_model_name_or_path=PACKAGED, dataset_name="sd-recipes/emoji", seed=0, **DRAWN)
    pictures, captions = [], []
    for name, model in names.items():
        pipeline = load(model)
        pipeline.scheduler = drawing_sampler(pipeline.scheduler)
        pictures += draw_pictures(pipeline, prompts, recipe, (64, 64), range(len(prompts)), len(prompts))
        captions += [f"{name}: {prompt}" for prompt in prompts]
    picture_grid(pictures, captions, columns=len(prompts), cell=80).save(path, quality=85)


# ------------------------------------------------------------------------------------------ tables


def errors_of_latents(errors: pa.Table, prediction_type: str, process: DiffusionProcess) -> pa.Table:
    """The errors of held-out rows with `loss` in the space that all types share: the squared error of x̂_0."""
    held_out = errors.filter(pc.equal(errors["set"], "held_out"))
    # A score's loss is that of ε: it comes with the factor σ_t.
    *_, factors = process.prediction("epsilon" if prediction_type == "score" else prediction_type)
    losses = held_out["loss"].to_numpy() * factors[held_out["timestep"].to_numpy()] ** 2
    return held_out.set_column(held_out.schema.get_field_index("loss"), "loss", pa.array(losses))


def by_row_and_bin(errors: pa.Table, num_timesteps: int) -> np.ndarray:
    """(rows, 10): each row's share of every bin's mean error; their sum over the rows is that mean."""
    bins = errors["timestep"].to_numpy().astype(int) * NUM_BINS // num_timesteps
    rows = np.unique(errors["row"].to_numpy(), return_inverse=True)[1]
    sums = np.zeros((rows.max() + 1, NUM_BINS))
    np.add.at(sums, (rows, bins), errors["loss"].to_numpy())
    return sums / np.bincount(bins, minlength=NUM_BINS)


def best_and_next(shares: Mapping[str, np.ndarray]) -> tuple[str, str, float, float]:
    """Which type has the lowest mean error and which the next, from rows' shares (N,); their difference, and its error.

    The standard error is that of another choice of rows.
    """
    best, following = sorted(shares, key=lambda each: shares[each].sum())[:2]
    differences = shares[following] - shares[best]
    error = differences.std(ddof=1) * np.sqrt(len(differences))
    return best, following, float(differences.sum()), float(error)


def linear_errors(process: DiffusionProcess, latent_variance: float) -> np.ndarray:
    """(10,): the error of x̂_0 of the best linear guess from x_t alone, for white latents of that variance."""
    noise, signal = process.sigma**2, process.signal**2
    return (latent_variance * noise / (signal * latent_variance + noise)).reshape(NUM_BINS, -1).mean(axis=1)


def error_table(
    shares: Mapping[str, Sequence[np.ndarray]], process: DiffusionProcess, latent_variance: float
) -> Iterator[str]:
    """Lines of Markdown: errors of x̂_0 by bin, from rows' shares by type and seed, (rows, 10) each."""
    snr = (process.signal / process.sigma) ** 2
    linear = linear_errors(process, latent_variance)
    yield f"| timesteps | SNR | {' | '.join(TYPES[each] for each in shares)} | linear | lowest, and by how much |"
    yield "|---" * (len(shares) + 4) + "|"
    width = len(process) // NUM_BINS
    for number in range(NUM_BINS):
        of_bin = {each: np.mean([rows[:, number] for rows in seeds], axis=0) for each, seeds in shares.items()}
        best, following, difference, error = best_and_next(of_bin)
        cells = [" ".join(f"{rows[:, number].sum():.3g}" for rows in seeds) for seeds in shares.values()]
        percent = 100 / of_bin[following].sum()
        yield (
            f"| {number * width} … {(number + 1) * width - 1} | {snr[number * width + width // 2]:.2g} | "
            f"{' | '.join(cells)} | {linear[number]:.3g} | "
            f"{TYPES[best]}, {percent * difference:.1f} ± {percent * error:.1f} % below {TYPES[following]} |"
        )


def loss_table(errors: Mapping[str, Sequence[pa.Table]], process: DiffusionProcess) -> Iterator[str]:
    """Lines of Markdown: every type's errors of x̂_0, by type and seed, as each type's loss has them."""
    *_, factors = zip(*(process.prediction(each) for each in LOSSES), strict=True)
    yield f"| | {' | '.join(LOSSES.values())} |"
    yield "|---" * (len(LOSSES) + 1) + "|"
    for each, seeds in errors.items():
        samples = [(table["loss"].to_numpy(), table["timestep"].to_numpy()) for table in seeds]
        cells = [" ".join(f"{np.mean(loss / factor[at] ** 2):.3f}" for loss, at in samples) for factor in factors]
        yield f"| {TYPES[each]} | {' | '.join(cells)} |"


def bound_table(bounds: Mapping[str, Mapping[str, Any]], reference: str) -> Iterator[str]:
    """Lines of Markdown, of bounds as they are written; differences are those of the same images and noise."""
    yield f"| | bound | L_T | L_{{T-1}} … L_1 | L_0 | above {reference} |"
    yield "|---" * 6 + "|"
    for name, bound in bounds.items():
        images = np.array(bound["images"])
        differences = images - np.array(bounds[reference]["images"])
        yield (
            f"| {name} | {with_error(images)} | {bound['prior']:.3f} | {bound['denoising']:.3f} | "
            f"{bound['reconstruction']:.3f} | {'' if name == reference else with_error(differences)} |"
        )


def with_error(values: np.ndarray) -> str:
    """The mean of images and its standard error."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def score_table(targets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown, of targets as evaluation.json has them, with intervals."""
    yield f"| | {' | '.join(SCORES.values())} | image-text score |"
    yield "|---" * (len(SCORES) + 2) + "|"
    for name, target in targets.items():
        scores = [target["scores"].get(each) for each in SCORES]
        cells = ["-" if each is None else "{value:.3g} ({low:.3g} … {high:.3g})".format(**each) for each in scores]
        yield f"| {name} | {' | '.join(cells)} | {target['figures']['image_text_score']:.1f} |"


def tables(work: Path, seeds: Sequence[int]) -> Iterator[str]:
    """All tables, of the seeds with which all types have been measured."""
    from sd_recipes.evaluation.sample_errors import read_table

    seeds = [seed for seed in seeds if all(bound_path(work, run_dir(work, each, seed)).is_file() for each in TYPES)]
    if not seeds:
        sys.exit(f"error: --work_dir {work} has no seed with all types measured: leave out --tables, and they are")
    process = DiffusionProcess(load(PACKAGED).scheduler)
    errors: dict[str, list[pa.Table]] = {each: [] for each in TYPES}
    targets, bounds = {}, {}
    for each, title in TYPES.items():
        for seed in seeds:
            run, name = run_dir(work, each, seed), f"{title}, seed {seed}"
            results = work / "evaluation" / run.name
            errors[each].append(errors_of_latents(read_table(results / "errors-1.parquet"), each, process))
            targets[name] = json.loads((results / "evaluation.json").read_text())["targets"][0]
            bounds[name] = json.loads(bound_path(work, run).read_text())
    packaged = json.loads(bound_path(work, PACKAGED).read_text())
    shares = {each: [by_row_and_bin(table, len(process)) for table in seeds] for each, seeds in errors.items()}
    yield from error_table(shares, process, packaged["latent_variance"])
    yield ""
    yield from loss_table(errors, process)
    yield ""
    yield from bound_table(bounds | {"packaged v, 5,200 x 64": packaged}, next(iter(bounds)))
    yield ""
    yield from score_table(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tables", action="store_true", help="measure nothing, and print what was measured")
    args = parser.parse_args()
    work = args.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        sampling = measure_bound(work, PACKAGED, None)
        for seed in args.seeds:
            for each in TYPES:
                run = run_dir(work, each, seed)
                train(work, each, seed, args.steps)
                evaluate(work, run)
                measure_bound(work, run, sampling)
        draw(work, {TYPES[each]: run_dir(work, each, args.seeds[0]) for each in TYPES})
    print("\n".join(tables(work, args.seeds)))


if __name__ == "__main__":
    main()
