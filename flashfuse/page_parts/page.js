"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const svg = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

// ------------------------------------------------------------------------------------------------ theme and notes

const setTheme = (theme) => { document.documentElement.dataset.theme = theme; drawBlocks(); };
$("#theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("#notes").textContent = data.notes.join("\n");

// ------------------------------------------------------------------------------------------------ the list: refusals first

const order = data.sites.map((_, number) => number).sort((a, b) => data.sites[a].fused - data.sites[b].fused || a - b);
let filter = "all", chosen = -1;

const items = order.map((number) => {
  const site = data.sites[number];
  const mask = (site.facts.find(([word]) => word === "mask") || site.facts[0] || ["", ""])[1];
  const item = make("li", { className: site.fused ? "fused" : "left", onclick: () => choose(number) },
    make("span", { className: "mono", textContent: `[${number + 1}] ${site.where}` }),
    make("small", { textContent: site.fused ? mask : site.title }));
  item.dataset.number = number;
  item.dataset.text = [site.where, site.title, site.code, ...site.facts.flat()].join(" ").toLowerCase();
  return item;
});
$("#sites").append(...items);

const sift = () => {
  const words = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const item of items) {
    const wanted = (filter === "all" || item.className.includes(filter)) && words.every((word) => item.dataset.text.includes(word));
    item.hidden = !wanted;
    item.style.display = wanted ? "" : "none";
    shown += wanted;
  }
  $("#none").hidden = shown > 0;
};
$("#search").oninput = sift;
for (const button of document.querySelectorAll("#filters button")) {
  button.onclick = () => {
    filter = button.dataset.filter;
    for (const each of document.querySelectorAll("#filters button")) each.classList.toggle("on", each === button);
    sift();
  };
}

// ------------------------------------------------------------------------------------------------ one site

const choose = (number) => {
  chosen = number;
  for (const item of items) item.classList.toggle("on", +item.dataset.number === number);
  const site = data.sites[number];
  const facts = make("table", { className: "facts" });
  for (const [word, text] of site.facts) {
    facts.append(make("tr", {}, make("th", { textContent: word }), make("td", { className: "mono", textContent: text })));
  }
  const detail = $("#detail");
  detail.replaceChildren(
    make("h2", {}, make("span", { className: "badge" + (site.fused ? "" : " left"), textContent: site.fused ? "fused" : "left alone" }),
      ` ${site.where}`),
    make("div", { className: "mono", textContent: site.title }));
  if (site.code) detail.append(make("div", { className: "line mono", textContent: site.code, title: site.path }));
  detail.append(facts);
  if (site.map) {
    detail.append(make("h3", { textContent: "the mask in blocks: queries down, keys across" }), make("canvas", { id: "blocks" }), legend(site.map));
  }
  if (site.program) detail.append(make("h3", { textContent: "the program of one element" }), make("pre", { textContent: site.program }));
  if (site.kernel) {
    const pre = make("pre", { className: "kernel" });
    pre.innerHTML = data.kernels[site.kernel]; // made by flashfuse: escaped or coloured there
    detail.append(make("details", {}, make("summary", { textContent: "the generated kernel" }), pre));
  }
  drawBlocks();
  show(site.graph, stage, number);
};

const legend = (map) => make("div", { className: "legend" },
  `blocks of ${map.m} × ${map.n}`, make("i", { style: "background: none" }), "empty: skipped", swatch("--accent", .45), "partial: masked",
  swatch("--accent", 1), `full — ${Math.round(100 * map.skipped)}% skipped`);
const swatch = (colour, opacity) => make("i", { style: `background: var(${colour}); opacity: ${opacity}` });

const drawBlocks = () => {
  const canvas = $("#blocks");
  if (!canvas) return;
  const map = data.sites[chosen].map, high = map.rows.length, wide = map.rows[0].length;
  const cell = Math.max(2, Math.floor(288 / Math.max(high, wide)));
  [canvas.width, canvas.height] = [cell * wide, cell * high];
  const brush = canvas.getContext("2d");
  brush.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  map.rows.forEach((row, i) => [...row].forEach((state, j) => {
    if (state === "0") return;
    brush.globalAlpha = state === "1" ? .45 : 1;
    brush.fillRect(j * cell, i * cell, cell > 4 ? cell - 1 : cell, cell > 4 ? cell - 1 : cell);
  }));
};

// ------------------------------------------------------------------------------------------------ the graph

const STEP_X = 148, STEP_Y = 52, WIDE = 132, HIGH = 34, MARGIN = 26;
const canvas = $("#canvas");
let stage = "before", graph = 0, drawn = "", groups = [], view = { x: 0, y: 0, w: 800, h: 600 };

const clip = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

const draw = () => {
  const source = data.graphs[graph] && data.graphs[graph][stage];
  canvas.replaceChildren();
  $("#node").hidden = true;
  $("#modules").replaceChildren();
  groups = [];
  if (!source || !source.nodes.length) return;
  let top = 0;
  for (const [name, columns, rows] of source.groups) {
    groups.push({ name, x: 0, y: top, w: columns * STEP_X + 2 * MARGIN, h: rows * STEP_Y + MARGIN + 12 });
    top += groups.at(-1).h + 18;
  }
  const widest = Math.max(...groups.map((group) => group.w));
  for (const group of groups) group.x = (widest - group.w) / 2;
  const centre = source.nodes.map(([, , g, x, y]) => [
    groups[g].x + MARGIN + (x + .5) * STEP_X, groups[g].y + MARGIN + (y + .5) * STEP_Y]);
  const boxes = svg("g"), edges = svg("g"), nodes = svg("g");
  groups.forEach((group, number) => {
    boxes.append(svg("rect", { class: "group", x: group.x, y: group.y, width: group.w, height: group.h, rx: 8 }));
    const title = svg("text", { class: "module", x: group.x + 10, y: group.y + 18 });
    title.textContent = group.name;
    boxes.append(title);
    $("#modules").append(make("option", { value: number, textContent: group.name }));
  });
  source.nodes.forEach(([name, called, g, , , line, shape, inputs, site, role], number) => {
    const [x, y] = centre[number];
    for (const input of inputs) {
      const [a, b] = centre[input], start = b + HIGH / 2, end = y - HIGH / 2, bend = Math.max(16, Math.abs(end - start) / 2);
      const far = source.nodes[input][2] !== g ? " far" : "";
      edges.append(svg("path", { class: "edge" + far, d: `M${a} ${start}C${a} ${start + bend} ${x} ${end - bend} ${x} ${end}` }));
    }
    const box = svg("g", { class: `node ${role}`, transform: `translate(${x - WIDE / 2} ${y - HIGH / 2})`, "data-name": name },
      svg("rect", { width: WIDE, height: HIGH }));
    const first = svg("text", { x: WIDE / 2, y: 15 }), second = svg("text", { class: "called", x: WIDE / 2, y: 28 });
    first.textContent = clip(name, 19);
    second.textContent = clip(called, 24);
    box.append(first, second);
    box.onclick = (event) => { event.stopPropagation(); pick(box, source, number); };
    nodes.append(box);
  });
  canvas.append(boxes, edges, nodes);
};

const meaning = (role, site) => {
  if (role === "fused") return `part of attention [${site + 1}], which one kernel replaces`;
  if (role === "op") return `attention [${site + 1}]: ${data.sites[site].facts.slice(0, 2).map(([, text]) => text).join(";  ")}`;
  if (role === "refused") return `attention [${site + 1}] was left alone here: ${data.sites[site].title}`;
  return "";
};

const pick = (box, source, number) => {
  for (const each of canvas.querySelectorAll(".picked")) each.classList.remove("picked");
  box.classList.add("picked");
  const [name, called, g, , , line, shape, inputs, site, role] = source.nodes[number];
  const [place, code] = source.lines[line];
  const rows = [["node", `${name} = ${called}(${inputs.map((input) => source.nodes[input][0]).join(", ")})`], ["gives", shape],
    ["line", place && `${place}   ${code}`], ["module", source.groups[g][0]], ["meaning", meaning(role, site)]];
  const table = make("table", { className: "facts" });
  for (const [word, text] of rows) {
    if (text) table.append(make("tr", {}, make("th", { textContent: word }), make("td", { className: "mono", textContent: text })));
  }
  $("#node").replaceChildren(table);
  $("#node").hidden = false;
};

const look = (box) => {
  view = box;
  canvas.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
};
const whole = () => {
  if (!groups.length) return;
  const wide = Math.max(...groups.map((group) => group.x + group.w)), high = groups.at(-1).y + groups.at(-1).h;
  look({ x: -20, y: -20, w: wide + 40, h: high + 40 });
};
const goTo = (group) => look({ x: group.x - 30, y: group.y - 30, w: Math.max(group.w + 60, 560), h: Math.min(group.h + 60, 900) });

const show = (number, which, site) => {
  const key = `${number} ${which}`;
  [graph, stage] = [number, which];
  for (const button of document.querySelectorAll("#tools button[data-stage]")) button.classList.toggle("on", button.dataset.stage === which);
  if (drawn !== key) draw();
  drawn = key;
  const source = data.graphs[graph] && data.graphs[graph][stage];
  const node = source && source.nodes.filter((each) => each[8] === site).at(-1);
  if (node) {
    const group = groups[node[2]], y = group.y + MARGIN + node[4] * STEP_Y, x = group.x + MARGIN + (node[3] + .5) * STEP_X;
    $("#modules").value = node[2];
    look({ x: x - 330, y: Math.max(group.y - 20, y - 420), w: 660, h: 560 });
  } else whole();
};

for (const button of document.querySelectorAll("#tools button[data-stage]")) {
  button.onclick = () => show(graph, button.dataset.stage, chosen);
}
$("#modules").onchange = (event) => goTo(groups[event.target.value]);
$("#whole").onclick = whole;
canvas.onclick = () => { $("#node").hidden = true; };
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect(), factor = event.deltaY > 0 ? 1.15 : 1 / 1.15;
  const x = view.x + view.w * (event.clientX - box.left) / box.width, y = view.y + view.h * (event.clientY - box.top) / box.height;
  look({ x: x - (x - view.x) * factor, y: y - (y - view.y) * factor, w: view.w * factor, h: view.h * factor });
}, { passive: false });
let grabbed = null;
canvas.onpointerdown = (event) => { grabbed = { x: event.clientX, y: event.clientY, view }; };
window.addEventListener("pointermove", (event) => {
  if (!grabbed) return;
  const box = canvas.getBoundingClientRect(), scale = Math.max(grabbed.view.w / box.width, grabbed.view.h / box.height);
  look({ ...grabbed.view, x: grabbed.view.x - (event.clientX - grabbed.x) * scale, y: grabbed.view.y - (event.clientY - grabbed.y) * scale });
});
window.addEventListener("pointerup", () => { grabbed = null; });

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
if (order.length) choose(order[0]);
else show(0, "before", -1);
document.documentElement.dataset.ready = Math.round(performance.now());
