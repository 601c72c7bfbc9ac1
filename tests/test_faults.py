"Data that fails while a training reads it: images and shards that are cut short or vanish in the middle of an epoch"
import faulthandler, os, shutil, signal, warnings
import pytest, torch
from PIL import Image
from vavae_nb.base.errors import CheckpointError, DataError
from vavae_nb.data.batches import Batches
from vavae_nb.data.images import embedded
from vavae_nb.data.folders import lazy_folder
from vavae_nb.tokenizer.latents import Latents
from vavae_nb.tokenizer.shards import open_shard, shard_files
from vavae_nb.base.tensors import generator
from vavae_nb.base.tensor_files import save_tensors

@pytest.fixture
def pets(tmp_path):
    "60 photographs of three classes, read on demand"
    images = embedded("test")
    for i in range(60):
        p = tmp_path/"pets"/"abc"[i//20]/f"{i:02d}.png"; p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[i]).save(p)
    return tmp_path/"pets"

@pytest.fixture
def shards(tmp_path):
    "90 latents in three shards; every class is in each of them"
    for s in range(3):
        z = torch.randn(2, 30, 2, 4, 4, generator=generator(s, "shard"))
        save_tensors(tmp_path/"z"/f"latents_rank00_shard{s:03d}.safetensors", dict(latents=z[0], latents_flip=z[1], labels=torch.arange(30) % 3))
    return shard_files(tmp_path/"z")

def opened(files): return Latents([open_shard(p)[0] for p in files], files=files)
def epoch(data, each=lambda step: None, **kw):
    "Indices and items of a shuffled pass; `each` is called after each batch"
    got = []
    for step,(i,x) in enumerate(Batches(len(data), lambda i,f: (i, data.batch(i)), 10, **kw)): got += zip(i.tolist(), x); each(step)
    return dict(got)

def cut(p): os.truncate(p, p.stat().st_size//2)
def gone(p): p.unlink()

@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("harm", [cut, gone])
def test_an_image_that_breaks_in_the_middle_of_an_epoch(pets, harm, ahead):
    data, order = lazy_folder(pets, 32), list(epoch(lazy_folder(pets, 32)))
    whole, victim, then = data.batch(slice(None)), order[45], order[55]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always") # A second warning would be seen
        def after(step):
            if step == 0: harm(data.paths[victim])
        x = epoch(data, after, ahead=ahead) | epoch(data, ahead=ahead)
    assert [data.paths[victim].name in str(w.message) for w in said] == [True] and data.skipped[0].startswith(data.paths[victim].name)
    next_ = victim//20*20+(victim+1) % 20 # The next of its class, the first after the last
    assert torch.equal(x[victim], whole[next_]) and all(torch.equal(x[i], whole[i]) for i in range(60) if i != victim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, backwards = lazy_folder(pets, 32) if harm is cut else data, data.subset(range(60))
        if harm is cut: assert torch.equal(again.batch([victim])[0], whole[next_]) # After a restart, alone in its batch
        assert torch.equal(torch.cat([backwards.batch([i]) for i in reversed(range(60))]).flip(0)[victim], whole[next_]) # In another order

def test_a_class_that_is_gone_ends_the_epoch_with_a_file_by_name(pets):
    data, seen = lazy_folder(pets, 32), []
    with warnings.catch_warnings(), pytest.raises(DataError, match=r"none of the 20 images of class 'b'.*\d\d\.png"):
        warnings.simplefilter("ignore")
        def after(step):
            seen.append(step)
            if step == 0: shutil.rmtree(pets/"b")
        epoch(data, after)
    assert 0 < len(seen) < 6 # The thread's error reached the loop

def test_a_shard_cut_short_in_the_middle_of_an_epoch_ends_it(shards):
    "Read in this thread: one that reads ahead may be reading at the very moment (Limits of the notebook)"
    ahead = False
    whole, data, done, copy = opened(shards).batch(slice(None)), opened(shards), [], shards[1].read_bytes()
    def after(step):
        done.append(step)
        if step == 2: os.truncate(shards[1], 3000)
    size = len(copy)
    sentence = f"{shards[1].name} has been cut short, to 3,000 of {size:,} bytes.*restore the file.*same training command"
    with pytest.raises(DataError, match=sentence): epoch(data, after, ahead=ahead)
    assert 3 <= len(done) < 9 # It ended there, and no other latents came in their place
    for _ in range(2):
        with pytest.raises(DataError, match="cut short"): data.batch([31, 0])
    assert torch.equal(data.batch([0, 89]), whole[[0, 89]]) # Batches that do not touch it are whole
    with pytest.raises(CheckpointError, match="not a whole safetensors file"): opened(shards)
    shards[1].write_bytes(copy)
    assert torch.equal(opened(shards).batch(slice(None)), whole) # Restored, a new start has all of them

@pytest.mark.parametrize("ahead", [True, False])
def test_a_shard_that_vanishes_or_is_replaced_ends_the_epoch(shards, tmp_path, ahead):
    data, whole, away = opened(shards), opened(shards).batch(slice(None)), tmp_path/"away"
    def after(step): step == 1 and shards[2].rename(away)
    with pytest.raises(DataError, match=f"{shards[2].name} has disappeared.*checkpoints are whole.*same training command"): epoch(data, after, ahead=ahead)
    shutil.copy(away, shards[2])
    with pytest.raises(DataError, match="has been replaced"): data.batch([80])
    assert torch.equal(data.batch([5, 31]), whole[[5, 31]]) and torch.equal(opened(shards).batch(slice(None)), whole) # A new start goes on
    os.replace(away, shards[2]); assert torch.equal(data.batch([80]), whole[80:81]) # The file itself, back in its place

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_without_the_look_the_process_is_killed(tmp_path): # What the look is for
    z = torch.zeros(2, 60, 4, 16, 16)
    save_tensors(path := tmp_path/"latents_rank00_shard000.safetensors", dict(latents=z[0], latents_flip=z[1], labels=torch.zeros(60, dtype=torch.long)))
    blind, looks = Latents([open_shard(path)[0]]), opened([path])
    os.truncate(path, 100)
    if not (child := os.fork()):
        faulthandler.disable()
        blind.batch([50]); os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS
    with pytest.raises(DataError, match="cut short, to 100 of"): looks.batch([50])
