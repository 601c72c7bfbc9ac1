"""Threads that spin for a moment while they wait, against threads that go on: alone, and beside two busy processes.

    python bench/waiting.py [--rounds 5] [--steps 20]

The library of threads reads how to wait when it is loaded, so each measurement is a process of its own: steps of
LightningDiT and of the tokenizer of `tiny`, their median. The baseline spins, as the library does by itself. The
commands (`base.commands.choose_waiting`) wait as ours where they are alone, which should cost 3 % at most, and asleep
beside others.
Writes results/bench-waiting.json.
"""
import json, os, statistics, subprocess, sys
from common import ROOT, options, save, start

WAYS = {"baseline": {}, "ours": {"GOMP_SPINCOUNT": "30000"}}
WAYS |= {"a tenth": {"GOMP_SPINCOUNT": "3000"}, "asleep": {"OMP_WAIT_POLICY": "PASSIVE"}}
STEPS = """
import json, sys, time, torch
from vavae_nb.training.networks import build_dit, build_tokenizer
from vavae_nb.recipes.paper import recipe
torch.set_num_threads(int(sys.argv[2]))
cfg = recipe("tiny")
x = torch.zeros(cfg.tokenizer_training.batch_size, 3, 32, 32)
z = torch.zeros(cfg.dit_training.batch_size, cfg.tokenizer.latent_dim, 8, 8)
tok, dit = build_tokenizer(cfg), build_dit(cfg, 10)
def tokenizer(): tok(x)[0].square().mean().backward()
def lightningdit(): dit(z, z[:, 0, 0, 0], z[:, 0, 0, 0].long()).square().mean().backward()
out = {}
for step in (tokenizer, lightningdit):
    seconds = []
    for _ in range(int(sys.argv[1])+3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter()-start)
    out[step.__name__] = seconds[3:]
print(json.dumps(out))
"""

p = options(__doc__, device="cpu")
p.add_argument("--steps", type=int, default=20, help="steps of each network in a process (default: 20)")
a = start(p)

def seconds(way):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | WAYS[way]
    command = [sys.executable, "-c", STEPS, str(a.steps), str(a.threads)]
    r = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=True)
    return {k: statistics.median(v) for k, v in json.loads(r.stdout).items()}

def measured():
    "Way → network → median seconds of a step, one a round"
    out = {way: {} for way in WAYS}
    for r in range(a.rounds):
        for way in list(WAYS)[::-1 if r % 2 else 1]:
            for network, s in seconds(way).items(): out[way].setdefault(network, []).append(s)
    return out

def ratios(times): # Of the baseline's step to each way's
    spinning = {network: statistics.median(seconds) for network, seconds in times["baseline"].items()}
    out = {}
    for way in list(WAYS)[1:]:
        for network, seconds in times[way].items():
            out[f"{way}, {network}"] = spinning[network]/statistics.median(seconds)
    return out

result = dict(alone=measured())
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
try: result["beside_two"] = measured()
finally:
    for o in busy: o.kill()
for where, times in list(result.items()):
    result[f"ratio_{where}"] = ratios(times)
    print(where.replace("_", " "))
    for way, by in times.items():
        print(f"  {way:12}", {k: f"{1e3*statistics.median(v):.1f} ms" for k, v in by.items()})
    print("  ratio to spinning:", {k: f"{v:.3f}×" for k, v in result[f"ratio_{where}"].items()}, flush=True)
save(a, __doc__, result | dict(goal_alone=.97))
