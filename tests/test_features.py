"Feature extraction: what the notebook's cells cannot guard"
import warnings
import numpy as np, pytest, torch
from skimage import data as photographs
from torch import nn
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from vavae_nb.base import pretrained
from vavae_nb.base.errors import ConfigError, DataError, WeightsError
from vavae_nb.base.files import cache_dir
from vavae_nb.data.images import embedded
from vavae_nb.metrics.features import (EXTRACTORS, FILTERS, FeatureExtractor, StageMeans, TimmPool, extract_features,
                                       feature_batches, feature_extractor, resize)
from vavae_nb.base.pretrained import inception_network, packaged_file, weights_sha256
from vavae_nb.base.tensors import generator, test_tensor as check
from vavae_nb.base.tensor_files import save_tensors

class Toy(nn.Module):
    "A linear map of an 8×8 image with batch norm, so that training mode would show"
    def __init__(self, dim=5, sha="a"*64):
        super().__init__()
        self.dim,self.weights_sha256,self.seen = dim,sha,0
        self.norm = nn.BatchNorm2d(3)
        self.register_parameter("w", nn.Parameter(torch.randn(192, dim, generator=generator(3, "toy"))))
    def forward(self, x):
        self.seen += len(x)
        return self.norm(x).flatten(1) @ self.w

class WithSpatial(Toy):
    spatial_dim = 3
    def forward(self, x, spatial=False):
        f = super().forward(x)
        return (f, x.mean((2, 3))) if spatial else f

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
    toy = Toy()
    model = nn.Sequential(FeatureExtractor("toy", toy, 8)).train()
    stats = toy.norm.running_mean.clone()
    model(torch.rand(4, 3, 8, 8))
    assert not toy.norm.training and torch.equal(toy.norm.running_mean, stats)
    assert not any(p.requires_grad for p in model.parameters())

def test_features_do_not_depend_on_the_batch(pixels):
    e = FeatureExtractor("toy", Toy(), 8)
    full = extract_features(e, pixels)
    for batch_size in (1, 3, 10, 64): check(extract_features(e, pixels, batch_size), full)

def test_cache_tells_everything_apart(cache, pixels):
    base,pictures = Toy(),Pictures(pixels, "one")
    e = FeatureExtractor("toy", base, 8)
    first = extract_features(e, pictures)
    assert base.seen == 10
    assert np.array_equal(extract_features(e, pictures), first) and base.seen == 10
    others = [(e, pictures, dict(flip=True)), (e, pictures, dict(precision="bf16")),
              (e, Pictures(pixels, "two"), {}), (e, Pictures(pixels[:5], "one"), {}),
              (FeatureExtractor("toy", base, 8, "bilinear"), pictures, {}),
              (FeatureExtractor("other", base, 8), pictures, {})]
    for n,(extractor,images,options) in enumerate(others, 1):
        before = base.seen
        extract_features(extractor, images, **options)
        assert base.seen > before and len(cache()) == n+1
    changed = Toy(sha="b"*64)
    extract_features(FeatureExtractor("toy", changed, 8), pictures)
    assert changed.seen == 10
    extract_features(e, pixels)
    assert len(cache()) == len(others)+2 # Arrays are not cached

def test_damaged_or_foreign_cache_is_computed_again(cache, pixels):
    e,pictures = FeatureExtractor("toy", Toy(), 8),Pictures(pixels, "one")
    first = extract_features(e, pictures)
    cache()[0].write_bytes(b"half a file")
    assert np.array_equal(extract_features(e, pictures), first)
    save_tensors(cache()[0], dict(features=torch.zeros(10, 5)), dict(extractor="another"))
    assert np.array_equal(extract_features(e, pictures), first)

def test_an_error_leaves_no_cache(cache, pixels):
    class Broken(Pictures):
        def batch(self, indices, flip=False):
            x = super().batch(indices, flip)
            x[-1, 0, 0, 0] = float("inf")
            return x
    with pytest.raises(DataError, match="image 3 holds"):
        extract_features(FeatureExtractor("toy", Toy(), 8), Broken(pixels, "one"), batch_size=4)
    assert cache() == []

def test_features_that_are_not_finite_are_named(pixels):
    class Overflows(Toy):
        def forward(self, x):
            f = super().forward(x)
            f[x.flatten(1).mean(1) > .9] = float("nan")
            return f
    pixels[7] = 255
    with pytest.raises(DataError, match="toy features of image 7 are not finite in fp32"):
        extract_features(FeatureExtractor("toy", Overflows(), 8), pixels, batch_size=3)

def test_kinds_of_images(tmp_path, pixels):
    e = FeatureExtractor("toy", Toy(), 8)
    full = extract_features(e, pixels)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()/127.5-1
    for same in (torch.from_numpy(pixels), x, x.float(), x.numpy()): check(extract_features(e, same), full, rtol=1e-5)
    check(extract_features(e, x.half()), full, rtol=2e-3)
    np.save(tmp_path/"x.npy", pixels)
    with warnings.catch_warnings(): # torch warns of read-only arrays
        warnings.simplefilter("error")
        check(extract_features(e, np.load(tmp_path/"x.npy", mmap_mode="r")), full, rtol=1e-6)
    for bad in (pixels[0], pixels.astype(np.int64), x[:, :1], list(pixels), np.array([pixels[0], None], dtype=object)):
        with pytest.raises(DataError, match="must be"): extract_features(e, bad)
    with pytest.raises(ConfigError, match="fp8"): extract_features(e, pixels, precision="fp8")

def test_resize_keeps_constants_and_range():
    x = torch.rand(2, 3, 37, 50, generator=generator(0, "resize"))*2-1
    for size in (8, 64):
        for f in FILTERS:
            check(resize(torch.full((1, 3, 37, 50), .3), size, f), torch.full((1, 3, size, size), .3))
            assert f == "bicubic-pil" or resize(x, size, f).abs().max() <= 1+1e-6
    check(resize(x, 64), resize(x, 64, "bilinear"), rtol=1e-6) # No difference where nothing shrinks
    assert resize(x.bfloat16(), 8).dtype == torch.float32

def test_registry():
    with pytest.raises(ConfigError, match="did you mean 'vgg16'"): feature_extractor("vgg_16")
    e = feature_extractor("alexnet")
    assert (e.dim, e.image_size, e.sha256) == (1152, 64, weights_sha256("alexnet"))
    other = feature_extractor("alexnet", image_size=32)
    assert other.image_size == 32 and other.key != e.key
    assert StageMeans("vgg16").dim == 1472 and "vgg16" in EXTRACTORS

def test_efficientnet_pools_as_timm_does():
    t = TimmPool()
    x = torch.rand(2, 3, 64, 64, generator=generator(0, "timm"))*2-1
    mean,std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((127/255,)*3, (128/255,)*3))
    pooled = t.net.forward_head(t.net.forward_features(((x+1)/2-mean)/std), pre_logits=True)
    check(t(x), pooled, rtol=1e-4)
    assert t.dim == 1280

@pytest.mark.parametrize("shape", [(32, 32), (299, 299), (250, 333), (512, 400)])
def test_tensorflow_resize_to_the_bit(shape):
    x = torch.randint(0, 256, (2, 3, *shape), generator=generator(0, "tf1")).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert torch.equal(resize(x, 299, "bilinear-tf1"), theirs)

@pytest.fixture(scope="module")
def inception(): return feature_extractor("inception")

@pytest.fixture(scope="module")
def photos():
    return [photographs.astronaut(), photographs.chelsea(), photographs.rocket()[:200, :150],
            *embedded("test").pixels[:3]]

def test_inception_is_the_packaged_program(inception, photos): # Run once, as the independent implementation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(packaged_file(*(pretrained._inception[k] for k in ("package", "file", "sha256"))))
    with torch.no_grad():
        for im in photos:
            pixels = torch.tensor(im).permute(2, 0, 1)[None]
            resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False)
            x = (resized-128)/128
            ours,spatial = inception(pixels/127.5-1, spatial=True)
            check(ours, program(x), rtol=1e-4)
            check(inception(pixels/127.5-1), ours, rtol=1e-6)
        layers = program.net.layers # The program's own layers up to mixed_5, and the 1×1 branch of mixed_6
        for name,layer in layers.named_children():
            if name == "mixed_6": break
            x = layer(x)
        check(spatial, layer.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1), rtol=1e-4)

def test_inception_through_torch_fidelity(inception, photos):
    net,_ = inception_network()
    assert net.get_default_feature_layer_for_metric("isc") == "logits_unbiased" # As the notebook says
    for im in photos[:3]:
        pixels = torch.tensor(im).permute(2, 0, 1)[None]
        check(inception(pixels/127.5-1), net(pixels)[0], rtol=1e-4)

@pytest.mark.parametrize("counters", [True, False])
def test_torch_fidelitys_file_brings_logits(inception, tmp_path, photos, counters):
    "A file of its names: the packaged tensors, and a drawn last layer"
    net,_ = inception_network()
    fc = nn.Linear(2048, 1008)
    t = {k: v for k,v in net.state_dict().items() if counters or "num_batches" not in k}
    t |= {f"fc.{k}": v for k,v in fc.state_dict().items()}
    path = tmp_path/"weights-inception-2015-12-05-6726825d.pth"
    torch.save(t, path)
    e = feature_extractor("inception", weights=path)
    assert e.key != inception.key and e.sha256 == pretrained.remembered_sha256(path)
    pixels = torch.tensor(photos[1]).permute(2, 0, 1)[None]
    f = e(pixels/127.5-1)
    check(f, inception(pixels/127.5-1), rtol=0)
    if counters: # torch-fidelity's own constructor and forward on the same file
        fidelity = type(net).__bases__[0]
        names = ["2048", "logits_unbiased", "logits"]
        theirs = fidelity("inception", names, feature_extractor_weights_path=str(path))(pixels)
        for ours,other in zip((f, e.logits(f), e.logits(f, bias=True)), theirs): check(ours, other, rtol=1e-4)
    assert not torch.equal(e.logits(f), e.logits(f, bias=True))

def test_logits_that_are_not_there(inception):
    with pytest.raises(WeightsError, match="weights='torch-fidelity'"): inception.logits(torch.zeros(1, 2048))
    with pytest.raises(ConfigError, match="needs the extractor inception"):
        feature_extractor("alexnet").logits(torch.zeros(1, 1152))

def test_inception_ignores_bf16_and_rounds_to_8_bits(inception):
    x = embedded("test").batch(range(1))
    with torch.autocast("cpu", torch.bfloat16): half = inception(x)
    check(half, inception(x), rtol=1e-6)
    check(inception(x+.3/127.5), half, rtol=1e-6)
    assert "8-bit" in inception.key and "tf1" in inception.key

def test_batches_are_the_features(pixels):
    e = FeatureExtractor("toy", WithSpatial(), 8)
    pool,spatial = extract_features(e, pixels, spatial=True)
    parts = list(feature_batches(e, pixels, 3, spatial=True))
    assert [len(p[0]) for p in parts] == [3, 3, 3, 1] and spatial.shape == (10, 3)
    for i,whole in enumerate((pool, spatial)): check(np.concatenate([p[i] for p in parts]), whole)
    with pytest.raises(ConfigError, match="no spatial features"):
        next(feature_batches(FeatureExtractor("toy", Toy(), 8), pixels, spatial=True))

def test_spatial_features_have_a_cache_of_their_own(cache, pixels):
    e,p = FeatureExtractor("toy", WithSpatial(), 8),Pictures(pixels, "one")
    first = extract_features(e, p, spatial=True)
    extract_features(e, p)
    seen = e.network.seen
    for a,b in zip(extract_features(e, p, spatial=True), first): assert np.array_equal(a, b)
    assert e.network.seen == seen and len(cache()) == 2
