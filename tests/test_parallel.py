"Trainings on two and three processes, and in parts, against the same on one: losses, gradients and weights in float64"
import os, subprocess, sys
from pathlib import Path
import pytest, torch
from together import together

def run(folder, world, accumulate=1, steps=4):
    env = os.environ | together(world)
    out = folder/f"{world}-{accumulate}.pt"
    ps = [subprocess.Popen([sys.executable, Path(__file__).parent/"parallel_worker.py", out, str(steps), str(accumulate)], env=env | dict(RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8") for r in range(world)]
    said = [p.communicate(timeout=900)[0] for p in ps]
    assert not any(p.returncode for p in ps), said[0][-3000:]
    return torch.load(out)

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("parallel")
@pytest.fixture(scope="module")
def alone(folder): return run(folder, 1)

def close(a, b, tol):
    assert a.keys() == b.keys()
    for k in a: assert (a[k]-b[k]).abs().max() <= tol, k

def same(a, b, models=("tokenizer", "dit")):
    for m in models: # The tokenizer's adversarial loss sets in at the third step
        close(a[m]["gradients"], b[m]["gradients"], 1e-12)
        close(a[m]["weights"], b[m]["weights"], 1e-8)
        assert len(a[m]["history"]) == len(b[m]["history"]) == 4
        for x,y in zip(a[m]["history"], b[m]["history"]):
            assert x.keys() == y.keys()
            for k in x: assert y[k] == pytest.approx(x[k], rel=1e-9, abs=1e-12), k
    assert any("loss/gan" in r and "disc_loss" in r for r in a["tokenizer"]["history"]) and "vf_scale" in a["tokenizer"]["history"][0]
    close(a["dit"]["ema"], b["dit"]["ema"], 1e-7) # In float32

def test_two_processes_are_one(folder, alone): same(alone, run(folder, 2))

@pytest.mark.slow
def test_three_processes_with_unequal_shares_are_one(folder, alone): same(alone, run(folder, 3))

def test_parts_are_the_whole_but_for_the_discriminators_batch_norm(folder, alone):
    parts = run(folder, 1, accumulate=3)
    same(alone, parts, models=("dit",))
    close(alone["tokenizer"]["gradients"], parts["tokenizer"]["gradients"], 1e-12)
    for a,b in zip(alone["tokenizer"]["history"][:2], parts["tokenizer"]["history"][:2]): # Before the GAN
        for k in a: assert b[k] == pytest.approx(a[k], rel=1e-9), k
    a, b = (r["tokenizer"]["history"][3] for r in (alone, parts))
    apart = {k: abs(b[k]/a[k]-1) for k in ("loss/gan", "gan_scale")} # Each part has statistics of its own
    assert max(apart.values()) > 1e-6 and apart["gan_scale"] < .1 # The scale has a largest value, which both may reach
