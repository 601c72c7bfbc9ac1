"The house itself: exports in sync, import direction, light imports, small notebooks"
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/"tools"))
from rooms import imports, numbers, source
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").glob("*.ipynb"))
PURE = ["processes", "checkpoints", "tokenizer.adversarial", "tokenizer.network", "tokenizer.autoencoder", "tokenizer.perceptual", "tokenizer.vf_loss", "dit.blocks", "dit.model", "flow.path", "flow.sampler",
        "flow.ddpm", "published", "generate", "metrics.features", "metrics.quality", "metrics.uniformity", "metrics.reference", "metrics.distribution", "metrics.latents", "evaluation", "latents"]

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

def test_imports_point_downwards():
    number, wrong = numbers(), []
    assert len(number) > 15
    for module,n in number.items():
        for other in imports(source(module).read_text(encoding="utf-8"), module):
            if other not in number or number[other] >= n or {module.split(".")[0], other.split(".")[0]} == {"dit", "flow"}: wrong.append(f"{module} ({n}) imports {other} ({number.get(other)})")
    assert wrong == []

def test_only_training_knows_fastai():
    number = numbers()
    names = lambda t: {a.name.split(".")[0] for n in ast.walk(t) if isinstance(n, ast.Import) for a in n.names} | {(n.module or "").split(".")[0] for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and not n.level}
    uses = {m for m in number if "fastai" in names(ast.parse(source(m).read_text(encoding="utf-8")))}
    assert uses and all(number[m] >= 50 for m in uses)

def test_pure_modules_stay_light():
    r = python("import sys, vavae_nb\n" + "\n".join(f"import vavae_nb.{m}" for m in PURE) + "\nprint([m for m in ('fastai', 'torchvision', 'timm') if m in sys.modules])")
    assert r.stdout.strip() == "[]", r.stdout+r.stderr

def test_the_package_and_its_help_need_no_torch():
    r = python("import sys, vavae_nb, vavae_nb.recipes.config, vavae_nb.train, vavae_nb.extract, vavae_nb.sample, vavae_nb.evaluate; print([m for m in ('torch', 'fastai', 'numpy') if m in sys.modules])")
    assert r.stdout.strip() == "[]", r.stdout+r.stderr

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
