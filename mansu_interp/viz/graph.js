// The interactive graph: with panels.js in front of it, one ES module for the notebook widget (anywidget
// calls `render`) and for saved pages (they inline it and call `mount`). No dependency, no request.
// Everything that comes from data is written with textContent; its format: docs/viewing.md.

const PALETTE = {
  light: { paper: "#fff", ink: "#1d2329", soft: "#5c6670", faint: "#dfe3e7", box: "#f4f6f8", accent: "#0b6bcb" },
  dark: { paper: "#15191d", ink: "#e8ebee", soft: "#a3adb7", faint: "#333b43", box: "#232a31", accent: "#6cb4f5" },
};
const variables = (colours) => Object.entries(colours).map(([name, value]) => `--${name}:${value};`).join("");
const FONT = 11; // pixels on the screen, however far one zooms
const CSS = `
.mg{${variables(PALETTE.light)}
color:var(--ink);background:var(--paper);font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;border:1px solid var(--faint);border-radius:8px;padding:12px 14px;
text-align:left;container:mg/inline-size}
.mg.dark{${variables(PALETTE.dark)}color-scheme:dark}
.mg *{box-sizing:border-box}.mg [hidden]{display:none!important}
.mg .head{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;margin-bottom:8px}
.mg .title{font-weight:650;font-size:15px;overflow-wrap:anywhere}
.mg .soft{color:var(--soft)}
.mg .cad{border-left:4px solid var(--soft);background:var(--box);border-radius:4px;
padding:7px 12px;margin:0 0 10px;overflow-x:auto}
.mg .cad b{text-transform:capitalize}
.mg table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:12px;margin-top:5px;color:inherit}
.mg th,.mg td{padding:1px 14px 1px 0;text-align:right;font-weight:400;border:0;background:none;white-space:nowrap}
.mg [title]{text-decoration:underline dotted;text-underline-offset:3px;cursor:help}
.mg button[title]{text-decoration:none;cursor:pointer}
.mg th{color:var(--soft)}.mg th:first-child,.mg td:first-child{text-align:left}
.mg .bar{display:flex;flex-wrap:wrap;gap:8px 16px;align-items:center;padding:7px 0 9px;
border-top:1px solid var(--faint)}
.mg label{display:inline-flex;gap:6px;align-items:center;color:var(--soft);margin:0}
.mg output{font-variant-numeric:tabular-nums;color:var(--ink)}
.mg input[type=range]{width:150px;accent-color:var(--accent);margin:0}
.mg input[type=number],.mg input[type=search]{font:inherit;color:var(--ink);background:var(--paper);
border:1px solid var(--faint);border-radius:5px;padding:2px 6px;width:68px}
.mg input[type=search]{width:min(100%,220px)}
.mg button{font:inherit;color:var(--soft);background:none;border:1px solid var(--faint);
border-radius:5px;padding:2px 8px;cursor:pointer;line-height:1.4}
.mg button[aria-pressed=true]{color:var(--ink);background:var(--box);border-color:var(--soft)}
.mg :focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.mg .chips{display:inline-flex;gap:4px;align-items:center;color:var(--soft)}
.mg .panes{display:grid;gap:8px}
.mg figure{margin:0;min-width:0;overflow-x:auto}
.mg figcaption{color:var(--soft);font-weight:600;padding:0 0 3px 2px;font-size:13px;text-align:left}
.mg canvas{display:block;border-radius:6px;cursor:grab;touch-action:pan-x pan-y}
.mg canvas.over{cursor:pointer}
.mg .legend{display:flex;flex-wrap:wrap;gap:4px 8px;margin-top:8px}
.mg .legend button,.mg .legend span{display:inline-flex;text-align:left;gap:7px;align-items:center;font-size:12px;color:var(--soft)}
.mg .legend button[aria-pressed=false]{opacity:.45;text-decoration:line-through}
.mg .legend button,.mg .legend button[aria-pressed]{border-color:transparent;background:none;padding:1px 4px}
.mg .legend button:hover{border-color:var(--faint)}.mg .legend span{padding:1px 4px}
.mg .legend svg{flex:none}
.mg .detail{margin-top:9px;padding-top:8px;border-top:1px solid var(--faint);min-height:44px;overflow-x:auto}
.mg .cols{display:flex;flex-wrap:wrap;gap:4px 34px}
.mg .mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:11.5px;overflow-wrap:anywhere}
.mg .tip{position:fixed;z-index:99999;pointer-events:none;background:var(--paper);color:var(--ink);
border:1px solid var(--soft);border-radius:6px;padding:6px 10px;font-size:12px;max-width:min(430px,90vw);
box-shadow:0 3px 12px #0003}
.mg .tip td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:76px}
@media print{.mg .bar,.mg .detail{display:none}}
${PANEL_CSS}`;

const fmt = (x) => (x === null || x === undefined ? "–" : (x < 0 ? "−" : "+") + short(Math.abs(x)));
const short = (x) => (x === 0 ? "0" : x < 1e-4 ? x.toExponential(1) : Number(x.toPrecision(4)).toString());
const count = (n) => n.toLocaleString("en-US");
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const isGroup = (id) => id.startsWith(GROUP);
const boxOf = (id) => (isGroup(id) ? id : id.replace(/<.*>/, ""));
const readerOf = (id) => (!isGroup(id) && id.includes("<") ? id.slice(id.indexOf("<") + 1, id.indexOf(">")) : "");

// What the tables' headings mean: as in docs/glossary.md and the report's terms (a test compares them).
export const TERMS = {
  CAD: "circuit attribution divergence; here the number and verdict of mansu cad: 0 = all knowledge is there, 1 = none",
  mass: "how much attribution is left on the circuit, as a share of the original's",
  "projected share": "⟨s′, s⟩ / ⟨s, s⟩: how much of the original's attribution, or of an edit, is left along its direction",
  alignment: "whether what is left of the attribution points the same way (cosine): 1 = the same, −1 = reversed",
  outside: "attribution that flows elsewhere than along the circuit, as a share of all of the original's",
};

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (k === "text") node.textContent = v;
    else if (k === "class") node.className = v;
    else if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else node.setAttribute(k, v);
  }
  node.append(...children);
  return node;
}

function table(rows) {
  const entry = (tag) => (text) => make(tag, Object.hasOwn(TERMS, text) ? { text, title: TERMS[text] } : { text });
  return make("table", {}, ...rows.map((r, i) => make("tr", {}, ...r.map(entry(i ? "td" : "th")))));
}

// Columns for some panes where so many fit: rows of one length, where that is possible.
function evenly(panes, fit) { return Math.ceil(panes / Math.ceil(panes / Math.max(1, fit))); }

// Where everything is: the same rules as `place` in layout.py (a test compares them). `shown`: ids of
// the boxes that carry something, or null for all.
export function place(a, c, shown) {
  const group = a.n_heads / a.n_kv_heads, range = (n) => Array.from({ length: n }, (_, i) => i);
  const drawn = new Map();
  for (const layer of range(a.n_layers)) {
    const heads = range(a.n_heads).filter((h) => !shown || shown.has(`a${layer}.h${h}`));
    for (const k of range(shown && group > 1 ? a.n_kv_heads : 0)) {
      if (shown.has(`a${layer}.kv${k}`) && !heads.some((h) => Math.floor(h / group) === k)) heads.push(k * group);
    }
    heads.sort((x, y) => x - y);
    const mlp = !shown || shown.has(`m${layer}`);
    if (heads.length || mlp) drawn.set(layer, { heads, mlp });
  }
  const columns = Math.max(1, ...[...drawn.values()].map((row) => row.heads.length));
  const longest = `a${a.n_layers - 1}.h${a.n_heads - 1}`, widest = c.letter * longest.length + 4;
  const column = Math.max(clamp(c.room / columns, 30, 84), widest + 6);
  const pitch = clamp(640 / Math.max(drawn.size, 1), 48, 104), tall = clamp(pitch * 0.36, 17, 28);
  const headWidth = Math.max(column * 0.72, widest), mlpX = c.left + column * columns + c.mlp_gap + c.mlp_width / 2;
  const margin = mlpX + c.mlp_width / 2, raised = a.parallel ? 0 : 0.5 * pitch;
  const logitsY = c.top + 12, first = logitsY + raised + 0.8 * pitch;
  const rows = new Map([...drawn.keys()].map((layer, k) => [layer, first + pitch * (drawn.size - 1 - k)]));
  const inputY = Math.max(logitsY, ...rows.values()) + 0.9 * pitch;
  const boxes = [];
  const add = (id, kind, label, x, y, width, height) => boxes.push({ id, kind, label, x, y, width, height });
  const end = (id, y) => add(id, id, id, (c.left + margin) / 2, y, margin - c.left, 24);
  end("input", inputY);
  for (const [layer, row] of drawn) {
    const y = rows.get(layer), at = row.heads.map((h, k) => [h, c.left + column * (k + 0.5)]);
    for (const [h, x] of at) add(`a${layer}.h${h}`, "head", `a${layer}.h${h}`, x, y, headWidth, tall);
    for (const k of range(group > 1 ? a.n_kv_heads : 0)) {
      const over = at.filter(([h]) => Math.floor(h / group) === k).map(([, x]) => x), left = over[0], right = over.at(-1);
      if (over.length) add(`a${layer}.kv${k}`, "kv", "", (left + right) / 2, y + tall / 2 + 5, right - left + headWidth, 4);
    }
    if (row.mlp) add(`m${layer}`, "mlp", `m${layer}`, mlpX, y - raised, c.mlp_width, tall);
  }
  end("logits", logitsY);
  const box = Object.fromEntries(boxes.map((b) => [b.id, b]));
  return { width: margin + c.right, height: inputY + 12 + c.bottom, pitch, column, tall, longest, boxes, box, rows, margin, inputY, constants: c };
}

// The four Bezier points of an edge: the same rule as `curve` in layout.py (a test compares them), but
// for closed groups, which alone have edges to what is beside or below them.
export function curve(layout, source, target) {
  const u = layout.box[boxOf(source)], v = layout.box[boxOf(target)], c = layout.constants;
  const offsets = v.kind === "kv" ? c.shared_ports : c.ports;
  const isEnd = (a, b) => (u.kind === a && v.kind === b) || (u.kind === b && v.kind === a);
  const near = (x, box) => (layout.columns ? clamp(0.75 * x, -0.4 * box.width, 0.4 * box.width) : 0.75 * x);
  let x0 = u.x, x1 = v.x + (offsets[readerOf(target)] || 0) * v.width;
  if (u.kind === "input" && v.kind !== "logits") x0 += near(x1 - u.x, u);
  if (v.kind === "logits" && u.kind !== "input") x1 += near(x0 - v.x, v);
  const y0 = u.y - u.height / 2, y1 = v.y + v.height / 2, rise = y0 - y1;
  if (rise < 0) {
    const swing = Math.abs(x1 - x0) < layout.column ? (x1 < c.left + layout.column ? 1 : -1) * layout.column : 0, up = 0.6 * layout.pitch;
    return [x0, y0, x0 + swing, y0 - up, x1 + swing, y1 + up, x1, y1];
  }
  const own = layout.columns?.find((k) => Math.abs(u.x - k.x) <= k.width / 2);
  if (own && rise > 1.1 * layout.pitch && Math.abs(v.x - own.x) <= own.width / 2) { // beside its column
    const off = (x0 + x1) / 2 - own.x, right = Math.abs(off) > 0.01 ? off > 0 : roundEven(y0 / layout.pitch) % 2, edge = own.width / 2 + 0.4 * c.column_gap;
    const swing = ((right ? edge : -edge) - off) / 0.75;
    return [x0, y0, x0 + swing, y0 - 0.3 * rise, x1 + swing, y1 + 0.3 * rise, x1, y1];
  }
  if (!layout.columns && rise > 1.1 * layout.pitch && Math.abs(x1 - x0) < 0.6 * layout.column) {
    let swing;
    if (u.kind === "mlp" || v.kind === "mlp" || isEnd("input", "logits")) {
      swing = Math.min(26 + (5 * rise) / layout.pitch, c.right * 1.1);
      if (isEnd("input", "logits")) {
        x0 = x1 = layout.margin - 4;
        swing = c.right * 1.25;
      }
    } else {
      const side = roundEven(y0 / layout.pitch) % 2 ? 1 : -1;
      swing = side * layout.column * Math.min(0.55 + (0.05 * rise) / layout.pitch, 1.1);
    }
    return [x0, y0, x0 + swing, y0 - 0.3 * rise, x1 + swing, y1 + 0.3 * rise, x1, y1];
  }
  const reach = Math.min(0.5 * rise, 1.2 * layout.pitch);
  return [x0, y0, x0, y0 - reach, x1, y1 + reach, x1, y1];
}

// Where nodes at token positions are: the same rules as `place_by_position` in layout.py (a test compares
// them). `shown`: ids of nodes; `tokens`: what names the columns; `inside`: the closed group of a node.
export function placeByPosition(a, c, shown, tokens, inside) {
  const nodes = nodesOf(a, c, shown, inside), heads = nodes.filter((n) => n.kind === "head").map((n) => n.label);
  const longest = heads.reduce((x, y) => (y.length > x.length ? y : x), "m0"), widest = c.letter * longest.length + 4, column = widest + 6;
  const layers = [...new Set(nodes.map((n) => n.layer))].filter((n) => n >= 0 && n < a.n_layers).sort((x, y) => x - y);
  const pitch = clamp(640 / Math.max(layers.length, 1), 48, 104), tall = clamp(pitch * 0.36, 17, 28), least = leastScale({ column, tall }, c.letter * longest.length);
  const raised = a.parallel ? 0 : 0.5 * pitch, logitsY = c.top + 12;
  const rows = new Map(), extra = new Map(), lines = new Map(), cells = new Map();
  for (const n of nodes) { // so many side by side in a line, others above them
    n.width = n.kind === "group" ? n.wanted / least : n.kind === "head" ? widest : c.mlp_width;
    n.height = n.layer < 0 || n.layer >= a.n_layers ? 24 : n.kind === "group" ? tall - 3 : tall;
    const tier = `${n.layer} ${raised && n.kind === "mlp"} ${n.position}`, k = cells.get(tier) || 0, line = Math.floor(k / c.line), key = `${tier} ${line}`;
    cells.set(tier, k + 1);
    lines.set(key, [...(lines.get(key) || []), n]);
    extra.set(n.layer, Math.max(extra.get(n.layer) || 0, line * (tall + 6)));
    n.line = line;
  }
  let y = logitsY + raised - 0.2 * pitch; // the highest row comes first
  for (const layer of [...layers].reverse()) {
    rows.set(layer, y + pitch + extra.get(layer) / 2);
    y += pitch + extra.get(layer);
  }
  const inputY = layers.length ? y + 0.9 * pitch : logitsY + 0.9 * pitch;
  for (const row of lines.values()) {
    const [{ layer, kind, position, line }] = row, own = rows.get(layer), last = Math.floor((cells.get(`${layer} ${raised && kind === "mlp"} ${position}`) - 1) / c.line);
    for (const n of row) n.y = layer < 0 ? inputY : layer >= a.n_layers ? logitsY : kind === "mlp" && raised ? own - extra.get(layer) / 2 - raised : own + (last / 2 - line) * (tall + 6);
  }
  const across = (row) => sum(row.map((n) => n.width)) + 6 * (row.length - 1), full = tokens.map(() => 0);
  for (const row of lines.values()) full[row[0].position] = Math.max(full[row[0].position], across(row));
  const columns = columnsOf(full, tokens, c);
  for (const row of lines.values()) {
    let x = columns.find((k) => k.positions.includes(row[0].position)).x - across(row) / 2;
    for (const n of row) { n.x = x + n.width / 2; x += n.width + 6; }
  }
  const margin = columns.length ? columns.at(-1).x + columns.at(-1).width / 2 : c.left, axisY = inputY + 28;
  return { width: margin + c.column_gap, height: axisY + 10 + c.bottom, pitch, column, tall, longest, boxes: nodes, box: Object.fromEntries(nodes.map((n) => [n.id, n])), rows, margin, inputY, axisY, columns, constants: c };
}

// Nodes in the order in which they compute. A closed group stands where its highest member would.
function nodesOf(a, c, shown, inside) {
  const each = a.n_heads / a.n_kv_heads, groups = new Map(), out = [];
  for (const id of shown) {
    const [label, position] = [componentOf(id), positionOf(id)], [, layer, kind, k] = label.match(/^[am](\d+)(?:\.(h|kv)(\d+))?$/) || [];
    const end = layer === undefined, n = { id, kind: end ? label : kind ? "head" : "mlp", label, position, layer: end ? (label === "input" ? -1 : a.n_layers) : Number(layer) };
    n.rank = kind === "h" ? 2 * k + 1 : kind ? 2 * k * each : 2 * a.n_heads + 1; // keys and values before the heads that read them
    const group = inside.get(id), top = groups.get(group);
    if (group === undefined) out.push(n);
    else if (!top || inOrder(top, n) < 0) groups.set(group, n);
  }
  for (const [id, top] of groups) {
    const label = id.slice(GROUP.length), ends = top.layer < 0 || top.layer >= a.n_layers;
    out.push({ ...top, id, kind: "group", label, rank: ends ? top.rank : 2 * a.n_heads, wanted: Math.max(40, Math.min(180, c.letter * [...label].length + 18)) });
  }
  return out.sort((x, y) => inOrder(x, y) || (x.id < y.id ? -1 : 1));
}

function inOrder(x, y) { return x.layer - y.layer || (x.kind === "mlp") - (y.kind === "mlp") || x.position - y.position || x.rank - y.rank; }

// A column for each token; three or more in a row at which nothing is drawn share one.
function columnsOf(full, tokens, c) {
  const runs = [];
  full.forEach((width, p) => {
    if (!width && p && !full[p - 1]) runs.at(-1).push(p);
    else runs.push([p]);
  });
  let left = c.left;
  return runs.flatMap((run) => (run.length > 2 ? [run] : run.map((p) => [p]))).map((positions) => {
    const label = positions.length > 1 ? "⋯" : plainToken(tokens[positions[0]]);
    const width = Math.max(full[positions[0]], clamp(c.letter * [...label].length + 4, full[positions[0]] ? 40 : 16, 92)), x = left + width / 2;
    left += width + c.column_gap;
    return { positions, label, x, width };
  });
}

// From where a head reads keys and values to where it writes, above its row: the same as in layout.py.
export function moveCurve(layout, from, to) {
  const u = layout.box[from], v = layout.box[to], side = u.x <= v.x ? 1 : -1, up = 0.3 * layout.pitch;
  const x0 = u.x + (side * u.width) / 2, x1 = v.x - (side * v.width) / 2;
  return [x0, u.y, x0 + 12 * side, u.y - up, x1 - 12 * side, v.y - up, x1, v.y];
}

function roundEven(x) { // Python's round
  const r = Math.round(x);
  return Math.abs(x % 1) === 0.5 && r % 2 ? r - 1 : r;
}

function bezier(p, t) {
  const s = 1 - t, a = s * s * s, b = 3 * s * s * t, c = 3 * s * t * t, d = t * t * t;
  return [a * p[0] + b * p[2] + c * p[4] + d * p[6], a * p[1] + b * p[3] + c * p[5] + d * p[7]];
}

// The scale at which the widest name of a head fits its column, and letters their box.
function leastScale(layout, letters) { return Math.min(1, Math.max(letters / (0.96 * layout.column), (FONT + 2) / layout.tall)); }

// As much of a name as fits.
function fitted(c, text, width) {
  const letters = [...text], cut = () => `${letters.join("")}…`;
  if (c.measureText(text).width <= width) return text;
  while (letters.length && c.measureText(cut()).width > width) letters.pop();
  return letters.length ? cut() : "";
}

function isDark(el) {
  const jupyter = document.body.dataset.jpThemeLight;
  if (jupyter) return jupyter === "false";
  if (el.closest(".dark, .dark-theme, [data-theme=dark]")) return true;
  if (el.closest(".light, .light-theme, [data-theme=light]")) return false;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// Heads and MLP of a layer.
function layerOf(a, layer) { return [...Array.from({ length: a.n_heads }, (_, h) => `a${layer}.h${h}`), `m${layer}`]; }

// What can be unfolded: layers in a row that are left out altogether, and layers of which a part is.
function foldsOf({ layout, data, unfolded, byPosition }) {
  const a = data.architecture, out = [], gaps = new Map(), ys = [...layout.rows];
  for (let layer = 0; layer < a.n_layers; layer++) {
    const missing = layerOf(a, layer).filter((id) => !layout.box[id]).length, y = layout.rows.get(layer);
    if (y === undefined) {
      const above = ys.find(([n]) => n > layer), key = above ? above[0] : a.n_layers;
      gaps.set(key, [...(gaps.get(key) || []), layer]);
    } else if (!byPosition && (missing || unfolded.has(layer))) {
      const words = missing ? `layer ${layer}: ${missing} of ${a.n_heads + 1} components are folded; click to unfold` : `layer ${layer}: click to fold what carries nothing`;
      out.push({ row: layer, y, layers: [layer], sign: missing ? "+" : "−", words });
    }
  }
  for (const [above, layers] of gaps) {
    const under = layout.rows.get(layers[0] - 1) ?? layout.inputY;
    const y = layout.rows.has(above) ? layout.rows.get(above) + layout.pitch / 2 : under - layout.pitch / 2;
    const words = `layers ${layers[0]} to ${layers.at(-1)} are folded: no drawn edge touches them`;
    out.push({ y, layers, fixed: byPosition, words: byPosition ? words : `${words}; click to unfold` });
  }
  return out;
}

class GraphView {
  // `link`: the name under which a page's address holds the state; null in a notebook.
  constructor(el, data, model, link = null) {
    Object.assign(this, { el, data, model, link, panes: data.panes, at: null, prompt: 0, hover: null, sums: [], clicked: [new Set(), new Set()] });
    const a = data.architecture;
    this.nodeRow = Object.fromEntries(data.writers.map((id, i) => [id, i]));
    this.known = new Set([...data.writers, ...data.readers].map(boxOf));
    this.readers = ["q", "k", "v", "mlp", "logits"];
    // What carries nothing is drawn, too, where there is room.
    this.first = { all: a.n_layers * (a.n_heads + 1) <= data.layout.crowded };
    this.view = { k: 1, x: 0, y: 0 };
    this.stop = new AbortController();
    this.list = new List(this);
    restoreState(this, (link && readLink(link)) || data.state);
    if (model) this.fromModel();
    this.build();
    this.refilter();
    this.remembered = JSON.stringify(stateOf(this));
    if (this.remembered !== "{}") this.syncTraits();
  }

  fromModel() {
    const saved = this.model.get("state");
    if (isRecord(saved) && Object.keys(saved).length) restoreState(this, saved);
    if (this.model.get("selected").length) this.selected = new Set(this.model.get("selected"));
    if (this.model.get("selected_edge").length) this.selectedEdge = this.model.get("selected_edge");
    this.changedOnly ||= this.model.get("changed_only");
    this.threshold = this.model.get("threshold") ?? this.threshold;
  }

  // Of an edge in a pane; a sum's, too.
  score(i, p) { return i < this.order.length ? this.scores(p)[i] : this.sums[i - this.order.length].scores[p]; }

  scores(p) { return this.byPosition ? this.values : this.at === null ? this.data.edges.scores[p] : this.data.positions.scores[this.at]; }

  // What may be drawn: every edge, or every edge at every token position.
  index() {
    const d = this.data, e = d.edges, places = this.byPosition ? d.positions.scores : [e.source], suffix = [];
    Object.assign(this, { edge: [], values: [] });
    places.forEach((scores, p) => scores.forEach((score, i) => {
      if (this.byPosition && !score) return;
      this.edge.push(i);
      this.values.push(score);
      suffix.push(this.byPosition ? `@${p}` : "");
    }));
    const n = this.edge.length, scores = this.panes.map((_, p) => this.scores(p));
    this.strength = new Float64Array(n);
    this.largest = 0;
    for (let i = 0; i < n; i++) {
      for (const s of scores) this.strength[i] = Math.max(this.strength[i], Math.abs(s[i]));
      this.largest = Math.max(this.largest, this.strength[i]);
    }
    this.order = Array.from({ length: n }, (_, i) => i).sort((a, b) => this.strength[b] - this.strength[a]);
    this.low = Math.max(n ? this.strength[this.order[n - 1]] : 0, this.largest * 1e-5) || 1e-9;
    this.source = this.edge.map((i, k) => d.writers[e.source[i]] + suffix[k]);
    this.target = this.edge.map((i, k) => d.readers[e.target[i]] + suffix[k]);
    this.kind = this.target.map((id) => readerOf(id) || (componentOf(id) === "logits" ? "logits" : "mlp"));
    this.first.threshold = this.atRank(this.byPosition ? Math.min(d.top, d.layout.position_top) : d.top);
  }

  // The names of the columns: the tokens of all prompts, or of one.
  tokens() {
    const { tokens } = this.data.positions, own = this.data.prompts?.[this.tokensOf]?.tokens;
    return own ? tokens.map((_, p) => own[p] ?? "") : tokens;
  }

  tokenOf(id) {
    const p = this.byPosition ? positionOf(id) : null;
    return p === null ? "" : plainToken(this.tokens()[p]);
  }

  // Boxes of the edges above the threshold, whatever else hides them: filters do not move anything.
  arrange() {
    const shown = this.all && !this.byPosition ? null : new Set([...this.selected].filter((id) => !this.byPosition || positionOf(id) !== null).map((id) => (this.byPosition ? id : componentOf(id))));
    if (shown) for (const i of this.order.slice(0, this.rank(this.threshold))) shown.add(boxOf(this.source[i])).add(boxOf(this.target[i]));
    if (shown && !this.byPosition) for (const layer of this.unfolded) for (const id of layerOf(this.data.architecture, layer)) shown.add(id);
    for (const name of this.closed) if (!Object.hasOwn(this.groups, name)) this.closed.delete(name);
    const closed = [...this.closed].map((name) => [name, this.groups[name]]);
    const key = JSON.stringify([shown && [...shown].sort(), closed, this.byPosition, this.tokensOf]);
    if (key === this.arranged) return;
    this.arranged = key;
    const { architecture, layout } = this.data;
    this.inside = insideOfGroups(this);
    this.layout = this.byPosition ? placeByPosition(architecture, layout, shown, this.tokens(), this.inside) : place(architecture, layout, shown);
    this.folds = this.all && !this.byPosition ? [] : foldsOf(this);
    if (!this.byPosition) closeBoxes(this.layout, this.inside, architecture.parallel);
    this.boxes = this.layout.boxes;
    this.curves = new Array(this.order.length);
    if (!this.layout.box[this.focus]) this.focus = null;
  }

  // The edges that a drawn line stands for, strongest first.
  parts(i) { return i < this.order.length ? [i] : this.sums[i - this.order.length].edges; }

  // The box that stands for a component, and the components that a box stands for: those that were
  // grouped, and with the keys and values that only they read.
  boxIn(id) { return this.inside.get(id) ?? id; }

  membersOf(id) {
    const ids = isGroup(id) ? this.groups[id.slice(GROUP.length)] || [] : [id];
    return this.byPosition ? ids : [...new Set(ids.map(componentOf))];
  }

  under(id) { return isGroup(id) ? [...this.inside].filter(([, group]) => group === id).map(([member]) => member) : this.meant([id]); }

  // The nodes that some names stand for in this layout: a component, for its nodes at all positions.
  meant(ids) {
    if (!this.byPosition) return [...new Set(ids.map(componentOf))];
    return ids.flatMap((id) => (positionOf(id) === null ? this.data.positions.tokens.map((_, p) => `${id}@${p}`) : [id]));
  }

  curve(i) {
    if (!this.curves[i]) {
      const p = curve(this.layout, this.source[i], this.target[i]);
      const line = new Float32Array(34);
      for (let t = 0; t <= 16; t++) line.set(bezier(p, t / 16), 2 * t);
      this.curves[i] = { p, line };
    }
    return this.curves[i];
  }

  atRank(k) {
    const n = this.order.length;
    return n ? this.strength[this.order[Math.max(0, Math.min(k, n) - 1)]] : 0;
  }

  rank(threshold) {
    let low = 0, high = this.order.length;
    while (low < high) {
      const mid = (low + high) >> 1;
      if (this.strength[this.order[mid]] >= threshold) low = mid + 1;
      else high = mid;
    }
    return low;
  }

  // ---- controls -------------------------------------------------------------------------------
  build() {
    const d = this.data;
    this.el.replaceChildren();
    this.root = make("div", { class: "mg" });
    const head = make("div", { class: "head" }, make("span", { class: "title", text: d.title }));
    for (const fact of d.facts || []) head.append(make("span", { class: "soft", text: fact }));
    this.panesEl = make("div", { class: "panes" });
    this.canvases = this.panes.map((name, p) => this.pane(name, p));
    this.legend = make("div", { class: "legend" });
    this.detail = make("div", { class: "detail", "aria-live": "polite" });
    this.places = make("div", { class: "places", hidden: "" });
    this.places.addEventListener("mouseover", (event) => {
      const key = event.target.closest("tr")?.dataset.key;
      this.point(key ? { box: key } : null);
    });
    this.places.addEventListener("mouseleave", () => this.point(null));
    this.tip = make("div", { class: "tip", hidden: "" });
    this.work = make("div", { class: `work listed${this.panes.length > 1 ? "" : " single"}` },
      this.panesEl, this.legend, this.places, this.detail, this.list.element);
    this.root.append(make("style", { text: CSS }), head, ...this.verdict(), this.controls(), this.work, footOf(this), this.tip);
    this.el.append(this.root);
    this.watch();
  }

  controls() {
    this.slider = make("input", {
      type: "range", min: 0, max: 1000, "aria-label": "threshold on |score|",
      oninput: () => this.setThreshold(this.largest * Math.pow(this.low / this.largest, 1 - this.slider.value / 1000)),
    });
    this.thresholdOut = make("output");
    this.topInput = make("input", {
      type: "number", min: 1, max: this.order.length, "aria-label": "strongest edges to draw",
      onchange: () => this.setThreshold(this.atRank(Number(this.topInput.value) || 1)),
    });
    this.countOut = make("output", { "aria-live": "polite", class: "count" });
    this.search = make("input", {
      type: "search", placeholder: "find, e.g. a2.h1 or m0 → m3", "aria-label": "find: the edges of what has this in its name, weights, tokens, class, group or note",
      oninput: () => { this.query = this.search.value.trim().toLowerCase(); this.refilter(); },
    });
    this.search.value = this.query;
    return make("div", { class: "bar" },
      make("label", {}, "|score| ≥", this.slider, this.thresholdOut),
      make("label", {}, "top", this.topInput), this.countOut,
      make("span", { class: "chips" }, "read as", ...this.readers.map((kind) => this.readerButton(kind))),
      ...this.toggles(), this.search,
      make("button", { type: "button", text: "reset view", "aria-label": "reset view (key 0)", onclick: () => this.resetView() }));
  }

  readerButton(kind) {
    const button = this.toggle(kind, this.kinds.has(kind), (on) => {
      this.kinds[on ? "add" : "delete"](kind);
      this.refilter();
    });
    button.shows = () => this.kinds.has(kind);
    return button;
  }

  // Buttons with two states; `shows` says which, after a state was restored.
  toggles() {
    const d = this.data, out = [], put = (text, name, act) => {
      const button = this.toggle(text, this[name], act ?? ((on) => { this[name] = on; this.refilter(); }));
      button.shows = () => this[name];
      out.push(button);
      return button;
    };
    if (d.edges.class) {
      this.changedButton = put("changed only", "changedOnly", (on) => {
        this.changedOnly = on;
        this.sync("changed_only", on);
        this.refilter();
      });
    }
    if (new Set(d.edges.in_circuit).size > 1) put("circuit only", "circuitOnly");
    if (d.positions) out.unshift(make("span", { class: "chips" }, ...[false, true].map((on) => this.layoutButton(on))));
    this.allButton = put("all components", "all");
    this.allButton.title = "off: layers and heads that no drawn edge touches are left out; press a layer's number to unfold it";
    out.push(this.toggle("list", true, (on) => {
      this.work.classList.toggle("listed", on);
      this.list.element.hidden = !on;
      this.draw();
    }));
    return out;
  }

  layoutButton(byPosition) {
    const button = make("button", { type: "button", text: byPosition ? "by position" : "by layer", "aria-pressed": String(this.byPosition === byPosition), onclick: () => this.setLayout(byPosition) });
    button.shows = () => this.byPosition === byPosition;
    return button;
  }

  pane(name, p) {
    const canvas = make("canvas", {
      tabindex: 0, role: "img",
      "aria-label": `Attribution graph${name ? ", " + name : ""}. Arrow keys move between components, Enter pins, u unfolds a layer, g closes or opens a group, plus and minus zoom, square brackets move the threshold, slash searches.`,
    });
    this.listen(canvas, p);
    this.panesEl.append(make("figure", {}, ...(name ? [make("figcaption", { text: name })] : []), canvas));
    return canvas;
  }

  watch() {
    const redraw = () => this.draw(); // which asks for the theme
    const signal = this.stop.signal;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw, { signal });
    const watcher = new MutationObserver(redraw);
    watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "data-theme"] });
    watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["class", "data-theme"] });
    const resize = new ResizeObserver(() => this.draw());
    resize.observe(this.panesEl);
    signal.addEventListener("abort", () => { watcher.disconnect(); resize.disconnect(); clearTimeout(this.writing); });
    if (!this.link) return;
    addEventListener("hashchange", () => { // only a link that somebody followed: `remember` makes no such event
      const state = readLink(this.link);
      if (state) this.restore(state);
    }, { signal });
  }

  restore(state) {
    restoreState(this, state);
    this.search.value = this.query;
    this.press();
    this.buildLegend();
    this.refilter();
    this.syncTraits();
  }

  // Buttons show what is.
  press() {
    for (const button of this.root.querySelectorAll(".bar button")) {
      if (button.shows) button.setAttribute("aria-pressed", String(button.shows()));
    }
  }

  // After a state was restored: what Python reads one by one.
  syncTraits() {
    if (!this.model) return;
    this.model.set("threshold", this.threshold === this.first.threshold ? null : this.threshold);
    this.model.set("changed_only", this.changedOnly);
    this.syncSelection();
  }

  // Soon: an address or a model that follows every move of a slider would be slow.
  remember() {
    clearTimeout(this.writing);
    this.writing = setTimeout(() => this.writeState(), 150);
  }

  writeState() {
    const state = stateOf(this), text = JSON.stringify(state);
    if (text === this.remembered) return;
    this.remembered = text;
    if (this.link) writeLink(this.link, state);
    this.sync("state", state);
  }

  toggle(text, on, act) {
    const button = make("button", { type: "button", text, "aria-pressed": String(on) });
    button.addEventListener("click", () => {
      const now = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(now));
      act(now);
    });
    return button;
  }

  verdict() {
    const { cad, comparison } = this.data, models = Object.entries(comparison || {});
    if (!cad && !models.length) return [];
    const parts = ["mass", "projected_share", "alignment", "outside"];
    const number = (x) => (typeof x === "number" ? x.toFixed(3).replace("-", "−") : "–");
    const rows = [["relative to the original", ...parts.map((p) => p.replace("_", " "))],
      ...models.map(([m, v]) => [m, ...parts.map((p) => number(v[p]))])];
    const words = cad ? [make("b", { text: `CAD: ${cad.verdict}. ` }), cad.sentence] : [];
    return [make("div", { class: "cad" }, ...words, ...(models.length ? [table(rows)] : []))];
  }

  buildLegend() {
    const d = this.data, ns = "http://www.w3.org/2000/svg";
    const swatch = (name) => {
      const svg = document.createElementNS(ns, "svg"), line = document.createElementNS(ns, "path");
      svg.setAttribute("width", 34); svg.setAttribute("height", 8);
      line.setAttribute("d", "M0 4H34"); line.setAttribute("stroke-width", 2.5);
      line.setAttribute("stroke", this.colour(name)); line.setAttribute("stroke-dasharray", d.styles[name][2]);
      svg.append(line);
      return svg;
    };
    this.legend.replaceChildren();
    if (d.edges.class) {
      for (const name of d.classes.filter((c) => c in d.counts)) {
        const n = d.counts[name];
        const button = this.toggle("", !this.hidden.has(name), (on) => {
          this.hidden[on ? "delete" : "add"](name);
          this.refilter();
        });
        button.append(swatch(name), `${d.meaning[name]} (${count(n)})`);
        this.legend.append(button);
      }
    } else {
      this.legend.append(make("span", {}, swatch("pos"), "supports the answer"), make("span", {}, swatch("neg"), "opposes it"));
    }
    for (const [, text] of this.meanings().filter(([name]) => !name)) this.legend.append(make("span", { text }));
  }

  widths() { return `Width: |score|, largest ${short(this.widest)} ${this.data.unit}`; }

  // Share of resamples whose circuit has an edge; of a sum, the largest; null where it is not known.
  frequency(i) {
    const { frequency } = this.data.edges;
    return frequency ? Math.max(...this.parts(i).map((k) => frequency[this.edge[k]])) : null;
  }

  // Style and words of what a picture's legend says.
  meanings() {
    const d = this.data;
    const classes = (d.classes || []).filter((c) => c in d.counts).map((c) => [c, `${d.meaning[c]} (${count(d.counts[c])})`]);
    const signs = [["pos", "supports the answer"], ["neg", "opposes it"]];
    const fades = d.edges.frequency ? [["", `Opacity: share of ${d.resamples} whose circuit has the edge`]] : [];
    const solid = classes.length && d.classes.some((c) => c in d.counts && d.fading.classes.includes(c)) ? [["", d.fading.note]] : [];
    return [...(d.edges.class ? classes : signs), ...solid, ["", this.widths()], ...fades, ...(this.byPosition ? [["", MOVES]] : [])];
  }

  // Notebooks render while detached and switch themes later: asked before every drawing.
  theme() {
    const dark = isDark(this.el);
    if (dark === this.dark) return;
    this.dark = dark;
    this.css = PALETTE[dark ? "dark" : "light"];
    this.root.classList.toggle("dark", dark);
    this.buildLegend();
  }

  colour(name) { return this.data.styles[name][this.dark ? 1 : 0]; }

  // A sum's class is that of the strongest of its edges.
  nameOf(i) {
    const d = this.data;
    return d.edges.class ? d.classes[d.edges.class[this.edge[this.parts(i)[0]]]] : this.score(i, 0) < 0 ? "neg" : "pos";
  }

  nodeRows(id) { return this.membersOf(id).map((member) => this.nodeRow[componentOf(member)]).filter((row) => row !== undefined); }

  // Of a component, at its position where it has one, or of all in a closed group; null for what does
  // not write.
  nodeScore(id, p) {
    const own = this.membersOf(id).map((member) => this.scoresAt(member, p)[this.nodeRow[componentOf(member)]]).filter((x) => x !== undefined);
    return own.length ? sum(own) : null;
  }

  scoresAt(id, p) { return this.byPosition && positionOf(id) !== null ? this.data.positions.nodes[positionOf(id)] : this.data.nodes.scores[p]; }

  // Classes of a box's components, strongest first.
  classesOf(id) {
    const d = this.data, size = (row) => Math.max(...d.nodes.scores.map((s) => Math.abs(s[row])));
    if (!d.nodes.class) return [];
    return this.nodeRows(id).sort((a, b) => size(b) - size(a)).map((row) => [d.classes[d.nodes.class[row]], d.writers[row]]);
  }

  classOf(id) { return this.classesOf(id)[0]?.[0]; }

  noteOn(id) { return [...new Set(this.membersOf(id).map((member) => this.notes[componentOf(member)]))].filter(Boolean).join("; "); }

  // What is pinned, by box.
  pins() {
    const closed = (id) => [...this.closed].find((name) => this.groups[name].includes(id));
    return [...new Set([...this.selected].map((id) => {
      if (!this.byPosition) return this.boxIn(componentOf(id));
      return closed(id) === undefined ? this.boxIn(id) : GROUP + closed(id);
    }))];
  }

  sync(name, value) {
    if (!this.model) return;
    this.model.set(name, value);
    this.model.save_changes();
  }

  setThreshold(value) {
    this.threshold = Math.min(value, this.largest);
    this.sync("threshold", this.threshold);
    this.refilter();
  }

  refilter() {
    const d = this.data, e = d.edges, finds = this.finder();
    const k = this.rank(this.threshold);
    this.arrange();
    this.kept = this.order.slice(0, k).filter((i) =>
      this.kinds.has(this.kind[i]) && (!this.circuitOnly || e.in_circuit[this.edge[i]]) &&
      (!e.class || (!this.hidden.has(this.nameOf(i)) && (!this.changedOnly || !["kept", "quiet"].includes(this.nameOf(i))))) &&
      finds(i));
    const widest = this.widest;
    this.drawn = sumEdges(this, this.kept);
    if (this.hover?.edge >= this.order.length || (this.hover?.box && !this.layout.box[this.hover.box])) this.hover = null; // sums are numbered anew
    if (widest !== undefined && widest !== this.widest && this.css) this.buildLegend();
    this.moves = movesOf(this);
    this.flow = this.lit = null;
    this.active = new Set(this.drawn.flatMap((i) => [boxOf(this.source[i]), boxOf(this.target[i])]));
    const span = Math.log(this.low / this.largest) || 1;
    this.slider.value = Math.round(1000 * (1 - Math.log(Math.max(this.threshold, this.low) / this.largest) / span));
    this.thresholdOut.textContent = short(this.threshold);
    if (document.activeElement !== this.topInput) this.topInput.value = k;
    this.topInput.max = this.order.length;
    this.allButton.hidden = this.byPosition;
    const left = this.byPosition ? 0 : d.total - this.order.length; // by `_strongest`: without a score, or beyond the limit
    const more = this.byPosition ? ", one at each position" : left ? `, without the weakest ${count(left)}` : "";
    const lines = this.sums.length ? `, as ${count(this.drawn.length)} lines` : "";
    this.countOut.textContent = `${count(this.kept.length)} of ${count(this.order.length + left)} edges${more}${lines}`;
    const edge = this.selectedEdge.length ? this.edgeIndex(this.selectedEdge) : undefined;
    this.selectedEdge = edge === undefined ? [] : [this.source[edge], this.target[edge]];
    this.list.stale = true;
    const grid = positionGrid(this);
    this.places.hidden = !grid.length;
    this.places.replaceChildren(...grid);
    this.showDetail();
    this.remember();
    this.draw();
  }

  // What can be found of a component: its names, weights, class, group, note and tokens; of a closed
  // group, its name and what can be found of its members.
  words(id) {
    if (isGroup(id)) return [id.toLowerCase(), ...this.membersOf(id).map((member) => this.words(member))].join(" ");
    const d = this.data, name = componentOf(id), row = this.nodeRow[name], prompts = d.prompts || [];
    const kind = d.nodes.class && row !== undefined ? d.classes[d.nodes.class[row]] : "";
    return [id, this.tokenOf(id), ...(d.weights[name] || []), kind, this.groupOf(id), this.notes[name], ...prompts.flatMap((p) => p.effects[name]?.tokens || [])].join(" ").toLowerCase();
  }

  matches(id) { return this.words(id).includes(this.query); }

  // Which edges the search shows: those of a component, or, with an arrow, from one to another.
  finder() {
    const found = new Map(), [from, to] = this.query.split(/→|->/).map((x) => x.trim());
    if (!this.query) return () => true;
    const has = (id, q) => {
      const key = `${q} ${id}`;
      if (!found.has(key)) found.set(key, id.includes(q) || this.words(this.boxIn(boxOf(id))).includes(q));
      return found.get(key);
    };
    if (to !== undefined) return (i) => has(this.source[i], from) && has(this.target[i], to);
    return (i) => has(this.source[i], from) || has(this.target[i], from) || (this.data.edges.class && this.nameOf(i).includes(from));
  }

  setPosition(p) {
    this.at = p === this.at ? null : p;
    this.index();
    this.threshold = this.first.threshold;
    this.buildLegend();
    this.refilter();
  }

  // Components by layer, or nodes by token position and layer.
  setLayout(byPosition) {
    if (byPosition === this.byPosition) return;
    Object.assign(this, { byPosition, at: null, focus: null, hover: null, selectedEdge: [], view: { k: 1, x: 0, y: 0 } });
    this.index();
    this.threshold = this.first.threshold;
    if (this.list.by >= this.list.head().length) Object.assign(this.list, { by: 1, up: false });
    this.press();
    this.buildLegend();
    this.refilter();
    this.syncTraits();
  }

  // ---- pins and groups ------------------------------------------------------------------------
  pin(ids) {
    this.selected = new Set(ids);
    this.selectedEdge = [];
    this.syncSelection();
    this.refilter();
  }

  // A name for some components; none: the group is dissolved.
  group(name, ids) {
    if (!name) return;
    for (const id of ids) this.ungroup(id);
    if (ids.length) this.groups[name] = ids;
    else delete this.groups[name];
    this.refilter();
  }

  ungroup(id) {
    for (const [name, members] of Object.entries(this.groups)) {
      const left = members.filter((x) => !covers(x, id) && !covers(id, x));
      if (left.length) this.groups[name] = left;
      else delete this.groups[name];
    }
  }

  // Draws a group as one node, or its members again.
  toggleGroup(name) {
    if (!Object.hasOwn(this.groups, name)) return;
    const open = this.closed.has(name), focus = this.focus;
    this.closed[open ? "delete" : "add"](name);
    if (open && focus === GROUP + name) [this.focus] = this.meant(this.groups[name]);
    if (!open && focus && this.groupOf(focus) === name) this.focus = GROUP + name;
    this.hover = null;
    this.tip.hidden = true;
    const focused = this.focus;
    this.refilter();
    if (this.layout.box[focused]) this.focus = focused;
    this.syncSelection();
  }

  groupOf(id) { return isGroup(id) ? id.slice(GROUP.length) : Object.keys(this.groups).find((name) => this.groups[name].some((member) => covers(member, id))); }

  groupScore(name) { return this.nodeScore(GROUP + name, 0) ?? 0; }

  // The drawn line of an edge: itself, or the sum that it is part of.
  edgeIndex([source, target]) {
    const is = (i) => this.source[i] === source && this.target[i] === target;
    return this.drawn.find((i) => is(i) || this.parts(i).some(is));
  }

  // ---- drawing --------------------------------------------------------------------------------
  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      if (!this.panesEl.clientWidth) { // detached or hidden: the observer of its size calls again,
        this.missed = (this.missed ?? 0) + 1; // but not if it is shown again before it has looked
        if (this.missed < 9) this.draw();
        return;
      }
      this.missed = 0;
      this.theme();
      this.fitPanes();
      this.light();
      if (this.list.stale) this.list.render();
      else this.list.mark();
      this.list.stale = false;
      this.canvases.forEach((_, p) => this.paint(p));
    });
  }

  // What is lit: the paths through what is pointed at, or else through what is pinned.
  light() {
    const { hover } = this, edge = this.selectedEdge.length ? this.edgeIndex(this.selectedEdge) : undefined;
    if (hover?.box) this.lit = pathsThrough(this, [hover.box]);
    else if (hover?.edge !== undefined) this.lit = pathsThrough(this, [], hover.edge);
    else if (this.focus) this.lit = pathsThrough(this, [this.focus]);
    else if (this.selected.size) this.lit = pathsThrough(this, this.pins());
    else this.lit = edge === undefined ? null : pathsThrough(this, [], edge);
  }

  // The smallest scale; panes that have no room for it wrap, and scroll.
  fitPanes() {
    const c = this.canvases[0].getContext("2d"), { layout } = this;
    c.save();
    c.font = `${FONT}px system-ui, sans-serif`;
    this.letters = c.measureText(layout.longest).width + 1.5;
    c.restore();
    this.least = leastScale(layout, this.letters);
    const across = evenly(this.panes.length, Math.floor((this.panesEl.clientWidth + 8) / (Math.ceil(layout.width * this.least) + 8)));
    this.panesEl.style.gridTemplateColumns = `repeat(${across},minmax(0,1fr))`;
  }

  paint(p) {
    const canvas = this.canvases[p], { layout, css, view } = this;
    const room = canvas.parentNode.clientWidth;
    this.fit = Math.max(this.least, Math.min(room / layout.width, 1.5, 760 / layout.height));
    const width = Math.max(room, Math.floor(layout.width * this.fit)), height = layout.height * this.fit;
    this.shift = Math.max(0, (width - layout.width * this.fit) / 2);
    const ratio = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    const c = canvas.getContext("2d"), z = this.fit * view.k;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = css.paper;
    c.fillRect(0, 0, width, height);
    c.setTransform(ratio * z, 0, 0, ratio * z, ratio * (this.shift + view.x), ratio * view.y);
    this.paintOn(c, p, z);
  }

  // Onto any canvas whose unit is one of the layout's, `z` pixels wide.
  paintOn(c, p, z) {
    const { css, layout } = this, thin = Math.max(1, 0.75 / z); // lines stay visible when zoomed out
    c.font = `${FONT / z}px system-ui, sans-serif`;
    c.textBaseline = "middle";
    c.textAlign = "left";
    c.fillStyle = css.soft;
    const each = Math.ceil((FONT + 2) / (layout.pitch * z)), open = new Map(this.folds.map((f) => [f.row, f]));
    [...layout.rows].forEach(([layer, y], i) => { if (i % each === 0) c.fillText(`L${layer}${open.get(layer)?.sign ?? ""}`, 6, y); });
    for (const fold of this.folds) if (fold.row === undefined) c.fillText(`⋮${fold.layers.length}`, 10, fold.y);
    if (this.byPosition) this.paintColumns(c, z);
    for (const box of this.boxes) if (!this.active.has(box.id)) this.paintBox(c, box, false, z, p);
    for (const i of this.backToFront(p)) {
      const { alpha, width, colour, dash } = this.look(i, p), at = this.curve(i).p;
      c.globalAlpha = alpha;
      c.strokeStyle = colour;
      c.lineWidth = width * thin;
      c.setLineDash(dash.map((x) => x * thin));
      c.beginPath();
      c.moveTo(at[0], at[1]);
      c.bezierCurveTo(at[2], at[3], at[4], at[5], at[6], at[7]);
      c.stroke();
    }
    c.setLineDash([]);
    c.globalAlpha = 1;
    for (const box of this.boxes) if (this.active.has(box.id)) this.paintBox(c, box, true, z, p);
    this.paintGroups(c, z);
  }

  // Tokens below, a line between columns, and what heads move from one to another.
  paintColumns(c, z) {
    const { css, layout } = this, { columns, axisY, constants } = layout;
    c.textAlign = "center";
    c.strokeStyle = css.faint;
    c.lineWidth = 1 / z;
    columns.forEach((column, k) => {
      c.fillStyle = css.ink;
      c.fillText(fitted(c, column.label, column.width + 0.8 * constants.column_gap), column.x, axisY);
      if (!k) return;
      c.beginPath();
      c.moveTo(column.x - column.width / 2 - constants.column_gap / 2, constants.top);
      c.lineTo(column.x - column.width / 2 - constants.column_gap / 2, axisY + 8);
      c.stroke();
    });
    c.strokeStyle = css.soft;
    c.setLineDash([1.5, 3]);
    c.lineWidth = Math.max(1, 0.75 / z);
    for (const move of this.moves) {
      const at = move.p;
      if (!at) continue;
      c.globalAlpha = this.moveAlpha(move);
      c.beginPath();
      c.moveTo(at[0], at[1]);
      c.bezierCurveTo(...at.slice(2));
      c.stroke();
    }
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  moveAlpha(move) { return !this.lit ? 0.55 : this.lit.moves.has(move) ? 1 : 0.06; }

  // The drawn edges: the strongest in front, and what is lit in front of all.
  backToFront() {
    const back = [...this.drawn].reverse(), level = (i) => this.lit.edges.get(i) || 0;
    return this.lit ? [0, 1, 2].flatMap((k) => back.filter((i) => level(i) === k)) : back;
  }

  // Whether something of such a class no longer carries in a pane; null: its class is no such.
  isGone(name, now, before, p) {
    const { classes, below } = this.data.fading;
    return classes.includes(name) ? p > 0 && now * before < below * before * before : null;
  }

  // How an edge is drawn in a pane.
  look(i, p) {
    const share = Math.sqrt(Math.abs(this.score(i, p)) / this.widest), name = this.nameOf(i), hot = this.hover?.edge === i;
    const weakest = 0.25 + 0.45 * Math.min(1, 40 / Math.max(this.drawn.length, 1)), often = this.frequency(i);
    const own = often === null ? weakest + (0.95 - weakest) * share : 0.12 + 0.83 * often;
    const level = this.lit ? this.lit.edges.get(i) || 0 : -1, gone = this.isGone(name, this.score(i, p), this.score(i, 0), p);
    return {
      alpha: hot ? 1 : level < 0 ? own * (gone ? this.data.fading.opacity : 1) : level === 2 ? Math.max(own, 0.8) : level === 1 ? Math.min(own, 0.55) : 0.06,
      width: 0.9 + 3.1 * share * share + (hot ? 2 : 0), colour: this.colour(name),
      dash: gone === false ? [] : this.data.styles[name][2].split(" ").filter(Boolean).map(Number),
    };
  }

  // A frame around each member of an open group, and the group's name over its first.
  paintGroups(c, z) {
    c.textAlign = "left";
    for (const [name, members] of Object.entries(this.groups)) {
      const boxes = this.boxes.filter((b) => members.some((member) => covers(member, b.id))).reverse();
      c.strokeStyle = c.fillStyle = this.css.accent;
      c.lineWidth = 1.5 / z;
      c.setLineDash([4 / z, 2 / z]);
      for (const b of boxes) {
        c.beginPath();
        c.roundRect(b.x - this.widthOf(b, z) / 2 - 3, b.y - b.height / 2 - 3, this.widthOf(b, z) + 6, b.height + 6, 7);
        c.stroke();
      }
      c.setLineDash([]);
      if (!boxes.length) continue;
      const [first] = boxes, x = Math.min(first.x - this.widthOf(first, z) / 2, this.layout.width - 2 - c.measureText(name).width);
      c.fillText(name, Math.max(2, x), first.y - first.height / 2 - 11 / z);
    }
  }

  paintBox(c, box, on, z, p) {
    const { css } = this, d = this.data, kind = on && this.classOf(box.id), several = box.kind === "group";
    const chosen = isPinned(this, box.id), found = this.query && this.matches(box.id);
    c.globalAlpha = this.lit && !this.lit.boxes.has(box.id) ? 0.3 : 1;
    let line = on ? css.soft : css.faint, dash = "";
    if (kind && kind !== d.classes[0]) {
      line = this.colour(kind);
      dash = this.isGone(kind, this.nodeScore(box.id, p), this.nodeScore(box.id, 0), p) === false ? "" : d.styles[kind][2];
    } else if (several) line = css.accent;
    const width = this.widthOf(box, z), x = box.x - width / 2, y = box.y - box.height / 2;
    if (several) { // one behind it
      c.beginPath();
      c.roundRect(x + 3, y - 3, width, box.height, 5);
      c.fillStyle = css.paper;
      c.strokeStyle = css.accent;
      c.lineWidth = 1 / Math.min(z, 1);
      c.fill();
      c.stroke();
    }
    c.beginPath();
    c.roundRect(x, y, width, box.height, box.kind === "kv" ? 2 : 5);
    if (box.kind === "kv") {
      c.fillStyle = on ? css.soft : css.faint;
      c.fill();
    } else if (on || several) {
      c.fillStyle = css.box;
      c.fill();
    }
    const hot = this.hover && this.hover.box === box.id, focus = this.focus === box.id;
    c.strokeStyle = chosen || hot || found || focus ? css.accent : line;
    c.lineWidth = (chosen ? 3 : hot || found || focus ? 2 : on && d.nodes.class ? 1.8 : 1) / Math.min(z, 1);
    c.setLineDash(chosen || hot || found || focus ? [] : dash.split(" ").filter(Boolean).map(Number));
    if (box.kind !== "kv" || chosen || hot) c.stroke();
    c.setLineDash([]);
    const label = several ? fitted(c, box.label, width - 6 / z) : box.label;
    if (label && c.measureText(label).width <= width) {
      c.fillStyle = on || chosen ? css.ink : css.soft;
      c.globalAlpha *= on || chosen ? 1 : 0.7;
      c.textAlign = "center";
      c.fillText(label, box.x, box.y + 0.5);
    }
    if (this.noteOn(box.id)) {
      c.beginPath();
      c.fillStyle = css.accent;
      c.arc(x + width, y, 3.5 / z, 0, 7);
      c.fill();
    }
    c.globalAlpha = 1;
  }

  // Wide enough for its name, where that leaves a gap to the next.
  widthOf(box, z) {
    if (box.kind === "group") return Math.min(box.width, box.wanted / z);
    return box.kind === "head" ? Math.max(box.width, Math.min(0.96 * this.layout.column, this.letters / z)) : box.width;
  }

  isSelectedEdge(i) { return this.selectedEdge[0] === this.source[i] && this.selectedEdge[1] === this.target[i]; }

  // ---- mouse and keyboard ---------------------------------------------------------------------
  toWorld(event, p) {
    const r = this.canvases[p].getBoundingClientRect(), z = this.fit * this.view.k;
    return [(event.clientX - r.left - this.shift - this.view.x) / z, (event.clientY - r.top - this.view.y) / z];
  }

  hit(event, p) {
    const [x, y] = this.toWorld(event, p), z = this.fit * this.view.k;
    const box = this.boxes.find((b) => Math.abs(x - b.x) <= this.widthOf(b, z) / 2 + 1 && Math.abs(y - b.y) <= b.height / 2 + (b.kind === "kv" ? 3 : 1));
    if (box) return { box: box.id };
    const fold = this.folds.find((f) => x < this.layout.constants.left - 2 && Math.abs(y - f.y) * z < 9);
    if (fold) return { fold };
    const column = this.layout.columns?.find((k) => y > this.layout.axisY - 9 && Math.abs(x - k.x) <= (k.width + this.layout.constants.column_gap) / 2);
    if (column) return { fold: { fixed: true, words: column.positions.map((p) => `${p}: ${plainToken(this.tokens()[p])}`).join(", ") } };
    let best = null, least = (6 / z) ** 2;
    for (const i of this.drawn) {
      const l = this.curve(i).line;
      for (let t = 0; t < 32; t += 2) {
        const dx = l[t + 2] - l[t], dy = l[t + 3] - l[t + 1], size = dx * dx + dy * dy || 1;
        const s = Math.max(0, Math.min(1, ((x - l[t]) * dx + (y - l[t + 1]) * dy) / size));
        const far = (x - l[t] - s * dx) ** 2 + (y - l[t + 1] - s * dy) ** 2;
        if (far < least) { least = far; best = i; }
      }
    }
    if (best !== null) return { edge: best };
    const move = this.moves.find(({ line }) => line.some(([a, b]) => Math.hypot(a - x, b - y) < 6 / z));
    return move ? { move } : null;
  }

  listen(canvas, p) {
    let start = null, moved = false;
    canvas.addEventListener("pointermove", (event) => {
      if (start) {
        const dx = event.clientX - start.x, dy = event.clientY - start.y;
        if (Math.hypot(dx, dy) > 3) moved = true;
        if (moved) { this.view.x = start.vx + dx; this.view.y = start.vy + dy; this.draw(); }
        return;
      }
      const hover = this.hit(event, p);
      canvas.classList.toggle("over", !!hover);
      this.point(hover);
      this.showTip(event);
    });
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; this.point(null); });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      start = { x: event.clientX, y: event.clientY, vx: this.view.x, vy: this.view.y };
      moved = false;
      if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (start && !moved) this.click(this.hit(event, p), event.shiftKey);
      start = null;
    });
    canvas.addEventListener("pointercancel", () => { start = null; });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && this.view.k === 1 && document.activeElement !== canvas) return; // let the page scroll
      event.preventDefault();
      const r = canvas.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 400), event.clientX - r.left, event.clientY - r.top);
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => {
      const group = this.groupOf(this.hit(event, p)?.box ?? "");
      if (group !== undefined) {
        this.selected = this.clicked[0]; // as before the two clicks
        return this.toggleGroup(group);
      }
      const r = canvas.getBoundingClientRect();
      this.zoom(1.8, event.clientX - r.left, event.clientY - r.top);
    });
    canvas.addEventListener("keydown", (event) => this.key(event, canvas));
  }

  // What the pointer is on, in the graph or in the list.
  point(hit) {
    const was = this.hover;
    this.hover = hit;
    if (hit?.box !== was?.box || hit?.edge !== was?.edge || hit?.move !== was?.move) this.draw();
  }

  // Unfold a layer, or some in a row; or fold it again.
  fold(layers) {
    const open = layers.every((n) => this.unfolded.has(n));
    for (const n of layers) this.unfolded[open ? "delete" : "add"](n);
    this.refilter();
  }

  zoom(by, x, y) {
    const k = Math.max(0.5, Math.min(12, this.view.k * by)), f = k / this.view.k;
    x -= this.shift; // what lies under the pointer stays there
    this.view = { k, x: x - (x - this.view.x) * f, y: y - (y - this.view.y) * f };
    this.draw();
  }

  resetView() { this.view = { k: 1, x: 0, y: 0 }; this.draw(); }

  key(event, canvas) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) this.moveFocus(step);
    else if (event.key === "Enter" || event.key === " ") this.click(this.focus ? { box: this.focus } : null, event.shiftKey);
    else if (event.key === "Escape") this.click(null);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25, canvas.clientWidth / 2, canvas.clientHeight / 2);
    else if (event.key === "-") this.zoom(0.8, canvas.clientWidth / 2, canvas.clientHeight / 2);
    else if (event.key === "0") this.resetView();
    else if (event.key === "[" || event.key === "]") {
      this.slider.value = Number(this.slider.value) + (event.key === "[" ? -20 : 20);
      this.slider.dispatchEvent(new Event("input"));
    } else if (event.key === "/") this.search.focus();
    else if (event.key === "u" && !this.byPosition && this.focus?.match(/^[am]\d/)) this.fold([Number(this.focus.match(/\d+/)[0])]);
    else if (event.key === "g") {
      const at = this.focus ? [this.focus] : this.hover?.box ? [this.hover.box] : this.pins();
      for (const name of new Set(at.map((id) => this.groupOf(id)))) if (name !== undefined) this.toggleGroup(name);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  moveFocus([dx, dy]) {
    const from = this.layout.box[this.focus || this.pins()[0]] || this.layout.box.input || this.boxes[0];
    const ahead = this.boxes.filter((b) => b.kind !== "kv" && b.id !== from.id && (dx ? dx * (b.x - from.x) > 4 && Math.abs(b.y - from.y) < this.layout.pitch * 0.6 : dy * (b.y - from.y) > 4));
    const far = (b) => (dx ? Math.abs(b.x - from.x) + 3 * Math.abs(b.y - from.y) : 3 * Math.abs(b.y - from.y) + Math.abs(b.x - from.x));
    const next = ahead.sort((a, b) => far(a) - far(b))[0];
    if (next) this.focus = next.id;
    this.showDetail(this.focus);
    this.draw();
  }

  click(hit, add = false) {
    if (hit?.fold) return hit.fold.fixed ? null : this.fold(hit.fold.layers);
    if (hit?.move) return null;
    this.clicked = [this.clicked.at(-1), new Set(this.selected)];
    if (hit && hit.box) {
      const members = this.membersOf(hit.box), had = isPinned(this, hit.box);
      if (!add) this.selected.clear();
      for (const id of had ? [...this.selected] : []) if (members.some((own) => covers(own, id) || covers(id, own))) this.selected.delete(id);
      for (const id of had ? [] : members) this.selected.add(id);
      this.selectedEdge = [];
    } else if (hit) {
      this.selected.clear();
      this.selectedEdge = this.isSelectedEdge(hit.edge) ? [] : [this.source[hit.edge], this.target[hit.edge]];
    } else {
      this.selected.clear();
      this.selectedEdge = [];
    }
    this.focus = null;
    this.syncSelection();
    this.showDetail();
    this.remember();
    this.draw();
  }

  syncSelection() {
    if (!this.model) return;
    this.model.set("selected", [...this.selected]);
    this.model.set("selected_edge", this.selectedEdge);
    this.model.save_changes();
  }

  // ---- words ----------------------------------------------------------------------------------
  paneNames() { return this.panes.map((name) => name || "score"); }

  edgeRows(list) {
    const e = this.data.edges;
    return list.map((i) => [nameLine(this, i), ...this.panes.map((_, p) => fmt(this.score(i, p))), ...(e.class ? [this.nameOf(i)] : [])]);
  }

  // `full`: its card, else its tip.
  describeBox(id, full) {
    const d = this.data, out = [make("b", { text: id })], names = this.classesOf(id), is = (box) => box === id || (!isGroup(id) && covers(id, box));
    const into = this.drawn.filter((i) => is(boxOf(this.target[i]))), from = this.drawn.filter((i) => is(boxOf(this.source[i])));
    if (this.tokenOf(id)) out.push(` at “${this.tokenOf(id)}”`);
    const [ins, outs] = [into, from].map((lines) => sum(lines.map((i) => this.parts(i).length)));
    out.push(make("span", { class: "soft", text: `  ${ins} edge${ins === 1 ? "" : "s"} in, ${outs} out, as drawn` }));
    if (isGroup(id)) out.push(make("div", { class: "soft", text: `${this.membersOf(id).length} components: ${this.membersOf(id).join(", ")}` }));
    if (names.length || this.nodeScore(id, 0) !== null) {
      const values = this.panes.map((_, p) => this.nodeScore(id, p)), more = isGroup(id) ? this.within(id) : [];
      const left = this.panes.length > 1 ? ["left", ...values.map((v) => (values[0] ? `${Math.round((100 * v) / values[0])}%`.replace("-", "−") : "–"))] : null;
      out.push(table([["", ...this.paneNames()], ["node score", ...values.map(fmt)], ...(left ? [left] : []), ...more]));
      if (names.length > 1) out.push(make("div", { class: "soft", text: mixture(names.map(([name]) => name), "components", names[0][1]) }));
      else if (names.length && names[0][0] !== "quiet") out.push(make("div", { class: "soft", text: d.meaning[names[0][0]] }));
    }
    out.push(...roleOf(this, id, full));
    const weights = d.weights[componentOf(id)] || [];
    if (weights.length) out.push(make("div", { class: "mono soft" }, ...weights.flatMap((w) => [w, make("br")])));
    if (!full) return out;
    const heads = ["", ...this.paneNames(), ...(d.edges.class ? ["became"] : [])];
    const cols = [["strongest in", into], ["strongest out", from]].filter(([, list]) => list.length)
      .map(([title, list]) => make("div", {}, table([[title, ...heads.slice(1)], ...this.edgeRows(list.slice(0, 8))])));
    const note = isGroup(id) ? [] : [noteField(this, id)];
    return [make("div", { class: "part" }, make("div", { class: "cols" }, make("div", {}, ...out, ...note), ...cols), ...insideOf(this, id))];
  }

  // A row for the edges within a closed group, if any reaches the threshold: its node score counts them.
  within(id) {
    const own = this.kept.filter((i) => this.boxIn(boxOf(this.source[i])) === id && this.boxIn(boxOf(this.target[i])) === id);
    return own.length ? [[`of it within (${count(own.length)})`, ...this.panes.map((_, p) => fmt(sum(own.map((i) => this.scores(p)[i]))))]] : [];
  }

  describeEdge(i, full) {
    const e = this.data.edges, heads = ["", ...this.paneNames(), ...(e.class ? ["became"] : [])];
    if (i < this.order.length) {
      const place = make("div", { class: "soft", text: e.in_circuit[this.edge[i]] ? "in the circuit" : "outside the circuit" });
      return [table([heads, ...this.edgeRows([i])]), place, ...heldWords(this, i)];
    }
    const parts = full ? [table([["strongest of them", ...heads.slice(1)], ...this.edgeRows(this.parts(i).slice(0, 8))])] : [];
    return [table([heads, ...this.edgeRows([i])]), make("div", { class: "soft", text: sumWords(this, i) }), ...parts];
  }

  showTip(event) {
    const { hover, tip } = this;
    tip.hidden = !hover;
    if (!hover) return;
    tip.replaceChildren(...(hover.fold ? [hover.fold.words] : hover.move ? [moveWords(this, hover.move)] : hover.box ? this.describeBox(hover.box, false) : this.describeEdge(hover.edge)));
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 6))}px`;
    tip.style.top = `${event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16}px`;
  }

  showDetail(id) {
    const edge = this.selectedEdge.length ? this.edgeIndex(this.selectedEdge) : undefined;
    const ids = id ? [id] : this.pins();
    const hint = "Point at a component or an edge to see its paths; click to pin it (shift-click adds). Drag to move, double-click, + and − to zoom; arrows and Enter work too."
      + (Object.keys(this.groups).length ? " Double-click or g on a group closes and opens it." : "");
    this.detail.replaceChildren(...pinBar(this), ...(ids.length ? ids.slice(0, 4).flatMap((x) => this.describeBox(x, true))
      : edge !== undefined ? this.describeEdge(edge, true) : [make("span", { class: "soft", text: hint })]));
  }

  close() { this.stop.abort(); cancelAnimationFrame(this.pending); }
}

export function mount(el, data, model = null, link = null) {
  try {
    return new GraphView(el, data, model, link);
  } catch (error) { // a picture that fails must not take the page with it
    el.textContent = `This graph cannot be drawn: ${error.message}`;
    return null;
  }
}

export default {
  render({ model, el }) {
    const view = mount(el, model.get("data"), model);
    if (!view) return;
    const on = (name, act) => { model.on(`change:${name}`, act); return () => model.off(`change:${name}`, act); };
    const off = [
      on("state", () => {
        if (JSON.stringify(model.get("state")) !== view.remembered) view.restore(model.get("state"));
      }),
      on("selected", () => { view.selected = new Set(model.get("selected")); view.refilter(); }),
      on("selected_edge", () => { view.selectedEdge = model.get("selected_edge"); view.showDetail(); view.draw(); }),
      on("threshold", () => { if (model.get("threshold") !== null) { view.threshold = model.get("threshold"); view.refilter(); } }),
      on("changed_only", () => {
        view.changedOnly = model.get("changed_only");
        view.changedButton?.setAttribute("aria-pressed", String(view.changedOnly));
        view.refilter();
      }),
    ];
    return () => { off.forEach((f) => f()); view.close(); };
  },
};
