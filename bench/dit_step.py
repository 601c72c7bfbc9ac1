"""A training step of LightningDiT with all that the training does, against the published form, eager and compiled.

    python bench/dit_step.py [--rounds 10] [--threads 2] [--sizes tiny …] [--batch N]
        [--forms eager compiled] [--precision auto]

Baseline: `published.training_step`: the published formulation, with AdamW not fused, an average of the weights tensor
by tensor and `.item()` at each step; compiled, each block by `torch.compile`. Ours: a step of `dit_learner` with all
its callbacks (gradient norm, guard against NaN, average, log); compiled, by `compile_blocks`. Both begin with the same
weights and are given the same noisy latents, times, labels and targets, one after the other; drawing these is in
neither time. Losses of every step and the weights after the last are compared. On a GPU B/1 and XL/1 at 16×16 positions
in bf16; on a CPU `tiny` at 8×8 (the recipe's batch of 32). Writes results/bench-dit-step.json.
"""
import copy, gc, statistics, time
from functools import partial
from itertools import product
import torch
from common import agree, compare, options, save, show, start, synchronize, timed
from fastai.callback.core import Callback
from published import block, training_step
from vavae_nb.recipes.config import DiTTraining
from vavae_nb.dit.compiling import compile_blocks
from vavae_nb.dit.cost import count_params, flops_per_image
from vavae_nb.dit.model import create_dit
from vavae_nb.tokenizer.latents import Latents
from vavae_nb.training.rates import measured_rate
from vavae_nb.base.tensors import autocast, generator, resolve_precision, seed_everything
from vavae_nb.training.callbacks import fit_steps
from vavae_nb.training.dit import dit_learner

p = options(__doc__, rounds=10)
p.add_argument("--sizes", nargs="+", help="of LightningDiT (default: B XL on a GPU, tiny on a CPU)")
p.add_argument("--batch", type=int, help="latents (default: 32 on a CPU; on a GPU 128 for B and 64 for XL, "
               "half of it with less than 100 GB)")
p.add_argument("--forms", nargs="+", default=["eager", "compiled"], help="eager, compiled (default: both)")
p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"),
               help="of both (default: auto, bf16 where the device has it)")
a = start(p)
precision, cuda = resolve_precision(a.device, a.precision), a.device.type == "cuda"
tolerance = 1e-4 if precision == "fp32" else 5e-3
rate = measured_rate(a.device, torch.bfloat16 if precision == "bf16" else torch.float32, *([8192] if cuda else []))

class Begin(Callback):
    "The clocks as our step begins; after `FlowBatch`, which draws, before the first forward pass"
    order = 9
    def before_batch(self):
        synchronize(a.device)
        self.learn.wall, self.learn.cpu = time.perf_counter(), time.process_time()

class Turns(Callback):
    "Our step's time, then the baseline's on the same batch; after all that a step does, before `MaxSteps`"
    order = 89
    def __init__(self, baseline):
        self.baseline, self.losses = baseline, []
        self.times = {side: dict(wall=[], cpu=[]) for side in ("baseline", "ours")}
    def after_batch(self):
        synchronize(a.device)
        wall, cpu = time.perf_counter()-self.learn.wall, time.process_time()-self.learn.cpu
        loss, their_wall, their_cpu = timed(self.baseline, *self.xb[:3], self.yb[0], device=a.device)
        self.losses.append((self.learn.loss.item(), loss))
        if self.train_iter <= 2: return # A warm-up
        self.note("ours", wall, cpu)
        self.note("baseline", their_wall, their_cpu)
    def note(self, side, wall, cpu):
        self.times[side]["wall"].append(wall)
        self.times[side]["cpu"].append(cpu)

def flat(tensors): return torch.cat([o.detach().flatten() for o in tensors])

def measure(size, compiled, batch, side):
    seed_everything(0)
    with a.device: model = create_dit(size, input_size=side, num_classes=1000 if cuda else 10).train()
    for q in model.parameters():
        if not q.any(): torch.nn.init.normal_(q, std=.02) # What starts at zero hides what is behind it
    theirs, average = copy.deepcopy(model), {k: v.detach().clone() for k,v in model.named_parameters()}
    training = DiTTraining(steps=a.rounds+2, batch_size=batch)
    opt = torch.optim.AdamW(theirs.parameters(), lr=training.lr, betas=training.betas, weight_decay=0.)
    their_block = torch.compile(block) if compiled else block
    cast = partial(autocast, a.device, a.precision)
    turns = Turns(partial(training_step, theirs, average, opt, block=their_block, cast=cast))
    why_not = compile_blocks(model, batch, a.precision) if compiled else ""
    assert not why_not, why_not
    latents = torch.randn(4*batch, 2, 32, side, side, generator=generator(0, "latents"))
    z = Latents.of(latents, torch.arange(4*batch) % model.num_classes)
    learn = dit_learner(model, z, training=training, device=a.device, precision=a.precision, cbs=[Begin(), turns])
    fit_steps(learn, training.steps)
    errors = compared(turns, model, theirs, learn.ema.average, average)
    images = {who: batch/statistics.median(turns.times[who]["wall"]) for who in ("ours", "baseline")}
    return compare(turns.times) | dict(
        size=size, compiled=compiled, batch=batch, tokens=side**2, parameters=count_params(model), errors=errors,
        images_per_second=images,
        share_of_matrix_rate={who: n*3*flops_per_image(model)/rate for who,n in images.items()})

def compared(turns, model, theirs, our_average, average):
    "Errors of losses, weights and their average"
    ours, published = flat(model.parameters()), flat(theirs.parameters())
    error = ((ours-published).norm()/published.norm()).item()
    assert error < tolerance, f"weights differ by {error:.1e}"
    return dict(loss=agree(*torch.tensor(turns.losses).T, tolerance, "losses"), weights=error,
                average=agree(flat(our_average[k] for k in average), flat(average.values()), tolerance, "average"))

def batch_of(size):
    if a.batch: return a.batch
    if not cuda: return 32
    large = torch.cuda.get_device_properties(a.device).total_memory > 100e9
    batch = 128 if size == "B" else 64
    return batch if large else batch//2

rows = {}
for size,form in product(a.sizes or (["B", "XL"] if cuda else ["tiny"]), a.forms):
    rows[f"{size}, {form}"] = measure(size, form == "compiled", batch_of(size), 16 if cuda else 8)
    gc.collect()
    torch.compiler.reset()
    if cuda: torch.cuda.empty_cache()
goals = {k: 1.3 for k,r in rows.items() if cuda and r["compiled"]}
goals = goals or {k: 1.15 for k,r in rows.items() if not r["compiled"]}
show(rows)
for k,r in rows.items():
    print(f"{k}: batch {r['batch']}, ours {r['images_per_second']['ours']:,.0f} images/s, "
          f"{r['share_of_matrix_rate']['ours']:.0%} of the rate of a matrix product; "
          f"losses differ by {r['errors']['loss']:.0e}")
save(a, __doc__, dict(rows=rows, goals=goals, matrix_rate_tflops=rate/1e12, tolerance=tolerance))
