"""Stage the site's pages in _proc/ as nbdev does, and render them into _docs/ where asked to and Quarto is on the PATH.

    python tools/stage.py [--render]

nbdev's own command, where Quarto is missing, tries to install it as root and then installs this package with pip into whichever Python
comes first on the PATH; where Quarto is there, it writes over README.md.
"""
import ast, re, shutil, subprocess, sys
from itertools import takewhile
from pathlib import Path
import yaml
from nbdev import doclinks, processors, quarto, serve
from nbdev.config import get_config
from nbdev.frontmatter import _dict2fm
from nbdev.process import Processor
from vavae_nb import _modidx

ROOT = Path(__file__).resolve().parent.parent

def sidebar():
    "The notebook and the text of each page in the sidebar, in order"
    flat = lambda o: [page for e in o for page in (flat(e["contents"]) if "contents" in e else [(e["href"], e["text"])])]
    return flat(yaml.safe_load((ROOT/"nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])

class entitle(Processor):
    "A page of a module is called as in the sidebar, and says the module's name below"
    def begin(self):
        texts = dict(sidebar())
        fm, name = self.nb.frontmatter_, Path(self.nb.path_).name
        if name == "index.ipynb" or not re.fullmatch(r"[\w.]+", fm["title"]): return
        fm["title"] = texts[name]
        for c in self.nb.cells[1:]:
            if (module := c.directives_.get("default_exp")) and (module := f"vavae_nb.{module[0]}") != fm["title"]: fm["subtitle"] = f"`{module}`"
        self.nb.cells[0].source = _dict2fm(fm)

def defined(source):
    "The names that a cell defines"
    body = ast.parse(source).body
    return [processors.showdoc_nm(n) for n in body if isinstance(n, processors._def_types)]+[t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]

class fold(Processor):
    "Exported code, which nbdev leaves out, is there to unfold behind its documentation"
    def begin(self):
        cells = self.nb.cells
        for i,c in reversed(list(enumerate(cells))):
            if not {"export", "exporti"} & c.directives_.keys() or "hide" in c.directives_ or not (names := defined(c.source)): continue
            c.directives_, c.source = {}, f'#| code-fold: true\n#| code-summary: "Code of {", ".join(names)}"\n'+c.source
            shown = [*takewhile(lambda o: (m := re.search(r"^show_doc\((.*)\)", o.source, re.M)) and m[1] in names, cells[i+1:])]
            cells.insert(i+len(shown), cells.pop(i))

def settle(cell):
    "No output that wants a kernel; signatures as one would write them; figures in one piece; in a widget's place NAME.html, where there is one"
    if cell.cell_type != "code": return
    cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    for o in cell.outputs:
        if "text/markdown" not in o.get("data", {}): continue
        text = "".join(o["data"]["text/markdown"]).replace(" ± ", "\xa0±\xa0").replace("__main__.", "")
        text = re.sub(r"^def (?=[A-Z]\w*\()", "class ", text, flags=re.M)
        text = re.sub(r"(\w+):<(.*?)>(=[^,\n]*)?(,?)( (?=\w)|$)", lambda m: f"{m[1]}{m[3] or ''}{m[4]} # {m[2]}"+"\n    "*bool(m[5]), text, flags=re.M) # A command's options
        o["data"]["text/markdown"] = text.splitlines(True)
    widget = re.search(r"^(\w+)\.widget\(\)", cell.source, re.M)
    if widget and (html := get_config().nbs_path/f"{widget[1]}.html").exists():
        cell.cell_type, cell.source = "markdown", f"```{{=html}}\n{html.read_text(encoding='utf-8')}```"
        for k in ("outputs", "execution_count"): cell.pop(k, None)

class Pages(processors.FilterDefaults):
    "nbdev's processors and ours"
    def base_procs(self):
        own = {"FrontmatterProc": [processors.FrontmatterProc, entitle], "rm_export": [fold, processors.rm_export]}
        return [q for p in super().base_procs() for q in own.get(p.__name__, [p])]+[settle]

def mend(text, cfg):
    "Links between pages relative, links to other files of the repository on GitHub, and none within code"
    text = text.replace(f"{cfg.doc_host}{cfg.doc_baseurl}/", "")
    text = re.sub(r"\]\(\.\./([^)]+)\)", rf"]({cfg.git_url}/blob/{cfg.branch}/\1)", text)
    return re.sub(r"```python\\n.*?```", lambda code: re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", code[0]), text, flags=re.S)

def fill_index(cfg):
    "nbdev leaves every notebook with `auto` in its name out of the index of names, and so the tokenizer.autoencoder"
    cells, syms = doclinks._iter_py_cells, _modidx.d["syms"]
    doclinks._iter_py_cells = lambda p: (type(c)(c, nb="") for c in cells(p))
    for name in [k for k,v in syms.items() if not v]: syms |= doclinks._get_modidx(cfg.lib_path.parent/(name.replace(".", "/")+".py"), cfg.lib_path.parent, cfg.nbs_path)
    doclinks._iter_py_cells = cells

def stage():
    "Stage what has changed; the folder of staged pages, and the project's settings"
    fill_index(get_config())
    quarto._ensure_quarto = doclinks._build_modidx = lambda: None # The index of names is committed
    names, serve.FilterDefaults = processors._def_names, Pages
    processors._def_names = lambda *a: names(*a)[::-1] # Each is put before those that were
    old, rules = get_config().config_path/"_proc", (Path(__file__), *(p for s in ("sidebar.yml", "*.html") for p in get_config().nbs_path.glob(s)))
    if old.exists() and old.stat().st_mtime < max(p.stat().st_mtime for p in rules): shutil.rmtree(old)
    cache, cfg, nbs = quarto._pre_docs(n_workers=0) # In this process, which has the index
    for p in cache.glob("*.ipynb"):
        if not (nbs/p.name).exists(): p.unlink()
        elif (new := mend(old := p.read_text(encoding="utf-8"), cfg)) != old: p.write_text(new, encoding="utf-8")
    return cache, cfg

if __name__ == "__main__":
    cache, cfg = stage()
    if "--render" in sys.argv[1:]:
        if not shutil.which("quarto"): sys.exit("The pages are staged in _proc/, but not rendered: Quarto is not on the PATH. Get it from https://quarto.org/docs/get-started,\n"
                                                "or give `make docs QUARTO=pip`: PyPI's quarto-cli, which downloads Quarto and so needs the open web.")
        subprocess.run(["quarto", "render", "--no-execute"], cwd=cache, check=True)
        shutil.rmtree(cfg.doc_path, ignore_errors=True)
        shutil.move(cache/cfg.doc_path.name, cfg.doc_path)
