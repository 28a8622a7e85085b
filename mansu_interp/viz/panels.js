// What stands around the drawing: paths, closed groups, the list, the card of a component, token
// positions, files, and the state that a link restores. page.py puts this in front of graph.js; together they are one ES module.

const SVG_NS = "http://www.w3.org/2000/svg";
const isRecord = (x) => x !== null && typeof x === "object" && !Array.isArray(x);
const strings = (x) => (Array.isArray(x) ? x.filter((s) => typeof s === "string") : []);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

const PANEL_CSS = `
.mg .work{display:grid;grid-template-columns:minmax(0,1fr);gap:0 18px}
.mg .list{margin-top:10px;min-width:0;container:list/inline-size}
.mg .list .bar{border-top:1px solid var(--faint);padding:7px 0 6px;gap:6px 10px}
.mg .rows{overflow:auto;max-height:300px;border:1px solid var(--faint);border-radius:6px}
.mg .rows table{margin:0;width:100%}
.mg .rows th{position:sticky;top:0;background:var(--paper);padding:3px 10px;z-index:1;box-shadow:0 1px var(--faint)}
.mg .rows td{padding:1px 10px;border-top:1px solid var(--faint)}
.mg .rows th:first-child,.mg .rows td:first-child,.mg .rows .word{text-align:left}
.mg .rows button{border:0;padding:1px 0;text-align:inherit;color:inherit;font-variant-numeric:inherit;white-space:nowrap}
.mg .rows tr.over td{background:var(--box)}
.mg .rows tr.on td{background:var(--box);box-shadow:inset 3px 0 var(--accent)}
.mg .rows tr.on td+td{box-shadow:none}
.mg .rows tr.dim td{opacity:.45}
.mg .pins{display:flex;flex-wrap:wrap;gap:5px 8px;align-items:center;margin-bottom:6px}
.mg .list .close{border:1px solid var(--faint);padding:0 6px;margin-left:8px;font-size:11px;color:var(--soft)}
.mg .part+.part{border-top:1px solid var(--faint);margin-top:8px;padding-top:8px}
.mg textarea{font:inherit;color:var(--ink);background:var(--paper);border:1px solid var(--faint);border-radius:5px;
padding:3px 6px;width:min(100%,420px);height:2.9em;display:block;margin-top:6px;resize:vertical}
.mg input[type=text]{font:inherit;color:var(--ink);background:var(--paper);border:1px solid var(--faint);
border-radius:5px;padding:2px 6px;width:130px}
.mg .heat{width:auto;font-size:11px}
.mg .heat td,.mg .heat th{padding:0 4px;height:17px;min-width:17px;text-align:center;color:var(--ink);text-decoration:none;cursor:default}
.mg .heat th:first-child,.mg .heat td:first-child{text-align:right;color:var(--soft);padding-right:6px}
.mg .heat .down{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;height:auto;padding:4px 0;color:var(--soft)}
.mg .heat button{font-size:11px;padding:2px 5px}
.mg .heat .cell{border:1px solid var(--faint)}
.mg .role{margin-top:5px}
.mg .effect td:nth-child(3),.mg .effect th:nth-child(3){text-align:left}
.mg .places{margin-top:10px;overflow-x:auto;border-top:1px solid var(--faint);padding-top:7px}
.mg .foot{border-top:1px solid var(--faint);margin-top:9px;padding-top:8px;display:flex;flex-wrap:wrap;gap:6px 8px;align-items:center}
@container mg (min-width:900px){
.mg .work.single{grid-template-columns:minmax(0,1fr) minmax(320px,400px);grid-template-rows:auto auto auto 1fr}
.mg .work.single.listed>*{grid-column:1}.mg .work.single.listed>.list{grid-column:2;grid-row:1/span 4;margin-top:0}
.mg .work.single.listed>.list .bar{border-top:0;padding-top:0}
.mg .work.single.listed .rows{max-height:720px}
.mg .work.single:not(.listed){grid-template-columns:minmax(0,1fr)}}
/* where many columns have no room, a row is two lines: words, then numbers */
@container list (max-width:540px){
.mg .rows .many,.mg .rows .many :is(thead,tbody){display:block}
.mg .rows .many thead{position:sticky;top:0;z-index:1;background:var(--paper);box-shadow:0 1px var(--faint)}
.mg .rows .many tr{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));padding:2px 4px;border-top:1px solid var(--faint)}
.mg .rows .many thead tr{border:0}
.mg .rows .many :is(th,td){padding:1px 4px;border:0;order:1}
.mg .rows .many tr:is(.over,.on){background:var(--box)}.mg .rows .many tr.on{box-shadow:inset 3px 0 var(--accent)}.mg .rows .many tr.on td{background:none;box-shadow:none}
.mg .rows .many th{position:static;box-shadow:none}
.mg .rows .many .word,.mg .rows .many :is(th,td):first-child{grid-column:span 2;order:0}
/* score, frequency and interval are short: one line, in which a long name may break */
.mg .rows .held :is(th,td){padding:1px 4px}
.mg .rows .held td:first-child button{white-space:normal}}
@media print{.mg .list,.mg .foot{display:none}}
`;

// ---- paths ------------------------------------------------------------------------------------

// Boxes from which a walk along `links` gets to, with those it starts from.
function reach(starts, links) {
  const seen = new Set(starts), todo = [...starts];
  while (todo.length) {
    for (const next of links.get(todo.pop()) || []) {
      if (!seen.has(next)) { seen.add(next); todo.push(next); }
    }
  }
  return seen;
}

// What the drawn edges connect, by box, along and against the flow. Shared keys and values lead to
// their heads by themselves.
function linksOf(view) {
  const ahead = new Map(), behind = new Map(), { n_heads: heads, n_kv_heads: kv } = view.data.architecture;
  const put = (map, from, to) => (map.has(from) ? map.get(from).add(to) : map.set(from, new Set([to])));
  const add = (from, to) => { put(ahead, from, to); put(behind, to, from); };
  for (const i of view.kept) add(boxOf(view.source[i]), entryOf(view, view.target[i]));
  for (const { steps } of view.moves) for (const [from, to] of steps) add(from, to);
  for (const id of view.byPosition ? [] : view.known) {
    const [, layer, k] = id.match(/^a(\d+)\.kv(\d+)$/) || [];
    for (let h = (k * heads) / kv; h < ((+k + 1) * heads) / kv; h++) add(id, `a${layer}.h${h}`);
  }
  return { ahead, behind, ends: reach(view.meant(["logits"]), behind), begins: reach(view.meant(["input"]), ahead) };
}

// The drawn edges on the paths from input through some boxes, or through one edge, to the logits:
// edge -> 2 where it touches them, 1 further on; and the boxes on the way. A closed group has the paths
// of its members, through edges within it, too: what enters by one leaves only by where that one leads.
function pathsThrough(view, boxes, edge = null) {
  const links = (view.flow ??= linksOf(view)), parts = edge === null ? [] : view.parts(edge), within = new Set(parts);
  const own = new Set(boxes.flatMap((id) => view.under(id)));
  const from = edge === null ? [...own, ...[...own].map((id) => id + ENTRY)] : parts.map((i) => entryOf(view, view.target[i])), to = edge === null ? from : parts.map((i) => boxOf(view.source[i]));
  const after = reach(from, links.ahead), before = reach(to, links.behind), found = new Map(), moves = new Set();
  const edges = new Map(), on = new Set([...from, ...to].map((id) => view.boxIn(withoutEntry(id))));
  const passes = (s, t) => (after.has(s) && links.ends.has(t)) || (before.has(t) && links.begins.has(s));
  for (const i of view.kept) {
    const s = boxOf(view.source[i]), t = boxOf(view.target[i]);
    const near = within.has(i) || own.has(s) || own.has(t);
    if (!near && !passes(s, entryOf(view, view.target[i]))) continue;
    found.set(i, near ? 2 : 1);
    on.add(view.boxIn(s)).add(view.boxIn(t));
  }
  for (const move of view.moves) {
    if (!move.steps.some(([s, t]) => own.has(withoutEntry(s)) || own.has(t) || passes(s, t))) continue;
    moves.add(move);
    on.add(move.from).add(move.to);
  }
  for (const line of view.drawn) {
    const level = Math.max(...view.parts(line).map((i) => found.get(i) || 0));
    if (level) edges.set(line, level);
  }
  return { edges, boxes: on, moves };
}

// ---- nodes at token positions -------------------------------------------------------------------

// A node at a position is a component and its number: "m0@3"; as a reader, "a1.h2<q>@3". Pins and members
// of groups may be either: a component stands for its nodes at all positions.
const componentOf = (id) => (isGroup(id) ? id : id.replace(/@\d+$/, ""));
const positionOf = (id) => (!isGroup(id) && id.includes("@") ? Number(id.slice(id.indexOf("@") + 1)) : null);
const covers = (member, box) => member === box || member === componentOf(box) || (positionOf(box) === null && componentOf(member) === box);

// Where keys and values enter a head, which leads on to later tokens, apart from its query, which does not.
const ENTRY = "<";
const entryOf = (view, id) => boxOf(id) + (view.byPosition && ["k", "v"].includes(readerOf(id)) ? ENTRY : "");
const withoutEntry = (id) => (!isGroup(id) && id.endsWith(ENTRY) ? id.slice(0, -1) : id);

const MOVES = "Dotted: from where a head reads keys and values to where it writes; not scored";
const plainToken = (text) => text.trim() || (text.includes("\n") ? "↵" : "␣");

// What heads may move between tokens: from every node at which a drawn edge enters their keys or values to
// every node, there or later, from which one leaves. Attribution does not score it.
function movesOf(view) {
  if (!view.byPosition) return [];
  const { n_heads: heads, n_kv_heads: kv } = view.data.architecture, reads = new Map(), writes = new Set(), moves = new Map();
  for (const i of view.kept) {
    const entry = entryOf(view, view.target[i]), source = boxOf(view.source[i]), reader = componentOf(withoutEntry(entry));
    if (entry.endsWith(ENTRY)) reads.set(reader, (reads.get(reader) || new Set()).add(positionOf(withoutEntry(entry))));
    if (source.startsWith("a")) writes.add(source);
  }
  for (const to of writes) {
    const [, layer, h] = to.match(/^a(\d+)\.h(\d+)/), reader = kv < heads ? `a${layer}.kv${Math.floor((h * kv) / heads)}` : `a${layer}.h${h}`;
    for (const p of reads.get(reader) || []) {
      const from = `${reader}@${p}`, key = JSON.stringify([view.boxIn(from), view.boxIn(to)]);
      if (p > positionOf(to)) continue;
      if (!moves.has(key)) moves.set(key, { from: view.boxIn(from), to: view.boxIn(to), steps: [] });
      moves.get(key).steps.push([from + ENTRY, to]);
    }
  }
  // what stays within a box is not drawn, and still leads on
  for (const move of moves.values()) {
    move.p = move.from === move.to ? null : moveCurve(view.layout, move.from, move.to);
    move.line = move.p ? Array.from({ length: 17 }, (_, t) => bezier(move.p, t / 16)) : [];
  }
  return [...moves.values()];
}

function moveWords(view, { from, to, steps }) {
  const prompt = view.data.prompts?.[view.tokensOf ?? 0], words = steps.slice(0, 6).map(([source, target]) => {
    const [k, q] = [positionOf(withoutEntry(source)), positionOf(target)], share = prompt?.attention[componentOf(target)]?.[(q * (q + 1)) / 2 + k];
    return `${componentOf(target)}, “${view.tokenOf(target)}” looks at “${view.tokenOf(withoutEntry(source))}”${share === undefined ? "" : `: ${share}% on “${prompt.text}”`}`;
  });
  return `${from} ⇢ ${to}, not scored. ${words.join("; ")}${steps.length > 6 ? "; …" : ""}`;
}

// An edge in words; at a position, which both of its ends have, once.
function nameLine(view, i) {
  const [source, target] = [view.source[i], view.target[i]], at = positionOf(target);
  return at !== null && positionOf(source) === at ? `${componentOf(source)} → ${target}` : `${source} → ${target}`;
}

// Whose tokens name the columns.
function axisChoice(view) {
  const prompts = view.data.prompts || [];
  if (!prompts.length) return [];
  const choose = (k, text, label) => make("button", { type: "button", text, "aria-pressed": String(view.tokensOf === k), "aria-label": label, onclick: () => { view.tokensOf = k; view.refilter(); } });
  return [make("span", { class: "chips" }, "tokens of", choose(null, "all prompts", "tokens of all prompts"), ...prompts.map((p, k) => choose(k, p.answer.trim(), `tokens of prompt ${k + 1}: ${p.text}`)))];
}

// ---- closed groups ------------------------------------------------------------------------------

const GROUP = "⊞ "; // before the name of a closed group: the id of its box

// The boxes that closed groups stand for: id of a component -> id of its group. Keys and values that
// only members of one group read belong to it.
function insideOfGroups(view) {
  const inside = new Map(), { n_layers: layers, n_heads: heads, n_kv_heads: kv } = view.data.architecture, each = heads / kv;
  const places = view.byPosition ? view.data.positions.tokens.map((_, p) => `@${p}`) : [""];
  for (const name of view.closed) for (const id of view.meant(view.groups[name])) if (!inside.has(id)) inside.set(id, GROUP + name);
  for (let k = 0; inside.size && each > 1 && k < layers * kv; k++) {
    const layer = Math.floor(k / kv), first = (k % kv) * each;
    places.forEach((place, p) => { // keys and values at a token are read from there on
      const readers = places.slice(p).flatMap((at) => Array.from({ length: each }, (_, h) => inside.get(`a${layer}.h${first + h}${at}`)));
      if (readers[0] && readers.every((id) => id === readers[0])) inside.set(`a${layer}.kv${k % kv}${place}`, readers[0]);
    });
  }
  return inside;
}

// Half a row above the heads of a layer nothing but its MLP is in the way: there a group stands, over
// its highest member, at its members' mean; groups and MLP side by side. Nothing else moves. The room
// that it takes is what its name needs in the smallest drawing; it is drawn as wide as it must be.
function closeBoxes(layout, inside, parallel) {
  const rows = new Map(), members = new Map(), least = leastScale(layout, layout.constants.letter * layout.longest.length), depth = ({ id }) => (id === "logits" ? Infinity : id === "input" ? -1 : Number(id.match(/\d+/)[0]));
  for (const box of layout.boxes) {
    const id = inside.get(box.id);
    if (id !== undefined) members.set(id, [...(members.get(id) || []), box]);
  }
  for (const [id, own] of members) {
    const top = own.reduce((a, b) => (depth(b) >= depth(a) ? b : a)), layer = depth(top);
    const y = Number.isFinite(layer) && layer >= 0 ? layout.rows.get(layer) - layout.pitch / 2 : top.y;
    const label = id.slice(GROUP.length), wanted = Math.max(40, Math.min(180, layout.constants.letter * label.length + 18));
    const box = { id, kind: "group", label, x: sum(own.map((b) => b.x)) / own.length, y, width: wanted / least, wanted, height: layout.tall - 3, after: top };
    rows.set(y, [...(rows.get(y) || []), box]);
  }
  for (const [y, row] of rows) {
    const mlp = layout.boxes.find((b) => b.kind === "mlp" && Math.abs(b.y - y) < b.height && !inside.has(b.id) && !parallel);
    spread(row, layout.constants.left, mlp ? mlp.x - mlp.width / 2 - 12 : layout.margin);
  }
  const made = [...rows.values()].flat(), gone = layout.boxes.filter((b) => inside.has(b.id));
  layout.boxes = layout.boxes.flatMap((b) => [...(inside.has(b.id) ? [] : [b]), ...made.filter((g) => g.after === b)]);
  for (const b of gone) delete layout.box[b.id];
  for (const b of made) layout.box[b.id] = b;
}

// Side by side between two ends, as near to their places as that allows; narrower if they must be.
function spread(row, left, right) {
  const gap = 12, wanted = sum(row.map((b) => b.width)) + gap * (row.length - 1), share = Math.min(1, (right - left) / wanted);
  row.sort((a, b) => a.x - b.x);
  let from = left, to = right;
  for (const b of row) {
    b.width *= share;
    b.x = Math.max(b.x, from + b.width / 2);
    from = b.x + b.width / 2 + gap * share;
  }
  for (const b of [...row].reverse()) {
    b.x = Math.min(b.x, to - b.width / 2);
    to = b.x - b.width / 2 - gap * share;
  }
}

// What is drawn of some edges: those that touch a closed group are summed by what is at their other
// end, and those within one are hidden. A sum is an edge like any other, with a number after the last.
function sumEdges(view, kept) {
  const n = view.order.length, lines = new Map(), out = [];
  view.source.length = view.target.length = view.curves.length = n;
  view.sums = [];
  view.widest = view.largest;
  if (!view.inside.size) return kept;
  for (const i of kept) {
    const from = view.inside.get(boxOf(view.source[i])), to = view.inside.get(boxOf(view.target[i]));
    if (from === undefined && to === undefined) { out.push(i); continue; }
    if (from === to) continue;
    const ends = [from ?? view.source[i], to ?? view.target[i]], key = JSON.stringify(ends);
    if (lines.has(key)) { lines.get(key).edges.push(i); continue; }
    const line = { edges: [i] };
    lines.set(key, line);
    out.push(n + view.sums.length);
    view.sums.push(line);
    view.source.push(ends[0]);
    view.target.push(ends[1]);
  }
  for (const line of view.sums) {
    line.scores = view.panes.map((_, p) => sum(line.edges.map((i) => view.scores(p)[i])));
    view.widest = Math.max(view.widest, ...line.scores.map(Math.abs));
  }
  const strength = (i) => Math.max(...view.panes.map((_, p) => Math.abs(view.score(i, p))));
  return out.map((i) => [i, strength(i)]).sort((a, b) => b[1] - a[1]).map(([i]) => i);
}

// In words: how many edges a line stands for, and of what class.
function sumWords(view, line) {
  const parts = view.parts(line), n = parts.length, d = view.data, words = [`sum of ${n} drawn edges`];
  if (n === 1) words[0] = `for ${nameLine(view, parts[0])}`;
  const inside = parts.filter((i) => d.edges.in_circuit[view.edge[i]]).length;
  words.push(inside === n ? "in the circuit" : inside ? `${inside} in the circuit` : "outside the circuit");
  if (d.edges.class) words.push(mixture(parts.map((i) => view.nameOf(i)), "edges", nameLine(view, parts[0])));
  return words.join("; ");
}

// Classes of several, strongest first.
function mixture(names, what, strongest) {
  const counts = new Map();
  for (const name of names) counts.set(name, (counts.get(name) || 0) + 1);
  if (counts.size < 2) return names.length > 1 ? `all ${names[0]}` : names[0];
  const each = [...counts].sort((a, b) => b[1] - a[1]).map(([name, n]) => `${n} ${name}`).join(", ");
  return `${what} differ (${each}); drawn as ${names[0]}, the class of the strongest, ${strongest}`;
}

// ---- the list of nodes and edges ----------------------------------------------------------------

const HELD = ["frequency", "2.5 %", "97.5 %"]; // of edges, over resamples
const percent = (x) => (x === null ? "–" : `${Math.round(100 * x)}%`);

// Frequency and interval of an edge; a sum has no interval: resamples of its parts are not added up.
function heldCells(view, i) {
  const { frequency, low, high } = view.data.edges, own = view.edge[i], single = i < view.order.length && !view.byPosition;
  return frequency ? [view.frequency(i), ...(single ? [low[own], high[own]] : [null, null])] : [];
}

function heldWords(view, i) {
  const [often, low, high] = heldCells(view, i);
  if (often === undefined) return [];
  const interval = low === null ? "" : `; 95 % of them score it from ${fmt(low)} to ${fmt(high)}`;
  return [make("div", { class: "soft", text: `in the circuit of ${percent(often)} of ${view.data.resamples}${interval}` })];
}

const ROWS = 150; // more on demand
const COLUMNS = 3; // that have room on a telephone

class List {
  constructor(view) {
    Object.assign(this, { view, kind: "edges", by: 1, up: false, all: false, rows: new Map() });
    this.table = make("table");
    this.more = make("button", { type: "button", onclick: () => { this.all = true; this.render(); } });
    this.tabs = ["nodes", "edges"].map((kind) => make("button", { type: "button", text: kind, "aria-pressed": "false", onclick: () => this.show(kind) }));
    this.element = make("div", { class: "list" },
      make("div", { class: "bar" }, make("span", { class: "chips" }, ...this.tabs), this.more),
      make("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "list of nodes and edges" }, this.table));
    const over = (event) => view.point(this.hitOf(event.target));
    this.table.addEventListener("mouseover", over);
    this.table.addEventListener("focusin", over);
    this.table.addEventListener("mouseleave", () => view.point(null));
    this.table.addEventListener("focusout", () => view.point(null));
    this.table.addEventListener("click", (event) => this.press(event));
  }

  show(kind) {
    if (kind !== this.kind) Object.assign(this, { kind, by: 1, up: false, all: false });
    this.render();
    this.view.remember();
  }

  hitOf(target) {
    const key = target.closest("tr")?.dataset.key;
    return key === undefined ? null : this.kind === "nodes" ? { box: key } : { edge: Number(key) };
  }

  press(event) {
    const close = event.target.closest("button.close");
    if (close) return this.view.toggleGroup(close.value);
    const column = event.target.closest("th");
    if (column) {
      const by = column.cellIndex, first = !this.isWord(by); // numbers: the largest first
      Object.assign(this, by === this.by ? { up: !this.up } : { by, up: !first });
      this.render();
      this.view.remember();
      this.table.querySelectorAll("th button")[by].focus();
    } else if (event.target.closest("tr")) this.view.click(this.hitOf(event.target), event.shiftKey);
  }

  isWord(column) { return typeof this.items[0]?.cells[column] !== "number"; }

  head() {
    const d = this.view.data, panes = this.view.paneNames(), became = d.edges.class ? ["became"] : [];
    const token = this.view.byPosition ? ["token"] : [], held = d.edges.frequency ? HELD : [];
    if (this.kind === "edges") return ["from → to", ...panes, ...held, ...became, ...token];
    const own = ["groups", "notes"].filter((name) => Object.keys(this.view[name]).length).map((name) => name.slice(0, -1));
    return ["node", ...panes, "edges in", "edges out", ...became, ...own, ...token];
  }

  // Every row: what it stands for and its cells, numbers as numbers.
  collect() {
    const { view } = this, d = view.data;
    if (this.kind === "edges") {
      return view.drawn.map((i) => ({
        key: i, cells: [nameLine(view, i), ...view.panes.map((_, p) => view.score(i, p)), ...heldCells(view, i), ...(d.edges.class ? [view.nameOf(i)] : []),
          ...(view.byPosition ? [view.tokenOf(view.target[i]) || view.tokenOf(view.source[i])] : [])],
      }));
    }
    const into = new Map(), out = new Map(), add = (map, id, i) => map.set(id, (map.get(id) || 0) + view.parts(i).length);
    for (const i of view.drawn) { add(out, boxOf(view.source[i]), i); add(into, boxOf(view.target[i]), i); }
    const more = this.head().filter((name) => name === "group" || name === "note");
    const boxes = view.boxes.filter((b) => view.active.has(b.id) || (view.query && view.matches(b.id)));
    return boxes.map(({ id }) => {
      return {
        key: id,
        cells: [id, ...view.panes.map((_, p) => view.nodeScore(id, p)), into.get(id) || 0, out.get(id) || 0,
          ...(d.edges.class ? [view.classOf(id) || ""] : []), ...more.map((name) => (name === "group" ? view.groupOf(id) : view.noteOn(id)) || ""), ...(view.byPosition ? [view.tokenOf(id)] : [])],
      };
    });
  }

  sorted() {
    this.items = this.collect();
    const { by, up } = this, size = (x) => (typeof x === "number" ? Math.abs(x) : -1);
    if (this.isWord(by) && by) this.items.sort((a, b) => String(a.cells[by]).localeCompare(String(b.cells[by])));
    else if (by) this.items.sort((a, b) => size(a.cells[by]) - size(b.cells[by]));
    else { // names in the order in which they compute
      const place = new Map(this.view.boxes.map((b, k) => [b.id, k])), at = (id) => place.get(boxOf(id)) ?? -1;
      const order = ({ key }) => (this.kind === "nodes" ? at(key) : at(this.view.source[key]) * 1e4 + at(this.view.target[key]));
      this.items.sort((a, b) => order(a) - order(b));
    }
    return up ? this.items : this.items.reverse();
  }

  render() {
    const items = this.sorted(), shown = this.all ? items : items.slice(0, ROWS), head = this.head();
    this.tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.textContent === this.kind)));
    this.more.hidden = shown.length === items.length;
    this.more.textContent = `show all ${count(items.length)}`;
    const title = (text, k) => {
      const sort = k === this.by ? (this.up ? "ascending" : "descending") : "none";
      const mark = k === this.by ? (this.up ? " ▴" : " ▾") : "";
      return make("th", { "aria-sort": sort, ...(this.wordy(k, head) ? { class: "word" } : {}) }, make("button", { type: "button", text: text + mark }));
    };
    const folds = (x, k) => this.kind === "nodes" && (k === 0 ? isGroup(x) : head[k] === "group" && x && !this.view.closed.has(x));
    const cell = (x, k) => (k === 0 ? make("td", {}, make("button", { type: "button", text: x }), ...(folds(x, k) ? [closeButton(this.view, x.slice(GROUP.length))] : []))
      : folds(x, k) ? make("td", { class: "word", text: x }, closeButton(this.view, x))
      : make("td", this.wordy(k, head) ? { class: "word", text: x } : { text: head[k].startsWith("edges ") ? count(x) : head[k] === HELD[0] ? percent(x) : fmt(x) }));
    this.rows = new Map(shown.map(({ key, cells }) => [String(key), make("tr", { "data-key": key }, ...cells.map(cell))]));
    const held = head.includes(HELD[0]) && head.length === COLUMNS + 2;
    this.table.className = held ? "held" : head.length > COLUMNS ? "many" : "";
    this.table.replaceChildren(make("thead", {}, make("tr", {}, ...head.map(title))), make("tbody", {}, ...this.rows.values()));
    this.mark();
  }

  wordy(k, head) { return k === 0 || ["became", "group", "note", "token"].includes(head[k]); }

  // The rows of what is pointed at, pinned, and off the paths that are lit.
  mark() {
    const { hover, lit } = this.view;
    for (const [key, row] of this.rows) {
      const node = this.kind === "nodes", id = node ? key : Number(key);
      row.classList.toggle("over", !!hover && (node ? hover.box === id : hover.edge === id));
      row.classList.toggle("on", node ? isPinned(this.view, id) : this.view.isSelectedEdge(id));
      row.classList.toggle("dim", !!lit && !(node ? lit.boxes : lit.edges).has(id));
    }
  }

  csv() {
    const quote = (x) => {
      if (typeof x === "number" || x === null) return x ?? "";
      return `"${(/^[=+\-@\t\r]/.test(x) ? `'${x}` : x).replaceAll('"', '""')}"`; // never a formula
    };
    return [this.head(), ...this.sorted().map((item) => item.cells)].map((row) => row.map(quote).join(",") + "\r\n").join("");
  }
}

// ---- the card of a component --------------------------------------------------------------------

function heatCell(share, sign, view, title) {
  const cell = make("td", { class: "cell", title });
  cell.style.background = `color-mix(in srgb, ${view.colour(sign)} ${Math.round(100 * Math.min(1, share))}%, transparent)`;
  return cell;
}

// Where a head looks: a row a token, a column a token that it may look at.
function attentionTable(view, prompt, shares) {
  const { tokens } = prompt, at = (q, k) => shares[(q * (q + 1)) / 2 + k];
  const head = make("tr", {}, make("th", {}), ...tokens.map((t) => make("th", {}, make("div", { class: "down", text: t }))));
  const rows = tokens.map((t, q) => make("tr", {}, make("td", { text: t }),
    ...tokens.slice(0, q + 1).map((key, k) => heatCell(at(q, k) / 100, "pos", view, `${t} looks at ${key}: ${at(q, k)}%`))));
  return make("div", { class: "attention" }, make("div", { class: "soft", text: "attention (row: the token that looks)" }), make("table", { class: "heat" }, head, ...rows));
}

function effectTable({ tokens, values, answer }, name) {
  const rows = tokens.map((t, k) => [t, values[k]]), up = rows.filter(([, v]) => v > 0), down = rows.filter(([, v]) => v <= 0).reverse();
  const lines = Array.from({ length: Math.max(up.length, down.length) }, (_, k) => [up[k], down[k]].flatMap((r) => (r ? [r[0], fmt(r[1])] : ["", ""])));
  return make("div", { class: "effect" }, make("div", { class: "soft" }, "direct effect on the logits; on ", make("b", { text: name }), ` ${fmt(answer)}`), table([["raises", "", "lowers", ""], ...lines]));
}

// What a head does: its role and where it looks; in its card, also what makes it look there.
function roleOf(view, id, full) {
  const head = view.data.heads?.[componentOf(id)];
  if (!head) return [];
  const share = (role) => `${role} ${percent(head.attention[role])}`;
  const words = [make("b", { text: head.roles.join(", ") || "no role above chance" }), `; looks at ${share(head.looks_at)}; answer − rival ${fmt(head.effect)}`];
  const out = [make("div", { class: "role" }, ...words)];
  if (!full) return out;
  const others = Object.keys(head.attention).filter((role) => role !== head.looks_at).map(share).join(", ");
  const rows = head.keys.map((key, k) => [key, head.query[k] ?? ["", null]].flatMap(([name, value]) => [name, value === null ? "" : fmt(value)]));
  const title = `attention logit to ${head.looks_at}, above the mean: ${fmt(head.logit)}; most of it by`;
  out.push(make("div", { class: "soft", text: `also at ${others}` }), make("div", { class: "effect" }, make("div", { class: "soft", text: title }), table([["keys from", "", "query from", ""], ...rows])));
  return out;
}

// Attention and direct effect on a prompt at a time.
function insideOf(view, node) {
  const prompts = view.data.prompts || [], prompt = prompts[view.prompt] || prompts[0], id = componentOf(node), at = positionOf(node);
  if (!prompt || !(id in prompt.effects || id in prompt.attention)) return [];
  const choose = prompts.map((p, k) => make("button", {
    type: "button", text: p.answer, "aria-pressed": String(p === prompt), "aria-label": `prompt ${k + 1}: ${p.text} ${p.answer}`,
    onclick: () => { view.prompt = k; view.showDetail(); },
  }));
  const words = make("div", { class: "soft" }, `${prompt.text} → `, make("span", { class: "chips" }, ...choose));
  const parts = [];
  if (id in prompt.attention) parts.push(attentionTable(view, prompt, prompt.attention[id]));
  if (id in prompt.effects && (at === null || at === prompt.tokens.length - 1)) parts.push(effectTable(prompt.effects[id], prompt.answer));
  return [make("div", { class: "inside" }, words, make("div", { class: "cols" }, ...parts))];
}

function noteField(view, node) {
  const id = componentOf(node);
  const field = make("textarea", { placeholder: `note on ${id}`, "aria-label": `note on ${id}`, maxlength: 2000, oninput: () => {
    if (field.value) view.notes[id] = field.value;
    else delete view.notes[id];
    view.list.stale = true;
    view.remember();
    view.draw();
  } });
  field.value = view.notes[id] || "";
  return field;
}

const isPinned = (view, id) => view.membersOf(id).some((member) => [...view.selected].some((pin) => covers(pin, member)));

function closeButton(view, name) {
  const text = view.closed.has(name) ? "open" : "close";
  return make("button", { type: "button", class: "close", text, value: name, "aria-label": `${text} the group ${name}` });
}

// What is pinned, and the groups that it is in or may become.
function pinBar(view) {
  const pins = view.pins().map((id) => make("button", { type: "button", text: `${id} ×`, "aria-label": `unpin ${id}`, onclick: () => view.click({ box: id }, true) }));
  const name = make("input", { type: "text", placeholder: "name of a group", "aria-label": "name of a group", maxlength: 40 });
  const group = make("form", { class: "chips" }, name, make("button", { type: "submit", text: "group" }));
  group.addEventListener("submit", (event) => { event.preventDefault(); view.group(name.value.trim(), [...view.selected]); });
  const groups = Object.entries(view.groups).map(([title, members]) => make("span", { class: "chips" },
    make("button", { type: "button", class: "group", text: `${title}: ${members.length}, ${fmt(view.groupScore(title))}`, "aria-label": `pin the group ${title}`, onclick: () => view.pin(members) }),
    closeButton(view, title),
    make("button", { type: "button", text: "×", "aria-label": `dissolve the group ${title}`, onclick: () => view.group(title, []) })));
  if (!pins.length && !groups.length) return [];
  const bar = make("div", { class: "pins" }, ...(pins.length ? ["pinned", ...pins, group] : []), ...(groups.length ? ["groups", ...groups] : []));
  bar.addEventListener("click", (event) => { if (event.target.matches("button.close")) view.toggleGroup(event.target.value); });
  return [bar];
}

// ---- token positions ----------------------------------------------------------------------------

const LEAST_SHARE = 0.02;

// Components by token position: the sum over a component's drawn edges. A position restricts the graph.
function positionGrid(view) {
  const places = view.data.positions;
  if (!places) return [];
  if (view.byPosition) return axisChoice(view);
  const parts = new Map(), n = places.tokens.length;
  for (const i of view.drawn) {
    const id = boxOf(view.source[i]);
    if (!parts.has(id)) parts.set(id, new Float64Array(n));
    for (const j of view.parts(i)) for (let p = 0; p < n; p++) parts.get(id)[p] += places.scores[p][j];
  }
  const most = (id) => Math.max(0, ...parts.get(id).map(Math.abs)), largest = Math.max(1e-12, ...[...parts.keys()].map(most));
  const rows = view.boxes.filter((b) => parts.has(b.id) && most(b.id) >= LEAST_SHARE * largest).reverse();
  const left = parts.size - rows.length;
  const choose = (p, text) => make("button", { type: "button", text, "aria-pressed": String(view.at === p), "aria-label": p === null ? "all positions" : `position ${p}: ${text}`, onclick: () => view.setPosition(p) });
  const head = make("tr", {}, make("th", {}, choose(null, "all")), ...places.tokens.map((t, p) => make("th", {}, choose(p, t))));
  const line = (b) => make("tr", { "data-key": b.id }, make("td", { text: b.id }),
    ...[...parts.get(b.id)].map((v, p) => heatCell(Math.abs(v) / largest, v < 0 ? "neg" : "pos", view, `${b.id} at ${places.tokens[p]}: ${fmt(v)}`)));
  return [make("div", { class: "soft", text: "by token position: what a component's drawn edges carry; press a token to see the graph there" }),
    make("div", { class: "soft", text: left ? `${left} components are left out: they carry less than a fiftieth of the most anywhere` : "" }),
    make("table", { class: "heat" }, head, ...rows.map(line))];
}

// ---- state --------------------------------------------------------------------------------------

// What a link, a saved JSON and the widget's `state` restore; nothing that is as at first.
function stateOf(view) {
  const off = { pinned: [...view.selected], edge: view.selectedEdge, find: view.query, hide: [...view.hidden], unfolded: [...view.unfolded],
    groups: view.groups, closed: [...view.closed], notes: view.notes, not_read: view.readers.filter((k) => !view.kinds.has(k)) };
  const out = Object.fromEntries(Object.entries(off).filter(([, x]) => (isRecord(x) ? Object.keys(x) : x).length));
  if (view.threshold !== view.first.threshold) out.threshold = view.threshold;
  if (view.all !== view.first.all) out.all = view.all;
  if (view.changedOnly) out.changed_only = true;
  if (view.circuitOnly) out.circuit_only = true;
  if (view.at !== null) out.at = view.at;
  if (view.byPosition) out.by_position = true;
  if (view.tokensOf !== null) out.tokens_of = view.tokensOf;
  if (view.list.kind !== "edges") out.list = view.list.kind;
  if (view.list.by !== 1 || view.list.up) out.sort = [view.list.by, view.list.up];
  return structuredClone(out);
}

// Whatever of a state is possible in this graph; it may come from a link that anybody wrote.
function restoreState(view, state) {
  const s = isRecord(state) ? state : {}, places = view.data.positions, known = (x) => strings(x).filter((id) => view.known.has(componentOf(id)) && (positionOf(id) === null || positionOf(id) < places?.tokens.length));
  const some = (x, names) => strings(x).filter((name) => names.includes(name));
  view.selected = new Set(known(s.pinned));
  view.selectedEdge = strings(s.edge).length === 2 ? strings(s.edge) : [];
  view.query = typeof s.find === "string" ? s.find.slice(0, 200).toLowerCase() : "";
  view.hidden = new Set(some(s.hide, view.data.classes || []));
  view.kinds = new Set(view.readers.filter((k) => !strings(s.not_read).includes(k)));
  view.unfolded = new Set((Array.isArray(s.unfolded) ? s.unfolded : []).filter((n) => Number.isInteger(n) && n >= 0 && n < view.data.architecture.n_layers));
  const taken = [], free = (id) => !taken.some((x) => covers(x, id) || covers(id, x)) && taken.push(id); // a node is in one group
  const groups = Object.entries(isRecord(s.groups) ? s.groups : {}).map(([name, ids]) => [name.slice(0, 40), known(ids).filter(free)]);
  view.groups = Object.fromEntries(groups.filter(([, ids]) => ids.length));
  view.closed = new Set(some(s.closed, Object.keys(view.groups)));
  view.notes = Object.fromEntries(Object.entries(isRecord(s.notes) ? s.notes : {}).filter(([id, text]) => view.known.has(id) && typeof text === "string").map(([id, text]) => [id, text.slice(0, 2000)]));
  view.byPosition = s.by_position === true && !!places;
  view.tokensOf = Number.isInteger(s.tokens_of) && view.data.prompts?.[s.tokens_of] ? s.tokens_of : null;
  view.at = !view.byPosition && Number.isInteger(s.at) && places?.scores[s.at] ? s.at : null;
  view.index();
  view.threshold = Number.isFinite(s.threshold) ? s.threshold : view.first.threshold;
  view.all = typeof s.all === "boolean" ? s.all : view.first.all;
  view.changedOnly = s.changed_only === true;
  view.circuitOnly = s.circuit_only === true;
  view.list.kind = s.list === "nodes" ? "nodes" : "edges";
  const [by, up] = Array.isArray(s.sort) ? s.sort : [];
  Object.assign(view.list, Number.isInteger(by) && by >= 0 && by < view.list.head().length ? { by, up: up === true } : { by: 1, up: false });
}

// The state in the address of a page, under the graph's name; null where there is none.
function readLink(name) {
  try {
    return JSON.parse(new URLSearchParams(location.hash.slice(1)).get(name));
  } catch {
    return null;
  }
}

function writeLink(name, state) {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const [key, value] of [...found]) if (!value) found.delete(key); // an anchor of the page
  if (Object.keys(state).length) found.set(name, JSON.stringify(state));
  else found.delete(name);
  if (String(found) !== location.hash.slice(1)) history.replaceState(null, "", `#${found}`);
}

// ---- files --------------------------------------------------------------------------------------

function download(view, kind, text, type) {
  const name = view.data.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "graph";
  const url = URL.createObjectURL(text instanceof Blob ? text : new Blob([text], { type }));
  make("a", { href: url, download: `${name}.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// Title, panes with their captions, and what the edges mean: where each goes in a picture.
function pictureOf(view) {
  const across = evenly(view.panes.length, Math.floor(1600 / view.layout.width)), down = Math.ceil(view.panes.length / across);
  const { width, height } = view.layout, caption = view.panes.some(Boolean) ? 18 : 0, top = 30;
  const legend = view.meanings(), at = (p) => [(p % across) * width, top + Math.floor(p / across) * (height + caption) + caption];
  return { width: width * across, height: top + down * (height + caption) + 18 * legend.length + 12, at, legend, legendY: top + down * (height + caption) + 10 };
}

function shorten(text, letters) { return [...text].length > letters ? `${[...text].slice(0, Math.max(1, Math.floor(letters) - 1)).join("")}…` : text; }

function svgText(view) {
  const { css, layout } = view, picture = pictureOf(view), { width, height } = picture;
  const node = (tag, props, ...children) => {
    const made = document.createElementNS(SVG_NS, tag);
    for (const [k, v] of Object.entries(props)) if (v !== "") made.setAttribute(k, v);
    made.append(...children);
    return made;
  };
  const text = (words, x, y, more = {}) => node("text", { x, y, fill: css.ink, ...more }, words);
  const root = node("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": "system-ui,sans-serif", "font-size": FONT },
    node("rect", { width, height, fill: css.paper }), text(view.data.title, 8, 18, { "font-weight": 600, "font-size": 13 }));
  view.panes.forEach((name, p) => {
    const [x, y] = picture.at(p), pane = node("g", { transform: `translate(${x} ${y})` });
    if (name) pane.append(text(name, layout.constants.left, -5, { "font-weight": 600 }));
    for (const [layer, at] of layout.rows) pane.append(text(`L${layer}`, 6, at + 4, { fill: css.soft }));
    if (view.byPosition) pane.append(...columnsSvg(view, node, text));
    for (const i of view.backToFront(p)) {
      const { alpha, width: line, colour, dash } = view.look(i, p), c = view.curve(i).p;
      pane.append(node("path", { d: `M${c[0]} ${c[1]}C${c.slice(2).join(" ")}`, fill: "none", stroke: colour, "stroke-width": line, "stroke-dasharray": dash.join(" "), opacity: alpha }));
    }
    for (const b of view.boxes) {
      const on = view.active.has(b.id), wide = b.kind === "group" ? view.widthOf(b, 1) : b.width, frame = isPinned(view, b.id) ? css.accent : on ? css.soft : css.faint;
      if (b.kind === "group") pane.append(node("rect", { x: b.x - wide / 2 + 3, y: b.y - b.height / 2 - 3, width: wide, height: b.height, rx: 5, fill: css.paper, stroke: css.accent }));
      pane.append(node("rect", { x: b.x - wide / 2, y: b.y - b.height / 2, width: wide, height: b.height, rx: b.kind === "kv" ? 2 : 5, fill: b.kind === "kv" ? frame : on ? css.box : "none", stroke: b.kind === "group" ? css.accent : frame }));
      if (b.label) pane.append(text(b.kind === "group" ? shorten(b.label, (wide - 8) / layout.constants.letter) : b.label, b.x, b.y + 4, { "text-anchor": "middle", fill: on ? css.ink : css.soft }));
    }
    root.append(pane);
  });
  picture.legend.forEach(([style, words], k) => {
    const y = picture.legendY + 18 * k;
    if (style) root.append(node("path", { d: `M8 ${y}h34`, stroke: view.colour(style), "stroke-width": 2.5, "stroke-dasharray": view.data.styles[style][2] }));
    root.append(text(words, style ? 52 : 8, y + 4, { fill: css.soft }));
  });
  return new XMLSerializer().serializeToString(root);
}

// Tokens below, lines between columns and moves, as `paintColumns` draws them.
function columnsSvg(view, node, text) {
  const { css, layout } = view, { columns, axisY, constants } = layout, gap = constants.column_gap;
  const names = columns.map((k) => text(shorten(k.label, (k.width + 0.8 * gap) / constants.letter), k.x, axisY + 4, { "text-anchor": "middle" }));
  const lines = columns.slice(1).map((k) => node("path", { d: `M${k.x - k.width / 2 - gap / 2} ${constants.top}V${axisY + 8}`, stroke: css.faint }));
  const moves = view.moves.filter(({ p }) => p).map((move) => node("path", { d: `M${move.p[0]} ${move.p[1]}C${move.p.slice(2).join(" ")}`, fill: "none", stroke: css.soft, "stroke-dasharray": "1.5 3", opacity: view.moveAlpha(move) }));
  return [...names, ...lines, ...moves];
}

function pngBlob(view) {
  const picture = pictureOf(view), canvas = make("canvas"), c = canvas.getContext("2d"), z = 2;
  canvas.width = picture.width * z;
  canvas.height = picture.height * z;
  c.scale(z, z);
  c.fillStyle = view.css.paper;
  c.fillRect(0, 0, picture.width, picture.height);
  const write = (words, x, y, font = `${FONT}px`) => { c.font = `${font} system-ui, sans-serif`; c.fillText(words, x, y); };
  c.fillStyle = view.css.ink;
  write(view.data.title, 8, 18, "600 13px");
  view.panes.forEach((name, p) => {
    const [x, y] = picture.at(p);
    c.save();
    c.translate(x, y);
    c.fillStyle = view.css.ink;
    write(name, view.layout.constants.left, -5, `600 ${FONT}px`);
    view.paintOn(c, p, 1);
    c.restore();
  });
  picture.legend.forEach(([style, words], k) => {
    const y = picture.legendY + 18 * k;
    if (style) {
      c.beginPath();
      c.strokeStyle = view.colour(style);
      c.lineWidth = 2.5;
      c.setLineDash(view.data.styles[style][2].split(" ").filter(Boolean).map(Number));
      c.moveTo(8, y);
      c.lineTo(42, y);
      c.stroke();
    }
    c.fillStyle = view.css.soft;
    write(words, style ? 52 : 8, y + 4);
  });
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function footOf(view) {
  const save = {
    PNG: async () => download(view, "png", await pngBlob(view)),
    SVG: () => download(view, "svg", svgText(view), "image/svg+xml"),
    JSON: () => download(view, "json", JSON.stringify({ ...view.data, state: stateOf(view) }), "application/json"),
    CSV: () => download(view, "csv", view.list.csv(), "text/csv"),
  };
  const buttons = Object.entries(save).map(([kind, act]) => make("button", { type: "button", text: kind, "aria-label": kind === "CSV" ? "save the list as CSV" : `save as ${kind}`, onclick: act }));
  const link = make("button", { type: "button", text: "copy link to this view", onclick: async () => {
    view.writeState();
    try {
      await navigator.clipboard.writeText(location.href);
      link.textContent = "copied";
    } catch { // not allowed here: the address bar has it
      link.textContent = "the link is in the address bar";
    }
  } });
  return make("div", { class: "foot" }, make("span", { class: "soft", text: "save as" }), ...buttons, ...(view.link ? [link] : []));
}
