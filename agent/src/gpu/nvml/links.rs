//! Which GPUs reach each other by NVLink: found once, when the library is loaded.
//!
//! Links lead to another GPU, or to a switch, and a switch reaches everything that is on one. GPUs that are connected, by
//! however many steps, are a group. A GPU without an active link, or one whose links lead to nothing else here, is in none.

use std::collections::BTreeMap;

use nvml_wrapper::{Device, Nvml};

/// NVML_NVLINK_MAX_LINKS
const MOST: u32 = 18;

/// Where the links of one GPU lead: PCI bus ids, in lower case.
type Ends = Vec<String>;

/// The group of each GPU that is in one, by index.
pub(super) fn groups(nvml: &Nvml) -> BTreeMap<u32, String> {
    let count = nvml.device_count().unwrap_or(0);
    let devices = (0..count).filter_map(|index| Some((index, nvml.device_by_index(index).ok()?)));
    let told = devices.filter_map(|(index, device)| {
        let own = device.pci_info().ok()?.bus_id.to_ascii_lowercase();
        Some((index, own, ends(&device)))
    });
    connect(&told.collect::<Vec<_>>())
}

fn ends(device: &Device<'_>) -> Ends {
    let mut ends = Vec::new();
    for link in 0..MOST {
        let link = device.link_wrapper_for(link);
        match link.is_active() {
            Ok(true) => ends.extend(link.remote_pci_info().map(|pci| pci.bus_id.to_ascii_lowercase())),
            Ok(false) => {}
            // No such link, or no links at all.
            Err(_) => break,
        }
    }
    ends
}

/// Groups of at least two, each named after its first GPU.
fn connect(gpus: &[(u32, String, Ends)]) -> BTreeMap<u32, String> {
    let by_bus: BTreeMap<&str, u32> = gpus.iter().map(|(index, bus, _)| (bus.as_str(), *index)).collect();
    let mut leader: BTreeMap<u32, u32> = gpus.iter().map(|(index, ..)| (*index, *index)).collect();
    let mut on_switch: Option<u32> = None;
    for (index, _, ends) in gpus {
        for end in ends {
            let other = match by_bus.get(end.as_str()) {
                Some(other) => *other,
                None => *on_switch.get_or_insert(*index),
            };
            join(&mut leader, *index, other);
        }
    }
    let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
    leader.values().for_each(|first| *sizes.entry(*first).or_default() += 1);
    let grouped = leader.into_iter().filter(|(_, first)| sizes.get(first).is_some_and(|size| *size > 1));
    grouped.map(|(index, first)| (index, format!("nvlink-{first}"))).collect()
}

/// Makes one group of two; its leader is the smallest.
fn join(leader: &mut BTreeMap<u32, u32>, a: u32, b: u32) {
    let of = |leader: &BTreeMap<u32, u32>, index| leader.get(&index).copied().unwrap_or(index);
    let (a, b) = (of(leader, a), of(leader, b));
    let first = a.min(b);
    leader.values_mut().filter(|now| **now == a || **now == b).for_each(|now| *now = first);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: u32, ends: &[&str]) -> (u32, String, Ends) {
        (index, format!("bus-{index}"), ends.iter().map(|end| (*end).to_owned()).collect())
    }

    fn named(gpus: &[(u32, String, Ends)]) -> Vec<(u32, String)> {
        connect(gpus).into_iter().collect()
    }

    fn group(index: u32, name: &str) -> (u32, String) {
        (index, name.to_owned())
    }

    #[test]
    fn pairs_rings_and_switches_are_groups_and_loners_are_in_none() {
        let pairs = [gpu(0, &["bus-1"]), gpu(1, &["bus-0"]), gpu(2, &["bus-3"]), gpu(3, &[]), gpu(4, &[])];
        let expected =
            [group(0, "nvlink-0"), group(1, "nvlink-0"), group(2, "nvlink-2"), group(3, "nvlink-2")];
        assert_eq!(named(&pairs), expected);
        let ring = [gpu(0, &["bus-1"]), gpu(1, &["bus-2"]), gpu(2, &["bus-3"]), gpu(3, &["bus-0"])];
        assert!(named(&ring).iter().all(|(_, name)| name == "nvlink-0"));
        let switched = [gpu(0, &["sw-0"]), gpu(1, &["sw-1", "sw-0"]), gpu(2, &[])];
        assert_eq!(named(&switched), [group(0, "nvlink-0"), group(1, "nvlink-0")]);
        assert_eq!(named(&[gpu(0, &["sw-0"])]), []);
    }
}
