use super::*;

fn load(running: u32, age_ms: u64) -> v1::EngineLoad {
    v1::EngineLoad { running, age_ms, generation: 1, ..Default::default() }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn told(response: &DeltaDiscoveryResponse) -> Vec<(String, u32, u64)> {
    let decode = |resource: &Resource| {
        let any = resource.resource.as_ref().expect("content");
        let load = v1::EngineLoad::decode(any.value.as_slice()).expect("valid");
        (resource.name.clone(), load.running, load.age_ms)
    };
    response.resources.iter().map(decode).collect()
}

fn subscribed() -> LoadSession {
    let mut session = LoadSession::default();
    assert!(!session.is_due());
    assert_eq!(session.hear(DeltaDiscoveryRequest::default()), Answer::Nothing);
    session
}

fn answer(response: &DeltaDiscoveryResponse, error: Option<&str>) -> DeltaDiscoveryRequest {
    let error = error.map(|text| penstock_proto::xds::Status { message: text.into(), ..Default::default() });
    DeltaDiscoveryRequest {
        response_nonce: response.nonce.clone(),
        error_detail: error,
        ..Default::default()
    }
}

#[test]
fn a_subscriber_is_told_what_is_new_once_and_with_its_age() {
    let (loads, start) = (Loads::default(), Instant::now() + ms(10_000));
    loads.put("m", "a", &load(3, 40), start);
    loads.put("m", "b", &load(5, 0), start);
    let mut session = subscribed();
    let first = session.next(&loads, 2, start + ms(10)).expect("news");
    assert_eq!(told(&first), [("m/a".into(), 3, 50), ("m/b".into(), 5, 10)]);
    assert_eq!(first.system_version_info, "2.2");
    loads.put("m", "a", &load(4, 0), start + ms(20));
    assert_eq!(session.next(&loads, 2, start + ms(30)), None, "the first is not answered yet");
    loads.put("m", "a", &load(6, 0), start + ms(40));
    assert_eq!(session.hear(answer(&first, None)), Answer::Ack);
    let second = session.next(&loads, 2, start + ms(50)).expect("news");
    assert_eq!(told(&second), [("m/a".into(), 6, 10)], "the newest of each, and only what is new");
    assert_eq!(session.hear(answer(&second, Some("nonsense"))), Answer::Nack("nonsense".into()));
    assert_eq!(session.next(&loads, 2, start + ms(60)), None, "what was refused is not told again");
    assert_eq!(session.hear(answer(&first, None)), Answer::Nothing, "an old answer");
}

#[test]
fn what_stays_as_it_is_is_told_again_now_and_then() {
    let (loads, start) = (Loads::default(), Instant::now() + ms(60_000));
    assert!(loads.put("m", "a", &load(3, 0), start));
    assert!(!loads.put("m", "a", &load(3, 0), start + ms(250)), "as before");
    assert!(!loads.put("m", "a", &load(9, 500), start + ms(250)), "measured earlier: overtaken");
    assert!(loads.put("m", "a", &load(3, 0), start + ms(500)), "busy and not told for a while");
    assert!(loads.put("m", "a", &load(0, 0), start + ms(600)));
    assert!(!loads.put("m", "a", &load(0, 0), start + ms(5_000)), "idle");
    assert!(loads.put("m", "a", &load(0, 0), start + ms(5_700)));
    let fuller = v1::EngineLoad { kv_used_ratio: 0.5, ..load(0, 0) };
    assert!(loads.put("m", "a", &fuller, start + ms(5_800)));
    let hardly = v1::EngineLoad { kv_used_ratio: 0.505, ..load(0, 0) };
    assert!(!loads.put("m", "a", &hardly, start + ms(5_900)));
    let nonsense = v1::EngineLoad { kv_used_ratio: f32::NAN, ..load(0, 0) };
    assert!(loads.put("m", "a", &nonsense, start + ms(6_000)), "taken for 0");
    let reborn = v1::EngineLoad { generation: 2, ..load(0, 0) };
    assert!(loads.put("m", "a", &reborn, start + ms(6_001)), "another process");
}

#[test]
fn old_news_are_forgotten_and_a_response_has_a_largest_size() {
    let (loads, start) = (Loads::default(), Instant::now());
    for n in 0..30 {
        loads.put("m", &format!("e{n}"), &load(1, 0), start);
    }
    let (mark, some) = loads.since(0, 20, start);
    assert_eq!((mark, some.len()), (20, 20));
    assert_eq!(loads.since(mark, 20, start).1.len(), 10);
    loads.put("m", "e0", &load(2, 0), start + ms(900));
    loads.prune(ms(1_000), start + ms(1_500));
    assert_eq!(loads.since(0, 20, start + ms(1_500)).1.len(), 1);
    let inner = loads.lock();
    assert_eq!((inner.order.len(), inner.entries.len()), (1, 1));
}
