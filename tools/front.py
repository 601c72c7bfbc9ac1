"""The first picture of the front page: photographs, their reconstructions, generated images, with and without VF loss.

    python -m vavae_nb.ablations table2 --scale cpu --rows f4d32-none-b f4d32-lite0-b
    python tools/front.py [--runs runs/ablations]

Of seed 0 of those two rows; the first test image of each class and the first unguided sample of each class, not chosen.
"""
import argparse
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from vavae_nb.paper.tables import configuration, tables
from vavae_nb.paper.runs import run_folder
from vavae_nb.data.images import embedded
from vavae_nb.data.folders import first_of_each
from vavae_nb.paper.figures import as_image
from vavae_nb.sampling.formats import load_samples
from vavae_nb.tokenizer.autoencoder import Autoencoder

ROOT = Path(__file__).resolve().parent.parent

def by_class(labels): return sorted(first_of_each(labels, 10), key=lambda i: labels[i])

def strip(images): # (n, 3, h, w) in [-1, 1] -> (h, n·w, 3) in [0, 1]
    return torch.cat(list((images.clamp(-1, 1)+1)/2), -1).permute(1, 2, 0)

def main(runs):
    test = embedded("test")
    real = test.batch(by_class(test.labels))
    rows, made = [("photographs", strip(real))], []
    for name,title in (("f16d64-none-b", "without VF loss"), ("f16d64-dinov2-b", "with VF loss")):
        row = next(r for r in tables["table2"].rows if r.name == name)
        folder = run_folder(row, configuration(row, "cpu", 0), "cpu", runs)
        tok = Autoencoder.load(folder/"tokenizer.safetensors")
        with torch.no_grad(): back = tok.decode(tok.encode(real, sample=False))
        rows.append((f"reconstructed,\n{title}", strip(back)))
        images, labels = load_samples(folder/"samples_unguided.npz")
        samples = torch.from_numpy(images[by_class(labels)]).permute(0, 3, 1, 2)/127.5-1
        made.append((f"generated,\n{title}", strip(samples)))
    rows += made
    fig, axs = plt.subplots(len(rows), 1, figsize=(8.6, 4.15), dpi=110)
    for ax,(label,image) in zip(axs, rows):
        ax.imshow(image, interpolation="bilinear", aspect="auto")
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values(): side.set_visible(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for i,c in enumerate(test.classes): axs[0].text(32*i+16, -3, c, ha="center", fontsize=8)
    fig.tight_layout(h_pad=.15)
    (ROOT/"nbs"/"images"/"front.jpg").write_bytes(as_image(fig, photographs=True).data)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="runs/ablations", help="folder of the runs (default: runs/ablations)")
    main(p.parse_args().runs)
