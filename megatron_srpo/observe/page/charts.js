"use strict";
// All content comes from one JSON object; text is inserted as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "color") node.style.setProperty("--color", value);
    else if (name === "ground") node.style.background = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Control characters and those that turn the direction of text are shown by their names.
function visible(text) {
  return text
    .replace(/[\ud800-\udfff]/gu, "\ufffd")  // unpaired surrogates
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function figure(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1).replace("e+", "e").replace(".0e", "e");
  return String(size >= 1000 ? Math.round(value) : Number(value.toPrecision(3)));
}

function duration(hours) {
  return hours >= 1 ? `${figure(hours)} h` : hours >= 1 / 60 ? `${figure(60 * hours)} min` : `${Math.round(3600 * hours)} s`;
}

function choices(place, names, picked, pick) {
  const buttons = names.map((name) => {
    const button = make("button", { type: "button", "aria-pressed": name === picked, "data-name": name }, name);
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      pick(name);
    });
    return button;
  });
  place.replaceChildren(...buttons);
}

function showTip(x, y, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  tip.style.left = "0px";  // else its last position limits its width
  const width = tip.offsetWidth, height = tip.offsetHeight, left = window.scrollX, right = left + document.documentElement.clientWidth;
  tip.style.left = `${Math.max(left + 4, Math.min(x + 14, right - width - 6))}px`;
  tip.style.top = `${y - height - 12 > window.scrollY ? y - height - 12 : y + 20}px`;
}
const hideTip = () => { tip.hidden = true; };

const color = (number) => `var(--run${number % 6})`;
const PHASES = ["rollout", "verify", "teacher", "update", "publish", "checkpoint"];
const PHASE_COLORS = ["var(--run0)", "var(--run5)", "var(--run3)", "var(--run1)", "var(--run2)", "var(--run4)"];

// ---- runs and alarms -----------------------------------------------------------------------------------------------------
function drawRuns() {
  byId("made").textContent = `megatron_srpo · ${data.made}`;
  byId("runs").replaceChildren(...data.runs.map((run, number) => {
    const last = (key) => (run.columns[key] || []).at(-1);
    const best = run.evaluations.length ? run.evaluations[0] : null;
    const figures = [["pass rate", figure(last("pass_rate"))], ["steps", String(run.steps)], ["time", duration(run.hours.at(-1) ?? 0)]];
    if (best) figures.unshift([best.label, figure(best.values.at(-1))]);
    return make("div", { class: "card run", color: color(number) },
      make("div", { class: "name" }, run.name), make("div", { class: "quiet" }, run.what),
      make("div", { class: "figures number" }, ...figures.map(([name, value]) => make("div", {}, make("b", {}, value), make("span", {}, name)))));
  }));
  byId("alarms").replaceChildren(...data.runs.flatMap((run) => run.alarms.map((alarm) =>
    make("details", { class: "alarm" },
      make("summary", {}, make("b", {}, alarm.name), ` · ${run.name}, ${alarm.steps} · ${alarm.finding}`), make("p", {}, alarm.advice)))));
}

// ---- curves --------------------------------------------------------------------------------------------------------------
let axis = "step", smooth = false;
const WIDTH = 380, HEIGHT = 170, LEFT = 44, BOTTOM = 20;

// A chart: its title, what its lines mean, whether its scale is logarithmic, and its lines: {run, x, y, low, high, dashed, name}.
function charts() {
  const column = (key, options = {}) => data.runs.flatMap((run, number) =>
    run.columns[key]?.some((value) => value !== 0 || !options.some) ? [{ run: number, steps: run.columns.step, y: run.columns[key], ...options }] : []);
  const found = data.labels.map((label) => ({ title: label, hint: label.includes("/avg@") ? "evaluation, 95 % band" : "evaluation",
    lines: data.runs.flatMap((run, number) => run.evaluations.filter((one) => one.label === label).map((one) =>
      ({ run: number, steps: one.steps, y: one.values, low: one.low, high: one.high, exact: true }))) }));
  const weights = data.runs.flatMap((run, number) => run.weights.steps.length ? [{ run: number, steps: run.weights.steps, y: run.weights.q[2],
    low: run.weights.q[0], high: run.weights.q[4], innerLow: run.weights.q[1], innerHigh: run.weights.q[3], exact: true }] : []);
  found.push(
    { title: "Pass rate", hint: "training samples", lines: column("pass_rate") },
    { title: "Response length", hint: "tokens", lines: column("response_tokens_mean") },
    { title: "Routed to SDPO", hint: "of samples; dashed: of tokens", lines: [...column("sdpo_sample_share"), ...column("sdpo_token_share", { dashed: true, name: "tokens" })] },
    { title: "Entropy", hint: "policy; dashed: teacher (nats)", lines: [...column("policy_entropy"), ...column("teacher_entropy", { dashed: true, name: "teacher", some: true })] },
    { title: "Entropy weights", hint: "median, 50 % and 90 % bands", lines: weights },
    { title: "Divergence", hint: "distilled tokens (nats)", lines: column("distillation_divergence", { some: true }) },
    { title: "Gradient norm", hint: "before clipping", lines: column("grad_norm") },
    { title: "Log-prob gap", hint: "trainer to engine (nats)", log: true, lines: column("engine_logprob_gap") },
    { title: "Format", hint: "well-formed; dashed: truncated", lines: [...column("format_rate"), ...column("truncated_share", { dashed: true, name: "truncated" })] },
    { title: "Groups without signal", hint: "share", lines: column("zero_advantage_share") },
    { title: "Teacher’s distance", hint: "‖θ − θ′‖ / ‖θ‖", lines: column("teacher_distance") },
    { title: "Seconds a step", hint: "", lines: column("seconds") },
    { title: "Cumulative cost", hint: "hours", lines: data.runs.map((run, number) => ({ run: number, steps: run.columns.step, y: run.hours, exact: true })) });
  return found.filter((chart) => chart.lines.some((line) => line.y.some((value) => value !== null)));
}

function xOf(line, place) {
  const run = data.runs[line.run], step = line.steps[place];
  if (axis === "step") return step;
  const values = axis === "hours" ? run.hours : run.tokens;
  const at = run.place[step];
  return at === undefined ? 0 : values[at];
}

function smoothed(values) {
  let state = null;
  return values.map((value) => (value === null ? null : (state = state === null ? value : 0.8 * state + 0.2 * value)));
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  return found;
}

function drawChart(chart) {
  const lines = chart.lines.map((line) => ({ ...line, x: line.steps.map((_, place) => xOf(line, place)), y: smooth && !line.exact ? smoothed(line.y) : line.y }));
  const good = (value) => value !== null && value !== undefined && (!chart.log || value > 0);
  const values = lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]).filter(good);
  const scale = chart.log ? Math.log10 : (value) => value;
  let low = Infinity, high = -Infinity, first = Infinity, last = -Infinity;
  for (const value of values) { low = Math.min(low, scale(value)); high = Math.max(high, scale(value)); }
  for (const line of lines) for (const x of line.x) { first = Math.min(first, x); last = Math.max(last, x); }
  if (chart.log) { low = Math.floor(low); high = Math.max(Math.ceil(high), low + 1); }
  else { if (low > 0 && low < 0.5 * high) low = 0; if (high === low) high = low + (Math.abs(low) || 1); const rest = 0.05 * (high - low); high += rest; if (low !== 0) low -= rest; }
  if (last === first) last = first + 1;
  const px = (x) => LEFT + ((x - first) / (last - first)) * (WIDTH - LEFT - 6);
  const py = (value) => 6 + (1 - (scale(value) - low) / (high - low)) * (HEIGHT - BOTTOM - 10);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title });
  const marks = chart.log ? ticks(low, high, 4).filter(Number.isInteger).map((power) => 10 ** power) : ticks(low, high, 4);
  for (const at of marks) {
    svg.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH - 6, y1: py(at), y2: py(at) }));
    svg.append(make("text", { x: LEFT - 6, y: py(at) + 4, "text-anchor": "end" }, figure(at)));
  }
  for (const at of ticks(first, last, 5)) svg.append(make("text", { x: px(at), y: HEIGHT - 4, "text-anchor": "middle" }, figure(at)));
  const path = (line, ys) => {
    let text = "", down = false;
    const every = Math.max(1, Math.floor(ys.length / 800));
    for (let place = 0; place < ys.length; place += every) {
      if (!good(ys[place])) { down = false; continue; }
      text += `${down ? "L" : "M"}${px(line.x[place]).toFixed(1)} ${py(ys[place]).toFixed(1)}`;
      down = true;
    }
    return text;
  };
  const area = (line, lows, highs) => path(line, highs) + path({ ...line, x: [...line.x].reverse() }, [...lows].reverse()).replace("M", "L") + "Z";
  for (const line of lines) {
    if (line.low) svg.append(make("path", { class: "band", color: color(line.run), d: area(line, line.low, line.high) }));
    if (line.innerLow) svg.append(make("path", { class: "band inner", color: color(line.run), d: area(line, line.innerLow, line.innerHigh) }));
    svg.append(make("path", { class: line.dashed ? "dashed" : "", color: color(line.run), d: path(line, line.y), "vector-effect": "non-scaling-stroke" }));
  }
  const cursor = make("line", { class: "cursor", y1: 6, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = first + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - 6) * (last - first);
    const rows = lines.filter((line) => line.x.length).map((line) => {
      let near = 0;
      line.x.forEach((at, place) => { if (Math.abs(at - x) < Math.abs(line.x[near] - x)) near = place; });
      return { line, near };
    });
    if (!rows.length) return;
    const at = rows[0].line.x[rows[0].near];
    cursor.setAttribute("x1", px(at)); cursor.setAttribute("x2", px(at)); cursor.setAttribute("visibility", "visible");
    showTip(event.pageX, event.pageY, make("div", { class: "quiet" }, `${axis} ${figure(at)}`), make("table", {}, ...rows.map(({ line, near }) =>
      make("tr", {}, make("td", {}, make("i", { ground: color(line.run) }), `${data.runs[line.run].name}${line.name ? ` · ${line.name}` : ""}`),
        make("td", { class: "number" }, figure(line.y[near]) + (line.low ? ` [${figure(line.low[near])}, ${figure(line.high[near])}]` : ""))))));
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
  return make("div", { class: "card chart" }, make("h3", {}, chart.title, make("span", {}, chart.hint)), svg);
}

function drawPhases() {
  const sums = data.runs.map((run) => PHASES.map((phase) => (run.columns[`seconds_${phase}`] || []).reduce((sum, value) => sum + (value || 0), 0)));
  const longest = Math.max(...sums.map((sum, number) => sum.reduce((a, b) => a + b, 0) / (data.runs[number].columns.step.length || 1)));
  const strips = data.runs.flatMap((run, number) => {
    const steps = run.columns.step.length || 1;
    const parts = sums[number].map((seconds, phase) => make("div", { ground: PHASE_COLORS[phase], title: `${PHASES[phase]}: ${figure(seconds / steps)} s a step` }));
    parts.forEach((part, phase) => { part.style.width = `${(100 * sums[number][phase]) / steps / (longest || 1)}%`; });
    return [make("div", { class: "name", title: run.name }, run.name), make("div", { class: "strip" }, ...parts)];
  });
  const key = PHASES.map((phase, number) => make("span", {}, make("i", { ground: PHASE_COLORS[number] }), phase));
  return make("div", { class: "card chart" }, make("h3", {}, "Time by phase", make("span", {}, `mean seconds a step; longest ${figure(longest)} s`)),
    make("div", { class: "stack" }, ...strips), make("div", { class: "key" }, ...key));
}

function drawCharts() {
  byId("charts").replaceChildren(...charts().map(drawChart), drawPhases());
}
