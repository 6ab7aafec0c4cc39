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

const load = async (path) => {
  const answer = await fetch(path, { signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
};

const refresh = async () => {
  const summary = document.getElementById("summary");
  try {
    const [status, deployments, endpoints, nodes, proxies] = await Promise.all(
      ["cluster/status", "deployments", "endpoints", "nodes", "proxies"].map((name) => load(`/api/v2/${name}`)),
    );
    summary.className = "";
    summary.textContent =
      `version ${status.version}, term ${status.term}, revision ${status.revision}, store ${status.store}, ` +
      `${status.endpoints_ready} endpoints ready, ${status.nodes} nodes, ${status.proxies} proxies`;
    fill("deployments", ["model", "engine", "replicas", "ready", "starting", "draining", "failed", "waiting"],
      deployments.deployments.map((d) => [
        cell(d.model), cell(d.engine), cell(d.replicas),
        cell(d.status.ready, d.status.ready >= d.replicas ? "ready" : ""), cell(d.status.starting),
        cell(d.status.draining), cell(d.status.failed, d.status.failed ? "failed" : ""),
        cell(d.status.waiting.join("; "), "muted"),
      ]));
    fill("endpoints", ["id", "model", "node", "address", "state", "running", "waiting", "KV used", "restarts", "reason"],
      endpoints.endpoints.map((e) => [
        cell(e.id), cell(e.model), cell(e.node), cell(e.address), cell(e.state, e.state), cell(e.running),
        cell(e.waiting), cell(`${Math.round(e.kv_used_ratio * 100)} %`), cell(e.restarts), cell(e.reason, "muted"),
      ]));
    fill("nodes", ["node", "state", "zone", "GPUs", "engines", "agent"],
      nodes.nodes.map((n) => [
        cell(n.node_id), cell(n.state, n.state), cell(n.zone),
        cell(`${n.gpus.filter((g) => !g.fault).length} of ${n.gpus.length}`), cell(n.engines), cell(n.agent_version),
      ]));
    fill("proxies", ["proxy", "acknowledged", "up to date with", "last refusal"],
      proxies.proxies.map((p) => [
        cell(p.node_id), cell(p.version_acked), cell(p.version_synced || "not yet"), cell(p.last_nack, "error"),
      ]));
  } catch (error) {
    summary.className = "error";
    summary.textContent = `the control plane does not answer: ${error.message}`;
  }
  setTimeout(refresh, 2000);
};

refresh();
