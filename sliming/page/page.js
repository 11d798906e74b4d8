"use strict";
// Everything that was read lies in `shown`; what is pointed at and chosen in `state`; draw() shows both.
const shown = JSON.parse(document.getElementById("shown").textContent);
const state = {question: 0, image: 0, layer: "relevance", gamma: 1,
               word: null, held: null,   // pointed at, clicked
               cell: null, place: null}; // pointed at, chosen by click or arrow keys
const $ = id => document.getElementById(id);

// ---- what travelled as bytes -----------------------------------------------------------------------
function bytes(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer);
}
const cosines = text => Float64Array.from(bytes(text, Int16Array), whole => whole / 32767);
for (const question of shown.questions)
  for (const image of question.images) {
    image.scores = bytes(image.scores, Float32Array);
    image.weights = bytes(image.weights, Float32Array);
    image.cosines = image.cosines.map(cosines);
    image.gates = image.gates.map(cosines);
    image.order = ranking(image.scores);
    image.rank = [];
    image.order.forEach((token, rank) => image.rank[token] = rank + 1);
    image.total = image.weights.reduce((sum, weight) => sum + weight, 0);
  }

// ---- the router's rule, as in router.py --------------------------------------------------------------
// Tokens from the best score to the worst; of equal ones the first comes first.
function ranking(scores) {
  return [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
}

// A token is kept if those before it hold at most gamma of the softmax mass. `weights` is the softmax without
// its denominator: float32 numbers that add exactly in float64.
function select(order, weights, gamma) {
  const kept = new Array(weights.length).fill(true);
  if (gamma === 1) return kept;
  const mass = [];
  order.reduce((sum, token, rank) => mass[rank] = sum + weights[token], 0);
  order.forEach((token, rank) => {
    kept[token] = !(mass[rank] - weights[token] > gamma * mass[mass.length - 1]);
  });
  return kept;
}

// ---- small helpers: text from outside only ever becomes text ---------------------------------------------
function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}
function fill(id, ...inside) { $(id).replaceChildren(...inside); }
function fixed(value, digits) {
  return Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–";
}
const percent = (value, digits = 0) => Number.isFinite(value) ? `${fixed(100 * value, digits)} %` : "–";
const count = value => value.toLocaleString("en");
const SHORT = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const bold = text => make("b", {}, text);

const STOPS = getComputedStyle(document.documentElement).getPropertyValue("--scale").split(",").map(
  stop => [1, 3, 5].map(at => parseInt(stop.trim().slice(at, at + 2), 16)));
function colour(value) {  // of 0 to 1, between the stops
  const at = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((part, i) => Math.round(part + (STOPS[low + 1][i] - part) * (at - low)));
}

// ---- what is chosen ---------------------------------------------------------------------------------------
const asked = () => shown.questions[state.question];
const routed = () => asked().images[state.image];
const seen = () => shown.images[state.image];
const word = () => state.layer === "gate" ? null : state.word ?? state.held;
const cell = () => state.cell ?? state.place;

// The cells of the layer: how many, their values, and what these are called.
function layer() {
  const [columns, rows] = seen().grid, {side, patches} = shown.model;
  if (state.layer === "gate") {
    const edge = Math.round(Math.sqrt(patches));
    return {across: edge, down: edge, values: routed().gates[0], name: "weight of the MLP"};
  }
  const values = word() === null ? routed().scores : routed().cosines[word()];
  let name = shown.model.score === "mean" ? "mean cosine with all words" : "sum of the cosines with all words";
  if (word() === null && shown.model.temperature !== 1) name += ` / ${shown.model.temperature}`;
  if (word() !== null) name = `cosine with “${asked().words[word()].trim()}”`;
  return {across: columns * side, down: rows * side, values, name};
}
function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}
// Of the colours: weights of a gate are shares, and look alike in every picture.
const ends = values => state.layer === "gate" ? [0, 1] : range(values);

// ---- the image and its layers -------------------------------------------------------------------------------
const LAYERS = {relevance: "Relevance", kept: "What is kept", crops: "Crops", gate: "Gate"};
const pictures = shown.images.map(image => Object.fromEntries(["canvas", "view"].map(kind => {
  const picture = new Image();
  picture.onload = () => { if (image === seen()) paint(); };
  picture.src = image[kind];
  return [kind, picture];
})));
const map = $("map"), pen = map.getContext("2d");

function paint() {
  const picture = pictures[state.image][state.layer === "gate" ? "view" : "canvas"];
  const {across, down, values} = layer(), [columns, rows] = seen().grid;
  // As wide as the page lets it be, and no higher than most of the window.
  const room = $("frame").clientWidth, tall = Math.max(320, 0.78 * innerHeight);
  const width = Math.round(Math.min(room, tall * across / down)), height = Math.round(width * down / across);
  const fine = devicePixelRatio || 1;
  map.style.width = `${width}px`;
  map.style.height = `${height}px`;
  map.width = width * fine;
  map.height = height * fine;
  pen.scale(fine, fine);
  pen.imageSmoothingEnabled = picture.naturalWidth * 2 > width;  // a small picture shows its pixels
  if (picture.complete && picture.naturalWidth) pen.drawImage(picture, 0, 0, width, height);

  const x = column => Math.round(column * width / across), y = row => Math.round(row * height / down);
  const box = at => [x(at % across), y(Math.floor(at / across)), x(at % across + 1) - x(at % across),
                     y(Math.floor(at / across) + 1) - y(Math.floor(at / across))];
  const kept = state.layer === "gate" ? null : select(routed().order, routed().weights, state.gamma);
  const [low, high] = ends(values);
  for (let at = 0; at < across * down; at++) {
    if (state.layer !== "crops" && state.layer !== "kept" && Number.isFinite(values[at])) {
      const alpha = kept && !kept[at] ? 0.5 : 0.62;
      pen.fillStyle = `rgba(${colour((values[at] - low) / (high - low || 1))}, ${alpha})`;
      pen.fillRect(...box(at));
    }
    if (state.layer !== "crops" && kept && !kept[at]) {  // veiled
      pen.fillStyle = state.layer === "kept" ? "rgba(58, 60, 68, .88)" : "rgba(30, 32, 38, .55)";
      pen.fillRect(...box(at));
    }
  }

  const line = (path, inner, outer, inside = "#fff", outside = "#14161a") => {
    pen.lineWidth = outer; pen.strokeStyle = outside; pen.stroke(path);
    pen.lineWidth = inner; pen.strokeStyle = inside; pen.stroke(path);
  };
  if (state.layer !== "gate") {
    const cuts = new Path2D();
    for (let i = 1; i < columns; i++) { const at = x(i * across / columns); cuts.moveTo(at, 0); cuts.lineTo(at, height); }
    for (let i = 1; i < rows; i++) { const at = y(i * down / rows); cuts.moveTo(0, at); cuts.lineTo(width, at); }
    const strong = state.layer === "crops";
    pen.globalAlpha = strong ? 1 : 0.6;
    pen.setLineDash(strong ? [] : [5, 4]);
    line(cuts, strong ? 2 : 1, strong ? 5 : 2.5);
    pen.setLineDash([]);
    pen.globalAlpha = 1;
  }
  if (kept && state.layer !== "crops") {  // the border between kept and dropped
    const border = new Path2D();
    for (let at = 0; at < across * down; at++) {
      const [left, top, wide, high] = box(at);
      if ((at + 1) % across && kept[at] !== kept[at + 1]) { border.moveTo(left + wide, top); border.lineTo(left + wide, top + high); }
      if (at + across < across * down && kept[at] !== kept[at + across]) { border.moveTo(left, top + high); border.lineTo(left + wide, top + high); }
    }
    pen.lineCap = "square";
    line(border, 1.5, 3.5);
  }
  if (state.layer === "crops") {
    pen.font = `600 15px ${getComputedStyle(document.body).fontFamily}`;
    for (let i = 0; i < columns * rows; i++) {
      const left = (i % columns) * width / columns + 8, top = Math.floor(i / columns) * height / rows + 8;
      pen.fillStyle = "#14161a"; pen.fillRect(left, top, 14 + 9 * String(i + 1).length, 24);
      pen.fillStyle = "#fff"; pen.fillText(i + 1, left + 7, top + 17);
    }
  }
  if (cell() !== null) {
    const path = new Path2D();
    path.rect(...box(cell()));
    line(path, 2.5, 6, "#fff", "#d5361f");
  }
}

// ---- beside the image -----------------------------------------------------------------------------------------
function describe() {
  const {crop, side, patches} = shown.model, [columns, rows] = seen().grid, {values, name} = layer();
  const [low, high] = ends(values), coloured = state.layer === "relevance" || state.layer === "gate";
  fill("legend", ...(coloured && Number.isFinite(low)
    ? [fixed(low, 3), make("span", {class: "bar"}), fixed(high, 3), make("span", {}, name)]
    : [{kept: "clear: kept · veiled: dropped", crops: `${columns} × ${rows} crops, row by row`}[state.layer] ?? ""]));
  $("caption").textContent = {
    relevance: "One cell is one local token. Yellow is most like the words, violet least; veiled cells are "
      + "dropped, and a line runs around what stays (Sec. 2.2, Text-Guided Router).",
    kept: "What the language model gets of the details: the tokens of the clear cells, in reading order, "
      + "behind the whole image at low resolution (Fig. 2).",
    crops: `Each crop, ${crop} × ${crop} pixels, passes the vision tower alone; ${side * side} learned queries `
      + `condense its ${patches} patches to ${side * side} tokens (Sec. 2.2).`,
    gate: `The whole image at ${crop} × ${crop} pixels keeps all its ${patches} tokens. Each is a mixture of two `
      + "experts, an MLP and a query former, weighed by a gate (Sec. 2.1).",
  }[state.layer];
  map.setAttribute("aria-label", `${LAYERS[state.layer]}, ${seen().name}. Arrow keys move from token to token.`);
}

function tell() {  // what is pointed at
  const at = cell(), {across, values} = layer();
  document.querySelectorAll(".word").forEach((chip, i) => {
    chip.classList.toggle("on", i === word());
    chip.setAttribute("aria-pressed", i === state.held);
  });
  if (at === null) {
    fill("inspect", make("h3", {}, "A token"), make("p", {class: "note"}, "Point at a place in the image, or go there "
      + "with Tab and the arrow keys: " + (state.layer === "gate" ? "the weights of its two experts."
      : "its rank, its share of the relevance, and how like each word it is.")));
    return;
  }
  const place = `column ${at % across + 1}, row ${Math.floor(at / across) + 1}`;
  const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  if (state.layer === "gate") {
    const [mlp, former] = routed().gates;
    fill("inspect", make("h3", {}, `Global token at ${place}`), make("dl", {class: "facts"},
      fact("MLP", fixed(mlp[at], 3)), fact("query former", fixed(former[at], 3))));
    return;
  }
  const image = routed(), {side} = shown.model, [columns] = seen().grid;
  const crop = Math.floor(Math.floor(at / across) / side) * columns + Math.floor(at % across / side) + 1;
  const kept = select(image.order, image.weights, state.gamma)[at];
  const most = Math.max(...image.cosines.map(row => Math.max(...range(row).map(Math.abs))), 1e-9);
  const list = make("div", {class: "cosines"});
  asked().words.forEach((text, i) => {
    const value = image.cosines[i][at], length = Math.abs(value) / most * 50;
    list.append(make("bdi", {}, text.trim() || "·"), make("span", {class: "meter", "aria-hidden": "true"},
      make("i", {style: `width:${length}%;left:${value < 0 ? 50 - length : 50}%`})), make("span", {}, fixed(value, 3)));
  });
  fill("inspect", make("h3", {}, `Token at ${place}, in crop ${crop}: ${kept ? "kept" : "dropped"}`),
    make("dl", {class: "facts"}, fact("rank", `${count(image.rank[at])} of ${count(values.length)}`),
      fact("share", percent(image.weights[at] / image.total, 2)), fact("score", fixed(image.scores[at], 3))), list);
}

function measure() {  // what gamma does
  const question = asked(), {patches} = shown.model;
  const choices = question.images.map(image => select(image.order, image.weights, state.gamma));
  const sizes = choices.map(kept => kept.filter(Boolean).length);
  const kept = sizes.reduce((a, b) => a + b), all = choices.reduce((sum, one) => sum + one.length, 0);
  const whole = question.images.length * (patches + 1), context = question.text + whole + all;
  $("value").textContent = String(Math.round(state.gamma * 1e4) / 1e4);
  $("gamma").value = state.gamma;
  $("kept").textContent = `${count(kept)} of ${count(all)}`;
  $("saved").textContent = percent((all - kept) / context);
  const parts = [["text", question.text, "text"], ["global", whole, "global view"], ["kept", kept, "local, kept"],
                 ["dropped", all - kept, "local, dropped"]];
  if (!$("context").children.length) fill("context", ...parts.map(([kind]) => make("span", {class: kind})));
  parts.forEach(([, size], i) => { $("context").children[i].style.flexGrow = size; $("context").children[i].hidden = !size; });
  fill("key", ...parts.map(([kind, size, name]) => make("li", {}, make("i", {class: kind}), `${count(size)} ${name}`)));
  curve(routed(), sizes[state.image]);
  $("answers").querySelectorAll("button").forEach(
    button => button.setAttribute("aria-pressed", Number(button.textContent) === state.gamma));
}

function curve(image, kept) {
  const points = [[0, 100]], step = Math.max(1, Math.floor(image.order.length / 300));
  let sum = 0;
  image.order.forEach((token, rank) => {
    sum += image.weights[token];
    if (rank % step === 0 || rank + 1 === kept || rank + 1 === image.order.length)
      points.push([100 * (rank + 1) / image.order.length, 100 - 100 * sum / image.total]);
  });
  const cut = 100 * kept / image.order.length, under = points.filter(([at]) => at <= cut + 1e-9);
  const lines = {area: `M0 100 L${under.join(" L")} L${cut} 100 Z`, curve: `M${points.join(" L")}`,
                 cut: `M0 ${100 - 100 * state.gamma} H${cut} V100`};
  for (const [kind, d] of Object.entries(lines))
    $("sums").querySelector(`.${kind}`).setAttribute("d", Number.isFinite(sum) ? d : "");
}

// ---- what changes with the question -----------------------------------------------------------------------------
function show() {
  const question = asked(), [first, ...later] = question.turns;
  document.querySelectorAll("[role=tab]").forEach((tab, i) => {
    tab.setAttribute("aria-selected", i === state.question);
    tab.tabIndex = i === state.question ? 0 : -1;
  });
  $("asked").textContent = shown.model.text === "all" ? "All words that the router reads, template included" : "Question";
  // A space before a word stands outside of its button; without one the line does not break there.
  fill("words", ...question.words.flatMap((text, i) => [text.match(/^\s*(?=\S)|/)[0] || "\u2060", make("button", {class: "word",
    onpointerenter: event => { if (event.pointerType === "mouse") set({word: i}); }, onpointerleave: () => set({word: null}),
    onfocus: event => { if (event.target.matches(":focus-visible")) set({word: i}); }, onblur: () => set({word: null}),
    onclick: () => set({held: state.held === i ? null : i, word: null})}, text.trimStart() || "·")]));
  if (!question.words.length) $("words").textContent = first[0] || "(no words)";
  $("answer").textContent = first[1] || "(no answer)";
  fill("turns", ...later.map(([asked, said]) => make("div", {class: "turn"}, make("p", {dir: "auto"}, asked),
    make("p", {class: "answer", dir: "auto"}, said))));
  if (later.length) $("turns").prepend(make("p", {class: "note"},
    "Then, with the tokens that were chosen for the first question:"));
  const full = question.answers[0].router, body = make("tbody");
  for (const {gamma, kept, router, random} of question.answers) {
    const cellOf = said => make("td", {class: said !== full ? "other" : null, dir: "auto"},
      said === null ? "(longer than the context)" : said || "(nothing)");
    body.append(make("tr", {}, make("th", {scope: "row"}, make("button", {onclick: () => set({gamma})}, gamma)),
      make("td", {}, count(kept)), cellOf(router), cellOf(random)));
  }
  fill("answers", make("thead", {}, make("tr", {}, ...["γ", "tokens", "chosen by the router", "as many at random"].map(
    name => make("th", {scope: "col"}, name)))), body);
}

function cut() {  // what changes with the image
  const image = seen(), [width, height] = image.size, {crop, slicing} = shown.model;
  fill("cut", `The image has ${count(width)} × ${count(height)} pixels. Of all grids of ${crop} × ${crop} crops that `
    + (slicing === "paper" ? "the rule allows, the one" : "the released code allows, the one"), " with the most ",
    bold("utilised"), " pixels wins (the image scaled into the canvas, at most its own size); of equal ones that with "
    + "the fewest ", bold("wasted"), " (canvas, but not image) (Sec. 2.1, Adaptive Slicing). Each cell: utilised, "
    + "below it wasted.");
  const most = Math.max(...image.weighed.map(([, , utilised]) => utilised));
  const across = Math.max(...image.weighed.map(([m]) => m)), down = Math.max(...image.weighed.map(([, n]) => n));
  const head = make("tr", {}, make("th", {}, "rows ╲ columns"));
  for (let m = 1; m <= across; m++) head.append(make("th", {scope: "col"}, m));
  const body = make("tbody");
  for (let n = 1; n <= down; n++) {
    const row = make("tr", {}, make("th", {scope: "row"}, n));
    for (let m = 1; m <= across; m++) {
      const found = image.weighed.find(([a, b]) => a === m && b === n);
      if (!found) { row.append(make("td")); continue; }
      const [, , utilised, wasted] = found, chosen = m === image.grid[0] && n === image.grid[1];
      row.append(make("td", {class: chosen ? "chosen" : null, style: `--used:${100 * utilised / most}%`,
        title: `${m} × ${n} crops: ${count(utilised)} utilised, ${count(wasted)} wasted`},
        SHORT.format(utilised), chosen ? make("span", {class: "hidden"}, " chosen") : "",
        make("span", {}, SHORT.format(wasted))));
    }
    body.append(row);
  }
  fill("grids", make("thead", {}, head), body);
}

// Every change goes through here.
function set(changes) {
  const before = {...state};
  Object.assign(state, changes);
  if (state.question !== before.question) Object.assign(state, {word: null, held: null});
  if (state.layer !== before.layer || state.image !== before.image) Object.assign(state, {cell: null, place: null});
  if (state.question !== before.question) show();
  if (state.image !== before.image) cut();
  describe();
  measure();
  tell();
  paint();
}

// ---- pointer and keys -----------------------------------------------------------------------------------------------
function under(event) {
  const {across, down} = layer(), frame = map.getBoundingClientRect();
  const column = Math.floor((event.clientX - frame.left) / frame.width * across);
  const row = Math.floor((event.clientY - frame.top) / frame.height * down);
  return column < 0 || row < 0 || column >= across || row >= down ? null : row * across + column;
}
map.addEventListener("pointermove", event => { const at = under(event); if (at !== state.cell) set({cell: at}); });
map.addEventListener("pointerleave", () => set({cell: null}));
map.addEventListener("click", event => set({place: under(event)}));
map.addEventListener("keydown", event => {
  const {across, down} = layer(), step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  const at = cell(), column = at === null ? 0 : at % across + step[0], row = at === null ? 0 : Math.floor(at / across) + step[1];
  if (column >= 0 && row >= 0 && column < across && row < down) set({cell: null, place: row * across + column});
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") set({word: null, held: null, cell: null, place: null});
});
$("gamma").addEventListener("input", event => set({gamma: Number(event.target.value)}));
$("tabs").addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!step) return;
  const tabs = $("tabs").children, next = (state.question + step + tabs.length) % tabs.length;
  set({question: next});
  tabs[next].focus();
});
new ResizeObserver(paint).observe($("frame"));

// ---- once -----------------------------------------------------------------------------------------------------------
const {crop, side, patches, vision, llm} = shown.model;
const names = shown.images.map(image => image.name);
document.title = `${names.join(", ")}: what the model looked at`;
fill("title", make("bdi", {}, names.join(", ")));
$("facts").textContent = shown.images.map(({size, grid: [columns, rows]}) =>
  `${count(size[0])} × ${count(size[1])} pixels, cut into ${columns} × ${rows} crops: ${count(columns * rows * side * side)} local tokens `
  + `and ${patches} global ones`).join("; ") + ".";
fill("rule", "Tokens sorted by ", make("i", {}, "p"), " = softmax of their scores, added up. A token stays while those "
  + "before it hold at most γ: where the dashed line meets the curve. The straighter the curve, the less the "
  + "scores tell tokens apart, and the closer the share of tokens kept is to γ.");
$("made").textContent = `Vision tower: ${vision}; language model: ${llm}. Everything on this page was computed when it was `
  + "made, except the choice at each γ, which your browser makes by the router's own rule.";
if (shown.questions.length > 1) {
  fill("tabs", ...shown.questions.map(({turns: [[text]]}, i) => make("button", {role: "tab", "aria-controls": "panel",
    title: text, onclick: () => set({question: i})}, make("bdi", {}, text))));
  $("panel").setAttribute("role", "tabpanel");
} else $("tabs").hidden = true;
function choices(id, name, options, change) {
  for (const [value, text] of options)
    $(id).append(make("label", {}, make("input", {type: "radio", name, value, class: "hidden",
      onchange: () => change(value)}), make("bdi", {}, text)));
  $(id).querySelector("input").checked = true;
}
choices("layers", "layer", Object.entries(LAYERS), layer => set({layer}));
choices("pictures", "picture", names.map((name, i) => [i, `Image ${i + 1}`]), image => set({image}));
$("pictures").hidden = names.length === 1;
show();
cut();
set({gamma: asked().gamma});
