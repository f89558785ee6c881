"""The page holds what the record holds, harms no reader and asks the network for nothing."""

import html.parser
import json
import os
import re
import subprocess
import sys

import pytest
from records import METRICS, broken_record, make_record, small_record

from minimand.report import html as page
from minimand.report import numbers, render, write

VOID = {"meta", "br", "input", "link", "img", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


class Reader(html.parser.HTMLParser):
    """Reads a page strictly: every tag that opens closes, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_every_record_makes_a_well_formed_page(record):
    reader = Reader(render(record))
    assert [tag for tag in ("html", "head", "body", "h1") if len(reader.all(tag)) != 1] == []
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {attrs["href"][1:] for attrs in reader.all("use")}
    labelled = {attrs["aria-labelledby"] for attrs in reader.all("section")}
    assert used | labelled <= set(ids)


def test_the_page_refers_to_nothing_outside_itself(record):
    text = render(record)
    for _, attrs in Reader(text).tags:
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
        assert "url(" not in attrs.get("style", "")
    assert not re.search(r"@import|url\(|https?://|fetch\(|XMLHttpRequest|WebSocket", text)


def test_the_same_record_gives_the_same_page(record):
    assert render(record) == render(json.loads(json.dumps(record)))


def test_the_seed_of_hashes_does_not_change_the_page():
    code = "import sys, json; from minimand.report import render; sys.stdout.write(render(json.load(sys.stdin)))"
    pages = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            input=json.dumps(small_record(metrics=METRICS[:2])),
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert pages[0] == pages[1] == render(small_record(metrics=METRICS[:2]))


def test_every_number_of_the_summary_and_the_comparisons_is_on_the_page(record):
    text = Reader(render(record)).text
    for metric in record["metrics"]:
        view = page.table(record, metric)
        assert [row["name"] for row in view["rows"]][: len(record["summary"][metric["name"]])] == [
            row["name"] for row in record["summary"][metric["name"]]
        ]
        for row in view["rows"]:
            assert row["name"] in text
            assert numbers.number(row["mean"], view["places"]) in text
            assert numbers.interval(row["low"], row["high"], view["places"]) in text
            assert numbers.number(row["seconds"], view["seconds_places"]) in text
            if row["standing"] != "baseline":
                assert numbers.number(row["gain"], view["gain_places"], signed=True) in text
                assert numbers.interval(row["gain_low"], row["gain_high"], view["gain_places"], signed=True) in text
                assert numbers.p_value(row["p_adjusted"]) in text


def test_percent_metrics_are_shown_in_percent_and_their_differences_in_points():
    record = small_record()
    record["summary"]["accuracy"][0] |= {"mean": 0.91234, "low": 0.90, "high": 0.92468}
    record["comparisons"]["accuracy"][0] |= {"difference": -0.0213, "low": -0.0301, "high": -0.0125}
    text = Reader(render(record)).text
    assert "91.2 90.0 to 92.5" in text
    assert "−2.1 −3.0 to −1.2" in text


def test_what_is_not_finite_is_a_dash_and_breaks_nothing():
    text = render(broken_record())
    words = Reader(text.replace("loss is &lt;NaN&gt;", "")).text.split()
    assert not {"nan", "None", "inf", "-inf", "Infinity"} & set(words)
    places = {"x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "d", "style", "width", "data-value"}
    for _, attrs in Reader(text).tags:
        values = " ".join(value or "" for key, value in attrs.items() if key in places)
        assert not re.search(r"\b(nan|inf|None)\b", values)
    assert text.count(numbers.DASH) > 10
    assert "3 cells failed" in Reader(text).text
    assert "FloatingPointError: loss is <NaN>" in Reader(text).text


def test_names_from_users_files_are_text_and_never_markup():
    text = json.dumps(make_record(("base", "other", "third"), seeds=2, metrics=METRICS[:2], kind="reproduce"))
    for word, name in (("other", HOSTILE), ("accuracy", f"m {HOSTILE}")):
        text = text.replace(word, json.dumps(name)[1:-1])
    hostile = json.loads(text)
    for key in ("study", "method", "data", "about", "notes", "sentence", "code", "problem"):
        hostile[key] = f"{key} {HOSTILE}"
    hostile["settings"] = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    hostile["versions"] = hostile["machine"] = {HOSTILE: HOSTILE}
    hostile["failures"] = [{"contender": HOSTILE, "seed": 0, "error": HOSTILE}]
    hostile["cells"][0]["curves"][HOSTILE] = [1.0, 0.5]
    reader = Reader(render(hostile))
    assert len(reader.all("script")) == 1
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert reader.text.count(HOSTILE) > 20
    assert "49" not in reader.text.split()


def test_only_the_pages_own_script_may_run():
    text = render(small_record())
    policy = next(attrs["content"] for attrs in Reader(text).all("meta") if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_claims_and_the_verdict_are_shown_for_a_reproduction_only():
    record = make_record(kind="reproduce")
    text = Reader(render(record)).text
    for claim in record["claims"]:
        assert (claim["says"] or f"{claim['contender']} beats {claim['beats']}") in text
    for verdict in ("✓ confirmed", "? inconclusive", "✕ refuted"):
        assert verdict in text
    assert numbers.interval(100 * record["claims"][0]["low"], 100 * record["claims"][0]["high"], 1, signed=True) in text
    assert "Claims" not in Reader(render(make_record())).text


def test_sections_without_data_are_left_out():
    reader = Reader(render(small_record(("only",), seeds=1)))
    sections = {attrs["aria-labelledby"] for attrs in reader.all("section")}
    assert sections == {"leaderboard", "seeds", "setup", "use", "notes"}
    assert reader.all("fieldset") == []
    full = {attrs["aria-labelledby"] for attrs in Reader(render(make_record(kind="reproduce"))).all("section")}
    assert full == sections | {"curves", "ranks", "cost", "claims"}


def test_without_scripts_the_first_metric_is_shown_and_the_others_are_hidden(record):
    parts = [attrs for _, attrs in Reader(render(record)).tags if "data-metric" in attrs]
    assert {("hidden" in attrs) for attrs in parts if attrs["data-metric"] == "1"} == {False}
    assert all("hidden" in attrs for attrs in parts if attrs["data-metric"] != "1")


def test_tables_have_captions_and_heads_and_pictures_have_words(record):
    reader = Reader(render(record))
    assert len(reader.all("caption")) == len(reader.all("table"))
    assert all("scope" in attrs for attrs in reader.all("th"))
    for drawing in re.findall(r"<svg\b[^>]*>\s*\S+", render(record)):
        assert 'aria-hidden="true"' in drawing or "<title>" in drawing or "viewBox" in drawing


def luminance(colour):
    shares = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_keep_the_contrast_of_wcag_aa_in_both_themes():
    style = re.search(r"<style>(.*?)</style>", render(small_record()), re.S)[1]
    light, dark, also_dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root[^{]*\{(.*?)\}", style, re.S)[:3]
    )
    assert dark == also_dark
    pairs = [("ink", ground) for ground in ("paper", "raised", "bad-tint")] + [("paper", "ink"), ("same", "paper")]
    pairs += [("muted", ground) for ground in ("paper", "raised", "same-tint")]
    pairs += [(colour, ground) for colour in ("good", "bad") for ground in ("paper", "raised", f"{colour}-tint")]
    for theme in (light, dark):
        for front, back in pairs:
            high, low = sorted((luminance(theme[front]), luminance(theme[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_a_failed_write_leaves_the_old_page_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(small_record(), path)
    before = path.read_text(encoding="utf-8")
    assert before == render(small_record())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(make_record(seeds=2), path)
    assert path.read_text(encoding="utf-8") == before
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(small_record(), tmp_path / "absent" / "report.html")


def test_a_name_that_is_no_unicode_does_not_cost_the_page(tmp_path):
    write(small_record(("one", "bad \udcff byte")), tmp_path / "report.html")
    assert "bad ? byte" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": 1}, "lacks metrics, contenders"),
        ({**small_record(), "metrics": []}, "no metrics"),
    ],
)
def test_what_is_no_record_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        render(record)


def test_importing_the_report_loads_neither_torch_nor_matplotlib():
    heavy = "{'torch', 'matplotlib', 'scipy', 'numpy'}"
    code = f"import sys, minimand.report, minimand.report.terminal; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_figures_are_drawn_where_they_stand_and_their_words_do_no_harm():
    svg = '<svg viewBox="0 0 2 1" role="img"><title>found</title><path d="M0 0h2"/></svg>'
    figure = {"title": HOSTILE, "caption": "what " + HOSTILE, "svg": svg}
    text = render({**small_record(), "figures": [figure, {**figure, "title": "second"}]})
    reader = Reader(text)
    assert text.count(svg) == 2
    assert "<script>alert" not in text
    assert HOSTILE in reader.texts
    assert "second" in reader.texts
    assert "figure" not in {tag for tag, _ in Reader(render(small_record())).tags}
