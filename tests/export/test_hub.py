"""Pushing to and reading from a Hub, in the real script, against a loopback server."""

from __future__ import annotations

import http.client
import io
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import ROOT
from huggingface_hub import HfApi
from loopback_hub import Cut, LoopbackHub, Refuse, outage
from training_runs import forget_accelerator

from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.export.hub import PushError, publish, write_model_card
from sd_recipes.flags import load_recipe
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.model.stable_diffusion_xl import StableDiffusionXL
from sd_recipes.recipe import Recipe

TOKEN = "hf_secretsecretsecretsecretsecret"
PARQUET = "data/train-00000-of-00001.parquet"


def run_against(
    hub: LoopbackHub, home: Path, *flags: object, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ACCELERATE"))}
    environment |= {**hub.environment(home), "OMP_NUM_THREADS": "1"}
    if token:
        environment["HF_TOKEN"] = token
    command = [str(part) for part in (sys.executable, ROOT / "train_text_to_image.py", *flags)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _as_tester(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's own account and settings are, in this process too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def flags(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> list[object]:
    return [
        "--pretrained_model_name_or_path", tiny_pipeline, "--train_data_dir", image_folder, "--resolution", 32,
        "--train_batch_size", 2, "--max_train_steps", 2, "--checkpointing_steps", 2, "--seed", 0,
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def without(flags: list[object], name: str) -> list[object]:
    """The flags but for one and its value."""
    place = flags.index(name)
    return [*flags[:place], *flags[place + 2 :]]


def shard(image_folder: Path, numbers: range) -> bytes:
    """Some of the folder's rows as a parquet file with the images in it."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(image_folder), split="train").select(numbers)
    content = io.BytesIO()
    rows.to_parquet(content)
    return content.getvalue()


def test_a_model_is_pushed_and_trained_on_with_data_of_the_hub(
    flags: list[object], image_folder: Path, tmp_path: Path
) -> None:
    with LoopbackHub() as hub:
        pushed = run_against(
            hub, tmp_path / "home", *flags, "--push_to_hub", "--hub_model_id", "tester/discs",
            "--validation_prompts", "disc number 1",
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        assert "pushed " in pushed.stdout
        files = hub.models["tester/discs"].files()
        assert {"model_index.json", "README.md", "samples.png", "unet/diffusion_pytorch_model.safetensors"} <= set(
            files
        )
        parts = ("unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
        allowed = ("model_index.json", "README.md", "recipe.yaml", "samples.png", *parts)
        assert [name for name in files if not name.startswith(allowed)] == []
        # Neither the base model nor the data has a name on the Hub, and a path would be refused there.
        assert metadata(files["README.md"]).keys() == {"library_name", "pipeline_tag", "tags"}

        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        holding = [str(path) for path in written if TOKEN.encode() in path.read_bytes()]
        assert holding + [name for name, content in files.items() if TOKEN.encode() in content] == []

        hub.data_sets["someone/pictures"].commit({PARQUET: shard(image_folder, range(5))})
        flags[1] = "tester/discs"
        again = run_against(
            hub, tmp_path / "other_home", *without(flags, "--train_data_dir"), "--dataset_name", "someone/pictures",
            "--output_dir", tmp_path / "again", "--cache_dir", tmp_path / "cache",
            "--push_to_hub", "--hub_model_id", "tester/again",
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert rows_trained_on(again) == 5
        card = metadata(hub.models["tester/again"].files()["README.md"])
        assert (card["base_model"], card["datasets"]) == ("tester/discs", ["someone/pictures"])
    assert (tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.slow
def test_the_data_are_those_of_the_revision(flags: list[object], image_folder: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        data = hub.data_sets["someone/pictures"]
        data.commit({PARQUET: shard(image_folder, range(5))})
        other = data.commit({PARQUET: shard(image_folder, range(5, 8))}, branch="other")
        done = run_against(
            hub, tmp_path / "home", *without(flags, "--train_data_dir"), "--dataset_name", "someone/pictures",
            "--dataset_revision", "other",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows_trained_on(done) == 3
    read = [asked for asked in hub.requests if asked.is_file_get and asked.file == PARQUET]
    assert {data.resolve(asked.revision or "") for asked in read} == {other}


def rows_trained_on(done: subprocess.CompletedProcess[str]) -> int:
    return next(int(line.split()[1]) for line in done.stdout.splitlines() if line.split()[:1] == ["rows"])


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def test_a_failed_push_keeps_the_model_and_says_how_to_push(flags: list[object], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.failures = lambda asked: Refuse(503) if "/commit/" in asked.path else None
        done = run_against(hub, tmp_path / "home", *flags, "--push_to_hub", "--hub_model_id", "tester/discs")
    assert done.returncode == 4
    assert f"hf upload tester/discs {tmp_path / 'out'}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(("failure", "words"), [(Refuse(403), "403 Forbidden"), (Cut(after=0), "reset")])
def test_no_rights_or_no_connection_show_before_training(
    flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Refuse | Cut, words: str
) -> None:
    recipe = load_recipe([str(flag) for flag in [*flags, "--push_to_hub", "--hub_model_id", "tester/discs"]])
    forget_accelerator()
    with LoopbackHub() as hub:
        hub.failures = lambda asked: failure
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        with pytest.raises(RecipeError, match=f"--push_to_hub: cannot create tester/discs .*{words}") as error:
            run(recipe)
    assert "\n" not in str(error.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", "logs"}, "nothing was trained"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--caption_column", "nothing"], "asked for the column 'nothing'"),
        (["--train_data_dir", "nowhere"], "no such file or folder"),
        (["--resolution", "30"], "not a multiple"),
        ([], "holds no run of this program"),
    ],
    ids=["column", "data", "size", "folder"],
)
def test_defect_8_a_mistake_leaves_no_repository(
    flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], words: str
) -> None:
    if not changes:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("")
    flags = [*flags, *changes, "--push_to_hub", "--hub_model_id", "tester/discs"]
    recipe = load_recipe([str(flag) for flag in flags])
    forget_accelerator()
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        with pytest.raises(RecipeError, match=words):
            run(recipe)
    assert [asked.path for asked in hub.requests if asked.method == "POST"] == []
    assert "tester/discs" not in hub.models


def test_defect_8_a_checkpoint_that_does_not_fit_leaves_no_repository(
    flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*map(str, flags), "--max_train_steps", "1"]
    forget_accelerator()
    run(load_recipe(flags))
    forget_accelerator()
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        pushing = [*flags, "--push_to_hub", "--hub_model_id", "tester/discs", "--prediction_type", "v_prediction"]
        with pytest.raises(RecipeError, match="--prediction_type is v_prediction and was epsilon"):
            run(load_recipe(pushing))
    assert [asked.path for asked in hub.requests if asked.method == "POST"] == []


def test_the_card_of_an_sdxl_has_its_tag(tmp_path: Path) -> None:
    recipe = Recipe(pretrained_model_name_or_path="someone/base", train_data_dir="pictures")
    for family, has_tag in ((StableDiffusionXL(), True), (StableDiffusion(), False)):
        write_model_card(tmp_path, "tester/discs", recipe, family, "epsilon")
        tags = metadata((tmp_path / "README.md").read_bytes())["tags"]
        assert ("stable-diffusion-xl" in tags) == has_tag


def test_a_card_that_the_hub_refuses_fails_the_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(pretrained_model_name_or_path="someone/two..dots", train_data_dir="pictures")
    (tmp_path / "model_index.json").write_text("{}")
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        with pytest.raises(PushError) as error:
            publish(tmp_path, "tester/discs", recipe, StableDiffusion(), "epsilon")
    assert '"base_model[0]" with value "someone/two..dots" is not valid' in str(error.value)
    assert "\n" not in str(error.value)
    assert hub.requests[-1].path == "/api/validate-yaml"  # nothing was uploaded


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("base_model: [", "not YAML"),
        ("- diffusers", "must be an object"),
        ("base_model: /home/someone/model", r'"base_model\[0\]" with value "/home/someone/model" is not valid'),
        ("base_model: 3", r'"base_model\[0\]"'),
        ("datasets: [someone/pictures, ../pictures]", r'"datasets\[1\]"'),
        ("library_name: [diffusers]", '"library_name"'),
        ("pipeline_tag: Text to image", '"pipeline_tag"'),
        ("tags: diffusers", '"tags"'),
    ],
)
def test_the_loopback_hub_refuses_a_bad_card(tmp_path: Path, card: str, words: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n\n# Discs\n")
    with LoopbackHub() as hub:
        api = HfApi(endpoint=hub.address)
        hub.models["tester/discs"].commit({})
        with pytest.raises(ValueError, match=f"Invalid metadata in README.md(.|\n)*{words}"):
            api.upload_folder(repo_id="tester/discs", folder_path=tmp_path)
        assert hub.models["tester/discs"].files() == {}
        (tmp_path / "README.md").write_text("---\nbase_model: someone/model\ntags: [discs]\n---\n\n# Discs\n")
        api.upload_folder(repo_id="tester/discs", folder_path=tmp_path)
        assert list(hub.models["tester/discs"].files()) == ["README.md"]


def test_the_loopback_hub_serves_ranges_and_fails_on_schedule() -> None:
    content = bytes(range(256)) * 4

    def get(span: str | None = None) -> bytes:
        address = f"{hub.address}/datasets/someone/pictures/resolve/main/data/a.bin"
        asked = urllib.request.Request(address, headers={"Range": span} if span else {})
        with urllib.request.urlopen(asked) as response:
            return response.read()

    with LoopbackHub() as hub:
        hub.data_sets["someone/pictures"].commit({"data/a.bin": content})
        spans = ["bytes=0-9", "bytes=1000-", "bytes=-7", "bytes=1020-5000"]
        assert [get(span) for span in spans] == [content[:10], content[1000:], content[-7:], content[1020:]]
        assert {asked.status for asked in hub.requests} == {206}
        with pytest.raises(urllib.error.HTTPError, match="416"):
            get("bytes=1024-")

        hub.requests.clear()
        hub.failures = [None, Refuse(503), Cut(after=100), Cut(after=100, reset=False)]
        assert get() == content
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get()
        with pytest.raises(ConnectionResetError):
            get()
        with pytest.raises(http.client.IncompleteRead) as short:
            get()
        assert short.value.partial == content[:100]
        assert get() == content
        assert [(asked.status, asked.sent) for asked in hub.requests] == [
            (200, 1024), (503, 0), (200, 100), (200, 100), (200, 1024)
        ]  # fmt: skip

        hub.failures = outage(500, seconds=0.2, after=1)
        hub.requests.clear()
        assert get() == content
        with pytest.raises(urllib.error.HTTPError, match="500"):
            get()
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(f"{hub.address}/api/whoami-v2")
        time.sleep(0.25)
        assert get() == content
