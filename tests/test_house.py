"The house itself: exports in sync, rooms, widths, one reading order, light imports, small notebooks"
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/"tools"))
from order import contradicting, pages
from rooms import COMMANDS, ROOMS, cycles, notebooks, numbers, room, source, upward
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
WIDTH = 120

def python(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT)

def test_export_is_in_sync(tmp_path):
    for name in ("nbs", "vavae_nb", "settings.ini", "setup.py", "_quarto.yml"):
        src = ROOT/name
        shutil.copytree(src, tmp_path/name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "embedded")) if src.is_dir() else shutil.copy(src, tmp_path/name)
    shutil.rmtree(tmp_path/"vavae_nb"); (tmp_path/"vavae_nb").mkdir()
    shutil.copy(ROOT/"vavae_nb/__init__.py", tmp_path/"vavae_nb/__init__.py")
    env = os.environ | {"PYTHONUTF8": "1"} # nbdev reads files as the locale says, ours are UTF-8
    r = subprocess.run([Path(sys.executable).parent/"nbdev_export"], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert r.returncode == 0, r.stderr
    files = lambda d: {p.relative_to(d).as_posix(): p.read_text(encoding="utf-8") for p in (d/"vavae_nb").rglob("*.py")}
    made, kept = files(tmp_path), files(ROOT)
    assert sorted(made) == sorted(kept), "a module without a notebook, or a notebook not exported: run make export"
    assert [k for k in made if made[k] != kept[k]] == [], "these differ from their notebooks: run make export"

def test_readme_is_in_sync():
    r = subprocess.run([sys.executable, ROOT/"tools/readme.py", "--check"], capture_output=True, encoding="utf-8")
    assert r.returncode == 0, r.stderr

def test_every_module_has_a_room():
    modules = numbers()
    assert len(modules) > 50 and {room(m) for m in modules} == set(ROOMS)
    assert {m for m in modules if room(m) == COMMANDS} == {"train", "extract", "sample", "evaluate", "ablations"}

def test_imports_go_down(): assert upward() == []

def test_modules_of_a_room_import_each_other_in_one_direction(): assert cycles() == []

def test_only_training_and_commands_know_fastai():
    def packages(code):
        for n in ast.walk(ast.parse(code)):
            if isinstance(n, ast.Import): yield from (a.name.split(".")[0] for a in n.names)
            elif isinstance(n, ast.ImportFrom) and not n.level: yield n.module.split(".")[0]
    users = {m for m in numbers() if "fastai" in packages(source(m).read_text(encoding="utf-8"))}
    assert users and {room(m) for m in users} <= {"training", COMMANDS}

def test_the_rest_stays_light():
    modules = [m for m in numbers() if room(m) not in ("training", "paper", COMMANDS)]
    heavy = ("fastai", "torchvision", "timm")
    lines = ["import sys", *(f"import vavae_nb.{m}" for m in modules), f"print([m for m in {heavy} if m in sys.modules])"]
    r = python("\n".join(lines))
    assert r.stdout.strip() == "[]", r.stdout+r.stderr

def test_the_package_and_its_help_need_no_torch():
    commands = [m for m in numbers() if room(m) == COMMANDS]
    lines = ["import sys", "import vavae_nb.recipes.config", *(f"import vavae_nb.{m}" for m in commands)]
    r = python("\n".join([*lines, "print([m for m in ('torch', 'fastai', 'numpy') if m in sys.modules])"]))
    assert r.stdout.strip() == "[]", r.stdout+r.stderr

@pytest.mark.parametrize("module", ["fcntl", "resource"])
def test_importing_needs_no_module_that_only_unix_has(module):
    "Another module than those hidden may need them on Linux, so only our own imports count"
    for m in numbers():
        tree = ast.parse(source(m).read_text(encoding="utf-8"))
        for node in tree.body: # What a function imports when it is called is another matter
            if isinstance(node, ast.Import): assert module not in [a.name for a in node.names], m

def too_wide(text): return [line for line in text.splitlines() if len(line) > WIDTH]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_is_wider_than_a_page(path):
    "Exported or not; a module is its cells, and what nbdev writes above them"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [l for c in cells if c["cell_type"] == "code" for l in too_wide("".join(c["source"]))] == []

def test_no_two_notebooks_share_a_number():
    names = [p.name for p in notebooks()]
    assert len({n[:2] for n in names}) == len(names)

def test_numbers_are_the_reading_order():
    numbered = [href for href,_ in pages() if href[0].isdigit()]
    assert numbered == sorted(numbered)

def test_closing_links_follow_the_reading_order(): assert contradicting() == [], "run python tools/order.py"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_clean_and_small(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 400_000
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert not [c for c in code if any(o["output_type"] == "error" for o in c["outputs"])]
    assert not [c for c in code if c["execution_count"] is not None], "run nbdev_clean"
    silent = [c for c in code if "eval: false" not in "".join(c["source"])]
    assert any(c["outputs"] for c in silent) or not silent, "never executed"

def test_committed_files_name_no_machine():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.split("\0")
    home = re.compile(r"(?<![\w.])/(?:root|work|home/\w+)/")
    wrong = []
    for f in files:
        p = ROOT/f
        if f and p.is_file() and p.suffix in (".py", ".ipynb", ".md", ".yml", ".json", ".txt", ".ini", "") and f != "tests/test_house.py":
            if home.search(p.read_text(encoding="utf-8", errors="ignore")): wrong.append(f)
    assert wrong == []
