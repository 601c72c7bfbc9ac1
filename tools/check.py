"""What `make test` does: all notebooks, all tests, then some of both as other machines would run them.

At the end stands everything that failed, with the command that repeats it.

    python tools/check.py [--minutes 14]

The notebooks that train are run in three settings, the first of which computes as this machine does; all others as it
is here. The minutes that are left go to one more setting, another one each day, on those others.
`make test-portable` tries all settings on everything (tools/portable.py).
"""
import argparse, datetime, sys, time
from pathlib import Path
from portable import ROOT, SETTINGS, repeat, run_notebooks, run_tests

TRAINING = ("35_", "36_", "37_", "38_", "39_", "45_", "86_", "87_", "89_", "memory") # How their names begin
CHEAPEST = ("signals-ignored", "seed-1", "aten-default") # Of those that differ in kind


def of_the_day():
    "Another setting each day, of those that are not tried anyway"
    others = [s for s in SETTINGS if s not in ("as-it-is", *CHEAPEST)]
    return others[datetime.date.today().toordinal() % len(others)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "begin no notebook in the setting of the day after so many minutes (default: 14)"
    p.add_argument("--minutes", type=float, default=14, help=about)
    a = p.parse_args()
    start = time.time()
    notebooks = sorted(q.relative_to(ROOT).as_posix() for q in (ROOT/"nbs").glob("*.ipynb"))
    training = [n for n in notebooks if Path(n).name.startswith(TRAINING)]
    others = [n for n in notebooks if n not in training]
    results = {"as-it-is": run_notebooks(SETTINGS["as-it-is"], others)}
    results["as-it-is"] |= run_tests(SETTINGS["as-it-is"])[0]
    for name in CHEAPEST:
        print(f"\nthe notebooks that train, in the setting {name}: {SETTINGS[name].stands_for}", flush=True)
        results[name] = run_notebooks(SETTINGS[name], training)
    name, left = of_the_day(), a.minutes-(time.time()-start)/60
    if left > 0:
        print(f"\nthe setting of the day, {name}: {SETTINGS[name].stands_for}", flush=True)
        results[name] = run_notebooks(SETTINGS[name], others, left)
    failed = [(one, setting) for setting, passed in results.items() for one, ok in passed.items() if not ok]
    passed = sum(map(len, results.values()))-len(failed)
    print(f"\n{passed} passed, {len(failed)} failed in {(time.time()-start)/60:.0f} minutes")
    for one, setting in failed:
        where = "" if setting == "as-it-is" else f" in the setting {setting}"
        print(f"failed{where}: {repeat(one, setting)}")
    sys.exit(bool(failed))


if __name__ == "__main__": main()
