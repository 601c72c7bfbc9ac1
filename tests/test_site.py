"The site: pages staged as nbdev does and mended, a sidebar that lists them all, links that lead somewhere, every exported name shown with its code; rendered where Quarto is"
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC = ROOT/"nbs", ROOT/"_proc"
sys.path.append(str(ROOT/"tools"))
from rooms import notebooks, source, svg
from stage import sidebar
PAGES = sorted(p.name for p in NBS.glob("*.ipynb"))
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)")

def cells(path, kind): return [c for c in json.loads(Path(path).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
def text(c): return "".join(c["source"])
def shown(c): return "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for o in c["outputs"])
def page(name): return re.sub(r"^\d+[a-z]?_", "", name).replace(".ipynb", ".html")
def slug(heading):
    "Pandoc's anchor of a heading"
    s = re.sub(r"`|\$|\*|\[([^\]]*)\]\([^)]*\)", lambda m: m[1] or "", heading.strip().lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", s)))
def prose(path): return re.sub(r"```.*?```|`[^`\n]*`", "", "\n".join([*map(text, cells(path, "markdown")), *map(shown, cells(path, "code"))]), flags=re.S)
def anchors(path):
    body = "\n".join([*map(text, cells(path, "markdown")), *map(shown, cells(path, "code"))])
    return {slug(h) for h in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", body, flags=re.S), re.M)}

@pytest.fixture(scope="module")
def staged():
    "The folder of staged pages"
    r = subprocess.run([sys.executable, ROOT/"tools/stage.py"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert r.returncode == 0, r.stderr
    return PROC

def test_sidebar_lists_every_notebook_once():
    listed = [name for name,_ in sidebar()]
    assert sorted(listed) == PAGES
    assert len({page(p) for p in PAGES}) == len(PAGES), "two notebooks would be one page"

@pytest.mark.parametrize("name", PAGES)
def test_notebook_is_valid(name): nbformat.validate(nbformat.read(NBS/name, as_version=4))

def test_links_between_notebooks_lead_somewhere():
    dead = []
    for name in PAGES:
        for link in LINK.findall(prose(NBS/name)):
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", path): continue
            if not (NBS/path).exists(): dead.append(f"{name}: {link}")
            elif anchor and anchor not in anchors(NBS/(path or name)): dead.append(f"{name}: {link}")
        dead += [f"{name}: {p}" for p in re.findall(r"!\[[^\]]*\]\(([^)\s:]+)\)", prose(NBS/name)) if not (NBS/p).exists()]
    assert dead == []

def test_readme_links_lead_somewhere():
    links = [l.partition("#")[0] for l in LINK.findall((ROOT/"README.md").read_text(encoding="utf-8"))]
    assert [l for l in links if l and not re.match(r"\w+:", l) and not (ROOT/l).exists()] == []

def test_staged_links_lead_somewhere(staged):
    "Where a name in backticks became a link, its page shows it"
    own = {page(n): anchors(staged/n) for n in PAGES}
    links = {(n, l) for n in PAGES for l in LINK.findall(prose(staged/n)) if re.match(r"[\w.]+\.html", l)}
    wrong = [(n, l) for n,l in sorted(links) if (p := l.partition("#"))[0] not in own or p[2] and p[2].lower() not in {a.lower() for a in own[p[0]]}]
    assert len(links) > 50 and wrong == []

def definitions(module):
    "The functions and classes that a module exports"
    body = ast.parse(source(module).read_text(encoding="utf-8")).body
    names = next(ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    return {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names}

def test_every_exported_name_is_shown(staged):
    "With its source, a docstring, and a word on the parameters of functions that have several"
    wrong, n = [], 0
    for path,module in ((p, m) for p,m in notebooks().items() if m):
        docs = {m[1]: shown(c) for c in cells(staged/path.name, "code") if (m := re.search(r"show_doc\((\w+)\)", text(c)))}
        for name,node in definitions(module).items():
            doc, n = docs.get(name, ""), n+1
            signature = re.search(r"```python\n(.*?)```", doc, re.S)
            annotated = isinstance(node, ast.FunctionDef) and sum(bool(a.annotation) for a in node.args.args+node.args.kwonlyargs) > 1
            if not (signature and "[source](https://" in doc and re.search(r"^\*.+\*$", doc, re.M|re.S)): wrong.append(f"{module}.{name}")
            elif annotated and "# " not in signature[1]: wrong.append(f"{module}.{name}: no parameter documented")
            if signature and re.search(r"\]\(|:<|__main__", signature[1]): wrong.append(f"{module}.{name}: not as one would write it")
            if signature and signature[1].startswith("class") != isinstance(node, ast.ClassDef): wrong.append(f"{module}.{name}: function or class?")
    assert n > 300 and wrong == []

def test_exported_code_can_be_unfolded(staged):
    "After its documentation, which is in the code's order"
    wrong = []
    for path,module in ((p, m) for p,m in notebooks().items() if m):
        docs, code, names = {}, {}, list(definitions(module))
        for i,c in enumerate(cells(staged/path.name, "code")):
            if m := re.search(r"^show_doc\((\w+)\)", text(c), re.M): docs[m[1]] = i
            if m := re.search(r'^#\| code-summary: "Code of (.*)"$', text(c), re.M): code |= dict.fromkeys(m[1].split(", "), i)
        wrong += [f"{module}.{n}" for n in names if n not in code or code[n] < docs[n]]
        if [n for n in docs if n in names] != names: wrong.append(f"{module}: in another order")
    assert wrong == []

def test_pages_say_what_they_are_about(staged):
    texts = dict(sidebar())
    fronts = {n: yaml.safe_load(text(cells(staged/n, "raw")[0]).split("---")[1]) for n in PAGES}
    modules = {p.name: m for p,m in notebooks().items() if m}
    assert {n: f["title"] for n,f in fronts.items() if n in modules and f["title"] != texts[n]} == {}
    assert {n for n,m in modules.items() if f"vavae_nb.{m}" not in (fronts[n]["title"], fronts[n].get("subtitle", "").strip("`"))} == set()
    assert all(f["description"] for f in fronts.values()) and len({f["title"] for f in fronts.values()}) == len(PAGES)

def test_no_output_wants_a_kernel(staged):
    assert {n for n in PAGES for c in cells(staged/n, "code") for o in c["outputs"] if any("widget" in k or "javascript" in k for k in o.get("data", {}))} == set()

def test_measurements_are_all_on_their_page():
    body = "".join(shown(c) for c in cells(NBS/"results.ipynb", "code"))
    missing = [p.name for p in (ROOT/"results").glob("*.json") if f"results/{p.name})" not in body or json.loads(p.read_text(encoding="utf-8"))["commit"][:8] not in body]
    assert missing == [], "run tools/notebooks.py run nbs/results.ipynb"

@pytest.mark.skipif(not shutil.which("node"), reason="Node.js is not on the PATH")
def test_sliders_of_the_page_compute_what_the_widget_does(staged):
    from vavae_nb.paper.explorer import Times
    page = (NBS/"times.html").read_text(encoding="utf-8")
    assert page in "".join(map(text, cells(staged/"01_paper.explorer.ipynb", "markdown")))
    times, js = Times(), re.search(r"^const sigmoid.*?^}$", page, re.M|re.S)[0]
    for mean,std,shift in ((0., 1., .3), (-1.2, 1.7, .3), (1., .5, 2.)):
        out = subprocess.run(["node", "-e", f"{js}; console.log(JSON.stringify(numbers({mean}, {std}, {shift})))"], capture_output=True, encoding="utf-8", check=True).stdout
        assert {k: pytest.approx(v, abs=.01) for k,v in json.loads(out).items() if k != "curves"} == {k: v for k,v in times.at(mean=mean, std=std, shift=shift).items() if k in out}

def test_architecture_shows_the_rooms_of_today():
    assert svg() in ["".join(o["data"].get("image/svg+xml", "")) for c in cells(NBS/"architecture.ipynb", "code") for o in c["outputs"]], "run tools/notebooks.py run nbs/architecture.ipynb"

def rendered(staged, folder, *names):
    "Pages as Quarto makes them, from a copy"
    shutil.copytree(staged, folder, ignore=shutil.ignore_patterns("_docs", ".quarto"))
    r = subprocess.run(["quarto", "render", *names, "--no-execute"], cwd=folder, capture_output=True, encoding="utf-8")
    assert r.returncode == 0, r.stderr[-2000:]
    return folder/"_docs"

needs_quarto = pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not on the PATH")

@needs_quarto
def test_a_page_is_rendered(staged, tmp_path):
    html = (rendered(staged, tmp_path/"site", "14_tokenizer.vf_loss.ipynb")/"tokenizer.vf_loss.html").read_text(encoding="utf-8")
    for part in ("quarto-color-scheme-toggle", "quarto-search", 'id="vfloss"', "katex", "blob/main/vavae_nb/tokenizer/vf_loss.py#L", "nbs/14_tokenizer.vf_loss.ipynb", "issues/new", '<details class="code-fold">'): assert part in html, part
    assert all(f"<span class=\"menu-text\">{s}</span>" in html for s in ("Start", "Derivations", "Tokenizer", "Results", "Reference"))

@needs_quarto
@pytest.mark.slow
def test_the_whole_site_is_rendered_and_its_links_lead_somewhere(staged, tmp_path):
    docs = rendered(staged, tmp_path/"site")
    assert sorted(p.name for p in docs.glob("*.html")) == sorted(map(page, PAGES))
    dead = []
    for p in docs.glob("*.html"):
        for ref in re.findall(r'(?:href|src)="([^"#?:]+)[#"?]', p.read_text(encoding="utf-8")):
            if not (docs/ref).exists(): dead.append(f"{p.name}: {ref}")
    assert dead == []
