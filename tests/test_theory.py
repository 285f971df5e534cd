"""What docs/theory.md says holds: functions, figures, commands, and the numbers that take no training to check."""

import ast
import re
import sys
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import multivariate_normal

from sd_recipes.assets import resolve
from sd_recipes.commands import evaluate_settings
from sd_recipes.commands.inspect import inspect, read_settings
from sd_recipes.evaluation.diffusion_process import DiffusionProcess
from sd_recipes.inspection.summary import Inspected
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.latents import encode_pixels, to_pixel_values
from sd_recipes.recipe import ModelConfig

sys.path.insert(0, str(ROOT / "tools"))
import draw_theory
import train_tiny_vae

DOCS = ROOT / "docs"
PAGE = (DOCS / "theory.md").read_text()
WORDS = " ".join(PAGE.split())
BLOCKS = [block for block in PAGE.split("\n\n") if block.strip()]


def is_equation(block: str) -> bool:
    return block.startswith("$$")


@cache
def names_in(path: str) -> set[str]:
    """Functions, classes and variables of a file, and what its classes have, as Class.name."""
    found = set()
    for node in ast.parse((DOCS / path).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_every_equation_stands_beside_the_function_that_computes_it() -> None:
    equations = [number for number, block in enumerate(BLOCKS) if is_equation(block)]
    assert len(equations) > 20
    for number in equations:
        after = next(block for block in BLOCKS[number:] if not is_equation(block))
        assert after.startswith("Code:"), BLOCKS[number]
        assert re.search(r"\[`\w.*?`\]\(\.\./\S+\.py\)", after), after


def test_every_function_that_is_named_is_in_the_file_that_is_named() -> None:
    links = re.findall(r"\[`([\w.]+)`\]\((\S+\.py)\)", PAGE)
    assert len(links) > 30
    for name, path in links:
        assert name in names_in(path), f"{path} has no {name}"


def test_equations_are_such_as_github_renders() -> None:
    """Markdown comes first there: it takes a backslash from punctuation, and pairs of _ or * for emphasis."""
    assert PAGE.count("$") == 4 * sum(map(is_equation, BLOCKS))
    for block in filter(is_equation, BLOCKS):
        assert block.endswith("$$"), block
        assert "\n" not in block, block
        assert not re.search(r"\\[^a-zA-Z]|(?<![a-zA-Z0-9])_|[*<>`]|\]\(|\\operatorname", block), block
        assert block.count("{") == block.count("}"), block
        assert len(re.findall(r"\\left\b", block)) == len(re.findall(r"\\right\b", block)), block


def test_the_figures_are_those_that_the_command_draws() -> None:
    images = re.findall(r"!\[([^\]]*)\]\(images/theory/(\w+)\.png\)", PAGE)
    assert [name for _, name in images] == list(dict.fromkeys(name for _, name in images))
    assert {name for _, name in images} == set(draw_theory.FIGURES)
    assert {path.stem for path in draw_theory.FOLDER.iterdir()} == set(draw_theory.FIGURES)
    for alternative, name in images:
        assert len(alternative) > 40, f"what {name} shows is not said to those who cannot see it"


@pytest.mark.parametrize("command", [draw_theory.INSPECT, draw_theory.EVALUATE])
def test_the_reader_gets_the_commands_that_the_figures_are_made_by(command: str) -> None:
    assert " ".join(command.split()) in " ".join(PAGE.replace("\\\n", " ").split())


def test_the_commands_are_accepted() -> None:
    found = re.findall(r"^    sd-recipes (\w+) ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert [verb for verb, _ in found] == ["inspect", "evaluate", "evaluate"]
    for verb, rest in found:
        settings = {"inspect": read_settings, "evaluate": evaluate_settings.read_settings}[verb]
        settings(rest.replace("\\\n", " ").split())


# ------------------------------------------------------------------------------------------ numbers


@pytest.fixture(scope="module")
def inspected() -> Inspected:
    """What the page's first command finds."""
    return inspect(read_settings([*draw_theory.arguments(draw_theory.INSPECT), "--num_workers", "0"]))


@pytest.fixture(scope="module")
def process() -> DiffusionProcess:
    return DiffusionProcess(load_scheduler(ModelConfig(pretrained_model_name_or_path=resolve("sd-recipes/tiny-emoji"))))


def said(words: str) -> None:
    assert words in WORDS, f"the page does not say: {words}"


def test_numbers_of_pixels_and_latents(inspected: Inspected) -> None:
    pixels, latents, model = inspected.scan.images.pixels, inspected.latents, inspected.model
    assert latents is not None
    assert latents.moments is not None
    assert model is not None
    said(f"the {inspected.scan.num_rows:,} emoji")
    said(f"μ = {pixels.moments.mean[1]:.3f}, σ = {pixels.moments.covariance[1, 1] ** 0.5:.3f}")
    kl = pixels.kl_from_gaussians()
    said(f"{kl['red']:.1f} nats for red, {kl['green']:.1f} for green and {kl['blue']:.1f} for blue")
    said(f"within {max(latents.kl_from_gaussians()):.2f} nats of a Gaussian")
    bits = 0.5 * np.log2(2 * np.pi * np.e * np.diag(latents.moments.covariance))
    said(f"takes {bits.mean():.2f} bits")
    said(f"z times {model.vae.config.scaling_factor:.4f}")
    by_channel, deviation = draw_theory.posterior_kl(model.vae, [pixels for _, pixels in inspected.pictures])
    said(f"{by_channel.min():.1f} to {by_channel.max():.1f} nats per dimension, by channel")
    said(f"the mean s is {deviation:.3f}")


def test_numbers_of_the_process(inspected: Inspected, process: DiffusionProcess) -> None:
    assert inspected.latents is not None
    said(f"T = {len(process)} steps")
    said(f"{process.prior(np.array(inspected.latents.mean_square)) / np.log(2):.3f} bits per dimension")
    bound = draw_theory.epsilon_weights(process)["bound"]
    said(f"The bound's are {bound[0] / bound.mean():.0f} times their mean at t = 1")
    assert bound[500] / bound.mean() == pytest.approx(0.5, abs=0.05), "about half of it in the middle"


def test_the_scale_of_the_laplace_distribution() -> None:
    (kl_weight,) = re.findall(
        r'"--kl_weight", type=float, default=(\S+?),', (ROOT / "tools/train_tiny_vae.py").read_text()
    )
    scale = float(kl_weight) * 3 * train_tiny_vae.CONFIG["sample_size"] ** 2 / 256
    said(f"b = {float(kl_weight):g} · 12,288 / 256 = {scale:.3g}, or {127.5 * scale:.1f} gray levels")


# ------------------------------------------------------------------------------------------ the command's own equations


def test_the_likelihood_of_a_gaussian() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 3)) + 1
    mean, covariance = np.array([0.5, 1.0, 2.0]), np.diag([1.0, 2.0, 3.0]) + 0.3
    found = draw_theory.mean_log_likelihood(values.mean(0), np.cov(values.T, bias=True), mean, covariance)
    assert found == pytest.approx(multivariate_normal(mean, covariance).logpdf(values).mean(), rel=1e-12)


def test_mixed_pictures_have_the_mean_and_the_covariance_of_the_pictures() -> None:
    pictures = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 5.0]])
    drawn = draw_theory.drawn_from_their_gaussian(pictures, 200_000)
    assert drawn.mean(axis=0) == pytest.approx(pictures.mean(axis=0), abs=0.02)
    assert np.cov(drawn.T) == pytest.approx(np.cov(pictures.T, bias=True), rel=0.02)


def test_the_divergence_of_the_posterior(inspected: Inspected) -> None:
    assert inspected.model is not None
    pictures = [pixels for _, pixels in inspected.pictures[:3]]
    moments = encode_pixels(inspected.model.vae, to_pixel_values(torch.from_numpy(np.stack(pictures)), torch.float32))
    mean, logvar = moments.double().chunk(2, dim=1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    by_channel, deviation = draw_theory.posterior_kl(inspected.model.vae, pictures)
    assert by_channel == pytest.approx(kl.mean(dim=(0, 2, 3)).numpy(), rel=1e-5)
    assert deviation == pytest.approx((0.5 * logvar).exp().mean().item(), rel=1e-5)


def test_the_bounds_weight_of_noise(process: DiffusionProcess) -> None:
    found = draw_theory.epsilon_weights(process)
    betas = process.betas
    assert found["bound"] == pytest.approx(betas / (2 * (1 - betas) * (1 - process.alphas_cumprod)), rel=1e-9)
    assert (found["simple"] == 1).all()
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    assert found["min_snr"] == pytest.approx(np.minimum(snr, 5) / snr, rel=1e-9)
