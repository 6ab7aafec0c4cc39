// Shows what the REST API says, every two seconds. Names come from outside: they are set as text, never as HTML.
"use strict";

const cell = (text, className) => {
  const td = document.createElement("td");
  td.textContent = text;
  if (className) td.className = className;
  return td;
};

const fill = (id, titles, rows) => {
  const table = document.getElementById(id);
  const head = document.createElement("tr");
  for (const title of titles) {
    const th = document.createElement("th");
    th.textContent = title;
    head.append(th);
  }
  const lines = rows.map((cells) => {
    const tr = document.createElement("tr");
    tr.append(...cells);
    return tr;
  });
  if (!lines.length) {
    const tr = document.createElement("tr");
    tr.append(cell("none", "muted"));
    lines.push(tr);
  }
  table.replaceChildren(head, ...lines);
};

// The token stays in this tab: it is gone when the tab is.
const TOKEN = "penstock-token";
const login = document.getElementById("login");
const token = document.getElementById("token");

class Refused extends Error {}

const load = async (path) => {
  const given = sessionStorage.getItem(TOKEN);
  const headers = given ? { authorization: `Bearer ${given}` } : {};
  const answer = await fetch(path, { headers, signal: AbortSignal.timeout(5000) });
  if (answer.ok) return answer.json();
  const message = (await answer.json().catch(() => ({}))).error?.message ?? `${path}: ${answer.status}`;
  if (answer.status === 401) throw new Refused(message);
  if (answer.status === 429) throw Object.assign(new Error(message), { after: Number(answer.headers.get("retry-after")) });
  throw new Error(message);
};

// Every page of a list.
const list = async (things, path) => {
  const all = [];
  for (let cursor = ""; cursor !== null;) {
    const page = await load(cursor ? `${path}?cursor=${encodeURIComponent(cursor)}` : path);
    all.push(...page[things]);
    cursor = page.next_cursor;
  }
  return all;
};

// Tables of one pass, and the pause after it: with a token each is a request that counts against its limit.
const PAUSE_OPEN_MS = 2000;
const PAUSE_CLOSED_MS = 10000;

const refresh = async () => {
  const summary = document.getElementById("summary");
  let pause = PAUSE_OPEN_MS;
  try {
    const who = await load("/api/v2/whoami");
    login.hidden = who.open;
    if (!who.open) pause = PAUSE_CLOSED_MS;
    document.getElementById("who").textContent = who.open ? "" : `${who.name}, ${who.role}`;
    const status = await load("/api/v2/cluster/status");
    const [deployments, endpoints, nodes, proxies] = await Promise.all(
      ["deployments", "endpoints", "nodes", "proxies"].map((name) => list(name, `/api/v2/${name}`)),
    );
    const audit = await load("/api/v2/audit?limit=20");
    summary.className = "";
    summary.textContent =
      `version ${status.version}, term ${status.term}, revision ${status.revision}, store ${status.store}, ` +
      `${status.endpoints_ready} endpoints ready, ${status.nodes} nodes, ${status.proxies} proxies`;
    fill("deployments", ["model", "engine", "replicas", "ready", "starting", "draining", "failed", "waiting"],
      deployments.map((d) => [
        cell(d.model), cell(d.engine), cell(d.replicas),
        cell(d.status.ready, d.status.ready >= d.replicas ? "ready" : ""), cell(d.status.starting),
        cell(d.status.draining), cell(d.status.failed, d.status.failed ? "failed" : ""),
        cell(d.status.waiting.join("; "), "muted"),
      ]));
    fill("endpoints", ["id", "model", "node", "address", "state", "running", "waiting", "KV used", "restarts", "reason"],
      endpoints.map((e) => [
        cell(e.id), cell(e.model), cell(e.node), cell(e.address), cell(e.state, e.state), cell(e.running),
        cell(e.waiting), cell(`${Math.round(e.kv_used_ratio * 100)} %`), cell(e.restarts), cell(e.reason, "muted"),
      ]));
    fill("nodes", ["node", "state", "zone", "GPUs", "engines", "agent"],
      nodes.map((n) => [
        cell(n.node_id), cell(n.state, n.state), cell(n.zone),
        cell(`${n.gpus.filter((g) => !g.fault).length} of ${n.gpus.length}`), cell(n.engines), cell(n.agent_version),
      ]));
    fill("proxies", ["proxy", "acknowledged", "up to date with", "last refusal"],
      proxies.map((p) => [
        cell(p.node_id), cell(p.version_acked), cell(p.version_synced || "not yet"), cell(p.last_nack, "error"),
      ]));
    fill("audit", ["when", "who", "role", "did", "to", "from"],
      audit.records.map((r) => [
        cell(new Date(r.unix_ms).toISOString().replace("T", " ").slice(0, 19)), cell(r.actor), cell(r.role),
        cell(`${r.method} ${r.path}`), cell(`${r.kind} ${r.name}`), cell(r.client || r.peer, "muted"),
      ]));
  } catch (error) {
    summary.className = "error";
    if (error instanceof Refused) {
      login.hidden = false;
      summary.textContent = sessionStorage.getItem(TOKEN) ? error.message : "a token is needed";
      return;
    }
    summary.textContent = `the control plane does not answer: ${error.message}`;
    if (error.after) pause = error.after * 1000;
  }
  again(pause);
};

let timer;
const again = (pause) => {
  clearTimeout(timer);
  timer = setTimeout(refresh, pause);
};

login.addEventListener("submit", (event) => {
  event.preventDefault();
  if (token.value) sessionStorage.setItem(TOKEN, token.value);
  else sessionStorage.removeItem(TOKEN);
  token.value = "";
  again(0);
});

refresh();
