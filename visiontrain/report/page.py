"""HTML that cannot be broken by what users name their classes and files: text is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeAlias

VOID = frozenset(("img", "meta"))  # elements without an end tag

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2933; --soft: #5b6770; --line: #dde3e8;
  --card: #f5f7f9; --strong: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e6eaee; --soft: #9aa6b0;
  --line: #323b43; --card: #1d2329; --strong: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.25rem; }
p { margin: .6rem 0; max-width: 46rem; }
.soft, figcaption, th { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin: 1.4rem 0; }
.card { padding: .8rem 1rem; background: var(--card); border-radius: .6rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem .4rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 500; font-size: .9rem; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.name { min-width: 7rem; max-width: 20rem; }
meter { width: 5rem; height: .8rem; margin-left: .6rem; vertical-align: middle; }
meter::-webkit-meter-optimum-value { background: var(--strong); }
meter::-moz-meter-bar { background: var(--strong); }
figure { margin: 0 0 1.8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .6rem;
  border: 1px solid var(--line); padding: .5rem; }
figcaption { margin-top: .5rem; font-size: .92rem; max-width: 46rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 0 1.2rem; align-items: start; }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--card); border-radius: .6rem;
  font: .88rem/1.5 ui-monospace, monospace; overflow-wrap: normal; }
details { margin: .8rem 0; } summary { cursor: pointer; }
.note { padding: .6rem 1rem; border-left: 4px solid #e69f00; background: var(--card); }
"""


class Html(str):
    """Text that is HTML already, and goes into a page as it is."""

    __slots__ = ()


Content: TypeAlias = "str | Iterable[Content] | None"


def html(content: Content) -> Html:
    """Turn content into HTML: plain text is escaped, sequences are joined, None is nothing."""
    if content is None:
        return Html()
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(escape(content))
    return Html("".join(html(part) for part in content))


def tag(name: str, content: Content = None, attributes: Mapping[str, str] | None = None) -> Html:
    """Make the element `name` around `content`, with escaped `attributes`."""
    given = "".join(f' {key}="{escape(value)}"' for key, value in (attributes or {}).items())
    start = f"<{name}{given}>"
    return Html(start if name in VOID else f"{start}{html(content)}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[Content]], numbers: Iterable[int]) -> Html:
    """Make a table that scrolls sideways on a phone; the columns `numbers` are right-aligned."""
    right = set(numbers)
    kinds = ["number" if column in right else "name" for column in range(len(head))]
    first = [tag("th", title, {"class": kind}) for title, kind in zip(head, kinds, strict=True)]
    body = [
        tag(
            "tr",
            [tag("td", value, {"class": kind}) for value, kind in zip(row, kinds, strict=True)],
        )
        for row in rows
    ]
    inside = tag("table", [tag("thead", tag("tr", first)), tag("tbody", body)])
    return tag("div", inside, {"class": "wide"})


def sortable(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int]) -> Html:
    """Make a table that a page's script sorts when a title is clicked.

    Args:
        head: titles.
        rows: of cells: text, or (what is shown, the number it is sorted by or None).
        numbers: the columns that are right-aligned.
    """
    right = set(numbers)
    kinds = ["number" if column in right else "name" for column in range(len(head))]
    titles = [
        tag("th", tag("button", title, {"type": "button"}), {"class": kind, "scope": "col"})
        for title, kind in zip(head, kinds, strict=True)
    ]
    body = []
    for row in rows:
        cells = []
        for cell, kind in zip(row, kinds, strict=True):
            shown, value = cell if isinstance(cell, tuple) else (cell, None)
            by = {"data-value": "" if value is None else repr(value)} if shown is not cell else {}
            cells.append(tag("td", shown, {"class": kind} | by))
        body.append(tag("tr", cells))
    inside = [tag("thead", tag("tr", titles)), tag("tbody", body)]
    return tag("div", tag("table", inside, {"class": "sortable"}), {"class": "wide"})


@dataclass(frozen=True, slots=True)
class Extras:
    """What a page has that most do without."""

    style: str = ""  # rules of its own
    script: str = ""  # the only one that the page runs
    data: Mapping[str, Any] = field(default_factory=dict)  # what that reads, by id


def page(title: str, body: Content, extras: Extras = Extras()) -> str:
    """Make a whole page that loads nothing, from nowhere, and runs no script but its own."""
    scripts = ""
    if extras.script:
        digest = hashlib.sha256(extras.script.encode()).digest()
        scripts = f"; script-src 'sha256-{base64.b64encode(digest).decode()}'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}"
    head = [
        tag("meta", attributes={"charset": "utf-8"}),
        tag("meta", attributes={"http-equiv": "Content-Security-Policy", "content": policy}),
        tag(
            "meta",
            attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"},
        ),
        tag("title", title),
        tag("style", Html(STYLE + extras.style)),
    ]
    end = [
        tag("script", Html(_json(value)), {"type": "application/json", "id": name})
        for name, value in extras.data.items()
    ]
    end += [tag("script", Html(extras.script))] if extras.script else []
    parts = [tag("head", head), tag("body", [tag("main", body), *end])]
    return f"<!doctype html>\n{tag('html', parts, {'lang': 'en'})}\n"


def _json(value: Any) -> str:
    """Write what a script reads: no text in it can end the element it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
