"""Stage the site's pages in _proc/ as nbdev does, and render them into _docs/ where asked to and Quarto is on the PATH.

    python tools/stage.py [--render]

nbdev's own command, where Quarto is missing, tries to install it as root and then installs this package with pip into whichever Python
comes first on the PATH; where Quarto is there, it writes over README.md.
"""
import re, shutil, subprocess, sys
from nbdev import doclinks, quarto
from nbdev.config import get_config
from vavae_nb import _modidx

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
