"""One reading order: nbs/sidebar.yml. The closing links of the notebooks, README and the architecture page follow it.

    python tools/order.py           write each notebook's closing link
    python tools/order.py --check   exit 1 and name the notebooks whose closing link contradicts the list
"""
import json, sys
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent
LINK = "next-page" # The id of the cell


def sections():
    "(section, [(notebook, title), …]), in reading order"
    tree = yaml.safe_load((ROOT/"nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return [(s["section"], [(page["href"], page["text"]) for page in s["contents"]]) for s in tree]


def pages():
    "(notebook, title), in reading order"
    return [page for _,contents in sections() for page in contents]


def reading(section):
    "The pages of a section as links, in a line"
    return " → ".join(f"[{title}]({href})" for href,title in dict(sections())[section])


def following():
    "Numbered notebook → the text of its closing link; none for the last page"
    listed = pages()
    after = {href: nxt for (href, _),nxt in zip(listed, listed[1:]) if href[0].isdigit()}
    return {href: f"**Next:** [{title}]({to})" for href,(to, title) in after.items()}


def closed(nb, text):
    "The notebook with this closing link, before its last cell"
    cells = [c for c in nb["cells"] if c["id"] != LINK]
    cell = dict(cell_type="markdown", id=LINK, metadata={}, source=[text])
    exports = "nbdev_export()" in "".join(cells[-1]["source"])
    at = len(cells)-1 if exports else len(cells)
    return nb | {"cells": [*cells[:at], cell, *cells[at:]]}


def contradicting(write=False):
    "The notebooks whose closing link is not the list's; mended where asked"
    wrong = []
    for name,text in following().items():
        path = ROOT/"nbs"/name
        nb = json.loads(path.read_text(encoding="utf-8"))
        mended = closed(nb, text)
        if mended["cells"] == nb["cells"]: continue
        wrong.append(name)
        if write:
            as_text = json.dumps(mended, indent=1, sort_keys=True, ensure_ascii=False)+"\n"
            path.write_text(as_text, encoding="utf-8")
    return wrong


if __name__ == "__main__":
    wrong = contradicting(write="--check" not in sys.argv)
    if "--check" in sys.argv and wrong: sys.exit(f"run python tools/order.py: {', '.join(wrong)}")
