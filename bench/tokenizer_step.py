"""A tokenizer training step with VF loss and GAN: LPIPS and the discriminator differentiated once, against each time they are needed.

    python bench/tokenizer_step.py [--rounds 5] [--threads 2]

Baseline: the published formulation, which differentiates through LPIPS for the VF loss's adaptive weight, for the GAN's, and for the step
(and through the discriminator twice). Ours: `once_differentiated`. Same weights, same batch, gradients compared in the same run; the two
take turns, and the ratio is of medians. Writes results/bench-tokenizer-step.json.
"""
import argparse, json, statistics, subprocess, time
from pathlib import Path
import torch
from vavae_nb.config import TokenizerTraining
from vavae_nb.data import embedded
from vavae_nb.plan import build_tokenizer
from vavae_nb.recipes import recipe
from vavae_nb.tensors import generator, rel_err, seed_everything
from vavae_nb.tokenizer.adversarial import PatchGAN, adaptive_weight, generator_loss
from vavae_nb.tokenizer.perceptual import LPIPS
from vavae_nb.tokenizer.vf_loss import VFLoss
from vavae_nb.training.tokenizer import TokenizerLoss

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--rounds", type=int, default=5, help="timed pairs (default: 5)")
p.add_argument("--batch", type=int, default=32, help="images (default: 32)")
p.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
a = p.parse_args()

torch.set_num_threads(a.threads)
seed_everything(0)
cfg = recipe("tiny")
tok = build_tokenizer(cfg).to(memory_format=torch.channels_last)
lpips, disc, vf = LPIPS(), PatchGAN(ndf=cfg.tokenizer_training.disc_width, n_layers=cfg.tokenizer_training.disc_layers), VFLoss(tok.latent_dim, 112)
x, f = embedded("train").batch(range(a.batch)), torch.randn(a.batch, 112, 8, 8, generator=generator(0, "features"))
training = TokenizerTraining(disc_start=0)
ours = TokenizerLoss(tok, training, lpips, disc, vf)

def published(pred, x, f):
    rec, posterior, z = pred
    nll = ((x-rec).abs()+lpips(x, rec)).sum()/len(x)
    g, v = generator_loss(disc(rec)), vf(z, f)[0]
    d_scale = .5*adaptive_weight(nll, g, tok.decoder_last, 1e4)
    return nll+1e-6*posterior.kl().mean()+d_scale*g+vf.scale(nll, v, tok.encoder_last)*v

def step(loss):
    tok.zero_grad(); start = time.perf_counter()
    loss(tok(x, generator(0, "z")), x, f).backward()
    return time.perf_counter()-start, [p.grad.clone() for p in tok.parameters()]

(_, theirs), (_, mine) = step(published), step(ours) # Warm-up, and the comparison
whole = lambda gs: torch.cat([g.flatten() for g in gs])
error = rel_err(whole(mine), whole(theirs))
assert error < 1e-4, f"gradients differ by {error:.1e}"
times = [(step(published)[0], step(ours)[0]) for _ in range(a.rounds)]
base, new = ([t[i] for t in times] for i in (0, 1))
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
result = dict(command="python bench/tokenizer_step.py", what=__doc__.splitlines()[0], ratio=statistics.median(base)/statistics.median(new), baseline_ms=[round(1e3*t, 1) for t in base],
              ours_ms=[round(1e3*t, 1) for t in new], gradient_rel_err=error, batch=a.batch, image=32, precision="fp32", threads=torch.get_num_threads(),
              device=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, commit=commit)
Path("results").mkdir(exist_ok=True)
Path("results/bench-tokenizer-step.json").write_text(json.dumps(result, indent=1))
print(f"published {statistics.median(base)*1e3:.0f} ms, ours {statistics.median(new)*1e3:.0f} ms: {result['ratio']:.2f}×; gradients differ by {error:.0e}")
