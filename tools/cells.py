"""Definitions of one notebook for another, as they stand there: a lesson that compares with a page runs that page's code."""
import ast, json
from pathlib import Path


def defined_in(
    page:str,   # A notebook, as seen from the one that asks
    name:str,   # Of a function that a cell of it defines
    scope:dict, # The names that the function uses, such as `globals()`; left as it is
):
    "A function of another notebook"
    cells = json.loads(Path(page).read_text(encoding="utf-8"))["cells"]
    sources = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    source = next(s for s in sources if f"def {name}(" in s)
    definition = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    scope = dict(scope)
    exec(ast.get_source_segment(source, definition), scope)
    return scope[name]
