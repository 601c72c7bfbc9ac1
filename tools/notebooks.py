"""Run notebooks one process each, with a time-out and one retry for a hang.

    python tools/notebooks.py test [nbs/X.ipynb …] [--flags slow]   execute and check; nothing is written
    python tools/notebooks.py run  [nbs/X.ipynb …] [--flags slow]   execute in place, store fresh outputs, clean

Only a time-out is retried (a kernel was seen to hang once in a while); a failing cell fails at once.
"""
import argparse, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FLAGS = ("slow", "cuda", "network") # as `tst_flags` in settings.ini

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
    for c in nb.cells: # Warnings name paths of this machine
        if c.cell_type == "code": c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)
    subprocess.run([BIN/"nbdev_clean", "--fname", str(path)], cwd=ROOT, check=True)

def command(action, path, flags, timeout):
    if action == "test":
        return [BIN/"nbdev_test", "--path", str(path), "--n_workers", "0", *(["--flags", " ".join(flags)] if flags else [])]
    return [sys.executable, __file__, "_execute", str(path), "--flags", *flags, "--timeout", str(timeout)]

def one(action, path, flags, timeout, env):
    "Run one notebook; returns (ok, seconds, output)"
    start = time.time()
    for attempt in (1, 2):
        try:
            r = subprocess.run(command(action, path, flags, timeout), cwd=ROOT, env=env, timeout=timeout,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return r.returncode == 0, time.time()-start, r.stdout
        except subprocess.TimeoutExpired as e:
            out = (e.stdout or b"")
            out = out.decode(errors="replace") if isinstance(out, bytes) else out
            print(f"{path.name}: no end after {timeout} s (attempt {attempt})", flush=True)
    return False, time.time()-start, out + f"\ntimed out twice after {timeout} s"

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("test", "run", "_execute"))
    p.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook under nbs/")
    p.add_argument("--flags", nargs="*", default=[], choices=FLAGS, help="run the cells flagged so, too")
    p.add_argument("--timeout", type=int, default=240, help="seconds a notebook may take (default: 240; slow: give more)")
    p.add_argument("--workers", type=int, default=2, help="notebooks at a time (default: 2)")
    a = p.parse_args()
    paths = [q.resolve() for q in a.notebooks] or sorted(q for q in (ROOT/"nbs").rglob("*.ipynb") if not q.name.startswith(("_", ".")))
    if a.action == "_execute": return execute_in_place(paths[0], a.flags, a.timeout)
    threads = str(max(1, (os.cpu_count() or 1)//min(a.workers, len(paths))))
    env = {**os.environ, "IN_TEST": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
           "OMP_WAIT_POLICY": "PASSIVE"} # Waiting threads that spin take the cores from the other notebook
    start, failed = time.time(), []
    with ThreadPoolExecutor(a.workers) as pool:
        for path, (ok, secs, out) in zip(paths, pool.map(lambda q: one(a.action, q, a.flags, a.timeout, env), paths)):
            print(f"{'ok  ' if ok else 'FAIL'} {secs:6.1f} s  {path.name}", flush=True)
            if not ok: failed.append(path.name); print(out, flush=True)
    print(f"{len(paths)-len(failed)} of {len(paths)} notebooks passed in {time.time()-start:.0f} s")
    if failed: sys.exit("failed: " + ", ".join(failed))

if __name__ == "__main__": main()
