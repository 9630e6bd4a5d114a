"""All chapters on one page, to be printed: made from the pages that Sphinx has written."""

from pathlib import Path

from bs4 import BeautifulSoup

NAME = "print.html"


def write(app, exception) -> None:
    """At the end of the build: the articles of all notebooks, in the frame of the page NAME."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    whole = BeautifulSoup((out / NAME).read_text(), "html.parser")
    place = whole.find("article")
    docs = sorted(name for name in app.env.found_docs if name.startswith("notebooks/"))
    for doc in docs:
        page = BeautifulSoup((out / f"{doc}.html").read_text(), "html.parser")
        place.append(_chapter(page.find("article"), doc, docs))
    (out / NAME).write_text(str(whole))


def _chapter(article, doc: str, docs: list[str]):
    """An article whose names and links are those of the one page."""
    article.name = "section"
    prefix = doc.split("/")[-1] + "--"
    article["id"], article["class"] = prefix, "chapter"
    for tag in article.find_all(id=True):
        tag["id"] = prefix + tag["id"]
    for tag in article.find_all(["label", "svg"]):
        for name in ("for", "aria-labelledby", "aria-describedby"):
            if tag.get(name):
                tag[name] = " ".join(prefix + word for word in tag[name].split())
    for tag in article.find_all("details"):
        tag["open"] = ""  # paper cannot be clicked
    for tag in article.find_all(class_="move"):
        tag.decompose()
    for tag in article.find_all("img"):
        tag["src"] = tag["src"].removeprefix("../")
    for tag in article.find_all("a", href=True):
        tag["href"] = _link(tag["href"], prefix, docs)
    return article


def _link(href: str, prefix: str, docs: list[str]) -> str:
    if "://" in href:
        return href
    path, _, anchor = href.partition("#")
    if not path:
        return f"#{prefix}{anchor}"
    if f"notebooks/{path.removesuffix('.html')}" in docs:
        return f"#{path.removesuffix('.html')}--{anchor}"
    return (f"notebooks/{path}" if not path.startswith("../") else path[3:]) + (
        f"#{anchor}" if anchor else ""
    )
