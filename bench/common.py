"""What the scripts of this folder share: options, taking turns, ratios with their spread, checked outputs, results.

Scripts are run by `python bench/NAME.py`, which finds this module beside them, and write results/bench-NAME.json (or
--out). A script is

    a = start(options(__doc__))                                    # --rounds --threads --device --out
    error = agree(ours(), theirs(), 1e-5, "the losses")            # Also a warm-up; a fast wrong answer ends here
    row = compare(take_turns(dict(baseline=theirs, ours=ours), a.rounds, a.device))
    show({"a step": row}, goal=1.15)
    save(a, __doc__, row | dict(rel_err=error, goal=1.15))         # Versions, commit, device and threads are added
"""
import argparse, json, shlex, statistics, subprocess, sys, time, warnings
from pathlib import Path
import torch
from vavae_nb.base.commands import keep_freed_memory
from vavae_nb.base.files import atomic_write
from vavae_nb.sampling.sets import versions
from vavae_nb.base.tensors import pick_device, rel_err, seed_everything, set_tf32

warnings.filterwarnings("ignore", "`torch.jit", FutureWarning) # fastai's, at its import
ROOT = Path(__file__).resolve().parent.parent
commit = versions(torch.device("cpu"))["commit"] # Of the code that was loaded

def options(doc, rounds=5, threads=2, device="auto"):
    "A parser with what every script takes; a script adds its own, then calls `start`"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    p.add_argument("--threads", type=int, default=threads, help=f"CPU threads (default: {threads})")
    p.add_argument("--device", default=device, help=f"auto (a GPU if there is one), cpu or cuda (default: {device})")
    name = Path(sys.argv[0]).stem.replace("_", "-")
    p.add_argument("--out", default=ROOT/f"results/bench-{name}.json",
                   help="file of the result (default: results/bench-NAME.json)")
    return p

def start(p, precision="fp32"):
    "The options given, with `device` a torch device; sets threads, seeds, the precision of products, and memory"
    a = p.parse_args()
    keep_freed_memory() # As every command does
    a.device = pick_device(a.device)
    a.precision = vars(a).get("precision", precision) # A script may have an option for it
    torch.set_num_threads(a.threads)
    seed_everything(0)
    set_tf32(a.device, precision) # fp32: no TF32
    return a

def synchronize(device):
    if device.type == "cuda": torch.cuda.synchronize(device)

def timed(f, *args, device=torch.device("cpu")):
    "What f returns, seconds on the wall's clock, and on the processor's, all threads together"
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    out = f(*args)
    synchronize(device)
    return out, time.perf_counter()-wall, time.process_time()-cpu

def take_turns(sides, rounds, device=torch.device("cpu"), args=tuple, warm=False):
    "Seconds of each side (name → function), once per round, first one then the other in front"
    # `args` makes what a call is given, outside its time
    if not warm:
        for f in sides.values(): timed(f, *args(), device=device)
    out = {name: dict(wall=[], cpu=[]) for name in sides}
    for r in range(rounds):
        for name in list(sides)[::-1 if r % 2 else 1]:
            result, wall, cpu = timed(sides[name], *args(), device=device)
            out[name]["wall"].append(wall)
            out[name]["cpu"].append(cpu)
            del result # Before the next one is timed
    return out

def quartiles(x): return statistics.quantiles(x, n=4, method="inclusive")[::2] if len(x) > 1 else [x[0], x[0]]

def compare(times, baseline="baseline", ours="ours", clock="wall"):
    "Ratio of medians by one clock (with quartiles of the rounds' ratios) and by the other; milliseconds of all rounds"
    out = {}
    for c in (clock, "cpu" if clock == "wall" else "wall"):
        b, o, key = times[baseline][c], times[ours][c], "ratio" if c == clock else f"ratio_{c}"
        out[key] = statistics.median(b)/statistics.median(o)
        out[f"{key}_quartiles"] = quartiles([x/y for x,y in zip(b, o)])
    out["clock"] = clock
    for who,side in (("baseline", baseline), ("ours", ours)):
        for c in ("wall", "cpu"): out[f"{who}_{c}_ms"] = [float(f"{1e3*t:.5g}") for t in times[side][c]]
    return out

def agree(actual, expected, tolerance, what):
    "The relative error of ours from the baseline's, which must be within the tolerance"
    error = rel_err(actual, expected)
    assert error <= tolerance, f"{what}: {error:.1e} from the baseline's, more than {tolerance:g}"
    return error

def memory():
    "Resident memory of this process in MB: its own, that of mapped files, and its highest (Linux)"
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    lines = (line.split(":") for line in status)
    return {k: int(v.split()[0])*1.024e-3 for k,v in lines if k in ("RssAnon", "RssFile", "VmHWM")}

def peak(f, device, alone):
    "MB that a call of f takes at its highest: of the GPU here; on a CPU in a process of its own"
    if device.type != "cuda": # This script with the options `alone`, with which it ends in `print_peak`
        command = [sys.executable, sys.argv[0], *map(str, alone)]
        return float(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return (torch.cuda.max_memory_allocated()-before)/1e6

def print_peak(f):
    "What `peak` reads, and the end of the process"
    before = memory()["VmHWM"]
    f()
    print(memory()["VmHWM"]-before)
    sys.exit()

def show(rows, goal=None):
    "A line a row: medians, ratio and quartiles by the row's clock"
    wide = max(map(len, rows))
    print(f"{'':{wide}} {'baseline':>12} {'ours':>12} {'ratio':>7}  quartiles")
    for name,r in rows.items():
        b, o = (statistics.median(r[f"{who}_{r['clock']}_ms"]) for who in ("baseline", "ours"))
        spread = " … ".join(f"{q:.2f}" for q in r["ratio_quartiles"])
        line = f"{name:{wide}} {b:9.4g} ms {o:9.4g} ms {r['ratio']:6.2f}×  {spread}"
        print(line+(f"  (goal: {goal:g}×)" if goal else ""), flush=True)

def save(a, doc, result):
    "Write the result, whole or not at all, with what it depends on"
    # Where it went says nothing
    given = [o for i,o in enumerate(sys.argv[1:]) if not o.startswith("--out") and sys.argv[i] != "--out"]
    about = dict(command=shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *given]), what=doc.splitlines()[0])
    about |= result | versions(a.device, a.precision) | dict(cpu=torch.backends.cpu.get_cpu_capability(), commit=commit)
    with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(about, indent=1, default=float)+"\n", encoding="utf-8")
