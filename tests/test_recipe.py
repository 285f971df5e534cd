import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from sd_recipes.commands.inspect import SECTIONS as INSPECT_SECTIONS
from sd_recipes.commands.inspect import read_settings
from sd_recipes.errors import RecipeError
from sd_recipes.flags import NOT_OF_THE_RUN, SHIPPED_RECIPES, build_parser, load_recipe, recipe_text
from sd_recipes.recipe import ONLY_IN_FILES, SECTIONS, Recipe, heading, odd_settings

MINIMAL = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "data"]

# Names and defaults of diffusers' examples/text_to_image/train_text_to_image.py at 58eb52c0 (2026-08-23).
DIFFUSERS_FLAGS = {
    "input_perturbation": 0,
    "pretrained_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "image_column": "image",
    "caption_column": "text",
    "max_train_samples": None,
    "validation_prompts": None,
    "output_dir": "sd-model-finetuned",
    "cache_dir": None,
    "seed": None,
    "resolution": 512,
    "center_crop": False,
    "random_flip": False,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "snr_gamma": None,
    "dream_training": False,
    "dream_detail_preservation": 1.0,
    "use_8bit_adam": False,
    "allow_tf32": False,
    "use_ema": False,
    "offload_ema": False,
    "foreach_ema": False,
    "non_ema_revision": None,
    "dataloader_num_workers": None,  # 0 on a CPU; on a GPU a thread is slower than the model
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "prediction_type": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "mixed_precision": None,
    "report_to": "tensorboard",
    "local_rank": -1,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "enable_xformers_memory_efficient_attention": False,
    "noise_offset": 0,
    "validation_epochs": 5,
    "tracker_project_name": "text2image-fine-tune",
    "image_interpolation_mode": "lanczos",
}


def test_every_flag_of_diffusers_script_has_its_name_and_default() -> None:
    assert len(DIFFUSERS_FLAGS) == 57
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    assert {name: defaults.get(name, "absent") for name in DIFFUSERS_FLAGS} == DIFFUSERS_FLAGS


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 1e-5\nresolution: 256\nrandom_flip: true\nmixed_precision: no\n")
    recipe = load_recipe([*MINIMAL, "--config", str(file), "--resolution", "128", "--no-random_flip"])
    assert (recipe.learning_rate, recipe.resolution, recipe.random_flip) == (1e-5, 128, False)
    assert recipe.train_batch_size == 16
    assert recipe.mixed_precision == "no", "YAML 1.1 reads a bare no as false"


def test_prompts_take_several_values() -> None:
    recipe = load_recipe([*MINIMAL, "--validation_prompts", "a cat", "two dogs", "--use_ema"])
    assert recipe.validation_prompts == ["a cat", "two dogs"]


def test_saved_recipe_gives_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe([*MINIMAL, "--use_8bit_adam", "--snr_gamma", "5", "--validation_prompts", "a: b", "ü"])
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    again = load_recipe(["--config", str(tmp_path / "recipe.yaml")])
    # The alias of the optimizer's name and the file's own path are not settings of the run.
    assert again.model_dump(exclude=NOT_OF_THE_RUN) == recipe.model_dump(exclude=NOT_OF_THE_RUN)
    assert again.optimizer == "adamw8bit"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning_rate", "1"], "nearest: --learning_rate"),
        (["--config", "quickstrat"], "nearest: quickstart"),
        (["--train_data_dir", "x"], "--pretrained_model_name_or_path is missing"),
        (["--pretrained_model_name_or_path", "x"], "--train_data_dir FOLDER or --dataset_name"),
        ([*MINIMAL, "--learning_rate", "fast"], "--learning_rate"),
        ([*MINIMAL, "--train_batch_size", "0"], "--train_batch_size: input should be greater"),
        ([*MINIMAL, "--mixed_precision", "fp8"], "choose from"),
        ([*MINIMAL, "--hub_token", "hf_x"], "hf auth login"),
        ([*MINIMAL, "--unet_config", "u.json"], "add --train_from_scratch"),
        ([*MINIMAL, "--use_8bit_adam", "--optimizer", "sgd"], "--use_8bit_adam contradicts --optimizer sgd"),
        ([*MINIMAL, "--dream_training", "--prediction_type", "v_prediction"], "--dream_training is defined for"),
        ([*MINIMAL, "--tracker_project_name", "../../x"], "becomes a folder's name"),
        ([*MINIMAL, "--report_to", "paper"], "is not one of"),
        ([*MINIMAL, "stray"], "unknown flag stray"),
    ],
)
def test_mistakes_are_named_with_the_way_out(argv: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate' (nearest: learning_rate)"),
        ("resolution: wide", "key resolution of the recipe file"),
        ("- a\n- b", "not a list"),
        ("a: [", "--config"),
        ("mixed_precision: maybe", "key mixed_precision"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe([*MINIMAL, "--config", str(file)])
    assert words in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--dream_training", "--input_perturbation", "0.1"],
        ["--offload_ema"],
        ["--dream_training", "--dream_detail_preservation", "0"],
        ["--dataset_config_name", "small"],
    ],
    ids=lambda flags: flags[0],
)
def test_defect_also_what_runs_in_diffusers_script_is_accepted(flags: list[str]) -> None:
    recipe = load_recipe([*MINIMAL, *flags])
    odd = odd_settings(recipe)
    assert len(odd) == (recipe.dream_detail_preservation > 0), "said, but for an exponent of no harm"
    assert all(flags[0] in words for words in odd)
    assert odd_settings(load_recipe([*MINIMAL, "--use_ema", "--offload_ema", "--dream_training"])) == []


@pytest.mark.parametrize(
    ("key", "value"), [("train_split", "test"), ("dataset_revision", "abc"), ("dataset_config_name", "small")]
)
def test_defect_32_settings_that_data_sources_leave_unread_are_mistakes(tmp_path: Path, key: str, value: str) -> None:
    model = ["--pretrained_model_name_or_path", "some/model"]
    file = tmp_path / "recipe.yaml"
    sources = f"data_sources:\n  - dataset_name: a/b\n    {key}: {value}\n  - dataset_name: c/d\n"
    file.write_text(sources)
    recipe = load_recipe([*model, "--config", str(file)])
    assert getattr(recipe.sources[0], key) == value
    with pytest.raises(RecipeError, match=rf"^--{key} {value} is not read with data_sources of the recipe file"):
        load_recipe([*model, "--config", str(file), f"--{key}", value])
    file.write_text(f"{key}: {value}\n{sources}")
    with pytest.raises(RecipeError, match=rf"--{key} {value} is not read"):
        load_recipe([*model, "--config", str(file)])
    file.write_text(recipe_text(recipe))  # which names all settings, at their defaults
    assert load_recipe(["--config", str(file)]).sources == recipe.sources


def test_defect_32_a_revision_of_a_folder_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"^--train_data_dir data has no revisions: drop --dataset_revision$"):
        load_recipe([*MINIMAL, "--dataset_revision", "abc"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resolution: 64\nseed: 1\n'resolution': 128\n", "key resolution is on line 1 and again on line 3: drop one"),
        ("seed: 1\nseed: 1\n", "key seed is on line 1 and again on line 2"),
        ("data_sources:\n- dataset_name: a\n  weight: 1\n  dataset_name: b\n",
         "key dataset_name is on line 2 and again on line 4"),
        ("data_sources: [{train_data_dir: a,\n weight: 1, weight: 2}]\n",
         "key weight is on line 2 and again on line 2"),
    ],
)  # fmt: skip
def test_defect_32_a_key_stands_once_in_a_recipe_file(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(["--pretrained_model_name_or_path", "some/model", "--config", str(file)])
    assert str(error.value) == f"--config {file}: {words}" + ("" if "drop one" in words else ": drop one")


def test_defect_32_anchors_and_merges_are_no_repetitions(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data_sources:\n- &first\n  dataset_name: a\n  weight: 3\n- <<: *first\n  dataset_name: b\n")
    recipe = load_recipe(["--pretrained_model_name_or_path", "some/model", "--config", str(file)])
    assert [(source.dataset_name, source.weight) for source in recipe.sources] == [("a", 3), ("b", 3)]


@pytest.mark.parametrize("path", sorted(SHIPPED_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(["--config", path.stem])
    head = path.read_text().split("pretrained_model_name_or_path:")[0]
    assert f"--config {path.stem}" in head
    assert "Hardware:" in head
    assert recipe.output_dir.startswith("runs/")
    defaults = Recipe.model_fields
    repeated = [key for key, value in yaml.safe_load(path.read_text()).items() if value == defaults[key].default]
    assert repeated == [], "a recipe says only what differs from the defaults"


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_config_is_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1


def test_mistakes_are_answered_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['x', '--lerning_rate', '1']\n"
        "import train_text_to_image as script\n"
        "try: script.main()\n"
        "except SystemExit as error: print(error.code)\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    reply = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reply.stdout == "2\nFalse False\n"
    assert "nearest: --learning_rate" in reply.stderr


def test_help_is_grouped_by_section() -> None:
    reply = subprocess.run(
        [sys.executable, "train_text_to_image.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for title in ("Run and output:", "Model:", "Data:", "Objective:", "Optimization:", "Checkpoints:", "Hub:"):
        assert title in reply.stdout
    assert "--learning_rate RATE" in reply.stdout


COMMANDS = {
    "train_text_to_image.py": ["train_text_to_image.py"],
    "sd-recipes train": ["-m", "sd_recipes.commands.cli", "train"],
    "sd-recipes cache": ["-m", "sd_recipes.commands.cli", "cache"],
    "sd-recipes inspect": ["-m", "sd_recipes.commands.cli", "inspect"],
}


@pytest.mark.parametrize("prog", COMMANDS)
def test_help_begins_with_what_one_types_and_examples_that_are_accepted(prog: str) -> None:
    reply = subprocess.run(
        [sys.executable, *COMMANDS[prog], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = reply.stdout.splitlines()
    assert lines[0] == f"usage: {prog} [--config RECIPE] [--FLAG VALUE ...]"
    assert lines[1] == ""
    head = reply.stdout.split("`--help GROUP`")[0].replace("\\\n", " ")
    examples = [line.split(f"{prog} ")[1] for line in head.splitlines()[1:] if f"{prog} --" in line]
    assert len(examples) == 2
    for example in examples:
        (read_settings if prog.endswith("inspect") else load_recipe)(shlex.split(example))


@pytest.mark.parametrize("sections", [SECTIONS, INSPECT_SECTIONS], ids=["train", "inspect"])
def test_every_group_of_flags_has_a_title_and_a_sentence(sections: tuple, capsys: pytest.CaptureFixture) -> None:
    build_parser(sections).print_help()
    told = capsys.readouterr().out
    for section in sections:
        title, description = heading(section)
        assert re.fullmatch(r"[A-Z][A-Za-z ]+", title)
        assert re.fullmatch(r"[A-Z].{10,76}\.", description)
        assert f"\n{title}:\n  {description}\n" in told


def test_help_shows_one_group_alone(capsys: pytest.CaptureFixture) -> None:
    for section in SECTIONS:
        title, _ = heading(section)
        for name in ([title], title.upper().split(), [title.lower()]):
            with pytest.raises(SystemExit) as leaving:
                load_recipe(["--help", *name])
            assert not leaving.value.code
            told = capsys.readouterr().out
            assert told.startswith(f"{title}:\n")
            shown = set(re.findall(r"^  --(\w+)", told, re.MULTILINE))
            assert shown == set(section.model_fields) - ONLY_IN_FILES
    with pytest.raises(RecipeError, match=r"--help optimisation: no such group of flags \(nearest: optimization\)"):
        load_recipe(["--help", "optimisation"])


def test_help_is_given_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from sd_recipes.commands.cli import main\n"
        "for command in ('train', 'cache', 'inspect'):\n"
        "    sys.argv = ['sd-recipes', command, '--help', 'data']\n"
        "    try: main()\n"
        "    except SystemExit as leaving: print('left with', leaving.code or 0)\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules, 'datasets' in sys.modules)"
    )
    reply = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reply.stdout.count("Data:\n") == reply.stdout.count("left with 0") == 3
    assert reply.stdout.splitlines()[-1] == "False False False"


@pytest.mark.parametrize(("given", "read"), [("4", 4), ("auto", "auto")])
def test_a_micro_batch_is_a_number_or_auto(given: str, read: int | str) -> None:
    assert load_recipe(["--config", "quickstart", "--micro_batch", given]).micro_batch == read


@pytest.mark.parametrize("given", ["0", "2.5", "all"])
def test_another_micro_batch_is_refused(given: str) -> None:
    with pytest.raises(RecipeError, match=rf"^--micro_batch: give a number from 1, or auto \(it is '{given}'\)$"):
        load_recipe(["--config", "quickstart", "--micro_batch", given])


def test_a_micro_batch_larger_than_the_batch_is_told() -> None:
    given = ["--config", "quickstart", "--train_batch_size", "2", "--micro_batch"]
    assert odd_settings(load_recipe([*given, "2"])) == []
    (told,) = odd_settings(load_recipe([*given, "3"]))
    assert told == "--micro_batch 3 does nothing, for a batch has --train_batch_size 2 images."
    assert load_recipe([*given, "3"]).images_at_once == load_recipe([*given, "auto"]).images_at_once == 2
