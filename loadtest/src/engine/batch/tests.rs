use proptest::prelude::*;

use super::*;

fn settings() -> BatchSettings {
    BatchSettings {
        max_num_seqs: 2,
        max_queued: None,
        ttft_base_us: 10_000,
        prefill_tokens_per_s: 1_000_000,
        itl_base_us: 5_000,
        itl_growth_ns: 0,
        jitter_percent: 0,
        jitter_seed: 0,
        unthrottled: false,
    }
}

fn arrival(id: SeqId, prompt_tokens: u64) -> Arrival {
    Arrival { id, prompt_tokens, blocks: Vec::new(), slow_percent: 100 }
}

/// Times at which each sequence got a token, walking from due to due until `until_us`.
fn walk(batch: &mut Batch, until_us: u64) -> Vec<(u64, SeqId)> {
    let (mut out, mut events, mut now_us) = (Vec::new(), Vec::new(), 0);
    loop {
        batch.advance(now_us, &mut events);
        out.extend(events.drain(..).filter_map(|e| match e {
            Event::Token { id } => Some((now_us, id)),
            _ => None,
        }));
        match batch.next_due_us() {
            Some(due_us) if due_us <= until_us => now_us = due_us,
            _ => return out,
        }
    }
}

fn first(tokens: &[(u64, SeqId)], id: SeqId) -> u64 {
    tokens.iter().find(|t| t.1 == id).unwrap().0
}

#[test]
fn ttft_grows_with_the_prompt_and_with_prompts_before_it() {
    let mut batch = Batch::new(settings(), KvCache::new(10_000));
    batch.submit(0, vec![arrival(1, 30_000), arrival(2, 1_000)]).unwrap();
    let tokens = walk(&mut batch, 100_000);
    assert_eq!(first(&tokens, 1), 10_000 + 30_000);
    assert_eq!(first(&tokens, 2), 10_000 + 31_000, "it waits for the long prefill");
}

#[test]
fn a_third_waits_for_a_slot() {
    let mut batch = Batch::new(settings(), KvCache::new(10_000));
    batch.submit(0, (1..=3).map(|id| arrival(id, 16)).collect()).unwrap();
    let tokens = walk(&mut batch, 30_000);
    assert!(tokens.iter().all(|t| t.1 != 3));
    assert_eq!((batch.running(), batch.waiting()), (2, 1));
    batch.finish(1, &[]);
    let mut events = Vec::new();
    batch.advance(30_000, &mut events);
    assert!(events.contains(&Event::Admitted { id: 3, cached_tokens: 0, waited_us: 30_000 }));
}

#[test]
fn itl_grows_with_the_batch_and_by_the_slow_factor() {
    let gap = |n: u64, slow_percent| {
        let all = BatchSettings { max_num_seqs: 100, itl_growth_ns: 100_000, ..settings() };
        let mut batch = Batch::new(all, KvCache::new(10_000));
        batch.submit(0, (1..=n).map(|id| Arrival { slow_percent, ..arrival(id, 1) }).collect()).unwrap();
        let times: Vec<u64> =
            walk(&mut batch, 200_000).into_iter().filter(|t| t.1 == 1).map(|t| t.0).collect();
        times[1] - times[0]
    };
    assert_eq!(gap(1, 100), 5_100);
    assert_eq!(gap(50, 100), 10_000);
    assert_eq!(gap(1, 300), 15_300);
}

#[test]
fn jitter_is_bounded_and_repeatable() {
    let run = |jitter_seed| {
        let jittery = BatchSettings { jitter_percent: 20, jitter_seed, ..settings() };
        let mut batch = Batch::new(jittery, KvCache::new(10_000));
        batch.submit(0, vec![arrival(1, 1)]).unwrap();
        walk(&mut batch, 300_000)
    };
    let tokens = run(1);
    assert!(tokens.windows(2).all(|w| (4_000..=6_000).contains(&(w[1].0 - w[0].0))));
    assert_eq!(tokens, run(1));
    assert_ne!(tokens, run(2));
}

#[test]
fn a_full_queue_refuses_a_whole_request() {
    let mut batch = Batch::new(BatchSettings { max_queued: Some(3), ..settings() }, KvCache::new(100));
    assert!(batch.submit(0, vec![arrival(1, 1), arrival(2, 1)]).is_ok());
    assert_eq!(batch.submit(0, vec![arrival(3, 1), arrival(4, 1)]), Err(QueueFull));
    assert_eq!(batch.waiting(), 2);
    batch.advance(0, &mut Vec::new());
    assert!(batch.submit(0, vec![arrival(3, 1), arrival(4, 1)]).is_ok(), "the first two run now");
}

#[test]
fn a_stopped_engine_does_not_catch_up() {
    let mut batch = Batch::new(settings(), KvCache::new(100));
    batch.submit(0, vec![arrival(1, 1)]).unwrap();
    let mut events = Vec::new();
    batch.advance(0, &mut events);
    batch.advance(10_001, &mut events);
    events.clear();
    batch.advance(10_000_000, &mut events);
    assert_eq!(events, vec![Event::Token { id: 1 }]);
    assert_eq!(batch.next_due_us(), Some(10_005_000));
}

#[test]
fn without_blocks_the_youngest_is_preempted_and_comes_back() {
    let mut batch = Batch::new(settings(), KvCache::new(4));
    batch.submit(0, vec![arrival(1, 31), arrival(2, 31)]).unwrap();
    let tokens = walk(&mut batch, 400_000);
    assert!(batch.preemptions() >= 1);
    assert!(tokens.iter().filter(|t| t.1 == 1).count() > 40, "the oldest goes on");
    let of_two = tokens.iter().filter(|t| t.1 == 2).count();
    batch.finish(1, &[]);
    let mut events = Vec::new();
    batch.advance(400_001, &mut events);
    assert!(matches!(events[..], [Event::Admitted { id: 2, .. }]), "{events:?}");
    assert!(of_two >= 1);
}

#[test]
fn unthrottled_sequences_free_run() {
    let mut batch = Batch::new(BatchSettings { unthrottled: true, ..settings() }, KvCache::new(10));
    batch.submit(0, vec![arrival(1, 1)]).unwrap();
    let mut events = Vec::new();
    batch.advance(5, &mut events);
    assert_eq!(events[1], Event::FreeRun { id: 1 });
    assert_eq!(batch.next_due_us(), None);
    batch.gave(1, 100);
    assert!(batch.kv().used_ratio() > 0.6);
    batch.finish(1, &[]);
    assert!(batch.kv().used_ratio() < 1e-9);
}

proptest! {
    /// Random comings and goings leave nothing behind, and nobody is forgotten.
    #[test]
    fn nothing_leaks(steps in proptest::collection::vec((0u8..3, 1u64..400), 1..100), blocks in 3usize..40) {
        let mut batch = Batch::new(settings(), KvCache::new(blocks));
        let (mut now_us, mut alive, mut events) = (0, Vec::new(), Vec::new());
        for (i, (action, n)) in steps.into_iter().enumerate() {
            now_us += n * 50;
            match action {
                0 => {
                    let id = i as u64;
                    batch.submit(now_us, vec![arrival(id, n)]).unwrap();
                    alive.push(id);
                }
                1 => batch.advance(now_us, &mut events),
                _ => if !alive.is_empty() {
                    batch.finish(alive.remove(usize::try_from(n).unwrap() % alive.len()), &[]);
                },
            }
            prop_assert_eq!(batch.running() + batch.waiting(), alive.len());
            prop_assert!(batch.running() <= 2);
        }
        for id in alive {
            batch.finish(id, &[]);
        }
        prop_assert_eq!((batch.running(), batch.waiting()), (0, 0));
        prop_assert!(batch.kv().used_ratio() == 0.0);
    }
}
