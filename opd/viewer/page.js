"use strict";
const $ = id => document.getElementById(id);
const el = (tag, text, cls) => { const node = document.createElement(tag); if (text != null) node.textContent = text; if (cls) node.className = cls; return node; };
const page = JSON.parse($("page").textContent), ROW = 54;
let index = [], shown = [], chosen = -1, chunks = new Map(), mode = page.modes[0];

async function unpack(id) {
  const raw = atob($(id).textContent.trim()), bytes = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n++) bytes[n] = raw.charCodeAt(n);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}
async function detailOf(n) {
  const chunk = Math.floor(n / page.chunk);
  if (!chunks.has(chunk)) { if (chunks.size > 30) chunks.delete(chunks.keys().next().value); chunks.set(chunk, unpack("chunk-" + chunk)); }
  return (await chunks.get(chunk))[n % page.chunk];
}

const at = (record, path) => path.reduce((value, name) => value?.[name], record);
function valueOf(record, m, n) {
  if (m.path[0] === "versions") return (record.versions || []).findIndex(([, from, to]) => from <= n && n < to);
  const value = at(record, m.path)?.[n];
  if (value == null || !m.minus) return value ?? null;
  const off = at(record, m.minus)?.[n];
  return off == null ? null : value - off;
}
function colour(value, m) {
  if (value == null || value < 0 && m.kind === "category") return "";
  if (m.kind === "category") return `rgba(var(--c${value % 6}), .35)`;
  const share = Math.min(1, Math.abs(value) / m.scale) * .6;
  return `rgba(var(--${m.kind === "diverging" ? (value > 0 ? "up" : "down") : "one"}), ${share.toFixed(3)})`;
}
const number = (value, unit) => value == null ? "not known" : (value < 0 ? "−" : "") + (Math.abs(value) >= 1e-3 || value === 0 ? Math.abs(value).toFixed(4) : Math.abs(value).toExponential(1)) + (unit ? " " + unit : "");
const visible = text => text === "" ? "∅" : text.replace(/\n/g, "⏎\n");
const oneLine = text => (text || "").replace(/\s+/g, " ");
const verdict = s => s.status !== "score" ? ["–", "none", "not judged"] : s.correct ? ["✓", "right", "right"] : ["✗", "wrong", "wrong"];
const total = list => list.reduce((sum, value) => sum + value, 0);

function fill(select, options) { select.replaceChildren(...options.map(([value, text]) => { const o = el("option", text); o.value = value; return o; })); }
function fillModes() {
  const groups = new Map();
  page.modes.forEach((m, n) => { if (!groups.has(m.group)) { const g = el("optgroup"); g.label = m.group; groups.set(m.group, g); } const o = el("option", m.name); o.value = n; groups.get(m.group).append(o); });
  $("mode").replaceChildren(...groups.values());
}

const ORDERS = {
  recorded: ["as recorded", null], loss: ["largest loss", s => s.mass ? -total(s.mass) : 0], gap: ["teacher disagrees most", s => s.gap ?? 1e9],
  long: ["longest", s => -s.length], short: ["shortest", s => s.length], reward: ["lowest reward", s => s.reward ?? 0], differs: ["first to differ", s => s.differs >= 0 ? s.step * 1e6 + s.differs : 1e15],
};
function filter() {
  const step = $("step").value, which = $("which").value, run = $("run").value, words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = [];
  for (let n = 0; n < index.length; n++) {
    const s = index[n];
    if (step !== "" && s.step !== Number(step) || run !== "" && s.run !== Number(run)) continue;
    if (which === "unjudged" ? s.status === "score" : which === "cut" ? s.finish !== "length" : which && (s.status !== "score" || s.correct !== (which === "right"))) continue;
    if (words.length && !words.every(word => s.found.includes(word))) continue;
    shown.push(n);
  }
  const key = ORDERS[$("order").value][1];
  if (key) { const keys = new Map(shown.map(n => [n, key(index[n])])); shown.sort((a, b) => keys.get(a) - keys.get(b) || a - b); }
  const judged = shown.filter(n => index[n].status === "score"), right = judged.filter(n => index[n].correct).length;
  $("count").textContent = shown.length ? `${shown.length.toLocaleString("en")} answer${shown.length > 1 ? "s" : ""}, ${right.toLocaleString("en")} of ${judged.length.toLocaleString("en")} judged right` : "No answer matches.";
  drawMass();
  $("rows").style.height = shown.length * ROW + "px";
  $("list").scrollTop = 0;
  drawn.clear(); $("rows").replaceChildren(); drawRows();
}
function drawMass() {
  const sums = page.classes.map(() => 0), counts = page.classes.map(() => 0);
  for (const n of shown) { const s = index[n]; if (s.mass) s.mass.forEach((value, k) => { sums[k] += value; counts[k] += s.tokens_of[k]; }); }
  const all = total(sums), tokens = total(counts);
  $("mass").hidden = !(all > 0);
  if (!(all > 0)) return;
  const said = page.classes.map((name, k) => `${name} ${(100 * sums[k] / all).toFixed(0)} % of the loss, ${(100 * counts[k] / tokens).toFixed(0)} % of the tokens`);
  $("bar").setAttribute("aria-label", said.join("; "));
  $("bar").replaceChildren(...page.classes.map((name, k) => { const part = el("span", sums[k] / all < .1 ? "" : `${name} ${(100 * sums[k] / all).toFixed(0)} %`); part.title = said[k]; part.style.cssText = `flex: ${sums[k] / all} 1 0; background: rgba(var(--c${k}), .45)`; if (sums[k] / all < .004) part.style.display = "none"; return part; }));
}

const drawn = new Map();
function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 8), last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 8);
  for (const [place, node] of drawn) if (place < first || place >= last) { node.remove(); drawn.delete(place); }
  for (let place = first; place < last; place++) if (!drawn.has(place)) { const node = row(place); drawn.set(place, node); $("rows").append(node); }
}
function row(place) {
  const n = shown[place], s = index[n], node = el("div", null, "row" + (n === chosen ? " on" : "")), [mark, cls, said] = verdict(s);
  node.style.top = place * ROW + "px"; node.id = "row-" + place;
  node.setAttribute("role", "option"); node.setAttribute("aria-selected", n === chosen); node.setAttribute("aria-posinset", place + 1); node.setAttribute("aria-setsize", shown.length);
  const top = el("div"), low = el("div"), m = el("span", mark, cls);
  m.title = said;
  top.append(m, el("span", oneLine(s.question), "q"), el("span", (page.runs.length > 1 ? "AB"[s.run] + " · " : "") + `step ${s.step}`, "m"));
  low.append(el("span", oneLine(s.text), "t"), el("span", `${s.length} tokens` + (s.differs >= 0 ? `, ≠ at ${s.differs + 1}` : ""), "m"));
  node.append(top, low);
  node.addEventListener("click", () => choose(place, true));
  return node;
}
function choose(place, open) {
  if (place < 0 || place >= shown.length) return;
  chosen = shown[place];
  const list = $("list"), top = place * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  drawRows();
  for (const [p, node] of drawn) { node.classList.toggle("on", p === place); node.setAttribute("aria-selected", p === place); }
  list.setAttribute("aria-activedescendant", "row-" + place);
  if (open) $("detail").classList.add("open");
  draw();
}

async function draw() {
  const n = chosen;
  if (n < 0) return;
  const s = index[n], record = await detailOf(n), pair = s.pair == null ? null : await detailOf(s.pair);
  if (n !== chosen) return;
  const box = $("detail"), [, cls, said] = verdict(s), head = el("div", null, "head"), back = el("button", "← all answers");
  back.id = "back"; back.addEventListener("click", () => box.classList.remove("open"));
  head.append(back, el("span", said, cls), el("span", `reward ${s.reward}`), el("span", `step ${s.step}`), el("span", `${s.prompt_id}, answer ${s.member + 1}`), el("span", `${s.length} tokens${s.finish === "length" ? ", cut" : ""}`));
  for (const [version, from, to] of record.versions || []) head.append(el("span", `weights of step ${version}` + (record.versions.length > 1 ? `: tokens ${from + 1} to ${to}` : "")));
  box.replaceChildren(head, el("h3", "Question"), el("p", s.question, "text"));
  if (s.pair == null) box.append(el("h3", "Answer"), tokensOf(s, record, n));
  else {
    const two = el("div", null, "two"), other = index[s.pair];
    for (const [who, data, number_] of [[s, record, n], [other, pair, s.pair]].sort((a, b) => a[0].run - b[0].run)) {
      const side = el("div");
      side.append(el("h3", `Answer of ${"AB"[who.run]}: ${page.runs[who.run]} (${verdict(who)[2]})`), tokensOf(who, data, number_));
      two.append(side);
    }
    box.append(two, el("p", s.differs < 0 ? "Both gave the same tokens." : `They part at token ${s.differs + 1}.`, "hint"));
  }
  const token = el("section"); token.id = "token"; token.setAttribute("aria-live", "polite"); token.append(el("h3", "Point at a token, or tap it"));
  box.append(bars(record), token);
  const below = el("div", null, "two"), left = el("div"), right = el("div");
  if (s.expected != null) left.append(el("h3", "Expected"), el("p", s.expected, "text"));
  if (s.feedback) left.append(el("h3", "Verifier"), el("p", s.feedback, "text"));
  for (const [name, text] of Object.entries(s.views || {})) right.append(el("h3", `What the teacher “${name}” read`), el("p", text == null ? "nothing: no view for this answer" : text, "text view"));
  below.append(left, right);
  box.append(below);
  box.scrollTop = 0;
}
function tokensOf(s, record, n) {
  const line = el("p", null, "tokens"), starts = new Set((record.versions || []).slice(1).map(([, from]) => from));
  record.tokens.forEach((token, k) => {
    const button = el("button", visible(token));
    button.style.background = colour(valueOf(record, mode, k), mode);
    if (s.differs >= 0 && k === s.differs) button.classList.add("differs");
    if (starts.has(k)) button.classList.add("span");
    button.at = [record, k];
    line.append(button);
  });
  return line;
}
function bars(record) {
  const box = el("div", null, "bars");
  if (mode.kind === "category" || record.tokens.length > 1500) { box.style.display = "none"; return box; }
  box.setAttribute("aria-hidden", "true"); box.title = mode.name + ", token by token";
  if (!record.tokens.some((_, k) => Math.abs(valueOf(record, mode, k) ?? 0) > .04 * mode.scale)) { box.style.display = "none"; return box; }
  record.tokens.forEach((_, k) => {
    const value = valueOf(record, mode, k), bar = el("i");
    bar.style.setProperty("--h", value == null ? "0" : (100 * Math.min(1, Math.abs(value) / mode.scale)).toFixed(1) + "%");
    bar.style.setProperty("--k", `var(--${mode.kind === "diverging" ? (value > 0 ? "up" : "down") : "one"})`);
    box.append(bar);
  });
  return box;
}
function topTable(caption, rows, token, tail) {
  const table = el("table");
  table.append(el("caption", caption));
  for (const [text, logp] of rows) {
    const line = el("tr", null, text === token ? "it" : "");
    line.append(el("td", visible(text)), el("td", logp == null ? "" : (100 * Math.exp(logp)).toFixed(1) + " %"));
    table.append(line);
  }
  if (tail != null) { const line = el("tr", null, "tail"); line.append(el("td", "outside"), el("td", (100 * tail).toFixed(1) + " %")); table.append(line); }
  return table;
}
let lit = null;
function show(button) {
  const [record, n] = button.at, list = el("dl"), tops = el("div", null, "tops"), box = $("token");
  const rows = [["student log-prob", number(record.student_logp[n], "nats")]];
  const ratio = record.behaviour_logp[n] == null || record.student_logp[n] == null ? null : Math.exp(record.student_logp[n] - record.behaviour_logp[n]);
  rows.push(["importance weight", ratio == null ? "not known" : ratio.toFixed(4)]);
  if (record.entropy) rows.push(["student entropy", number(record.entropy[n], "nats")]);
  for (const [name, signal] of Object.entries(record.signals)) {
    const gap = signal.logp[n] == null || record.student_logp[n] == null ? null : signal.logp[n] - record.student_logp[n];
    rows.push([`${name}: log-prob`, number(signal.logp[n], "nats")], [`${name}: minus student`, number(gap, "nats")], [`${name}: entropy`, number(signal.entropy[n], "nats")]);
    if (signal.topk[n]?.length > 1) tops.append(topTable(`teacher ${name}`, signal.topk[n], record.tokens[n], signal.tail?.[n]));
  }
  if (record.student_topk?.[n]?.length) tops.prepend(topTable("student", record.student_topk[n], record.tokens[n]));
  for (const [name, values] of Object.entries(record.advantage)) rows.push([`advantage ${name}`, number(values[n])]);
  for (const [name, values] of Object.entries(record.weight)) rows.push([`route of ${name}`, number(values[n])]);
  for (const [name, values] of Object.entries(record.columns || {})) rows.push([name, number(values[n])]);
  rows.push(["class", page.classes[record.classes[n]]]);
  const span = (record.versions || []).find(([, from, to]) => from <= n && n < to);
  if (span) rows.push(["weights of step", String(span[0])]);
  for (const [key, value] of rows) list.append(el("dt", key), el("dd", value));
  box.replaceChildren(el("h3", `“${visible(record.tokens[n])}”, token ${n + 1} of ${record.tokens.length}`), list, tops);
  lit?.classList.remove("on"); lit = button; button.classList.add("on");
}
function drawScale() {
  const [from, bar, to] = $("scale").children, unit = mode.unit ? " " + mode.unit : "", top = (mode.scale >= .01 ? mode.scale.toFixed(2) : mode.scale.toExponential(1)) + unit;
  if (mode.kind === "category") {
    const names = mode.path[0] === "classes" ? page.classes : ["1st span", "2nd", "3rd", "4th …"];
    from.replaceChildren(...names.map((name, k) => { const b = el("b", name); b.style.background = `rgba(var(--c${k}), .35)`; return b; }));
    to.textContent = ""; bar.style.display = "none"; return;
  }
  bar.style.display = "";
  const flip = mode.path.at(-1).endsWith("logp");
  from.textContent = mode.kind === "diverging" ? `${mode.low} −${top}` : `${mode.low} 0`;
  to.textContent = mode.kind === "diverging" ? `+${top} ${mode.high}` : `${flip ? "−" : ""}${top} ${mode.high}`;
  bar.style.background = mode.kind === "diverging" ? "linear-gradient(90deg, rgba(var(--down), .6), transparent, rgba(var(--up), .6))" : "linear-gradient(90deg, transparent, rgba(var(--one), .6))";
}
function sayDifference() {
  const d = page.difference;
  if (!d) return;
  const pairs = index.filter(s => s.run === 0 && s.pair != null), apart = pairs.filter(s => s.differs >= 0), first = apart.reduce((a, s) => a && a.step <= s.step ? a : s, null);
  const short = value => typeof value === "number" ? Number(value.toPrecision(6)) : value;
  let said = `A is ${page.runs[0]}, B is ${page.runs[1]}. `;
  said += d.step == null ? `The metrics of all ${d.steps} shared steps are equal bit by bit. ` : `The metrics first differ at step ${d.step}: ${d.metrics.map(([name, a, b]) => `${name} ${short(a)} and ${short(b)}`).join(", ")}${d.differing > d.metrics.length ? ` and ${d.differing - d.metrics.length} more` : ""}. `;
  said += pairs.length ? `${pairs.length} recorded answers were to the same question at the same step, ${apart.length} of them differ` + (first ? `, first at step ${first.step}: ${first.prompt_id}, answer ${first.member + 1}, token ${first.differs + 1}.` : ".") : "No recorded answers were to the same question at the same step.";
  $("difference").textContent = said; $("difference").hidden = false;
}

async function start() {
  if (typeof DecompressionStream === "undefined") { $("count").textContent = "This browser cannot unpack the page (no DecompressionStream): use Chrome 80, Firefox 113, Safari 16.4 or newer."; return; }
  index = await unpack("index");
  for (const s of index) s.found = [s.prompt_id, s.question, s.text, s.expected, ...Object.values(s.views || {})].filter(Boolean).join("\n").toLowerCase();
  fillModes(); drawScale();
  fill($("run"), [["", "both"], ...page.runs.map((name, n) => [n, `${"AB"[n]}: ${name}`])]); $("run-label").style.display = page.runs.length > 1 ? "" : "none";
  fill($("step"), [["", "all"], ...[...new Set(index.map(s => s.step))].sort((a, b) => a - b).map(s => [s, s])]);
  fill($("order"), Object.entries(ORDERS).filter(([name]) => name !== "differs" || page.runs.length > 1).filter(([name]) => name !== "loss" || index.some(s => s.mass)).map(([name, [text]]) => [name, text]));
  sayDifference();
  filter();
  if (shown.length) choose(0, false);
  document.documentElement.dataset.ready = "1";
}
const token = event => event.target.closest?.(".tokens button");
for (const kind of ["mouseover", "focusin", "click"]) $("detail").addEventListener(kind, event => { const button = token(event); if (button) show(button); });
$("list").addEventListener("scroll", () => requestAnimationFrame(drawRows), {passive: true});
addEventListener("resize", drawRows);
$("mode").addEventListener("change", () => { mode = page.modes[Number($("mode").value)]; drawScale(); draw(); });
for (const id of ["run", "step", "which", "order", "search"]) $(id).addEventListener("input", () => { filter(); });
document.addEventListener("keydown", event => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName || "");
  if (event.key === "Escape") { $("detail").classList.remove("open"); if (typing) document.activeElement.blur(); }
  if (typing) return;
  if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  const place = shown.indexOf(chosen), move = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[event.key];
  if (move && !event.target.closest?.("#detail")) { event.preventDefault(); choose(Math.min(shown.length - 1, Math.max(0, place + move)), false); }
  if (event.key === "Enter" && document.activeElement === $("list")) $("detail").classList.add("open");
});
start();
