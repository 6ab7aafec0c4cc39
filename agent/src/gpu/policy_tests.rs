use proptest::prelude::*;

use super::*;

fn card(uuid: &str) -> Card {
    Card { gpu: v1::Gpu { uuid: uuid.into(), ..v1::Gpu::default() }, trouble: None, recovery: None }
}

fn judge() -> Judge {
    Judge::new(GpuPolicyConfig::default(), Remembered::default())
}

/// A card, changed.
fn with(change: impl FnOnce(&mut v1::Gpu)) -> Card {
    let mut card = card("g");
    change(&mut card.gpu);
    card
}

fn errors(change: impl FnOnce(&mut v1::GpuErrors)) -> Card {
    let mut errors = v1::GpuErrors::default();
    change(&mut errors);
    with(|gpu| gpu.errors = Some(errors))
}

#[test]
fn a_card_that_says_nothing_is_healthy() {
    let verdict = judge().judge(&card("g"), Instant::now(), 0);
    assert_eq!(verdict, Verdict { health: Health::Healthy, reason: String::new(), remedy: Remedy::None });
}

#[test]
fn an_xid_of_hardware_condemns_until_it_is_cleared_and_comes_back() {
    let (mut judge, now) = (judge(), Instant::now());
    judge.note_xid("g", 79, 5);
    let verdict = judge.judge(&card("g"), now, 5);
    assert_eq!((verdict.health, verdict.remedy), (Health::Faulty, Remedy::Reboot));
    assert_eq!(verdict.reason, "XID 79 (GPU has fallen off the bus)");
    assert_eq!(judge.judge(&card("other"), now, 5).health, Health::Healthy);

    let later = now + Duration::from_secs(1_000_000);
    assert_eq!(judge.judge(&card("g"), later, 1_000_000_000).health, Health::Faulty, "time heals nothing");
    let mut next = Judge::new(GpuPolicyConfig::default(), judge.remembered().clone());
    assert_eq!(next.judge(&card("g"), now, 6).health, Health::Faulty, "nor does another agent");

    assert!(judge.clear("g") && !judge.clear("g") && !judge.clear("nobody"));
    assert_eq!(judge.judge(&card("g"), later, 7).health, Health::Healthy);
    assert!(judge.xids("g").is_empty());
    judge.note_xid("g", 79, 8);
    assert_eq!(judge.judge(&card("g"), later, 8).health, Health::Faulty);
    assert_eq!(judge.xids("g")[0].count, 2);
}

#[test]
fn xids_of_applications_count_and_only_many_of_them_degrade() {
    let mut judge = judge();
    let now = Instant::now();
    for n in 0..19 {
        judge.note_xid("g", [13, 31, 43, 45][n % 4], 1_000);
        assert_eq!(judge.judge(&card("g"), now, 1_000).health, Health::Healthy, "{n}");
    }
    judge.note_xid("g", 31, 2_000);
    let verdict = judge.judge(&card("g"), now, 2_000);
    assert_eq!(verdict.health, Health::Degraded);
    assert_eq!(verdict.reason, "20 or more XIDs of applications within 600 s");
    assert_eq!(judge.judge(&card("g"), now, 601_000).health, Health::Healthy, "the window has passed");
    assert_eq!(judge.xids("g").iter().map(|x| x.count).sum::<u64>(), 20, "they are shown all the same");
}

#[test]
fn the_worst_sign_decides_and_names_the_strongest_remedy() {
    let mut judge = judge();
    judge.note_xid("g", 63, 1);
    let degraded = judge.judge(&card("g"), Instant::now(), 1);
    assert_eq!((degraded.health, degraded.remedy), (Health::Degraded, Remedy::Reset));
    judge.note_xid("g", 48, 2);
    let broken = errors(|e| e.remap_failed = Some(true));
    let verdict = judge.judge(&broken, Instant::now(), 2);
    assert_eq!((verdict.health, verdict.remedy), (Health::Faulty, Remedy::Replacement));
    assert_eq!(verdict.reason, "XID 48 (double-bit ECC error); the remapping of a broken memory row failed");
}

#[test]
fn uncorrected_errors_condemn_until_the_counter_begins_anew_or_they_are_accepted() {
    let (mut judge, now) = (judge(), Instant::now());
    let with = |n| errors(|e| e.uncorrected = Some(n));
    let health = |judge: &mut Judge, n| judge.judge(&with(n), now, 0).health;
    assert_eq!(health(&mut judge, 0), Health::Healthy);
    assert_eq!(health(&mut judge, 2), Health::Faulty);
    assert_eq!(health(&mut judge, 0), Health::Healthy, "it was reset");
    assert_eq!(health(&mut judge, 2), Health::Faulty);
    assert!(judge.clear("g"));
    assert_eq!(health(&mut judge, 2), Health::Healthy);
    assert_eq!(health(&mut judge, 3), Health::Faulty, "another one");
    assert_eq!(health(&mut judge, 1), Health::Faulty, "reset, and another one since");
    assert_eq!(judge.judge(&card("g"), now, 0).health, Health::Healthy, "a card without ECC");
}

#[test]
fn heat_counts_once_it_lasts_and_is_over_once_that_lasts() {
    let (mut judge, start) = (judge(), Instant::now());
    let at = |celsius| with(|gpu| (gpu.temperature_c, gpu.slowdown_c) = (Some(celsius), Some(90)));
    let mut health = |celsius, s| judge.judge(&at(celsius), start + Duration::from_secs(s), 0).health;
    assert_eq!(health(91, 0), Health::Healthy);
    assert_eq!(health(80, 5), Health::Healthy, "a peak");
    assert_eq!(health(90, 6), Health::Healthy);
    assert_eq!(health(95, 15), Health::Healthy);
    assert_eq!(health(95, 16), Health::Degraded);
    assert_eq!(health(70, 17), Health::Degraded, "not over yet");
    assert_eq!(health(95, 20), Health::Degraded);
    assert_eq!(health(70, 21), Health::Degraded);
    assert_eq!(health(70, 31), Health::Healthy);
    let slowed = with(|gpu| gpu.throttle_reasons = vec!["idle".into(), super::super::HOT.into()]);
    judge.judge(&slowed, start + Duration::from_secs(100), 0);
    let verdict = judge.judge(&slowed, start + Duration::from_secs(110), 0);
    assert_eq!((verdict.health, verdict.remedy), (Health::Degraded, Remedy::Cooling));
}

#[test]
fn a_lost_card_is_faulty_at_once_and_an_unreadable_one_after_a_while() {
    let (mut judge, start) = (judge(), Instant::now());
    let lost = Card { trouble: Some(Trouble::Lost), ..card("g") };
    assert_eq!(judge.judge(&lost, start, 0).remedy, Remedy::Reboot);
    assert_eq!(judge.judge(&card("g"), start, 0).health, Health::Healthy, "it came back");
    let mute = Card { trouble: Some(Trouble::Unreadable("unknown error".into())), ..card("g") };
    assert_eq!(judge.judge(&mute, start, 0).health, Health::Degraded);
    let verdict = judge.judge(&mute, start + Duration::from_secs(30), 0);
    assert_eq!(verdict.health, Health::Faulty);
    assert_eq!(verdict.reason, "the driver cannot read it: unknown error");
}

#[test]
fn the_drivers_own_advice_is_taken() {
    for (recovery, health) in [
        (Recovery::Reset, Health::Faulty),
        (Recovery::Reboot, Health::Faulty),
        (Recovery::Drain, Health::Degraded),
    ] {
        let card = Card { recovery: Some(recovery), ..card("g") };
        assert_eq!(judge().judge(&card, Instant::now(), 0).health, health);
    }
}

#[test]
fn settings_decide_what_a_sign_leads_to() {
    let policy = GpuPolicyConfig {
        ecc_uncorrected: GpuAction::Ignore,
        remap_pending: GpuAction::Fault,
        fault_xids: vec![13],
        application_xids: 0,
        ..GpuPolicyConfig::default()
    };
    let mut judge = Judge::new(policy, Remembered::default());
    let now = Instant::now();
    assert_eq!(judge.judge(&errors(|e| e.uncorrected = Some(9)), now, 0).health, Health::Healthy);
    assert_eq!(judge.judge(&errors(|e| e.remap_pending = Some(true)), now, 0).health, Health::Faulty);
    (0..100).for_each(|_| judge.note_xid("g", 31, 0));
    assert_eq!(judge.judge(&card("g"), now, 0).health, Health::Healthy);
    judge.note_xid("g", 13, 0);
    assert_eq!(judge.judge(&card("g"), now, 0).health, Health::Faulty);
}

proptest! {
    #[test]
    fn whatever_comes_an_unhealthy_gpu_has_a_reason_and_clearing_leaves_only_what_reads_so(
        xids in proptest::collection::vec((0u32..200, 0u64..2_000_000), 0..60),
        uncorrected in proptest::option::of(0u64..3),
        pending in proptest::option::of(any::<bool>()),
    ) {
        let mut judge = judge();
        let card = errors(|e| (e.uncorrected, e.remap_pending) = (uncorrected, pending));
        for (xid, at) in &xids {
            judge.note_xid("g", *xid, *at);
            let verdict = judge.judge(&card, Instant::now(), *at);
            prop_assert_eq!(verdict.health == Health::Healthy, verdict.reason.is_empty());
        }
        let all: Vec<_> = xids.iter().map(|(xid, _)| *xid).collect();
        if all.iter().any(|xid| GpuPolicyConfig::default().fault_xids.contains(xid)) {
            prop_assert_eq!(judge.judge(&card, Instant::now(), 0).health, Health::Faulty);
        }
        judge.judge(&card, Instant::now(), 0);
        judge.clear("g");
        let left = judge.judge(&card, Instant::now(), 0);
        prop_assert_eq!(left.health, if pending == Some(true) { Health::Degraded } else { Health::Healthy });
    }
}
