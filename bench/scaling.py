"""How the cost grows: LightningDiT's training step with batch, tokens, width, processes; sampling with steps, images.

    python bench/scaling.py [--rounds 3] [--processes 1 2]

Each curve has one size varied and the others fixed: depth 6, width 128, 64 tokens of 32 channels, batch 16 (on a GPU:
depth 12, width 768, 256 tokens, batch 64, in bf16). A training step is forward, backward and AdamW. `slope` is that of
log(seconds) against log(size) between the last two points: 1 is straight. Processes: the same training (LightningDiT of
the recipe tiny) with one thread each, started by torchrun, on the CPU only: there is one GPU at most here. Writes
results/bench-scaling.json.
"""
import csv, math, os, shutil, statistics, subprocess, sys, tempfile
from functools import partial
from pathlib import Path
import torch
from common import options, save, start, take_turns
from vavae_nb.dit.model import LightningDiT
from vavae_nb.flow.sampler import sample
from vavae_nb.base.tensors import autocast

p = options(__doc__, rounds=3)
p.add_argument("--processes", type=int, nargs="*", default=[1, 2],
               help="numbers of processes; none: leave that out (default: 1 2)")
a = start(p)
gpu = a.device.type == "cuda"
a.precision = "bf16" if gpu else "fp32"
usual = dict(batch=64, side=16, width=768, depth=12) if gpu else dict(batch=16, side=8, width=128, depth=6)
if gpu: sizes = dict(batch=(4, 8, 16, 32, 64, 128), side=(8, 16, 32), width=(384, 768, 1152, 1536))
else: sizes = dict(batch=(1, 2, 4, 8, 16, 32), side=(4, 8, 16), width=(64, 128, 256, 512))

def model(side, width, depth): return LightningDiT(side, 1, 32, width, depth, width//64, num_classes=10).to(a.device)

def inputs(batch, side): # Latents, times, labels
    x = torch.randn(batch, 32, side, side, device=a.device)
    return x, x[:,0,0,0].sigmoid(), x[:,0,0,0].long() % 10

def training_step(**changed):
    batch, side, width, depth = (usual | changed).values()
    m, xty = model(side, width, depth), inputs(batch, side)
    opt = torch.optim.AdamW(m.parameters(), fused=True)
    def step():
        with autocast(a.device, a.precision): out = m(*xty)
        out.float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    return step

def drawing(images, points):
    side = usual["side"]
    m, labels = model(side, usual["width"], usual["depth"]).eval(), torch.arange(images, device=a.device) % 10
    def draw():
        with torch.no_grad(), autocast(a.device, a.precision):
            sample(m, labels, (32, side, side), null_class=10, n_points=points, batch_size=64, progress=False)
    return draw

def curve(name, make, values, unit):
    seconds = []
    for v in values: # One model at a time
        t = take_turns({"it": make(v)}, a.rounds, a.device)["it"]["wall"]
        seconds.append(statistics.median(t))
    slope = math.log(seconds[-1]/seconds[-2])/math.log(values[-1]/values[-2])
    print(f"{name:10} {unit:8}", in_words(values, seconds), f" slope {slope:.2f}", flush=True)
    return dict(unit=unit, values=list(values), seconds=seconds, slope=slope)

def in_words(values, seconds): return "  ".join(f"{v}: {1e3*s:.4g} ms" for v,s in zip(values, seconds))

def train(n, out, stage):
    "A small training by n processes of one thread"
    settings = ["tokenizer_training.steps=2", "dit_training.steps=90", "saving.log_every=10"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n),
               "--master-port", str(29600+n), "-m", "vavae_nb.train", "--out", out, "--stage", stage,
               "--recipe", "tiny", "--device", "cpu", "--vf", "none", "--set", *settings]
    subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1"), check=True, capture_output=True)

def step_seconds(log):
    "The median of what ten steps took by a run's own log, which also holds pictures"
    with open(log, encoding="utf-8") as f:
        at = [float(r["seconds"]) for r in csv.DictReader(f) if (r["stage"], r["term"]) == ("dit", "loss")]
    return statistics.median(b-a for a,b in zip(at, at[1:]))/10

def processes(numbers):
    seconds = []
    with tempfile.TemporaryDirectory() as d:
        for stage in ("tokenizer", "latents"): train(1, f"{d}/first", stage)
        for n in numbers:
            shutil.copytree(f"{d}/first", f"{d}/{n}")
            train(n, f"{d}/{n}", "dit")
            seconds.append(step_seconds(f"{d}/{n}/log.csv"))
    print("processes ", in_words(numbers, seconds), flush=True)
    return dict(unit="processes of one thread", values=numbers, seconds=seconds)

tokens = [side*side for side in sizes["side"]]
out = {"batch": curve("training", lambda v: training_step(batch=v), sizes["batch"], "images"),
       "tokens": curve("training", lambda v: training_step(side=math.isqrt(v)), tokens, "tokens"),
       "width": curve("training", lambda v: training_step(width=v), sizes["width"], "width"),
       "steps": curve("sampling", partial(drawing, 64), (5, 10, 20, 40), "points"),
       "images": curve("sampling", lambda v: drawing(v, 10), (64, 128, 256), "images")}
if a.processes and not gpu: out["processes"] = processes(a.processes)
save(a, __doc__, dict(curves=out, usual=usual))
