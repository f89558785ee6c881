"""Prices that can be used, and one clear sentence about those that cannot."""

import pytest
import torch

from minimand.policies import PriceHistory, read_prices

GOOD = "date,A,B\n2024-01-02,10,5\n2024-01-03,11,5\n2024-01-04,11,6.5\n"


def written(tmp_path, text, name="prices.csv"):
    file = tmp_path / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", [GOOD, GOOD.replace(",", ";"), GOOD.replace(",", "\t"), GOOD.replace("date", "Date")])
def test_a_table_of_prices_is_read_with_its_names_and_dates(tmp_path, text):
    history = read_prices(written(tmp_path, text))
    assert history.names == ("A", "B")
    assert [day[:10] for day in history.dates] == ["2024-01-02", "2024-01-03", "2024-01-04"]
    assert history.prices[..., 0].tolist() == [[10, 5], [11, 5], [11, 6.5]]


def test_dates_may_be_absent_and_may_have_another_name(tmp_path):
    assert read_prices(written(tmp_path, "A,B\n1,2\n3,4\n")).dates is None
    assert read_prices(written(tmp_path, "day,A\n20240102,2\n20240103,4\n"), date="day").names == ("A",)


def test_relatives_multiply_to_the_last_price_and_cash_stands_still():
    prices = torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    history = PriceHistory(prices)
    relatives = history.relatives()
    torch.testing.assert_close(relatives.prod(0)[1:], prices[-1] / prices[0])
    assert (relatives[:, 0] == 1).all()
    torch.testing.assert_close(history.log_returns().exp(), relatives[:, 1:])


def test_a_slice_keeps_names_dates_and_the_memory():
    history = PriceHistory(torch.ones(4, 2), dates=("a", "b", "c", "d"))
    part = history[1:3]
    assert part.dates == ("b", "c")
    assert part.names == history.names
    assert part.prices.data_ptr() == history.prices[1:].data_ptr()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("03,11", "03,"), "prices have a gap: 'A' has no price .NaN. on 2024-01-03"),
        (GOOD.replace("03,11", "03,NaN").replace("6.5", ""), "and 1 more prices cannot be used; fill gaps forward"),
        (GOOD.replace("6.5", "0"), "'B' has a zero price, 0.0, on 2024-01-04"),
        (GOOD.replace("6.5", "-2"), "'B' has a negative price, -2.0, on 2024-01-04"),
        (GOOD.replace("6.5", "inf"), "'B' has an infinite price"),
        (GOOD.replace("6.5", "high"), "column 'B' must hold prices, it holds text"),
        (GOOD.replace("01-03", "01-02"), "dates must rise: 2024-01-02.* comes twice"),
        (GOOD.replace("01-03", "01-05"), "dates must rise: 2024-01-04.* comes after 2024-01-05.*sort"),
        (GOOD.replace("2024-01-03", "later"), "must hold dates such as"),
        (GOOD.replace("2024-01-03", ""), "a row without a date"),
        ("date,A\n2024-01-02,1\n", "at least two days"),
        ("", "cannot read prices.csv as a table"),
    ],
)
def test_prices_that_cannot_be_used_are_refused_with_asset_and_day(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_prices(written(tmp_path, text))


@pytest.mark.untyped
def test_bad_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prices(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"date: prices\.csv has no column 'day'"):
        read_prices(written(tmp_path, GOOD), date="day")
    with pytest.raises(TypeError, match="floating-point"):
        PriceHistory(torch.ones(3, 2).long())
    with pytest.raises(ValueError, match="prices must have shape"):
        PriceHistory(torch.ones(3))
    with pytest.raises(ValueError, match="at least two days"):
        PriceHistory(torch.ones(1, 2))
    with pytest.raises(ValueError, match="names must be one an asset"):
        PriceHistory(torch.ones(3, 2), names=("A",))
    with pytest.raises(ValueError, match="dates must be one a day"):
        PriceHistory(torch.ones(3, 2), dates=("a",))
    with pytest.raises(TypeError, match="sliced by a range"):
        PriceHistory(torch.ones(3, 2))[0]
    with pytest.raises(ValueError, match="a history of 3 days has none from 3 to None"):
        PriceHistory(torch.ones(3, 2))[3:]
