//! Sessions come and go, answers come late: what is told, and when.

use super::*;

const RETRY: Duration = Duration::from_secs(5);

fn wanted(generation: u64) -> Wanted {
    Wanted {
        model: "m".into(),
        generation,
        address: "h:1".into(),
        pid: 9,
        adapters: vec![],
        drain_ms: 30_000,
    }
}

fn result(generation: u64, accepted: bool) -> v1::RegistrationResult {
    v1::RegistrationResult { replica_id: "a".into(), generation, accepted, reason: "stale".into() }
}

fn left(generation: u64) -> v1::DeregistrationResult {
    v1::DeregistrationResult { replica_id: "a".into(), generation }
}

/// "+7" for a registration of generation 7, "-7" for a deregistration.
fn due(registrations: &mut Registrations, now: Instant) -> Vec<String> {
    let text = |message| match message {
        v1::agent_message::Message::Register(r) => format!("+{}", r.generation),
        v1::agent_message::Message::Deregister(d) => format!("-{}", d.generation),
        other => panic!("unexpected {other:?}"),
    };
    registrations.due(now, RETRY).into_iter().map(text).collect()
}

#[test]
fn what_is_wanted_is_told_once_and_again_after_a_reconnect() {
    let now = Instant::now();
    let mut registrations = Registrations::default();
    registrations.want("a", wanted(7));
    assert_eq!(due(&mut registrations, now), ["+7"]);
    registrations.want("a", wanted(7));
    assert_eq!(due(&mut registrations, now), Vec::<String>::new());
    assert_eq!(registrations.standing("a"), Standing::Waiting);
    assert!(registrations.answered(&result(7, true), now));
    assert_eq!(registrations.standing("a"), Standing::Accepted);
    assert_eq!(due(&mut registrations, now + RETRY), Vec::<String>::new());
    registrations.session_started();
    assert_eq!(due(&mut registrations, now), ["+7"]);
}

#[test]
fn without_an_answer_it_is_told_again() {
    let now = Instant::now();
    let mut registrations = Registrations::default();
    registrations.want("a", wanted(7));
    due(&mut registrations, now);
    assert_eq!(due(&mut registrations, now + RETRY / 2), Vec::<String>::new());
    assert_eq!(due(&mut registrations, now + RETRY), ["+7"]);
}

#[test]
fn a_refusal_is_kept_with_its_reason_until_new_assignments_or_the_retry() {
    let now = Instant::now();
    let mut registrations = Registrations::default();
    registrations.want("a", wanted(7));
    due(&mut registrations, now);
    assert!(registrations.answered(&result(7, false), now));
    assert_eq!(registrations.standing("a"), Standing::Refused("stale".into()));
    assert_eq!(due(&mut registrations, now), Vec::<String>::new());
    registrations.assignments_arrived();
    assert_eq!(due(&mut registrations, now), ["+7"]);
    registrations.answered(&result(7, false), now);
    assert_eq!(due(&mut registrations, now + RETRY), ["+7"]);
}

#[test]
fn leaving_is_told_until_it_is_confirmed_even_over_sessions() {
    let now = Instant::now();
    let mut registrations = Registrations::default();
    registrations.leave("a", "m", 7);
    registrations.leave("a", "m", 7);
    assert_eq!(due(&mut registrations, now), ["-7"]);
    assert_eq!(due(&mut registrations, now), Vec::<String>::new());
    registrations.session_started();
    assert_eq!(due(&mut registrations, now), ["-7"]);
    assert!(!registrations.left(&left(6)) && registrations.is_leaving("a"));
    assert!(registrations.left(&left(7)) && !registrations.is_leaving("a"));
    assert_eq!(due(&mut registrations, now + RETRY), Vec::<String>::new());
}

#[test]
fn late_answers_count_for_nothing() {
    let now = Instant::now();
    let mut registrations = Registrations::default();
    registrations.want("a", wanted(8));
    due(&mut registrations, now);
    assert!(!registrations.answered(&result(7, true), now));
    assert!(!registrations.left(&left(8)));
    assert_eq!(registrations.standing("a"), Standing::Waiting);
    registrations.leave("a", "m", 8);
    assert!(!registrations.answered(&result(8, true), now));
    assert_eq!(registrations.standing("a"), Standing::None);
}

#[tokio::test]
async fn waiting_for_a_confirmation_ends_with_it_with_the_session_or_with_the_deadline() {
    let registry = std::sync::Arc::new(Registry::new());
    registry.change(|r| r.leave("a", "m", 1));
    assert!(!registry.left("a", Duration::from_secs(60)).await, "no session: nobody will answer");
    registry.set_connected(true);
    assert!(!registry.left("a", Duration::from_millis(5)).await);
    let waiting = tokio::spawn({
        let registry = registry.clone();
        async move { registry.left("a", Duration::from_secs(60)).await }
    });
    tokio::task::yield_now().await;
    registry.change(|r| r.left(&left(1)));
    assert!(waiting.await.unwrap());
    assert!(registry.left("never known", Duration::ZERO).await);
}

#[test]
fn another_share_is_told_again_and_the_same_is_not() {
    let (mut r, now) = (Registrations::default(), Instant::now());
    r.want("a", wanted(1));
    r.want("b", wanted(1));
    let told = |r: &mut Registrations| -> Vec<(String, Option<u32>)> {
        let due = r.due(now, RETRY).into_iter();
        due.filter_map(|m| match m {
            v1::agent_message::Message::Register(m) => Some((m.replica_id, m.weight_percent)),
            _ => None,
        })
        .collect()
    };
    assert_eq!(told(&mut r), [("a".to_owned(), None), ("b".to_owned(), None)]);
    assert!(r.weigh(BTreeMap::from([("a".to_owned(), 50)])));
    assert_eq!(told(&mut r), [("a".to_owned(), Some(50))]);
    assert!(!r.weigh(BTreeMap::from([("a".to_owned(), 50)])));
    assert_eq!(told(&mut r), []);
    assert!(r.weigh(BTreeMap::new()));
    assert_eq!(told(&mut r), [("a".to_owned(), None)]);
}
