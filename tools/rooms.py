"""The house as its code has it: which notebook is which module, who imports whom, and a picture of the rooms.

    python tools/rooms.py > rooms.svg

nbs/architecture.ipynb shows what this finds, and tests/test_house.py holds the code to it.
"""
import ast, json, re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {0: "Conventions", 10: "Tokenizer", 30: "LightningDiT", 32: "Flow", 35: "Files, images, plans", 40: "Metrics", 47: "Training", 60: "Commands", 80: "Lab"} # From number
HUES = dict(zip(ROOMS.values(), (215, 25, 265, 160, 45, 330, 190, 100, 0)))

def notebooks():
    "Numbered notebook → its module, or None"
    paths = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))
    found = {p: re.search(r'#\|\s*default_exp\s+([\w.]+)', p.read_text(encoding="utf-8")) for p in paths}
    return {p: m and m[1] for p,m in found.items()}

def numbers():
    "Module → its notebook's number"
    return {m: int(p.name[:2]) for p,m in notebooks().items() if m}

def source(module): return ROOT/"vavae_nb"/(module.replace(".", "/")+".py")

def imports(code, module=""):
    "The modules of vavae_nb that a module's code imports, wherever in it"
    own = module.split(".")[:-1]
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: yield ".".join([*own[:len(own)-node.level+1], *filter(None, [node.module])])
        elif (node.module or "").startswith("vavae_nb."): yield node.module.removeprefix("vavae_nb.")

def room(number): return [name for start,name in ROOMS.items() if start <= number][-1]

def graph():
    "Room → the other rooms that it imports from"
    number, out = numbers(), {r: set() for r in ROOMS.values()}
    for m,n in number.items(): out[room(n)] |= {room(number[o]) for o in imports(source(m).read_text(encoding="utf-8"), m) if o in number} - {room(n)}
    return out

def reduced(g):
    "The arrows of `g` that do not follow from others"
    def reach(r): return g[r].union(*map(reach, g[r]))
    return {r: {o for o in to if not any(o in reach(p) for p in to-{o})} for r,to in g.items()}

def svg(width=680, line=21, pad=12, gap=34):
    "Rooms as boxes with their modules, each above those that it imports from, as the text of an SVG"
    number, arrows = numbers(), reduced(graph())
    def level(r): return 1+max(map(level, arrows[r]), default=-1)
    rows = [[r for r in ROOMS.values() if level(r) == l] for l in range(max(map(level, ROOMS.values())), -1, -1)]
    boxes, y = {}, pad
    for row in rows:
        w = (width-pad*(len(row)+1))/len(row)
        texts = {}
        for r in row: # Module names, as many a line as fit at 7.6 px a letter
            lines = [""]
            for m in sorted((m for m in number if room(number[m]) == r), key=number.get):
                word = f"{number[m]:02} {m.split('.')[-1]}"
                if lines[-1] and 7.6*len(lines[-1]+word) > w-3*pad: lines.append("")
                lines[-1] += "\u2003"*bool(lines[-1]) + word
            texts[r] = lines
        h = pad + line*(1+max(map(len, texts.values())))
        boxes |= {r: (pad+i*(w+pad), y, w, h, texts[r]) for i,r in enumerate(row)}
        y += h+gap
    height, parts = y-gap+pad, []
    for r,to in arrows.items():
        for o in (o for o in ROOMS.values() if o in to):
            x, _, w, *_ = min(boxes[r], boxes[o], key=lambda b: b[2]) # Straight down, through the middle of the narrower
            top, bottom = boxes[r][1]+boxes[r][3], boxes[o][1]-3
            parts.append(f'<path d="M{x+w/2:.0f} {top:.0f}V{bottom:.0f}" stroke="#777" stroke-width="1.6" marker-end="url(#tip)"/>')
    for r,(x, y, w, h, lines) in boxes.items():
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="6" fill="hsl({HUES[r]},60%,94%)" stroke="hsl({HUES[r]},40%,55%)"/>')
        parts.append(f'<text x="{x+pad:.0f}" y="{y+pad+11:.0f}" font-weight="bold" fill="hsl({HUES[r]},60%,28%)">{escape(r)}</text>')
        parts += [f'<text x="{x+pad:.0f}" y="{y+pad+11+line*i:.0f}" font-size="14">{escape(l)}</text>' for i,l in enumerate(lines, 1)]
    tip = '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="#777"/></marker></defs>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="15" fill="#222">'
    return "\n".join([head, tip, f'<rect width="{width}" height="{height:.0f}" rx="8" fill="#fff"/>', *parts, "</svg>"])

if __name__ == "__main__": print(svg())
