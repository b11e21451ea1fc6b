// ---- the sample browser --------------------------------------------------------------------------------------------------
const PAGE = 60;
const FILTERS = {
  "all": () => true,
  "wrong": (sample) => !sample.correct,
  "wrong, to GRPO": (sample) => !sample.correct && sample.branch === "grpo",
  "to SDPO": (sample) => sample.branch === "sdpo" || sample.branch === "mixed",
  "highest divergence": (sample) => sample.values && sample.values.divergence,
  "with token values": (sample) => sample.values,
  "truncated": (sample) => sample.finish === "length",
  "verifier failed": (sample) => sample.failure,
};
const COLORS = ["divergence", "entropy weight", "advantage", "teacher − policy"];
let filter = "all", shown = [], listed = 0, current = null, coloring = COLORS[0];

const verdict = (sample) => sample.failure ? ["bad", "?"] : sample.correct ? ["good", "✓"] : ["bad", "✗"];

function select() {
  const run = byId("run").value, step = byId("step").value, words = byId("search").value.toLowerCase();
  shown = data.samples.filter((sample) => FILTERS[filter](sample) && (run === "" || sample.run === Number(run)) && (step === "" || sample.step === Number(step)) &&
    (words === "" || sample.text.toLowerCase().includes(words) || data.prompts[sample.prompt].search.includes(words)));
  if (filter === "highest divergence") shown.sort((one, other) => other.divergence - one.divergence);
  listed = 0;
  byId("list").replaceChildren();
  more();
  byId("count").textContent = `${shown.length.toLocaleString("en")} of ${data.samples.length.toLocaleString("en")}`;
  if (shown.length) open(shown.slice(0, PAGE).find((sample) => sample.values && sample.values.divergence) || shown[0], false);
  else byId("sample").replaceChildren(make("p", { class: "quiet" }, data.samples.length ? "No sample matches." : "These runs have no rollouts (logging.rollouts: false)."));
}

function more() {
  const list = byId("list");
  list.querySelector(".more")?.remove();
  for (const sample of shown.slice(listed, listed + PAGE)) {
    const [kind, mark] = verdict(sample);
    const line = make("div", { class: "line" }, make("span", { class: `mark ${kind}` }, mark), `step ${sample.step} · sample ${sample.number}`,
      make("span", { class: "tag" }, sample.branch), sample.values ? make("span", { class: "tag" }, "tokens") : null,
      filter === "highest divergence" ? make("span", { class: "number" }, figure(sample.divergence)) : null);
    const button = make("button", { type: "button" }, line, make("div", { class: "text" }, visible(sample.text.slice(0, 120).replaceAll("\n", " "))));
    button.addEventListener("click", () => open(sample, true));
    sample.button = button;
    list.append(button);
  }
  listed += PAGE;
  if (listed < shown.length) list.append(make("button", { type: "button", class: "more", onclick: more }, "more"));
}

function open(sample, asked) {
  current?.button?.removeAttribute("aria-current");
  current = sample;
  sample.button.setAttribute("aria-current", "true");
  drawSample(sample);
  if (asked && window.innerWidth <= 820) byId("sample").scrollIntoView({ behavior: "smooth" });
}

function drawSample(sample) {
  const prompt = data.prompts[sample.prompt], [kind, mark] = verdict(sample);
  const facts = [["verdict", sample.failure ? `none: ${sample.failure}` : `${sample.correct ? "right" : "wrong"}, reward ${figure(sample.reward)}`], ["format", sample.format ? "ok" : "not ok"],
    ["route", sample.branch.toUpperCase() + (sample.noTeacher ? ` (${sample.noTeacher.replaceAll("_", " ")})` : "")], ["advantage", figure(sample.advantage)],
    ["tokens", `${sample.tokens} (${sample.finish})`], ["ground truth", visible(prompt.answer)]];
  const sibling = sample.sibling === null ? null : data.samples.find((other) => other.run === sample.run && other.step === sample.step && other.prompt === sample.prompt && other.index === sample.sibling);
  byId("sample").replaceChildren(
    make("div", { class: "bar" }, make("h2", {}, make("span", { class: `mark ${kind}` }, mark), ` Step ${sample.step}, sample ${sample.number}`), make("span", { class: "quiet" }, data.runs[sample.run].name)),
    make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", { class: "number" }, value)))),
    make("h3", {}, "Prompt"), words(...prompt.messages.flatMap(([role, text]) => [make("span", { class: "role" }, `${visible(role)}\n`), `${visible(text)}\n`])),
    ...response(sample),
    ...(sample.feedback ? [make("h3", {}, "Feedback"), words(visible(sample.feedback))] : []),
    ...(sibling ? [make("h3", {}, `Sibling shown to its teacher (sample ${sibling.number})`), words(visible(sibling.text))] : []));
}

const words = (...children) => make("div", { class: "words", dir: "auto" }, ...children);

function response(sample) {
  if (!sample.values) return [make("h3", {}, "Response"), words(visible(sample.text))];
  const bar = make("div", { class: "choice wrap", id: "colors" }), scale = make("span", { class: "scale" }), box = words();
  const available = COLORS.filter((name) => name === "advantage" || sample.values.divergence);
  if (!available.includes(coloring)) coloring = available[0];
  const paint = () => {
    scale.replaceChildren(...legend(sample));
    box.replaceChildren(...sample.values.tokens.map((text, place) => token(sample, text, place)));
  };
  choices(bar, available, coloring, (name) => { coloring = name; paint(); });
  paint();
  return [make("h3", {}, "Response, coloured by"), make("div", { class: "bar" }, bar, scale), box];
}

// [red, green, blue] by name and strength 0 … 1 of a token under the current colouring.
function shade(sample, place) {
  const values = sample.values;
  if (coloring === "divergence") return ["heat", Math.min(1, values.divergence[place] / Math.LN2)];
  if (coloring === "entropy weight") { const w = values.weight[place]; return [w > 1 ? "more" : "less", Math.min(1, Math.abs(Math.log2(w)))]; }
  if (coloring === "advantage") return [sample.advantage > 0 ? "more" : "less", Math.min(1, Math.abs(sample.advantage))];
  const gap = values.teacher_logprob[place] - values.logprob[place];
  return [gap > 0 ? "more" : "less", Math.min(1, Math.abs(gap) / 4)];
}

function legend() {
  const ends = { "divergence": ["0", "ln 2"], "entropy weight": ["½", "2"], "advantage": ["−1", "1"], "teacher − policy": ["−4", "4 nats"] }[coloring];
  const strip = coloring === "divergence" ? "linear-gradient(to right, transparent, rgba(var(--heat), .8))" : "linear-gradient(to right, rgba(var(--less), .8), transparent, rgba(var(--more), .8))";
  const bar = make("i");
  bar.style.backgroundImage = strip;
  return [ends[0], bar, ends[1]];
}

function token(sample, text, place) {
  if (place === sample.gap) return make("span", { class: "quiet" }, `\n${text}\n`);
  const [name, strength] = shade(sample, place);
  const node = make("span", { class: "token" }, visible(text));
  if (strength > 0.01) node.style.background = `rgba(var(--${name}), ${(0.8 * strength).toFixed(3)})`;
  const show = () => {
    document.querySelector(".token.open")?.classList.remove("open");
    node.classList.add("open");
    const box = node.getBoundingClientRect();
    showTip(box.left + window.scrollX, box.top + window.scrollY, ...tokenTip(sample.values, place));
  };
  node.addEventListener("pointerenter", show);
  node.addEventListener("pointerleave", () => { node.classList.remove("open"); hideTip(); });
  node.addEventListener("click", show);
  return node;
}

function tokenTip(values, place) {
  const facts = [["policy", values.logprob], ["entropy", values.entropy], ["teacher", values.teacher_logprob], ["teacher entropy", values.teacher_entropy],
    ["divergence", values.divergence], ["weight", values.weight]].filter(([, column]) => column).map(([name, column]) => `${name} ${figure(column[place])}`);
  const table = (title, top) => make("div", {}, make("b", {}, title), make("table", {}, ...top.map(([text, logprob]) =>
    make("tr", {}, make("td", {}, visible(text).replaceAll("\n", "↵")), make("td", { class: "number" }, logprob === null ? "–" : `${(100 * Math.exp(logprob)).toFixed(1)} %`)))));
  return [make("div", { class: "quiet number" }, facts.join(" · ")),
    make("div", { class: "tops" }, table("student", values.top[place]), ...(values.teacher_top ? [table("teacher", values.teacher_top[place])] : []))];
}

// ---- beginning -----------------------------------------------------------------------------------------------------------
function begin() {
  for (const run of data.runs) run.place = Object.fromEntries(run.columns.step.map((step, place) => [step, place]));
  for (const prompt of data.prompts) prompt.search = prompt.messages.map(([, text]) => text).join("\n").toLowerCase();
  for (const sample of data.samples) sample.divergence ??= -1;
  drawRuns();
  choices(byId("axis"), ["step", "hours", "tokens"], axis, (name) => { axis = name; drawCharts(); });
  byId("smooth").addEventListener("change", (event) => { smooth = event.target.checked; drawCharts(); });
  drawCharts();
  choices(byId("filters"), Object.keys(FILTERS), filter, (name) => { filter = name; select(); });
  byId("run").append(make("option", { value: "" }, "all runs"), ...data.runs.map((run, number) => make("option", { value: number }, run.name)));
  const steps = [...new Set(data.samples.map((sample) => sample.step))].sort((one, other) => one - other);
  byId("step").append(make("option", { value: "" }, "all steps"), ...steps.map((step) => make("option", { value: step }, `step ${step}`)));
  for (const name of ["run", "step"]) byId(name).addEventListener("change", select);
  let wait;
  byId("search").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(select, 150); });
  byId("notes").textContent = data.notes.join("\n");
  select();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}
begin();
