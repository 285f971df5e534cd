"""Secrets stay where they were given: none in what a run writes, says, logs or pushes."""

from __future__ import annotations

import logging
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback_hub import LoopbackHub
from pydantic import ValidationError
from test_hub import shard
from tiny_models import build_image_folder
from training_runs import forget_accelerator

from sd_recipes.checkpoints.resume import compare_settings
from sd_recipes.commands.cli import train as main
from sd_recipes.commands.inspect import main as inspect
from sd_recipes.errors import RecipeError
from sd_recipes.flags import build_recipe, is_resolved_recipe, load_recipe, read_recipe_file, recipe_text
from sd_recipes.recipe import DataSource, Recipe
from sd_recipes.redaction import LEFT_OUT, redacted, without_folders
from sd_recipes.runtime.console import RedactedRecord, say

PASSWORD = "open-sesame"
SHAPES = {
    "signature": "https://host.test/a.parquet?X-Amz-Signature={}&x=1",
    "token": "see hf_{}{}",
    "header": "Authorization: Bearer {}{}",
}


def holds_text(annotation: Any) -> bool:
    """Whether a field of that type can hold any text: not a choice among given ones."""
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return annotation in (str, DataSource) or any(map(holds_text, typing.get_args(annotation)))


CHECKED_BEFORE = {"optimizer", "optimizer_kwargs"}  # whatever else is wrong with what they are given
ALSO_CALLED = {"pretrained_vae_model_name_or_path": "vae"}
TEXT_FIELDS = [name for name, field in Recipe.model_fields.items() if holds_text(field.annotation)]
BASE = {"pretrained_model_name_or_path": "a", "train_data_dir": "b", "train_from_scratch": True, "report_to": "none"}


def planted(name: str, text: str) -> dict[str, Any]:
    """Settings with that text in a field."""
    annotation = Recipe.model_fields[name].annotation
    if name == "data_sources":
        return {**BASE, "train_data_dir": None, name: [{"dataset_name": "c"}, {"dataset_name": text}]}
    is_list = any(typing.get_origin(part) is list for part in (annotation, *typing.get_args(annotation)))
    return {**BASE, name: [text] if is_list else text}


def test_the_fields_with_text_are_found() -> None:
    assert len(TEXT_FIELDS) > 25
    assert {"output_dir", "dataset_name", "data_sources", "validation_prompts", "caption_columns"} <= set(TEXT_FIELDS)
    assert not {"seed", "lr_scheduler", "learning_rate", "streaming"} & set(TEXT_FIELDS)


@pytest.mark.parametrize("name", TEXT_FIELDS)
def test_defect_29_a_password_in_an_address_is_refused_and_not_told(name: str) -> None:
    for address in (
        f"https://someone:{PASSWORD}@host.test/a.parquet",
        f"https://{PASSWORD}@host.test/a",
        f"s3://KEY:{PASSWORD}/2@bucket/a",
        f"hf://someone:{PASSWORD}@datasets/a/b",
        f"zip://*.png::https://someone:{PASSWORD}@host.test/a.zip",
    ):
        settings = planted(name, address)
        with pytest.raises(ValidationError) as refused:
            Recipe(**settings)
        assert PASSWORD not in str(refused.value) + repr(refused.value)
        with pytest.raises(RecipeError, match=None if name in CHECKED_BEFORE else "netrc") as told:
            build_recipe(settings)
        assert f"--{ALSO_CALLED.get(name, name)}" in str(told.value)
        assert PASSWORD not in str(told.value) + repr(told.value)
    for fine in ("hf://datasets/a/b@main/c", "https://host.test:8080/a@1", "zip://*.png::https://host.test/a@b.zip"):
        assert name != "dataset_name" or Recipe(**planted(name, fine)).dataset_name == fine


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", TEXT_FIELDS)
def test_defect_29_a_secret_in_any_field_is_not_written_down(name: str, shape: str, tmp_path: Path) -> None:
    text = shape.format(PASSWORD.replace("-", ""), "123456")
    secret = PASSWORD.replace("-", "")
    try:
        recipe = Recipe(**planted(name, text))
    except ValidationError:  # such as hub_token
        with pytest.raises(ValidationError) as refused:
            Recipe(**planted(name, text))
        with pytest.raises(RecipeError) as told:
            build_recipe(planted(name, text))
        assert secret not in str(refused.value) + repr(refused.value) + str(told.value)
        return
    name = ALSO_CALLED.get(name, name)
    for written in (recipe_text(recipe), recipe_text(recipe, shared=True)):
        assert secret not in written
        is_of_the_run = name in yaml.safe_load(written)
        assert (LEFT_OUT in written) == is_of_the_run
        assert not is_of_the_run or f"Set again: {'' if name == 'data_sources' else '--'}{name}" in written
    if not is_of_the_run:
        return
    # A file with something left out is none without it, and is the same run with it.
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(recipe))
    assert is_resolved_recipe(path)
    settings = read_recipe_file(str(path))
    with pytest.raises(RecipeError, match="was not written down: give the whole value"):
        build_recipe(settings)
    again = build_recipe({**settings, name: planted(name, text)[name]})
    assert again == recipe


def test_defect_29_a_new_signature_is_no_change_for_a_resumed_run(caplog: pytest.LogCaptureFixture) -> None:
    from test_format_and_saver import contents

    manifest = contents(2).manifest
    before = Recipe(**planted("caption_column", "https://host.test/a?sig=one"))
    now = Recipe(**planted("caption_column", "https://host.test/a?sig=two"))
    from sd_recipes.flags import written_settings

    manifest.settings = written_settings(before)
    assert "one" not in str(manifest.settings["caption_column"])
    compare_settings(now, manifest, "checkpoint-2")
    assert caplog.records == []
    compare_settings(now.model_copy(update={"caption_column": "https://host.test/b?sig=two"}), manifest, "checkpoint-2")
    assert "--caption_column is https://host.test/b" in caplog.text


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What main() sets for its whole process is taken back."""
    monkeypatch.setattr("sd_recipes.runtime.signals.stop_request.listen", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("threading.excepthook", sys.modules["threading"].excepthook)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "0" * 34)
    forget_accelerator()
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


SECRET = "opensesame0123456789"


def files_holding(folder: Path, words: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and words.encode() in path.read_bytes()]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload of files
@pytest.mark.usefixtures("console")
def test_defect_29_no_byte_of_a_run_holds_a_secret_nor_a_pushed_one_a_path(
    settings: dict[str, Any],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Everything in which a run that succeeds can have a secret has one."""
    out = tmp_path / "alice" / f"sk-{SECRET}" / "run"
    base = tmp_path / "alice" / f"hf_{SECRET}"
    base.parent.mkdir()
    base.symlink_to(settings["pretrained_model_name_or_path"])
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        hub.data_sets["someone/pictures"].commit({"train.parquet": shard(image_folder, range(5))})
        address = f"{hub.address}/datasets/someone/pictures/resolve/main/train.parquet?X-Amz-Signature={SECRET}"
        settings |= {
            "pretrained_model_name_or_path": str(base), "dataset_name": address, "output_dir": str(out),
            "tracker_project_name": f"hf_{SECRET}", "logging_dir": f"ghp_{SECRET}",
            "hub_model_id": "tester/discs", "max_train_steps": 2,
            "validation_prompts": [f"a disc by hf_{SECRET}"], "validation_inference_steps": 1,
            "report_to": "tensorboard", "checkpointing_steps": 1,
            "revision": f"sk-{SECRET}", "cache_dir": str(tmp_path / "alice" / f"gho_{SECRET}"),
            "latent_cache_dir": str(tmp_path / "alice" / f"ghp_{SECRET}"), "cache_latents": "disk", "crop": "center",
        }  # fmt: skip
        del settings["train_data_dir"]
        flags = [f"--{name}={value}" for name, value in settings.items() if not isinstance(value, list)]
        flags += ["--validation_prompts", settings["validation_prompts"][0], "--use_ema", "--push_to_hub"]
        monkeypatch.setattr(sys, "argv", ["train_text_to_image.py", *flags])
        main(flags)
        assert SECRET not in str(sys.argv), "which trackers publish"
        said = capfd.readouterr()
        forget_accelerator()
        main([*flags, "--max_train_steps=3"])  # and of one that goes on
        resumed = capfd.readouterr()
    assert "Resuming from" in resumed.err or "pipeline " in resumed.out
    for text in (said.out, said.err, resumed.out, resumed.err):
        assert SECRET not in text
    assert "pushed " in said.out
    assert {"checkpoint-2", "recipe.yaml", "README.md"} <= {path.name for path in out.iterdir()}
    assert files_holding(out, SECRET) == []
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["dataset_name"] == address.replace(SECRET, LEFT_OUT)

    pushed = hub.models["tester/discs"].files()
    assert {"recipe.yaml", "README.md", "samples.png", "model_index.json", "unet/config.json"} <= pushed.keys()
    for name, content in pushed.items():
        for words in (SECRET, "alice", "pytest-of-", str(Path.home()) + "/"):
            assert words.encode() not in content, f"{words} in {name}"
    shared = yaml.safe_load(pushed["recipe.yaml"])
    assert (shared["output_dir"], shared["pretrained_model_name_or_path"]) == ("run", LEFT_OUT)
    assert written["output_dir"] == redacted(str(out)), "and here the paths are whole"


@pytest.mark.usefixtures("console")
@pytest.mark.parametrize("name", ["dataset_name", "train_data_dir", "pretrained_model_name_or_path", "image_column",
    "caption_column", "caption_template", "train_split", "dataset_config_name", "validation_split", "config",
    "resume_from_checkpoint", "report_to", "tracker_project_name", "unet_config"])  # fmt: skip
def test_defect_29_a_failing_run_tells_no_secret(
    settings: dict[str, Any], name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings |= {name: f"hf_{SECRET}" if name == "tracker_project_name" else f"/nowhere/{{hf_{SECRET}}}"}
    if name == "tracker_project_name":
        settings[name] += "/"
    flags = [f"--{key}={value}" for key, value in settings.items()]
    if name == "unet_config":
        flags.append("--train_from_scratch")
    if name in ("dataset_name", "dataset_config_name"):
        flags = [flag for flag in flags if "train_data_dir" not in flag]
    with pytest.raises(SystemExit) as left:
        main(flags)
    assert left.value.code == 2
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert files_holding(tmp_path, SECRET) == []


@pytest.mark.usefixtures("console")
def test_defect_29_an_inspection_shows_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = build_image_folder(tmp_path / "pictures", 4, (32, 32))
    metadata = folder / "metadata.jsonl"
    lines = metadata.read_text().replace("disc", f"https://host.test/a?sig={SECRET}&x=1 hf_{SECRET} disc")
    metadata.write_text(lines)
    assert SECRET in lines
    with pytest.raises(SystemExit):
        inspect(["--train_data_dir", str(folder), "--output_dir", str(tmp_path / "seen"), "--num_workers", "0"])
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert files_holding(tmp_path / "seen", SECRET) == []
    assert files_holding(tmp_path / "seen", LEFT_OUT) != []


def test_defect_29_a_bad_row_is_noted_without_its_signature(tmp_path: Path) -> None:
    from sd_recipes.data.bad_rows import BadRows

    rows = BadRows(tmp_path, 5, 100, 0)
    found = ((f"https://host.test/a.png?sig={SECRET}", f"cannot read 'https://host.test/a.png?sig={SECRET}'"),)
    rows.add(found, 1)
    rows.add(found, 2)
    assert len(rows) == 1
    assert files_holding(tmp_path, SECRET) == []
    assert len(BadRows(tmp_path, 5, 100, 0).recorded()) == 1


@pytest.mark.usefixtures("console")
def test_defect_29_libraries_and_tracebacks_tell_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    from sd_recipes.runtime.console import set_up_console

    set_up_console()
    address = f"https://host.test/a?X-Goog-Signature={SECRET}"
    handler = logging.StreamHandler(sys.stderr)
    library = logging.Logger("library")
    library.addHandler(handler)
    library.warning("HTTP 503 while requesting GET %s", address)
    try:
        raise OSError(f"no such file: {address}")
    except OSError as error:
        library.exception("It failed")
        sys.excepthook(OSError, error, error.__traceback__)
    say(f"from {address}")
    said = capfd.readouterr()
    assert said.err.count(LEFT_OUT) == 3
    assert said.err.count("Traceback (most recent call last)") == 2
    assert LEFT_OUT in said.out
    assert SECRET not in said.out + said.err
    assert isinstance(library.makeRecord("a", 20, "b", 1, "c", (), None), RedactedRecord)


@pytest.mark.parametrize(
    "text",
    [
        "https://host.test/a?token={}", "https://host.test/a?x=1&access_token={}&y=2", "https://host.test/a?key={}",
        "https://host.test/a?sv=1&amp;sig={}", "https://host.test/a?X-Amz-Security-Token={}", "hf_{}", "ghp_{}",
        "github_pat_{}", "sk-{}", "sk-proj-{}", "{{'Authorization': 'Bearer {}'}}", "authorization: Basic {}==",
        "AccountKey={};EndpointSuffix=x", "https://a:{}@host.test", "https://host.test/a?st={}",
    ],
)  # fmt: skip
def test_what_is_secret_is_redacted_once(text: str) -> None:
    secret = "Sesame0123456789sesame0123"
    once = redacted(text.format(secret))
    assert secret not in once
    assert LEFT_OUT in once
    assert redacted(once) == once
    assert redacted("AKIA" + "A1" * 8) == LEFT_OUT


@pytest.mark.parametrize(
    "text",
    [
        "a photo by Bearer Lake", "https://host.test/a.parquet?download=true", "someone/pictures", "/data/hf_mirror/a",
        "hf://datasets/a/b@refs%2Fpr%2F1/c.parquet", "a disc; colour=red", "task-sk-1", "mail me@host.test: hello",
    ],
)  # fmt: skip
def test_what_is_not_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_paths_are_reduced_to_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("alice/pictures")
    paths = ["/home/alice/x", "~/x", "./alice/x", "C:\\Users\\alice\\x", "file:///home/alice/x", "zip://*::/home/a/x"]
    assert {without_folders(path) for path in paths} == {"x"}
    assert without_folders("alice/pictures") == "pictures"
    for text in ("someone/pictures", "https://host.test/a/b", "/", ",", "a photo of {name}", ""):
        assert without_folders(text) == text


def test_a_resolved_recipe_without_secrets_says_nothing_of_them() -> None:
    text = recipe_text(load_recipe(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"]))
    assert LEFT_OUT not in text
