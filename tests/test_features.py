"Feature extraction: what the notebook's cells cannot guard"
import warnings
import numpy as np, pytest, torch
from torch import nn
from vavae_nb.core import ConfigError, DataError, cache_dir
from vavae_nb.metrics.features import EXTRACTORS, FeatureExtractor, StageMeans, TimmPool, extract_features, feature_extractor, resize
from vavae_nb.pretrained import weights_sha256
from vavae_nb.tensors import generator, save_tensors, test_tensor as check

class Toy(nn.Module):
    "A linear map of an 8×8 image with batch norm, so that training mode would show"
    def __init__(self, dim=5, sha="a"*64):
        super().__init__()
        self.dim,self.weights_sha256,self.seen,self.norm = dim,sha,0,nn.BatchNorm2d(3)
        self.register_parameter("w", nn.Parameter(torch.randn(192, dim, generator=generator(3, "toy"))))
    def forward(self, x): self.seen += len(x); return self.norm(x).flatten(1) @ self.w

class Pictures:
    def __init__(self, pixels, fingerprint): self.pixels,self.fingerprint = pixels,fingerprint
    def __len__(self): return len(self.pixels)
    def batch(self, indices, flip=False):
        x = torch.from_numpy(self.pixels[indices]).permute(0, 3, 1, 2).float()/127.5-1
        return x.flip(-1) if flip else x

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path))
    return lambda: sorted(cache_dir("features").iterdir())

@pytest.fixture
def pixels(): return np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)

def test_training_mode_never_reaches_the_network():
    toy = Toy(); model = nn.Sequential(FeatureExtractor("toy", toy, 8)).train()
    stats = toy.norm.running_mean.clone()
    model(torch.rand(4, 3, 8, 8))
    assert not toy.norm.training and torch.equal(toy.norm.running_mean, stats)
    assert not any(p.requires_grad for p in model.parameters())

def test_features_do_not_depend_on_the_batch(pixels):
    e = FeatureExtractor("toy", Toy(), 8)
    full = extract_features(e, pixels)
    for batch_size in (1, 3, 10, 64): check(extract_features(e, pixels, batch_size), full, rtol=1e-6)

def test_cache_tells_everything_apart(cache, pixels):
    base,pictures = Toy(),Pictures(pixels, "one")
    e = FeatureExtractor("toy", base, 8)
    first = extract_features(e, pictures); assert base.seen == 10
    assert np.array_equal(extract_features(e, pictures), first) and base.seen == 10
    calls = [lambda: extract_features(e, pictures, flip=True), lambda: extract_features(e, pictures, precision="bf16"),
             lambda: extract_features(e, Pictures(pixels, "two")), lambda: extract_features(e, Pictures(pixels[:5], "one")),
             lambda: extract_features(FeatureExtractor("toy", base, 6+2, antialias=False), pictures),
             lambda: extract_features(FeatureExtractor("other", base, 8), pictures)]
    for n,call in enumerate(calls, 1):
        before = base.seen; call()
        assert base.seen > before and len(cache()) == n+1
    changed = Toy(sha="b"*64)
    extract_features(FeatureExtractor("toy", changed, 8), pictures); assert changed.seen == 10
    extract_features(e, pixels); assert len(cache()) == len(calls)+2 # Arrays are not cached

def test_damaged_or_foreign_cache_is_computed_again(cache, pixels):
    e,pictures = FeatureExtractor("toy", Toy(), 8),Pictures(pixels, "one")
    first = extract_features(e, pictures)
    cache()[0].write_bytes(b"half a file")
    assert np.array_equal(extract_features(e, pictures), first)
    save_tensors(cache()[0], dict(features=torch.zeros(10, 5)), dict(extractor="another"))
    assert np.array_equal(extract_features(e, pictures), first)

def test_an_error_leaves_no_cache(cache, pixels):
    class Broken(Pictures):
        def batch(self, indices, flip=False): x = super().batch(indices, flip); x[-1, 0, 0, 0] = float("inf"); return x
    with pytest.raises(DataError, match="image 3 holds"): extract_features(FeatureExtractor("toy", Toy(), 8), Broken(pixels, "one"), batch_size=4)
    assert cache() == []

def test_features_that_are_not_finite_are_named(pixels):
    class Overflows(Toy):
        def forward(self, x): f = super().forward(x); f[x.flatten(1).mean(1) > .9] = float("nan"); return f
    pixels[7] = 255
    with pytest.raises(DataError, match="toy features of image 7 are not finite in fp32"):
        extract_features(FeatureExtractor("toy", Overflows(), 8), pixels, batch_size=3)

def test_kinds_of_images(tmp_path, pixels):
    e = FeatureExtractor("toy", Toy(), 8); full = extract_features(e, pixels)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()/127.5-1
    for same in (torch.from_numpy(pixels), x, x.float(), x.numpy()): check(extract_features(e, same), full, rtol=1e-5)
    check(extract_features(e, x.half()), full, rtol=2e-3)
    np.save(tmp_path/"x.npy", pixels)
    with warnings.catch_warnings(): # torch warns of read-only arrays
        warnings.simplefilter("error")
        check(extract_features(e, np.load(tmp_path/"x.npy", mmap_mode="r")), full, rtol=1e-6)
    for bad in (pixels[0], pixels.astype(np.int64), x[:, :1], list(pixels)):
        with pytest.raises(DataError, match="must be"): extract_features(e, bad)
    with pytest.raises(ConfigError, match="fp8"): extract_features(e, pixels, precision="fp8")

def test_resize_keeps_constants_and_range():
    x = torch.rand(2, 3, 37, 50, generator=generator(0, "resize"))*2-1
    for size in (8, 64):
        for antialias in (True, False):
            check(resize(torch.full((1, 3, 37, 50), .3), size, antialias), torch.full((1, 3, size, size), .3), rtol=1e-6)
            assert resize(x, size, antialias).abs().max() <= 1+1e-6
    check(resize(x, 64), resize(x, 64, False), rtol=1e-6) # No difference where nothing shrinks
    assert resize(x.bfloat16(), 8).dtype == torch.float32

def test_registry():
    with pytest.raises(ConfigError, match="did you mean 'vgg16'"): feature_extractor("vgg_16")
    e = feature_extractor("alexnet")
    assert (e.dim, e.image_size, e.sha256) == (1152, 64, weights_sha256("alexnet"))
    other = feature_extractor("alexnet", image_size=32)
    assert other.image_size == 32 and other.key != e.key
    assert StageMeans("vgg16").dim == 1472 and "vgg16" in EXTRACTORS

def test_efficientnet_pools_as_timm_does():
    t = TimmPool(); x = torch.rand(2, 3, 64, 64, generator=generator(0, "timm"))*2-1
    mean,std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((127/255,)*3, (128/255,)*3))
    pooled = t.net.forward_head(t.net.forward_features(((x+1)/2-mean)/std), pre_logits=True)
    check(t(x), pooled, rtol=1e-4)
    assert t.dim == 1280
