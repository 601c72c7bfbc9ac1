"""Forward and backward of the tokenizer's autoencoder, against diffusers' `AutoencoderKL` with the same weights.

    python bench/autoencoder.py [--rounds 7] [--threads 2] [--device auto] [--precision auto]

Baseline: `AutoencoderKL` of diffusers, of the same widths. Ours: `Autoencoder`. Both contiguous and channels_last (as
the training has it); the ratio is that of the faster layout of each, which is named, and all four times are in the
result. Weights come from ours by `to_diffusers`, noise is the same, reconstructions and gradients are compared in fp32,
and what is timed with its own in fp32 (1e-1); attention of both is torch's fused one. On a GPU the paper's f16d32 on 16
images of 256×256 under bf16 autocast; on a CPU, in fp32 unless it has bf16, the recipe `tiny` on 32 of 32×32, and
f16d32 at half its width on 4 of 64×64. Writes results/bench-autoencoder.json.
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
p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"),
               help="of both (default: auto, bf16 where the device has it)")
a = start(p)
cuda = a.device.type == "cuda"

def tiny(): return build_tokenizer(recipe("tiny"))
def half_width(): return Autoencoder(ch=64, attn_resolutions=(4,), resolution=64)
if cuda: cases = {"f16d32": (Autoencoder, 16, 256)}
else: cases = {"tiny": (tiny, 32, 32), "f16d32, half width": (half_width, 4, 64)}
layouts = {"": torch.contiguous_format, ", channels_last": torch.channels_last}

def diffusers_forward(kl, x, noise):
    posterior = kl.encode(x).latent_dist
    return kl.decode(posterior.mean+posterior.std*noise).sample

def our_forward(tok, x, noise): return tok(x, noise)[0]

def step(model, forward, x, noise, precision=a.precision):
    model.zero_grad()
    with autocast(a.device, precision): rec = forward(model, x, noise)
    (rec.float()-x).square().mean().backward()
    return rec

def gradient_norms(model): # Sorted, as the tensors of the two have other names
    return torch.stack(sorted(p.grad.float().norm() for p in model.parameters()))

def row(name, build, batch, size):
    tok, g = build(), generator(0, name)
    def draw(channels, side): return torch.randn(batch, channels, side, side, generator=g).clamp(-1, 1).to(a.device)
    x, noise = draw(3, size), draw(tok.latent_dim, size//tok.downsampling)
    makers = {"diffusers": (to_diffusers, diffusers_forward), "ours": (copy.deepcopy, our_forward)}
    models, sides = {}, {}
    for layout,memory_format in layouts.items():
        for who,(make, forward) in makers.items():
            model = make(tok).train().to(a.device, memory_format=memory_format)
            models[who+layout], sides[who+layout] = model, partial(step, model, forward, x, noise)
    in_fp32 = {k: side(precision="fp32").detach() for k,side in sides.items()}
    norms = {k: gradient_norms(m) for k,m in models.items()}
    errors = dict(
        reconstruction=max(agree(r, in_fp32["diffusers"], 1e-3, f"reconstructions, {k}") for k,r in in_fp32.items()),
        gradient=max(agree(n, norms["diffusers"], 1e-3, f"gradients, {k}") for k,n in norms.items()),
        precision=max(agree(side().detach(), in_fp32[k], 1e-1, f"reconstructions as they are timed, {k}")
                      for k,side in sides.items()))
    times = take_turns(sides, a.rounds, a.device, warm=True)
    median = {k: statistics.median(t["wall"]) for k,t in times.items()}
    best = {who: min((k for k in median if who in k), key=median.get) for who in makers}
    return compare(times, best["diffusers"], best["ours"]) | dict(
        best=best, all_wall_s={k: t["wall"] for k,t in times.items()},
        all_cpu_s={k: t["cpu"] for k,t in times.items()}, errors=errors, tolerance=1e-3)

rows, goal = {}, 1.15 if cuda else 1.
for name,(build, batch, size) in cases.items(): rows[f"{name}, {batch}×{size}×{size}"] = row(name, build, batch, size)
show(rows, goal)
for k,r in rows.items():
    print(f"{k}: {r['best']['ours']} against {r['best']['diffusers']}; reconstructions differ by "
          f"{r['errors']['reconstruction']:.0e}, gradients by {r['errors']['gradient']:.0e}")
save(a, __doc__, dict(rows=rows, goal=goal))
