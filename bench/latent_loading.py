"""Shuffled batches of latents from memory-mapped shards, against opening the shard for every sample.

    python bench/latent_loading.py [--rounds 15] [--threads 1]

Baseline: a data set that opens its safetensors file for each sample and reads one row (as the published system's data set does), normalises
it, and stacks a batch of them. Ours: `Latents.batch`. The same shards in the published shape (32×16×16, float32, both flips; random numbers),
the same shuffled indices and flips, results compared in the same run; the two take turns after a warm-up, so that both read from the page
cache, and the ratio is of medians of CPU time, which other work on the machine disturbs less than wall time; both times are in the result, and that
of copying the same rows into one tensor (`torch.stack` of views that are there), below which no loader can go.
Memory is the process's own (RssAnon) and that of mapped files (RssFile), before and after reading all. Writes results/bench-latent-loading.json.
"""
import statistics, tempfile
from pathlib import Path
import torch
from common import compare, memory, options, save, show, start, take_turns
from safetensors import safe_open
from vavae_nb.tokenizer.latents import Latents
from vavae_nb.tokenizer.shards import open_shard, shard_files
from vavae_nb.base.tensors import generator
from vavae_nb.base.tensor_files import save_tensors

p = options(__doc__, rounds=15, threads=1, device="cpu")
p.add_argument("--batches", type=int, nargs="+", default=[64, 256, 900, 1024], help="samples a batch (default: 64 256 900 1024; 1024 of them are 34 MB)")
p.add_argument("--shards", type=int, default=8, help="shards of 1,000 images (default: 8, which is 0.5 GB)")
a = start(p)
PER, g = 1000, generator(0, "bench")
tmp = tempfile.TemporaryDirectory()
for s in range(a.shards):
    z = torch.randn(2, PER, 32, 16, 16, generator=g)
    save_tensors(Path(tmp.name)/f"latents_rank00_shard{s:03d}.safetensors", dict(latents=z[0], latents_flip=z[1], labels=torch.arange(PER) % 10))
del z
files, n, mean, std = shard_files(tmp.name), PER*a.shards, torch.full((1, 32, 1, 1), .1), torch.full((1, 32, 1, 1), 1.1)

def opening(indices, flips):
    out = []
    for i,f in zip(indices.tolist(), flips.tolist()):
        with safe_open(files[i//PER], framework="pt") as o: row = o.get_slice("latents_flip" if f else "latents")[i % PER:i % PER+1]
        out.append((row-mean)/std)
    return torch.cat(out)

def shuffled(batch):
    indices, flips = torch.randperm(n, generator=g)[:batch], torch.rand(batch, generator=g) < .5
    return indices, flips, [latents.shards[i//PER]["latents_flip" if f else "latents"][i % PER] for i,f in zip(indices.tolist(), flips.tolist())]

sides = dict(opening=lambda i, f, rows: opening(i, f), ours=lambda i, f, rows: latents.batch(i, f), copying=lambda i, f, rows: torch.stack(rows))

before = memory()
latents = Latents([open_shard(f)[0] for f in files], mean, std)
opened = memory()
for order in torch.randperm(n, generator=g).split(256):
    for f in (False, True): latents.batch(order, f)
after = memory()
rows = {}
for batch in a.batches:
    given = shuffled(batch)
    assert torch.equal(sides["ours"](*given), sides["opening"](*given))
    times = take_turns(sides, a.rounds, args=lambda: shuffled(batch))
    rows[f"batch {batch}"] = r = compare(times, "opening", clock="cpu")
    r |= dict(batch=batch, samples_per_second=round(1e3*batch/statistics.median(r["ours_wall_ms"])), copying_share=statistics.median(times["copying"]["cpu"])/statistics.median(times["ours"]["cpu"]))
show(rows, goal=20)
for k,r in rows.items(): print(f"{k}: copying alone takes {r['copying_share']:.0%} of ours")
growth = {name: {k: round(last[k]-first[k], 1) for k in first} for name,first,last in (("opening", before, opened), ("reading_all", opened, after))}
read = round(n*2*32*16*16*4/1e6)
print(f"memory after reading {read} MB: own {growth['reading_all']['RssAnon']:+.0f} MB, mapped files {growth['reading_all']['RssFile']:+.0f} MB")
save(a, __doc__, dict(batches=list(rows.values()), goal=20, memory_growth_mb=growth, read_mb=read, shards=a.shards, images=n, latent="32×16×16 float32"))
tmp.cleanup()
