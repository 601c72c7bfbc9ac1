"""A long training with checkpoints, validation, a dashboard and interruptions: does memory grow, or the number of open files?

    python bench/soak.py [--minutes 32] [--out FOLDER]

Two trainings, each half of the time: a small tokenizer on the embedded images (GAN, VF loss, a checkpoint every 50 steps, each with its validation,
a look at the latent space every 100 steps), and a small LightningDiT on its latents (a checkpoint every 100
steps, each with its validation). Both are commands of their own, `python -m vavae_nb.train`, asked for more steps than fit. The first two thirds of each half are one
process; then it is interrupted by SIGTERM, SIGKILL and SIGTERM in turn, and called again each time. Every five seconds the process's own memory
(RssAnon) and its open files are read from /proc. Growth is the slope of a straight line through what one process used, from a minute after its
start on. A signal that comes before the command's own first line ends it as any program (-15). A rise is only a leak if it goes on, so the slope of the second half of the long stretch is given too. Writes results/soak.json.
"""
import argparse, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.sampling.sets import versions

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--minutes", type=float, default=32, help="in all (default: 32)")
p.add_argument("--out", help="run folders (default: a temporary one)")
a = p.parse_args()
out = Path(a.out or tempfile.mkdtemp())
ROOT = Path(__file__).resolve().parent.parent

SMALL = ["tokenizer.ch=16", "tokenizer.latent_dim=8", "tokenizer_training.lpips_slices=1", "dit.hidden_size=64", "dit.depth=2", "dit.num_heads=2", "data.limit=2000", "evaluation.dashboard_every=100"]
ENDLESS = dict(tokenizer=["tokenizer_training.steps=100000", "tokenizer_training.disc_start=100", "saving.every=50"],
               dit=["tokenizer_training.steps=40", "tokenizer_training.disc_start=20", "dit_training.steps=100000", "saving.every=100"])

def command(stage, only): return [sys.executable, "-m", "vavae_nb.train", "--recipe", "smoke", "--device", "cpu", "--out", str(out/stage), "--stage", only, "--set", *SMALL, *ENDLESS[stage]]

def look(pid):
    status = dict(l.split(":", 1) for l in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0])/1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])

def sitting(stage, seconds, sig):
    "One process, for so many seconds, then the signal; what was seen"
    start, rows, before = time.time(), [], Checkpoints(out/stage/"checkpoints"/stage).steps()
    with open(out/f"{stage}.txt", "a") as said: run = subprocess.Popen(command(stage, stage), stdout=said, stderr=said)
    while time.time()-start < seconds and run.poll() is None: time.sleep(5); rows.append((time.time()-start, *look(run.pid)))
    run.send_signal(sig); status = run.wait()
    steps = Checkpoints(out/stage/"checkpoints"/stage).steps()
    r = np.array([row for row in rows if row[0] > 60] or rows, float)
    slope = lambda r: float(np.polyfit(r[:, 0]/60, r[:, 1], 1)[0]) if len(r) > 3 else None
    print(f"{stage}: {r[-1, 0]/60:.1f} min, step {(before or [0])[-1]} → {steps[-1]}, memory {r[0, 1]:.0f} → {r[-1, 1]:.0f} MB, open files {r[0, 2]:.0f} → {r[-1, 2]:.0f}, ended by {signal.Signals(sig).name} with {status}", flush=True)
    return dict(stage=stage, seconds=r[-1, 0], signal=signal.Signals(sig).name, status=status, from_step=(before or [0])[-1], to_step=steps[-1], mb=[r[0, 1], float(r[:, 1].max()), r[-1, 1]],
                mb_per_minute=slope(r), mb_per_minute_second_half=slope(r[len(r)//2:]), open_files=[int(r[0, 2]), int(r[:, 2].max()), int(r[-1, 2])], threads=[int(r[0, 3]), int(r[-1, 3])])

out.mkdir(parents=True, exist_ok=True)
sittings, half = [], a.minutes*30
for stage in ("tokenizer", "dit"):
    for only in ("tokenizer", "latents") if stage == "dit" else (): subprocess.run(command(stage, only), check=True, capture_output=True)
    sittings += [sitting(stage, s, sig) for s,sig in ((half*2/3, signal.SIGTERM), (half/9, signal.SIGKILL), (half/9, signal.SIGTERM), (half/9, signal.SIGTERM))]
assert all(s["status"] in (143, -signal.SIGTERM, -signal.SIGKILL) for s in sittings) and all(s["to_step"] >= s["from_step"] for s in sittings), sittings
result = dict(command=" ".join(["python bench/soak.py", *sys.argv[1:]]).split(" --out")[0], minutes=sum(s["seconds"] for s in sittings)/60, settings=SMALL, endless=ENDLESS, sittings=sittings) | versions(torch.device("cpu"), "auto")
(ROOT/"results/soak.json").write_text(json.dumps(result, indent=1, default=float))
