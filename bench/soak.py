"""A long training with checkpoints, validation, a dashboard and interruptions: do memory or the open files grow?

    python bench/soak.py [--minutes 32] [--out FOLDER]

Two trainings, each half of the time: a small tokenizer on the embedded images (GAN, VF loss, a checkpoint every 50
steps, each with its validation, a look at the latent space every 100 steps), and a small LightningDiT on its latents (a
checkpoint every 100 steps, each with its validation). Both are commands of their own, `python -m vavae_nb.train`, asked
for more steps than fit. The first two thirds of each half are one process; then it is interrupted by SIGTERM, SIGKILL
and SIGTERM in turn, and called again each time. Every five seconds the process's own memory (RssAnon) and its open
files are read from /proc. Growth is the slope of a straight line through what one process used, from a minute after its
start on. A signal that comes before the command's own first line ends it as any program (-15). A rise is only a leak if
it goes on, so the slope of the second half of the long stretch is given too. Writes results/soak.json.
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

SMALL = ["tokenizer.ch=16", "tokenizer.latent_dim=8", "tokenizer_training.lpips_slices=1", "dit.hidden_size=64",
         "dit.depth=2", "dit.num_heads=2", "data.limit=2000", "evaluation.dashboard_every=100"]
ENDLESS = dict(
    tokenizer=["tokenizer_training.steps=100000", "tokenizer_training.disc_start=100", "saving.every=50"],
    dit=["tokenizer_training.steps=40", "tokenizer_training.disc_start=20", "dit_training.steps=100000",
         "saving.every=100"])

def command(stage, only):
    return [sys.executable, "-m", "vavae_nb.train", "--recipe", "smoke", "--device", "cpu", "--out", str(out/stage),
            "--stage", only, "--set", *SMALL, *ENDLESS[stage]]

def usage(pid):
    "MB, open files and threads of a process"
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["RssAnon"].split()[0])/1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])

def last_step(stage):
    steps = Checkpoints(out/stage/"checkpoints"/stage).steps()
    return steps[-1] if steps else 0

def slope(rows): return float(np.polyfit(rows[:, 0]/60, rows[:, 1], 1)[0]) if len(rows) > 3 else None # MB per minute

def sitting(stage, seconds, sig):
    "One process, for so many seconds, then the signal; what was seen"
    start, rows, from_step, name = time.time(), [], last_step(stage), signal.Signals(sig).name
    with open(out/f"{stage}.txt", "a", encoding="utf-8") as log:
        run = subprocess.Popen(command(stage, stage), stdout=log, stderr=log)
    while time.time()-start < seconds and run.poll() is None:
        time.sleep(5)
        rows.append((time.time()-start, *usage(run.pid)))
    run.send_signal(sig)
    status, to_step = run.wait(), last_step(stage)
    r = np.array([row for row in rows if row[0] > 60] or rows, float)
    _, mb, files, threads = r.T
    print(f"{stage}: {r[-1, 0]/60:.1f} min, step {from_step} → {to_step}, memory {mb[0]:.0f} → {mb[-1]:.0f} MB, "
          f"open files {files[0]:.0f} → {files[-1]:.0f}, ended by {name} with {status}", flush=True)
    return dict(stage=stage, seconds=r[-1, 0], signal=name, status=status, from_step=from_step, to_step=to_step,
                mb=[mb[0], float(mb.max()), mb[-1]], mb_per_minute=slope(r),
                mb_per_minute_second_half=slope(r[len(r)//2:]),
                open_files=[int(files[0]), int(files.max()), int(files[-1])],
                threads=[int(threads[0]), int(threads[-1])])

out.mkdir(parents=True, exist_ok=True)
half, sittings = a.minutes*30, []
turns = ((half*2/3, signal.SIGTERM), (half/9, signal.SIGKILL), (half/9, signal.SIGTERM), (half/9, signal.SIGTERM))
for stage in ("tokenizer", "dit"):
    if stage == "dit":
        for before in ("tokenizer", "latents"): subprocess.run(command(stage, before), check=True, capture_output=True)
    sittings += [sitting(stage, seconds, sig) for seconds,sig in turns]
for s in sittings:
    assert s["status"] in (143, -signal.SIGTERM, -signal.SIGKILL) and s["to_step"] >= s["from_step"], sittings
given = " ".join(["python bench/soak.py", *sys.argv[1:]]).split(" --out")[0]
result = dict(command=given, minutes=sum(s["seconds"] for s in sittings)/60, settings=SMALL, endless=ENDLESS,
              sittings=sittings) | versions(torch.device("cpu"), "auto")
(ROOT/"results/soak.json").write_text(json.dumps(result, indent=1, default=float), encoding="utf-8")
