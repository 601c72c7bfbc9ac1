"""Sampling with a guidance interval, 250 points: the unconditional half left out where guidance is off, against both.

    python bench/sampling.py [--rounds 5] [--threads 1] [--images N]

Baseline: `published.sample`: a doubled state, both halves at every step, Euler by torchdiffeq, which keeps the whole
trajectory. Ours: `sample`. The same LightningDiT (random weights; B/1 at 16×16 on a GPU, `tiny` at 8×8 on a CPU),
labels, noise and times (shift 0.3); guidance as the preset paper-800ep has it. Latents are compared. Work is counted in
latents that the model is asked about, so the ratio to expect is known; memory is of all tensors that are alive as the
model is asked for the last time, beyond those before, with 250 and with 50 points. Writes results/bench-sampling.json.
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
cuda = a.device.type == "cuda"
size, side, n = ("B", 16, 32) if cuda else ("tiny", 8, 4)
n = a.images or n
s = {k.split(".")[1]: v for k,v in sampling_presets["paper-800ep"].items()}
guidance = s["cfg_scale"], s["cfg_interval"], s["cfg_channels"]
with a.device: model, y = create_dit(size, input_size=side).eval(), torch.arange(n)
for q in model.parameters():
    if not q.any(): torch.nn.init.normal_(q, std=.02)
noise = ImageNoise(0, range(n), (32, side, side), a.device)()

def alive():
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())/1e6

def theirs(points=s["points"]):
    scale, (begin, _), channels = guidance
    ts = time_grid(points, s["shift"], device=a.device)
    return published.sample(model, y, noise, ts, model.null_class, scale, begin, channels)

def ours(points=s["points"]):
    scale, interval, channels = guidance
    return sample(model, y, (32, side, side), null_class=model.null_class, n_points=points, shift=s["shift"],
                  cfg_scale=scale, cfg_interval=interval, channels=channels, batch_size=n, seed=0, progress=False)

def watched(f, points):
    "What f returns, the latents that the model was asked about, call by call, and MB of tensors alive at the last call"
    asked, megabytes, before = [], [], alive()
    def hook(_, x):
        asked.append(len(x[0]))
        if len(asked) == points-1: megabytes.append(alive()-before)
    handle = model.x_embedder.proj.register_forward_pre_hook(hook)
    try: return f(points), asked, megabytes[0]
    finally: handle.remove()

z, asked, mb = watched(ours, s["points"])
z0, asked0, mb0 = watched(theirs, s["points"])
rounded = cuda and resolve_precision(a.device, a.precision) == "tf32"
error = agree(z, z0, 2e-2 if rounded else 1e-4, "latents")
few, few0 = (watched(f, 50)[2] for f in (ours, theirs))
assert abs(mb-few) < .01, f"memory of ours grows with the steps: {few} to {mb} MB"
row = compare(take_turns(dict(baseline=theirs, ours=ours), a.rounds, a.device, warm=True))
expected, unguided, left_out = sum(asked0)/sum(asked), asked.count(n)/len(asked), 1-sum(asked)/sum(asked0)
show({f"{n} latents, {len(asked)} steps": row})
print(f"unguided: {unguided:.0%} of the steps, {left_out:.1%} of the work left out: {expected:.3f}× to expect, "
      f"{row['ratio']:.3f}× measured")
print(f"tensors beside the weights with 50 and 250 points: ours {few:.2f} and {mb:.2f} MB, the baseline {few0:.2f} and "
      f"{mb0:.2f} MB; latents differ by {error:.0e}")
save(a, __doc__, row | dict(
    expected_ratio=expected, steps_unguided=unguided, work_left_out=left_out,
    mb={"ours": [few, mb], "baseline": [few0, mb0]}, points=[50, s["points"]],
    rel_err=error, size=size, images=n, tokens=side**2, guidance=s))
