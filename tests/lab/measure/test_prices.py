"""Cost from a price file: arithmetic that can be followed by hand, and files that are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from minibert.errors import UserError
from minibert.lab.measure.prices import Cost, Prices, read_prices

NAMES = ("numpy", "numba", "cupy")


def priced(tmp_path: Path, text: str) -> Prices:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    return read_prices(path, NAMES)


def test_hours_and_kilowatt_hours_are_what_they_are(tmp_path: Path) -> None:
    prices = priced(tmp_path, 'currency = "EUR"\nper_kwh = 0.36\n[per_hour]\nnumba = 0.72\ncupy = 3\n')
    # a million tokens of 500 in 0.5 s: 1000 s at 0.0002 EUR a second; of 5 J: 10 kJ at 1e-7 EUR a joule
    found = prices.cost("numba", 0.5, 5.0, 500, "")
    assert isinstance(found, Cost)
    assert found.per_million_tokens == pytest.approx(0.2 + 0.001)
    assert found.basis == "0.72 EUR an hour x measured time + 0.36 EUR a kWh x measured energy"
    cupy = prices.cost("cupy", 0.5, None, 500, "no counters")
    assert isinstance(cupy, Cost) and cupy.per_million_tokens == pytest.approx(1000 * 3 / 3600)
    assert cupy.basis == "3 EUR an hour x measured time (energy left out, being unavailable: no counters)"
    energy = prices.cost("numpy", 0.5, 5.0, 500, "")
    assert isinstance(energy, Cost) and energy.per_million_tokens == pytest.approx(0.001)


def test_what_has_no_price_has_no_cost(tmp_path: Path) -> None:
    prices = priced(tmp_path, 'currency = "EUR"\n[per_hour]\nnumba = 0.72\n')
    assert prices.cost("numpy", 1.0, 5.0, 500, "") == "the price file has no [per_hour] numpy"
    prices = priced(tmp_path, 'currency = "EUR"\nper_kwh = 1\n')
    assert prices.cost("numpy", 1.0, None, 500, "no counters") == (
        "the price file has no [per_hour] numpy, and energy is unavailable: no counters"
    )


def test_a_price_of_nothing_is_a_price(tmp_path: Path) -> None:
    assert priced(tmp_path, 'currency = "EUR"\n[per_hour]\nnumba = 0\n').cost("numba", 1.0, None, 5, "") == Cost(
        0.0, "0 EUR an hour x measured time"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('currency = "USD"\n', "has no price"),
        ("[per_hour]\nnumba = 1\n", "expected a currency"),
        ('currency = ""\nper_kwh = 1\n', "expected a currency"),
        ("currency = 3\nper_kwh = 1\n", "expected a currency"),
        ('currency = "USD"\nper_khw = 1\n', "got 'per_khw'"),
        ('currency = "USD"\n[per_hour]\nnumber = 1\n', "expected numpy, numba, cupy, got 'number'"),
        (
            'currency = "USD"\n[per_hour]\nnumba = -1\n',
            "per_hour numba: expected a number that is not negative, got -1",
        ),
        ('currency = "USD"\n[per_hour]\nnumba = "1"\n', "got '1'"),
        ('currency = "USD"\n[per_hour]\nnumba = true\n', "got True"),
        ('currency = "USD"\nper_kwh = nan\n', "per_kwh: expected a number"),
        ('currency = "USD"\nper_kwh = inf\n', "per_kwh: expected a number"),
        (f'currency = "USD"\nper_kwh = 1{"0" * 400}\n', "per_kwh: expected a number"),
        ('currency = "USD"\nper_hour = 3\n', "expected a table"),
        ("currency = USD\n", "is no TOML"),
    ],
)
def test_a_file_of_mistakes_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        priced(tmp_path, text)
    assert expected in str(refusal.value) and "\n" not in str(refusal.value) and "prices.toml" in str(refusal.value)


def test_a_file_that_is_not_there_or_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_prices(tmp_path / "nowhere.toml", NAMES)
    with pytest.raises(UserError, match="cannot be read"):
        read_prices(tmp_path, NAMES)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no TOML"):
        read_prices(tmp_path / "binary", NAMES)
