"""The page of a run: what it says, read back from its HTML, for whole folders and for torn ones."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loss_tables import write_losses
from PIL import Image
from training_runs import train

from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN
from sd_recipes.evaluation.verdict import verdict
from sd_recipes.export.run_page import write_run_page
from sd_recipes.flags import recipe_text
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.trackers import read_metrics

HARDEST_SEVEN = np.array([3.0] * 7 + [1.0] * 60)  # factors of rows
VOID = {"img", "input", "meta", "br"}


class Page(HTMLParser):
    """A page's elements, each with the text below it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, texts in self.open:
            texts.append(data)

    def texts(self, tag: str, style: str | None = None) -> list[str]:
        """The text of each element of that tag and class."""
        return [
            " ".join("".join(texts).split())
            for name, attributes, texts in self.elements
            if name == tag and (style is None or style in (attributes.get("class") or "").split())
        ]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def page_of(folder: Path) -> Page:
    return Page(write_run_page(folder))


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def training_lines(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "train_loss": 0.2 + 0.1 / step, "lr": 1e-5, "grad_norm": 1.0, "images_per_second": 40.0,
         "data_wait": 0.02, "epoch": step / 10}
        for step in range(1, steps + 1)
    ]  # fmt: skip


def validation_line(step: int, held_out: float, training_rows: float) -> dict[str, Any]:
    excess = {f"validation_excess_bin_{number}": held_out / 0.3 for number in range(10)}
    excess |= {f"train_subset_excess_bin_{number}": training_rows / 0.3 for number in range(10)}
    return {"step": step, "validation_loss": held_out, "train_subset_loss": training_rows, **excess}


def write_samples(folder: Path, steps: list[int]) -> None:
    (folder / "samples").mkdir()
    for step in steps:
        Image.new("RGB", (40, 30), (step % 256, 0, 0)).save(folder / "samples" / f"step-{step:06d}.png")


def picture(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 48), color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_rows(folder: Path, number: int, **columns: list[Any]) -> None:
    """rows.parquet for both sets; `columns` gives other captions or thumbnails than the usual, the same for both."""
    captions = columns.get("caption", [f"caption {row}" for row in range(number)])
    thumbnails = columns.get("thumbnail", [picture()] * number)
    table = pa.table(
        {
            "set": [HELD_OUT] * number + [TRAIN] * number,
            "row": [*range(number)] * 2,
            "name": [f"row {row}: {row}.jpg" for row in range(number)] * 2,
            "caption": captions * 2,
            "thumbnail": pa.array(thumbnails * 2, pa.binary()),
        }
    )
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "validation" / "rows.parquet")


@pytest.fixture
def over_fitted(tmp_path: Path) -> Path:
    """A run that was best at step 100 of 200."""
    folder = tmp_path / "boats"
    curve = [(0, 0.3, 0.3), (50, 0.25, 0.24), (100, 0.2, 0.18), (150, 0.22, 0.15), (200, 0.24, 0.12)]
    write_metrics(folder, [*training_lines(200), *(validation_line(*each) for each in curve)])
    write_samples(folder, [0, 50, 100, 150, 200])
    factors = np.ones(50)
    factors[7] = 3.0
    fell = np.full(50, 0.5)
    fell[9] = 0.1
    write_losses(folder, 0, {HELD_OUT: factors, TRAIN: factors})
    write_losses(folder, 200, {HELD_OUT: factors * 0.8, TRAIN: factors * fell})
    write_rows(folder, 50)
    settings = {"pretrained_model_name_or_path": "some/model", "train_data_dir": "pictures", "max_train_steps": 200}
    recipe = Recipe(**settings, validation_split="held_out")
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    for step in (100, 200):
        (folder / f"checkpoint-{step}").mkdir()
    return folder


def test_the_three_questions_are_answered_at_the_top(over_fitted: Path) -> None:
    page = page_of(over_fitted)
    assert page.texts("h1") == ["boats"]
    assert page.texts("div", "tile") == [
        "Is it learning?Yesheld-out loss 33 % lower",
        "Is it over-fitting?Yessince step 100",
        "When was it best?Step 100the last validation is 20 % worse",
    ]
    assert page.texts("div", "verdict") == [" ".join(verdict(read_metrics(over_fitted / "metrics.jsonl")))]
    assert page.texts("title")[0] == "boats: learning, over-fitting"
    assert "Step 200 of 200, epoch 20." in page.texts("p", "muted")


@pytest.mark.parametrize(
    ("held_out", "training_rows", "details"),
    [
        ([0.3, 0.2, 0.1], [0.3, 0.2, 0.1], ["67 % lower", "at its best", "Step 20the last validation"]),
        ([0.3, 0.2, 0.2001], [0.3, 0.2, 0.1], ["33 % lower", "at its best", "Step 10the last validation is as good"]),
        ([0.3, 0.2, 0.25], [0.3, 0.2, 0.25], ["33 % lower", "25 % off its best", "the last validation is 25 % worse"]),
        ([0.3, 0.4, 0.5], [0.3, 0.2, 0.1], ["Nohe", "Yesfrom the start", "Step 10and no better than at first"]),
        (
            [0.3, 0.4, 0.5],
            [0.3, 0.4, 0.5],
            ["Nohe", "does not rise while", "and no better than at first"],
        ),
        (
            [0.3, 0.3, 0.3],
            [0.3, 0.2, 0.1],
            ["Nohe", "does not rise while", "and no better than at first"],
        ),
    ],
)
def test_the_details_of_the_answers_are_true(
    tmp_path: Path, held_out: list[float], training_rows: list[float], details: list[str]
) -> None:
    steps = (0, 10, 20)
    write_metrics(tmp_path, [validation_line(*each) for each in zip(steps, held_out, training_rows, strict=True)])
    tiles = page_of(tmp_path).texts("div", "tile")
    assert [detail in tile for tile, detail in zip(tiles, details, strict=True)] == [True] * 3, tiles


def test_each_section_is_there(over_fitted: Path) -> None:
    page = page_of(over_fitted)
    assert page.texts("h2") == [
        "Is it learning, is it over-fitting?", "Training", "At which noise does it learn?", "Pictures over time",
        "Which pictures?", "The run",
    ]  # fmt: skip
    titles = [title for title in page.texts("title") if title.startswith("held-out rows, step")]
    assert titles[2] == "held-out rows, step 100: 0.2"
    assert "best: step 100" in page.texts("text")
    assert len(page.texts("polygon", "gap")) == 2, "wide and narrow"
    assert len([1 for title in page.texts("title") if title.startswith("bin 9, step 200")]) == 2, "of both sets"
    assert {"learning rate", "gradient norm before clipping", "images per second"} <= set(page.texts("figcaption"))
    assert "2 checkpoints: step 100, 200." in page.texts("p")
    assert ["validation_split", "held_out", "not set"] in table_rows(page)


def table_rows(page: Page) -> list[list[str]]:
    """The cells of all tables' rows."""
    rows: list[list[str]] = []
    for tag, _, texts in page.elements:
        if tag == "tr":
            rows.append([])
        elif tag == "td":
            rows[-1].append(" ".join("".join(texts).split()))
    return rows


def test_the_rows_that_stand_out_come_with_caption_and_picture(over_fitted: Path) -> None:
    page = page_of(over_fitted)
    assert page.texts("h3")[:6] == [
        "Hardest held-out rows at the end", "Hardest training rows at the end",
        "Hardest training rows on average over all validations", "Learned first of the held-out rows",
        "Learned first of the training rows", "Perhaps learned by heart",
    ]  # fmt: skip
    cards = [text for text in page.texts("figcaption") if "× its like" in text]
    ratio, _, rest = cards[0].partition(" × its like ")
    assert (float(ratio), rest) == (pytest.approx(3, rel=0.15), "caption 7 row 7: 7.jpg")
    assert any(card.startswith("0.2") and "held-out rows caption 9" in card for card in cards)
    thumbnails = [each for each in page.attributes("img") if each.get("class") == "thumbnail"]
    assert len(thumbnails) == len([card for card in page.texts("figcaption") if " row " in card]) > 30


def test_nothing_is_loaded_and_no_script_but_its_own_runs(over_fitted: Path) -> None:
    page = page_of(over_fitted)
    links = [
        value for _, attributes, _ in page.elements for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]  # fmt: skip
    assert links
    assert all(str(link).startswith("data:image/jpeg;base64,") for link in links)
    assert "url(" not in page.source
    assert "@import" not in page.source
    (script,) = (texts for tag, _, texts in page.elements if tag == "script")
    (policy,) = (each["content"] for each in page.attributes("meta") if "content" in each and "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256("".join(script).encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]


def test_the_pictures_are_there_without_a_script_and_the_slider_counts_them(over_fitted: Path) -> None:
    page = page_of(over_fitted)
    grids = [each for each in page.attributes("img") if str(each["alt"]).startswith("pictures at step")]
    assert [each["alt"] for each in grids] == [f"pictures at step {step}" for step in (0, 50, 100, 150, 200)]
    assert not any("hidden" in attributes for attributes in page.attributes("figure"))
    (slider,) = page.attributes("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "4", "4")
    (controls,) = (each for each in page.attributes("p") if each.get("class") == "controls")
    assert "hidden" in controls


def test_many_pictures_are_limited_and_broken_ones_named(tmp_path: Path) -> None:
    write_samples(tmp_path, list(range(0, 1000, 10)))
    (tmp_path / "samples" / "step-000000.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    page = page_of(tmp_path)
    grids = [str(each["alt"]) for each in page.attributes("img")]
    assert len(grids) == 11
    assert grids[-1] == "pictures at step 990"
    said = " ".join(page.texts("p"))
    assert "11 of 100 validations are shown" in said
    assert "Cannot be read: step-000000.png." in said


def test_captions_are_text_in_any_script_and_hold_no_secret(tmp_path: Path) -> None:
    hostile = """<script>alert('1')</script><img src=x onerror="alert(2)">"""
    captions = [hostile, "猫が窓の外を見ている", "سماء زرقاء", "\x00\x1b]0;\udcff"[:2], "", None, "x" * 10_000]
    captions += ["a photo at https://me:secretpassword@example.org/a.jpg"]
    write_losses(tmp_path, 0, {HELD_OUT: np.array([3.0] * len(captions) + [1.0] * 60)})
    write_rows(tmp_path, len(captions), caption=captions)
    page = page_of(tmp_path)
    cards = page.texts("figcaption")
    assert any(hostile in card for card in cards)
    assert any("猫が窓の外を見ている" in card for card in cards)
    assert any("سماء زرقاء" in card for card in cards)
    assert len(page.texts("script")) == 1
    assert not [each for each in page.attributes("img") if "onerror" in each]
    assert "secretpassword" not in page.source
    assert max(map(len, cards)) < 300


def test_broken_or_missing_thumbnails_leave_the_caption(tmp_path: Path) -> None:
    thumbnails = [picture(), None, b"", b"\xff\xd8\xff broken", picture()[:-200], b"<svg/>", picture("blue")]
    write_losses(tmp_path, 0, {HELD_OUT: HARDEST_SEVEN})
    write_rows(tmp_path, 7, thumbnail=thumbnails)
    shown: dict[str, bool] = {}
    has_picture = False
    for tag, attributes, texts in page_of(tmp_path).elements:
        if attributes.get("class") in ("thumbnail", "blank"):
            has_picture = tag == "img"
        elif "dir" in attributes:
            shown["".join(texts)] = has_picture
    assert {f"caption {row}": row in (0, 6) for row in range(7)}.items() <= shown.items()


@pytest.mark.parametrize("content", [None, b"", b"no table"])
def test_without_a_table_of_rows_their_numbers_are_shown(tmp_path: Path, content: bytes | None) -> None:
    write_losses(tmp_path, 0, {HELD_OUT: HARDEST_SEVEN})
    if content is not None:
        (tmp_path / "validation" / "rows.parquet").write_bytes(content)
    assert {f"row {row}" for row in range(7)} <= set(page_of(tmp_path).texts("small"))


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.texts("h2") == ["The run"]
    assert "--validation_split" in page.texts("div", "verdict")[0]
    assert "Nothing has been logged yet." in page.texts("p")
    assert "recipe.yaml cannot be read." in page.texts("p")
    assert [tile.split("?")[1][:7] for tile in page.texts("div", "tile")] == ["Unknown"] * 3


def test_a_run_of_three_steps_with_missing_and_strange_figures(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "train_loss": float("nan")}, {"step": 2, "lr": 0.0}, {"step": 3}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "validation_loss": 0.2, "validation_excess_bin_3": -1.0}\n{"step": 4, "train_')
    page = page_of(tmp_path)
    assert "its only measurement" in page.texts("div", "verdict")[0]
    assert page.texts("h2") == ["Is it learning, is it over-fitting?", "Training", "The run"]
    assert "learning rate" in page.texts("figcaption")


def test_incidents_are_listed_and_torn_lines_left_out(tmp_path: Path) -> None:
    lines = [{"step": 7, "kind": "spike", "rows": ["row 3: a.jpg", 4]}, {"step": 9, "kind": "skipped", "rows": []}]
    torn = ['{"step": 10, "ki', "[]", "null", '{"kind": "spike"}']
    (tmp_path / "incidents.jsonl").write_text("\n".join([*map(json.dumps, lines), *torn]))
    assert table_rows(page_of(tmp_path)) == [[], ["7", "spike", "row 3: a.jpg, 4"], ["9", "skipped", ""]]


def test_the_page_is_replaced_whole_and_nothing_else_is_written(over_fitted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in over_fitted.rglob("*") if path.is_file()}
    first = write_run_page(over_fitted).read_bytes()
    write_run_page(over_fitted)
    after = {path: path.stat().st_mtime_ns for path in over_fitted.rglob("*") if path.is_file()}
    page = over_fitted / "report.html"
    assert page.read_bytes() == first, "a function of the folder alone"
    assert {path: time for path, time in after.items() if path != page} == before
    os.replace(page, over_fitted.parent / "kept.html")
    page.symlink_to(over_fitted.parent / "kept.html")
    (over_fitted / "metrics.jsonl").unlink()
    write_run_page(over_fitted)
    assert not page.is_symlink()
    assert (over_fitted.parent / "kept.html").read_bytes() == first


def test_a_real_run_has_a_page_that_says_what_it_was_started_on(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, max_train_steps=2, checkpointing_steps=2)
    train(settings, max_train_steps=4, resume_from_checkpoint="latest")
    page = page_of(tmp_path / "run")
    assert "Started once and resumed once, from step 2." in page.texts("p")
    starts = [row for row in table_rows(page) if len(row) == 7]
    assert [row[1:4] for row in starts] == [["0", "cpu", "1"], ["2", "cpu", "1"]]
    assert all("torch 2." in row[6] and "python 3." in row[6] for row in starts)
    assert "Step 4 of 4" in page.texts("p", "muted")[0]
    assert ["learning_rate", "0.001"] in [row[:2] for row in table_rows(page)]
