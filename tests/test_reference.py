"References and samples: what the notebook's cells cannot guard"
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from vavae_nb.base.errors import DataError
from vavae_nb.base.files import cache_dir
from vavae_nb.metrics.features import FeatureExtractor, extract_features
from vavae_nb.metrics.quality import FeatureStats, frechet_distance
from vavae_nb.metrics.reference import ImageFolder, StoredStats, load_images, load_reference, npz_array
from vavae_nb.base.tensors import generator, test_tensor as check

class Toy(nn.Module):
    "A linear map of an 8×8 image, named and sized so that it passes for the Inception"
    def __init__(self, dim=5, spatial_dim=0, sha="a"*64):
        super().__init__()
        self.dim,self.spatial_dim = dim,spatial_dim
        self.weights_sha256,self.seen = sha,0
        self.w = nn.Parameter(torch.randn(192, dim+spatial_dim, generator=generator(3, "toy")))
    def forward(self, x, spatial=False):
        self.seen += len(x)
        f = resized(x).flatten(1)@self.w
        return (f[:, :self.dim], f[:, self.dim:]) if spatial else f[:, :self.dim]

def resized(x): return nn.functional.adaptive_avg_pool2d(x, 8)

@pytest.fixture
def pixels(): return np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path/"cache"))

def toy(**kw): return FeatureExtractor("toy", Toy(**kw), 8)
def judge(): return FeatureExtractor("inception", Toy(6, 4), 299, "bilinear-tf1")

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_arrays(tmp_path, save, order):
    a = np.asarray(np.arange(60).reshape(3, 4, 5), order=order)
    save(tmp_path/"a.npz", first=np.zeros(0), arr_0=a, x=np.float64(3))
    for k,v in dict(first=np.zeros(0), arr_0=a, x=np.array(3.)).items():
        assert np.array_equal(npz_array(tmp_path/"a.npz", k), v)
    assert isinstance(npz_array(tmp_path/"a.npz", "arr_0"), np.memmap) == (save is np.savez)
    np.savez(tmp_path/"o.npz", a=np.array([None]))
    with pytest.raises(DataError, match="Python objects"): npz_array(tmp_path/"o.npz", "a")

def test_computed_statistics_are_kept_by_source_and_extractor(pixels):
    e = toy()
    first = load_reference(pixels, e)
    check(first.stats.cov, FeatureStats.of(extract_features(e, pixels)).cov, rtol=1e-9)
    seen = e.network.seen
    again = load_reference(pixels, e)
    assert e.network.seen == seen and again.stats.n == 20 and str(again) == str(first) and len(again.images) == 20
    check(again.stats.cov, first.stats.cov, rtol=1e-12)
    other = pixels.copy()
    other[3, 0, 0, 0] ^= 1
    assert load_reference(other, e).fingerprint != first.fingerprint and e.network.seen == seen+20
    assert load_reference(pixels, toy(sha="b"*64)).extractor != first.extractor
    for p in cache_dir("references").iterdir(): p.write_bytes(p.read_bytes()[:50])
    check(load_reference(pixels, e).stats.mean, first.stats.mean, rtol=1e-12)

def test_batch_size_changes_nothing(pixels):
    a = load_reference(pixels, toy(), batch_size=3).stats
    check(a.cov, FeatureStats.of(extract_features(toy(), pixels)).cov, rtol=1e-6)

def test_another_extractor_is_refused(tmp_path, pixels):
    ref,saved = load_reference(pixels, toy()),tmp_path/"r.safetensors"
    ref.save(saved)
    assert load_reference(saved, toy()).stats.n == 20
    for other in (toy(sha="b"*64), FeatureExtractor("toy", Toy(), 8, "bilinear"), toy(dim=6)):
        with pytest.raises(DataError, match="(?s)was measured with.*Use one extractor"): load_reference(saved, other)
        with pytest.raises(DataError, match="was measured with"): ref.features(other)
    check(ref.features(toy()), extract_features(toy(), pixels), rtol=1e-6)

def moments(rng, d, end=""):
    f = rng.normal(size=(50, d))
    return {f"mu{end}": f.mean(0), f"sigma{end}": np.cov(f, rowvar=False)}

def test_adm_statistics(tmp_path, pixels):
    rng,e = np.random.default_rng(1),judge()
    pool,spatial = moments(rng, 6),moments(rng, 4, "_s")
    np.savez(tmp_path/"adm.npz", arr_0=pixels, **pool, **spatial)
    ref = load_reference(tmp_path/"adm.npz", e)
    assert e.network.seen == 0 and isinstance(ref.stats, StoredStats) and ref.stats.n == 0 and len(ref.images) == 20
    check(ref.stats.cov, torch.tensor(pool["sigma"]), rtol=0)
    check(ref.spatial.mean, torch.tensor(spatial["mu_s"]), rtol=0)
    own = FeatureStats.from_moments(pool["mu"], pool["sigma"], 50)
    of_images = FeatureStats.of(ref.features(e))
    assert frechet_distance(ref.stats, own) < 1e-6
    assert abs(frechet_distance(ref.stats, of_images)-frechet_distance(own, of_images)) < 1e-6
    ref.save(tmp_path/"s.safetensors")
    again = load_reference(tmp_path/"s.safetensors", e)
    assert again.stats.n == 0 and again.images is None and again.note == ref.note
    np.savez(tmp_path/"fid.npz", **pool) # pytorch-fid's files
    assert load_reference(tmp_path/"fid.npz", e).spatial is None
    not_a_number = pool | dict(mu=pool["mu"]*np.nan)
    for bad in (moments(rng, 5), dict(mu=pool["mu"]), dict(sigma=pool["sigma"]), not_a_number,
                pool | moments(rng, 5, "_s")):
        np.savez(tmp_path/"bad.npz", **bad)
        with pytest.raises(DataError, match="another extractor|not both|NaN"): load_reference(tmp_path/"bad.npz", e)
    for other in (toy(), FeatureExtractor("inception", Toy(6, 4), 299, "bilinear")): # Measured from images, or refused
        assert load_reference(tmp_path/"adm.npz", other).stats.n == 20
        with pytest.raises(DataError, match="cannot be compared"): load_reference(tmp_path/"fid.npz", other)

def test_folders(tmp_path, pixels):
    for i,p in enumerate(pixels):
        folder = tmp_path/"f"/f"c{i%3}"/"deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(p).save(folder/f"{i:02}.png")
    (tmp_path/"f"/".hidden.png").write_bytes(b"")
    (tmp_path/"f"/"notes.txt").write_text("", encoding="utf-8")
    f = ImageFolder(tmp_path/"f")
    assert len(f) == 20 and f.classes == ["c0", "c1", "c2"] and f.labels.tolist() == sorted(i%3 for i in range(20))
    order = [int(p.stem) for p in f.paths]
    check(f.batch(range(20)), torch.tensor(pixels[order]).permute(0, 3, 1, 2)/127.5-1, rtol=1e-6)
    check(f.batch([1], True), f.batch([1]).flip(-1), rtol=0)
    check(load_reference(tmp_path/"f", toy()).stats.cov, load_reference(pixels, toy()).stats.cov, rtol=1e-6)
    Image.fromarray(pixels[0]^1).save(f.paths[4])
    assert ImageFolder(tmp_path/"f").fingerprint != f.fingerprint

@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colours_are_refused(tmp_path, mode):
    Image.new("RGB", (8, 8)).save(tmp_path/"a.png")
    Image.new(mode, (8, 8)).save(tmp_path/("b.tif" if mode == "CMYK" else "b.png"))
    with pytest.raises(DataError, match=rf"1 of 2 images .* not RGB, such as b\..* \({mode}\)"): load_images(tmp_path)

def test_labels_come_along(tmp_path, pixels):
    np.savez(tmp_path/"samples.npz", arr_0=pixels, labels=np.arange(20)%4)
    images = load_images(tmp_path)
    assert images.name == f"{tmp_path.name}/samples.npz" and len(images.classes) == 4
    assert images.labels.tolist() == (np.arange(20)%4).tolist()
    np.savez(tmp_path/"short.npz", arr_0=pixels, arr_1=np.arange(3))
    with pytest.raises(DataError, match="20 images but 3 labels"): load_images(tmp_path/"short.npz")
    for bad in (pixels.astype(np.float32), pixels[..., :1], pixels.transpose(0, 3, 1, 2)):
        np.savez(tmp_path/"bad.npz", arr_0=bad)
        with pytest.raises(DataError): load_images(tmp_path/"bad.npz")
