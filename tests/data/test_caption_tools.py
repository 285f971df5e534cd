"""Prefix and suffix, wildcards, tags that are left out, and the marks that say which of them stay."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import tiny_tokenizer
from training_runs import build, losses, train

from sd_recipes.data.captions import make_caption
from sd_recipes.data.checks import check_held_out
from sd_recipes.data.draws import draw
from sd_recipes.data.first_words import example_captions
from sd_recipes.data.held_out import FixedRows
from sd_recipes.data.wildcards import fill_wildcards
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.sample_errors import HELD_OUT
from sd_recipes.evaluation.watched_rows import HARDEST_ROWS, WatchedRows, write_hardest_rows
from sd_recipes.flags import build_recipe, load_recipe
from sd_recipes.inspection.caption_checks import CaptionSummary
from sd_recipes.recipe import CaptionConfig, DataSettings, Recipe, odd_settings
from sd_recipes.runtime.trackers import VALIDATION

TAGS = "cat, red ,blue,  one two"


def caption(text: str, position: int = 0, **settings: Any) -> str:
    drawn = draw(3, position, stratum=0, global_batch_size=1, latent_shape=(1, 1, 1), num_train_timesteps=10)
    return make_caption({"text": text}, CaptionConfig(**settings), drawn)


def captions(text: str, number: int = 200, **settings: Any) -> Counter[str]:
    return Counter(caption(text, position, **settings) for position in range(number))


def words(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",")]


def test_prefix_and_suffix_surround_every_caption_but_the_empty_one() -> None:
    settings = {"caption_prefix": "sks,", "caption_suffix": "in oil"}
    assert caption("a cat", **settings) == "sks, a cat in oil"
    assert caption("a cat", caption_suffix=", oil") == "a cat , oil"
    assert caption("a cat", **settings, caption_dropout=1) == ""
    assert caption(" ", **settings, blank_captions="empty") == ""
    # They are tags like the others, of which the first is kept.
    kept = captions("a, b", **settings, shuffle_tags=True, keep_tags=1)
    assert set(kept) == {"sks, a, b in oil", "sks, b in oil, a"}


@pytest.mark.parametrize(("text", "expected"), [
    ("a {red|blue} cat", {"a red cat", "a blue cat"}),
    ("{a|b} {a|b}", {"a a", "a b", "b a", "b b"}),
    ("{a|{b|c}} d", {"a d", "b d", "c d"}),
    ("{a|{b|{c|d}}}", {"a", "b", "c", "d"}),
    ("{ {a|b}|c}", {" a", " b", "c"}),
    ("{|very }big", {"big", "very big"}),
    ("{alone}", {"alone"}),
    ("{{a|b}} {c|d}", {"{a|b} c", "{a|b} d"}),
    ("{a|{{b}}}", {"a", "{b}"}),
    ("{}, :}, {:, a|b, {x|y", {"{}, :}, {:, a|b, {x|y"}),
    ("{x|{y|z}", {"{x|y", "{x|z"}),
    ("}{a|b}{", {"}a{", "}b{"}),
    ("", {""}),
])  # fmt: skip
def test_wildcards_are_drawn_for_every_sample(text: str, expected: set[str]) -> None:
    drawn = {fill_wildcards(text, itertools.cycle(us)) for us in itertools.product([0.0, 0.4, 0.99], repeat=3)}
    assert drawn == expected


def test_the_choices_of_a_wildcard_are_as_likely_as_each_other_and_those_of_another_as_any() -> None:
    drawn = captions("{a|b|c} {a|b|c}", 3000, enable_wildcard=True)
    assert len(drawn) == 9
    assert all(number == pytest.approx(3000 / 9, abs=75) for number in drawn.values())
    assert caption("{a|b|c}", 7, enable_wildcard=True) == caption("{a|b|c}", 7, enable_wildcard=True)
    assert caption("{a|b}") == "{a|b}"


def test_tags_are_left_out_each_by_itself_but_for_those_that_are_kept() -> None:
    drawn = captions(TAGS, 4000, caption_tag_dropout_rate=0.25, keep_tags=1)
    assert all(text.startswith("cat") for text in drawn)
    assert {tuple(words(text)) for text in drawn} == {
        ("cat", *rest) for number in range(4) for rest in itertools.combinations(["red", "blue", "one two"], number)
    }
    for tag in ("red", "blue", "one two"):
        assert sum(drawn[text] for text in drawn if tag in text) / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn[TAGS] / 4000 == pytest.approx(0.75**3, abs=0.03)  # as it was, with the separators that it has
    assert set(captions("a, b,", caption_tag_dropout_rate=0.5)) == {"a, b,", "a,", "b,", ""}
    assert set(captions("a, b", caption_tag_dropout_rate=1)) == {""}
    assert caption("a, b", caption_tag_dropout_rate=1, keep_tags=2) == "a, b"
    both = captions(TAGS, 2000, caption_tag_dropout_rate=0.25, keep_tags=1, shuffle_tags=True)
    assert {tuple(words(text)) for text in both} == {
        ("cat", *rest) for number in range(4) for rest in itertools.permutations(["red", "blue", "one two"], number)
    }


def test_tags_outside_the_marks_stay_and_the_marks_go() -> None:
    moving = {"shuffle_tags": True, "keep_tokens_separator": "|||"}
    assert set(captions("1girl, sks |||red, blue, ||| best", **moving)) == {
        "1girl, sks, red, blue, best", "1girl, sks, blue, red, best",
    }  # fmt: skip
    assert set(captions("sks,||| a,b", **moving)) == {"sks, a, b", "sks, b, a"}
    assert set(captions("a, b", **moving, keep_tags=1)) == {"a, b"}  # without a mark their number counts
    assert set(captions("c ||| a, b", **moving, keep_tags=9)) == {"c, a, b", "c, b, a"}  # with one it does not
    dropped = captions("sks ||| a, b ||| best", caption_tag_dropout_rate=1, keep_tokens_separator="|||")
    assert set(dropped) == {"sks, best"}
    assert caption("sks ||| a, b", keep_tokens_separator="|||") == "sks, a, b"  # also where nothing moves
    assert set(captions("x ||| a; b", **moving, tag_separator=";")) == {"x; a; b", "x; b; a"}


def test_joined_tags_move_and_are_left_out_together() -> None:
    settings = {"secondary_separator": ";;;"}
    assert caption("a ;;; b, c", **settings) == "a, b, c"
    assert set(captions("a;;;b, c", **settings, shuffle_tags=True)) == {"a, b, c", "c, a, b"}
    assert set(captions("a;;;b, c", **settings, caption_tag_dropout_rate=0.5)) == {"a, b, c", "a, b", "c", ""}
    marked = captions("x;;;y ||| a;;;b, c", **settings, keep_tokens_separator="|||", shuffle_tags=True)
    assert set(marked) == {"x, y, a, b, c", "x, y, c, a, b"}


def test_new_draws_leave_all_others_as_they_were() -> None:
    for position in range(20):
        plain = caption(TAGS, position, shuffle_tags=True)
        assert caption(TAGS, position, shuffle_tags=True, enable_wildcard=True, caption_tag_dropout_rate=0) == plain
        left = words(caption(TAGS, position, shuffle_tags=True, caption_tag_dropout_rate=0.5))
        assert left == [""] or [tag for tag in words(plain) if tag in left] == left, "the same order"


def test_the_first_words_and_inspect_show_captions_as_they_are_drawn() -> None:
    row = {"text": ["{red|blue}, a", "{red|blue}, a"]}
    config = DataSettings(train_data_dir="d", caption_prefix="sks,", enable_wildcard=True, caption_dropout=0.9,
                          shuffle_tags=True, keep_tags=1)  # fmt: skip
    shown = {text for number in range(1, 4) for text in example_captions([row] * number, config)}
    assert len(shown) > 1
    assert shown <= {"sks, red, a", "sks, blue, a", "sks, a, red", "sks, a, blue"}
    summary = CaptionSummary(config, tiny_tokenizer())
    assert summary.update([(0, "row 0", row)]) == []
    (one,) = set(summary.captions_of(row))
    assert re.fullmatch("sks, (red|blue), a", one), "in order, so that equal captions are found"
    assert summary.token_counts[:12].nonzero()[0].tolist() == [len(one.replace(" ", ""))], "what is trained is counted"


def test_in_every_second_epoch_all_captions_are_empty(settings: dict[str, Any]) -> None:
    run = build(settings, train_batch_size=8, caption_dropout_every_n_epochs=2)
    empty = run.batches.builder.tokenize([""], run.recipe)
    batches = [batch for step in run.batches(0, 4) for batch in step]
    assert [batch.plan.epoch for batch in batches] == [0, 1, 2, 3]
    assert [torch.equal(batch.input_ids, empty.expand_as(batch.input_ids)) for batch in batches] == [
        False, True, False, True,
    ]  # fmt: skip
    plain = build(settings, train_batch_size=8, output_dir=settings["output_dir"] + "-plain")
    for one, other in zip(batches, (batch for step in plain.batches(0, 4) for batch in step), strict=True):
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.input_ids, other.input_ids) == (one.plan.epoch % 2 == 0)


def test_a_run_with_all_tools_resumes_to_the_bit_with_kept_text_states(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {
        "caption_prefix": "{a|b},", "caption_suffix": ", c;;;d", "enable_wildcard": True, "shuffle_tags": True,
        "caption_tag_dropout_rate": 0.3, "secondary_separator": ";;;", "keep_tokens_separator": "|||",
        "caption_dropout_every_n_epochs": 2, "checkpointing_steps": 2, "max_train_steps": 4, "train_batch_size": 4,
    }  # fmt: skip
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, cache_text=True)
    assert losses(whole)[2:] == losses(resumed)


def test_what_has_no_effect_is_refused_or_told() -> None:
    """Epochs of several streams, which never end; kept text states of captions that do not come again."""
    streams = [{"train_data_dir": name} for name in ("a", "b")]
    settings = {"pretrained_model_name_or_path": "m", "data_sources": streams, "streaming": True, "max_train_steps": 1}
    with pytest.raises(RecipeError, match="--caption_dropout_every_n_epochs counts epochs, and several streams have"):
        build_recipe({**settings, "caption_dropout_every_n_epochs": 2})
    build_recipe({**settings, "data_sources": streams[:1], "caption_dropout_every_n_epochs": 2})
    for name, value in (("shuffle_tags", True), ("caption_tag_dropout_rate", 0.1), ("enable_wildcard", True)):
        (words,) = odd_settings(build_recipe({**settings, "cache_text": True, name: value}))
        assert f"and --{name} makes new ones in every epoch: drop --cache_text" in words
        assert odd_settings(build_recipe({**settings, name: value})) == []


def test_captions_that_are_looked_at_are_those_without_dropout_or_shuffling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a run's recipe leaves out of them: prompts to draw, the page of hard rows, the warning of long ones."""
    text = ", ".join(f"tag {number}" for number in range(60))
    rows = datasets.Dataset.from_list([{"text": text, "moments": 0}] * 2)
    recipe = Recipe(
        pretrained_model_name_or_path="m", train_data_dir="d", caption_column="text", caption_dropout=0.99,
        caption_tag_dropout_rate=0.9, shuffle_tags=True,
    )  # fmt: skip
    assert WatchedRows({HELD_OUT: FixedRows(rows, np.arange(2))}, recipe).captions(2) == [text]
    write_hardest_rows(rows, [1], recipe, tmp_path)
    assert pq.read_table(tmp_path / VALIDATION / HARDEST_ROWS)["caption"].to_pylist() == [text]
    check_held_out(rows, recipe, tiny_tokenizer(), seed=0)
    assert "the captions of 2 of 2 rows" in caplog.text


@pytest.mark.parametrize(("flags", "message"), [
    (["--keep_tags", "1"], "--keep_tags needs --shuffle_tags or --caption_tag_dropout_rate: add one, or drop --keep_t"),
    (["--keep_tokens_separator", ",,"], "--keep_tokens_separator ',,' holds --tag_separator ',', .*choose another"),
    (["--keep_tokens_separator", "|", "--secondary_separator", "||"], "--secondary_separator '||' holds --keep_tok"),
    (["--secondary_separator", ""], "--secondary_separator: .* at least 1 character"),
    (["--caption_tag_dropout_rate", "1.5"], "--caption_tag_dropout_rate: .*less than or equal to 1"),
    (["--caption_dropout_every_n_epochs", "-1"], "--caption_dropout_every_n_epochs: .*greater than or equal to 0"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("|", r"\|")) as error:
        load_recipe(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *flags])
    assert "\n" not in str(error.value)
