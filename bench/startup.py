"""How long it takes until something happens: the import, `--help` of each command, and the first step of a training.

    python bench/startup.py [--rounds 5]

Each is a process of its own with warm files (run once before, untimed), timed from outside, in turns; processor time
is of the process, and other work on the machine disturbs it less. `import vavae_nb` is compared with `import torch`,
beyond which it should take less than 0.3 s; so are the modules of both models and the sampler. The first step is
`python -m vavae_nb.train` with the recipe `smoke` until it has written the checkpoint of its first step. Writes
results/bench-startup.json.
"""
import os, statistics, subprocess, sys, tempfile, time
from common import ROOT, options, save, start

a = start(options(__doc__, device="cpu"))
modules = ("base.tensors", "dit.model", "flow.sampler", "tokenizer.autoencoder")
models = ", ".join(f"vavae_nb.{module}" for module in modules)
def python(line): return [sys.executable, "-c", line]
commands = {"import torch": python("import torch"), "import torch, vavae_nb": python("import torch, vavae_nb"),
            "import torch, models": python(f"import torch, {models}")}
for name in ("train", "extract", "sample", "evaluate", "ablations"):
    commands[f"{name} --help"] = [sys.executable, "-m", f"vavae_nb.{name}", "--help"]

def seconds(command):
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0, errors.decode()
    return time.perf_counter()-start, used.ru_utime+used.ru_stime

def first_step():
    command = [sys.executable, "-m", "vavae_nb.train", "--recipe", "smoke", "--stage", "tokenizer", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as d:
        return seconds([*command, "--out", f"{d}/run", "--set", "tokenizer_training.steps=1", "vf.weight=0"])

for c in commands.values(): seconds(c)
rounds = [{k: seconds(c) for k,c in commands.items()} for _ in range(a.rounds)]
rounds[0]["first step"] = first_step()
rows, median = {}, {}
for k in rounds[0]:
    wall, cpu = zip(*(r[k] for r in rounds if k in r))
    rows[k] = dict(wall_s=list(wall), cpu_s=list(cpu))
    median[k] = dict(wall_s=statistics.median(wall), cpu_s=statistics.median(cpu))
beyond = {}
for k in ("vavae_nb", "models"):
    beyond[k] = {clock: s-median["import torch"][clock] for clock,s in median[f"import torch, {k}"].items()}
for k,m in median.items():
    goal = "  (goal: 3 s)" if "help" in k else ""
    print(f"{k:24} {m['wall_s']:6.2f} s, {m['cpu_s']:6.2f} s of the processor{goal}")
for k,m in beyond.items():
    print(f"{k} beyond torch: {m['wall_s']:+.2f} s, {m['cpu_s']:+.2f} s of the processor  (goal: 0.3 s)")
save(a, __doc__, dict(seconds=rows, median=median, beyond_torch=beyond, goals=dict(beyond_torch=.3, help=3)))
