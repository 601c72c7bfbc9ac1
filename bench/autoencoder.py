"""Forward and backward of the tokenizer's autoencoder, against diffusers' `AutoencoderKL` of the same widths with the same weights.

    python bench/autoencoder.py [--rounds 7] [--threads 2] [--device auto] [--precision auto]

Baseline: `AutoencoderKL` of diffusers. Ours: `Autoencoder`. Both contiguous and channels_last (as the training has it); the ratio is that of the faster
layout of each, which is named, and all four times are in the result. Weights come from ours by `to_diffusers`, noise is the same, reconstructions and
gradients are compared in fp32, and what is timed with its own in fp32 (1e-1); attention of both is torch's fused one. On a GPU the paper's f16d32 on 16 images of 256×256 under bf16 autocast; on a CPU, in
fp32 unless it has bf16, the recipe `tiny` on 32 of 32×32, and f16d32 at half its width on 4 of 64×64. Writes results/bench-autoencoder.json.
"""
import copy, statistics
from functools import partial
import torch
from common import agree, compare, options, save, show, start, take_turns
from vavae_nb.training.networks import build_tokenizer
from vavae_nb.interop.diffusers import to_diffusers
from vavae_nb.recipes.paper import recipe
from vavae_nb.base.tensors import autocast, generator
from vavae_nb.tokenizer.autoencoder import Autoencoder

p = options(__doc__, rounds=7)
p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of both (default: auto, bf16 where the device has it)")
a = start(p)
cuda = a.device.type == "cuda"
cases = {"f16d32": (lambda: Autoencoder(), 16, 256)} if cuda else {
    "tiny": (lambda: build_tokenizer(recipe("tiny")), 32, 32), "f16d32, half width": (lambda: Autoencoder(ch=64, attn_resolutions=(4,), resolution=64), 4, 64)}

def diffusers_forward(kl, x, noise):
    posterior = kl.encode(x).latent_dist
    return kl.decode(posterior.mean+posterior.std*noise).sample

def step(model, forward, x, noise, precision=a.precision):
    model.zero_grad()
    with autocast(a.device, precision): rec = forward(x, noise)
    (rec.float()-x).square().mean().backward()
    return rec

def gradient_norms(model): return torch.stack(sorted(p.grad.float().norm() for p in model.parameters())) # The tensors of the two have other names

rows, goal = {}, 1.15 if cuda else 1.
for name,(build, batch, size) in cases.items():
    tok = build()
    g, layouts = generator(0, name), {"": torch.contiguous_format, ", channels_last": torch.channels_last}
    x, noise = (torch.randn(batch, c, s, s, generator=g).clamp(-1, 1).to(a.device) for c,s in ((3, size), (tok.latent_dim, size//tok.downsampling)))
    models = {who+k: make(tok).train().to(a.device, memory_format=f) for k,f in layouts.items() for who,make in (("diffusers", to_diffusers), ("ours", copy.deepcopy))}
    forward = lambda k: partial(diffusers_forward, models[k]) if "diffusers" in k else lambda *o: models[k](*o)[0]
    recs = {k: step(m, forward(k), x, noise, "fp32").detach() for k,m in models.items()}
    errors = dict(reconstruction=max(agree(r, recs["diffusers"], 1e-3, f"reconstructions, {k}") for k,r in recs.items()),
                  gradient=max(agree(gradient_norms(m), gradient_norms(models["diffusers"]), 1e-3, f"gradients, {k}") for k,m in models.items()))
    sides = {k: partial(step, m, forward(k), x, noise) for k,m in models.items()}
    errors["precision"] = max(agree(f().detach(), recs[k], 1e-1, f"reconstructions as they are timed, {k}") for k,f in sides.items()) # Beside the same in fp32
    times = take_turns(sides, a.rounds, a.device, warm=True)
    best = {who: min((k for k in sides if who in k), key=lambda k: statistics.median(times[k]["wall"])) for who in ("diffusers", "ours")}
    rows[f"{name}, {batch}×{size}×{size}"] = compare(times, best["diffusers"], best["ours"]) | dict(best=best, all_wall_s={k: t["wall"] for k,t in times.items()},
        all_cpu_s={k: t["cpu"] for k,t in times.items()}, errors=errors, tolerance=1e-3)
show(rows, goal)
for k,r in rows.items(): print(f"{k}: {r['best']['ours']} against {r['best']['diffusers']}; reconstructions differ by {r['errors']['reconstruction']:.0e}, gradients by {r['errors']['gradient']:.0e}")
save(a, __doc__, dict(rows=rows, goal=goal))
