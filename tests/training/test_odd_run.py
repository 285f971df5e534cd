"""Runs that are legal and pointless are warned of, with what helps; others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import flags_of
from test_script import run_script
from training_runs import build, train

from sd_recipes.errors import RecipeError
from sd_recipes.flags import SHIPPED_RECIPES, load_recipe, recipe_text
from sd_recipes.recipe import Recipe
from sd_recipes.training import odd_run
from sd_recipes.training.odd_run import cpu_has_bf16


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Eight rows, one at a time: nothing odd about it."""
    return settings | {"train_batch_size": 1, "max_train_steps": 80}


def odd(settings: dict[str, Any], **changes: Any) -> list[str]:
    return odd_run.odd_run(build(settings, **changes))


def test_an_ordinary_run_is_not_odd(settings: dict[str, Any]) -> None:
    assert odd(settings) == []
    assert odd(settings, lr_scheduler="cosine", lr_warmup_steps=40, validation_prompts=["a disc"]) == []
    del settings["lr_warmup_steps"]
    assert odd(settings) == [], "the default warm-up has no effect under the default schedule, as in diffusers"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_scheduler": "cosine"}, "--lr_warmup_steps 500 (the default) is longer than the run of 80 steps: under "
         "--lr_scheduler cosine the learning rate gets to 16 % of --learning_rate 0.001"),
        ({"resolution": 16}, "--resolution 16 is far from the 32 pixels a side that the model draws at"),
        ({"resolution": 72}, "use --resolution 32."),
        ({"lr_scheduler": "linear"}, "Use --lr_warmup_steps 8"),
        ({"lr_scheduler": "polynomial"}, "gets to 16 %"),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 80}, "--lr_warmup_steps 80 is longer"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 60}, "--lr_warmup_steps 60 is more than half of the run"),
        ({"lr_warmup_steps": 100}, "--lr_warmup_steps 100 has no effect under --lr_scheduler constant"),
        ({"lr_warmup_steps": 500}, "--lr_warmup_steps 500 has no effect"),
        ({"learning_rate": 0}, "--learning_rate 0 trains nothing"),
        ({"train_batch_size": 2}, "global batch of 2 = 2 per device x 1 accumulated x 1 processes is more than a fifth "
         "of the 8 rows: an epoch has only 4 steps, which hardly differ. Use --train_batch_size 1, or more rows"),
        ({"gradient_accumulation_steps": 3}, "--train_batch_size 1 --gradient_accumulation_steps 1"),
        ({"max_train_steps": 4001}, "--max_train_steps 4001 goes 500 times over the 8 rows"),
        ({"max_train_steps": None, "num_train_epochs": 501}, "use --num_train_epochs 500 or less"),
        ({"validation_prompts": ["a disc"], "validation_epochs": 11}, "--validation_epochs 11 is beyond the end of the "
         "run of 10 epochs, which is validated after its first epoch and at its end only: use --validation_steps 8"),
        ({"validation_prompts": ["a disc"], "max_train_steps": 8}, "--validation_epochs 5 (the default) is beyond the "
         "end of the run of 1 epoch, which is validated at its end only"),
        ({"validation_prompts": ["a disc"], "validation_steps": 81}, "--validation_steps 81 is beyond the end"),
        ({"validation_epochs": 2}, "--validation_epochs 2 has no effect without --validation_prompts"),
    ],
)  # fmt: skip
def test_a_pointless_run_is_told_with_what_helps(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    if "lr_scheduler" in changes and "lr_warmup_steps" not in changes:
        del settings["lr_warmup_steps"]
    (told,) = odd(settings, **changes)
    assert words in told
    assert "\n" not in told


def test_the_advice_is_good_advice(settings: dict[str, Any]) -> None:
    assert odd(settings, lr_scheduler="cosine", lr_warmup_steps=8) == []
    assert odd(settings, max_train_steps=4000) == []
    assert odd(settings, validation_prompts=["a disc"], validation_steps=8) == []


OF_HUB_MODELS = ("sd15_", "sd21_", "sdxl_")
RECIPES = sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(OF_HUB_MODELS)])
def test_shipped_recipes_are_not_odd(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(["--config", name, "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert odd(recipe.model_dump(exclude_unset=True)) == []


def test_a_saved_recipe_is_not_blamed_for_a_default(settings: dict[str, Any], tmp_path: Path) -> None:
    del settings["lr_warmup_steps"]
    (tmp_path / "recipe.yaml").write_text(recipe_text(Recipe(**settings)), encoding="utf-8")
    recipe = load_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert recipe.lr_warmup_steps == 500
    assert odd(recipe.model_dump()) == []


def test_a_run_that_is_over_is_not_warned_of(settings: dict[str, Any]) -> None:
    train(settings, max_train_steps=1)
    assert odd(settings, max_train_steps=1, lr_warmup_steps=7, resume_from_checkpoint="latest") == []
    assert odd(settings, max_train_steps=2, lr_warmup_steps=7, resume_from_checkpoint="latest") != []


def test_bf16_on_a_cpu_without_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(odd_run, "cpu_has_bf16", lambda: False)
    (told,) = odd(settings, mixed_precision="bf16")
    assert "no bfloat16 instructions" in told
    assert told.endswith("use --mixed_precision no.")
    assert odd(settings) == []
    monkeypatch.setattr(odd_run, "cpu_has_bf16", lambda: True)
    assert odd(settings, mixed_precision="bf16") == []


@pytest.mark.parametrize(
    ("content", "has"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_vnni\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd fphp\n", False),
        ("nothing of the kind\n", True),
        (None, True),
    ],
)
def test_what_a_cpu_can_is_read_from_the_system(tmp_path: Path, content: str | None, has: bool) -> None:
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content, encoding="utf-8")
    assert cpu_has_bf16(tmp_path / "cpuinfo") is has


def test_warnings_come_before_the_first_step_and_in_a_dry_run(settings: dict[str, Any]) -> None:
    flags = [*flags_of(settings | {"max_train_steps": 1, "lr_warmup_steps": 3}), "--device", "cpu", "--dry_run"]
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    assert "--lr_warmup_steps 3 has no effect under --lr_scheduler constant" in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-7}, "--learning_rate 1e-07 is not above it: raise it, or use --lr_scheduler linear"),
        ({"lr_warmup_steps": 80}, "no step left after --lr_warmup_steps 80, and the run has 80: use --lr_warmup_steps"),
    ],
)
def test_a_polynomial_schedule_without_room_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as error:
        build(settings, lr_scheduler="polynomial", **changes)
    assert words in str(error.value)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_a_polynomial_schedule_ends_at_its_last_rate(settings: dict[str, Any], optimizer: str) -> None:
    run = build(settings, lr_scheduler="polynomial", optimizer=optimizer)
    assert 1e-3 * run.state.schedule.lr_lambdas[0](80) == pytest.approx(1e-7)
