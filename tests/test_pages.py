"The commands that pages, notebooks and the README show: their options, settings, recipes and presets exist"
import json, re, shlex
from inspect import unwrap
from pathlib import Path
import pytest
from fastcore.script import anno_parser
from vavae_nb import evaluate, extract, sample, train
from vavae_nb.commands import given_settings
from vavae_nb.config import Config, override, sampling_presets
from vavae_nb.recipes import recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT/"README.md", *sorted((ROOT/"nbs").glob("*.ipynb"))]

def text(path):
    "What a page shows: its Markdown, and the Markdown that its cells made"
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    made = ["".join(o["data"]["text/markdown"]) for c in cells for o in c.get("outputs", ()) if "text/markdown" in o.get("data", {})]
    return "\n".join(["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]+made)

def commands(page):
    "Each `-m vavae_nb.NAME …` of a code block or in backticks, without comment, launcher and what follows a pipe"
    page = page.replace("\\\n", " ")
    shown = [l for b in re.findall(r"```.*?\n(.*?)```", page, re.S) for l in b.splitlines()] + re.findall(r"`([^`\n]+)`", page)
    for line in shown:
        if (m := re.search(r"-m vavae_nb\.(train|extract|sample|evaluate)\b([^|>&;]*)", line)) and not re.search("[…<{]", m[2]): yield m[1], shlex.split(re.sub(r"(?<= )N\b", "1", m[2]), comments=True)

def parse(name, words):
    words = [re.sub("^--[^=]+", lambda m: "--"+m[0][2:].replace("-", "_"), w) if w.startswith("--") else re.sub("^-(?=[a-z]$)", "--", w) for w in words]
    if name != "evaluate": return anno_parser(unwrap(dict(train=train, extract=extract, sample=sample)[name].main)).parse_args(words)
    if words[0] not in evaluate.actions: return anno_parser(unwrap(evaluate.main)).parse_args([*words, *["compare"]*("help" not in words[0])])
    return anno_parser(evaluate.actions[words[0]]).parse_args(words[1:])

@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_commands_are_right(path):
    for name, words in commands(text(path)):
        if "--help" in words or not words: continue
        try: a = vars(parse(name, words))
        except SystemExit: pytest.fail(f"{path.name}: {name} {' '.join(words)}")
        if (r := a.get("recipe")) and r not in ("list", "NAME") and not r.endswith((".yaml", ".yml")): recipe(r)
        if a.get("preset"): assert a["preset"] in sampling_presets
        override(Config(), given_settings(a.get("set")))

def test_there_are_commands(): assert sum(len(list(commands(text(p)))) for p in PAGES) > 40
