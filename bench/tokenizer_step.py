"""A tokenizer training step with VF loss and GAN: LPIPS and the discriminator differentiated once, against each time they are needed.

    python bench/tokenizer_step.py [--rounds 5] [--threads 2]

Baseline: the published formulation, which differentiates through LPIPS for the VF loss's adaptive weight, for the GAN's, and for the step
(and through the discriminator twice). Ours: `once_differentiated`. Same weights, same batch, gradients compared in the same run; the two
take turns, and the ratio is of medians. Writes results/bench-tokenizer-step.json.
"""
import torch
from common import agree, compare, options, save, show, start, take_turns
from vavae_nb.config import TokenizerTraining
from vavae_nb.data import embedded
from vavae_nb.plan import build_tokenizer
from vavae_nb.recipes import recipe
from vavae_nb.tensors import generator
from vavae_nb.tokenizer.adversarial import PatchGAN, adaptive_weight, generator_loss
from vavae_nb.tokenizer.perceptual import LPIPS
from vavae_nb.tokenizer.vf_loss import VFLoss
from vavae_nb.training.tokenizer import TokenizerLoss

p = options(__doc__)
p.add_argument("--batch", type=int, default=32, help="images (default: 32)")
a = start(p)
cfg = recipe("tiny")
tok = build_tokenizer(cfg).to(a.device, memory_format=torch.channels_last)
t = cfg.tokenizer_training
lpips, disc, vf = (o.to(a.device) for o in (LPIPS(), PatchGAN(ndf=t.disc_width, n_layers=t.disc_layers), VFLoss(tok.latent_dim, 112)))
x, f = (o.to(a.device) for o in (embedded("train").batch(range(a.batch)), torch.randn(a.batch, 112, 8, 8, generator=generator(0, "features"))))
training = TokenizerTraining(disc_start=0)
ours = TokenizerLoss(tok, training, lpips, disc, vf)

def published(pred, x, f):
    rec, posterior, z = pred
    nll = ((x-rec).abs()+lpips(x, rec)).sum()/len(x)
    g, v = generator_loss(disc(rec)), vf(z, f)[0]
    d_scale = .5*adaptive_weight(nll, g, tok.decoder_last, 1e4)
    return nll+1e-6*posterior.kl().mean()+d_scale*g+vf.scale(nll, v, tok.encoder_last)*v

def step(loss):
    tok.zero_grad()
    loss(tok(x, generator(0, "z", a.device)), x, f).backward()

def gradients(loss):
    step(loss)
    return torch.cat([p.grad.flatten() for p in tok.parameters()])

error = agree(gradients(ours), gradients(published), 1e-4, "gradients")
row = compare(take_turns(dict(published=lambda: step(published), ours=lambda: step(ours)), a.rounds, a.device), "published")
show({"a step": row}, goal=1.5)
save(a, __doc__, row | dict(goal=1.5, gradient_rel_err=error, batch=a.batch, image=32))
