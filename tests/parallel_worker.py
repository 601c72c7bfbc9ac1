"""One process of a small training, for test_parallel: `python parallel_worker.py FOLDER [steps] [accumulate]`, with RANK and WORLD_SIZE. The first one writes what came of it."""
import sys
from pathlib import Path
import torch
from fastai.callback.core import Callback
from vavae_nb.recipes.config import DiTTraining, TokenizerTraining, VF
from vavae_nb.data.images import embedded
from vavae_nb.dit.model import LightningDiT
from vavae_nb.tokenizer.latents import Latents
from vavae_nb.base.processes import is_first, joined
from vavae_nb.base.tensors import generator, seed_everything
from vavae_nb.tokenizer.autoencoder import Autoencoder
from vavae_nb.training.callbacks import fit_steps
from vavae_nb.training.dit import dit_learner
from vavae_nb.training.logs import TermsLog
from vavae_nb.training.tokenizer import tokenizer_learner

class Double(Callback):
    "Batches in float64, and the gradients of the first step; after what draws, before the parts"
    order = 9
    def before_batch(self):
        self.learn.xb, self.learn.yb = (tuple(o.double() if isinstance(o, torch.Tensor) and o.is_floating_point() else o for o in b) for b in (self.xb, self.yb))

class FirstGradients(Callback):
    order = 19 # Before `FiniteGuard`
    def before_step(self):
        if self.train_iter == 0: self.learn.first = {k: p.grad.clone() for k,p in self.learn.named.items()}

def trained(learn, named, steps):
    learn.named = named
    learn.add_cbs([Double(), FirstGradients()])
    fit_steps(learn, steps)
    return dict(weights={k: p.detach().clone() for k,p in named.items()}, gradients=learn.first, history=[{k: v for k,v in r.items() if k not in ("seconds", "images_per_second", "memory_gb", "mfu")} for r in learn.terms_log.history])

def tokenizer(steps, accumulate, disc_weight=.5):
    seed_everything(0)
    images = embedded("train").subset(range(48))
    tok = Autoencoder(latent_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, norm_groups=4).double()
    features = torch.randn(48, 2, 6, 16, 16, generator=generator(0, "features")).numpy()
    training = TokenizerTraining(steps=steps, batch_size=16, lr=1e-3, lpips_slices=1, disc_start=2, disc_width=8, disc_layers=1, disc_weight=disc_weight, clip=1., accumulate=accumulate)
    learn = tokenizer_learner(tok, images, features, vf=VF(cos_margin=0.), training=training, precision="fp32", log=TermsLog(every=1))
    learn.loss_func.double()
    return trained(learn, dict(tok.named_parameters()) | {f"loss.{k}": p for k,p in learn.loss_func.named_parameters() if "vf" in k}, steps)

def dit(steps, accumulate):
    seed_everything(0)
    latents = Latents.of(torch.randn(48, 2, 4, 4, 4, generator=generator(0, "latents")), torch.arange(48) % 3)
    model = LightningDiT(input_size=4, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=3).double()
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.1, generator=generator(0, str(p.shape)))
    learn = dit_learner(model, latents, training=DiTTraining(steps=steps, batch_size=16, lr=1e-3, ema=.9, clip=1., accumulate=accumulate), precision="fp32", log=TermsLog(every=1))
    return trained(learn, {k: p for k,p in model.named_parameters() if p.requires_grad}, steps) | dict(ema=learn.ema.average)

if __name__ == "__main__":
    folder, steps, accumulate = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with joined(torch.device("cpu")):
        out = dict(tokenizer=tokenizer(steps, accumulate), dit=dit(steps, accumulate))
        if is_first(): torch.save(out, folder)
