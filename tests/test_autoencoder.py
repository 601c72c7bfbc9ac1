"What the autoencoder's notebook cannot guard: exact names, precision, compilation, files that do not fit"
import copy, json, warnings
from pathlib import Path
import pytest, torch
from vavae_nb.base.errors import CheckpointError, ConfigError, DataError, ShapeError
from vavae_nb.base.tensors import generator, seed_everything, test_tensor as check
from vavae_nb.base.tensor_files import load_into, load_tensors, save_tensors
from vavae_nb.tokenizer.autoencoder import Autoencoder, to_uint8
from vavae_nb.tokenizer.network import Posterior

golden = Path(__file__).parent/"golden"
tiny = dict(latent_dim=4, ch=8, ch_mult=(1,2,2), num_res_blocks=1, attn_resolutions=(16,), resolution=32,
            norm_groups=4)

@pytest.fixture
def net():
    seed_everything(0)
    return Autoencoder(**tiny)

@pytest.fixture
def full(net):
    net.set_latent_stats(torch.arange(4.), torch.arange(1., 5.), dict(n=10, flips=(True, False)))
    return net

def images(*shape): return torch.rand(*shape, generator=generator(0, "images"))*2 - 1

def test_names_do_not_change_with_statistics(net):
    names = set(net.state_dict())
    net.set_latent_stats(torch.zeros(4), torch.ones(4), {})
    assert set(net.state_dict()) == names

def test_golden_in_channels_last_and_float64():
    t, head = load_tensors(golden/"autoencoder.safetensors")
    c = json.loads(head["config"])
    settings = ("embed_dim", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution")
    net = Autoencoder(*(c[k] for k in settings))
    load_into(net, {k[6:]: v for k,v in t.items() if k.startswith("state.")}, "golden")
    for m in (copy.deepcopy(net).to(memory_format=torch.channels_last), copy.deepcopy(net).double()):
        with torch.no_grad():
            p = m.posterior(t["x"].to(m.encoder_last.dtype))
            y = m.decode_raw(p.mode())
        assert p.mean.dtype == m.encoder_last.dtype
        check(torch.cat([p.mean, p.logvar], 1), t["moments"])
        check(p.kl(), t["kl"])
        check(y, t["reconstruction_of_mode"])

@pytest.mark.parametrize("size", [(4, 4), (32, 32), (36, 64)])
def test_other_image_sizes(net, size):
    y, p, z = net(images(2, 3, *size))
    assert y.shape == (2, 3, *size) and z.shape == p.mean.shape == (2, 4, size[0]//4, size[1]//4)

def test_sample_needs_only_its_generator(net):
    x = images(2, 3, 32, 32)
    a = net(x, generator(0, "z"))[2]
    torch.rand(7)
    check(net(x, generator(0, "z"))[2], a, 0)
    assert (net(x, generator(1, "z"))[2] != a).any()

def test_gradients_reach_every_weight(net):
    y, p, _ = net(images(2, 3, 32, 32), generator(0, "z"))
    (y.square().mean() + 1e-3*p.kl().mean()).backward()
    # The key's bias adds one number to all logits of a query, so softmax drops it
    dead = [k for k,v in net.named_parameters() if not k.endswith(".k.bias") and not v.grad.abs().max() > 0]
    assert not dead

def test_last_layers_take_gradients(net):
    y, p, _ = net(images(1, 3, 32, 32))
    for w in (net.encoder_last, net.decoder_last):
        assert torch.autograd.grad(y.mean(), w, retain_graph=True)[0].abs().sum() > 0
    assert net.encoder_last.shape == (8, 16, 3, 3) and net.decoder_last.shape == (3, 8, 3, 3)

def test_posterior_refuses_other_shapes():
    for shape in ((2, 8, 4), (2, 7, 4, 4)):
        with pytest.raises(ShapeError): Posterior(torch.zeros(shape))

def test_compiles_without_a_break(full):
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(lambda x: full.decode(full.encode(x, sample=False)), fullgraph=True, backend="eager")
        check(compiled(x), full.decode(full.encode(x, sample=False)))
        y, p, z = torch.compile(full, fullgraph=True, backend="eager")(x)
    assert isinstance(p, Posterior) and y.shape == x.shape

def test_statistics_follow_copies_and_casts(full):
    x = images(2, 3, 32, 32)
    z = full.encode(x, sample=False)
    check(copy.deepcopy(full).encode(x, sample=False), z, 0)
    check(full.double().encode(x.double(), sample=False), z)

@pytest.mark.parametrize("bad", [dict(ch=10), dict(ch_mult=()), dict(ch_mult=(1, 0)), dict(latent_dim=0),
                                 dict(resolution=30), dict(attn_resolutions=(7,)), dict(norm_groups=0)])
def test_impossible_settings(bad):
    with pytest.raises(ConfigError): Autoencoder(**tiny | bad)

def test_shapes_that_do_not_fit(full):
    for x in (images(1, 3, 30, 32), images(1, 1, 32, 32), images(3, 32, 32)):
        for f in (full, full.posterior, full.encode):
            with pytest.raises(ShapeError, match="multiples of 4"): f(x)
    for f in (full.decode_raw, full.decode, full.normalise, full.denormalise):
        with pytest.raises(ShapeError, match="4, h, w"): f(torch.zeros(1, 8, 8, 8))

def test_bad_statistics_change_nothing(full):
    ok = torch.ones(4)
    bad = ((ok*float("inf"), ok, {}, DataError), (ok, -ok, {}, DataError),
           (ok, torch.ones(1, 4), {}, ShapeError), (ok, ok, dict(n=ok), ConfigError))
    for mean, std, source, error in bad:
        with pytest.raises(error): full.set_latent_stats(mean, std, source)
    assert full.latent_mean.flatten().tolist() == [0, 1, 2, 3]
    assert full.latent_stats_source == dict(n=10, flips=[True, False])

def test_decode_is_clamped_and_raw_is_not(full):
    z = 1e3*torch.randn(1, 4, 8, 8, generator=generator(0, "z"))
    with torch.no_grad(): full.decoder.conv_out.weight.mul_(100)
    assert full.decode(z).abs().max() == 1 < full.decode_raw(z).abs().max()

def test_to_uint8_layout_and_bf16():
    x = torch.tensor([-1., 0., 1.]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    for y in (to_uint8(x), to_uint8(x.bfloat16())):
        assert y.shape == (2, 4, 5, 3) and y[0,0,0].tolist() == [0, 128, 255]

def test_load_draws_no_random_numbers(full, tmp_path):
    full.save(tmp_path/"t.safetensors")
    state = torch.get_rng_state()
    again = Autoencoder.load(tmp_path/"t.safetensors")
    assert (torch.get_rng_state() == state).all() and again.latent_stats_source == full.latent_stats_source
    check(again.latent_std, full.latent_std, 0)

def test_save_without_statistics(net, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.save(tmp_path/"t.safetensors")
        again = Autoencoder.load(tmp_path/"t.safetensors")
    assert again.latent_mean is None
    with pytest.raises(CheckpointError, match="set_latent_stats"): again.decode(torch.zeros(1, 4, 8, 8))

@pytest.mark.parametrize("change, says", [
    (lambda t, h: t.pop("quant_conv.bias"), "missing    quant_conv.bias"),
    (lambda t, h: t.update(gain=torch.zeros(1)), "unexpected gain"),
    (lambda t, h: h["config"].update(latent_dim=8), "misshapen  quant_conv.weight"),
    (lambda t, h: t["quant_conv.bias"].add_(1), "not those it was written with"),
    (lambda t, h: t.pop("latent_std"), "does not hold both"),
    (lambda t, h: h.pop("kind"), "not written by"),
    (lambda t, h: h["config"].update(depth=3), "does not know"),
])
def test_files_that_do_not_fit(full, tmp_path, change, says):
    full.save(tmp_path/"t.safetensors")
    t, h = load_tensors(tmp_path/"t.safetensors")
    change(t, h)
    save_tensors(tmp_path/"t.safetensors", t, h)
    with pytest.raises(CheckpointError, match=says): Autoencoder.load(tmp_path/"t.safetensors")
