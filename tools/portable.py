"""Notebooks and tests as other machines would run them: instruction sets, threads, signals, locale, folders, seeds.

    python tools/portable.py                     every setting, on all notebooks and tests; hours
    python tools/portable.py --settings ascii seed-1 --only tests
    python tools/portable.py --together          several settings at a time, so that each is tried once; an hour
    python tools/portable.py --list

Writes results/portability.json, which says of which commit each row is. Each notebook is a fresh process.
"""
import argparse, json, os, shutil, signal, subprocess, sys, tempfile, time
import xml.etree.ElementTree as xml
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


@dataclass(frozen=True)
class Setting:
    "What another machine, or another way to call, is imitated by"
    stands_for: str
    env: dict = field(default_factory=dict)
    workers: int = 2         # Notebooks, and test processes, at a time
    deaf: bool = False       # SIGINT, SIGHUP and SIGQUIT are inherited as ignored
    elsewhere: bool = False  # Called from another folder (a notebook works in its own, as in Jupyter)
    odd_path: bool = False   # In a clone whose path has a space and an umlaut
    neighbours: int = 0      # Busy processes beside it


SETTINGS = {
    "as-it-is": Setting("this machine"),
    "aten-default": Setting("a processor without AVX2", {"ATEN_CPU_CAPABILITY": "default"}),
    "aten-avx2": Setting("a processor without AVX-512", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "onednn-avx2": Setting("oneDNN without AVX-512 and bf16", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "threads-1": Setting("one core", {"OMP_NUM_THREADS": "1"}),
    "threads-2": Setting("two threads a process", {"OMP_NUM_THREADS": "2"}, workers=1),
    "threads-3": Setting("more threads than cores", {"OMP_NUM_THREADS": "3"}, workers=1),
    "signals-ignored": Setting("nohup, a shell's background, many CI systems", deaf=True),
    "ascii": Setting("a locale without UTF-8", {"LC_ALL": "C", "PYTHONUTF8": "0"}),
    "dumb-terminal": Setting("a terminal without cursor or colours", {"TERM": "dumb"}),
    "no-home": Setting("a HOME that cannot be written", {"HOME": os.devnull}),
    "elsewhere": Setting("another working directory", elsewhere=True),
    "odd-path": Setting("a clone whose path has a space and an umlaut", odd_path=True),
    "seed-1": Setting("other seeds for everything", {"OTHER_SEED": "1"}),
    "seed-2": Setting("other seeds for everything", {"OTHER_SEED": "2"}),
    "seed-3": Setting("other seeds for everything", {"OTHER_SEED": "3"}),
    "beside-others": Setting("two busy processes on the same cores", neighbours=2),
}
TOGETHER = { # What does not contradict each other; a failure is then looked for in its parts
    "surroundings": ("signals-ignored", "ascii", "dumb-terminal", "no-home", "elsewhere"),
    "old-processor": ("aten-default", "seed-1", "threads-2", "odd-path"),
    "many-threads": ("onednn-avx2", "seed-2", "threads-3"),
    "one-thread-and-neighbours": ("aten-avx2", "seed-3", "threads-1", "beside-others"),
}
PATIENCE = 3 # Times the usual time limits


def together(names):
    "Several settings as one"
    parts = [SETTINGS[n] for n in names]
    env = {k: v for p in parts for k, v in p.env.items()}
    flags = {k: any(getattr(p, k) for p in parts) for k in ("deaf", "elsewhere", "odd_path")}
    numbers = dict(workers=min(p.workers for p in parts), neighbours=max(p.neighbours for p in parts))
    return Setting(", ".join(p.stands_for for p in parts), env, **numbers, **flags)


@contextmanager
def prepared(setting):
    "The folder, the working directory and the environment of a setting"
    with ExitStack() as on:
        tmp = Path(on.enter_context(tempfile.TemporaryDirectory(prefix="portable-")))
        root, cwd = ROOT, tmp if setting.elsewhere else None
        if setting.odd_path:
            root = tmp/"vavae nb ü"
            clone(root)
        env = os.environ | {"PYTHONPATH": str(root)} | setting.env
        if "HOME" in setting.env: # And nothing that points elsewhere
            env = {k: v for k, v in env.items() if k != "VAVAE_NB_CACHE" and not k.startswith("XDG_")}
        for _ in range(setting.neighbours):
            busy = subprocess.Popen([PYTHON, "-c", "while True: pass"])
            on.callback(busy.wait)
            on.callback(busy.kill)
        yield root, cwd or root, env


def clone(to):
    "The tracked files as they are now, as a repository of their own"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, to], check=True)
    diff = ["git", "diff", "--name-only", "-z", "HEAD"]
    changed = subprocess.run(diff, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    for name in filter(None, changed.split("\0")):
        if (ROOT/name).exists(): shutil.copy(ROOT/name, to/name)


def run(args, setting, cwd, env):
    "A command in a setting, its output shown; the exit status"
    def dispositions():
        for s in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if setting.deaf: signal.signal(s, signal.SIG_IGN)
    return subprocess.run(list(map(str, args)), cwd=cwd, env=env, preexec_fn=dispositions).returncode


def run_notebooks(setting, notebooks=(), minutes=float("inf"), timeout=240):
    "Name → passed?, of all notebooks or of some"
    with prepared(setting) as (root, cwd, env), tempfile.TemporaryDirectory() as d:
        report = Path(d)/"report.json"
        limits = ["--workers", setting.workers, "--timeout", timeout, "--minutes", minutes, "--report", report]
        run([PYTHON, root/"tools/notebooks.py", "test", *(root/name for name in notebooks), *limits], setting, cwd, env)
        if not report.exists(): return {"tools/notebooks.py": False}
        return {name: r["ok"] for name, r in json.loads(report.read_text()).items()}


def run_tests(setting, tests=()):
    "Test → passed?, of all tests or of some; and how many were skipped"
    with prepared(setting) as (root, cwd, env), tempfile.TemporaryDirectory() as d:
        report = Path(d)/"report.xml"
        env.setdefault("OMP_NUM_THREADS", "1")
        where = ["-c", root/"pytest.ini", "--rootdir", root, *(root/t for t in tests or ["tests"])]
        how = ["-n", setting.workers, "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
        status = run([PYTHON, "-m", "pytest", "-q", *where, *how, f"--junitxml={report}"], setting, cwd, env)
        if not report.exists(): return {f"pytest ended with status {status}": False}, 0
        cases = list(xml.parse(report).getroot().iter("testcase"))
    has = lambda case, kind: case.find(kind) is not None
    name = lambda case: f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
    passed = {name(c): not (has(c, "failure") or has(c, "error")) for c in cases}
    return passed, sum(has(c, "skipped") for c in cases)


def repeat(name, setting):
    "The command that repeats one notebook or test in a setting"
    if setting in TOGETHER: return f"make test-portable SETTINGS='{' '.join(TOGETHER[setting])}'   # {name}"
    env = "".join(f"{k}={v} " for k, v in SETTINGS[setting].env.items())
    plain = SETTINGS[setting] == Setting(SETTINGS[setting].stands_for, SETTINGS[setting].env)
    if not plain: return f"make test-portable SETTINGS={setting}   # {name}"
    if name.endswith(".ipynb"): return f"{env}.venv/bin/python tools/notebooks.py test '{name}'"
    return f"{env}OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q '{name}'"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = dict(choices=[*SETTINGS, *TOGETHER], metavar="SETTING")
    p.add_argument("--settings", nargs="+", default=list(SETTINGS), help="default: all; see --list", **known)
    several = dict(action="store_const", dest="settings", const=list(TOGETHER))
    p.add_argument("--together", help="several settings at a time: "+", ".join(TOGETHER), **several)
    p.add_argument("--only", choices=("notebooks", "tests"), help="default: both")
    p.add_argument("--list", action="store_true", help="say what each setting stands for")
    p.add_argument("--out", type=Path, default=ROOT/"results/portability.json")
    a = p.parse_args()
    if a.list:
        for name, s in SETTINGS.items(): print(f"{name:16} {s.stands_for}")
        for name, parts in TOGETHER.items(): print(f"{name}: {', '.join(parts)}")
        return
    import torch
    from vavae_nb.sampling.sets import versions
    table = json.loads(a.out.read_text()) if a.out.exists() else dict(command="make test-portable", settings={})
    failed = []
    wanted = {k: SETTINGS.get(k) or together(TOGETHER[k]) for k in a.settings}
    for i, (name, setting) in enumerate(wanted.items(), 1):
        start = time.time()
        print(f"\n===== {i} of {len(wanted)}: {name}, {setting.stands_for}", flush=True)
        about = dict(settings=TOGETHER.get(name, [name]), stands_for=setting.stands_for, env=setting.env)
        machine = dict(cpu=torch.backends.cpu.get_cpu_capability(), **versions(torch.device("cpu")))
        row = table["settings"].get(name, {}) | about | machine
        if a.only != "tests": row["notebooks"] = counted(run_notebooks(setting, timeout=240*PATIENCE))
        if a.only != "notebooks":
            passed, skipped = run_tests(setting)
            row["tests"] = counted(passed) | dict(skipped=skipped)
        row["seconds"] = round(time.time()-start)
        table["settings"][name] = row
        table["commit"] = row["commit"] # Of the last one
        a.out.write_text(json.dumps(table, indent=1, ensure_ascii=False)+"\n", encoding="utf-8")
        failed += [(one, name) for part in ("notebooks", "tests") for one in row.get(part, {}).get("failed", ())]
    print()
    for one, name in failed: print(f"failed in {name}: {repeat(one, name)}")
    if failed: sys.exit(1)


def counted(passed): return dict(passed=sum(passed.values()), failed=sorted(k for k, ok in passed.items() if not ok))


if __name__ == "__main__": main()
