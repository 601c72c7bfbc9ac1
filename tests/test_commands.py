"Help of every command: grouped, with dashes, each default once, an example that works"
import os, re, shlex, signal, subprocess, sys
import pytest
from argparse import SUPPRESS
from vavae_nb import ablations, evaluate, extract, sample, train
from vavae_nb.base.commands import parser

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
        shown = a.option_strings[0] if a.option_strings else a.metavar
        heads = [s for s in text.splitlines() if re.match(rf"  {shown}( |$)", s)]
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
        command = [sys.executable, "-m", "vavae_nb.sample", *args, "--cfg_scale", "two"]
        r = subprocess.run(command, capture_output=True, encoding="utf-8")
        return r.returncode, r.stderr.splitlines()[-1]
    first = seed("--n", "-1", "--batch_size=3", "--world-size", "2")
    assert first == seed("-n", "-1", "--batch-size=3", "--world_size", "2")
    assert seed() == (2, "python -m vavae_nb.sample: error: argument --cfg-scale: invalid float value: 'two'")

@pytest.mark.parametrize("name", COMMANDS)
def test_a_locale_without_utf8(name):
    env = os.environ | dict(LC_ALL="C", PYTHONUTF8="0")
    r = subprocess.run([sys.executable, "-m", *name.split(), "--help"], capture_output=True, env=env)
    assert r.returncode == 0 and r.stdout.decode("utf-8").startswith("usage: ") and not r.stderr

PRESSED = """
import importlib.abc, os, signal, sys
class Pressed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "WHERE": os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
"""

LATER = "vavae_nb.training.stages" # Is imported when there is something to say

@pytest.mark.parametrize("where,said", [("fastcore.script", ""), (LATER, "stopped; call the same command again")])
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_command_starts(tmp_path, where, said, ignored):
    "Silent before there is anything to say, a sentence after that; nothing where Ctrl-C was inherited as ignored"
    (tmp_path/"sitecustomize.py").write_text(PRESSED.replace("WHERE", where), encoding="utf-8")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    def inherit(): signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    ends = ["--stage", "dit"] if where == LATER else ["--resume"] # By itself: there is nothing to go on with
    command = [sys.executable, "-m", "vavae_nb.train", "--recipe", "smoke", "--out", str(tmp_path/"run"), *ends]
    r = subprocess.run(command, env=env, preexec_fn=inherit, capture_output=True, encoding="utf-8")
    assert "Traceback" not in r.stderr, r.stderr
    if ignored: assert r.returncode == 2, r.stderr
    else:
        assert r.returncode == 130 and r.stderr.strip().startswith(said) and bool(r.stderr) == bool(said), r.stderr

@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_parser_says_the_same(name):
    first, second = (parser(COMMANDS[name]).format_help() for _ in range(2))
    assert first == second
