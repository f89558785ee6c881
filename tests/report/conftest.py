"""Records of every shape, for every test that holds for all."""

import pytest
from records import METRICS, NAMES, broken_record, make_record, small_record

LONG = [f"{name}, {'x' * 60} {place}" for place, name in enumerate((NAMES * 2)[:20])]
RECORDS = {
    "realistic": make_record,
    "reproduction": lambda: make_record(kind="reproduce"),
    "one contender, one seed": lambda: small_record(("only",), seeds=1),
    "two contenders, one seed": lambda: small_record(seeds=1),
    "no curves": small_record,
    "two metrics": lambda: small_record(metrics=METRICS[2:4]),
    "twenty long names": lambda: make_record(LONG, seeds=2),
    "holes": broken_record,
}


@pytest.fixture(params=RECORDS, scope="session")
def record(request):
    return RECORDS[request.param]()
