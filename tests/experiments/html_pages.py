"""What every page of a report must have, whatever stands on it: read as a browser and a screen reader would."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "link", "br", "img", "hr", "input"}
LINKS = ("href", "src", "xlink:href")


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps what the tests ask about."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.tags, self.text, self.paths = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes), (tag, attributes)
        self.tags.append((tag, given))
        self.paths.append(" ".join(self.open))
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def every(self, *names):
        return [given for tag, given in self.tags if tag in names]


def check_site(site):
    """``site``: each page's HTML by its file's name."""
    files = {*site, "results.json"}
    for name, html in site.items():
        page = Page(html)
        links = check_links(page, html)
        assert links <= files, name
        check_structure(page)
        check_pictures(page)
        check_tables(page)
        if name not in ("index.html", "compare.html"):
            assert "index.html" in links
            assert f"{name}" in check_links(Page(site["index.html"]), site["index.html"])


def check_links(page, html):
    """Nothing comes from a network, and nothing leads nowhere. Returns the files that are linked."""
    assert len(page.ids) == len(set(page.ids))
    assert not page.every("script", "link", "iframe", "object", "embed", "base")
    assert "@import" not in html
    assert "url(http" not in html
    files = set()
    for tag, given in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(given.get(name, "").split()) <= set(page.ids), (tag, given)
        for target in (given[name] for name in LINKS if name in given):
            if target.startswith("#"):
                assert target[1:] in page.ids, (tag, target)
            elif not target.startswith("data:image/"):
                assert ":" not in target, (tag, target)
                assert not target.startswith("/"), (tag, target)
                files.add(target)
    return files


def check_structure(page):
    """Language, title, landmarks, the order of headings, and a way past the navigation."""
    assert page.every("html") == [{"lang": "en"}]
    assert any(given.get("name") == "viewport" for given in page.every("meta"))
    outside = [(tag, given) for (tag, given), path in zip(page.tags, page.paths) if "svg" not in path.split()]
    for landmark in ("title", "header", "main", "footer", "h1"):
        assert sum(tag == landmark for tag, _ in outside) == 1, landmark
    labels = [given["aria-label"] for given in page.every("nav")]
    assert len(labels) == len(set(labels))
    first = next(given for given in page.every("a"))
    assert first == {"class": "skip", "href": f"#{page.every('main')[0]['id']}"}
    levels = [int(tag[1]) for tag, _ in outside if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    for tag, given in page.tags:  # what can be reached by keyboard has a name
        assert given.get("tabindex", "0") in ("0", "-1")
        if given.get("tabindex") == "0":
            assert given["role"] == "group", tag
            assert given.get("aria-label") or given["aria-labelledby"]


def check_pictures(page):
    """Each has a name that stands for it, and a caption."""
    for given in page.every("svg"):
        assert given["role"] == "img"
        assert len(given["aria-label"]) > 40, given["aria-label"]
    assert all(given.get("alt") for given in page.every("img"))
    assert len(page.every("figure")) == len(page.every("svg")) == len(page.every("figcaption"))


def check_tables(page):
    """Each has a caption, and cells that say what they belong to."""
    assert len(page.every("table")) == len(page.every("caption")) == len(page.every("thead"))
    assert all(given["scope"] in ("col", "row") for given in page.every("th"))
    rows = [i for i, (tag, _) in enumerate(page.tags) if tag == "tr"]
    assert all(page.tags[i + 1][0] == "th" for i in rows)
