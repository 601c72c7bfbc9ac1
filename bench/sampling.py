"""Sampling with a guidance interval, 250 points, shift 0.3: the unconditional half left out where guidance is off, against both halves always.

    python bench/sampling.py [--rounds 5] [--threads 1] [--images N]

Baseline: `published.sample`: a doubled state, both halves at every step, Euler by torchdiffeq, which keeps the whole trajectory. Ours: `sample`. The
same LightningDiT (random weights; B/1 at 16×16 on a GPU, `tiny` at 8×8 on a CPU), labels, noise and times; guidance as the preset paper-800ep has it.
Latents are compared. Work is counted in latents that the model is asked about, so the ratio to expect is known; memory is of all tensors that are alive
as the model is asked for the last time, beyond those before, with 250 and with 50 points. Writes results/bench-sampling.json.
"""
import gc
import torch
import published
from common import agree, compare, options, save, show, start, take_turns
from vavae_nb.recipes.config import sampling_presets
from vavae_nb.dit.model import create_dit
from vavae_nb.flow.sampler import sample, time_grid
from vavae_nb.base.tensors import ImageNoise, resolve_precision

p = options(__doc__, rounds=5, threads=1)
p.add_argument("--images", type=int, help="drawn at a time (default: 32 on a GPU, 4 on a CPU)")
a = start(p, "tf32") # Which is fp32 on a CPU
cuda, s = a.device.type == "cuda", {k.split(".")[1]: v for k,v in sampling_presets["paper-800ep"].items()}
n, size, side = a.images or (32 if cuda else 4), *(("B", 16) if cuda else ("tiny", 8))
with a.device: model, y = create_dit(size, input_size=side).eval(), torch.arange(n)
for q in model.parameters():
    if not q.any(): torch.nn.init.normal_(q, std=.02)
noise = ImageNoise(0, range(n), (32, side, side), a.device)()

def alive():
    gc.collect()
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor}
    return sum(storages.values())/1e6

def theirs(points=s["points"]): return published.sample(model, y, noise, time_grid(points, s["shift"], device=a.device), model.null_class, s["cfg_scale"], s["cfg_interval"][0], s["cfg_channels"])
def ours(points=s["points"]):
    return sample(model, y, (32, side, side), null_class=model.null_class, n_points=points, shift=s["shift"], cfg_scale=s["cfg_scale"], cfg_interval=s["cfg_interval"],
                  channels=s["cfg_channels"], batch_size=n, seed=0, progress=False)

def watched(f, points):
    "What f returns, the latents that the model was asked about, call by call, and MB of tensors alive at the last call"
    asked, megabytes, before = [], [], alive()
    def hook(_, x):
        asked.append(len(x[0]))
        if len(asked) == points-1: megabytes.append(alive()-before)
    handle = model.x_embedder.proj.register_forward_pre_hook(hook)
    try: return f(points), asked, megabytes[0]
    finally: handle.remove()

(z, asked, mb), (z0, asked0, mb0) = (watched(f, s["points"]) for f in (ours, theirs))
error = agree(z, z0, 2e-2 if cuda and resolve_precision(a.device, a.precision) == "tf32" else 1e-4, "latents")
few, few0 = (watched(f, 50)[2] for f in (ours, theirs))
assert abs(mb-few) < .01, f"memory of ours grows with the steps: {few} to {mb} MB"
row = compare(take_turns(dict(baseline=theirs, ours=ours), a.rounds, a.device, warm=True))
expected, skipped = sum(asked0)/sum(asked), asked.count(n)/len(asked)
show({f"{n} latents, {len(asked)} steps": row})
print(f"unguided: {skipped:.0%} of the steps, {1-sum(asked)/sum(asked0):.1%} of the work left out: {expected:.3f}× to expect, {row['ratio']:.3f}× measured\n"
      f"tensors beside the weights with 50 and 250 points: ours {few:.2f} and {mb:.2f} MB, the baseline {few0:.2f} and {mb0:.2f} MB; latents differ by {error:.0e}")
save(a, __doc__, row | dict(expected_ratio=expected, steps_unguided=skipped, work_left_out=1-sum(asked)/sum(asked0), mb={"ours": [few, mb], "baseline": [few0, mb0]}, points=[50, s["points"]],
                            rel_err=error, size=size, images=n, tokens=side**2, guidance=s))
