"""Prior preservation: class pictures beside the trained ones, which teach themselves, or what the model knew."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from launching import finish, flags_of, start, torchrun
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_image_folder
from training_runs import assert_equal, assert_leaves_as_it_came, build, fit_from, train, weights

from sd_recipes.commands.cache import fill_cache
from sd_recipes.commands.train import show
from sd_recipes.data.class_rows import CLASS_POSITIONS, ClassRows
from sd_recipes.data.order import MicroBatch, Order, plans_of_order
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.class_pictures import draw_class_pictures
from sd_recipes.memory.plan import plan_memory
from sd_recipes.memory.step import FROZEN
from sd_recipes.model.conditioning import unet_arguments
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import forget_accelerator, start_accelerator
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.loop import backward
from sd_recipes.training.run import Run

MODEL = {"prior_preservation": "model"}


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Five pictures of two shapes, without captions."""
    folder = tmp_path / "class"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(5):
        pixels = rng.integers(0, 256, (32, 64 if number % 2 else 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def prior(settings: dict[str, Any], class_folder: Path) -> dict[str, Any]:
    return {
        **settings, "class_data_dir": str(class_folder), "class_prompt": "a disc", "train_batch_size": 2,
        "max_train_steps": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ which comes when


def plans_of(rank: int, world_size: int, micro_batch_size: int, start: int = 0) -> list[MicroBatch]:
    """A process's micro-batches of two epochs, of ten rows in global batches of four, with four class pictures."""
    buckets = np.array([0] * 11 + [1] * 3)
    beside = ClassRows(10, 4, 3, 0.5, ((32, 32), (32, 64)), buckets).beside
    place = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
    found = []
    for plan in plans_of_order(Order((10,), 4, 3), start, **place, beside=beside):
        found.append(plan)
        if plan.is_last and plan.samples_seen == 20:
            break
    return found


def samples_in(plans: list[MicroBatch]) -> list[tuple[Any, ...]]:
    """(position, row, stratum, size, weight) of every class picture."""
    return [
        (*each, plan.size, plan.weight)
        for plan in plans
        if plan.is_class and plan.weight
        for each in zip(plan.positions.tolist(), plan.rows.tolist(), plan.strata.tolist(), strict=True)
    ]


def test_a_class_picture_comes_beside_every_sample() -> None:
    """None twice before all have come; of its own size; with draws of its own; the step ends after it."""
    plans = plans_of(0, 1, 4)
    found = sorted(samples_in(plans))
    assert [position - CLASS_POSITIONS for position, *_ in found] == list(range(20))
    rows = [row for _, row, *_ in found]
    assert all(sorted(rows[begin : begin + 4]) == [10, 11, 12, 13] for begin in range(0, 20, 4))
    assert len({tuple(rows[begin : begin + 4]) for begin in range(0, 20, 4)}) > 1
    assert {(row, size) for _, row, _, size, _ in found} == {(10, (32, 32)), *((row, (32, 64)) for row in (11, 12, 13))}
    assert {weight for *_, weight in found} == {0.5}
    assert [plan.is_class for plan in plans if plan.is_last] == [True] * 6
    assert [plan.samples_seen for plan in plans if plan.is_last] == [4, 8, 10, 14, 18, 20]
    assert [plan.global_batch_size for plan in plans if plan.is_last] == [4, 4, 2] * 2


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (2, 1), (3, 4)])
def test_neither_processes_nor_micro_batches_change_it(world_size: int, micro_batch_size: int) -> None:
    of_ranks = [plans_of(rank, world_size, micro_batch_size) for rank in range(world_size)]
    assert sorted(sample for plans in of_ranks for sample in samples_in(plans)) == sorted(samples_in(plans_of(0, 1, 4)))
    assert len({tuple(plan.is_last for plan in plans) for plans in of_ranks}) == 1, "as many on every process"


def test_it_goes_on_where_it_stood() -> None:
    later = samples_in(plans_of(0, 1, 4, start=8))
    assert later == [each for each in samples_in(plans_of(0, 1, 4)) if each[0] >= CLASS_POSITIONS + 8]


def test_when_all_of_them_have_come() -> None:
    """Not as soon as there were as many samples: parts of two permutations may leave some out."""
    class_rows = ClassRows(10, 4, 3, 0.5, ((32, 32),), None)
    steps = itertools.islice(Order((10,), 1, 3).batches_from(0), 12)
    rows = [int(class_rows.beside(step)[0].rows[0]) for step in steps]
    for first in range(9):
        for end in range(first, 13):
            has_a_permutation = any(first <= begin and begin + 4 <= end for begin in (0, 4, 8))
            assert class_rows.all_come_beside(range(first, end)) == has_a_permutation
            assert set(rows[first:end]) == {10, 11, 12, 13} or not has_a_permutation


# ------------------------------------------------------------------------------------------ training


def first_loss(settings: dict[str, Any], **changes: Any) -> float:
    """The loss of a run's first step."""
    run = build(settings, **changes)
    loss, usable = backward(next(iter(run.batches(0, 1))), run.model, None, run.accelerator)
    assert usable == 1
    return loss.item()


def test_the_loss_is_that_of_both_with_the_weight(prior: dict[str, Any]) -> None:
    """Linear in the weight; without class pictures it is what is left at weight 0. Captions are the class's."""
    one, two, five = (first_loss(prior, prior_loss_weight=weight) for weight in (1.0, 2.0, 5.0))
    of_class = two - one
    assert of_class > 0.1
    assert five - two == pytest.approx(3 * of_class, rel=1e-4)
    alone = first_loss(prior, class_data_dir=None, class_prompt=None)
    assert one - of_class == pytest.approx(alone, rel=1e-4)
    run = build(prior)
    *_, batch = next(iter(run.batches(0, 1)))
    assert run.model.components.tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == ["a disc"] * 2


def gradient_of(run: Run, samples: list[bool], class_pictures: list[bool]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of a run's first step in which these of its samples, and of its class pictures, are usable."""
    step = next(iter(run.batches(0, 1)))
    assert [len(batch.weights) for batch in step] == [2, 2]
    for batch, usable in zip(step, (samples, class_pictures), strict=True):
        batch.weights.mul_(torch.tensor(usable))
    parts = [part for batch in step for part in batch.in_parts_of(1)]  # as accumulated ones are
    loss, part = backward(parts, run.model, None, run.accelerator)
    found = {name: each.grad / part for name, each in run.state.parameters.items() if each.grad is not None}
    run.state.optimizer.zero_grad()
    return loss.item() / part, found


@pytest.mark.parametrize("usable", [0, 1])
def test_bad_rows_of_one_kind_leave_the_other_as_it_is(prior: dict[str, Any], usable: int) -> None:
    """The mean over the usable samples plus the weight times that over usable class pictures; of none it is 0."""
    run = build(prior, prior_loss_weight=0.5)
    none, one, other, both = [False] * 2, [True, False], [False, True], [True] * 2
    alone = {kind: gradient_of(run, kind, none) for kind in map(tuple, (one, other, both))}
    of_class = {kind: gradient_of(run, none, kind) for kind in map(tuple, (one, other, both))}
    few = one if usable else none
    for samples, class_pictures in ((both, few), (few, both), (one, one)):
        loss, found = gradient_of(run, samples, class_pictures)
        parts = [each[tuple(kind)] for each, kind in ((alone, samples), (of_class, class_pictures)) if any(kind)]
        assert loss == pytest.approx(sum(part for part, _ in parts), rel=1e-5)
        for name, value in found.items():
            expected = torch.stack([gradient[name] for _, gradient in parts]).sum(0)
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
    for kinds in (alone, of_class):
        losses = {kind: loss for kind, (loss, _) in kinds.items()}
        assert losses[tuple(both)] == pytest.approx((losses[tuple(one)] + losses[tuple(other)]) / 2, rel=1e-5)


def first_step(settings: dict[str, Any], **changes: Any) -> Run:
    """A run after the passes of its first step."""
    run = build(settings, **changes)
    backward(next(iter(run.batches(0, 1))), run.model, None, run.accelerator)
    return run


ALONE = {"class_data_dir": None, "class_prompt": None}


def test_the_uncertainty_is_learned_from_the_samples_alone(prior: dict[str, Any]) -> None:
    """As without class pictures, whose losses it divides as well."""
    gradients = []
    for changes in ({}, ALONE):
        weight = first_step(prior, learned_uncertainty=True, **changes).state.parts["uncertainty"].module.weight
        assert weight.grad.abs().max() > 0.01
        gradients.append(weight.grad)
    assert torch.equal(*gradients)

    run = build(prior, learned_uncertainty=True)
    none, both = [False] * 2, [True] * 2
    loss, gradient = gradient_of(run, none, both)
    assert not gradient["uncertainty/weight"].any()
    with torch.no_grad():
        run.state.parts["uncertainty"].module.weight[0] = np.log(4)  # u at every timestep
    divided_loss, divided_gradient = gradient_of(run, none, both)
    assert divided_loss == pytest.approx(loss / 4 + np.log(4), rel=1e-5)
    of_unet = [name for name in gradient if name.startswith("unet")]
    assert len(of_unet) > 10
    for name in of_unet:
        torch.testing.assert_close(divided_gradient[name], gradient[name] / 4, rtol=1e-4, atol=1e-7)


def test_the_errors_by_timestep_are_of_the_samples_alone(
    prior: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without class pictures, whose losses they weight as well."""
    both, alone = (first_step(prior, timesteps_by_error=True, **changes) for changes in ({}, ALONE))
    assert both.state.timestep_errors is not None
    assert alone.state.timestep_errors is not None
    assert both.state.timestep_errors.of_step[1].sum() == 2
    assert torch.equal(both.state.timestep_errors.of_step, alone.state.timestep_errors.of_step)

    run = build(prior, timesteps_by_error=True)
    loss, _ = gradient_of(run, [False] * 2, [True] * 2)
    monkeypatch.setattr(run.state.timestep_errors, "weights", lambda timesteps: torch.full(timesteps.shape, 3.0))
    assert gradient_of(run, [False] * 2, [True] * 2)[0] == pytest.approx(3 * loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {**MODEL, "lora_rank": 2}], ids=["pictures", "model"])
def test_resuming_caching_and_splitting(prior: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """To the bit; fewer images at once, up to the order of summation."""
    prior |= {
        "center_crop": True, "cache_latents": "disk", "aspect_ratio_buckets": True, "bucket_step": 32, "max_upscale": 3,
        "max_train_steps": 3, "optimizer": "sgd", **changes,
    }  # fmt: skip
    whole = weights(train(prior, output_dir=str(tmp_path / "whole")))
    train(prior, max_train_steps=1, checkpointing_steps=1)
    assert_equal(weights(train(prior, resume_from_checkpoint="latest")), whole)
    cached = {"latent_cache_dir": str(tmp_path / "whole" / "latents"), "output_dir": str(tmp_path / "cached")}
    assert_equal(weights(train(prior, **cached)), whole)
    split = weights(train(prior, micro_batch=1, output_dir=str(tmp_path / "split")))
    assert all(torch.allclose(split[name], whole[name], atol=1e-5) for name in whole)


def test_more_class_pictures_than_an_epoch_shows_are_all_kept(
    prior: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows and 24 class pictures, of which the third epoch shows the last: the VAE rests from there on."""
    for number in range(5, 24):
        pixels = np.full((32, 32, 3), 10 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(Path(prior["class_data_dir"]) / f"{number}.png")
    run = build(prior, cache_latents="disk", center_crop=True, train_batch_size=4, max_train_steps=10)
    encoded: list[int] = []
    rested: list[int] = []
    encode, rest = run.model.encoder.encode, run.model.encoder.rest
    monkeypatch.setattr(run.model.encoder, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(
        run.model.encoder, "rest", lambda: rested.append(run.state.progress.samples_seen // 8) or rest()
    )
    fit_from(run)
    assert sum(encoded) == 8 + 24
    assert rested == [3, 4, 5]


def test_their_arithmetic_counts(prior: dict[str, Any]) -> None:
    """A step of two pictures and two class pictures."""
    run = train(prior, profile_steps=1)
    figures = read_metrics(run.output_dir / "metrics.jsonl")[-1]
    assert run.model.utilisation is not None
    assert run.model.utilisation.flops
    per_second = 2 * figures["images_per_second"] * run.model.utilisation.flops / 1e12
    assert figures["teraflops"] == pytest.approx(per_second, rel=1e-6)


@pytest.mark.parametrize("buckets", [{}, {"aspect_ratio_buckets": True, "bucket_step": 32}], ids=["square", "buckets"])
def test_the_cache_command_encodes_class_pictures_too(prior: dict[str, Any], buckets: dict[str, Any]) -> None:
    prior |= {"center_crop": True, "cache_latents": "disk", "mixed_precision": "no", **buckets}
    forget_accelerator()
    fill_cache(Recipe(**prior))
    step = next(iter(build(prior).batches(0, 1)))
    assert [len(batch.to_encode) for batch in step] == [0] * len(step)


def test_a_bad_class_picture_is_a_bad_row(prior: dict[str, Any]) -> None:
    (Path(prior["class_data_dir"]) / "3.png").write_bytes(b"")
    run = build(prior, max_bad_rows=1, train_batch_size=8)
    step = next(iter(run.batches(0, 1)))
    (bad,) = {name for batch in step for name, _ in batch.bad}
    assert bad == f"row 11 ({prior['class_data_dir']}/3.png)"
    fit_from(run)
    assert all(value.isfinite().all() for value in run.model.components.unet.parameters())


def test_the_class_prompt_is_a_caption_by_any_name(prior: dict[str, Any], tmp_path: Path) -> None:
    """Where the other rows have theirs in a column of another name."""
    lines = (Path(prior["train_data_dir"]) / "metadata.jsonl").read_text().replace('"text"', '"words"')
    table = tmp_path / "words.jsonl"
    table.write_text(lines)
    named = {"train_data_dir": None, "dataset_name": str(table), "image_root": prior["train_data_dir"]}
    run = build({**prior, **named}, caption_column="words")
    assert run.data.rows is not None
    assert run.data.rows["words"] == [*(f"disc number {number}" for number in range(8)), *["a disc"] * 5]


def test_class_pictures_are_not_part_of_an_epoch(prior: dict[str, Any]) -> None:
    run = build(prior, max_train_steps=None, num_train_epochs=2, validation_split="2")
    assert run.num_steps == 6, "of six rows, in batches of two"
    assert run.data.num_rows == 6
    assert run.data.rows is not None
    assert len(run.data.rows) == 11
    assert run.data.held_out is not None
    assert len(run.data.held_out) == 2


@pytest.mark.parametrize("of", ["split", "folder"])
def test_no_class_picture_is_held_out(prior: dict[str, Any], tmp_path: Path, of: str) -> None:
    """Of a split of the data, or of a folder of its own."""
    held_out = build_image_folder(tmp_path / "data" / "test")
    (tmp_path / "data" / "train").symlink_to(prior["train_data_dir"])
    split = "test" if of == "split" else str(held_out)
    run = build(prior, train_data_dir=str(tmp_path / "data"), follow_links=True, validation_split=split)
    assert run.data.held_out is not None
    assert run.data.watched is not None
    assert len(run.data.held_out) == len(run.data.watched) == 8
    for rows in (run.data.held_out, run.data.watched):
        assert not any("class" in Path(image["path"]).parts for image in rows.rows["image"])


def test_the_quiet_loss_is_of_the_samples(prior: dict[str, Any]) -> None:
    """And so are the rows that were hardest to learn."""
    run = train(prior, max_train_steps=4)
    assert 7 < run.state.quiet_loss.running.running[1].sum() <= 8, "four steps of two, of which old ones count less"
    row_losses = run.state.quiet_loss.row_losses
    assert row_losses is not None
    assert row_losses.counts[8:].sum() == 0


# ------------------------------------------------------------------------------------------ the model as it was


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 2, "lora_dropout": 0.5}, {"train_text_encoder": True}],
    ids=["whole", "lora", "text"],
)
def test_it_predicts_as_before_training(prior: dict[str, Any], changes: dict[str, Any]) -> None:
    """What it teaches stays, while the model moves away from it; at first there is nothing to learn from it."""
    run = build(prior, learning_rate=0.05, max_grad_norm=0.0, max_train_steps=2, **MODEL, **changes)
    *_, batch = next(iter(run.batches(0, 1)))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)

    def predicted_by(predict: Any) -> torch.Tensor:
        return predict(noisy, batch.timesteps)

    def trained(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        run.model.components.unet.eval()
        states = run.model.encode_text(batch.input_ids)
        conditioning = run.model.family.conditioning(states, batch)
        found = run.model.unet(noisy, timesteps, **unet_arguments(conditioning), return_dict=False)[0].detach()
        run.model.components.unet.train()
        return found

    assert run.model.frozen is not None

    def base(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return run.model.frozen.predict(batch, noisy, timesteps)

    before = predicted_by(base)
    torch.testing.assert_close(before, predicted_by(trained), atol=1e-5, rtol=1e-4)
    fit_from(run)
    assert torch.equal(before, predicted_by(base))
    assert not torch.allclose(before, predicted_by(trained), atol=1e-3)


def test_what_is_frozen_of_a_lora_stays_so(prior: dict[str, Any]) -> None:
    """Each prediction of the model as it was switches the LoRA off and on; frozen layers are still not trained."""
    groups = [{"pattern": "*lora_A*", "learning_rate": 0}]
    prior |= {"lora_rank": 2, "param_groups": groups, "checkpointing_steps": 1, **MODEL}
    first = build(prior)
    before = weights(first)
    fit_from(first)
    after = weights(train(prior, max_train_steps=2, resume_from_checkpoint="latest"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_B." in name}
    needs_gradient = {name for name, each in first.model.components.unet.named_parameters() if each.requires_grad}
    assert needs_gradient == moved


@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_xl_pipeline"])
def test_what_it_teaches_is_its_prediction(
    prior: dict[str, Any], pipeline: str, request: pytest.FixtureRequest
) -> None:
    """At first there is nothing to learn from class pictures, whatever their weight."""
    model = str(request.getfixturevalue(pipeline))
    prior |= {"lora_rank": 2, "pretrained_model_name_or_path": model, **MODEL}
    assert first_loss(prior) == first_loss(prior, prior_loss_weight=10.0)


def test_the_plan_counts_its_copy(prior: dict[str, Any]) -> None:
    """A second UNet, in the run's precision; with a LoRA there is none."""

    def frozen(**changes: Any) -> int:
        return plan_memory(Recipe(**{**prior, "mixed_precision": "bf16", **changes}), "cuda").by_kind[FROZEN]

    run = build(prior, lora_rank=2, **MODEL)
    assert run.model.frozen is not None
    assert run.model.frozen.copies == ()
    unet = run.model.components.unet.num_parameters()
    assert 1.9 * unet <= frozen(**MODEL) - frozen() <= 2.1 * unet, "the LoRA's own are few"


# ------------------------------------------------------------------------------------------ pictures that it draws


def draw(settings: dict[str, Any], **changes: Any) -> dict[str, bytes]:
    """The class pictures after what is missing was drawn."""
    forget_accelerator()
    recipe = Recipe(**{**settings, **changes})
    draw_class_pictures(recipe, start_accelerator(recipe))
    return {path.name: path.read_bytes() for path in sorted(Path(settings["class_data_dir"]).glob("*.png"))}


def test_what_is_missing_is_drawn(prior: dict[str, Any], tmp_path: Path) -> None:
    """Once; each by its number, so that one that was lost comes again as it was."""
    prior |= {"class_data_dir": str(tmp_path / "drawn"), "validation_inference_steps": 2, "num_class_images": 3}
    found = draw(prior)
    assert list(found) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert len(set(found.values())) == 3
    with Image.open(tmp_path / "drawn" / "class-00000.png") as picture:
        assert picture.size == (32, 32)
    (tmp_path / "drawn" / "class-00001.png").unlink()
    assert draw(prior) == found
    assert draw(prior, num_class_images=2) == found


def test_a_dry_run_draws_nothing(prior: dict[str, Any], tmp_path: Path, capsys: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "none"
    recipe = Recipe(**{**prior, "class_data_dir": str(folder), "num_class_images": 9, "dry_run": True})
    forget_accelerator()
    show(recipe, start_accelerator(recipe))
    assert f"9 class pictures are missing in {folder}: a run draws them first." in caplog.text
    assert not folder.exists()
    capsys.readouterr()
    recipe = Recipe(**{**prior, "dry_run": True, **MODEL})
    forget_accelerator()
    show(recipe, start_accelerator(recipe))
    told = capsys.readouterr().out
    assert f"--class_data_dir {prior['class_data_dir']}: a folder of 5 pictures" in told
    assert (
        "class pictures: one beside each trained picture, its loss times 1, towards what the model predicted before "
        "training" in told
    )


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_data_dir": None}, "--class_prompt is of class pictures, and there is no folder for them"),
        ({"class_prompt": None, "num_class_images": 5}, "--num_class_images 5 are drawn by a caption: add"),
        ({"prior_loss_weight": 0}, "prior_loss_weight"),
        ({"streaming": True, "max_train_steps": 1}, "class pictures (--class_data_dir, is_reg) come beside"),
        ({"fused_backward_pass": True, "max_grad_norm": 0}, "--fused_backward_pass steps within one backward pass"),
        ({"train_from_scratch": True, **MODEL}, "--prior_preservation model needs what the model knows before it is"),
        ({"train_from_scratch": True, "num_class_images": 3}, "--num_class_images 3 needs what the model knows before"),
        ({"rescale_betas_zero_snr": True, **MODEL}, "--prior_preservation model asks the model as it was, which does"),
        ({"compile": "graphs", "lora_rank": 2, **MODEL}, "are predictions of the same UNet: use --compile unet"),
        (
            {"class_data_dir": None, "class_prompt": None, "prior_loss_weight": 0.5},
            "--prior_loss_weight 0.5 is of class pictures, and there are none: add --class_data_dir, or drop it",
        ),
        (
            {"train_data_dir": None, "data_sources": [{"train_data_dir": "x", "is_reg": True}]},
            "all data_sources hold class pictures (is_reg)",
        ),
        (
            {"train_data_dir": None, "data_sources": [
                {"train_data_dir": "x"}, {"train_data_dir": "y", "is_reg": True, "weight": 2},
            ]},
            "the weight 2 of --train_data_dir y is not read",
        ),
    ],
)  # fmt: skip
def test_mistakes(prior: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe(**{**prior, **changes})


def test_graphs_may_be_replayed_beside_a_teacher_that_has_a_unet_of_its_own(prior: dict[str, Any]) -> None:
    assert Recipe(**prior, compile="graphs", **MODEL).compile == "graphs"
    assert Recipe(**prior, compile="unet", lora_rank=2, **MODEL).compile == "unet"


def test_mistakes_about_the_model_and_the_folder(prior: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"own predictions as targets, which are epsilon and not v_prediction: drop"):
        build(prior, prediction_type="v_prediction", **MODEL)
    with pytest.raises(RecipeError, match=r"--class_data_dir .*nowhere: no such file or folder"):
        build(prior, class_data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match=r"--class_data_dir .* pictures and no captions for them"):
        build(prior, class_prompt=None)
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"--class_data_dir .*file is no folder: choose another"):
        draw({**prior, "class_data_dir": str(file)}, num_class_images=3)


# ------------------------------------------------------------------------------------------ the script


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {**MODEL, "lora_rank": 2}], ids=["pictures", "model"])
def test_two_processes_are_one_and_draw_once(
    prior: dict[str, Any], tmp_path: Path, tiny_pipeline: Path, changes: dict[str, Any]
) -> None:
    """From the first class picture to a pipeline, or a LoRA, that stock diffusers loads and draws with."""
    prior |= {
        "class_data_dir": str(tmp_path / "drawn"), "num_class_images": 3, "validation_inference_steps": 2,
        "optimizer": "sgd", "learning_rate": 0.01, "max_train_steps": 3, "train_batch_size": 1, "max_bad_rows": 8,
        **changes,
    }  # fmt: skip
    draw(prior)
    (tmp_path / "drawn" / "class-00001.png").write_bytes(b"")  # a bad row, of which one process alone knows
    finish(start(torchrun(2), *flags_of(prior)))
    assert len(list((tmp_path / "drawn").iterdir())) == 3
    one = {"train_batch_size": 2, "output_dir": str(tmp_path / "one")}
    finish(start(torchrun(1), *flags_of({**prior, **one})))
    file = LORA_FILE if changes else f"unet/{UNET_WEIGHTS}"
    by_one, by_two = (load_file(tmp_path / name / file) for name in ("one", "run"))
    assert all(torch.allclose(by_one[name], by_two[name], atol=1e-5) for name in by_one)
    if not changes:
        assert_leaves_as_it_came(tmp_path / "run", tiny_pipeline)
        return
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(tmp_path / "run")
    assert pipeline("a disc", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)
