"The commands that pages, notebooks and the README show: their options, settings, recipes and presets exist"
import json, re, shlex
from pathlib import Path
import pytest
from torch.distributed.run import parse_args as of_torchrun
from vavae_nb import evaluate, extract, sample, train
from vavae_nb.base.commands import given_settings, parser
from vavae_nb.recipes.config import Config, sampling_presets
from vavae_nb.recipes.settings import override
from vavae_nb.recipes.paper import recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT/"README.md", *sorted((ROOT/"nbs").glob("*.ipynb"))]
COMMANDS = {module.__name__: module.main for module in (train, extract, sample)}
COMMANDS |= {f"vavae_nb.evaluate {name}": action for name,action in evaluate.actions.items()}

def text(path):
    "What a page shows: its Markdown, and the Markdown that its cells made"
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    written, made = [], []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown": written.append("".join(cell["source"]))
        data = [output.get("data", {}) for output in cell.get("outputs", ())]
        made += ["".join(d["text/markdown"]) for d in data if "text/markdown" in d]
    return "\n".join(written+made)

def lines_of_code(page):
    "Lines of code blocks, and what stands in backticks"
    page = page.replace("\\\n", " ")
    for block in re.findall(r"```.*?\n(.*?)```", page, re.S): yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", page)

def commands(page):
    "Module and words of each `-m vavae_nb.NAME …` that shows a call and no placeholder for several words"
    for line in lines_of_code(page):
        m = re.search(r"-m (vavae_nb\.(?:train|extract|sample|evaluate)) ([^|>&;]+)", line)
        if not m or re.search("[…<{]|--help", line): continue
        name, words = m[1], shlex.split(re.sub(r"(?<= )N\b", "1", m[2]), comments=True)
        if line.lstrip().startswith("torchrun"):
            given = of_torchrun(shlex.split(line, comments=True)[1:])
            assert given.module and given.training_script == name, line
            words = given.training_script_args
        if name.endswith("evaluate"): name, words = f"{name} {words[0]}", words[1:]
        yield name, words

@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_commands_are_right(path):
    for name, words in commands(text(path)):
        try: a = vars(parser(COMMANDS[name]).parse_args(words))
        except SystemExit: pytest.fail(f"{path.name}: {name} {' '.join(words)}")
        if (r := a.get("recipe")) and r not in ("list", "NAME") and not r.endswith((".yaml", ".yml")): recipe(r)
        if a.get("preset"): assert a["preset"] in sampling_presets
        override(Config(), given_settings(a.get("set")))

def test_there_are_commands(): assert sum(len(list(commands(text(p)))) for p in PAGES) > 60
