"""English text that packages bring: Wikipedia articles, split by article, news (in gensim), and Python's reference."""

from __future__ import annotations

import bz2
import html
import pydoc_data.topics
import re
from functools import cache

from benchmarks.data.models import package_folder

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_END = {"see also", "references", "external links", "notes", "further reading", "bibliography", "sources", "footnotes"}
_BLOCKS = "math gallery timeline imagemap div table source code pre nowiki ref".replace(" ", "|")
_SHORTEST_PARAGRAPH, _SHORTEST_ARTICLE = 120, 1500


@cache
def articles(split: str) -> list[str]:
    """Articles as prose: every second one is "calibration", the others are "test"."""
    with bz2.open(package_folder("gensim") / "test" / "test_data" / _WIKIPEDIA, "rt", encoding="utf8") as file:
        text = file.read()
    found = []
    for page in re.findall(r"(?s)<page>.*?</page>", text):
        title, body = re.search(r"<title>(.*?)</title>", page), re.search(r"(?s)<text[^>]*>(.*?)</text>", page)
        if body and ":" not in title.group(1) and not body.group(1).lower().startswith("#redirect"):
            prose = paragraphs(html.unescape(body.group(1)))
            if sum(map(len, prose)) > _SHORTEST_ARTICLE:
                found.append("\n\n".join(prose))
    return found[{"calibration": 0, "test": 1}[split] :: 2]


@cache
def news() -> list[str]:
    """Documents of the Australian Broadcasting Corporation (Lee, 2005): another domain than Wikipedia."""
    path = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return path.read_text(encoding="latin1").splitlines()


def sentences(split: str, count: int) -> list[str]:
    """Sentences of middling length, spread over the articles of a split."""
    text = "\n\n".join(articles(split))
    found = [s for s in re.split(r"(?<=[.!?])\s+", text) if 40 < len(s) < 300]
    return found[:: len(found) // count][:count]


def reference_sentences(count: int) -> list[str]:
    """Sentences of Python's language reference, which every Python has."""
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    found = [s for s in re.split(r"(?<=[.!?]) ", text) if 40 < len(s) < 300 and s[0].isupper()]
    return found[:: len(found) // count][:count]


def paragraphs(markup: str) -> list[str]:
    """Paragraphs of prose in wiki markup, up to the references."""
    prose = []
    for raw in _without_markup(markup).split("\n"):
        line = raw.strip()
        if heading := re.match(r"^=+\s*(.*?)\s*=+$", line):
            if heading.group(1).lower() in _END:
                break
        elif len(line) >= _SHORTEST_PARAGRAPH and line[0] not in "*#:;|!{}=[" and re.search(r"[.!?][\"')\]]?$", line):
            prose.append(re.sub(r"\s+([,.;])", r"\1", re.sub(r"\s+", " ", line)).replace(" ()", "").replace("()", ""))
    return prose


def _without_markup(text: str) -> str:
    for _ in range(6):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"(?s)\{\|.*?\|\}|<!--.*?-->", "", text)
    text = re.sub(rf"(?s)<ref[^>/]*/>|<({_BLOCKS})\b.*?</\1>", "", html.unescape(text))
    file = r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*\]\]"
    for _ in range(3):  # captions hold links
        text = re.sub(file, "", text)
    text = re.sub(file, "", re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text))
    text = re.sub(r"\[https?://\S+\s?([^\]]*)\]", r"\1", text)
    return re.sub(r"<[^>]+>|'{2,}", "", text)
