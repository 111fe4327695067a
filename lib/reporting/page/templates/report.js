"use strict";
// Tables that sort, search and turn pages, rows and trees that open. All texts are set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function intervalDrawing(value, low, high) {
  const clip = (share) => Math.min(1, Math.max(0, share)) * 90;
  const svg = document.createElementNS(SVG, "svg");
  const part = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, text] of Object.entries(attributes)) made.setAttribute(key, text);
    svg.append(made);
  };
  for (const [key, text] of Object.entries({ class: "interval", viewBox: "0 0 90 10", width: 90, height: 10, "aria-hidden": "true" })) svg.setAttribute(key, text);
  part("path", { class: "axis", d: "M0 5h90" });
  if (low !== undefined && low !== null) part("path", { class: "range", d: `M${clip(low)} 5H${clip(high)}` });
  part("circle", { cx: clip(value), cy: 5, r: 3 });
  return svg;
}

const modelText = (text) => (text ? element("code", { class: "model" }, text) : element("span", { class: "quiet" }, "(empty)"));

/** The content of one cell, by the kind of its column. */
function cellContent(kind, value) {
  if (kind === "number") return [value[0]];
  if (kind === "rate") return value[1] === null ? [value[0]] : [value[0], intervalDrawing(value[1], value[2], value[3])];
  if (kind === "model") return [modelText(value)];
  if (kind === "neuron") return [element("button", { type: "button", class: "link", onclick: () => showNeuron(value) }, value)];
  return [value];
}

const sortKey = (value) => (Array.isArray(value) ? value[1] : value);
const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b));
}

class Grid {
  constructor(root) {
    this.root = root;
    this.name = root.dataset.grid;
    this.content = data.grids[this.name];
    this.table = root.querySelector("table");
    this.body = this.table.tBodies[0];
    this.order = this.content.rows.map((_, number) => number);
    this.page = 0;
    this.opened = new Set();
    this.sortedBy = null;
    this.makeHeads();
    if (this.content.rows.length > 5) this.makeTools();
    const rest = root.querySelector(".rest");
    if (rest) rest.remove();
    this.draw();
  }

  makeHeads() {
    this.heads = [...this.table.tHead.rows[0].cells];
    this.heads.forEach((head, column) => {
      const button = element("button", { type: "button", onclick: () => this.sort(column) }, head.textContent);
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
    });
  }

  makeTools() {
    this.query = element("input", { type: "search", autocomplete: "off", oninput: () => this.filter() });
    this.status = element("output", { "aria-live": "polite" });
    this.back = element("button", { type: "button", onclick: () => this.turn(-1) }, "Previous");
    this.next = element("button", { type: "button", onclick: () => this.turn(1) }, "Next");
    const tools = element("div", { class: "tools" }, element("label", {}, "Search ", this.query), this.status);
    if (this.content.rows.length > this.content.shown) tools.append(this.back, this.next);
    this.root.prepend(tools);
  }

  texts() {
    this.searchable ??= this.content.rows.map((row) => row.map((value) => (Array.isArray(value) ? value[0] : value)).join("\n").toLowerCase());
    return this.searchable;
  }

  filter() {
    const words = this.query ? this.query.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    const texts = words.length ? this.texts() : [];
    this.order = this.content.rows.map((_, number) => number).filter((number) => words.every((word) => texts[number].includes(word)));
    this.page = 0;
    this.arrange();
    this.draw();
  }

  sort(column) {
    const numeric = this.content.columns[column].kind === "number" || this.content.columns[column].kind === "rate";
    const first = numeric ? "descending" : "ascending";
    const again = this.sortedBy !== null && this.sortedBy.column === column;
    const direction = !again ? first : this.sortedBy.direction === "ascending" ? "descending" : "ascending";
    this.sortedBy = { column, direction };
    this.heads.forEach((head, number) => head.setAttribute("aria-sort", number === column ? direction : "none"));
    this.page = 0;
    this.arrange();
    this.draw();
  }

  /** Sort the rows that match; equal ones keep the order of the file, and what is not there comes last. */
  arrange() {
    if (this.sortedBy === null) return;
    const { column, direction } = this.sortedBy;
    const sign = direction === "ascending" ? 1 : -1;
    const key = (number) => sortKey(this.content.rows[number][column]);
    this.order.sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === null || right === null) return (left === null) - (right === null) || a - b;
      return sign * compare(left, right) || a - b;
    });
  }

  turn(by) {
    this.page += by;
    this.draw();
  }

  draw() {
    const { shown, noun } = this.content;
    const start = this.page * shown;
    const visible = this.order.slice(start, start + shown);
    this.body.replaceChildren(...visible.flatMap((number) => this.row(number)));
    if (!this.status) return;
    const many = this.order.length === 1 ? noun : `${noun}s`;
    const range = visible.length < this.order.length ? `${start + 1} to ${start + visible.length} of ` : "";
    this.status.textContent = `${range}${this.order.length.toLocaleString("en")} ${many}`;
    this.back.disabled = this.page === 0;
    this.next.disabled = start + shown >= this.order.length;
  }

  row(number) {
    const values = this.content.rows[number];
    const cells = this.content.columns.map(({ kind }, column) => {
      const content = column === 0 && this.content.opens ? [this.opener(number)] : cellContent(kind, values[column]);
      return element(column === 0 ? "th" : "td", { class: kind, scope: column === 0 ? "row" : null }, ...content);
    });
    const made = element("tr", { "data-row": number }, ...cells);
    return this.opened.has(number) ? [made, this.detail(number)] : [made];
  }

  detail(number) {
    const cell = element("td", { colspan: this.content.columns.length }, neuronDetail(this.content.rows[number][0]));
    return element("tr", { class: "detail", id: `detail-${this.name}-${number}` }, cell);
  }

  opener(number) {
    const open = this.opened.has(number);
    const attributes = { type: "button", class: "link", "aria-expanded": String(open), "aria-controls": open ? `detail-${this.name}-${number}` : null };
    return element("button", { ...attributes, onclick: () => this.toggle(number) }, this.content.rows[number][0]);
  }

  toggle(number) {
    if (!this.opened.delete(number)) this.opened.add(number);
    this.draw();
    const button = this.body.querySelector(`[data-row="${number}"] button`);
    if (button) button.focus({ preventScroll: true });
  }

  /** Open the row that starts with a name, on whichever page it is. */
  show(name) {
    const number = this.content.rows.findIndex((row) => row[0] === name);
    if (number < 0) return false;
    if (!this.order.includes(number)) {
      this.query.value = "";
      this.filter();
    }
    this.page = Math.floor(this.order.indexOf(number) / this.content.shown);
    this.opened.add(number);
    this.draw();
    const row = this.body.querySelector(`[data-row="${number}"]`);
    row.scrollIntoView({ block: "center" });
    row.querySelector("button").focus({ preventScroll: true });
    return true;
  }
}

// ------------------------------------------------------------ what opens under a neuron

function plainTable(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
  const table = element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" }, table);
}

function neuronDetail(name) {
  const found = data.neurons.neurons[name];
  const block = element("div");
  if (!found) return element("p", {}, "Nothing more is recorded.");
  if (found.rules.length) {
    const rows = found.rules.map(([scope, verb, rule, mcc, precision, recall, coverage, speaks]) => [
      scope, verb, modelText(rule), mcc[0], precision[0], recall[0], coverage[0], speaks]);
    const heads = ["scope", "ablation makes the model", "when", "MCC", "precision", "recall", "coverage", "speaks for the neuron"];
    block.append(plainTable(`All rules of ${name}`, heads, rows));
  } else block.append(element("p", { class: "quiet" }, "No rule covers enough prompts."));
  const heads = ["prompt", "answer before", "answer after ablation", "behaviour", "rule fires", "prompt used for"];
  const rows = found.flips.map(([prompt, before, fires, after]) => {
    const [text, answer, role] = data.neurons.prompts[prompt];
    const known = (value) => (value === null ? "not recorded" : modelText(value));
    return [known(text), known(answer), known(after), before ? "lost" : "gained", fires === null ? "unknown" : fires ? "yes" : "no", role || "not recorded"];
  });
  const part = rows.length < found.n ? `${rows.length} of the ${found.n.toLocaleString("en")} prompts` : `The ${rows.length} prompts`;
  if (rows.length) block.append(plainTable(`${part} that ${name} flips, held-out ones first`, heads, rows));
  else block.append(element("p", { class: "quiet" }, "It flips none of the evaluated prompts."));
  return block;
}

const grids = {};

function showNeuron(name) {
  if (!grids.anchored || !grids.anchored.show(name)) return;
  history.replaceState(null, "", `#neuron=${encodeURIComponent(name)}`);
}

function followAddress() {
  const match = /^#neuron=(.+)$/.exec(location.hash);
  if (!match) return;
  try {
    showNeuron(decodeURIComponent(match[1]));
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
  }
}

// ------------------------------------------------------------ trees

const FATES = ["pruned", "split", "silent", "agonist"];
const AT_ONCE = 200;

class Tree {
  constructor(root) {
    this.root = root;
    this.nodes = data.trees[root.dataset.tree];
    this.children = this.nodes.map(() => []);
    this.leads = this.nodes.map(() => 0);
    this.roots = [];
    const path = [];
    this.nodes.forEach(([depth], number) => {
      path.length = depth;
      (depth ? this.children[path[depth - 1]] : this.roots).push(number);
      path.push(number);
      if (this.nodes[number][7] === 3) for (const above of path) this.leads[above] += 1;
    });
    const tools = element("div", { class: "tools" },
      element("button", { type: "button", onclick: () => this.openAgonists() }, "Open the paths to agonists"),
      element("button", { type: "button", onclick: () => this.start() }, "Close all"));
    this.list = element("ul");
    root.replaceChildren(tools, this.list);
    this.start();
  }

  start() {
    this.list.replaceChildren();
    this.fill(this.list, this.roots, 0);
  }

  fill(list, numbers, from) {
    list.append(...numbers.slice(from, from + AT_ONCE).map((number) => this.item(number)));
    const left = numbers.length - from - AT_ONCE;
    if (left <= 0) return;
    const more = element("li", {}, element("button", { type: "button", class: "plain", onclick: () => { more.remove(); this.fill(list, numbers, from + AT_ONCE); } }, `${left} more`));
    list.append(more);
  }

  item(number) {
    const [, label, size, k1, n1, k2, n2, fate] = this.nodes[number];
    const flips = n1 === null ? "" : `: flips ${k1 ?? "?"}/${n1} associated, ${k2 ?? "?"}/${n2 ?? "?"} unrelated`;
    const neurons = size === 1 ? "" : ` · ${size.toLocaleString("en")} neurons`;
    const leads = this.leads[number];
    const holds = size > 1 && leads ? ` · leads to ${leads} agonist${leads === 1 ? "" : "s"}` : "";
    const name = size === 1 && fate === 3 && grids.anchored ? element("button", { type: "button", class: "link", onclick: () => showNeuron(label) }, label) : element("code", {}, label);
    const text = [element("span", { class: `fate fate-${fate}` }, FATES[fate]), " ", name, `${neurons}${flips}${holds}`];
    if (!this.children[number].length) return element("li", {}, ...text);
    const list = element("ul");
    const details = element("details", {}, element("summary", {}, ...text), list);
    details.addEventListener("toggle", () => { if (details.open) this.grow(list, number); });
    details.grow = () => this.grow(list, number);
    return element("li", { "data-node": number }, details);
  }

  grow(list, number) {
    if (!list.childElementCount) this.fill(list, this.children[number], 0);
  }

  openAgonists() {
    this.start();
    let waiting = [...this.list.children];
    while (waiting.length) {
      const item = waiting.pop();
      const details = item.querySelector(":scope > details");
      if (!details || !this.leads[Number(item.dataset.node)]) continue;
      details.grow();
      details.open = true;
      waiting.push(...details.querySelector(":scope > ul").children);
    }
  }
}

// ------------------------------------------------------------ figures

function followPoints(id, points, output) {
  const svg = document.getElementById(id);
  if (!svg || !points.length) return;
  const nearest = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null;
    let least = 81;
    for (const point of points) {
      const distance = (point[1] - place.x) ** 2 + (point[2] - place.y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  };
  svg.addEventListener("mousemove", (event) => {
    const point = nearest(event);
    svg.style.cursor = point ? "pointer" : "";
    output.textContent = point ? `${point[0]}: click to see its rule and the prompts it flips` : "";
  });
  svg.addEventListener("click", (event) => { const point = nearest(event); if (point) showNeuron(point[0]); });
}

// ------------------------------------------------------------ start

for (const root of document.querySelectorAll("[data-grid]")) {
  if (data.grids[root.dataset.grid]) grids[root.dataset.grid] = new Grid(root);
}
for (const root of document.querySelectorAll("[data-tree]")) {
  // A closed circuit costs nothing: its tree is made when it is opened.
  const circuit = root.closest("details");
  const make = () => { if (circuit.open && !root.tree) root.tree = new Tree(root); };
  circuit.addEventListener("toggle", make);
}
followPoints("neuron-map", data.map, document.getElementById("map-output"));
followPoints("scope-scatter", data.scatter, document.getElementById("scatter-output"));
window.addEventListener("hashchange", followAddress);
// On paper nothing can be opened.
const closed = new Set();
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("main details:not([open])")) {
    if (details.closest(".tree")) continue;
    closed.add(details);
    details.open = true;
  }
});
window.addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
  closed.clear();
});
followAddress();
document.documentElement.dataset.ready = "yes";
