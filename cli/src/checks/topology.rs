//! Which machines should be members of etcd. Pure: names and zones in, members out.
//!
//! Three modes, after the label controller of the field guide. Whatever the mode, at most one machine is an arbiter: a
//! second one would be a second opinion on which side of a cut goes on.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::json;

use crate::{
    api::ApiError,
    args::{EtcdTopologyCommand, Mode, TopologyArgs},
    output::{print, table},
};

/// A machine that could be a member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Machine {
    name: String,
    /// Empty: not known.
    zone: String,
}

/// Who is a member, and what that bears.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Topology {
    /// "2+2+1", "1+1+1", "5", "3" ...
    layout: String,
    members: Vec<Machine>,
    /// The member whose control plane only votes; empty: none.
    arbiter: String,
    /// Members that may fail with all data kept and writes going on.
    may_fail: usize,
    /// Zones that may fail, each by itself.
    zones_may_fail: Vec<String>,
    /// What to think about.
    warnings: Vec<String>,
}

pub(crate) fn run(EtcdTopologyCommand::Plan(args): &EtcdTopologyCommand) -> Result<(), ApiError> {
    let machines = args.nodes.iter().map(|node| {
        let (name, zone) = node.split_once('=').unwrap_or((node, ""));
        Machine { name: name.to_owned(), zone: zone.to_owned() }
    });
    let machines: Vec<Machine> = machines.collect();
    let topology = plan(&machines, args.mode, &args.arbitration_zone).map_err(ApiError::Usage)?;
    let text = if args.json { format!("{:#}\n", json!(topology)) } else { story(&topology, args) };
    Ok(print(&text)?)
}

fn story(topology: &Topology, args: &TopologyArgs) -> String {
    let rows = topology.members.iter().map(|member| {
        let role = match (member.name == topology.arbiter, args.mode) {
            (true, _) => "votes only: its control plane has election.candidate = false",
            (false, _) => "votes and leads",
        };
        [member.name.clone(), member.zone.clone(), role.to_owned()]
    });
    let mut out = format!("{} members, {}\n\n", topology.members.len(), topology.layout);
    out += &table(["MEMBER", "ZONE", "ROLE"], rows);
    out += &format!("\nmembers that may fail: {}\n", topology.may_fail);
    out += &match topology.zones_may_fail.is_empty() {
        true => "zones that may fail: none\n".to_owned(),
        false => format!("zones that may fail, one at a time: {}\n", topology.zones_may_fail.join(", ")),
    };
    for warning in &topology.warnings {
        out += &format!("note: {warning}\n");
    }
    let peers: Vec<String> =
        topology.members.iter().map(|m| format!("{0}=http://{0}:2380", m.name)).collect();
    out + &format!("\n--initial-cluster {}\n", peers.join(","))
}

/// Chooses members. The order of `machines` does not matter.
pub(super) fn plan(machines: &[Machine], mode: Mode, arbitration: &str) -> Result<Topology, String> {
    let mut names = BTreeSet::new();
    for machine in machines {
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if machine.name.is_empty() || !machine.name.chars().all(good) {
            return Err(format!(
                "{:?} is no machine's name: letters, digits, '.', '_' and '-'",
                machine.name
            ));
        }
        if !names.insert(&machine.name) {
            return Err(format!("{:?} is there twice", machine.name));
        }
    }
    if machines.is_empty() {
        return Err("there is no machine to choose from".into());
    }
    let arbiters: Vec<&str> =
        machines.iter().filter(|m| m.zone == arbitration).map(|m| m.name.as_str()).collect();
    if arbiters.len() > 1 {
        return Err(format!(
            "{} machines are in the arbitration zone {arbitration:?} ({}): a site has at most one arbiter, else two of \
             them could decide a cut differently",
            arbiters.len(),
            arbiters.join(", ")
        ));
    }
    let mut sorted: Vec<Machine> = machines.to_vec();
    sorted.sort();
    let members = match mode {
        Mode::Traditional => sorted,
        Mode::Standard => {
            let wanted = match sorted.len() {
                5.. => 5,
                3..=4 => 3,
                fewer => fewer,
            };
            spread(sorted, wanted)
        }
        Mode::MultiZoneHa => across(sorted, arbitration)?,
    };
    Ok(judged(members, mode, arbitration))
}

/// So many, from all zones in turn: the choice does not depend on zones being told, but uses them where they are.
fn spread(sorted: Vec<Machine>, wanted: usize) -> Vec<Machine> {
    let mut zones: BTreeMap<String, Vec<Machine>> = BTreeMap::new();
    for machine in sorted {
        zones.entry(machine.zone.clone()).or_default().push(machine);
    }
    let mut members = Vec::new();
    let deepest = zones.values().map(Vec::len).max().unwrap_or(0);
    for row in 0..deepest {
        members.extend(zones.values().filter_map(|zone| zone.get(row)).cloned());
    }
    members.truncate(wanted);
    members.sort();
    members
}

/// 2+2+1 where there are enough machines, else 1+1+1. The single one is the arbiter, if there is one.
fn across(sorted: Vec<Machine>, arbitration: &str) -> Result<Vec<Machine>, String> {
    let mut zones: BTreeMap<String, Vec<Machine>> = BTreeMap::new();
    for machine in sorted {
        zones.entry(machine.zone.clone()).or_default().push(machine);
    }
    if let Some(unknown) = zones.get("") {
        let names: Vec<&str> = unknown.iter().map(|machine| machine.name.as_str()).collect();
        return Err(format!(
            "{} have no zone: this mode needs one of each, as --node NAME=ZONE",
            names.join(", ")
        ));
    }
    if zones.len() < 3 {
        let names: Vec<&str> = zones.keys().map(String::as_str).collect();
        return Err(format!(
            "there are {} zones ({}), and this mode needs 3, of which one may be {arbitration:?}: with fewer, the loss of \
             one zone can take the majority with it. Choose --mode standard",
            zones.len(),
            names.join(", ")
        ));
    }
    // Those with most machines first; the arbiter's zone last.
    let mut order: Vec<(&String, &Vec<Machine>)> = zones.iter().collect();
    order.sort_by_key(|(zone, machines)| (zone.as_str() == arbitration, std::cmp::Reverse(machines.len())));
    let arbiter = order.iter().position(|(zone, _)| zone.as_str() == arbitration);
    let [first, second] =
        [order.first(), order.get(1)].map(|zone| zone.map(|(_, m)| m.as_slice()).unwrap_or_default());
    let single =
        arbiter.or(Some(2)).and_then(|at| order.get(at)).map(|(_, m)| m.as_slice()).unwrap_or_default();
    let each = if first.len() >= 2 && second.len() >= 2 { 2 } else { 1 };
    let mut members: Vec<Machine> = first
        .iter()
        .take(each)
        .chain(second.iter().take(each))
        .chain(single.iter().take(1))
        .cloned()
        .collect();
    members.sort();
    Ok(members)
}

fn judged(members: Vec<Machine>, mode: Mode, arbitration: &str) -> Topology {
    let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
    for member in members.iter().filter(|member| !member.zone.is_empty()) {
        *zones.entry(member.zone.as_str()).or_default() += 1;
    }
    let count = members.len();
    let quorum = count / 2 + 1;
    let zones_may_fail: Vec<String> = zones
        .iter()
        .filter(|(_, here)| count - **here >= quorum)
        .map(|(zone, _)| (*zone).to_owned())
        .collect();
    let mut warnings = Vec::new();
    if count.is_multiple_of(2) {
        let text = "an even number of members bears no more failures than one fewer, and needs more of them to agree";
        warnings.push(text.to_owned());
    }
    if count < 3 {
        warnings.push("with fewer than three members the loss of one stops all writes".to_owned());
    }
    if count > 7 {
        warnings.push("more than seven members make every write slower".to_owned());
    }
    let named = zones.values().sum::<usize>() == count;
    if named && count >= 3 && zones.len() > 1 && zones_may_fail.len() < zones.len() {
        let bad: Vec<&str> =
            zones.keys().filter(|zone| !zones_may_fail.iter().any(|z| z == *zone)).copied().collect();
        warnings.push(format!("the loss of {} takes the majority with it", bad.join(" or ")));
    }
    if named && zones.len() == 1 && count >= 3 {
        warnings.push("all members are in one zone: its loss stops all writes".to_owned());
    }
    let layout = match mode {
        Mode::MultiZoneHa => {
            let mut sizes: Vec<usize> = zones.values().copied().collect();
            sizes.sort_by_key(|size| std::cmp::Reverse(*size));
            sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("+")
        }
        Mode::Traditional | Mode::Standard => count.to_string(),
    };
    let arbiter = members.iter().find(|member| member.zone == arbitration);
    let arbiter = arbiter.map(|member| member.name.clone()).unwrap_or_default();
    Topology { layout, arbiter, may_fail: count - quorum, zones_may_fail, warnings, members }
}

#[cfg(test)]
#[path = "topology_tests.rs"]
mod tests;
