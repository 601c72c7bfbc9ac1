"Several processes give the numbers of one; and one that dies ends the others with a sentence"
import json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from together import together
from vavae_nb.base import processes
from vavae_nb.base.errors import VavaeError
from vavae_nb.data.images import embedded
from vavae_nb.tokenizer.shards import shard_files
from vavae_nb.base.tensor_files import load_tensors
from vavae_nb.base.tensors import test_tensor as check
from vavae_nb.tokenizer.autoencoder import Autoencoder

def start(n, args, **env):
    "The same Python command n times, as a launcher starts it"
    command, env = [sys.executable, *map(str, args)], os.environ | together(n) | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return [subprocess.Popen(command, env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), **pipes) for r in range(n)]

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    d = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    tokenizer = Autoencoder(latent_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32,
                            norm_groups=8)
    tokenizer.save(d/"tokenizer.safetensors")
    test = embedded("test")
    np.savez(d/"drawn.npz", arr_0=test.pixels[:45], labels=test.labels[:45])
    np.savez(d/"real.npz", arr_0=test.pixels[45:85], labels=test.labels[45:85])
    return d

@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path/"cache"))

SHARED = """
import os, signal, sys, numpy as np, torch
from pathlib import Path
from vavae_nb.base.commands import user_errors
from vavae_nb.base import processes
from vavae_nb.base.errors import VavaeError
from vavae_nb.data.images import embedded
from vavae_nb.tokenizer.shards import extract_shards
from vavae_nb.metrics.features import extract_features, feature_extractor
from vavae_nb.metrics.reference import load_reference
from vavae_nb.base.processes import joined, rank, world_size
from vavae_nb.tokenizer.autoencoder import Autoencoder
from vavae_nb.tokenizer.foundation import cached_features
d, work, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class Maps(torch.nn.Module): # What features need of a FoundationModel, without the seconds that timm takes to import
    name, key, channels, grid = "maps", "maps", 6, 4
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.net = torch.nn.Conv2d(3, 6, 8, 8)
    @torch.no_grad()
    def forward(self, x): return self.net(x)

def numbers(d, work, share):
    test = embedded("test").subset(range(51), "some")
    few, ex, vfm = test.subset(range(1), "one"), feature_extractor("alexnet"), Maps()
    got = dict(features=extract_features(ex, test, 8), few=extract_features(ex, few),
               array=extract_features(ex, test.pixels, 8), again=extract_features(ex, test, 5),
               mean=load_reference(test, ex, 8).stats.mean.numpy(),
               maps=np.array(cached_features(vfm, test, 8, "fp32")), map_of_one=np.array(cached_features(vfm, few, 8)))
    tokenizer = Autoencoder.load(f"{work}/tokenizer.safetensors")
    extract_shards(tokenizer, test, d/"z", per_shard=8, precision="fp32", share=share)
    if how == "kill": return got
    from vavae_nb.evaluate import actions
    common = dict(extractor=["alexnet"], errors=2, batch_size=7, device="cpu")
    actions["reconstruction"](tokenizer=work, n=50, lpips="alexnet", latent="sample", out=str(d/"reconstruction.json"),
                              **common)
    actions["generation"](samples=f"{work}/drawn.npz", reference=f"{work}/real.npz", metrics=["fd", "precision_recall"],
                          out=str(d/"generation.json"), **common)
    return got

class Fatal: # The second process is killed, or meets an error, at its second batch
    name = fingerprint = "fatal"
    def __init__(self): self.images, self.seen = embedded("test").subset(range(100)), 0
    def __len__(self): return len(self.images)
    def batch(self, i, flip=False):
        self.seen += 1
        if rank() == 1 and self.seen == 2:
            if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(5, "Input/output error", "photo.png")
        return self.images.batch(i, flip)

if __name__ == "__main__":
    torch.manual_seed(0)
    with user_errors("nothing"), joined(torch.device("cpu")):
        np.savez(d/f"{rank()}.npz", **numbers(d, work, (rank(), world_size())))
        extract_features(feature_extractor("alexnet"), Fatal(), 10)
"""
def figures(path):
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    return {f["metric"]: (f["value"], f["standard_error"] or 0.) for f in report["figures"]}

def listed(c): return sorted(p.relative_to(c).as_posix() for p in c.rglob("*") if p.is_file())

def same_shards(a, b):
    for p,q in zip(shard_files(a), shard_files(b)):
        (x, about), (y, same) = load_tensors(p), load_tensors(q)
        assert about == same
        for k in x: check(x[k], y[k])

AN_ERROR = pytest.param(3, "error", 2, "photo.png", marks=pytest.mark.slow)

@pytest.mark.parametrize("n, how, status, says", [(2, "kill", -signal.SIGKILL, ""), AN_ERROR])
def test_the_numbers_of_one_process_until_one_dies(work, tmp_path, monkeypatch, n, how, status, says):
    one, many = tmp_path/"one", tmp_path/"many"
    one.mkdir()
    many.mkdir()
    (tmp_path/"shared.py").write_text(SHARED, encoding="utf-8")
    ps = start(n, [tmp_path/"shared.py", many, work, how], VAVAE_NB_CACHE=str(tmp_path/"theirs"))
    said = [p.communicate(timeout=900) for p in ps]
    assert [p.returncode for p in ps] == [2, status]+[2]*(n-2), said
    for r,(_,err) in enumerate(said): assert f"process {r} of {n} lost the others" in err or r == 1, said
    assert says in said[1][1] and "Traceback" not in str(said), said
    assert ("psnr" in said[0][0]) == (how == "error") and not any(out for out,_ in said[1:]) # Only the first speaks
    monkeypatch.setattr(sys, "argv", ["", str(one), str(work), how])
    exec(compile(SHARED, "shared", "exec"), scope := dict(__name__="shared"))
    torch.manual_seed(0)
    want = scope["numbers"](one, str(work), (0, 1))
    for r in range(n):
        with np.load(many/f"{r}.npz") as got:
            for k,v in want.items(): # Maps are stored in float16
                check(torch.tensor(got[k]), torch.tensor(v), rtol=2e-3 if "map" in k else 1e-5)
    for name in ("reconstruction", "generation") if how == "error" else ():
        a, b = figures(many/f"{name}.json"), figures(one/f"{name}.json")
        assert a.keys() == b.keys()
        for k in a: # An SSIM of 0.006 is rounded as one of 1
            np.testing.assert_allclose(a[k], b[k], rtol=1e-6, atol=1e-7, err_msg=k)
    assert listed(tmp_path/"theirs") == listed(tmp_path/"cache") # Each once, and nothing left over by the dead
    assert listed(many/"z") == listed(one/"z")
    same_shards(many/"z", one/"z")

@pytest.mark.slow
def test_real_launchers(work, tmp_path):
    launchers = { # accelerate also without GPUs: it is torchrun in disguise
        "one": [],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port",
                       together(2)["MASTER_PORT"], "-m"]}
    env = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    figure = {}
    for name,launcher in launchers.items():
        out = tmp_path/name
        extract = ["vavae_nb.extract", "--tokenizer", work, "--out", out/"z", "--per-shard", 1000,
                   "--precision", "fp32"]
        evaluate = ["vavae_nb.evaluate", "reconstruction", "--tokenizer", work, "-n", 100, "--extractor", "alexnet",
                    "--lpips", "none", "--out", out/"e.json"]
        for command in (extract, evaluate):
            call = [sys.executable, "-m", *launcher, *map(str, command), "--device", "cpu"]
            r = subprocess.run(call, capture_output=True, encoding="utf-8", env=env)
            assert r.returncode == 0, r.stdout+r.stderr
        figure[name], shards = figures(out/"e.json"), shard_files(out/"z")
        assert sum(len(load_tensors(p)[0]["labels"]) for p in shards) == 5000
        if launcher: assert {p.name[:14] for p in shards} == {"latents_rank00", "latents_rank01"}
    for name in figure:
        for k in figure[name]: np.testing.assert_allclose(figure[name][k], figure["one"][k], rtol=1e-6, err_msg=k)

def test_only_errors_of_talking_are_about_the_others():
    lost = ["[pair.cc:534] Connection closed by peer [127.0.0.1]:5", "gloo/transport: Timed out waiting 1000ms"]
    for error in (*map(RuntimeError, lost), torch.distributed.DistNetworkError("it has ended")):
        with pytest.raises(VavaeError, match="lost the others"), processes._peer_loss_explained(): raise error
    with pytest.raises(RuntimeError, match="^CUDA out of memory"), processes._peer_loss_explained():
        raise torch.OutOfMemoryError("CUDA out of memory")
