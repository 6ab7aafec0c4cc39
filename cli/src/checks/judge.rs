//! What the facts of a site mean. Pure.

use std::collections::{BTreeMap, BTreeSet};

use penstock_controlplane::store::members::Member;
use serde_json::Value;

use super::{
    doctor::{Facts, Plane, ProxyLook},
    findings::{Finding, bytes, fail, ok, warn},
};

/// etcd's file is full at 2 GiB unless its operator raised the quota.
const ETCD_FULL: u64 = 2 << 30;
const DAY: i64 = 86_400;

/// Everything, in the order in which a person would look.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut out = planes(&facts.planes, &facts.version);
    out.extend(facts.etcd.iter().flat_map(|members| etcd(members)));
    out.extend(nodes(facts));
    out.extend(deployments(facts));
    out.extend(proxies(facts));
    out.extend(facts.looked_at.iter().flat_map(|proxy| looked_at(proxy, facts.now_unix_s)));
    for (what, end) in &facts.certificates {
        out.push(match end {
            Ok(end) => certificate(what, *end, facts.now_unix_s),
            Err(why) => fail(
                "certificate",
                format!("{what} {why}"),
                "the control plane cannot use it either: replace it",
            ),
        });
    }
    out.extend(
        facts.disks.iter().map(|(folder, free, total)| disk(&folder.display().to_string(), *free, *total)),
    );
    out.extend(facts.backups.map(|(interval, last)| backups(interval, last, facts.now_unix_s)));
    out
}

/// A series without labels out of Prometheus' text.
pub(super) fn metric(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

fn planes(planes: &[Plane], version: &str) -> Vec<Finding> {
    let (mut out, mut leaders, mut terms) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for Plane { address, status } in planes {
        let what = format!("control plane {address}");
        let status = match status {
            Ok(status) => status,
            Err(why) => {
                let advice =
                    "start it, or name the right address; proxies and engines go on without it meanwhile";
                out.push(fail(&what, why.clone(), advice));
                continue;
            }
        };
        leaders.insert(text(status, "leader_id"));
        terms.insert(number(status, "/term"));
        let reasons = status.pointer("/readyz/reasons").and_then(Value::as_array).into_iter().flatten();
        let reasons: Vec<&str> = reasons.filter_map(Value::as_str).collect();
        out.push(match reasons.is_empty() {
            true => ok(
                &what,
                format!("ready, release {}, {} store", text(status, "version"), text(status, "store")),
            ),
            false => {
                fail(&what, format!("not ready: {}", reasons.join("; ")), "its log says more (penstock logs)")
            }
        });
        if text(status, "version") != version {
            let why = format!("release {}, and this program is {version}", text(status, "version"));
            out.push(warn(&what, why, "upgrade control planes first, then agents, then proxies; docs/ha.md"));
        }
        if let Some(held) = status.get("held").and_then(Value::as_str) {
            out.push(fail(&what, format!("it changes nothing: {held}"), "look at the store"));
        }
    }
    let reached = planes.iter().any(|plane| plane.status.is_ok());
    if reached && (leaders.len() != 1 || leaders.contains("")) {
        let shown: Vec<&str> =
            leaders.into_iter().map(|id| if id.is_empty() { "nobody" } else { id }).collect();
        let advice = "wait ten seconds and look again; if it stays so, look at etcd: without a leader nothing is changed";
        out.push(fail("leader", format!("control planes name {}", shown.join(" and ")), advice));
    } else if reached {
        let term: Vec<String> = terms.iter().map(u64::to_string).collect();
        out.push(ok(
            "leader",
            format!("{} leads, term {}", leaders.into_iter().collect::<String>(), term.join(", ")),
        ));
    }
    out
}

fn etcd(members: &[Member]) -> Vec<Finding> {
    let mut out = Vec::new();
    let (mut known, mut leaders) = (BTreeSet::new(), BTreeSet::new());
    let mut up = 0;
    for Member { endpoint, says } in members {
        let what = format!("etcd {endpoint}");
        let says = match says {
            Ok(says) => says,
            Err(why) => {
                out.push(fail(
                    &what,
                    why.clone(),
                    "start it; with a majority of members up all goes on meanwhile",
                ));
                continue;
            }
        };
        up += 1;
        known.extend(says.members.iter().cloned());
        leaders.insert(says.leader);
        let size =
            format!("release {}, {} ({} used)", says.version, bytes(says.db_bytes), bytes(says.used_bytes));
        out.push(match says.db_bytes {
            big if big >= ETCD_FULL / 10 * 8 => {
                let advice = "at 2 GiB, unless --quota-backend-bytes says otherwise, it takes no writes: compact and defragment it";
                warn(&what, size, advice)
            }
            _ => ok(&what, size),
        });
        if !says.alarms.is_empty() {
            let advice = "free space, defragment, then `etcdctl alarm disarm`";
            out.push(fail(&what, format!("alarms: {}", says.alarms.join(", ")), advice));
        }
    }
    let total = known.len().max(members.len());
    let quorum = total / 2 + 1;
    let leads = leaders.len() == 1 && !leaders.contains(&0);
    out.push(match (up >= quorum && leads, total) {
        (false, _) => fail(
            "etcd quorum",
            format!(
                "{up} of {total} members answer, {quorum} are needed{}",
                if leads { "" } else { ", and they do not agree on a leader" }
            ),
            "bring members back; until then nothing is changed, and what serves goes on",
        ),
        (true, 1) => warn(
            "etcd quorum",
            "it has a single member",
            "three or five members survive the loss of one or two",
        ),
        (true, even) if even.is_multiple_of(2) => warn(
            "etcd quorum",
            format!("{up} of {even} members answer"),
            "an even number bears no more failures than one fewer: add or remove a member",
        ),
        (true, _) => ok("etcd quorum", format!("{up} of {total} members answer, {quorum} are needed")),
    });
    out
}

fn nodes(facts: &Facts) -> Vec<Finding> {
    let nodes = match &facts.nodes {
        Ok(nodes) => nodes,
        Err(why) => return vec![fail("nodes", why.clone(), "")],
    };
    let mut out = Vec::new();
    if nodes.is_empty() {
        let advice = "start `penstock agent` on the machines with GPUs, with controlplane.endpoints set";
        return vec![fail("nodes", "no node has ever reported", advice)];
    }
    let mut arbiters = Vec::new();
    for node in nodes {
        let name = text(node, "node_id");
        let what = format!("node {name}");
        if text(node, "role") == "arbitration" {
            arbiters.push(name);
        }
        let never_seen = text(node, "agent_version").is_empty() && number(node, "/engines") == 0;
        if text(node, "state") == "lost" && never_seen {
            let why = "it is spoken of, and has not reported since this control plane leads";
            out.push(warn(
                &what,
                why,
                "start its agent, or delete what is said of it (`penstock apply --prune nodepolicies`)",
            ));
            continue;
        }
        if text(node, "state") == "lost" {
            let engines = number(node, "/engines");
            let why = format!("lost, with {engines} engines placed on it");
            let advice = "look at the machine and its agent; its engines are placed elsewhere after fleet.lost_grace_ms";
            out.push(if engines > 0 { fail(&what, why, advice) } else { warn(&what, why, advice) });
            continue;
        }
        for gpu in node.get("gpus").and_then(Value::as_array).into_iter().flatten() {
            let fault = text(gpu, "fault");
            if !fault.is_empty() {
                let why = format!("GPU {}: {fault}", text(gpu, "uuid"));
                let advice = "it gets no engines; docs/gpus.md says what helps, and `nvidia-smi -q` more";
                out.push(fail(&what, why, advice));
            } else if matches!(text(gpu, "health"), "degraded" | "faulty") {
                let why =
                    format!("GPU {} is {}: {}", text(gpu, "uuid"), text(gpu, "health"), text(gpu, "reason"));
                out.push(warn(
                    &what,
                    why,
                    "it is used where there is no healthy one; docs/gpus.md says what helps",
                ));
            }
        }
        let foreign = node.get("foreign").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if !foreign.is_empty() {
            let shown =
                |p: &Value| format!("{} pid {} of {}", text(p, "kind"), number(p, "/pid"), text(p, "user"));
            let some: Vec<String> = foreign.iter().take(3).map(shown).collect();
            let why = format!("{} vLLM processes are not its agent's: {}", foreign.len(), some.join(", "));
            let advice = "they hold memory and ports that placement takes for free: end them, or take their GPUs from the agent \
                          (CUDA_VISIBLE_DEVICES); `penstock describe node` lists them";
            out.push(warn(&what, why, advice));
        }
        let agent = text(node, "agent_version");
        if !agent.is_empty() && agent != facts.version {
            out.push(warn(
                &what,
                format!("its agent is release {agent}, this program {}", facts.version),
                "upgrade it",
            ));
        }
        let flag = |field: &str| node.get(field) == Some(&Value::Bool(true));
        if flag("maintenance") || flag("cordoned") {
            let state = if flag("maintenance") { "in maintenance" } else { "cordoned" };
            let reason = Some(text(node, "reason")).filter(|reason| !reason.is_empty());
            let why = format!("{state}{}", reason.map(|reason| format!(": {reason}")).unwrap_or_default());
            out.push(warn(&what, why, format!("`penstock uncordon {name}` puts it back into use")));
        }
    }
    if arbiters.len() > 1 {
        let why = format!("{} arbitration nodes: {}", arbiters.len(), arbiters.join(", "));
        out.push(fail("arbitration", why, "a site has at most one: give the others another zone or role"));
    }
    let ready = nodes.iter().filter(|node| text(node, "state") == "ready").count();
    out.push(ok("nodes", format!("{ready} of {} ready", nodes.len())));
    out
}

/// Zones of nodes that run engines.
fn zones(nodes: &[Value]) -> BTreeMap<&str, &str> {
    let workers = nodes.iter().filter(|node| !["control-only", "arbitration"].contains(&text(node, "role")));
    let zoned = workers.filter(|node| !text(node, "zone").is_empty());
    zoned.map(|node| (text(node, "node_id"), text(node, "zone"))).collect()
}

/// Why engines of a model ended last, with what can be done, each once.
fn ends(facts: &Facts, model: &str) -> String {
    let mine = facts.endpoints.as_deref().unwrap_or_default().iter().filter(|e| text(e, "model") == model);
    let exits = mine.filter(|e| text(e, "state") == "failed").filter_map(|e| e.get("last_exit"));
    let said = |exit: &Value| match (text(exit, "cause"), text(exit, "advice")) {
        ("", _) => None,
        (cause, advice) => Some(format!("; {cause}: {advice}")),
    };
    exits.filter_map(said).collect::<BTreeSet<String>>().into_iter().collect()
}

fn deployments(facts: &Facts) -> Vec<Finding> {
    let deployments = match &facts.deployments {
        Ok(deployments) => deployments,
        Err(why) => return vec![fail("deployments", why.clone(), "")],
    };
    let nodes = facts.nodes.as_deref().unwrap_or_default();
    let zones = zones(nodes);
    let several: BTreeSet<&str> = zones.values().copied().collect();
    let mut out = Vec::new();
    for deployment in deployments {
        let model = text(deployment, "model");
        let what = format!("deployment {model}");
        let ready = number(deployment, "/status/ready");
        let wanted = number(deployment, "/status/wanted").max(match deployment.pointer("/status/wanted") {
            None => number(deployment, "/replicas"),
            Some(_) => 0,
        });
        let waiting = deployment.pointer("/status/waiting").and_then(Value::as_array).into_iter().flatten();
        let waiting: Vec<&str> = waiting.filter_map(Value::as_str).collect();
        let mut why = format!("{ready} of {wanted} engines ready");
        if !waiting.is_empty() {
            why.push_str(&format!("; {}", waiting.join("; ")));
        }
        let advice = format!("`penstock describe deployment {model}` says what each waits for");
        out.push(match (ready, wanted) {
            (0, 1..) => fail(&what, why, advice),
            (ready, wanted) if ready < wanted => warn(&what, why, advice),
            _ => ok(&what, why),
        });
        let failed = number(deployment, "/status/failed");
        if failed > 0 {
            let why = format!("{failed} engines have failed{}", ends(facts, model));
            out.push(warn(
                &what,
                why,
                "`penstock describe endpoint` and `penstock logs MODEL/REPLICA --previous` say why",
            ));
        }
        if deployment.pointer("/status/stalled") == Some(&Value::Bool(true)) {
            let advice = format!("`penstock rollback {model}` goes back, or mend what it waits for");
            out.push(fail(&what, "its rollout is stalled", advice));
        }
        let mine =
            facts.endpoints.as_deref().unwrap_or_default().iter().filter(|e| text(e, "model") == model);
        let ready_in: Vec<&str> = mine
            .filter(|e| text(e, "state") == "ready")
            .filter_map(|e| zones.get(text(e, "node")).copied())
            .collect();
        let here: BTreeSet<&str> = ready_in.iter().copied().collect();
        if ready_in.len() > 1 && here.len() == 1 && several.len() > 1 {
            let zone = here.into_iter().collect::<String>();
            let why = format!("all {} ready engines are in zone {zone}", ready_in.len());
            out.push(warn(
                &what,
                why,
                "the loss of that zone ends it: look for room in other zones, or turn on placement.rebalance",
            ));
        }
    }
    if deployments.is_empty() {
        out.push(warn(
            "deployments",
            "nothing is deployed",
            "`penstock deploy MODEL` or `penstock apply -f FILE`",
        ));
    }
    out
}

fn proxies(facts: &Facts) -> Vec<Finding> {
    let (proxies, version) = match &facts.proxies {
        Ok(proxies) => proxies,
        Err(why) => return vec![fail("proxies", why.clone(), "")],
    };
    if proxies.is_empty() {
        let advice = "start `penstock proxy` with discovery.controlplanes set; one that runs already serves its last tables";
        return vec![fail("proxies", "no proxy is connected to any control plane", advice)];
    }
    let mut out = Vec::new();
    for proxy in proxies {
        let what = format!("proxy {}", text(proxy, "node_id"));
        let nack = text(proxy, "last_nack");
        let acked = text(proxy, "version_acked");
        // Right after it connected, or after a change, it may be under way.
        let settled = number(proxy, "/connected_s") > 10;
        if !nack.is_empty() {
            let advice = "it keeps its last good tables; if it is older than the control plane, upgrade it";
            out.push(fail(&what, format!("it refuses what it is sent: {nack}"), advice));
        } else if acked.is_empty() && settled {
            out.push(fail(&what, "it has acknowledged nothing since it connected", "its log says why"));
        } else if acked != version && settled {
            let why = format!("its tables are of version {acked}, the control plane's of {version}");
            out.push(warn(&what, why, "look again: if it stays behind, its log says why"));
        } else {
            out.push(ok(&what, format!("tables of version {acked}")));
        }
        let release = text(proxy, "agent").rsplit('/').next().unwrap_or_default();
        if !release.is_empty() && release != facts.version {
            out.push(warn(&what, format!("release {release}, this program {}", facts.version), "upgrade it"));
        }
    }
    let sites: BTreeSet<&str> = zones(facts.nodes.as_deref().unwrap_or_default()).into_values().collect();
    let theirs: BTreeSet<&str> = proxies.iter().map(|proxy| text(proxy, "zone")).collect();
    if sites.len() > 1 && theirs.len() == 1 && !theirs.contains("") {
        let zone = theirs.into_iter().collect::<String>();
        let why = format!(
            "all {} proxies are in zone {zone}, and engines are in {} zones",
            proxies.len(),
            sites.len()
        );
        out.push(fail("proxies", why, "the loss of that zone ends all service: run proxies in every zone"));
    } else if sites.len() > 1 && theirs.contains("") {
        let why = "some proxies do not say in which zone they are";
        out.push(warn(
            "proxies",
            why,
            "set routing.zone, so that they prefer near engines and this check can see them",
        ));
    }
    out
}

fn looked_at(ProxyLook { address, says }: &ProxyLook, now: i64) -> Vec<Finding> {
    let what = format!("proxy at {address}");
    let (ready, metrics) = match says {
        Ok(says) => says,
        Err(why) => return vec![fail(&what, why.clone(), "start it, or name the right private port")],
    };
    let mut out = Vec::new();
    let reasons = ready.get("reasons").and_then(Value::as_array).into_iter().flatten();
    let reasons: Vec<&str> = reasons.filter_map(Value::as_str).collect();
    out.push(match ready.get("ready") {
        Some(Value::Bool(false)) => {
            fail(&what, format!("not ready: {}", reasons.join("; ")), "it should get no requests")
        }
        _ => ok(&what, "ready"),
    });
    for line in metrics.lines() {
        let Some(rest) = line.strip_prefix("penstock_proxy_certificate_expiry_timestamp_seconds{") else {
            continue;
        };
        let listener =
            rest.split("listener=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("?");
        let end = rest.rsplit(' ').next().and_then(|end| end.parse::<f64>().ok());
        // Seconds since 1970 fit in what a float holds exactly.
        #[allow(clippy::cast_possible_truncation, reason = "out of range ends at the type's bounds")]
        out.extend(
            end.filter(|end| *end > 0.0)
                .map(|end| certificate(&format!("{what}, listener {listener}"), end as i64, now)),
        );
    }
    out
}

fn certificate(what: &str, end: i64, now: i64) -> Finding {
    let days = (end - now).div_euclid(DAY);
    let advice = "put the renewed pair in the place of the old files";
    match days {
        ..0 => fail("certificate", format!("{what}: expired {} days ago", -days), advice),
        0..3 => fail("certificate", format!("{what}: expires in {days} days"), advice),
        3..30 => warn("certificate", format!("{what}: expires in {days} days"), advice),
        _ => ok("certificate", format!("{what}: good for {days} days")),
    }
}

/// Also of `preflight`.
pub(super) fn disk(folder: &str, free: u64, total: u64) -> Finding {
    let percent = free.saturating_mul(100).checked_div(total).unwrap_or(100);
    let why = format!("{folder}: {} free of {} ({percent} %)", bytes(free), bytes(total));
    let advice = "free space, or move the folder: a store that cannot write stops all changes";
    match percent {
        0..5 if free < 10 << 30 => fail("disk", why, advice),
        0..15 if free < 50 << 30 => warn("disk", why, advice),
        _ => ok("disk", why),
    }
}

fn backups(interval: f64, last: f64, now: i64) -> Finding {
    if interval <= 0.0 {
        return warn(
            "backups",
            "none are made by the clock",
            "set backup.dir of the control planes; docs/backup.md",
        );
    }
    #[allow(clippy::cast_precision_loss, reason = "seconds since 1970")]
    let age = now as f64 - last;
    let advice = "its log says why; `penstock backup` makes one now";
    match age {
        _ if last <= 0.0 => {
            warn("backups", "none has been made since this control plane started", "look at the leader")
        }
        age if age > interval * 2.5 => fail(
            "backups",
            format!("the last one is {age:.0} s old, and every {interval:.0} s one is due"),
            advice,
        ),
        age => ok("backups", format!("the last one is {age:.0} s old")),
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
