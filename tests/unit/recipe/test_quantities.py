from __future__ import annotations

import pytest
from pydantic import ValidationError

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.recipe import DistillRecipe, EvalRecipe, PruneRecipe, resolve
from flashvaed_cli.recipe.quantities import parse_bucket, parse_memory, parse_ratio, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("480p", (480, 832)), ("1080p", (1080, 1920)), ("32x40", (40, 32)), ("40×32", (32, 40))]
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "480", "4k", "0x8", "8x", "x8", "-8x8", "8.5x8", "832 x 480"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="480p, 720p, 1080p or WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1/8", "0.125", "12.5%", " 1/8 ", "125e-3"])
def test_ratios(text: str) -> None:
    assert parse_ratio(text) == 0.125
    assert PruneRecipe.model_validate({"stage_keep_ratios": {"up3": text}}).stage_keep_ratios == {"up3": 0.125}


@pytest.mark.parametrize("text", ["1/0", "8/1", "2", "0", "x", "", "-1/8", "1/8/2", "150%", "nan"])
def test_no_ratios(text: str) -> None:
    with pytest.raises(ValidationError):
        PruneRecipe.model_validate({"keep_ratio": text})


@pytest.mark.parametrize(
    ("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32")]
)
def test_short_names_of_number_formats(short: str, full: str) -> None:
    assert PruneRecipe.model_validate({"dtype": short}).dtype == full


def test_buckets_as_text_and_as_numbers_are_the_same() -> None:
    assert parse_bucket("17x128×96") == (17, 128, 96)
    texts = DistillRecipe.model_validate({"buckets": ["17x128x96", "1x8x8"]})
    numbers = DistillRecipe.model_validate({"buckets": [[17, 128, 96], (1, 8, 8)]})
    assert texts == numbers == DistillRecipe.model_validate(texts.model_dump(mode="json"))
    assert DistillRecipe.model_validate({"buckets": "17x128x96"}).buckets == ((17, 128, 96),)


@pytest.mark.parametrize("bucket", ["", "17x128", "17x128x", "0x8x8", "17x128x128x3", [17, 128], [17, 0, 8], 17])
def test_no_buckets(bucket: object) -> None:
    with pytest.raises(RecipeError, match=r"--bucket|buckets"):
        resolve(DistillRecipe, None, {"buckets": (bucket,)}, flags={"buckets": "--bucket"})


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("4GB", 4 * 10**9), ("1.5 gb", 15 * 10**8), ("512MiB", 2**29), ("1000", 1000)]
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "-4GB", "4GBs", "GB", "much", "0.1", "1e9"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(ValueError, match="4GB or 512MiB"):
        parse_memory(text)


def test_texts_with_commas_lists_and_numbers_are_the_same() -> None:
    texts = EvalRecipe.model_validate({"speed": True, "sizes": "480p, 32x40", "frames": "9,81"})
    lists = EvalRecipe.model_validate({"speed": True, "sizes": ["480p", "32x40"], "frames": [9, 81]})
    assert texts == lists
    assert EvalRecipe.model_validate({"speed": True, "frames": 9}).frames == (9,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": "480p,"}, "WIDTHxHEIGHT"),
        ({"sizes": []}, "at least 1"),
        ({"frames": "9,0"}, "greater than 0"),
        ({"frames": "9,,8"}, "integer"),
        ({"frames": True}, "tuple"),
        ({"max_memory": "some"}, "4GB"),
    ],
)
def test_mistakes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(EvalRecipe, None, {"speed": True, **settings})


def test_what_speaks_of_speed_needs_speed() -> None:
    with pytest.raises(RecipeError, match=r"--sizes, --frames: only with --speed"):
        resolve(EvalRecipe, None, {"sizes": "480p", "frames": "17"})
    assert resolve(EvalRecipe, None, {"compile": False}).speed is False  # asks for nothing
