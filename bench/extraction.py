"""From a folder of JPEGs to latents of both flips: decoded once and a batch ahead, against decoding twice, no overlap.

    python bench/extraction.py [--images 200] [--threads 2] [--rounds 3]

Baseline: for each 20 images decode, crop and encode them; then the same for their mirror images, decoded again (Pillow,
one thread); collect and write the shard. Ours: `extract_shards` of a `lazy_folder` (its decoding threads, one per core,
and batches of 50). Both with the same crop, the same posterior noise and the same file format; latents must agree to
1e-4 in fp32. JPEGs are 500×375 pieces of photographs, as large as those of ImageNet. How much there is to gain depends
on what the encoder takes, so there are two rows on the CPU, recipe tiny's tokenizer at 32 and at 64 pixels, and on a
GPU that of the ImageNet recipes at 256; with each goes the time of encoding alone (the same batches, from memory),
which is what remains if decoding costs nothing. Writes results/bench-extraction.json.
"""
import os, statistics, tempfile
from functools import partial
from pathlib import Path
import numpy as np, torch
from PIL import Image
from skimage import data as photographs
from common import agree, compare, options, save, show, start, take_turns
from vavae_nb.recipes.settings import override
from vavae_nb.data.folders import center_crop, lazy_folder
from vavae_nb.data.images import to_batch
from vavae_nb.tokenizer.shards import extract_shards, open_shard
from vavae_nb.training.networks import build_tokenizer
from vavae_nb.recipes.paper import recipe
from vavae_nb.base.tensors import ImageNoise, autocast
from vavae_nb.base.tensor_files import save_tensors

p = options(__doc__, rounds=3)
p.add_argument("--images", type=int, help="JPEGs (default: 200; on a GPU 1,000)")
p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"),
               help="of the encoder; bf16 is compared to 2e-2 (default: fp32)")
a = start(p)
gpu = a.device.type == "cuda"
n, tolerance = a.images or (1000 if gpu else 200), 1e-4 if a.precision == "fp32" else 2e-2
work = tempfile.TemporaryDirectory()
root, rng = Path(work.name)/"photographs", np.random.default_rng(0)
pictures = (photographs.astronaut(), photographs.chelsea(), photographs.coffee(), photographs.rocket())
photos = [Image.fromarray(picture).resize((800, 600)) for picture in pictures]
for i in range(n):
    x, y = rng.integers(300), rng.integers(225)
    path = root/f"class {i % 4}"/f"{i:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    photos[i % 4].crop((x, y, x+500, y+375)).save(path, quality=90)

def noise(tok, i, size, purpose):
    side = size//tok.downsampling
    return ImageNoise(0, i, (tok.latent_dim, side, side), purpose=purpose)().to(a.device)

@torch.no_grad()
def encode(tok, x, eps):
    with autocast(a.device, a.precision): q = tok.posterior(x.to(a.device))
    return (q.mean+q.std*eps).float().cpu()

def baseline(tok, images):
    def read(i):
        with Image.open(images.paths[i]) as im: return center_crop(im, images.size)
    out = dict(latents=[], latents_flip=[])
    for start in range(0, n, 20):
        i = list(range(start, min(start+20, n)))
        for name,flip,purpose in (("latents", False, "posterior"), ("latents_flip", True, "posterior, mirrored")):
            x = to_batch(np.stack([read(k) for k in i]), flip)
            out[name].append(encode(tok, x, noise(tok, i, images.size, purpose)))
    tensors = {name: torch.cat(parts) for name,parts in out.items()}
    save_tensors(Path(work.name)/"theirs.safetensors", tensors | dict(labels=torch.as_tensor(images.labels)))

def ours(tok, images):
    folder = Path(tempfile.mkdtemp(dir=work.name)) # An extraction leaves whole shards alone
    extract_shards(tok, images, folder, precision=a.precision)
    (folder/"latents_rank00_shard000.safetensors").replace(Path(work.name)/"ours.safetensors")

@torch.no_grad()
def alone(tok, pixels):
    for x in pixels.split(50):
        with autocast(a.device, a.precision): z = [tok.posterior(o).mean for o in (x, x.flip(-1))]

def row(name, size):
    tok = build_tokenizer(override(recipe(name), {"data.size": size})).to(a.device).eval()
    images = lazy_folder(root, size)
    pixels = torch.cat([images.batch(np.arange(i, min(n, i+100))) for i in range(0, n, 100)]).to(a.device)
    sides = dict(baseline=partial(baseline, tok, images), ours=partial(ours, tok, images))
    times = take_turns(sides | dict(alone=partial(alone, tok, pixels)), a.rounds, a.device)
    (mine, _), (theirs, _) = (open_shard(Path(work.name)/f"{k}.safetensors") for k in ("ours", "theirs"))
    error = max(agree(mine[k], theirs[k], tolerance, k) for k in ("latents", "latents_flip"))
    assert torch.equal(mine["labels"], theirs["labels"])
    encoding_alone = [1e3*t for t in times["alone"]["wall"]]
    r = compare(times) | dict(recipe=name, size=size, rel_err=error, encoding_alone_wall_ms=encoding_alone)
    whole, encoder = statistics.median(r["ours_wall_ms"]), statistics.median(r["encoding_alone_wall_ms"])
    return r | dict(images_per_second=1e3*n/whole, encoder_share=encoder/whole)

cases = [("imagenet256-f16d32-dinov2-xl", 256)] if gpu else [("tiny", 32), ("tiny", 64)]
rows = {f"{name}, {size} px": row(name, size) for name,size in cases}
show(rows, goal=None if gpu else 1.8)
for k,r in rows.items():
    print(f"{k}: {r['images_per_second']:,.0f} images/s, of which encoding alone takes {r['encoder_share']:.0%} of the "
          "time")
goal = "the encoder is the limit" if gpu else 1.8
save(a, __doc__, dict(rows=rows, goal=goal, images=n, jpeg=[500, 375], cores=os.cpu_count()))
work.cleanup()
