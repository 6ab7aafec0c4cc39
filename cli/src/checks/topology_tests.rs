use proptest::prelude::*;

use super::*;

const ARBITRATION: &str = "reserved-arbitration";

fn machines(text: &str) -> Vec<Machine> {
    let each = text.split_whitespace().map(|node| node.split_once('=').unwrap_or((node, "")));
    each.map(|(name, zone)| Machine { name: name.into(), zone: zone.into() }).collect()
}

fn members(text: &str, mode: Mode) -> Result<(String, Vec<String>), String> {
    let topology = plan(&machines(text), mode, ARBITRATION)?;
    Ok((topology.layout, topology.members.into_iter().map(|m| m.name).collect()))
}

#[test]
fn the_layouts_of_the_guide() {
    let arb = "a=reserved-arbitration";
    for (nodes, mode, layout, chosen) in [
        ("m1 m2 m3 m4 m5 m6", Mode::Traditional, "6", &["m1", "m2", "m3", "m4", "m5", "m6"][..]),
        ("m1 m2 m3 m4 m5 m6", Mode::Standard, "5", &["m1", "m2", "m3", "m4", "m5"]),
        ("m1 m2 m3 m4", Mode::Standard, "3", &["m1", "m2", "m3"]),
        ("m1 m2", Mode::Standard, "2", &["m1", "m2"]),
        ("m1=x m2=x m3=y m4=z", Mode::Standard, "3", &["m1", "m3", "m4"]),
        (&format!("m1=x m2=x m3=y m4=y {arb}"), Mode::MultiZoneHa, "2+2+1", &["a", "m1", "m2", "m3", "m4"]),
        (&format!("m1=x m2=x m3=y {arb}"), Mode::MultiZoneHa, "1+1+1", &["a", "m1", "m3"]),
        (&format!("m1=x m2=y {arb}"), Mode::MultiZoneHa, "1+1+1", &["a", "m1", "m2"]),
        ("m1=x m2=x m3=y m4=y m5=z m6=z m7=z", Mode::MultiZoneHa, "2+2+1", &["m1", "m3", "m5", "m6"][..0]),
    ] {
        let (found, names) = members(nodes, mode).unwrap();
        assert_eq!(found, layout, "{nodes}");
        if !chosen.is_empty() {
            assert_eq!(names, chosen, "{nodes}");
        }
    }
    let topology =
        plan(&machines(&format!("m1=x m2=x m3=y m4=y {arb}")), Mode::MultiZoneHa, ARBITRATION).unwrap();
    assert_eq!((topology.arbiter.as_str(), topology.may_fail), ("a", 2));
    assert_eq!(topology.zones_may_fail, [ARBITRATION, "x", "y"]);
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    for (nodes, mode, part) in [
        ("a=reserved-arbitration b=reserved-arbitration c=x", Mode::Traditional, "at most one arbiter"),
        ("m1=x m2=y", Mode::MultiZoneHa, "needs 3"),
        ("m1 m2=y m3=z", Mode::MultiZoneHa, "m1 have no zone"),
        ("m1 m1", Mode::Standard, "twice"),
        ("m1/x", Mode::Standard, "no machine's name"),
        ("", Mode::Standard, "no machine to choose"),
    ] {
        let error = members(nodes, mode).unwrap_err();
        assert!(error.contains(part), "{nodes}: {error}");
    }
}

fn sites() -> impl Strategy<Value = Vec<Machine>> {
    let zone = prop::sample::select(vec!["x", "y", "z", "w"]);
    let machines = prop::collection::btree_map("[a-m][0-9]", zone, 1..12);
    (machines, any::<bool>()).prop_map(|(machines, arbiter)| {
        let mut out: Vec<Machine> =
            machines.into_iter().map(|(name, zone)| Machine { name, zone: zone.into() }).collect();
        if arbiter {
            out.push(Machine { name: "arb".into(), zone: ARBITRATION.into() });
        }
        out
    })
}

proptest! {
    /// Members are machines, once each, in a number that the mode allows; the choice does not depend on the order.
    #[test]
    fn members_are_machines_and_the_order_does_not_matter(machines in sites(), turn in 0..12_usize) {
        for mode in [Mode::Traditional, Mode::Standard, Mode::MultiZoneHa] {
            let topology = plan(&machines, mode, ARBITRATION);
            let mut turned = machines.clone();
            turned.rotate_left(turn % machines.len());
            prop_assert_eq!(&topology, &plan(&turned, mode, ARBITRATION));
            let Ok(topology) = topology else { continue };
            let names: BTreeSet<&str> = topology.members.iter().map(|m| m.name.as_str()).collect();
            prop_assert_eq!(names.len(), topology.members.len());
            prop_assert!(topology.members.iter().all(|member| machines.contains(member)));
            prop_assert!(topology.members.iter().filter(|m| m.zone == ARBITRATION).count() <= 1);
            match mode {
                Mode::Traditional => prop_assert_eq!(topology.members.len(), machines.len()),
                Mode::Standard => prop_assert!([1, 2, 3, 5].contains(&topology.members.len())),
                Mode::MultiZoneHa => prop_assert!([3, 5].contains(&topology.members.len())),
            }
        }
    }

    /// Across zones any one of the three may fail, no zone has more than two, the arbiter is in if there is one, and the
    /// pairs come from the zones with most machines.
    #[test]
    fn across_zones_any_zone_may_fail(machines in sites()) {
        let zones: BTreeSet<&str> = machines.iter().map(|m| m.zone.as_str()).collect();
        let Ok(topology) = plan(&machines, Mode::MultiZoneHa, ARBITRATION) else {
            prop_assert!(zones.len() < 3);
            return Ok(());
        };
        let used: BTreeSet<&str> = topology.members.iter().map(|m| m.zone.as_str()).collect();
        prop_assert_eq!(used.len(), 3);
        prop_assert_eq!(topology.zones_may_fail.len(), 3);
        prop_assert_eq!(topology.arbiter.is_empty(), !zones.contains(ARBITRATION));
        let size = |zone: &str| machines.iter().filter(|m| m.zone == zone).count();
        let here = |zone: &str| topology.members.iter().filter(|m| m.zone == zone).count();
        prop_assert!(used.iter().all(|zone| here(zone) <= 2));
        let unused = zones.iter().filter(|zone| !used.contains(*zone) && **zone != ARBITRATION);
        let paired: Vec<usize> = used.iter().filter(|zone| here(zone) == 2).map(|zone| size(zone)).collect();
        for zone in unused {
            prop_assert!(paired.iter().all(|pair| *pair >= size(zone)));
        }
        if topology.members.len() == 3 {
            let large = zones.iter().filter(|zone| **zone != ARBITRATION && size(zone) >= 2).count();
            prop_assert!(large < 2, "2+2+1 was possible");
        }
    }
}
