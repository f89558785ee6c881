"""Builds what the site shows from the catalogue and the stored evidence: method pages, the index of papers, a feed."""

from __future__ import annotations

import datetime
import html
import pathlib
import re
import sys
import xml.etree.ElementTree as ET
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from mkdocs.structure.files import File  # noqa: E402

from minimand.catalogue import PROOFS, Method, methods  # noqa: E402

ATOM = "http://www.w3.org/2005/Atom"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every method that has no handwritten one, and the index of papers."""
    for method in methods():
        if files.get_file_from_path(f"methods/{method.name}.md") is None:
            files.append(File.generated(config, f"methods/{method.name}.md", content=f"# {method.name}\n"))
    files.append(File.generated(config, "papers.md", content=_papers()))
    files.append(File.generated(config, "feed.xml", content=_feed()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Complete a method's page with its evidence, its interface and its source."""
    path = pathlib.PurePosixPath(page.file.src_uri)
    if path.parent.name != "methods":
        return markdown
    method = next(method for method in methods() if method.name == path.stem)
    return "\n\n".join([_after_title(markdown, _state(method)), _evidence(method), _interface(method), _source(method)])


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Drop the role before a formula or a name of a docstring: the code it leaves reads well by itself."""
    html = re.sub(r":(?:math|class|func|meth|mod):(<code>)~?(?:minimand\.\w+\.)?", r"\1", html)
    return re.sub(r"<p>\.\. math:: (.*?)</p>", r"<pre>\1</pre>", html, flags=re.DOTALL)


def _after_title(markdown: str, text: str) -> str:
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n{text}\n{rest}"


def _state(method: Method) -> str:
    proofs = " ".join(
        f'<span class="proof {"stands" if state == "stands" else "open"}">{proof}</span>'
        for proof, state in method.state().items()
    )
    note = (
        ""
        if method.built
        else '\n\n!!! note "Not built yet"\n    The catalogue knows this paper; minimand has no part for it yet.'
    )
    return f"{method.purpose}\n\n{proofs}{note}"


def _evidence(method: Method) -> str:
    record = method.evidence()
    if record is None:
        return "" if not method.built else "## Evidence\n\nNo study is stored yet."
    lines = ["## Evidence", "", record["about"], ""]
    lines += ["| claim | difference (95 % interval) | verdict |", "| --- | --- | --- |"]
    units = {metric["name"]: metric for metric in record["metrics"]}
    for claim in record["claims"]:
        unit = units[claim["metric"]]
        lines.append(f"| {claim['says']} | {_interval(claim, unit)} | **{claim['verdict']}** |")
    for metric in record["metrics"]:
        rows = record["summary"][metric["name"]]
        lines += [
            "",
            f"**{metric['name']}** ({metric['direction']})",
            "",
            "| contender | mean | 95 % interval | s a cell |",
        ]
        lines += ["| --- | ---: | ---: | ---: |"]
        for row in rows:
            low, high = _number(row["low"], metric), _number(row["high"], metric)
            lines.append(f"| {row['name']} | {_number(row['mean'], metric)} | {low} to {high} | {row['seconds']:.2g} |")
    if record["notes"]:
        lines += ["", record["notes"]]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [
        "",
        f"{len(record['cells'])} cells in {record['seconds']:.0f} s on {record['machine']['processor']}, "
        f"{record['date'][:10]}; {versions}. Run it again: `minimand reproduce {method.name}`.",
    ]
    return "\n".join(lines)


def _interface(method: Method) -> str:
    if not method.built:
        return ""
    return "## Interface\n\n" + "\n\n".join(f"::: {path}" for path in method.part_paths())


def _source(method: Method) -> str:
    arxiv = f" [arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv})." if method.arxiv else ""
    code = f" Authors' code: `{method.code}`." if method.code else ""
    paper = f"{method.authors}: *{method.title}*. {method.venue}.{arxiv}{code}"
    return f"## Source\n\n{paper}\n\nIts central claim: {method.claim}"


def _papers() -> str:
    built = sum(method.built for method in methods())
    lines = [
        "# Papers",
        "",
        f"The {len(methods())} methods that minimand sets out to hold; {built} are built. "
        "New evidence is announced in the [feed](feed.xml).",
        "",
        '<input class="filter" type="search" placeholder="Filter: noise, Lipschitz, 2023, losses ..." '
        'aria-label="Filter the papers" data-filter="paper-rows">',
        "",
        '<table id="paper-rows"><thead><tr><th>method</th><th>what it is for</th><th>paper</th><th>room</th>'
        "<th>proofs</th><th>verdict</th></tr></thead><tbody>",
    ]
    for method in methods():
        words = html.escape(" ".join((*method.keywords, method.authors, method.arxiv)))
        verdict = method.verdict() or ("" if method.built else "not built yet")
        marks = f"{len(set(method.proofs) & set(PROOFS))} of {len(PROOFS)}" if method.built else ""
        lines.append(
            f'<tr data-words="{words}"><td><a href="methods/{method.name}.html">{method.name}</a></td>'
            f"<td>{html.escape(method.purpose)}</td><td>{html.escape(method.title)}. {html.escape(method.venue)}</td>"
            f"<td>{method.room}</td><td>{marks}</td><td>{verdict}</td></tr>"
        )
    lines.append("</tbody></table>")
    return "\n".join(lines)


def _feed() -> bytes:
    ET.register_namespace("", ATOM)
    feed = ET.Element(f"{{{ATOM}}}feed")
    _child(feed, "title", "minimand: evidence")
    _child(feed, "id", "tag:minimand,2026:evidence")
    records = [(method, record) for method in methods() if (record := method.evidence()) is not None]
    records.sort(key=lambda pair: pair[1]["date"], reverse=True)
    newest = records[0][1]["date"] if records else datetime.datetime.fromtimestamp(0, datetime.UTC).isoformat()
    _child(feed, "updated", newest)
    author = ET.SubElement(feed, f"{{{ATOM}}}author")
    _child(author, "name", "The minimand developers")
    for method, record in records:
        entry = ET.SubElement(feed, f"{{{ATOM}}}entry")
        _child(entry, "title", f"{method.name}: {record['verdict']}")
        _child(entry, "id", f"tag:minimand,2026:evidence/{method.name}/{record['date']}")
        _child(entry, "updated", record["date"])
        ET.SubElement(entry, f"{{{ATOM}}}link", href=f"methods/{method.name}.html")
        _child(entry, "summary", "; ".join(f"{claim['verdict']}: {claim['says']}" for claim in record["claims"]))
    return ET.tostring(feed, encoding="utf-8", xml_declaration=True)


def _child(parent: ET.Element, name: str, text: str) -> None:
    ET.SubElement(parent, f"{{{ATOM}}}{name}").text = text


def _number(value: float | None, metric: dict[str, Any]) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if metric["unit"] == "%" else f"{value:.4g}"


def _interval(claim: dict[str, Any], metric: dict[str, Any]) -> str:
    if claim["difference"] is None:
        return "–"
    scale, form, unit = (100, "+.1f", " points") if metric["unit"] == "%" else (1, "+.3g", "")
    difference, low, high = (
        "–" if claim[key] is None else format(scale * claim[key], form) for key in ("difference", "low", "high")
    )
    return f"{difference}{unit} ({low} to {high})"
