"""Run notebooks one process each, with a time-out and one retry for a hang.

    python tools/notebooks.py test [nbs/X.ipynb …] [--flags slow]   execute and check; nothing is written
    python tools/notebooks.py run  [nbs/X.ipynb …] [--flags slow]   execute in place, store fresh outputs, clean

Only a time-out is retried (a kernel was seen to hang once in a while); a failing cell fails at once.
A test's process is a copy of this one, which has imported what most notebooks import: a fresh state without the 6 s that it takes.
"""
import argparse, importlib, json, os, signal, subprocess, sys, tempfile, time, warnings
from pathlib import Path
from other_seed import shift_by_environment

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FLAGS = ("slow", "cuda", "network") # as `tst_flags` in settings.ini
COMMON = ("nbdev.test", "matplotlib.pyplot", "torchvision", "fastai.basics")

def directives(source):
    "The words of a cell's `#|` lines"
    lines = (l.strip() for l in source.splitlines())
    return [l[2:].strip() for l in lines if l.startswith("#|")]

def execute_in_place(path, flags, timeout):
    "Execute a notebook's cells, except those flagged and not asked for, and store their outputs"
    import nbformat
    from nbclient import NotebookClient
    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kw):
            d = directives(cell.source) if cell.cell_type == "code" else []
            if "eval: false" in d or any(f in d and f not in flags for f in FLAGS): return cell
            return await super().async_execute_cell(cell, cell_index, **kw)
    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nb.metadata.pop("widgets", None) # State of progress bars, which nobody can see
    for c in nb.cells: # Warnings name paths of this machine; a widget without its state shows an error
        if c.cell_type == "code": c.outputs = [o for o in c.outputs if o.get("name") != "stderr" and "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    nbformat.write(nb, path)
    subprocess.run([BIN/"nbdev_clean", "--fname", str(path)], cwd=ROOT, check=True)
    return True

def execute(path, flags, timeout):
    "Execute a notebook's cells as nbdev_test does, writing nothing; were all right?"
    from nbdev.test import test_nb
    shift_by_environment()
    return test_nb(path, skip_flags=FLAGS, force_flags=flags, basepath=ROOT)[0]

def fork(job, path, *args):
    "Start `job` in a copy of this process; returns its number and the file of its output"
    log = tempfile.TemporaryFile()
    if pid := os.fork(): return pid, log
    os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
    sys.exit(not job(path, *args))

def run_all(job, paths, workers, timeout, end, *args):
    "Run `job` on each path, a process each, none begun after `end`; yields (path, ok, seconds, of CPU, output)"
    waiting, running = [(p, 1) for p in paths], {}
    while waiting or running:
        if time.time() > end: waiting = []
        while waiting and len(running) < workers:
            path, attempt = waiting.pop(0)
            pid, log = fork(job, path, *args, timeout)
            running[pid] = path, attempt, log, time.time()
        time.sleep(.05)
        for pid, (path, attempt, log, start) in list(running.items()):
            done, status, used = os.wait4(pid, os.WNOHANG)
            late = not done and time.time()-start > timeout
            if late: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); print(f"{path.name}: no end after {timeout} s (attempt {attempt})", flush=True)
            if not done and not late: continue
            del running[pid]
            if late and attempt == 1: waiting.insert(0, (path, 2)); continue
            log.seek(0)
            yield path, done and status == 0, time.time()-start, used.ru_utime+used.ru_stime, log.read().decode(errors="replace")+(f"\ntimed out twice after {timeout} s" if late else "")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("test", "run"))
    p.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook under nbs/")
    p.add_argument("--flags", nargs="*", default=[], choices=FLAGS, help="run the cells flagged so, too")
    p.add_argument("--timeout", type=int, default=240, help="seconds a notebook may take (default: 240; slow: give more)")
    p.add_argument("--workers", type=int, default=2, help="notebooks at a time (default: 2)")
    about = "begin no further notebook after so many minutes (default: no limit)"
    p.add_argument("--minutes", type=float, default=float("inf"), help=about)
    p.add_argument("--report", type=Path, help="write there, as JSON, whether each passed, and its seconds")
    a = p.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace") # Whatever the locale: notebooks print formulas
    paths = [q.resolve() for q in a.notebooks] or sorted(q for q in (ROOT/"nbs").rglob("*.ipynb") if not q.name.startswith(("_", ".")))
    threads = str(max(1, (os.cpu_count() or 1)//min(a.workers, len(paths))))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ |= {"IN_TEST": "1", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"} # Waiting threads that spin take the cores from the other notebook
    os.chdir(ROOT)
    start, report = time.time(), {}
    if a.action == "test" and not Path("/dev/nvidiactl").exists(): # Where there is a GPU, fastai's import starts CUDA, which no copy could use
        with warnings.catch_warnings(action="ignore"):
            for name in COMMON: importlib.import_module(name)
    job = execute if a.action == "test" else execute_in_place
    end, longest_first = start+60*a.minutes, paths[::-1]
    for path, ok, secs, cpu, out in run_all(job, longest_first, a.workers, a.timeout, end, a.flags):
        print(f"{'ok  ' if ok else 'FAIL'} {secs:6.1f} s ({cpu:5.1f} s of CPU)  {path.name}", flush=True)
        report[path.relative_to(ROOT).as_posix()] = dict(ok=ok, seconds=round(secs, 1))
        if not ok: print(out, flush=True)
    failed = sorted(name for name, r in report.items() if not r["ok"])
    if a.report: a.report.write_text(json.dumps(report, indent=1))
    left = len(paths)-len(report)
    print(f"{len(report)-len(failed)} of {len(paths)} notebooks passed in {time.time()-start:.0f} s" + f", {left} not begun"*(left > 0))
    if failed: sys.exit("failed: " + ", ".join(failed))

if __name__ == "__main__": main()
