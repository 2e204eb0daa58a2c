// Asks the server every two seconds what it does, and draws that. All text goes in as text, never as markup.
"use strict";

const EVERY_MS = 2000;
const at = (id) => document.getElementById(id);
let key = sessionStorage.getItem("key") || "";

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function figure(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(3) : value.toPrecision(4).replace(/\.?0+$/, "");
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} d`;
}

const bytes = (n) => (n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`);

function tile(name, value) {
  return element("div", { className: "tile" }, element("b", { textContent: value }), name);
}

// A line through the points (x, y); NaN and missing values are left out.
function chart(points, kind, label) {
  const good = points.filter(([, y]) => typeof y === "number" && Number.isFinite(y));
  const box = element("figure");
  if (good.length < 2) return box;
  const xs = good.map(([x]) => x), ys = good.map(([, y]) => y);
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const share = (y) => (high > low ? (y - low) / (high - low) : 0.5);
  const place = ([x, y]) => `${(1000 * (x - left)) / (right - left || 1)},${100 - 100 * share(y)}`;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 -4 1000 108");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${label}: from ${figure(ys[0])} to ${figure(ys.at(-1))}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", good.map(place).join(" "));
  line.setAttribute("class", kind);
  svg.append(line);
  const caption = element("div", { className: "range" });
  caption.append(
    element("span", {}, element("i", { className: `key ${kind}` }), `${label} ${figure(ys.at(-1))}`),
    element("span", { textContent: `${figure(low)} … ${figure(high)}, steps ${figure(left)}–${figure(right)}` }),
  );
  box.append(svg, caption);
  return box;
}

function facts(rows) {
  const list = element("dl");
  for (const [name, value] of rows) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
  return list;
}

function modelCard(model) {
  const last = Object.entries(model.last || {}).map(([name, value]) => [name, figure(value)]);
  const state = `${model.resident ? "in memory" : "on disk"}, idle for ${duration(model.idle_s)}`;
  const kind = model.rank ? `LoRA rank ${model.rank}` : "full weights";
  return element(
    "article",
    { className: "card" },
    element("h3", { textContent: model.model_id }),
    element("p", { className: "quiet", textContent: `${kind}, ${state}` }),
    chart((model.history || []).map((row) => [row.step, row["loss:sum"]]), "loss", "loss (sum)"),
    facts([["steps", figure(model.steps)], ["waiting", figure(model.queued)], ...last]),
  );
}

function runCards(run) {
  if (!run || !run.settings) return [element("p", { className: "empty", textContent: "No run: POST /v1/start begins one." })];
  const settings = Object.entries(run.settings).map(([name, value]) => [name, figure(value)]);
  const last = Object.entries(run.last_update || {}).map(([name, value]) => [name, figure(value)]);
  const now = element(
    "article",
    { className: "card" },
    element("h3", { textContent: `run ${run.model_version[0]}` }),
    element("p", { className: "quiet", textContent: `${run.state}, version ${run.model_version[1]}` }),
    chart((run.history || []).map((row) => [row.version, row["reward/mean"]]), "reward", "reward"),
    chart((run.history || []).map((row) => [row.version, row.loss]), "loss", "loss"),
    facts([["rollouts without a reward", figure(run.open_rollouts)], ["complete groups", figure(run.complete_groups)]]),
  );
  const update = element("article", { className: "card" }, element("h3", { textContent: "last update" }), facts(last));
  const set = element("article", { className: "card" }, element("h3", { textContent: "settings" }), facts(settings));
  return [now, update, set];
}

function sampleText(sample) {
  const prompt = typeof sample.prompt === "string" ? sample.prompt : JSON.stringify(sample.prompt);
  const head = [sample.weights || "", "reward" in sample ? `reward ${figure(sample.reward)}` : ""].filter(Boolean).join(", ");
  return element(
    "article",
    { className: "text" },
    element("p", { className: "quiet", textContent: head }),
    element("pre", { className: "prompt", textContent: prompt }),
    element("pre", { textContent: sample.completion }),
  );
}

function refusal(entry) {
  const when = new Date(entry.time * 1000);
  return element(
    "li",
    {},
    element("time", { dateTime: when.toISOString(), textContent: when.toLocaleTimeString("en-GB") }),
    `${entry.where ? `${entry.where}: ` : ""}${entry.reason}`,
  );
}

function fill(id, children, none) {
  const open = new Set([...at(id).querySelectorAll("pre")].filter((p) => p.scrollTop > 0));
  if (open.size) return; // somebody is reading a long text
  at(id).replaceChildren(...(children.length ? children : [element("p", { className: "empty", textContent: none })]));
}

function draw(status) {
  const { base, models, queue, sessions, totals, disk } = status;
  at("base").textContent = typeof base === "string" ? base : base.name;
  at("about").textContent = `up ${duration(status.uptime_s)}, version ${status.version}`;
  at("tiles").replaceChildren(
    tile("sessions now", figure(sessions.live)),
    tile("models", figure(status.models_in_all)),
    tile("training waits", figure(queue.training)),
    tile("sampling waits", figure(queue.sampling)),
    tile("being sampled", figure(queue.decoding)),
    tile("longest wait", duration(queue.oldest_s || 0)),
    ...Object.entries(totals).map(([name, value]) => tile(name.replaceAll("_", " "), figure(value))),
    tile("checkpoints", figure(status.checkpoints)),
    tile("disk free", bytes(disk.free)),
  );
  say(disk.fault, true);
  fill("models", models.map(modelCard), "No model yet.");
  fill("run", runCards(status.rollouts), "");
  const samples = [...((status.rollouts && status.rollouts.samples) || []), ...status.samples].slice(-12).reverse();
  fill("samples", samples.map(sampleText), "Nothing was sampled yet.");
  fill("refusals", [...status.refusals].reverse().map(refusal), "None.");
}

function say(text, bad = false) {
  at("state").textContent = text;
  at("state").className = bad ? "bad" : "";
}

function ask(why) {
  at("ask").hidden = false;
  at("main").hidden = true;
  say(why, why !== "");
}

async function look() {
  if (document.hidden) return;
  let answer;
  try {
    answer = await fetch("page/status", { headers: { "X-API-Key": key }, cache: "no-store" });
  } catch {
    say("The server does not answer; what is shown is what it said last.", true);
    return;
  }
  if (answer.status === 401) {
    ask("The server does not know this key.");
    key = "";
    sessionStorage.removeItem("key");
    return;
  }
  if (!answer.ok) {
    say(`The server answers ${answer.status}; what is shown is what it said last.`, true);
    return;
  }
  at("ask").hidden = true;
  at("main").hidden = false;
  draw(await answer.json());
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  sessionStorage.setItem("key", key);
  at("key").value = "";
  look();
});
document.addEventListener("visibilitychange", () => key && look());
(async function watch() {
  if (key) await look();
  else if (at("ask").hidden) ask("");
  setTimeout(watch, EVERY_MS);
})();
