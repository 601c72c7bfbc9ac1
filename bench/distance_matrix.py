"""The distance-matrix term of the VF loss at 64×64 positions and more: pairs of blocks, against the dense N×N form.

    python bench/distance_matrix.py [--sides 32 64 96] [--channels 1024] [--rounds 5]

Baseline: the formula as it stands, relu(|ÛᵀÛ − V̂ᵀV̂| − m).mean() of whole matrices, differentiated by autograd
(`distmat_loss` with one block).
Ours: `distmat_loss`. Both give the loss and its gradient with respect to the latent map; the loss must agree to 1e-6,
the gradient to 1e-5.
Maps are random, with a part common to all positions, so that margins are met by some pairs and not by others; the
margin is the paper's, divided by 16 as random cosines are small. Memory is the most that one call needs beyond its
inputs: on a GPU as its allocator counts it, on the CPU by the resident set of a process of its own for each size and
side (Linux). Writes results/bench-distance-matrix.json.
"""
import torch
from common import agree, compare, options, peak, print_peak, save, show, start, take_turns
from vavae_nb.base.tensors import generator
from vavae_nb.tokenizer.vf_loss import distmat_loss

p = options(__doc__)
p.add_argument("--sides", type=int, nargs="+", help="positions along a side (default: 32 64 96; on a GPU 32 64 128)")
p.add_argument("--channels", type=int, default=1024, help="of both maps (default: 1024, those of DINOv2-L)")
p.add_argument("--batch", type=int, help="images (default: 1; on a GPU 4)")
p.add_argument("--only", choices=("baseline", "ours"), help="run this side once at the first of the sides, and print "
               "the memory that it took, as the processes of this command do")
a = start(p)
gpu, margin = a.device.type == "cuda", .25/16
a.sides = a.sides or ([32, 64, 128] if gpu else [32, 64, 96])
a.batch = a.batch or (4 if gpu else 1)

def maps(side):
    def draw(what, *shape):
        return torch.randn(a.batch, a.channels, *shape, generator=generator(0, what)).to(a.device)
    return (draw("z", side, side)+.5*draw("common", 1, 1)).requires_grad_(), draw("f", side, side)

def sides(z, f):
    def run(block):
        loss = distmat_loss(z, f, margin, block)
        return loss.detach(), *torch.autograd.grad(loss, z)
    return dict(baseline=lambda: run(z.shape[2]*z.shape[3]), ours=lambda: run(512))

if a.only:
    sides(*maps(4))["ours"]() # What the first call of anything loads
    print_peak(sides(*maps(a.sides[0]))[a.only])

alone = ["--device", "cpu", "--threads", a.threads, "--channels", a.channels, "--batch", a.batch]

rows = {}
for side in a.sides:
    both = sides(*maps(side))
    (l0, g0), (l1, g1) = both["baseline"](), both["ours"]()
    about = dict(loss_rel_err=agree(l1, l0, 1e-6, "the loss"), gradient_rel_err=agree(g1, g0, 1e-5, "the gradient"))
    for name,f in both.items():
        about[f"{name}_mb"] = round(peak(f, a.device, [*alone, "--sides", side, "--only", name]), 1)
    about |= dict(positions=side*side, positions_silent=(g0.abs().amax(1) == 0).float().mean().item())
    rows[f"{side}×{side}"] = compare(take_turns(both, a.rounds, a.device)) | about
show(rows)
for k,r in rows.items(): print(f"{k}: {r['baseline_mb']:,.0f} MB dense, {r['ours_mb']:,.0f} MB ours")
first, last = rows[f"{a.sides[0]}×{a.sides[0]}"], rows[f"{a.sides[-1]}×{a.sides[-1]}"]
goal = dict(what="memory O(N·block), equal gradients", positions_grow=last["positions"]/first["positions"],
            baseline_memory_grows=last["baseline_mb"]/max(first["baseline_mb"], 1e-9),
            ours_memory_grows=last["ours_mb"]/max(first["ours_mb"], 1e-9))
save(a, __doc__, dict(rows=rows, goal=goal, batch=a.batch, channels=a.channels, margin=margin, block=512))
