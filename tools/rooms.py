"""The house as its code has it: which notebook is which module, who imports whom, and a picture of the rooms.

    python tools/rooms.py            the arrows between rooms, in words
    python tools/rooms.py --svg      the picture

A room is a folder of vavae_nb; the commands are its top level. nbs/architecture.ipynb shows what this finds, and
tests/test_house.py holds the code to it.
"""
import ast, re, sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "commands"
FLOORS = ( # From the top; an arrow goes to a lower floor
    (COMMANDS,), ("paper",), ("training",), ("metrics",), ("sampling",), ("interop",), ("tokenizer",),
    ("dit", "flow", "data", "recipes"), ("base",))
ROOMS = {
    COMMANDS: "what one types: options, then one call",
    "paper": "tables and figures of the paper, filled by runs; the explorer",
    "training": "the step, callbacks, logs; the run folder and its stages; what a run costs",
    "metrics": "features, distances, uniformity; evaluations that can be audited",
    "sampling": "from labels to images; sets of samples and their formats",
    "interop": "the authors' files, and those of diffusers",
    "tokenizer": "autoencoder, losses, foundation models; latents and their files",
    "dit": "LightningDiT", "flow": "paths, solvers, guidance", "data": "images and batches", "recipes": "settings",
    "base": "errors, files, tensors, processes, checkpoints, command lines, frozen weights"}
HUES = dict(zip(ROOMS, (100, 0, 190, 330, 290, 45, 25, 265, 160, 70, 235, 215)))


def notebooks():
    "Numbered notebook → its module, or None"
    found = {}
    for path in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        export = re.search(r"#\|\s*default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
        found[path] = export[1] if export else None
    return found


def numbers():
    "Module → its notebook's number"
    return {module: int(path.name[:2]) for path,module in notebooks().items() if module}


def source(module): return ROOT/"vavae_nb"/(module.replace(".", "/")+".py")
def room(module): return module.split(".")[0] if "." in module else COMMANDS
def floor(room): return next(i for i,rooms in enumerate(FLOORS) if room in rooms)


def imports(code, module=""):
    "The modules of vavae_nb that a module's code imports, wherever in it"
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level:
            above = package[:len(package)-node.level+1]
            yield ".".join([*above, *filter(None, [node.module])])
        elif (node.module or "").startswith("vavae_nb."): yield node.module.removeprefix("vavae_nb.")


def arrows():
    "Module → the modules that it imports"
    modules = numbers()
    found = {m: set(imports(source(m).read_text(encoding="utf-8"), m)) for m in modules}
    return {m: {o for o in others if o in modules} for m,others in found.items()}


def graph():
    "Room → the other rooms that it imports from"
    between = {r: set() for r in ROOMS}
    for module,others in arrows().items(): between[room(module)] |= {room(o) for o in others}
    return {r: others-{r} for r,others in between.items()}


def upward():
    "The imports that do not go down, in words"
    wrong = []
    for module,others in arrows().items():
        for other in others:
            same, down = room(other) == room(module), floor(room(other)) > floor(room(module))
            if not same and not down: wrong.append(f"{module} imports {other}, which is not below it")
    return wrong


def cycles():
    "Modules that import each other, as paths"
    found, finished, below = [], set(), arrows()
    def visit(module, path):
        if module in path: found.append(" → ".join([*path[path.index(module):], module]))
        elif module not in finished:
            for other in below[module]: visit(other, [*path, module])
            finished.add(module)
    for module in below: visit(module, [])
    return found


def reduced(between):
    "The arrows that do not follow from others"
    def reach(r): return between[r].union(*map(reach, between[r]))
    def needed(r, other): return not any(other in reach(o) for o in between[r]-{other})
    return {r: {o for o in others if needed(r, o)} for r,others in between.items()}


def wrapped(words, width):
    "Words in lines of so many letters"
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1])+len(word)+3 > width: lines.append("")
        lines[-1] += "\u2003"*bool(lines[-1])+word
    return lines


def layout(width, line, pad, gap):
    "Room → its box (x, y, width, height) and its lines of text; and the height of the whole"
    order, boxes, y = numbers(), {}, pad
    for rooms in FLOORS:
        w = (width-pad*(len(rooms)+1))/len(rooms)
        letters = (w-2*pad)/8.6 # Of 14 px, which are at most 8.6 px wide
        texts = {}
        for r in rooms:
            modules = sorted((m for m in order if room(m) == r), key=order.get)
            texts[r] = wrapped([m.split(".")[-1] for m in modules], letters)
        h = pad+line*(1+max(map(len, texts.values())))
        for i,r in enumerate(rooms): boxes[r] = pad+i*(w+pad), y, w, h, texts[r]
        y += h+gap
    return boxes, y-gap+pad


def svg(width=680, line=21, pad=12, gap=22):
    "Rooms as boxes with their modules, each above those that it imports from, as the text of an SVG"
    boxes, height = layout(width, line, pad, gap)
    tip = '<path d="M0 0L10 5L0 10z" fill="#777"/>'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
             f'viewBox="0 0 {width} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="15" fill="#222">',
             '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
             f'orient="auto">{tip}</marker></defs>',
             f'<rect width="{width}" height="{height:.0f}" rx="8" fill="#fff"/>']
    for upper,lower in zip(FLOORS, FLOORS[1:]): # The rule, and not each import: down from floor to floor
        several = max(upper, lower, key=len)
        for r in several:
            x, _, w, *_ = boxes[r]
            top, bottom = boxes[upper[0]][1]+boxes[upper[0]][3], boxes[lower[0]][1]-3
            parts.append(f'<path d="M{x+w/2:.0f} {top:.0f}V{bottom:.0f}" stroke="#777" stroke-width="1.6" '
                         'marker-end="url(#tip)"/>')
    for r,(x, y, w, h, lines) in boxes.items():
        hue = HUES[r]
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="6" '
                     f'fill="hsl({hue},60%,94%)" stroke="hsl({hue},40%,55%)"/>')
        parts.append(f'<text x="{x+pad:.0f}" y="{y+pad+11:.0f}" font-weight="bold" fill="hsl({hue},60%,28%)">'
                     f'{escape(r)}</text>')
        for i,text in enumerate(lines, 1):
            parts.append(f'<text x="{x+pad:.0f}" y="{y+pad+11+line*i:.0f}" font-size="14">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    if "--svg" in sys.argv: sys.exit(print(svg()))
    for r,others in graph().items(): print(f"{r:10} → {', '.join(sorted(others)) or 'nothing'}")
    print(f"{sum(map(len, graph().values()))} arrows between {len(ROOMS)} rooms; upward: {upward() or 'none'}")
