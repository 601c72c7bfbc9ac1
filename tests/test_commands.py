"Help of every command: grouped, with dashes, each default once, an example that works"
import re, shlex, subprocess, sys
import pytest
from argparse import SUPPRESS
from vavae_nb import ablations, evaluate, extract, sample, train
from vavae_nb.commands import parser

COMMANDS = {f"vavae_nb.{m.__name__.split('.')[-1]}": m.main for m in (train, extract, sample, evaluate, ablations)}
COMMANDS |= {f"vavae_nb.evaluate {k}": f for k,f in evaluate.actions.items()}

@pytest.fixture(autouse=True)
def wide(monkeypatch): monkeypatch.setenv("COLUMNS", "200")

@pytest.mark.parametrize("name", COMMANDS)
def test_help_reads_well(name):
    p = parser(COMMANDS[name], f"python -m {name}")
    text, options = p.format_help(), [a for a in p._actions if a.help != SUPPRESS]
    titles = re.findall(r"^(\S.*):$", text, re.M)
    assert titles == [*COMMANDS[name].sections[1].values(), "example"] and max(map(len, text.splitlines())) <= 100
    assert text.startswith(f"usage: python -m {name} ") and not any(s in text for s in ("None", "False", "True"))
    for a in options:
        heads = [s for s in text.splitlines() if re.match(rf"  {a.option_strings[0] if a.option_strings else a.metavar}( |$)", s)]
        assert len(heads) == 1 and len(a.option_strings) <= 1 and "_" not in heads[0].split("  ")[1], (a.dest, heads)
        assert a.help.count("(default: ") == (bool(a.option_strings) and not a.required and a.nargs != 0), a.help
        assert all(str(c) in text for c in a.choices or ())

@pytest.mark.parametrize("name", COMMANDS)
def test_its_example_is_a_call_of_it(name):
    example = COMMANDS[name].sections[0]
    given = shlex.split(example.removeprefix(f"python -m {name} "))
    assert example != " ".join(given) and example in parser(COMMANDS[name]).format_help()
    assert parser(COMMANDS[name]).parse_args(given)

def test_underscores_dashes_and_one_letter():
    def seed(*args):
        r = subprocess.run([sys.executable, "-m", "vavae_nb.sample", *args, "--cfg_scale", "two"], capture_output=True, text=True, encoding="utf-8")
        return r.returncode, r.stderr.splitlines()[-1]
    assert seed("--n", "-1", "--batch_size=3", "--world-size", "2") == seed("-n", "-1", "--batch-size=3", "--world_size", "2")
    assert seed() == (2, "python -m vavae_nb.sample: error: argument --cfg-scale: invalid float value: 'two'")
