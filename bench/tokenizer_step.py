"""A tokenizer training step with VF loss and GAN: gradients taken once and cached features, against the published form.

    python bench/tokenizer_step.py [--rounds 5] [--threads 2] [--batch N]

Baseline: the published formulation, which asks the foundation model in every step, and differentiates through LPIPS for
the VF loss's adaptive weight, for the GAN's, and for the step (and through the discriminator twice). Ours: features as
the training reads them (`cached_features`' file, float16), and `once_differentiated`. The first row gives the baseline
the cached features too, so that it shows the gradients alone; gradients must agree to 1e-4 there, and to 1e-2 with
features computed in the step, as float16 rounds what is kept. Same weights, same batch, in turns. On a CPU the networks
of `tiny` with EfficientNet-Lite0, 32 images of 32×32; on a GPU f16d32 and DINOv2-L with random weights, 8 images of
256×256; LPIPS of all its slices. Writes results/bench-tokenizer-step.json.
"""
import tempfile
from functools import partial
from pathlib import Path
import numpy as np, torch
from common import agree, compare, options, save, show, start, take_turns
from vavae_nb.recipes.config import TokenizerTraining
from vavae_nb.data.images import embedded
from vavae_nb.training.networks import build_tokenizer
from vavae_nb.recipes.paper import recipe
from vavae_nb.base.tensors import generator
from vavae_nb.tokenizer.adversarial import PatchGAN, adaptive_weight, generator_loss
from vavae_nb.tokenizer.foundation import FoundationModel
from vavae_nb.tokenizer.perceptual import LPIPS
from vavae_nb.tokenizer.vf_loss import VFLoss
from vavae_nb.training.objective import TokenizerLoss

p = options(__doc__)
p.add_argument("--batch", type=int, help="images (default: 32; on a GPU 8)")
a = start(p)
gpu = a.device.type == "cuda"
cfg, batch = recipe("imagenet256-f16d32-dinov2-xl" if gpu else "tiny"), a.batch or (8 if gpu else 32)
tok, t = build_tokenizer(cfg), cfg.tokenizer_training
vfm = FoundationModel(cfg.foundation.name, cfg.data.size//tok.downsampling, weights="random" if gpu else None,
                      normalize=cfg.foundation.normalize)
nets = (tok, vfm, LPIPS(), PatchGAN(ndf=t.disc_width, n_layers=t.disc_layers), VFLoss(tok.latent_dim, vfm.channels))
tok, vfm, lpips, disc, vf = (o.to(a.device, memory_format=torch.channels_last) for o in nets)
x = embedded("train").batch(range(batch))
x = torch.nn.functional.interpolate(x, size=(cfg.data.size,)*2, mode="bicubic").clamp(-1, 1).to(a.device)
work = tempfile.TemporaryDirectory()
np.save(Path(work.name)/"features.npy", vfm(x).half().cpu().numpy())
kept = np.load(Path(work.name)/"features.npy", mmap_mode="r")
order = np.arange(batch) # As a shuffled batch reads them: row by row
objective = TokenizerLoss(TokenizerTraining(disc_start=0), lpips, disc, vf)

def loss(pred, x, f): return objective(pred, x, f, tokenizer=tok)

def cached(): return torch.from_numpy(np.asarray(kept[order])).float().to(a.device)

def published(pred, x, f):
    rec, posterior, z = pred
    nll = ((x-rec).abs()+lpips(x, rec)).sum()/len(x)
    g, v = generator_loss(disc(rec)), vf(z, f)[0]
    d_scale = .5*adaptive_weight(nll, g, tok.decoder_last, 1e4)
    return nll+1e-6*posterior.kl().mean()+d_scale*g+vf.vf_weight*adaptive_weight(nll, v, tok.encoder_last, 1e8)*v

def step(loss, features):
    tok.zero_grad()
    f = features()
    loss(tok(x, generator(0, "z", a.device)), x, f).backward()

def gradients(*side):
    step(*side)
    return torch.cat([p.grad.flatten() for p in tok.parameters()])

sides = dict(live=(published, lambda: vfm(x)), cached=(published, cached), ours=(loss, cached))
g = {k: gradients(*side) for k,side in sides.items()}
of_cached = agree(g["ours"], g["cached"], 1e-4, "gradients")
of_live = agree(g["ours"], g["live"], 1e-2, "gradients, with the features of the step")
times = take_turns({k: partial(step, *side) for k,side in sides.items()}, a.rounds, a.device, warm=True)
rows = {"each gradient once": compare(times, "cached") | dict(gradient_rel_err=of_cached),
        "and features cached": compare(times, "live") | dict(gradient_rel_err=of_live)}
show(rows)
save(a, __doc__, dict(rows=rows, goals={"and features cached": 1.5}, batch=batch, image=cfg.data.size,
                      foundation=vfm.name))
work.cleanup()
