import html
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT
from hostile_images import build_hostile_folder
from PIL import Image
from tiny_models import build_image_folder, tiny_tokenizer

from sd_recipes.commands.inspect import inspect, main, read_settings, run
from sd_recipes.errors import RecipeError
from sd_recipes.inspection.caption_checks import CaptionSummary
from sd_recipes.inspection.duplicates import NEAR_BITS, WINDOW, equal_groups, near_groups
from sd_recipes.inspection.findings import LISTED, BoundedCounter, Finding, Findings
from sd_recipes.inspection.image_checks import perceptual_hash, sample_pixels

SHAPES = ((96, 64), (64, 96), (80, 80))


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as that of photographs does; colours go mostly together."""
    rng = np.random.default_rng(seed)
    width, height = size
    down, across = np.meshgrid(np.fft.fftfreq(height, 1 / height), np.fft.fftfreq(width, 1 / width), indexing="ij")
    amplitudes = np.maximum(1, np.hypot(down, across)) ** -1.2
    common = rng.standard_normal((height, width))
    channels = []
    for _ in range(3):
        noise = np.fft.ifft2(np.fft.fft2(common + 0.3 * rng.standard_normal((height, width))) * amplitudes).real
        channels.append(128 + 45 * noise / noise.std())
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Eleven good rows: one file twice, one picture saved twice, one caption of HTML twice."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(9):
        photograph(number, SHAPES[number % 3]).save(folder / f"{number}.jpg", quality=92)
    (folder / "copy.jpg").write_bytes((folder / "0.jpg").read_bytes())
    photograph(1, SHAPES[1]).save(folder / "again.jpg", quality=70)
    captions = {path.name: f"a photograph, {path.stem}" for path in sorted(folder.iterdir())}
    captions["2.jpg"] = captions["3.jpg"] = "<script>alert(1)</script>"
    write_metadata(folder, [{"file_name": name, "text": text} for name, text in captions.items()])
    return folder


def write_metadata(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def inspected(output_dir: Path, *flags: str) -> tuple[int, dict, str]:
    """Exit status, the JSON file and the page."""
    status = run(read_settings(["--output_dir", str(output_dir), "--num_workers", "0", "--num_samples", "4", *flags]))
    page = (output_dir / "inspection.html").read_text(encoding="utf-8")
    return status, json.loads((output_dir / "inspection.json").read_text(encoding="utf-8")), page


def names(content: dict, kind: str) -> set[str]:
    return {found["name"] for found in content["findings"][kind]["listed"]}


def test_a_clean_folder_with_a_model(photographs: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    status, content, page = inspected(
        tmp_path / "out", "--train_data_dir", str(photographs), "--resolution", "32", "--bucket_step", "8",
        "--pretrained_model_name_or_path", str(tiny_pipeline), "--train_batch_size", "2",
    )  # fmt: skip
    assert (status, content["status"], content["exit_status"]) == (0, "clean", 0)
    assert content["rows"] == {"available": 11, "inspected": 11, "usable": 11, "bad": 0}
    assert {kind: found["severity"] for kind, found in content["findings"].items()} == {"long_caption": "note"}

    groups = content["duplicates"]
    assert groups["images"]["largest"][0]["names"] == ["0.jpg", "copy.jpg"]
    assert [group["names"] for group in groups["near_images"]["largest"]] == [["1.jpg", "again.jpg"]]
    assert [group["names"] for group in groups["captions"]["largest"]] == [["2.jpg", "3.jpg"]]

    buckets = {(bucket["width"], bucket["height"]): bucket for bucket in content["images"]["buckets"]}
    assert {size: bucket["images"] for size, bucket in buckets.items()} == {(32, 32): 3, (40, 24): 4, (24, 40): 4}
    assert (buckets[32, 32]["batches"], buckets[32, 32]["last_batch"]) == (2, 1)

    # The statistics of all pixels, which those of the lattice come near.
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in photographs.glob("*.jpg")]) / 255
    np.testing.assert_allclose(content["pixels"]["mean"], pixels.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(content["pixels"]["covariance"], np.cov(pixels.T), atol=0.01)
    assert set(content["pixels"]["kl_from_gaussian_nats"]) == {"red", "green", "blue", "green_blue", "red_green_blue"}

    latents = content["latents"]
    assert len(latents["mean"]) == len(latents["kl_from_gaussian_nats"]) == 4
    assert latents["scaling_factor_of_this_data"] == pytest.approx(
        latents["scaling_factor"] / latents["overall_deviation"]
    )
    for process in content["forward_process"].values():
        kl = [step["kl_nats_per_dimension"] for step in process]
        assert kl == sorted(kl, reverse=True)
        assert kl[-1] < 0.1 < kl[0]

    # The tokenizer has a token for every letter and room for 14.
    captions = [json.loads(line)["text"] for line in (photographs / "metadata.jsonl").read_text().splitlines()]
    over = [re.sub(r"\s", "", caption) for caption in captions if "script" not in caption]
    lost = sum(max(0, len(letters) - 14) for letters in over)
    assert content["captions"]["tokens_limit"] == 14
    assert content["captions"]["tokens_lost"] >= lost > 0
    assert "The VAE’s latents" in page


def test_the_page_needs_no_network_and_shows_captions_as_text(photographs: Path, tmp_path: Path) -> None:
    _, _, page = inspected(tmp_path / "out", "--train_data_dir", str(photographs), "--resolution", "64")
    assert html.escape("<script>alert(1)</script>") in page
    assert "<script" not in page
    sources = re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]*)""", page)
    assert len(sources) > 20
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.findall(r"url\(|@import|https?://", page)


def test_every_hostile_file_is_named_with_its_kind(tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    expected = build_hostile_folder(folder)
    status, content, page = inspected(tmp_path / "out", "--train_data_dir", str(folder), "--resolution", "16")
    assert status == 1
    bad = {
        name
        for kind, found in content["findings"].items()
        if found["severity"] == "bad"
        for name in names(content, kind)
    }
    assert bad == {name for name, what in expected.items() if what.kind == "bad" and what.has_row}
    assert content["rows"]["bad"] == len(bad)
    assert names(content, "empty_file") == {"empty.jpg"}
    assert names(content, "truncated") == {"truncated.jpg", "truncated.png"}
    assert names(content, "too_many_pixels") == {"bomb.png"}
    assert {"garbage.png", "page.jpg"} <= names(content, "undecodable")
    assert names(content, "animated") == {"animated.gif", "animated.webp"}
    assert names(content, "too_small") == {"thin.png"}
    assert names(content, "missing_caption") == {"blank_null.png"}
    assert names(content, "blank_caption") == {"blank_empty.png", "blank_space.png"}
    assert names(content, "image_without_row") == {"without_row.png"}
    assert names(content, "system_file") == {"._cat.jpg", "Thumbs.db"}
    assert "without_row.png" in page


def test_rows_without_a_file_and_a_folder_without_a_good_row(photographs: Path, tmp_path: Path) -> None:
    with (photographs / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "absent.jpg", "text": "a photograph"}\n')
    status, content, _ = inspected(tmp_path / "one", "--train_data_dir", str(photographs), "--resolution", "64")
    assert (status, names(content, "missing_file")) == (1, {"absent.jpg"})

    write_metadata(
        photographs, [{"file_name": "absent.jpg", "text": "a photograph"}, {"file_name": "0.jpg", "text": ""}]
    )
    status, content, page = inspected(tmp_path / "two", "--train_data_dir", str(photographs), "--resolution", "64")
    assert (status, content["status"], content["rows"]["usable"]) == (2, "unusable", 0)
    assert len(names(content, "image_without_row")) == 10
    assert "Unusable" in page


def test_a_recipes_sources_are_inspected(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_image_folder(tmp_path / name, num_images=3)
    recipe = tmp_path / "recipe.yaml"
    sources = [{"train_data_dir": str(tmp_path / name)} for name in ("a", "b")]
    recipe.write_text(
        json.dumps({"data_sources": sources, "resolution": 32, "max_train_steps": 9, "output_dir": "run"})
    )
    config = read_settings(["--config", str(recipe), "--resolution", "16"])
    assert (config.resolution, config.output_dir) == (16, "inspection")
    assert inspect(config).scan.num_rows == 6


def test_settings_decide_what_is_bad(photographs: Path, tmp_path: Path) -> None:
    write_metadata(
        photographs, [{"file_name": f"{n}.jpg", "text": "" if n == 0 else f"photograph {n}"} for n in range(9)]
    )
    for name in ("copy.jpg", "again.jpg"):
        (photographs / name).unlink()
    flags = ("--train_data_dir", str(photographs))
    status, content, _ = inspected(tmp_path / "a", *flags, "--resolution", "64", "--blank_captions", "empty")
    assert (status, content["findings"]["blank_caption"]["severity"], content["rows"]["bad"]) == (0, "note", 0)
    status, content, _ = inspected(tmp_path / "b", *flags, "--resolution", "300", "--blank_captions", "empty")
    assert (status, content["findings"]["too_small"]["count"], content["rows"]["bad"]) == (1, 9, 0)
    status, content, _ = inspected(
        tmp_path / "c", *flags, "--resolution", "300", "--bucket_step", "300", "--aspect_ratio_buckets"
    )
    assert (status, content["rows"]["bad"]) == (2, 9)


def test_processes_streams_and_samples_see_the_same_rows(photographs: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(photographs))["train"].to_parquet(path)
    flags = ("--dataset_name", str(path), "--resolution", "64")
    _, here, _ = inspected(tmp_path / "here", *flags)
    _, there, _ = inspected(tmp_path / "there", *flags, "--num_workers", "2")
    _, streamed, _ = inspected(tmp_path / "streamed", *flags, "--streaming")
    for other in (there, streamed):
        assert other["pixels"] == here["pixels"]
        assert other["captions"] == here["captions"]
        assert other["images"] == here["images"]
    assert streamed["rows"]["available"] is None
    assert (
        streamed["duplicates"]["images"]["largest"][0]["first_rows"]
        == here["duplicates"]["images"]["largest"][0]["first_rows"]
    )
    _, sampled, page = inspected(tmp_path / "sampled", *flags, "--max_rows", "5")
    assert (sampled["rows"]["inspected"], sampled["rows"]["available"]) == (5, 11)
    assert "5 of 11 rows, drawn at random" in page


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("image_checks", {"torch", "transformers", "datasets"}), ("scan", {"torch", "transformers", "matplotlib"})],
)
def test_processes_start_without_what_they_do_not_need(module: str, unwanted: set[str]) -> None:
    code = f"import sys; from sd_recipes.inspection import {module}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not unwanted & set(imported.split())


def test_mistakes_are_one_line_and_status_2(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "metadata.jsonl").write_text('{"file_name": "a.png", "te')
    for flags, words in (
        ([], "no data: give --train_data_dir"),
        (["--train_data_dir", "absent"], "no such file or folder"),
        (["--train_data_dir", str(torn)], "metadata.jsonl is not JSON in line 1"),
        (["--train_data_dir", str(photographs), "--caption_column", "txt"], "nearest: text"),
        (["--train_data_dir", str(photographs), "--max_rows", "0"], "--max_rows"),
        (["--train_data_dir", str(photographs), "--max_row", "3"], "nearest: --max_rows"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(flags)
        assert leaving.value.code == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert words in told[-1]
        assert told[-1].startswith("error: ")


def test_the_documented_commands_are_accepted() -> None:
    text = (ROOT / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    sd-recipes inspect (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        read_settings(command.split())


def test_the_console_script_tells_findings_and_leaves_with_the_status(photographs: Path, tmp_path: Path) -> None:
    (photographs / "4.jpg").write_bytes((photographs / "4.jpg").read_bytes()[:600])
    command = [sys.executable, "-m", "sd_recipes.commands.cli", "inspect", "--train_data_dir", str(photographs)]
    command += ["--resolution", "64", "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1, finished.stderr
    assert re.search(r"bad +1  truncated image: 4\.jpg", finished.stdout)
    assert str(tmp_path / "out" / "inspection.html") in finished.stdout
    assert (tmp_path / "out" / "inspection.html").is_file()


def test_captions_of_every_shape(tmp_path: Path) -> None:
    flags = ["--train_data_dir", str(tmp_path), "--caption_columns", "long", "short", "--long_captions", "chunk"]
    summary = CaptionSummary(read_settings([*flags, "--caption_chunks", "2"]), tiny_tokenizer(max_length=16))
    rows = [
        {"long": "abcd", "short": ["ef", "gh"]},
        {"long": None, "short": ["", "x"]},
        {"long": "  ", "short": []},
        {"long": None, "short": None},
        {"long": 3, "short": "y"},
        {"long": "a" * 30, "short": " abcd "},
    ]
    found = summary.update([(number, f"row {number}", row) for number, row in enumerate(rows)])
    assert [(finding.kind, finding.row) for finding in found] == [
        ("blank_choice", 1), ("blank_caption", 2), ("missing_caption", 3), ("caption_not_text", 4), ("long_caption", 5),
    ]  # fmt: skip
    assert summary.num_captions == 6
    assert summary.tokens_lost == 30 - 2 * 14
    assert [group.first_rows for group in equal_groups(summary.digests, 5).largest] == [[0, 5]]  # places of "abcd"
    assert summary.words.counts["abcd"] == 2


def test_near_groups_are_those_of_every_pair_compared() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 600, dtype=np.uint64) << np.uint64(1)
    for place in range(0, 200, 2):  # some within reach, some just beyond
        flips = rng.choice(64, place % (NEAR_BITS + 3), replace=False).astype(np.uint64)
        hashes[place + 1] = hashes[place] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= NEAR_BITS
    labels = np.arange(600)
    while True:
        linked = np.array([labels[row].min() for row in near])
        if np.array_equal(linked, labels):
            break
        labels = linked
    expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    found = near_groups(hashes, 1000)
    assert sorted(group.first_rows for group in found.largest) == [rows for rows in expected if len(rows) > 1]
    assert 0 < found.num_groups < 100
    assert found.complete
    crowded = np.arange(WINDOW + 2, dtype=np.uint64) << np.uint64(20)
    assert not near_groups(crowded, 1).complete


def test_near_groups_join_what_many_pairs_link_and_equal_ones_stay_in_order() -> None:
    numbers = np.arange(1 << 9, dtype=np.uint64)  # linked by single bits of the lowest band: a group
    spread = np.stack([numbers, numbers + (np.uint64(0xFF) << np.uint64(40))], axis=1).ravel()  # and another
    found = near_groups(spread, 5)
    assert [group.num_rows for group in found.largest] == [len(numbers)] * 2
    assert [group.first_rows[:3] for group in found.largest] == [[0, 2, 4], [1, 3, 5]]
    assert near_groups(np.array([], np.uint64), 5).num_groups == 0


def test_the_perceptual_hash_survives_recompression_and_tells_pictures_apart(tmp_path: Path) -> None:
    pictures = [photograph(seed, (512, 400)) for seed in range(6)]
    hashes = [perceptual_hash(picture) for picture in pictures]
    for picture, original in zip(pictures, hashes, strict=True):
        picture.resize((300, 234)).save(tmp_path / "small.jpg", quality=60)
        with Image.open(tmp_path / "small.jpg") as small:
            assert (perceptual_hash(small) ^ original).bit_count() <= NEAR_BITS
    others = [(left ^ right).bit_count() for left in hashes for right in hashes if left != right]
    assert min(others) > 10


def test_sampled_pixels_are_the_pictures_own_each_as_likely(tmp_path: Path) -> None:
    numbers = np.arange(64 * 64, dtype=np.uint16)
    exact = np.stack([numbers % 256, numbers // 256, numbers * 0], axis=-1).astype(np.uint8).reshape(64, 64, 3)
    assert np.array_equal(sample_pixels(Image.fromarray(exact), row=3).reshape(64, 64, 3), exact)
    side = 128
    counts = np.zeros(side)
    columns = np.broadcast_to(np.arange(side, dtype=np.uint8)[None, :, None], (side, side, 3))
    for row in range(200):
        counts += np.bincount(sample_pixels(Image.fromarray(np.ascontiguousarray(columns)), row)[:, 0], minlength=side)
    assert counts.min() > 0
    assert counts[::2].sum() / counts.sum() == pytest.approx(0.5, abs=0.1)


def test_memory_is_bounded_where_values_are_many() -> None:
    counter = BoundedCounter(10)
    for number in range(1000):
        counter.update(["common", f"rare {number}"])
    assert len(counter.counts) <= 20
    assert counter.counts["common"] == 1000
    assert counter.pruned
    findings = Findings()
    findings.add(Finding("truncated", row, f"{row}.jpg", "") for row in range(LISTED + 5))
    assert findings.counts["truncated"] == LISTED + 5
    assert len(findings.listed["truncated"]) == LISTED


def test_a_latent_cache_is_not_taken_for_images(tmp_path: Path) -> None:
    row = {"moments": b"", "height": 8, "width": 8, "made_by": "a", "text": "b"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "cache.parquet")
    with pytest.raises(RecipeError, match="inspect the images it was made from"):
        inspect(read_settings(["--dataset_name", str(tmp_path / "cache.parquet")]))
