"Folders of images as users have them: other modes and sizes, broken files, wrong layouts"
import os, warnings
import numpy as np, pytest, torch
from PIL import Image
from vavae_nb.base.errors import DataError
from vavae_nb.data import folders as data
from vavae_nb.data.batches import Batches
from vavae_nb.data.images import Images, embedded
from vavae_nb.data.folders import LazyImages, center_crop, folder, lazy_folder, load_data

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("VAVAE_NB_CACHE", str(tmp_path/"cache"))

def fill(root, n=4, size=(40, 50), classes=("a", "b"), mode="RGB"):
    rng = np.random.default_rng(0)
    for c in classes:
        (root/c).mkdir(parents=True)
        for i in range(n):
            noise = rng.integers(0, 255, (*size, 3), np.uint8)
            Image.fromarray(noise).convert(mode).save(root/c/f"{i}.png")
    return root

def quietly(f, *args):
    "The result and the warnings"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        return f(*args), [str(o.message) for o in w]

@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_modes(tmp_path, mode):
    root = tmp_path/"d"
    for c in "ab": (root/c).mkdir(parents=True)
    im = Image.fromarray(np.full((40, 50, 3), 128, np.uint8)).convert(mode)
    for c in "ab": im.save(root/c/("x.tif" if mode == "CMYK" else "x.png"))
    images, _ = quietly(folder, root, 16)
    assert images.pixels.shape == (2, 16, 16, 3) and images.pixels.dtype == np.uint8

@pytest.mark.parametrize("size", [(31, 200), (64, 64), (33, 32), (500, 70)])
def test_the_crop_is_the_middle(size):
    x = np.zeros((*size, 3), np.uint8)
    x[size[0]//2-4:size[0]//2+4, size[1]//2-4:size[1]//2+4] = 255
    c = center_crop(Image.fromarray(x), 32)[..., 0].astype(float)
    rows, cols = np.indices(c.shape)
    assert c.shape == (32, 32) and abs((rows*c).sum()/c.sum()-15.5) < 1 and abs((cols*c).sum()/c.sum()-15.5) < 1

def test_corrupt_images_are_named_skipped_and_counted(tmp_path):
    root = fill(tmp_path/"d")
    whole = (root/"a"/"1.png").read_bytes()
    (root/"a"/"1.png").write_bytes(whole[:len(whole)//2])
    (root/"b"/"2.png").write_bytes(b"")
    images, w = quietly(folder, root, 16)
    assert len(images) == 6 and images.labels.tolist() == [0]*3+[1]*3 and len(images.skipped) == 2
    assert "2 of 8 images could not be decoded" in w[0] and "1.png" in w[0] and "2.png" in w[0]
    again, w2 = quietly(folder, root, 16) # From the cache: still said
    assert w2 == w and again.fingerprint == images.fingerprint
    clean = [i for i in range(8) if i not in (1, 6)]
    want = [center_crop(Image.open(sorted(root.rglob("*.png"))[i]), 16) for i in clean]
    assert (np.stack(want) == images.pixels).all()

def test_all_corrupt_is_refused(tmp_path):
    root = fill(tmp_path/"d", n=1)
    for p in root.rglob("*.png"): p.write_bytes(b"no")
    with pytest.raises(DataError, match="none of the 2 images"): folder(root, 16)

def test_small_images_are_enlarged_and_counted(tmp_path):
    images, w = quietly(folder, fill(tmp_path/"d", size=(12, 20)), 16)
    assert images.size == 16 and "8 of 8 images are smaller than 16 pixels" in w[0] and "smallest side is 12" in w[0]

def test_one_class_is_said(tmp_path):
    images, w = quietly(folder, fill(tmp_path/"d", classes=("only",)), 16)
    assert images.classes == ["only"] and "one class ('only')" in w[0]

@pytest.mark.parametrize("make, message", [
    (lambda p: p/"none", "no folder at"),
    (lambda p: p, "no class folders"),
    (lambda p: (p/"c").mkdir() or p, "no class folders"),
    (lambda p: (p/"x.png").write_bytes(b"") and None or p, "1 loose images"),
    (lambda p: (p/"f").write_text("a file", encoding="utf-8") and p/"f", "is a file"),
])
def test_layouts_that_hold_nothing(tmp_path, make, message):
    (tmp_path/"d").mkdir()
    with pytest.raises(DataError, match=message): folder(make(tmp_path/"d"), 16)

def test_imagenet_layout(tmp_path):
    fill(tmp_path/"d"/"train", n=3)
    fill(tmp_path/"d"/"val", n=1)
    (train, test), _ = quietly(load_data, tmp_path/"d", 16)
    assert (len(train), len(test)) == (6, 2)
    os.rename(tmp_path/"d"/"val"/"b", tmp_path/"d"/"val"/"c")
    with pytest.raises(DataError, match="different classes"): quietly(load_data, tmp_path/"d", 16)

def test_a_changed_folder_is_read_again(tmp_path):
    root = fill(tmp_path/"d")
    a, _ = quietly(folder, root, 16)
    Image.new("RGB", (40, 40), "red").save(root/"a"/"0.png")
    b, _ = quietly(folder, root, 16)
    assert a.fingerprint != b.fingerprint and (b.pixels[0] == [255, 0, 0]).all()

def test_on_demand_gives_the_same_images(tmp_path):
    root = fill(tmp_path/"d", n=6)
    kept, lazy = folder(root, 16), lazy_folder(root, 16, workers=3)
    i, flip = torch.tensor([7, 0, 3]), torch.tensor([True, False, True])
    assert torch.equal(lazy.batch(i, flip), kept.batch(i, flip))
    assert torch.equal(lazy.batch(slice(2, 5)), kept.batch(slice(2, 5)))
    assert (lazy.read(i.numpy())[0] == kept.pixels[i.numpy()]).all()
    assert (lazy.labels == kept.labels).all() and (lazy.size, lazy.classes) == (kept.size, kept.classes)
    some = lazy.subset([5, 9])
    assert torch.equal(some.batch([1]), kept.batch([9]))
    assert some.labels.tolist() == [0, 1] and some.fingerprint != lazy.fingerprint
    assert lazy_folder(root, 16).fingerprint == lazy.fingerprint != lazy_folder(root, 8).fingerprint

def test_on_demand_survives_corrupt_images(tmp_path):
    root = fill(tmp_path/"d", n=3)
    for f in ("a/2.png", "b/1.png"): (root/f).write_bytes(b"no")
    lazy = lazy_folder(root, 16)
    (pixels, whole), w = quietly(lazy.read, range(6))
    assert whole.tolist() == [True, True, False, True, False, True] and len(pixels) == 4
    assert len(w) == 2 and "2.png" in "".join(w)
    assert [s.split()[0] for s in lazy.skipped] == ["2.png", "1.png"]
    x, w = quietly(lazy.batch, [2, 4])                       # In their place the next of the same class, in a ring
    assert torch.equal(x, lazy.batch([0, 5])) and w == [] and len(lazy.skipped) == 2

def test_large_folders_are_read_on_demand(tmp_path, monkeypatch):
    root = fill(tmp_path/"d")
    kinds = lambda **kw: [type(o) for o in quietly(lambda: load_data(root, 16, **kw))[0]]
    assert kinds() == kinds(cache="always") == [Images]*2 and kinds(cache="never") == [LazyImages]*2
    monkeypatch.setattr(data, "class_files", lambda r: ([None]*30_000_000, None, None))
    monkeypatch.setattr(data, "lazy_folder", lambda *a: "on demand")
    assert data._open(root, 16) == "on demand"

def test_batches_pass_on_an_error_of_the_thread_that_fetches():
    def fetch(i, flip):
        if 5 in i: raise DataError("the fifth")
        return i,
    seen = []
    with pytest.raises(DataError, match="the fifth"):
        for i, in Batches(8, fetch, 2, shuffle=False): seen += i.tolist()
    assert seen == [0, 1, 2, 3]

def test_batches_refuse_nothing_to_do():
    with pytest.raises(DataError, match="batches"): Batches(0, None)

def test_embedded_pixels_are_cifar10():
    test = embedded("test")
    assert test.batch([0]).sum().item() == pytest.approx((test.pixels[0]/127.5-1).sum(), rel=1e-4)

def test_images_check_their_parts():
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="3 images but 2 labels"): Images(pixels, np.zeros(2), ["a"], "x")

def test_a_subset_still_names_the_files_that_were_left_out(tmp_path):
    root = fill(tmp_path/"d")
    (root/"a"/"0.png").write_bytes(b"broken")
    images, _ = quietly(folder, root, 16)
    assert len(images.skipped) == 1 and images.subset([0, 2]).skipped == images.skipped

@pytest.mark.parametrize("cache", ["always", "never"])
@pytest.mark.parametrize("splits, name", [((), "pets train"), (("train", "val"), "pets train")])
def test_the_folder_one_is_in_has_a_name(tmp_path, monkeypatch, cache, splits, name):
    for split in splits or ("",): fill(tmp_path/"pets"/split)
    monkeypatch.chdir(tmp_path/"pets")
    assert load_data(".", 16, cache=cache)[0].name == name
