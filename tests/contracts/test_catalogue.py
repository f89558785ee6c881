"""What the catalogue says is so: every part exists, and every proof that is said to stand does."""

import importlib
import pathlib
import re

import pytest

import minimand
from minimand.bench import Study
from minimand.catalogue import PROOFS, find, methods

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILT = [method for method in methods() if method.built]
STUDIED = [method for method in methods() if "study" in method.proofs]


def test_there_are_57_methods_with_names_of_their_own():
    assert [method.card for method in methods()] == list(range(1, 58))
    assert len({method.name for method in methods()}) == 57


@pytest.mark.parametrize("method", BUILT, ids=lambda method: method.name)
def test_every_part_is_there_and_documented(method):
    for path in method.part_paths():
        room, name = path.rsplit(".", 1)
        part = getattr(importlib.import_module(room), name)
        assert name in importlib.import_module(room).__all__
        assert part.__doc__
        assert room.split(".")[1] in minimand.__all__


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_every_proof_that_is_said_to_stand_has_its_file(method):
    assert set(method.proofs) <= set(PROOFS)
    files = {
        "oracles": f"tests/{method.room}/test_{method.module}.py",
        # The parts of the other rooms are of several kinds; test_parts sees to it that each has its contract.
        "contracts": f"tests/contracts/test_{method.room if method.room in ('losses', 'risks') else 'parts'}.py",
        "study": f"src/minimand/studies/{method.module}.py",
        "benchmark": f"benchmarks/{method.room}/bench_{method.module}.py",
        "page": f"docs/methods/{method.name}.md",
    }
    for proof in method.proofs:
        assert (ROOT / files[proof]).exists(), proof
    assert method.built or not method.proofs


@pytest.mark.parametrize("method", STUDIED, ids=lambda method: method.name)
def test_stored_evidence_is_of_the_present_study(method):
    study = importlib.import_module(f"minimand.studies.{method.module}").study
    record = method.evidence()
    assert isinstance(study, Study)
    assert study.method == record["study"] == method.name
    assert record["contenders"] == list(study.contenders)
    assert [claim["says"] for claim in record["claims"]] == [
        claim.says or f"{claim.contender} beats {claim.beats} on {study.metric(claim.metric).name}"
        for claim in study.claims
    ]
    assert len(record["cells"]) == len(study.contenders) * study.seeds
    assert not record["failures"]
    assert record["verdict"] in ("confirmed", "refuted", "inconclusive")


@pytest.mark.parametrize("method", STUDIED, ids=lambda method: method.name)
def test_stored_verdicts_follow_from_the_stored_cells(method):
    """The evidence is judged anew from its cells: nobody wrote a verdict by hand."""
    from minimand.bench import Cell, Outcome, Results, make_record

    study, record = importlib.import_module(f"minimand.studies.{method.module}").study, method.evidence()
    cells = tuple(
        Cell(
            cell["contender"],
            cell["seed"],
            Outcome({k: float("nan") if v is None else v for k, v in cell["metrics"].items()}),
            cell["seconds"],
        )
        for cell in record["cells"]
    )
    again = make_record(study, Results(cells, ()), kind="reproduce", problem=method.name, seconds=0.0)
    for ours, stored in zip(again["claims"], record["claims"], strict=True):
        assert ours["verdict"] == stored["verdict"]
        assert alike(ours, stored)
    for metric, rows in record["summary"].items():
        found = {row["name"]: row for row in again["summary"][metric]}
        assert all(alike(found[row["name"]], row) for row in rows)


def alike(ours, stored):
    """Equal but for the last bits, which the order of summation decides."""
    return ours.keys() == stored.keys() and all(
        ours[key] == (pytest.approx(value) if isinstance(value, float) else value) for key, value in stored.items()
    )


@pytest.mark.parametrize("method", [m for m in methods() if "page" in m.proofs], ids=lambda method: method.name)
def test_a_page_says_what_for_when_not_and_how(method):
    text = (ROOT / "docs" / "methods" / f"{method.name}.md").read_text()
    for heading in ("## What it is for", "## When not to use it", "## Use"):
        assert heading in text
    (block, *_) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10


def test_a_method_is_found_by_name_card_or_arxiv_id():
    assert find("aldr-kl") == find("4") == find("04") == find("2112.14869") == find("aldr_kl")
    with pytest.raises(KeyError, match="did you mean aldr-kl"):
        find("adlr-kl")
