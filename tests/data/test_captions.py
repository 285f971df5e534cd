import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import CLIPTokenizer

import sd_recipes
from sd_recipes.data.captions import CaptionError, caption_columns, count_tokens, make_caption, tokenize
from sd_recipes.data.draws import Draws, draw
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import CaptionConfig


def drawn(position: int = 0) -> Draws:
    return draw(3, position, stratum=0, global_batch_size=1, latent_shape=(1, 1, 1), num_train_timesteps=10)


def caption(row: dict, position: int = 0, **settings: object) -> str:
    return make_caption(row, CaptionConfig(**settings), drawn(position))


def test_columns_are_those_of_the_template_or_the_list_or_the_one() -> None:
    assert caption_columns(CaptionConfig(caption_column="prompt")) == ["prompt"]
    assert caption_columns(CaptionConfig(caption_columns=["a", "b"])) == ["a", "b"]
    template = "{{a}} photo of {my name}, {b.c} and {my name}"
    assert caption_columns(CaptionConfig(caption_template=template)) == ["my name", "b.c"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a photo of {name", "expected '}'"),
        ("a photo of name}", "single '}'"),
        ("a photo", "names no column"),
        ("", "names no column"),
        ("a photo of {}", "the name of a column"),
        ("a photo of {name!r}", "the name of a column"),
        ("a photo of {price:.2f}", "the name of a column"),
    ],
)
def test_a_template_that_cannot_be_filled_is_a_mistake(template: str, words: str) -> None:
    with pytest.raises(RecipeError, match="--caption_template") as error:
        caption_columns(CaptionConfig(caption_template=template))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_is_filled_with_columns_and_their_lists() -> None:
    template = "a {{good}} photo of {name} in {year}, by {by.name}"
    row = {"name": "a cat", "year": 1999, "by.name": "Ann", "other": 3}
    assert caption(row, caption_template=template) == "a {good} photo of a cat in 1999, by Ann"
    row = {"kind": ["cat", "dog"], "name": ["Tom", "Rex"]}
    captions = {caption(row, position, caption_template="{kind} {name}") for position in range(20)}
    assert captions == {"cat Tom", "dog Rex"}  # lists of one length are read at one place
    with pytest.raises(CaptionError, match="missing in name"):
        caption({"kind": "cat", "name": " "}, caption_template="{kind} {name}")
    assert caption({"kind": "cat", "name": None}, caption_template="{kind} {name}", blank_captions="empty") == ""


def test_one_column_and_one_of_its_list_is_drawn_evenly() -> None:
    row = {"short": "a", "long": ["b", "c", "", None], "none": None}
    captions = [caption(row, position, caption_columns=["short", "long", "none"]) for position in range(2000)]
    shares = {text: captions.count(text) / len(captions) for text in set(captions)}
    assert set(shares) == {"a", "b", "c"}  # what is blank is not drawn
    assert shares["a"] == pytest.approx(1 / 2, abs=0.04)
    assert shares["b"] == pytest.approx(1 / 4, abs=0.04)
    assert captions[7] == caption(row, 7, caption_columns=["short", "long", "none"])


@pytest.mark.parametrize("blank", [None, "", " \n\t", [], [None, " "]])
def test_blank_captions_are_bad_or_empty_by_setting(blank: object) -> None:
    for setting in ("skip", "error"):
        with pytest.raises(CaptionError, match=r"no caption: blank or missing in text .*--blank_captions"):
            caption({"text": blank}, blank_captions=setting, caption_dropout=1)
    assert caption({"text": blank}, blank_captions="empty") == ""
    assert caption({}, blank_captions="empty") == ""
    with pytest.raises(CaptionError, match="in a, b"):
        caption({"a": blank, "b": None}, caption_columns=["a", "b"])


@pytest.mark.parametrize("value", [3, 2.5, {"en": "cat"}, ["a cat", 3], [["a cat"]], b"a cat", ["y", 3, "z" * 999]])
def test_what_is_not_text_is_named_whatever_is_drawn(value: object) -> None:
    for position in range(5):
        with pytest.raises(CaptionError, match="column prompt holds") as error:
            caption({"prompt": value}, position, caption_column="prompt", blank_captions="empty", caption_dropout=1)
        assert len(str(error.value)) < 200


def test_dropout_empties_that_share_of_the_captions() -> None:
    captions = [caption({"text": "a cat"}, position, caption_dropout=0.25) for position in range(2000)]
    assert set(captions) == {"", "a cat"}
    assert captions.count("") / len(captions) == pytest.approx(0.25, abs=0.03)


def test_tags_are_shuffled_and_separators_stay() -> None:
    row = {"text": "cat, red ,blue,  one two, "}
    captions = [caption(row, position, shuffle_tags=True) for position in range(500)]
    orders = {tuple(part.strip() for part in text.split(",")) for text in captions}
    assert len(orders) == 24
    assert all(sorted(order[:4]) == ["blue", "cat", "one two", "red"] and order[4] == "" for order in orders)
    assert all(re.sub("cat|red|blue|one two", "*", text) == "*, * ,*,  *," for text in captions)
    assert caption(row, 9, shuffle_tags=True) == captions[9]
    for position in range(50):
        kept = caption(row, position, shuffle_tags=True, keep_tags=3).split(",")
        assert [part.strip() for part in kept] == ["cat", "red", "blue", "one two", ""]
    settings = {"shuffle_tags": True, "keep_tags": 1, "tag_separator": "|"}
    orders = {caption({"text": "a|b|c"}, position, **settings) for position in range(20)}
    assert orders == {"a|b|c", "a|c|b"}
    assert caption({"text": "cat"}, shuffle_tags=True, keep_tags=5) == "cat"


def test_shuffling_draws_from_a_counter_of_its_own() -> None:
    sample = drawn(4)
    sample.tag_keys(100)
    assert (sample.tag_keys(3) == sample.tag_keys(5)[:3]).all()
    assert (sample.tag_keys(3) != drawn(5).tag_keys(3)).all()
    # The other draws are what they were before there were tags, to the bit.
    choices = (sample.flip_u, sample.caption_u, sample.dropout_u)
    assert choices == (0.4565765909040532, 0.6532226342998231, 0.054298641879637066)
    assert sample.noise.item() == pytest.approx(0.23097963631153107, abs=1e-7)


@pytest.fixture(scope="module", params=["tiny", "shipped"])
def tokenizer(request: pytest.FixtureRequest) -> CLIPTokenizer:
    if request.param == "tiny":
        return tiny_tokenizer(max_length=16)
    return CLIPTokenizer.from_pretrained(
        Path(sd_recipes.__file__).parent / "assets" / "tiny-emoji", subfolder="tokenizer"
    )


CAPTIONS = ["ab", "", "a" * 9 + ", bcd." * 70, "a cat, 3 dogs", "abc " * 7, " abc\n", "<|endoftext|> a"]


def test_truncated_captions_are_as_the_tokenizer_cuts_them(tokenizer: CLIPTokenizer) -> None:
    length = tokenizer.model_max_length
    input_ids = tokenize(tokenizer, CAPTIONS, CaptionConfig())
    own = tokenizer(CAPTIONS, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert input_ids.dtype == own.dtype == torch.int64
    assert torch.equal(input_ids, own)
    assert tokenize(tokenizer, [], CaptionConfig()).shape == (0, length)


def test_chunks_hold_all_tokens_in_their_order(tokenizer: CLIPTokenizer) -> None:
    length = tokenizer.model_max_length
    room = length - 2
    one = tokenize(tokenizer, CAPTIONS, CaptionConfig(long_captions="chunk", caption_chunks=1))
    assert torch.equal(one, tokenize(tokenizer, CAPTIONS, CaptionConfig()))
    input_ids = tokenize(tokenizer, CAPTIONS, CaptionConfig(long_captions="chunk", caption_chunks=4))
    assert input_ids.shape == (len(CAPTIONS), 4 * length)
    all_tokens = tokenizer(CAPTIONS, add_special_tokens=False, verbose=False).input_ids
    assert len(all_tokens[2]) > 4 * room  # one is cut
    for chunks, tokens in zip(input_ids.reshape(-1, 4, length).tolist(), all_tokens, strict=True):
        found = []
        for number, chunk in enumerate(chunks):
            count = max(0, min(len(tokens) - number * room, room))
            assert chunk[0] == tokenizer.bos_token_id
            assert chunk[1 + count] == tokenizer.eos_token_id
            assert set(chunk[2 + count :]) <= {tokenizer.pad_token_id}
            found += chunk[1 : 1 + count]
        assert found == tokens[: 4 * room]
    empty = tokenize(tokenizer, [""], CaptionConfig())[0]
    assert torch.equal(input_ids[0, -length:], empty)


def test_a_long_caption_may_be_an_error(tokenizer: CLIPTokenizer) -> None:
    config = CaptionConfig(long_captions="error")
    room = tokenizer.model_max_length - 2
    fits = "a " * room
    assert torch.equal(tokenize(tokenizer, [fits], config), tokenize(tokenizer, [fits], CaptionConfig()))
    with pytest.raises(CaptionError, match=rf"{room + 1} tokens where {room} fit.*--long_captions"):
        tokenize(tokenizer, ["a", fits + "a"], config)
    assert count_tokens(tokenizer, [fits, fits + "a", ""]) == [room, room + 1, 0]
    assert count_tokens(tokenizer, []) == []


def test_padding_is_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer(max_length=8)
    tokenizer.pad_token = "a"  # as Stable Diffusion 2 pads with an exclamation mark
    input_ids = tokenize(tokenizer, ["b"], CaptionConfig(long_captions="chunk", caption_chunks=2))
    own = tokenizer(["b", ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
    assert torch.equal(input_ids, own.reshape(1, 16))


def captions_of(row: dict, **settings: object) -> set[str]:
    return {caption(row, position, **settings) for position in range(40)}


def test_defect_22_lists_of_one_length_stay_together_where_some_are_blank() -> None:
    template = {"caption_template": "a {colour} {kind}"}
    assert captions_of({"kind": ["cat", "dog"], "colour": ["", "brown"]}, **template) == {"a brown dog"}
    row = {"kind": ["cat", "dog", "owl"], "colour": ["black", None, "white"]}
    assert captions_of(row, **template) == {"a black cat", "a white owl"}
    row = {"kind": ["cat", "dog", "owl"], "colour": ["black", "white"]}  # of other lengths: nothing belongs together
    assert {text.split()[1] for text in captions_of(row, **template)} == {"black", "white"}
    assert captions_of({"kind": ["cat", " "], "colour": "red"}, **template) == {"a red cat"}
    row = {"kind": ["cat", None], "colour": ["", "brown"]}
    for position in range(5):
        with pytest.raises(CaptionError, match="missing in kind, colour, at every place in one of them"):
            caption(row, position, caption_template="a {kind}, {colour}")
    assert captions_of(row, **template, blank_captions="empty") == {""}


def test_defect_22_nan_is_a_missing_value() -> None:
    template = {"caption_template": "a {kind} of {year}"}
    for nan in (float("nan"), np.float64("nan"), np.float32("nan"), [float("nan")]):
        with pytest.raises(CaptionError, match="missing in year "):
            caption({"kind": "cat", "year": nan}, **template)
        assert caption({"kind": "cat", "year": nan}, **template, blank_captions="empty") == ""
        with pytest.raises(CaptionError, match="no caption: blank or missing in text"):
            caption({"text": nan})
    assert captions_of({"kind": ["cat", "dog"], "year": [float("nan"), 1999.5]}, **template) == {"a dog of 1999.5"}
    assert captions_of({"text": ["a cat", float("nan")]}) == {"a cat"}
    assert caption({"text": "nan"}) == "nan", "a text like another: bread"
    assert caption({"kind": "nan", "year": 0}, **template) == "a nan of 0"


def test_defect_32_shuffling_tags_takes_time_in_proportion_to_the_spaces() -> None:
    tag = "red" + " " * 10_000 + "blue" + "\t" * 10_000 + "pink"
    began = time.process_time()
    captions = captions_of({"text": f"cat, {tag} ,dog"}, shuffle_tags=True)
    assert time.process_time() - began < 1
    assert {f"cat, {tag} ,dog", f"{tag}, dog ,cat", f"dog, cat ,{tag}"} < captions


@pytest.mark.parametrize("separator", [",", " ", ", ", " , ", "  ", "\n", " | ", "aa", "a "])
def test_tags_are_cut_as_by_a_pattern_with_the_space_around(separator: str) -> None:
    """Which is quadratic, and says what separators are."""
    rng = random.Random(separator)
    for position in range(500):
        text = "".join(rng.choices("ab,|  \t\n", k=rng.randrange(1, 12))) + "a"
        parts = re.split(rf"(\s*{re.escape(separator)}\s*)", text.strip())
        places = [place for place in range(0, len(parts), 2) if parts[place]]
        order = np.argsort(drawn(position).tag_keys(len(places)))
        for place, tag in zip(places, [parts[places[number]] for number in order], strict=True):
            parts[place] = tag
        assert caption({"text": text}, position, shuffle_tags=True, tag_separator=separator) == "".join(parts)
