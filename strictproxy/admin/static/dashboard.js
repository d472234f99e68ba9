// The dashboard: draws what /api/v1/events tells, and asks for changes when somebody wants some.
"use strict";

const KEEP = 300; // seconds of history in the charts
const MOST_SLOTS = 40; // more than that are drawn as one bar
const get = (id) => document.getElementById(id);
const views = new Map();
let token = sessionStorage.getItem("token") || "";
let controls = false;
let last = null;

function headers(more = {}) {
  return token ? { authorization: `Bearer ${token}`, ...more } : more;
}

function say(text) {
  get("alert").textContent = text;
  get("alert").hidden = !text;
}

function status(text, kind) {
  get("status").textContent = text;
  get("status").className = kind;
}

// -- changes

async function change(method, path, body) {
  const answer = await fetch(`api/v1/${path}`, {
    method,
    headers: headers({ "content-type": "application/json" }),
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (answer.ok) {
    say("");
    return;
  }
  const { error } = await answer.json().catch(() => ({ error: answer.statusText }));
  say(error);
  if (answer.status === 401) askForToken();
}

function askForToken() {
  get("sign-in").hidden = false;
  get("token").focus();
}

get("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token = get("token").value.trim();
  sessionStorage.setItem("token", token);
  get("token").value = "";
  get("sign-in").hidden = true;
  say("");
  setControls(true);
});

function setControls(on) {
  controls = on;
  get("controls").setAttribute("aria-pressed", String(on));
  if (on && !token) askForToken();
  if (last) draw(last);
}

get("controls").addEventListener("click", () => setControls(!controls));

// -- one upstream

class View {
  constructor(name) {
    this.name = name;
    this.root = get("upstream").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.root.querySelector(selector);
    this.find("h2").textContent = name;
    this.pods = new Map();
    this.history = { rate: [], waiting: [] };
    this.before = null;
    const path = `upstreams/${encodeURIComponent(name)}`;
    this.find(".change").addEventListener("submit", (event) => {
      event.preventDefault();
      change("PATCH", path, { limit: Number(this.find("input").value) });
    });
    this.find(".pause").addEventListener("click", () => change("PATCH", path, { paused: !this.state.paused }));
    this.find("details").addEventListener("toggle", () => this.drawLine());
    get("upstreams").append(this.root);
  }

  draw(state, time) {
    this.state = state;
    const again = this.before && time <= this.before.time;
    if (!again) {
      const passed = this.before ? time - this.before.time : 0;
      this.rate = passed ? Math.max(0, (state.requests - this.before.requests) / passed) : 0;
      this.before = { time, requests: state.requests };
    }
    const rate = this.rate;
    this.figure("running", `${state.running} / ${state.slots}`);
    this.figure("waiting", state.waiting);
    this.figure("oldest", state.waiting ? duration(state.oldest) : "–");
    this.figure("rate", rate >= 10 ? Math.round(rate) : rate.toFixed(1));
    this.figure("failures", state.failures);
    this.find(".line span").style.width = `${Math.min(100, (100 * state.waiting) / Math.max(state.slots, 1) / 4)}%`;
    this.find(".discovery").textContent = this.discovery(state);
    this.find(".change").hidden = !controls;
    const input = this.find("input");
    if (document.activeElement !== input) input.value = state.limit;
    this.find(".pause").textContent = state.paused ? "Go on" : "Pause";
    this.drawPods(state.pods);
    for (const [key, value] of [["rate", rate], ["waiting", state.waiting]]) {
      if (!again) this.history[key].push([time, value]);
      while (this.history[key][0][0] < time - KEEP) this.history[key].shift();
      chart(this.find(`[data-chart=${key}]`), this.history[key], time);
    }
    this.drawLine();
  }

  figure(name, value) {
    const place = this.find(`[data-figure=${name}]`);
    const text = String(value);
    if (place.textContent !== text) place.textContent = text;
  }

  discovery(state) {
    if (state.paused) return "Paused: nothing new is dispatched.";
    const found = state.discovery;
    if (!found) return `${state.pods.length} pods, as configured.`;
    if (found.pods === null) return `No set of pods is trusted yet. ${found.last_error || ""}`;
    let text = `${found.pods} pods`;
    if (found.since) text += `, since ${new Date(found.since * 1000).toLocaleTimeString()}`;
    if (found.candidate !== null) text += `; ${found.candidate} pods are looked into (${found.agreed} lookups agree)`;
    if (found.last_error) text += `; last error: ${found.last_error}`;
    return `${text}.`;
  }

  drawPods(pods) {
    const seen = new Set();
    for (const [address, leases, limit, condition, error] of pods) {
      seen.add(address);
      let pod = this.pods.get(address);
      if (!pod) {
        pod = makePod(this.name, address);
        this.pods.set(address, pod);
        this.find(".pods").append(pod.root);
      }
      const key = `${leases}/${limit}/${condition}/${error}/${controls}`;
      if (pod.key !== key) {
        pod.key = key;
        drawPod(pod, leases, limit, condition, error);
      }
    }
    for (const [address, pod] of this.pods) {
      if (!seen.has(address)) {
        pod.root.remove();
        this.pods.delete(address);
      }
    }
  }

  async drawLine() {
    if (!this.find("details").open || this.asking) return;
    this.asking = true;
    try {
      const answer = await fetch(`api/v1/upstreams/${encodeURIComponent(this.name)}`, { headers: headers() });
      if (!answer.ok) return;
      const { line, requests, waiting } = await answer.json();
      const rows = [...requests.slice(0, 100), ...line].map(requestRow);
      if (waiting > line.length) rows.push(row([`and ${waiting - line.length} more`]));
      this.find("tbody").replaceChildren(...rows);
    } finally {
      this.asking = false;
    }
  }
}

function requestRow(each) {
  const place = each.pod ? `on ${each.pod}` : each.position;
  const made = row([place, each.route, each.client, duration(each.age), each.request_id, each.task ?? ""]);
  if (controls) {
    const cancel = document.createElement("button");
    cancel.textContent = "Cancel";
    cancel.addEventListener("click", () => change("DELETE", `requests/${each.number}`));
    made.insertCell().append(cancel);
  }
  return made;
}

function row(texts) {
  const made = document.createElement("tr");
  for (const text of texts) made.insertCell().textContent = text;
  return made;
}

function makePod(upstream, address) {
  const root = document.createElement("li");
  const name = document.createElement("div");
  name.className = "name";
  name.textContent = address;
  const slots = document.createElement("div");
  slots.className = "slots";
  slots.setAttribute("aria-hidden", "true");
  const what = document.createElement("div");
  what.className = "what";
  const text = document.createElement("span");
  const button = document.createElement("button");
  button.type = "button";
  what.append(text, button);
  root.append(name, slots, what);
  const pod = { root, slots, text, button, condition: "" };
  button.addEventListener("click", () => {
    const path = `upstreams/${encodeURIComponent(upstream)}/pods/${encodeURIComponent(address)}`;
    change("PATCH", path, { drained: pod.condition !== "drained" });
  });
  return pod;
}

function drawPod(pod, leases, limit, condition, error) {
  pod.condition = condition;
  pod.root.className = `pod ${condition}`;
  pod.root.title = error || "";
  pod.text.textContent = `${condition}, ${leases} of ${limit}`;
  pod.button.hidden = !controls || condition === "removed";
  pod.button.textContent = condition === "drained" ? "Undrain" : "Drain";
  const count = Math.max(limit, leases);
  const shown = Math.min(count, MOST_SLOTS);
  while (pod.slots.childElementCount > shown) pod.slots.lastChild.remove();
  while (pod.slots.childElementCount < shown) pod.slots.append(document.createElement("i"));
  const busy = Math.round((leases / Math.max(count, 1)) * shown);
  [...pod.slots.children].forEach((slot, n) => slot.classList.toggle("busy", n < busy));
}

// -- charts

function chart(canvas, points, now) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const style = getComputedStyle(document.documentElement);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  const most = Math.max(1, ...points.map(([, value]) => value));
  const x = (time) => width * (1 - (now - time) / KEEP);
  const y = (value) => height - 2 - ((height - 16) * value) / most;
  pen.strokeStyle = style.getPropertyValue("--edge");
  pen.beginPath();
  pen.moveTo(0, height - 1.5);
  pen.lineTo(width, height - 1.5);
  pen.stroke();
  pen.strokeStyle = style.getPropertyValue("--busy");
  pen.lineWidth = 1.5;
  pen.beginPath();
  points.forEach(([time, value], n) => (n ? pen.lineTo(x(time), y(value)) : pen.moveTo(x(time), y(value))));
  pen.stroke();
  pen.fillStyle = style.getPropertyValue("--quiet");
  pen.font = "11px system-ui, sans-serif";
  pen.fillText(`most ${most >= 10 ? Math.round(most) : most.toFixed(1)}`, 2, 10);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `now ${points[points.length - 1][1].toFixed(1)}, most ${most.toFixed(1)}`);
}

function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// -- everything

function draw(state) {
  last = state;
  for (const [name, upstream] of Object.entries(state.upstreams)) {
    if (!views.has(name)) views.set(name, new View(name));
    views.get(name).draw(upstream, state.time);
  }
  for (const [name, view] of views) {
    if (!(name in state.upstreams)) {
      view.root.remove();
      views.delete(name);
    }
  }
  const parts = Object.entries(state.outcomes).sort().map(([name, count]) => `${name} ${count}`);
  get("outcomes").textContent = parts.length ? `Answers so far: ${parts.join(", ")}.` : "No request yet.";
  get("errors").replaceChildren(...state.errors.map(([time, reason, route, pod]) =>
    row([new Date(time * 1000).toLocaleTimeString(), reason, route, pod || ""])));
  get("recent").hidden = !state.errors.length;
  if (state.reload_error) say(`The configuration file has mistakes, and what was before is in force:\n${state.reload_error}`);
  status(state.stopping ? "shutting down" : "live", state.stopping ? "lost" : "live");
}

// EventSource cannot carry a token, so the stream is read by hand.
async function listen() {
  const answer = await fetch("api/v1/events", { headers: headers() });
  if (answer.status === 401 || answer.status === 403) {
    const { error } = await answer.json();
    status(error, "lost");
    if (answer.status === 401) askForToken();
    return;
  }
  if (!answer.ok) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    // Only the newest matters, if we fell behind.
    const newest = events.pop();
    if (newest) {
      const state = JSON.parse(newest.replace(/^data: /, ""));
      requestAnimationFrame(() => draw(state));
    }
  }
}

async function run() {
  for (;;) {
    try {
      await listen();
    } catch {
      // the proxy is away; it is asked again below
    }
    if (get("status").className === "live") status("connection lost", "lost");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

run();
