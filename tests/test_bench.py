"The baselines of `bench/` compute what was published: a fast wrong answer is not the only kind of cheating"
import sys
from pathlib import Path
import torch
from vavae_nb.dit.model import LightningDiT
from vavae_nb.flow.sampler import time_grid
from vavae_nb.base.tensor_files import load_into, load_tensors
from vavae_nb.base.tensors import test_tensor
from test_dit import GOLDEN, golden

sys.path.insert(0, str(Path(__file__).parent.parent/"bench"))
import published

def model_and_tensors():
    config, state, tensors = golden("lightning")
    model = LightningDiT(**config).eval()
    load_into(model, state, "lightning")
    return model, tensors

def test_forward_is_the_published_one():
    model, o = model_and_tensors()
    test_tensor(published.forward(model, o["x"], o["t"], o["y"]), o["out"], rtol=1e-5)
    for t in (.05, .5):
        v = published.guided(model, o["cfg_x"], t, o["cfg_y"][:2], 10, 4., .11)
        test_tensor(v[:2], o[f"cfg_t{t}"][:2], rtol=2e-5)

def test_losses_are_the_published_ones():
    o = load_tensors(GOLDEN/"flow.safetensors")[0]
    mse, cos = published.losses(o["model_out"], o["linear.ut"])
    test_tensor(mse, o["linear.mse_per_sample"])
    test_tensor(cos, o["linear.cos_per_sample"])

def test_sampler_is_euler():
    model, o = model_and_tensors()
    noise, y, ts = o["x"][:2], torch.tensor([1, 2]), time_grid(6)
    x = torch.cat([noise, noise])
    with torch.no_grad():
        for t, u in zip(ts, ts[1:]): x = x+(u-t)*published.guided(model, x, t.item(), y, 10, 4., .11)
    test_tensor(published.sample(model, y, noise, ts, 10, 4., .11), x[:2], rtol=1e-5)
